"""The comparison of a sweep: its numbers against hand-worked ones, and its page and tables against its numbers."""

import argparse
import csv
import json
import math
import pathlib

import numpy as np
import pytest
from report_pages import Page
from sweep_folders import TOKENS, curve, make_metrics, make_row, make_sweep

from moejax import config
from moejax.analysis import comparison, comparison_figures, comparison_page, report
from moejax.cli import commands

ERROR = "the loss of step 31 is not finite (loss nan, gradient norm 3.1)"
ENDS = {"mamba": 3.72, "e1_k1": 3.75, "e4_k1": 3.7}
STEPS = 60


def rows_of(seeds: int, **fields) -> list:
    rng = np.random.default_rng(0)
    experts = {"mamba": 0, "e1_k1": 1, "e4_k1": 4}
    return [
        make_row(
            group,
            seed,
            experts=experts[group],
            steps=STEPS,
            tokens=STEPS * TOKENS,
            validation_loss=end + 0.01 * rng.normal(),
            **fields,
        )
        for group, end in ENDS.items()
        for seed in range(seeds)
    ]


def losses_of(row) -> list[float]:
    return curve(ENDS[row.group], steps=row.steps, seed=row.seed) if row.status == "done" else []


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    """The page of three settings with two seeds, one point of which failed."""
    rows = rows_of(2)
    failed = make_row("e4_k1", 2, experts=4, steps=STEPS, tokens=STEPS * TOKENS, status="failed", error=ERROR)
    return report.write([make_sweep(tmp_path_factory.mktemp("comparison") / "experts", [*rows, failed], losses_of)])


@pytest.fixture(scope="module")
def found(written) -> dict:
    return json.loads(written.with_suffix(".json").read_text())


# --- statistics ------------------------------------------------------------------------------------------------------


def make_curve(losses: list[float], tokens: list[float]) -> comparison.Curve:
    step = np.arange(1.0, len(losses) + 1)
    return comparison.Curve(
        step=step, tokens=np.array(tokens, float), flops=step, seconds=step, loss=np.array(losses, float)
    )


def test_tokens_to_reach_a_loss_are_those_of_the_first_time_it_was_reached():
    falling = make_curve([5.0, 4.0, 4.5, 3.0], [10, 20, 30, 40])
    levels = [6.0, 5.0, 4.5, 4.0, 3.75, 3.0, 2.9]
    # 4.5 half way between the first two steps; 3.75 half way from 4.5 to 3
    expected = [math.nan, math.nan, 15, 20, 35, 40, math.nan]
    np.testing.assert_allclose(comparison.tokens_to_reach(falling, np.array(levels)), expected)


def test_steps_without_a_loss_are_bridged():
    broken = make_curve([math.nan, 5.0, math.nan, 3.0], [10, 20, 30, 40])
    np.testing.assert_allclose(comparison.tokens_to_reach(broken, np.array([4.0])), [30])


def test_speedup_is_the_baselines_tokens_over_the_points():
    slow, fast = make_curve([6, 5, 4, 3], [10, 20, 30, 40]), make_curve([6, 4, 3, 2], [10, 20, 30, 40])
    np.testing.assert_allclose(comparison.speedup(slow, fast, np.array([4.0, 3.5, 3.0])), [1.5, 1.4, 4 / 3])
    np.testing.assert_allclose(comparison.speedup(fast, slow, np.array([4.0, 2.5])), [2 / 3, math.nan])


def test_the_paired_test_equals_one_worked_by_hand():
    # differences -0.1, -0.2, -0.3: t = -0.2 / (0.1 / sqrt(3)) = -3.4641 with 2 degrees of freedom, whose distribution
    # has the closed form p = 1 - |t| / sqrt(t^2 + 2); the quantile of the interval is 4.3027
    result = comparison.paired({0: 3.9, 1: 3.7, 2: 3.5, 7: 1.0}, {2: 3.8, 1: 3.9, 0: 4.0, 8: 9.0})
    assert result["pairs"] == 3
    assert result["mean"] == pytest.approx(-0.2)
    assert result["p"] == pytest.approx(1 - math.sqrt(12) / math.sqrt(14))
    assert (result["low"], result["high"]) == pytest.approx((-0.2 - 0.24841, -0.2 + 0.24841), abs=1e-5)


