"""A dry run's seconds are those of the parts of a run, measured; worked by hand here."""

import json
import sys

import pytest
import tiny

from moejax import rules
from moejax.sweep import estimate, grid

# Seconds of a probe's steps: one that compiles, five, one after a checkpoint, one that compiles the evaluation, one
# with a batch of it.
SECONDS = [11.0, 1.0, 1.0, 3.0, 1.0, 0.9, 1.5, 4.25, 1.25]
ROWS = [{"seconds": second} for second in SECONDS]


def get_config():
    config = tiny.get_config("somewhere")
    config.training.num_steps, config.training.eval_every, config.checkpoint.every = 1000, 300, 100
    return config


def test_the_parts_of_a_run_are_read_from_a_probe_and_make_the_whole():
    cost = estimate.measured(ROWS, wall=sum(SECONDS) + 8.0, num_steps=5)
    assert cost == estimate.Cost(start=8.0, compile=10.0 + 3.0, step=1.0, batch=0.25, save=0.5)
    # evaluations after 300, 600, 900 and 1000 steps, checkpoints before the last after 100, ..., 900
    assert estimate.of_run(get_config(), cost, batches=7) == 8 + 13 + 1000 + 4 * 7 * 0.25 + 9 * 0.5


@pytest.mark.parametrize("num_steps", [3, 5])
def test_a_probe_saves_and_evaluates_where_its_rows_say(num_steps):
    config = get_config()
    config.optimizer.warmup_steps = 500
    probe = estimate.probe(config, num_steps)
    rules.validate(probe)
    last = probe.training.num_steps
    assert last == num_steps + 4
    saved = [step for step in range(1, last) if step % probe.checkpoint.every == 0]
    evaluated = [step for step in range(1, last + 1) if step % probe.training.eval_every == 0 or step == last]
    assert saved == [num_steps + 1]  # its cost falls on the next row
    assert evaluated == [last - 1, last]
    assert probe.training.eval_batches == 1
    assert config.training.num_steps == 1000


@pytest.mark.parametrize(("packing", "eval_batches", "batches"), [("best_fit", 0, 3), ("pad", 0, 4), ("pad", 2, 2)])
def test_an_evaluation_has_the_batches_of_the_held_out_split(packing, eval_batches, batches):
    config = get_config()
    config.data.packing, config.training.eval_batches = packing, eval_batches
    data = {"validation_tokens": 32 * 8 * 2 + 1, "validation_documents": 27}
    assert estimate.num_batches(config, data) == batches


def test_points_side_by_side_take_as_long_as_the_busiest_of_the_places_is():
    assert estimate.side_by_side([3.0, 2.0, 2.0, 4.0], jobs=2) == 7.0  # 3 + 4 beside 2 + 2
    assert estimate.side_by_side([3.0, 2.0, 2.0, 4.0], jobs=1) == 11.0


STUB = f"""
import json, sys
from moejax import files
from moejax.sweep import child

def train(config, folder):
    if config.model.moe.num_experts == 2:
        raise child.FailedError("step 3 is not finite")
    assert config.training.num_steps == {len(SECONDS)}
    rows = [{{"step": n + 1, "loss": 1.0, "tokens_per_second": 1.0}} | row for n, row in enumerate({ROWS})]
    files.write(folder / "metrics.jsonl", "".join(json.dumps(row) + chr(10) for row in rows))
    files.write(folder / "data.json", json.dumps({{"validation_tokens": 512, "validation_documents": 1}}))
    return config.training.num_steps

child.main(train)
"""


def test_a_group_is_measured_once_and_one_that_cannot_be_is_told_and_left_out():
    sweep = grid.Sweep(get_config(), grid.over("model.moe.num_experts", 4, 2), seeds=(0, 1))
    points, said = grid.points(sweep), []
    seconds = estimate.seconds(points, probe_steps=5, jobs=2, say=said.append, command=[sys.executable, "-c", STUB])
    assert list(seconds) == ["e4_s0", "e4_s1"]
    assert seconds["e4_s0"] == seconds["e4_s1"] == pytest.approx(13 + 1000 + 4 * 2 * 0.25 + 9 * 0.5, abs=0.1)
    assert said == [
        "measuring 2 points, 5 steps of each, up to 600 s; --probe_steps=0 leaves it out",
        "measuring e4_s0",
        "measuring e2_s0",
        "how long e2_s0 takes is not known: its probe failed: step 3 is not finite",
    ]
    assert json.dumps(seconds)
