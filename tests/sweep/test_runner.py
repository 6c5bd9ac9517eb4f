"""Laws of a sweep's runner, on points that take milliseconds: whatever ends it, the same call goes on, and no point
is run twice."""

import collections
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import stub_sweep

from moejax import files
from moejax.analysis import sweep_results
from moejax.sweep import folder, lock, runner

TIMINGS = ("seconds", "tokens_per_second")


def start(workdir: pathlib.Path, jobs: int = 2) -> subprocess.Popen:
    command = [sys.executable, stub_sweep.__file__, "run", str(workdir), str(jobs)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen) -> dict[str, str]:
    """The problems that a call ended with; it has ended with status 1 if there are any."""
    out, err = process.communicate(timeout=60)
    assert err == ""
    problems = json.loads(out)
    assert process.returncode == (1 if problems else 0)
    return problems


def attempts(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "attempts.jsonl"
    return files.read_rows(path) if path.exists() else []


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    path = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return path.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def without_timings(workdir: pathlib.Path) -> list[dict]:
    rows = [dataclasses.asdict(row) for row in sweep_results.read(workdir).points]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def statuses(workdir: pathlib.Path) -> dict[str, str]:
    return {row.name: row.status for row in sweep_results.read(workdir).points}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> pathlib.Path:
    """The folder of a sweep that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("straight")
    assert finish(start(workdir)) == {}
    return workdir


def test_sweep_json_has_the_numbers_that_the_points_metrics_have(straight):
    for index, row in enumerate(sweep_results.read(straight).points):
        assert (row.name, row.status) == (stub_sweep.NAMES[index], "done")
        losses = [stub_sweep.loss(index, step) for step in range(1, stub_sweep.NUM_STEPS + 1)]
        average = losses[0]
        for loss in losses[1:]:
            average = 0.999 * average + 0.001 * loss
        assert row.loss == pytest.approx(losses[-1], rel=1e-12)
        assert row.ema_loss == pytest.approx(average, rel=1e-12)
        assert row.validation_loss == pytest.approx(losses[-1] + 0.1, rel=1e-12)
        metrics = files.read_rows(straight / row.name / "metrics.jsonl")
        assert row.seconds == pytest.approx(sum(line["seconds"] for line in metrics))
        speeds = sorted(line["tokens_per_second"] for line in metrics)
        assert row.tokens_per_second == pytest.approx((speeds[14] + speeds[15]) / 2)
        assert row.dropped is row.entropy is row.churn is None


def test_killed_three_times_and_run_again_it_ends_as_if_nothing_had_been_and_no_point_is_run_twice(straight, tmp_path):
    rng = random.Random(3)
    done: dict[str, int] = {}  # attempts at a point when it was done
    for _ in range(3):
        process, before = start(tmp_path), len(attempts(tmp_path))
        wait_until(lambda before=before: len(attempts(tmp_path)) > before)
        time.sleep(rng.uniform(0.0, 0.6))
        process.kill()
        process.communicate()
        wait_until(lambda: not any(is_alive(attempt["pid"]) for attempt in attempts(tmp_path)))  # no orphan trains on
        counts = collections.Counter(attempt["name"] for attempt in attempts(tmp_path))
        results = {path.parent.name: files.read_json(path) for path in tmp_path.glob("*/result.json")}
        done |= {name: counts[name] for name, result in results.items() if result["status"] == "done"}
    assert len(done) < len(stub_sweep.NAMES)
    assert finish(start(tmp_path)) == {}
    assert without_timings(tmp_path) == without_timings(straight)
    counts = collections.Counter(attempt["name"] for attempt in attempts(tmp_path))
    assert {name: counts[name] for name in done} == done
    resumed = [attempt["start"] for attempt in attempts(tmp_path)]
    assert any(resumed)
    for name in stub_sweep.NAMES:
        steps = [row["step"] for row in files.read_rows(tmp_path / name / "metrics.jsonl")]
        assert steps == list(range(1, stub_sweep.NUM_STEPS + 1))


def test_a_crashed_point_is_tried_once_more_from_its_checkpoint_and_the_others_go_on_where_one_fails(
    straight, tmp_path
):
    faults = {"a_s0": ["raise@10"], "a_s1": ["kill@3", "raise@9"], "b_s0": ["diverge@7"], "b_s1": ["refuse@1"]}
    (tmp_path / "faults.json").write_text(json.dumps(faults))
    problems = finish(start(tmp_path))
    assert problems == {
        "a_s1": "failed: ValueError: two lines of a bug",
        "b_s0": "failed: step 7 is not finite",
        "b_s1": "failed: model.d_model=7 is odd; make it even",
    }
    assert statuses(tmp_path) == {"a_s0": "done", "a_s1": "failed", "b_s0": "failed", "b_s1": "failed"}
    starts = collections.defaultdict(list)
    for attempt in attempts(tmp_path):
        starts[attempt["name"]].append(attempt["start"])
    # what would come to the same again is not tried twice
    assert starts == {"a_s0": [0, 8], "a_s1": [0, 0], "b_s0": [0], "b_s1": [0]}
    rows = {row.name: row for row in sweep_results.read(tmp_path).points}
    assert [rows[name].error for name in problems] == [text.removeprefix("failed: ") for text in problems.values()]
    assert rows["b_s0"].loss is None

    (tmp_path / "faults.json").unlink()
    assert finish(start(tmp_path)) == {}  # a new call tries again what has failed
    assert without_timings(tmp_path) == without_timings(straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_points_that_run_and_starts_no_more(number, tmp_path):
    process = start(tmp_path, jobs=1)
    metrics = tmp_path / "a_s0" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(files.read_rows(metrics)) >= 5)
    process.send_signal(number)
    problems = finish(process)
    assert problems == {"a_s0": f"stopped by {number.name}"}
    (saved,) = {max(stub_sweep.saved_steps(tmp_path / "a_s0")), len(files.read_rows(metrics))}
    assert 5 <= saved < stub_sweep.NUM_STEPS
    assert statuses(tmp_path) == dict.fromkeys(stub_sweep.NAMES, "waiting")
    assert len(attempts(tmp_path)) == 1


def test_two_runners_do_not_train_one_point_at_once_and_it_is_said_who_does(tmp_path, monkeypatch):
    (tmp_path / "faults.json").write_text(json.dumps({"a_s0": ["hang@2"], "a_s1": ["kill@2", "kill@2"]}))
    monkeypatch.setenv("STUB_PATIENCE", "0")
    first = start(tmp_path, jobs=1)
    try:
        wait_until(lambda: attempts(tmp_path))
        (owner,) = (attempt["pid"] for attempt in attempts(tmp_path))
        who = f"process {owner} on {os.uname().nodename}"
        assert lock.holder(tmp_path / "a_s0") == who
        assert statuses(tmp_path)["a_s0"] == "running"
        assert finish(start(tmp_path)) == {
            "a_s0": f"{who} trains a_s0; run the same command again when that has ended",
            "a_s1": "failed: its process was killed by SIGKILL; was there too little memory?",
        }
        assert statuses(tmp_path) == {"a_s0": "running", "a_s1": "failed", "b_s0": "done", "b_s1": "done"}
    finally:
        first.kill()
        first.communicate()
    with lock.hold(tmp_path / "a_s0"):  # a process whose runner is gone ends soon
        pass


def test_a_run_that_was_trained_elsewhere_is_collected_and_one_of_other_settings_is_told(straight, tmp_path):
    description = stub_sweep.describe()
    folder.write(tmp_path, description)
    for name in ("a_s0", "a_s1"):
        stub_sweep.train(description.configs[name], tmp_path / name)
    other = files.read_json(tmp_path / "a_s1" / "config.json")
    other["model"]["d_model"] = 7
    (tmp_path / "a_s1" / "config.json").write_text(json.dumps(other))
    rows = folder.collect(tmp_path).points
    assert [row.status for row in rows] == ["done", "failed", "waiting", "waiting"]
    assert rows[0].loss == sweep_results.read(straight).points[0].loss
    assert rows[1].error is not None
    assert rows[1].error.startswith("it was trained with model.d_model=7, and the point has 256; move ")


@pytest.mark.parametrize(
    ("jobs", "environment", "shares"),
    [
        (1, {"CUDA_VISIBLE_DEVICES": "0,1"}, [{}]),
        (2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]),
        (2, {"CUDA_VISIBLE_DEVICES": "5,7,8"}, [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"}]),
        (
            2,
            {"CUDA_VISIBLE_DEVICES": "3"},
            [{"CUDA_VISIBLE_DEVICES": "3", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"}] * 2,
        ),
        (
            2,
            {"CUDA_VISIBLE_DEVICES": "3", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"},
            [{"CUDA_VISIBLE_DEVICES": "3"}] * 2,
        ),
        (3, {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "0,1"}, [{}] * 3),
    ],
)
def test_processes_side_by_side_share_the_gpus(jobs, environment, shares):
    assert runner.device_shares(jobs, environment) == shares


def test_gpus_are_counted_by_nvidia_smi(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert runner.device_shares(2, {}) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]


@pytest.mark.parametrize(
    ("jobs", "cores"),
    [
        (1, []),
        (2, [{1, 2}, {5, 6, 9}]),
        (3, [{1}, {2, 5}, {6, 9}]),
        (7, [{1}, {2}, {5}, {6}, {9}, {1}, {2}]),
    ],
)
def test_processes_side_by_side_share_the_cores(jobs, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {9, 1, 5, 2, 6}, raising=False)
    assert runner.core_shares(jobs, {"JAX_PLATFORMS": "cpu"}) == cores
    assert runner.core_shares(jobs, {"CUDA_VISIBLE_DEVICES": "0"}) == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_each_of_two_processes_has_its_own_cores(tmp_path):
    assert finish(start(tmp_path, jobs=2)) == {}
    shares = runner.core_shares(2, os.environ)
    assert {tuple(row["cores"]) for row in attempts(tmp_path)} == {tuple(sorted(cores)) for cores in shares}


def test_an_attempt_over_its_limit_ends_and_the_others_go_on(tmp_path):
    (tmp_path / "faults.json").write_text(json.dumps({"a_s0": ["hang@3"]}))
    ran = stub_sweep.run(tmp_path, 2, limit=5.0, attempts=1)
    assert ran.problems == {"a_s0": "failed: it took over 5 s"}
    assert statuses(tmp_path) == {"a_s0": "failed"} | dict.fromkeys(stub_sweep.NAMES[1:], "done")
