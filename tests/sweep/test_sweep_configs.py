"""Every sweep in configs/sweeps/ makes its points, and they are those of its lab book and of its paper's table."""

import ast
import pathlib
import runpy

import pytest

from moejax import config as config_lib
from moejax.analysis import scaling_forms
from moejax.cli import overrides
from moejax.sweep import cost, grid, listing

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs" / "sweeps"
FILES = sorted(path.name for path in FOLDER.glob("*.py"))


def points_of(file, *options):
    return grid.points(overrides.read_sweep(str(FOLDER / file), list(options)))


def counts_of(points):
    return {row["name"]: (row["non_embedding_total"], row["non_embedding_active"]) for row in listing.rows(points)}


@pytest.mark.parametrize("file", FILES)
def test_the_lab_book_has_a_line_for_each_point_with_its_counts(file):
    points = points_of(file)
    book = ast.get_docstring(ast.parse((FOLDER / file).read_text()))
    assert book is not None
    assert f"moejax sweep --config=configs/sweeps/{file} --workdir=" in book
    lines = {line.split()[0]: line.split() for line in book.splitlines() if line.startswith("    ")}
    counts = list(counts_of(points).values())
    for point, (total, active) in zip(points, counts, strict=True):
        assert {f"{total:,}", f"{active:,}"} <= set(lines[point.group])
        moe = point.config.model.moe
        if point.config.model.has_experts and "width" in lines["point"]:
            assert {f"{moe.num_experts}", f"{moe.d_expert}"} <= set(lines[point.group])
    if any(row.held for row in overrides.read_sweep(str(FOLDER / file), []).grid):
        actives, flops = [active for _, active in counts], [cost.flops(point.config) for point in points]
        assert max(actives) / min(actives) < 1.01
        assert max(flops) / min(flops) < 1.03  # of what Mamba's parameters do, some is no matrix product


def test_table_4_has_its_models():
    """arXiv 2401.04081, Table 4, in millions."""
    points = points_of("experts_25m.py")
    table = {"mamba": (27, 27), "e1": (26, 26), "e4": (64, 26), "e8": (114, 26), "e16": (215, 26), "e32": (416, 26)}
    assert {name: tuple(round(n / 1e6) for n in pair) for name, pair in counts_of(points).items()} == {
        f"{group}_s0": pair for group, pair in table.items()
    }
    assert [grid.axes(point)["experts"] for point in points] == [0, 1, 4, 8, 16, 32]
    assert {cost.tokens(point.config) for point in points} == {15_001 * 64 * 1024}


def test_table_2_has_its_models():
    """arXiv 2401.04081, Table 2, with the experts of its code, in millions."""
    counts = counts_of(points_of("ratio.py"))
    found = {name.removesuffix("_s0"): tuple(round(n / 1e6, 1) for n in pair) for name, pair in counts.items()}
    assert {name: (round(total), active) for name, (total, active) in found.items() if name[0] in "12345"} == {
        "1to5": (403, 25.6), "2to4": (412, 25.9), "3to3": (416, 26.3), "4to2": (421, 26.7), "5to1": (426, 27.2)
    }  # fmt: skip
    assert abs(counts["6to0_s0"][1] / counts["mamba_s0"][1] - 1) < 0.001


def test_a_longer_run_of_more_seeds_is_two_options():
    sweep = overrides.read_sweep(str(FOLDER / "experts_mini.py"), ["--config.training.num_steps=3000"], seeds="0,1,2")
    points = grid.points(sweep)
    assert len(points) == 5 * 3
    assert {point.config.training.num_steps for point in points} == {3000}
    assert points[0].name == "mamba_s0"


def test_the_law_of_granularity_varies_size_tokens_and_granularity():
    sweep = overrides.read_sweep(str(FOLDER / "granularity.py:law"), [])
    names = [row.name for row in sweep.grid]
    assert (len(names), names[0], names[-1]) == (27, "d256_num_steps4000_g1", "d512_num_steps16000_g16")
    cells = [
        scaling_forms.Cell(
            expansion=grid.axes(point)["experts"] / point.granularity,
            granularity=point.granularity,
            active=cost.parameters(point.config.model)["non_embedding_active"],
            tokens=cost.tokens(point.config),
        )
        for point in grid.points(sweep)
    ]
    form = scaling_forms.choose(cells)
    assert form.formula == "L = c + (g / G^gamma + a) / N^alpha + b / D^beta"
    for held in (row.held[0] for row in sweep.grid):  # within one size and length
        assert (held.measure, held.varied) == ("active", ("granularity",))


@pytest.mark.parametrize(
    ("name", "number", "first", "last"),
    [
        ("table_1", 4, "mamba_25m", "transformer_25m"),
        ("table_1_100m,mini", 3, "mamba_100m", "transformer_moe_100m"),
        ("table_2,mini", 7, "mamba_1b", "ratio_6_0"),
        ("table_3", 15, "mamba_1b", "inner_conv_gate_out_alternate"),
        ("table_4,mini", 6, "mamba_1b", "experts_32"),
        ("table_7,mini", 13, "mamba_1b", "parallel_32"),
        ("switch_table_1", 9, "t5_base_100k", "switch_base_128_plus_c100"),
        ("switch_table_2,mini", 4, "precision_selective", "scale_large"),
        ("switch_table_7,mini", 7, "t5_base", "switch_base_256"),
        ("switch_table_9", 7, "t5_base", "switch_c"),
        ("switch_table_11,mini", 4, "explore_jitter", "explore_argmax"),
    ],
)
def test_a_table_is_a_sweep_over_its_rows(name, number, first, last):
    points = points_of(f"tables.py:{name}")
    assert (len(points), points[0].group, points[-1].group) == (number, first, last)
    file = "switch.py" if name.startswith("switch") else "moe_mamba.py"
    get_config = runpy.run_path(str(FOLDER.parent / file))["get_config"]
    for point in points:
        row = get_config(point.group + ",mini" * name.endswith("mini"))
        row.data.seed = row.training.seed = 0  # a seed of a sweep is both
        assert point.config == row


def test_a_table_that_there_is_not_is_refused():
    with pytest.raises(config_lib.ConfigError, match=r"table_9 is no table; write one of table_1, .*switch_table_9"):
        overrides.read_sweep(str(FOLDER / "tables.py:table_9"), [])
