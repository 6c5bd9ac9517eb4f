"""Laws of a run: it goes on after any interruption as if there had been none, and it says what stops it."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from moejax import config as config_lib
from moejax import partition
from moejax.data import pipeline
from moejax.training import checkpoint, evaluate, state, trainer

TIMINGS = ("seconds", "tokens_per_second")
NUM_STEPS = 32
PERIOD = ("moe",)  # less to compile
# tensorboardX imports torch where it is installed, which would be a third of what a short run takes.
MOEJAX = "import sys; sys.modules['torch'] = None; from moejax import cli; cli.main(sys.argv[1:])"
CONFIG_FILE = pathlib.Path(tiny.__file__)


def rows(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what a clock measured."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS} for line in lines]


def final_state(config: config_lib.Config, workdir: pathlib.Path) -> list[np.ndarray]:
    mesh = partition.make_mesh(config.mesh, jax.devices()[:1])
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint, read_only=True)
    restored = checkpoints.restore(state.abstract(config, mesh), on_corrupt=lambda *_: pytest.fail("damaged"))
    checkpoints.close()
    assert restored is not None
    assert restored[1] == config.training.num_steps
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored[0])]


def command(corpus: pathlib.Path, workdir: pathlib.Path, *overrides: str) -> list[str]:
    config = f"--config={CONFIG_FILE}:{corpus}"
    run = [sys.executable, "-c", MOEJAX, "train", config, f"--workdir={workdir}"]
    return [*run, f"--config.training.num_steps={NUM_STEPS}", f"--config.model.period={PERIOD}", *overrides]


def environment() -> dict[str, str]:
    """One device, and the compiled step kept between the processes of a test."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"  # the last one counts
    return {**os.environ, "XLA_FLAGS": flags}


def settings(corpus: pathlib.Path) -> config_lib.Config:
    """What the command trains, but for its number of steps."""
    config = tiny.get_config(str(corpus))
    config.model.period = PERIOD
    return config


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def wait_for_step(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 240
    path = workdir / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.002)
    pytest.fail(f"step {step} was not reached: {process.stderr.read() if process.stderr else ''}")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> pathlib.Path:
    """The folder of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    done = run(command(corpus, workdir))
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_run_killed_and_started_again_writes_the_rows_and_parameters_of_a_straight_run(corpus, straight, tmp_path):
    workdir = tmp_path / "run"
    arguments = command(corpus, workdir)
    for step in (1, 14):  # before any checkpoint, and after some, while another may be on its way to disk
        process = start(arguments)
        wait_for_step(process, workdir, step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert len(rows(workdir)) < NUM_STEPS
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert rows(workdir) == rows(straight)
    config = settings(corpus)
    config.training.num_steps = NUM_STEPS
    for ours, expected in zip(final_state(config, workdir), final_state(config, straight), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_a_signal_saves_says_so_in_one_line_and_exits_0(corpus, straight, tmp_path):
    workdir = tmp_path / "run"
    arguments = command(corpus, workdir, "--config.checkpoint.every=1000")
    process = start(arguments)
    wait_for_step(process, workdir, 2)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    last = log.splitlines()[-1]
    assert last.startswith("stopped by SIGTERM after step ")
    assert last.endswith("saved; run the same command to go on")
    step = int(last.split("after step ")[1].split(",")[0])
    assert step < NUM_STEPS
    assert [int(entry.name) for entry in (workdir / "checkpoints").iterdir()] == [step]
    assert rows(workdir) == rows(straight)[:step]


def test_rows_hold_what_the_report_needs_and_the_ema_and_token_count_run_through(straight, corpus):
    written = rows(straight)
    assert [row["step"] for row in written] == list(range(1, NUM_STEPS + 1))
    assert {row["step"] for row in written if "validation_loss" in row} == set(range(4, NUM_STEPS + 1, 4))
    config = settings(corpus)
    batches = pipeline.TrainBatches(pipeline.load(config.data), config.data)
    ema, tokens = written[0]["loss"], 0
    for step, row in enumerate(written):
        batch = batches[step]
        ema = 0.999 * ema + 0.001 * row["loss"]
        tokens += int(batch["loss_mask_BL"].sum())
        assert row["ema_loss"] == pytest.approx(ema, rel=1e-9)
        assert row["tokens"] == tokens
        assert np.shape(row["load"]) == (2, 4)
        assert np.shape(row["dropped"]) == np.shape(row["router_entropy"]) == (2,)
    assert written[-1]["loss"] < written[0]["loss"] - 1  # it learns
    events = [entry.name for entry in straight.iterdir() if entry.name.startswith("events.out.tfevents")]
    assert events


def test_rows_after_the_checkpoint_are_written_again_and_a_cut_line_does_no_harm(straight, tmp_path, corpus):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(NUM_STEPS))
    text = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(text[: len(text) - 30])
    done = run(command(corpus, workdir))
    assert done.returncode == 0, done.stderr
    assert rows(workdir) == rows(straight)


@pytest.fixture(scope="module")
def compiled(corpus):
    """make_train_step of all runs in this process, which have eight devices: a row on each."""
    config = on_eight_devices(settings(corpus))
    step = state.make_train_step(config, partition.make_mesh(config.mesh))
    return lambda *_: step


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step_and_the_last_good_checkpoint(
    corpus, compiled, tmp_path, monkeypatch
):
    config = settings(corpus)

    def poisoned(*arguments):
        step = compiled(*arguments)

        def run_step(train_state, batch):
            train_state, metrics = step(train_state, batch)
            if int(train_state.step) == 6:  # which is to be saved
                metrics["loss"] = metrics["loss"] * np.nan
            return train_state, metrics

        return run_step

    monkeypatch.setattr(state, "make_train_step", poisoned)
    workdir = tmp_path / "run"
    with pytest.raises(trainer.TrainingError, match=r"^step 6 is not finite .*the last good checkpoint is step 3;"):
        trainer.train(on_eight_devices(config), workdir)
    assert sorted(int(entry.name) for entry in (workdir / "checkpoints").iterdir()) == [3]
    assert rows(workdir)[-1]["step"] == 6
    assert rows(workdir)[-1]["loss"] is None


def test_a_signal_during_an_evaluation_still_saves_the_step(corpus, compiled, tmp_path, monkeypatch, capsys):
    config = settings(corpus)
    config.checkpoint.every = 1000
    real = evaluate.evaluate

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    monkeypatch.setattr(state, "make_train_step", compiled)
    workdir = tmp_path / "run"
    try:
        trainer.train(on_eight_devices(config), workdir)
    except KeyboardInterrupt:
        pytest.fail("SIGINT was not taken as a wish to save")
    assert "stopped by SIGINT after step 4, saved" in capsys.readouterr().err
    assert [int(entry.name) for entry in (workdir / "checkpoints").iterdir()] == [4]
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4]


def on_eight_devices(config: config_lib.Config) -> config_lib.Config:
    config.mesh = config_lib.MeshConfig(data=8)
    return config
