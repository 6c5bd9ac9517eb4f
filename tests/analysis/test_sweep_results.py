"""sweep.json: what is written is read back, what is damaged is told, and which loss points are compared by."""

import dataclasses
import json
import math

import numpy as np
import pytest
from sweep_folders import make_row

from moejax import config
from moejax.analysis import sweep_results


def make_results(*rows: sweep_results.Row) -> sweep_results.Results:
    return sweep_results.Results(baseline="mamba", points=list(rows))


def test_what_is_written_is_read_back(tmp_path):
    failed = make_row("e8", 1, experts=8, status="failed", error="the loss of step 7 is not finite")
    results = make_results(
        make_row("mamba"), make_row("e8", experts=8, axes={"experts": 8, "granularity": 0.5}), failed
    )
    sweep_results.write(tmp_path, results)
    assert sweep_results.read(tmp_path) == results
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_a_number_that_is_not_finite_is_null(tmp_path):
    sweep_results.write(tmp_path, make_results(make_row("mamba", loss=math.nan, churn=math.inf)))
    row = sweep_results.read(tmp_path).points[0]
    assert (row.loss, row.churn, row.validation_loss) == (None, None, 3.68)


def told(folder) -> str:
    with pytest.raises(config.ConfigError) as error:
        sweep_results.read(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    assert told(tmp_path / "absent").startswith(f"{tmp_path / 'absent'} does not exist; name a sweep's folder")
    assert told(tmp_path).startswith(f"{tmp_path} has no sweep.json; name a sweep's folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "ready"}, "points[0].status='ready', which is no status (waiting, running, done, failed, does not"),
        ({"total": 1.5}, "points[0].total=1.5, which is no whole number"),
        ({"seed": True}, "points[0].seed=True, which is no whole number"),
        ({"loss": "3.7"}, "points[0].loss='3.7', which is no finite number or null"),
        ({"flops": None}, "points[0].flops=None, which is no finite number"),
        ({"error": 3}, "points[0].error=3, which is no text or null"),
        ({"axes": {"experts": "8"}}, "points[0].axes={'experts': '8'}, which are not all numbers"),
        ({"colour": "red"}, "has other fields than a point has in points[0]: colour"),
        ({"name": "e8_s0"}, "has two points with the name e8_s0"),
    ],
)
def test_a_damaged_point_is_refused(tmp_path, change, message):
    content = sweep_results.to_json(make_results(make_row("mamba"), make_row("e8", experts=8)))
    content["points"][0] |= change
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    assert message in told(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"points": []}', '{"baseline": 1, "points": []}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    assert f"{tmp_path}/sweep.json " in told(tmp_path)


def test_a_point_that_lacks_a_field_is_refused(tmp_path):
    content = sweep_results.to_json(make_results(make_row("mamba")))
    del content["points"][0]["loss"]
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    assert "points[0]: loss" in told(tmp_path)


def test_the_moving_average_starts_at_the_first_loss_and_skips_what_is_not_finite():
    average_S = sweep_results.ema(np.array([math.nan, 4.0, 2.0, math.inf, 3.0]), alpha=0.25)
    np.testing.assert_allclose(average_S, [math.nan, 4.0, 3.5, 3.5, 3.375])


def test_points_are_compared_by_the_best_loss_that_all_have():
    long = make_row("long", steps=15_000, validation_loss=None)
    assert sweep_results.measure([make_row("a"), make_row("b")]) == "validation_loss"
    assert sweep_results.measure([make_row("a", steps=15_000), long]) == "ema_loss"
    # 0.999^400: two thirds of its average are the loss of the first step
    assert sweep_results.measure([dataclasses.replace(long, steps=400)]) == "loss"
    assert sweep_results.measure([dataclasses.replace(long, ema_loss=None)]) == "loss"
