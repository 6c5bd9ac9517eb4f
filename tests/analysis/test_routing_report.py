"""Routing in the report: statistics against loops over the rows, what is left out, and several routers on one page."""

import json
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
from report_pages import ATTACK, NUM_EXPERTS, NUM_LAYERS, Page, first_result, make_rows, make_run

from moejax.analysis import figures, heatmaps, report, routing_report

LABELS = ["arts", "<b>maths", "$x$"]


def full_rows(num_steps: int) -> list[dict]:
    """Rows of a router that has every statistic; churn every 10 steps from the second evaluation on."""
    rng = np.random.default_rng(1)
    rows = make_rows(num_steps)
    for row in rows:
        del row["balance_loss"]
        load = np.array(row["load"])
        row |= {"z_loss": 4.0 / row["step"], "importance_loss": 0.1}
        row |= {"max_load": (load.max(1) * NUM_EXPERTS).tolist(), "unused_experts": [0.0] * NUM_LAYERS}
        row |= {"experts_per_token": [2.0, float(rng.uniform(1, 2))], "coactivation": [0.4, 0.5]}
        if row["step"] % 10 == 0 and row["step"] > 10:
            row["churn"] = [1 / row["step"], 2 / row["step"]]
    return rows


def make_choices(*, labels: bool = True, together: bool = True, num_experts: int = NUM_EXPERTS) -> dict:
    token = {"token": ATTACK, "count": 1234, "share": 0.125, "lift": 3.4}
    layer = {
        "load": [1 / num_experts] * num_experts,
        "preferred": [1.0] + [0.0] * (num_experts - 1),
        "tokens": [[token, token | {"token": "␣the"}]] + [[]] * (num_experts - 1),
        "labels": [[0.5, None, 0.25]] * num_experts if labels else [[]] * num_experts,
        "coactivation": np.full((num_experts, num_experts), 7).tolist() if together else None,
    }
    return {
        "min_count": 5,
        "labels": LABELS if labels else [],
        "label_tokens": [9, 0, 4] if labels else [],
        "layers": [layer] * NUM_LAYERS,
    }


def make_routed(folder, rows, choices=None, **moe):
    make_run(folder, rows)
    if choices is not None:
        evaluation = json.loads((folder / "eval.json").read_text())
        (folder / "eval.json").write_text(json.dumps(evaluation | {"routing": choices}))
    settings = json.loads((folder / "config.json").read_text())
    settings["model"]["moe"] |= moe
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing") / "full"
    return report.write([make_routed(folder, full_rows(57), make_choices(), router="gshard")])


def titles(page: Page) -> list[str]:
    return re.findall(r"<h3>([^<]+)</h3>\s*<div", page.source)


# --- one run ---------------------------------------------------------------------------------------------------------


def test_every_statistic_has_its_panel_with_a_caption(written):
    page = Page(written)
    assert titles(page)[4:] == [
        "Expert load",
        "Imbalance",
        "Unused experts",
        "Dropped tokens",
        "Router entropy",
        "Auxiliary losses",
        "Churn",
        "Experts per token",
        "Experts chosen together",
        "Labels",
    ]
    captions = re.findall(r"<figcaption>([^<]*)</figcaption>", page.source)
    assert len(captions) == page.tags.count("svg") == 14
    assert min(map(len, captions)) > 60
    assert "z is the squared log" in page.text
    assert "importance is the squared coefficient" in page.text
    assert "relu is" not in page.text
    assert len(page.ids) == len(set(page.ids))
    assert page.references <= set(page.ids)


def test_tokens_and_labels_are_text_whatever_their_characters(written):
    page = Page(written)
    assert not {"script", "b"} & set(page.tags)
    assert f"{ATTACK} 12% ×3.4 ␣the 12% ×3.4" in page.text
    assert all(label in page.text for label in LABELS)
    assert "at least 5 times" in page.text
    assert page.source.count('title="1,234 times"') == 2 * NUM_LAYERS
    assert page.source.count("<small>no token</small>") == NUM_LAYERS * (NUM_EXPERTS - 1)
    assert "MoE layer 0 expert load takes tokens 0 25% 100%" in page.text
    tables = re.findall(r'(<div class="scroll">)?<table', page.source)
    assert all(tables)  # each scrolls in a box of its own


