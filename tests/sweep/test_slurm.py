"""A job array, a task a point: what submitit is asked for, and how a task saves and goes on."""

import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time

import launches
import pytest
import test_gke

from moejax import cli
from moejax.sweep import folder, slurm

pytest.importorskip("submitit")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a sweep.py"
    path.write_text(test_gke.FILE)
    return path


def arguments(file, *more, options=("--time=720", "--partition=gpu", "--gpus-per-node=1")):
    workdir = file.parent / "work dir"
    return ["sweep", f"--config={file}", f"--workdir={workdir}", "--launcher=slurm", *more, "--", *options]


def header(script: str) -> set[str]:
    return {shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH")}


def test_the_script_is_an_array_of_a_task_a_point_and_nothing_is_written(file, capsys):
    options = ("--time=720", "--partition=gpu", "--gpus-per-node=1", "--setup=module load cuda", "--licenses=a:1")
    flags = ("--seeds=0,3", "--config.data.source=files:/a b/c'd")
    assert cli.run(arguments(file, "--dry-run", *flags, options=options)) == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert header(script) >= {
        *("--array=0-9%10", "--time=720", "--partition=gpu", "--gpus-per-node=1", "--licenses=a:1"),
        *("--signal=USR2@180", "--open-mode=append", f"--output={file.parent}/work dir/slurm/%A_%a_0_log.out"),
    }
    lines = script.splitlines()
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if line.startswith("srun"))
    tasks = [shlex.split(line.partition(": ")[2]) for line in lines if line.startswith("# task ")]
    assert len(tasks) == 10
    assert tasks[1][:4] == [sys.executable, "-m", "moejax.cli", "sweep"]
    assert set(tasks[1][4:]) == {f"--config={file}", f"--workdir={file.parent}/work dir", "--only=mamba_s3", *flags}
    assert not (file.parent / "work dir").exists()


def test_one_point_is_no_array_and_its_script_is_part_of_the_json(file, capsys):
    assert cli.run(arguments(file, "--dry-run", "--json", "--only=mamba_s7")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed["points"]] == ["mamba_s7"]
    (script,) = printed["submits"]
    assert not any(option.startswith("--array") for option in header(script))


def test_submitting_writes_the_points_and_gives_sbatch_the_script_of_the_dry_run(file, tmp_path, monkeypatch, capsys):
    assert cli.run(arguments(file, "--dry-run")) == 0
    expected = capsys.readouterr().out.partition("\n# task ")[0].rstrip()
    tools = tmp_path / "tools"
    launches.executable(tools / "sbatch", f'#!/bin/sh\ncp "$1" {tmp_path}/script\necho Submitted batch job 4097\n')
    launches.executable(tools / "srun", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    assert cli.run(arguments(file)) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["mamba_s0 is job 4097_0", "mamba_s7 is job 4097_1"]
    assert (tmp_path / "script").read_text().rstrip() == expected
    workdir = file.parent / "work dir"
    description = folder.read(workdir)
    assert description is not None
    assert len(description.names) == 10
    task = pickle.loads((workdir / slurm.FOLDER / "4097_1_submitted.pkl").read_bytes())
    assert "--only=mamba_s7" in task.function.command


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), "--time= must say in minutes how long a task may take, after --; e.g. -- --time=720"),
        (("--time=12:00:00",), "--time=12:00:00 must say in minutes"),
        (("--time=7", "partition=gpu"), "partition=gpu is no option of a SLURM job; write --NAME=VALUE"),
    ],
)
def test_options_that_cannot_be_are_one_line(file, options, line, capsys):
    assert cli.run(arguments(file, "--dry-run", options=options)) == 2
    (refusal,) = capsys.readouterr().err.splitlines()
    assert refusal.startswith(f"moejax: {line}")


def test_a_machine_without_slurm_or_submitit_says_what_to_do(file, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.run(arguments(file)) == 2
    assert 'Could not detect "srun"' in capsys.readouterr().err
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda _: None)
    assert cli.run(arguments(file)) == 2
    assert capsys.readouterr().err == ("moejax: --launcher=slurm needs submitit; run pip install -e '.[slurm]'\n")


POINT = """\
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    time.sleep(0.2)
    (folder / "saved").touch()
    sys.exit(1)
signal.signal(signal.SIGINT, stop)
(folder / "begun").write_text(f"{os.getppid()} ")
parent = os.getppid()
while not (folder / "saved").exists() and os.getppid() == parent:
    time.sleep(0.01)
"""


def test_a_task_near_its_limit_saves_and_goes_on_in_its_next_life(tmp_path):
    """On submitit's own stand-in for a cluster, which starts a task again that has asked for it."""
    import submitit

    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=60)
    job = executor.submit(slurm.Task([sys.executable, "-c", POINT, str(tmp_path)]))
    deadline = time.monotonic() + 60
    begun = tmp_path / "begun"
    while not (begun.exists() and begun.read_text().endswith(" ")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(int(begun.read_text()), signal.SIGUSR2)
    assert job.result() == 0
    assert (tmp_path / "saved").exists()


def test_a_task_whose_point_fails_fails():
    with pytest.raises(RuntimeError, match="ended with status 3"):
        slurm.Task([sys.executable, "-c", "raise SystemExit(3)"])()
