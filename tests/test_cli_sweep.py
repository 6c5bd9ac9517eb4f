"""The command `moejax sweep` on two points of a tiny model, and what it refuses."""

import dataclasses
import json
import os
import pathlib
import sys

import numpy as np
import pytest
import tiny

from moejax import cli, files
from moejax.analysis import plan, sweep_results, topology

FILE = f"""\
import sys
sys.path.insert(0, {str(pathlib.Path(tiny.__file__).parent)!r})
import tiny
from moejax.sweep import grid

def get_config(folder):
    c = tiny.get_config(folder)
    c.model.period, c.model.num_periods, c.model.mlp.d_ff = ("moe",), 1, 16  # quick to compile
    return c

def get_sweep(folder):
    rows = grid.named("dense", {{"model.period": ("mlp",)}}) + grid.over("model.moe.num_experts", 4)
    return grid.Sweep(get_config(folder), rows, baseline="dense")
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[list[str], pathlib.Path]:
    """The command of a sweep of two points, and its folder, where one has been run."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "file.py").write_text(FILE)
    corpus = tiny.write_corpus(folder / "corpus")
    command = ["sweep", f"--config={folder / 'file.py'}:{corpus}", f"--workdir={folder / 'runs'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
        )  # one device
        (folder / "stub").mkdir()
        (folder / "stub" / "torch.py").write_text("raise ImportError")  # tensorboardX would import it for seconds
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "stub"), *filter(None, sys.path)]))
        assert cli.run([*command, "--only=dense_s0"]) == 0
        assert cli.run(command) == 0
    return command, folder / "runs"


def refused(capsys, *arguments: str) -> str:
    """The one line with which the command refuses its input."""
    assert cli.run(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("moejax: ")


def test_a_sweep_trains_each_point_once_and_its_rows_are_those_of_the_runs(swept):
    _, workdir = swept
    dense, mixture = sweep_results.read(workdir).points
    assert [(row.name, row.status) for row in (dense, mixture)] == [("dense_s0", "done"), ("e4_s0", "done")]
    for row in (dense, mixture):
        metrics = files.read_rows(workdir / row.name / "metrics.jsonl")
        assert [line["step"] for line in metrics] == list(range(1, 9))
        assert (row.steps, row.tokens, row.loss) == (8, 8 * 8 * 32, metrics[-1]["loss"])
        assert row.validation_loss == metrics[-1]["validation_loss"]
        assert row.ema_loss == pytest.approx(metrics[0]["loss"], rel=0.01)
        log = (workdir / row.name / "log.txt").read_text()
        assert log.count("step 1/8") == 1
    assert dense.axes == {"experts": 0, "granularity": 0, "top_k": 0}
    assert mixture.axes == {"experts": 4, "granularity": 1, "top_k": 1}
    assert (dense.dropped, dense.imbalance) == (None, None)
    assert mixture.imbalance is not None
    assert 1 <= mixture.imbalance <= 4
    assert mixture.total > mixture.active > dense.active


def test_a_sweep_that_is_done_starts_nothing_and_prints_what_it_has(swept, capsys):
    command, workdir = swept
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("metrics.jsonl")}
    assert cli.run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((workdir / "sweep.json").read_text())
    assert cli.run(command) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["point", "status"], ["dense_s0", "done"], ["e4_s0", "done"],
    ]  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("metrics.jsonl")} == before


def test_a_point_that_has_failed_before_is_the_exit_status_of_a_collection(swept, capsys):
    command, workdir = swept
    kept = (workdir / "e4_s0" / "result.json").read_bytes()
    (workdir / "e4_s0" / "result.json").write_bytes(kept.replace(b'"done"', b'"failed"'))
    try:
        assert cli.run([*command, "--jobs=0"]) == 1
        assert cli.run([*command, "--jobs=0", "--only=dense_s0"]) == 0
    finally:
        (workdir / "e4_s0" / "result.json").write_bytes(kept)
        assert cli.run([*command, "--jobs=0"]) == 0


def test_seeds_join_a_sweep_and_without_jobs_it_is_only_collected(swept, capsys):
    command, workdir = swept
    done = sweep_results.read(workdir).points
    (workdir / "e4_s0" / "result.json").unlink()  # as where a cluster has trained it
    try:
        assert cli.run([*command, "--seeds=0,1", "--jobs=0"]) == 0
        assert "new points: dense_s1, e4_s1" in capsys.readouterr().err
        points = {row.name: row for row in sweep_results.read(workdir).points}
        assert [row.status for row in points.values()] == ["done", "waiting", "done", "waiting"]
        assert [points[row.name] for row in done] == done
        line = refused(capsys, *command)
        assert line.startswith(f"--workdir={workdir} holds another sweep: its point dense_s1 is not in this one;")
    finally:
        (workdir / "points.json").unlink()
        assert cli.run([*command, "--jobs=0"]) == 0


