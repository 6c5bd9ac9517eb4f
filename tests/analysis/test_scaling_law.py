"""The scaling law: known coefficients come back, intervals hold them as often as they say, poor grids are refused."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from scipy import optimize
from sweep_folders import make_row

from moejax import config
from moejax.analysis import robust_fit, scaling_forms, scaling_law, sweep_results

BILINEAR = {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.4, "e": -0.03}  # a to c as arXiv 2202.01169 found them
FINE = {"c": 0.47, "a": 18.1, "alpha": 0.115, "g": 2.1, "gamma": 0.58, "b": 30.8, "beta": 0.147}  # arXiv 2402.07871


def bilinear(active: float, experts: float, _: float, tokens: float) -> float:
    a, b, c, d, e = BILINEAR.values()
    size, number = math.log10(active), math.log10(experts)
    return 10 ** (a * size + b * number + c * size * number + d + e * math.log10(tokens))


def fine(active: float, _: float, granularity: float, tokens: float) -> float:
    c, a, alpha, g, gamma, b, beta = FINE.values()
    return c + (g / granularity**gamma + a) / active**alpha + b / tokens**beta


def make_points(
    law: Callable[[float, float, float, float], float],
    cells: list[tuple[float, float, float, float]],
    *,
    seeds: int = 1,
    noise: float = 0.0,
    draw: int = 0,
) -> list[sweep_results.Row]:
    """Points of cells (active parameters, expansion rate, granularity, tokens)."""
    rng, rows = np.random.default_rng(draw), []
    for index, (active, expansion, granularity, tokens) in enumerate(cells):
        for seed in range(seeds):
            loss = law(active, expansion, granularity, tokens) * math.exp(noise * rng.normal())
            axes = {"experts": expansion * granularity, "granularity": granularity, "top_k": granularity}
            row = make_row(f"p{index}", seed, experts=1, axes=axes, validation_loss=loss, tokens=int(tokens))
            row.non_embedding_active = int(active)
            rows.append(row)
    return rows


def fit(rows: list[sweep_results.Row], **how) -> scaling_law.Fit:
    return scaling_law.fit(sweep_results.Results(baseline=None, points=rows), **{"num_resamples": 99} | how)


def crossed(active=(1e7,), expansion=(1,), granularity=(1,), tokens=(1e9,)) -> list[tuple[float, float, float, float]]:
    return list(itertools.product(active, expansion, granularity, tokens))


FULL = crossed((1e7, 3e7, 1e8), (1, 4, 16, 64), (1,), (1e9, 4e9))
FINE_FULL = crossed((1e7, 3e7, 1e8), (8,), (1, 2, 4, 8), (1e9, 4e9, 16e9))


# --- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "cells", "true"),
    [(bilinear, FULL, BILINEAR), (fine, FINE_FULL, FINE)],
    ids=["bilinear", "fine-grained"],
)
def test_coefficients_come_back_from_losses_without_noise(law, cells, true):
    found = fit(make_points(law, cells)).coefficients
    assert {name: one.value for name, one in found.items()} == pytest.approx(true, rel=1e-3)


def test_the_expansion_rate_has_an_exponent_of_its_own_where_it_varies_beside_granularity():
    def law(active, expansion, granularity, tokens):
        return 0.5 + (2.0 / granularity**0.6 + 18.0) * expansion**-0.05 / active**0.115

    found = fit(make_points(law, crossed((1e7, 3e7, 1e8), (4, 16, 64), (1, 2, 4)))).coefficients
    true = {"c": 0.5, "a": 18.0, "alpha": 0.115, "delta": -0.05, "g": 2.0, "gamma": 0.6}
    assert {name: one.value for name, one in found.items()} == pytest.approx(true, rel=1e-3)


def test_intervals_hold_the_truth_as_often_as_they_say():
    # a small version of scripts/study_fit.py: 171 are expected; intervals a third longer give 176
    inside = Counter()
    cells = crossed((1e7, 1e8), (1, 4, 16, 64))
    for draw in range(60):
        law = fit(make_points(bilinear, cells, seeds=2, noise=0.003, draw=draw), num_resamples=199)
        for name in "abc":
            inside[name] += law.coefficients[name].low <= BILINEAR[name] <= law.coefficients[name].high
    assert min(inside.values()) >= 54
    assert 162 <= inside.total() <= 174


def test_one_bad_point_moves_the_law_little():
    rows = make_points(bilinear, FULL, noise=0.002)
    before = fit(rows).coefficients["e"].value
    rows[5].validation_loss *= 1.2
    after = fit(rows).coefficients["e"].value
    logs = np.log10([row.validation_loss for row in rows])
    columns = [[1, math.log10(n), math.log10(e), math.log10(n) * math.log10(e), math.log10(d)] for n, e, _, d in FULL]
    squares = np.linalg.lstsq(np.array(columns), logs)[0][4]
    assert abs(after - before) < 0.1 * abs(squares - before)


def test_a_refit_equals_scipys():
    rows = make_points(fine, FINE_FULL, noise=0.01)
    cells = [scaling_forms.Cell(expansion=e, granularity=g, active=n, tokens=d) for n, e, g, d in FINE_FULL]
    form, log_loss_X = scaling_forms.choose(cells), np.log([row.validation_loss for row in rows])
    curve = robust_fit.Curve(at=lambda theta_BP: form.at(cells, theta_BP), starts=[])
    start_P = form.starts(cells, log_loss_X)[0]
    # differences instead of derivatives: these are checked as well
    other = optimize.least_squares(
        lambda theta_P: form.at(cells, theta_P[None])[0][0] - log_loss_X,
        start_P,
        loss="huber",
        f_scale=0.01,
        xtol=1e-14,
    )
    ours_P = robust_fit.refit(curve, log_loss_X[None], start_P, 0.01)[0]
    np.testing.assert_allclose(form.at(cells, ours_P[None])[0][0], form.at(cells, other.x[None])[0][0], atol=1e-6)


def test_seeds_of_a_setting_are_one_observation():
    rows = make_points(bilinear, FULL, noise=0.003)
    again = [*rows, *make_points(bilinear, FULL, noise=0.003)]  # each point twice: nothing new is known
    assert fit(again).coefficients == fit(rows).coefficients
    assert fit(again).seed_deviation == pytest.approx(0.0, abs=1e-12)
    assert [setting.seeds for setting in fit(again).settings] == [2] * len(FULL)


def test_the_same_points_give_the_same_law():
    rows = make_points(bilinear, FULL, noise=0.003)
    assert fit(rows) == fit(rows)
    assert fit(rows).coefficients != fit(rows, seed=1).coefficients


# --- what it says ----------------------------------------------------------------------------------------------------


def test_a_grid_of_experts_alone_says_what_it_holds_constant():
    rows = make_points(bilinear, crossed((26e6,), (1, 4, 8, 16, 32)), noise=0.001)
    dense = make_row("mamba", validation_loss=9.0)
    law = fit([*rows, dense, make_row("e64", experts=64, status="waiting")])
    assert list(law.coefficients) == ["d", "b"]
    assert law.coefficients["b"].value == pytest.approx(-0.108 + 0.009 * math.log10(26e6), abs=2e-3)
    text = scaling_law.table(law)
    assert "not in the law: a: active parameters have one value (26M), so a log N is part of d" in text
    assert "not in the law: e: tokens have one value (1B), so e log D is part of d" in text
    assert "1 finished points without a MoE layer are another architecture and not in the fit" in text
    assert "1 of 7 points have not finished" in text


def test_sizes_that_do_not_cross_leave_out_their_product():
    star = [*crossed((26e6,), (1, 4, 16, 64)), *crossed((1e7, 1e8), (1,))]
    law = fit(make_points(bilinear, star))
    assert list(law.coefficients) == ["d", "a", "b"]
    assert law.notes[0] == "c: experts vary at one size only, so b is that of this size; vary them at another too"


def test_a_setting_that_is_no_axis_and_varies_is_told():
    rows = make_points(bilinear, crossed((26e6,), (1, 4, 8, 16, 32)), noise=0.001)
    for row in rows:
        row.settings |= {"model.moe.d_expert": 10, "model.moe.num_experts": int(row.axes["experts"])}
    assert not any("model" in note for note in fit(rows).notes)
    rows[0].settings["model.moe.router"] = "hash"
    (note,) = [note for note in fit(rows).notes if "model" in note]
    assert note.startswith("model.moe.router, which varies (hash, the base's): what it does is taken for the work of")


def test_everything_beyond_the_grid_is_marked():
    law = fit(make_points(bilinear, FULL, noise=0.002))
    content = json.loads(json.dumps(scaling_law.to_json(law)))
    assert all(entry["extrapolated"] for entry in content["extrapolations"])
    places = {(entry["axis"], entry["value"]): entry["loss"] for entry in content["extrapolations"]}
    assert set(places) == {
        *(("expansion", value) for value in (128, 256)),
        *(("active", value) for value in (2e8, 4e8)),
        *(("tokens", value) for value in (8e9, 16e9)),
    }
    loss = places["tokens", 16e9]
    assert loss["low"] < loss["value"] < loss["high"]
    assert loss["value"] == pytest.approx(bilinear(1e8, 64, 1, 16e9), rel=0.01)
    assert "EXTRAPOLATED" in scaling_law.table(law)
    assert "tokens 16B (4x the largest)" in scaling_law.table(law)


def test_a_doubling_changes_the_loss_as_the_form_says():
    law = fit(make_points(bilinear, FULL))
    middle = 10 ** np.mean([math.log10(active) for active, *_ in FULL])
    assert law.doublings["tokens"].value == pytest.approx(2**-0.03 - 1)
    assert law.doublings["expansion"].value == pytest.approx(2 ** (-0.108 + 0.009 * math.log10(middle)) - 1)


def test_residuals_are_those_of_the_settings():
    rows = make_points(bilinear, FULL, noise=0.003)
    law = fit(rows)
    for setting, row in zip(law.settings, rows, strict=True):
        assert setting.observed == pytest.approx(row.validation_loss)
    residuals = [math.log(setting.observed / setting.fitted) for setting in law.settings]
    assert law.residual_deviation == pytest.approx(math.sqrt(sum(r * r for r in residuals) / (24 - 5)))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "points=0 of 0 have finished"),
        ([make_row("mamba")], "points=1 have finished and none of them has a MoE layer; add points with experts"),
        (
            make_points(bilinear, crossed((1e7, 3e7, 1e8), (8,), (1,), (1e9, 4e9, 16e9)), seeds=2),
            "experts=8 is the only number of experts",
        ),
        (
            make_points(bilinear, [(1e8 / e, e, 1, 1e9) for e in (1, 2, 4, 8, 16, 32)]),
            "experts and active parameters move together over the grid",
        ),
        (
            make_points(bilinear, [(n, e, 1, 20 * n) for n in (1e7, 3e7, 1e8) for e in (1, 8, 64)]),
            "active parameters and tokens move together over the grid",
        ),
        (
            make_points(bilinear, crossed((1e7,), (1, 8, 32)), seeds=5),
            "points=3 settings have finished, and 2 coefficients with their error need 4; add 1 with other experts",
        ),
        (
            make_points(fine, crossed((1e7, 1e8), (8,), (1, 2, 4, 8), (1e9,))),
            "active parameters=10M and 100M are two values, and a power law with a floor needs three",
        ),
        (
            make_points(lambda n, e, g, d: 4.0 + 0.02 * math.log(g), crossed((1e7,), (8,), (1, 2, 4, 8, 16, 32))),
            "undetermined",
        ),
    ],
)
def test_points_that_cannot_identify_the_law_are_refused(rows, message):
    with pytest.raises(config.ConfigError) as error:
        fit(rows)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