def test_there_is_no_test_of_one_pair_and_none_of_equal_differences():
    nothing = {"low": None, "high": None, "p": None}
    assert comparison.paired({0: 3.5}, {0: 3.75, 1: 4.0}) == {"pairs": 1, "mean": -0.25} | nothing
    assert comparison.paired({0: 3.5, 1: 4.5}, {0: 3.0, 1: 4.0}) == {"pairs": 2, "mean": 0.5} | nothing
    assert comparison.paired({0: 3.5}, {1: 3.5}) == {"pairs": 0, "mean": None} | nothing


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_line_is_the_mean_of_the_seeds_and_its_band_their_deviation(tmp_path):
    rows = [make_row("mamba", seed, steps=3, tokens=3 * TOKENS, flops=30.0) for seed in range(3)]
    losses = {0: [5.0, 4.0, 3.0], 1: [5.0, 4.2, 3.6], 2: [5.0, 4.4, 3.3]}
    # 15 / 3 steps would be more than the whole of a new loss, so the lines are the losses themselves
    result = comparison.numbers(make_sweep(tmp_path / "sweep", rows, lambda row: losses[row.seed]))
    assert result["alpha"] == 1.0
    line = result["curves"]["mamba"]
    assert line["step"] == [1, 2, 3]
    assert line["tokens"] == [TOKENS, 2 * TOKENS, 3 * TOKENS]
    assert line["flops"] == pytest.approx([10.0, 20.0, 30.0])
    assert line["seconds"] == pytest.approx([0.5, 1.0, 1.5])
    assert line["loss"] == pytest.approx([5.0, 4.2, 3.3])
    assert line["deviation"] == pytest.approx([0.0, 0.2, 0.3])


def test_lines_look_back_on_a_fifteenth_of_the_shortest_run(tmp_path):
    rows = [make_row("mamba", steps=30), make_row("e4", experts=4, steps=60)]
    result = comparison.numbers(make_sweep(tmp_path / "short", rows, lambda row: [4.0, 2.0]))
    assert result["alpha"] == pytest.approx(0.5)
    assert result["curves"]["e4"]["loss"] == [4.0, 3.0]
    paper = make_sweep(tmp_path / "long", [make_row("mamba", steps=15_000)], lambda row: [4.0])
    assert comparison.numbers(paper)["alpha"] == pytest.approx(0.001)
    longer = make_sweep(tmp_path / "longer", [make_row("mamba", steps=150_000)], lambda row: [4.0])
    assert comparison.numbers(longer)["alpha"] == 0.001


def test_speedup_at_the_end_is_at_the_lowest_loss_that_both_reached(tmp_path):
    losses = {"mamba": [6.0, 5.0, 4.0, 3.0], "fast": [6.0, 4.0, 3.0, 2.0], "slow": [7.0, 6.0, 5.0, 4.0]}
    rows = [make_row(group, steps=4, tokens=4 * TOKENS) for group in losses]
    result = comparison.numbers(make_sweep(tmp_path / "sweep", rows, lambda row: losses[row.group]))
    ends = {group["group"]: group["speedup"] for group in result["groups"]}
    assert ends["fast"] == {"mean": pytest.approx(4 / 3), "deviation": None}
    assert ends["slow"] == {"mean": pytest.approx(3 / 4), "deviation": None}
    assert ends["mamba"] == {"mean": None, "deviation": None}
    # from the first loss of the baseline, whose first tenth ends in its first step, to the lowest that it has
    levels = result["speedup"]["fast"]
    assert levels[-1]["loss"] == 3.0
    assert levels[-1]["mean"] == pytest.approx(4 / 3)
    assert all(entry["loss"] < 6.0 for entry in levels)


@pytest.mark.parametrize("losses", [[6.0, 6.5, 7.0], [6.0], [math.nan, math.nan], [6.0, math.nan]])
def test_a_point_that_never_fell_has_a_page_and_no_speedup(tmp_path, losses):
    rows = [make_row("mamba", steps=3), make_row("lr1", steps=3)]
    folder = make_sweep(tmp_path / "sweep", rows, lambda row: [6.0, 5.0, 4.0] if row.group == "mamba" else losses)
    result = comparison.numbers(folder)
    assert result["groups"][1]["speedup"] == {"mean": None, "deviation": None}
    assert json.loads(report.write([folder]).with_suffix(".json").read_text())["groups"] == result["groups"]


def test_the_baseline_may_be_another_setting(tmp_path):
    rows = [make_row(group, seed, steps=3) for group in ("mamba", "e1", "e4") for seed in (0, 1)]
    levels = {"mamba": 0.0, "e1": 0.5, "e4": 0.25}
    losses = lambda row: [6.0, 5.0, 3.0 + levels[row.group] + 0.01 * row.seed]  # noqa: E731
    folder = make_sweep(tmp_path / "sweep", rows, losses)
    found = json.loads(report.write([folder], baseline="e1").with_suffix(".json").read_text())
    assert found["baseline"] == "e1"
    assert {group["group"]: group["difference"]["pairs"] for group in found["groups"]} == {"mamba": 2, "e1": 0, "e4": 2}
    with pytest.raises(
        config.ConfigError, match="--baseline=e2 is no setting of this sweep; choose one of mamba, e1, e4"
    ):
        report.write([folder], baseline="e2")