def test_the_workdir_of_another_sweep_is_refused_and_nothing_changes(swept, capsys):
    command, workdir = swept
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    line = refused(capsys, *command, "--config.model.d_model=32")
    assert line.startswith(f"model.d_model=32 of point dense_s0, but --workdir={workdir} holds a sweep with model.d_mo")
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_a_dry_run_lists_the_points_and_touches_nothing(swept, capsys):
    command, workdir = swept
    dry = [*command[:2], "--dry-run", "--probe_steps=0", "--json"]
    assert cli.run(dry) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    expected = [dataclasses.asdict(row) for row in sweep_results.read(workdir).points]
    for name in ("name", "total", "active", "tokens", "flops"):
        assert [point[name] for point in points] == [row[name] for row in expected]
    assert [point["seconds"] for point in points] == [None, None]
    assert cli.run([*command, "--dry-run", "--json"]) == 0  # both are done, so that nothing is measured
    captured = capsys.readouterr()
    assert [point["seconds"] for point in json.loads(captured.out)["points"]] == [0.0, 0.0]
    assert "measuring" not in captured.err


def test_a_point_that_does_not_fit_a_slice_is_dropped_and_listed_as_such(swept, tmp_path, monkeypatch, capsys):
    """With the compiler's answer given: tests/analysis/test_plan.py compiles."""

    def make(config, where, mesh):
        fits = not config.model.has_experts
        memory = plan.Memory(
            2**30, None, None, None, hbm=2**34, fits=fits, refusal="" if fits else "Used 20G of 16G hbm"
        )
        values = dict.fromkeys(field.name for field in dataclasses.fields(plan.Plan))
        counts = {"total": 1, "active": 1}
        return plan.Plan(**values | {"topology": where.name, "memory": memory, "parameters": counts})

    monkeypatch.setattr(plan, "make", make)
    monkeypatch.setattr(plan, "mesh_of", lambda config, devices: devices)
    monkeypatch.setattr(topology, "prepare", lambda: os.environ.update(LIBTPU_IS_READ="1"))
    monkeypatch.setattr(topology, "devices", lambda where: np.zeros(16))
    command, plans = swept[0][:2], ["--plan", "--topology=v5e:4x4"]
    assert cli.run([*command, *plans, "--dry-run"]) == 0
    *_, dense, mixture = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (dense[0], dense[5], mixture[0], mixture[5]) == ("dense", "yes", "e4", "no")
    assert "LIBTPU_IS_READ" not in os.environ  # a point's process, or sbatch, would see it
    assert cli.run([*command, *plans, "--dry-run", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["plan"]["memory"]["fits"] for point in points] == [True, False]
    assert cli.run([*command, *plans, f"--workdir={tmp_path / 'runs'}", "--jobs=0"]) == 0
    dense, mixture = sweep_results.read(tmp_path / "runs").points
    assert (dense.status, mixture.status) == ("waiting", "does not fit")
    assert mixture.error == "v5e:4x4: Used 20G of 16G hbm"


CONFIG = "--config=configs/sweeps/experts_mini.py"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "--workdir is missing; name the sweep's folder"),
        (("--workdir=w", "--only=e3_s0"), "--only=e3_s0 is no point of this sweep; it has mamba_s0, e1_s0,"),
        (("--workdir=w", "--jobs=-1"), "--jobs=-1 must be 0 or more"),
        (("--workdir=w", "--jobs=2", "--launcher=gke"), "--jobs=2 has no effect with --launcher=gke"),
        (("--workdir=w", "--launcher=gke", "--json"), "--json with --launcher=gke goes with --dry-run"),
        (("--dry-run", "--probe_steps=2"), "--probe_steps=2 must be 0, for none, or 3 or more"),
        (("--dry-run", "--topology=v5e:4x4"), "--topology=v5e:4x4 --slices=1 say what to plan for; add --plan"),
        (("--dry-run", "--plan"), "--plan needs a slice; add --topology"),
        (("--dry-run", "--plan", "--topology=v5e:3x3"), "--topology=v5e:3x3 is no slice of v5e"),
        (("--dry-run", "--", "--time=7"), "--time=7 after -- is for a launcher; add --launcher=slurm"),
        (("--dry-run", "--launcher=slurm"), "--workdir is missing"),
        (("--dry-run", "--launcher=cloud"), "argument --launcher: invalid choice: 'cloud'"),
        (("--dry-run", "--config.model.moe.num_expert=4"), "--config.model.moe.num_expert is not a field"),
        (("--workdir=README.md",), "--workdir={}/README.md is a file; name a folder"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_are_one_line(capsys, arguments, line):
    assert refused(capsys, "sweep", CONFIG, *arguments).startswith(line.format(os.getcwd()))
    assert not pathlib.Path("w").exists()


def test_what_follows_two_dashes_is_for_launchers_alone(capsys):
    assert refused(capsys, "params", "--config=configs/quickstart.py", "--", "a") == (
        "-- a is not for moejax params; see --help"
    )


def test_fit_refuses_what_is_no_sweep_and_a_sweep_that_cannot_identify_a_law(swept, capsys):
    _, workdir = swept
    assert "nowhere does not exist; name a sweep's folder" in refused(capsys, "sweep", "fit", "nowhere")
    assert refused(capsys, "sweep", "fit", str(workdir)).startswith(
        "experts=4 is the only number of experts of the finished points"
    )