def test_numbers_equal_a_loop_over_the_last_tenth(written):
    rows, routing = full_rows(57), first_result(written)["routing"]
    window = [row for row in rows if row["step"] > 51]
    assert (routing["router"], routing["top_k"]) == ("gshard", 2)
    for name in ("max_load", "unused_experts", "dropped", "router_entropy", "experts_per_token", "coactivation"):
        for layer in range(NUM_LAYERS):
            expected = statistics.mean(row[name][layer] for row in window)
            assert routing["layers"][name][layer] == pytest.approx(expected), name
    assert routing["layers"]["churn"] == [1 / 50, 2 / 50]  # the last one, of before the window
    for name in ("z", "importance"):
        expected = pytest.approx(statistics.mean(row[f"{name}_loss"] for row in window))
        assert routing["losses"][name] == expected
    assert routing["specialisation"] == make_choices()


def test_a_run_of_before_the_statistics_were_written(tmp_path):
    rows = make_rows(30)
    for row in rows[27:]:
        row["load"][1] = [0.5, 0.5, 0.0, 0.0]
    output = report.write([make_run(tmp_path / "old", rows)])
    routing = first_result(output)["routing"]
    for name in ("experts_per_token", "coactivation", "churn"):
        assert routing["layers"][name] is None
    assert routing["specialisation"] is None
    # these follow from the load
    assert routing["layers"]["unused_experts"] == [0.0, 0.5]
    largest = statistics.mean(NUM_EXPERTS * max(row["load"][0]) for row in rows[27:])
    assert routing["layers"]["max_load"] == pytest.approx([largest, 2.0])
    assert titles(Page(output))[4:] == [
        "Expert load",
        "Imbalance",
        "Unused experts",
        "Dropped tokens",
        "Router entropy",
        "Balance loss",
    ]


def test_a_router_without_losses_or_drops(tmp_path):
    rows = [{k: v for k, v in row.items() if k not in ("balance_loss", "dropped")} for row in make_rows(12)]
    choices = make_choices(labels=False, together=False)
    output = report.write([make_routed(tmp_path / "hash", rows, choices, router="hash")])
    routing = first_result(output)["routing"]
    assert (routing["losses"], routing["layers"]["dropped"], routing["top_k"]) == ({}, None, 1)
    assert titles(Page(output))[4:] == ["Expert load", "Imbalance", "Unused experts", "Router entropy"]


@pytest.mark.parametrize("num_experts", [4, 16])
def test_long_tables_are_folded_but_for_the_first_layer(num_experts):
    tables = routing_report.token_tables(make_choices(num_experts=num_experts))
    assert [table["open"] for table in tables] == [True, num_experts == 4]
    assert [len(table["rows"]) for table in tables] == [num_experts] * NUM_LAYERS


def test_the_page_is_made_without_jax():
    code = "import sys, moejax.analysis.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- heat maps -------------------------------------------------------------------------------------------------------


def test_the_heat_maps_show_the_shares(monkeypatch):
    drawn = []
    image = heatmaps._image
    monkeypatch.setattr(heatmaps, "_image", lambda axes, value, **kw: drawn.append(value) or image(axes, value, **kw))
    together_MEE = np.array([[[10.0, 5, 5], [5, 20, 15], [0, 0, 0]]])
    heatmaps.coactivation("x", together_MEE)
    nan = np.nan
    np.testing.assert_array_equal(drawn[0], [[nan, 0.5, 0.5], [0.25, nan, 0.75], [nan, nan, nan]])
    share_MET = np.random.default_rng(0).random((1, 3, 40))
    num_tokens_T = np.arange(40)[::-1] % 35
    (panel,) = heatmaps.labels("x", [f"label{i}" for i in range(40)], num_tokens_T.tolist(), share_MET)
    shown = re.findall(r">label(\d+)<", panel.svg)
    least = sorted(num_tokens_T)[-heatmaps.MAX_LABELS]
    assert len(shown) == heatmaps.MAX_LABELS
    assert all(num_tokens_T[int(label)] >= least for label in shown)
    np.testing.assert_array_equal(drawn[1], share_MET[0][:, [int(label) for label in shown]])
    assert "24 most frequent of 40 labels" in panel.caption


