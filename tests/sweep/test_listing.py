"""The dry run's rows are those of closed forms, and its table shows them all."""

import json

import closed_form
import pytest

from moejax import config as config_lib
from moejax.sweep import grid, listing

PERIOD = ("mamba", "moe")


@pytest.fixture(scope="module")
def rows():
    base = config_lib.Config()
    base.model.d_model, base.model.num_periods, base.model.vocab_size, base.data.vocab_size = 16, 1, 300, 300
    base.model.period = PERIOD
    base.model.moe.d_expert, base.data.seq_length, base.data.batch_size, base.training.num_steps = 64, 8, 2, 1000
    points = grid.points(grid.Sweep(base, grid.over("model.moe.num_experts", 4, 8), seeds=(0, 1)))
    return listing.rows(points, {"e4_s0": 90.0})


def test_rows_have_the_counts_of_closed_forms(rows):
    assert json.loads(json.dumps(rows)) == rows
    assert [row["name"] for row in rows] == ["e4_s0", "e4_s1", "e8_s0", "e8_s1"]
    for row, num_experts in zip(rows, (4, 4, 8, 8), strict=True):
        assert row["non_embedding_active"] == closed_form.parameters(16, num_experts, 64, period=PERIOD)
        assert row["non_embedding_total"] == closed_form.parameters(
            16, num_experts, 64, period=PERIOD, counted=num_experts
        )
        assert row["total"] - row["non_embedding_total"] == row["active"] - row["non_embedding_active"] == 300 * 16
        assert row["tokens"] == 16_000
        assert row["flops"] == closed_form.flops(16, num_experts, 64, period=PERIOD, vocab=300, tokens=16_000)
    assert [row["seconds"] for row in rows] == [90.0, None, None, None]
    assert [row["settings"] for row in rows] == 2 * [{"model.moe.num_experts": 4}] + 2 * [{}]


def test_the_table_has_a_line_a_point_and_the_sums(rows):
    head, *lines, last = listing.table(rows).splitlines()
    assert head.split() == "point total active no emb. total no emb. active tokens FLOPs time differs by".split()
    total = closed_form.parameters(16, 4, 64, period=PERIOD, counted=4)
    cells = lines[0].split()
    assert cells[:2] + cells[3:4] == ["e4_s0", f"{total + 4800:,}", f"{total:,}"]
    assert cells[-2:] == ["1:30", "model.moe.num_experts=4"]
    assert len({line.index("16,000") for line in lines}) == 1
    assert lines[3].split()[-4:] == [f"{rows[3]['flops']:.3g}", "-", "the", "base"]
    assert last.split() == ["all", "64,000", f"{sum(row['flops'] for row in rows):.3g}", "-"]
    known = listing.table([row | {"seconds": 1000.0} for row in rows]).splitlines()[-1]
    assert known.split()[-1] == "1:06:40"
