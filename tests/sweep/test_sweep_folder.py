"""A folder holds one sweep: what is another is refused by its first difference, and nothing is touched."""

import copy
import dataclasses
import json
import pathlib
import re

import pytest
import stub_sweep

from moejax import config as config_lib
from moejax import files
from moejax.analysis import sweep_results
from moejax.config import plain
from moejax.sweep import folder, outcome


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
    folder.write(tmp_path, stub_sweep.describe())
    folder.collect(tmp_path)
    return tmp_path


def snapshot(workdir: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def changed(name: str, **training: int) -> folder.Description:
    """The sweep with other settings of training in one point."""
    description = copy.deepcopy(stub_sweep.describe())
    description.configs[name].training = dataclasses.replace(description.configs[name].training, **training)
    return description


def test_what_is_written_reads_back_as_it_was(workdir):
    assert folder.read(workdir) == stub_sweep.describe()
    assert folder.check(workdir, stub_sweep.describe()) == []
    assert [row.status for row in sweep_results.read(workdir).points] == ["waiting"] * 4


@pytest.mark.parametrize(
    ("description", "line"),
    [
        (
            changed("a_s1", num_steps=31),
            "training.num_steps=31 of point a_s1, but --workdir={} holds a sweep with training.num_steps=30; set it "
            "back, or choose another --workdir",
        ),
        (
            stub_sweep.describe(("a_s0", "b_s0", "b_s1")),
            "--workdir={} holds another sweep: its point a_s1 is not in this one; put it back, or choose another "
            "--workdir",
        ),
    ],
)
def test_another_sweep_is_refused_by_its_first_difference_and_nothing_changes(workdir, description, line):
    before = snapshot(workdir)
    with pytest.raises(config_lib.ConfigError) as refusal:
        folder.check(workdir, description)
    assert str(refusal.value) == line.format(workdir)
    assert snapshot(workdir) == before


def test_points_may_join_and_settings_change_on_which_no_result_depends(workdir):
    outcome.write(workdir / "a_s0", outcome.Outcome(status="done", numbers=outcome.Numbers(loss=1.5)))
    more = stub_sweep.describe((*stub_sweep.NAMES, "c_s0"))
    more.configs["a_s1"].training.num_microbatches = 4
    assert folder.check(workdir, more) == ["new points: c_s0", "training.num_microbatches=4 (was 1) from here on"]
    folder.write(workdir, more)
    assert [(row.name, row.status, row.loss) for row in folder.collect(workdir).points] == [
        ("a_s0", "done", 1.5),
        *((name, "waiting", None) for name in ("a_s1", "b_s0", "b_s1", "c_s0")),
    ]


def test_a_call_for_some_points_alone_leaves_those_that_have_joined_since(workdir):
    fewer = stub_sweep.describe(("b_s0", "a_s0"))
    assert folder.check(workdir, fewer, only=["a_s0"]) == []
    folder.write(workdir, fewer)
    assert [row.name for row in folder.collect(workdir).points] == ["b_s0", "a_s0", "a_s1", "b_s1"]
    with pytest.raises(config_lib.ConfigError, match="num_steps=31 of point a_s0"):
        folder.check(workdir, changed("a_s0", num_steps=31), only=["b_s0"])


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("points.json", "[]", "points.json is no list of points"),
        ("points.json", '{"baseline": null, "points": [{"row": {}}]}', "points.json is no list of points"),
        ("points.json", "{", "points.json is not JSON"),
        ("config.json", "{}", "is the folder of a run; name another for the sweep"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused_in_one_line(tmp_path, name, content, line):
    (tmp_path / name).write_text(content)
    with pytest.raises(config_lib.ConfigError, match=line) as refusal:
        folder.check(tmp_path, stub_sweep.describe())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", ["[]", "{}", '{"status": "fine", "error": null, "numbers": {}}', "{"])
def test_a_damaged_outcome_is_named_and_fails_its_point_alone(workdir, content):
    (workdir / "a_s0").mkdir()
    (workdir / "a_s0" / outcome.FILE).write_text(content)
    outcome.write(workdir / "a_s1", outcome.Outcome(status="done", numbers=outcome.Numbers(loss=1.5)))
    damaged, good, *_ = folder.collect(workdir).points
    assert damaged.status == "failed"
    assert re.search(r"a_s0/result\.json .*(remove it|mend or remove it)$", damaged.error)
    assert (good.status, good.loss) == ("done", 1.5)
    assert not outcome.is_done(workdir / "a_s0")
    outcome.clear(workdir / "a_s0")  # its next run begins so
    assert folder.collect(workdir).points[0].status == "waiting"


@pytest.mark.parametrize(
    ("metrics", "made_with", "expected"),
    [
        (None, "{}", "does not go to step 30"),
        ("", "{}", "does not go to step 30"),
        ('{"step": 29}\n', "{}", "does not go to step 30"),
        ('{"step": 30, "loss": 1.0}\n', "{}", "rows without seconds or speed"),
        ('{"loss": 1.0}\n', "{}", "rows without a step"),
        ("", "[]", "is no config"),
    ],
)
def test_a_damaged_run_fails_its_point_alone(workdir, metrics, made_with, expected):
    run = workdir / "a_s0"
    (run / "checkpoints" / "30").mkdir(parents=True)
    config = plain.to_dict(stub_sweep.describe().configs["a_s0"])
    (run / "config.json").write_text(json.dumps(config) if made_with == "{}" else made_with)
    if metrics is not None:
        (run / "metrics.jsonl").write_text(metrics)
    first, *rest = folder.collect(workdir).points
    assert first.status == "failed"
    assert expected in first.error
    assert "\n" not in first.error
    assert {row.status for row in rest} == {"waiting"}


def test_the_end_of_a_run_of_experts_is_the_mean_over_its_layers_and_last_tenth(tmp_path):
    config = config_lib.Config()
    config.training.num_steps = 20
    rows = [
        {
            "step": step, "loss": 4.0 - 0.1 * step, "seconds": 2.0, "tokens_per_second": 100.0 + step,
            "load": [[0.5, 0.5], [0.25, 0.75]] if step < 19 else [[0.5, 0.5], [0.1, 0.9]],
            "dropped": [0.5, 0.5] if step < 19 else [0.0, 0.1],
            "router_entropy": [0.6, 0.4] if step < 20 else [0.2, 0.2],
        }
        | ({"validation_loss": 3.0 - 0.01 * step, "churn": [0.02 * step, 0.01 * step]} if step % 10 == 0 else {})
        for step in range(1, 21)
    ]  # fmt: skip
    files.write(tmp_path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    numbers = outcome.measure(tmp_path, config)
    assert dataclasses.asdict(numbers) == {
        "loss": pytest.approx(2.0),
        "ema_loss": pytest.approx(3.88111, abs=1e-5),  # a loop by hand: m = 0.999 m + 0.001 loss from 3.9 on
        "validation_loss": pytest.approx(2.8),
        "tokens_per_second": 110.5,
        "seconds": 40.0,
        "dropped": pytest.approx(0.05),  # steps 19 and 20
        "imbalance": pytest.approx((1.0 + 1.8) / 2),
        "entropy": pytest.approx((0.5 + 0.2) / 2),
        "churn": pytest.approx(0.3),  # of step 20
    }