def test_groups_are_those_of_the_finished_points(found):
    groups = {group["group"]: group for group in found["groups"]}
    assert list(groups) == list(ENDS)
    assert (groups["e4_k1"]["points"], groups["e4_k1"]["seeds"]) == (3, [0, 1])
    points = [point for point in found["points"] if point["status"] == "done"]
    for name, group in groups.items():
        first, second = (point["validation_loss"] for point in points if point["group"] == name)
        assert group["loss"]["mean"] == pytest.approx((first + second) / 2)
        assert group["loss"]["deviation"] == pytest.approx(abs(first - second) / math.sqrt(2))
    assert found["measure"] == "validation_loss"


def test_points_are_compared_by_training_loss_where_one_has_no_validation(tmp_path):
    rows = [make_row("mamba", loss=3.5), make_row("e4", experts=4, validation_loss=None, loss=3.25)]
    result = comparison.numbers(make_sweep(tmp_path / "sweep", rows, lambda row: [4.0, 3.0]))
    assert result["measure"] == "loss"
    assert result["groups"][1]["difference"]["mean"] == -0.25


def test_a_group_without_a_finished_point_has_the_line_of_the_running_one(tmp_path):
    rows = [
        make_row("mamba"),
        make_row("mamba", 1, status="running"),
        make_row("e4", experts=4, status="running"),
        make_row("e8", experts=8, status="failed", error=ERROR),
        make_row("e16", experts=16, status="waiting"),
    ]
    done = {"done": [5.0, 4.0], "running": [9.0], "failed": [8.0, 8.0], "waiting": []}
    result = comparison.numbers(make_sweep(tmp_path / "sweep", rows, lambda row: done[row.status]))
    assert {group: len(line["step"]) for group, line in result["curves"].items()} == {"mamba": 2, "e4": 1}
    assert [group["loss"]["mean"] for group in result["groups"][1:]] == [None] * 3
    assert result["speedup"] == {}


# --- the page and its tables -----------------------------------------------------------------------------------------