def test_many_layers_fit_sheets_of_paper():
    panels = heatmaps.coactivation("x", np.ones((20, 4, 4)))
    layers = [int(layer) for panel in panels for layer in re.findall(r"MoE layer (\d+)", panel.svg)]
    assert layers == list(range(20))
    assert panels[1].title == "Experts chosen together, layers 9 to 17"


# --- several runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Four routers and a dense model."""
    folder = tmp_path_factory.mktemp("routers")
    folders = [make_run(folder / "dense", make_rows(6, moe=False))]
    for number in range(4):
        rows = full_rows(20) if number == 0 else make_rows(4 + number)
        folders.append(make_routed(folder / f"run{number}", rows, router=("gshard", "switch", "soft")[number % 3]))
    return report.write(folders, folder / "all.html")


def test_routers_are_compared_in_a_table(compared):
    page = Page(compared)
    results = json.loads(compared.with_suffix(".json").read_text())["runs"]
    table = re.findall(r'<table class="routers">(.*?)</table>', page.source, re.S)[0]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", table, re.S)]
    header = "run router experts K,validation loss,max load,unused dropped entropy churn tokens/s"
    assert " ".join(cells[0]) == header.replace(",", " ")
    assert cells[1][:4] == ["dense", "–", "–", "–"]
    assert cells[1][5:10] == ["–"] * 5
    assert cells[1][4] == "3.912"
    full = results[1]["routing"]["layers"]
    means = {name: statistics.mean(full[name]) for name in ("max_load", "dropped", "router_entropy", "churn")}
    assert cells[2][:5] == ["run0", "gshard", "4", "2", "3.912"]
    assert cells[2][5:7] == [f"{means['max_load']:.2f}", "0%"]
    assert cells[2][7:10] == [f"{100 * means['dropped']:.1f}%", f"{means['router_entropy']:.2f}", "7.5%"]
    assert cells[4][1:4] == ["soft", "4", "all"]
    assert cells[3][9] == "–"
    assert len(cells) == 6


def test_the_curves_of_the_runs_are_averaged_over_layers(compared, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "lines", lambda name, curves, **_: drawn.update({name: curves}))
    rows = full_rows(20)
    runs = {"a": rows, "dense": make_rows(3, moe=False)}
    routing_report.comparison_panels({name: routing_report.curves(of_run) for name, of_run in runs.items()})
    assert list(drawn) == [f"runs-{name}" for name in ("imbalance", "entropy", "unused", "dropped", "churn")]
    assert list(drawn["runs-imbalance"]) == ["a"]
    expected = [statistics.mean(NUM_EXPERTS * max(load) for load in row["load"]) for row in rows]
    np.testing.assert_allclose(drawn["runs-imbalance"]["a"][1], expected)
    np.testing.assert_allclose(drawn["runs-entropy"]["a"][1], 1.25)
    np.testing.assert_allclose(drawn["runs-churn"]["a"], [[20], [0.075]])
    page = Page(compared)
    assert {"Imbalance of the runs", "Router entropy of the runs"} <= set(titles(page))
    assert page.source.count('<details class="run">') == 4  # so many are folded
    assert len(page.ids) == len(set(page.ids))


def test_every_run_of_many_has_a_line_of_its_own():
    curves = {f"run{i}": (np.arange(3), np.arange(3) + i) for i in range(11)}
    svg = figures.lines("x", curves, title="", caption="", ylabel="", wide=True).svg
    assert all(f">run{i}<" in svg for i in range(11))
    styles = {style for style in re.findall(r'style="([^"]*stroke: #[^"]*)"', svg) if "stroke-width: 1.1" in style}
    assert len(styles) == 11
