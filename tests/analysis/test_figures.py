"""The figures of the report: bins against loops, and what is drawn and told."""

import math
import re

import numpy as np
import pytest
from matplotlib import figure as mpl_figure
from report_pages import NUM_EXPERTS, NUM_LAYERS

from moejax.analysis import comparison_figures, figures, heatmaps

# --- bins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "num_steps", "max_bins"), [(1, 7, 200), (1, 600, 200), (11, 250, 200), (5, 1, 3)])
def test_a_bin_is_the_mean_of_its_steps(first, num_steps, max_bins):
    steps_S = np.arange(first, first + num_steps)
    values_SLE = np.random.default_rng(0).normal(size=(num_steps, NUM_LAYERS, NUM_EXPERTS))
    values_SLE[0, 0, 0] = np.nan
    middle_N, mean_NLE = figures.bin_means(steps_S, values_SLE, max_bins)

    num_bins = min(max_bins, num_steps)
    width = num_steps / num_bins
    assert mean_NLE.shape == (num_bins, NUM_LAYERS, NUM_EXPERTS)
    for index in range(num_bins):
        inside = [s for s in range(num_steps) if index * num_steps <= s * num_bins < (index + 1) * num_steps]
        assert abs(len(inside) - width) < 1
        for layer in range(NUM_LAYERS):
            for expert in range(NUM_EXPERTS):
                values = [values_SLE[s, layer, expert] for s in inside if not math.isnan(values_SLE[s, layer, expert])]
                expected = sum(values) / len(values) if values else math.nan
                assert mean_NLE[index, layer, expert] == pytest.approx(expected, nan_ok=True)
        assert middle_N[index] == pytest.approx(first - 0.5 + (index + 0.5) * width)


def test_a_bin_without_a_step_is_nan():
    middle_N, mean_N = figures.bin_means(np.array([1, 2, 9, 10]), np.array([1.0, 3.0, 5.0, 7.0]), max_bins=5)
    np.testing.assert_array_equal(mean_N, [2.0, np.nan, np.nan, np.nan, 6.0])
    np.testing.assert_array_equal(middle_N, [1.5, 3.5, 5.5, 7.5, 9.5])


# --- figures ---------------------------------------------------------------------------------------------------------


def loss_curves(loss_S: np.ndarray) -> figures.LossCurves:
    missing_S = np.full(len(loss_S), np.nan)
    return figures.LossCurves(
        name="run", steps_S=np.arange(len(loss_S)) + 1, loss_S=loss_S, ema_S=loss_S, validation_S=missing_S
    )


def test_a_baseline_beyond_the_scale_is_told_in_the_caption_and_not_drawn():
    low = figures.loss("loss", [loss_curves(np.linspace(4.2, 4.0, 50))], {"uniform": 8.32, "bigram": 4.43})
    assert "Off the scale: uniform (8.32)." in low.caption
    assert "bigram 4.43" in low.svg
    assert "uniform 8.32" not in low.svg
    high = figures.loss("loss", [loss_curves(np.linspace(9.0, 4.0, 50))], {"uniform": 8.32, "bigram": 4.43})
    assert "Off the scale" not in high.caption
    assert "uniform 8.32" in high.svg


def test_a_spike_does_not_set_the_scale_and_is_told():
    loss_S = np.linspace(4.2, 4.0, 50)
    loss_S[3] = 80.0
    assert "Some steps lie above the scale, up to 80.00." in figures.loss("loss", [loss_curves(loss_S)], {}).caption


def test_many_layers_are_dealt_to_several_figures_of_one_scale():
    load_SLE = np.random.default_rng(0).dirichlet(np.ones(16), (20, 4))
    panels = heatmaps.load("load", np.arange(20) + 1, load_SLE)
    titles = [re.findall(r"MoE layer (\d+)", panel.svg) for panel in panels]
    assert len(panels) > 1
    assert [int(layer) for layers in titles for layer in layers] == list(range(4))
    assert panels[0].title == f"Expert load, layers 0 to {len(titles[0]) - 1}"
    # the scale of colour is drawn behind the layers
    scales = [re.findall(r">(\d+(?:\.\d+)?)<", panel.svg.rpartition("MoE layer")[2]) for panel in panels]
    assert len(scales[0]) > 2
    assert all(scale == scales[0] for scale in scales)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"]),
        ([395_520, 466_944, 2_202_624, 2_231_296], ["396,000", "2.2M"]),
    ],
)
def test_values_that_stand_too_near_for_their_labels_have_one_tick(values, shown):
    axes = mpl_figure.Figure().add_subplot()
    axes.set_xscale("log")
    comparison_figures.value_ticks(axes, values)
    assert [label.get_text() for label in axes.get_xticklabels()] == shown