def table(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_csvs_have_the_numbers_of_the_json(written, found):
    rows = table(written.with_suffix(".csv"))
    assert len(rows) == len(found["groups"])
    for row, group in zip(rows, found["groups"], strict=True):
        assert row["group"] == group["group"]
        for name in ("loss", "validation_loss", "ema_loss", "last_loss", "speedup", "difference"):
            for part, value in group[name].items():
                assert row[f"{name}_{part}"] == ("" if value is None else str(value))
        assert (row["seeds"], row["non_embedding_total"]) == ("0 1", str(group["non_embedding_total"]))
    curves = table(written.with_name("report_curves.csv"))
    levels = table(written.with_name("report_speedup.csv"))
    for group, line in found["curves"].items():
        of_group = [row for row in curves if row["group"] == group]
        assert all([float(row[name]) for row in of_group] == line[name] for name in line)
    for group, entries in found["speedup"].items():
        of_group = [row for row in levels if row["group"] == group]
        assert [{name: float(row[name]) for name in entries[0]} for row in of_group] == entries
    routing = table(written.with_name("report_routing.csv"))
    assert list(found["routing"]) == ["e4_k1"]  # one expert gets everything
    for name, line in found["routing"]["e4_k1"]["curves"].items():
        of_group = [row for row in routing if (row["group"], row["statistic"]) == ("e4_k1", name)]
        assert [[float(row[column]) for row in of_group] for column in line] == list(line.values())


def test_the_page_has_the_numbers_of_the_json(written, found):
    text = Page(written).text
    for group in found["groups"]:
        assert f"{group['loss']['mean']:.3f} ± {group['loss']['deviation']:.3f}" in text
    best = found["groups"][2]
    assert f"Of 3 settings, e4_k1 has the lowest validation loss: {best['loss']['mean']:.3f} ± " in text
    loss = best["difference"]
    row = f"{loss['mean']:+.3f} {loss['low']:+.3f} to {loss['high']:+.3f} {loss['p']:.3f} "
    row += f"{best['speedup']['mean']:.2f} ± {best['speedup']['deviation']:.2f}"
    assert f"{row} 2 of 3" in text.replace("−", "-")
    assert "94% of it is still the loss of the first step" in text  # 0.999^59


def test_a_failed_point_is_named_with_why(written):
    assert f"1 point has no result: e4_k1_s2 failed: {ERROR}" in Page(written).text


def test_the_page_stands_alone_and_its_ids_are_unique(written):
    page = Page(written)
    assert page.fetched == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert page.references <= set(page.ids)
    # four of the loss, three of the final loss, speed-up; imbalance, entropy, unused, dropped; load of four experts
    assert page.tags.count("svg") == 4 + 3 + 1 + 4 + 1


def test_every_setting_is_in_every_legend(written):
    titles = written.read_text().split("<figure")[1:5]
    assert all(all(f">{group}<" in figure for group in ENDS) for figure in titles)


def test_the_page_of_an_unfinished_sweep_of_one_seed(tmp_path):
    rows = rows_of(1)
    waiting = make_row("<b>$e8$ & _k1", 0, experts=8, steps=STEPS, status="waiting")
    page = Page(report.write([make_sweep(tmp_path / "sweep", [*rows, waiting], losses_of)]))
    assert "The sweep goes on: 3 of 4 points have finished, 1 waiting." in page.text
    assert "One seed beside mamba: there is no test" in page.text
    assert "<b>$e8$ & _k1 8" in page.text


def test_a_sweep_that_has_not_begun_has_a_page(tmp_path):
    folder = make_sweep(tmp_path / "sweep", [make_row("a", status="waiting")], lambda row: [], baseline="none")
    text = Page(report.write([folder])).text
    assert "None of the 1 points has finished yet." in text
    assert "The baseline none is no setting of this sweep" in text


def test_settings_that_differ_in_more_than_experts_are_lines_of_their_own():
    def group(name, number, active, **settings):
        axes = {"experts": number, "granularity": 1, "top_k": 1}
        about = {"group": name, "axes": axes, "settings": settings}
        return about | {"non_embedding_active": active, "tokens": 1e9, "non_embedding_total": 1}

    small = [
        group(f"s{e}", e, active, **{"model.moe.num_experts": e})
        for e, active in ((1, 100_000), (8, 101_000), (32, 104_000))
    ]
    large = [group("l1", 1, 900_000), group("l8", 8, 901_000)]
    routed = [group("r8", 8, 101_000, **{"model.moe.router": "hash"})]
    found = comparison_figures.series([*small, *large, *routed])
    assert {label: [one["group"] for one in members] for label, members in found.items()} == {
        "100,000 active, default router": ["s1", "s8", "s32"],
        "900,000 active, default router": ["l1", "l8"],
        "100,000 active, hash": ["r8"],
    }
    rates = [group(f"lr{e}", e, 100_000, **{"optimizer.learning_rate": 0.5 / e}) for e in (1, 2)]
    assert list(comparison_figures.series(rates)) == ["learning_rate 0.5", "learning_rate 0.25"]


def test_settings_that_differ_in_granularity_alone_are_a_line_along_it():
    def group(name, number, granularity):
        axes = {"experts": number, "granularity": granularity, "top_k": granularity}
        return {"group": name, "axes": axes, "settings": {}, "non_embedding_active": 100_000, "tokens": 1e9}

    groups = [group("a1", 8, 1), group("a4", 32, 4), group("b1", 16, 1), group("b4", 64, 4)]
    found = comparison_figures.series(groups, along="granularity")
    assert {label: [one["group"] for one in members] for label, members in found.items()} == {
        "8 experts / granularity": ["a1", "a4"],
        "16 experts / granularity": ["b1", "b4"],
    }


def test_long_names_lose_what_all_but_the_baseline_share():
    names = ["mamba", "model_router_switch_e4_c1", "model_router_hash_e4_c1", "model_router_hash_e16_c1"]
    assert list(comparison_page.short_names(names, "mamba").values()) == ["mamba", "switch_e4", "hash_e4", "hash_e16"]
    assert list(comparison_page.short_names(["mamba", "e1_k1", "e4_k1"], "mamba").values()) == [
        "mamba",
        "e1_k1",
        "e4_k1",
    ]
    # a word is left of each, and no two are called the same
    nested = ["a_long_beginning_e1", "a_long_beginning_e1_k2", "a_long_beginning"]
    assert list(comparison_page.short_names(nested, None).values()) == ["beginning_e1", "beginning_e1_k2", "beginning"]
    same = ["mamba", "a_long_beginning_mamba", "a_long_beginning_moe"]
    assert list(comparison_page.short_names(same, "mamba").values()) == same


# --- report ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_sweeps_page(tmp_path, capsys):
    folder = make_sweep(tmp_path / "sweep", [make_row("a", status="waiting")], lambda row: [])
    output = tmp_path / "page.html"
    assert commands.report(argparse.Namespace(folders=[folder], output=output, baseline=None), []) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "page.html",
        "page.json",
        "page.csv",
        "page_points.csv",
        "page_curves.csv",
        "page_speedup.csv",
        "page_routing.csv",
    }


def test_a_sweep_beside_a_run_is_refused(tmp_path):
    folder = make_sweep(tmp_path / "sweep", [make_row("a", status="waiting")], lambda row: [])
    make_metrics(tmp_path / "run", [4.0])
    with pytest.raises(config.ConfigError, match="is a sweep, which has a page of its own; name it alone"):
        report.write([tmp_path / "run", folder])
