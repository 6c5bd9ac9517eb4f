"""A sweep whose points train in milliseconds, without jax: the runner and its processes are the real ones.

    python stub_sweep.py run WORKDIR [JOBS]     runs it to its end
    python stub_sweep.py point FOLDER           what the runner starts for a point

A point writes a row a step and saves every few, and goes on from there. WORKDIR/faults.json has what goes wrong:
{"POINT": ["FAULT@STEP", ...]}, one for each of its first attempts. WORKDIR/attempts.jsonl gets a line for each.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import time

from moejax import config as config_lib
from moejax import files
from moejax.analysis import sweep_results
from moejax.config import plain
from moejax.sweep import child, folder, outcome, runner

NUM_STEPS, SAVE_EVERY, STEP_SECONDS = 30, 4, 0.01
NAMES = ("a_s0", "a_s1", "b_s0", "b_s1")


def describe(names=NAMES, num_steps=NUM_STEPS) -> folder.Description:
    rows, configs = {}, {}
    for name in names:
        index = (*NAMES, *names).index(name)
        config = config_lib.Config()
        config.model.period = ("mamba",)
        config.training.num_steps, config.checkpoint.every, config.training.seed = num_steps, SAVE_EVERY, index
        rows[name] = sweep_results.Row(
            name=name, group=name[0], seed=int(name[-1]), status="waiting", settings={}, axes={"experts": 0},
            total=1, active=1, non_embedding_total=1, non_embedding_active=1, steps=num_steps, tokens=8, flops=1e9,
        )  # fmt: skip
        configs[name] = config
    return folder.Description("a", rows, configs)


def loss(seed: int, step: int) -> float:
    return 5.0 / step**0.5 + 0.01 * seed


def saved_steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def train(config: config_lib.Config, workdir: pathlib.Path) -> int:
    attempts = workdir.parent / "attempts.jsonl"
    done = [row for row in files.read_rows(attempts) if row["name"] == workdir.name] if attempts.exists() else []
    start = max(saved_steps(workdir), default=0)
    with attempts.open("a") as file:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        print(json.dumps({"name": workdir.name, "pid": os.getpid(), "start": start, "cores": cores}), file=file)
    faults = {}
    with contextlib.suppress(FileNotFoundError):
        faults = json.loads((workdir.parent / "faults.json").read_text())
    fault, _, at = ([*faults.get(workdir.name, []), ""][: len(done) + 1][-1]).partition("@")
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(True))

    metrics = workdir / "metrics.jsonl"
    kept = [row for row in files.read_rows(metrics) if row["step"] <= start] if metrics.exists() else []
    files.write(metrics, "".join(json.dumps(row) + "\n" for row in kept))
    files.write(workdir / "config.json", json.dumps(plain.to_dict(config)))
    with metrics.open("a", buffering=1) as file:
        for step in range(start + 1, config.training.num_steps + 1):
            since = time.perf_counter()
            time.sleep(STEP_SECONDS)
            if fault and step == int(at):
                fail(fault)
            seconds = time.perf_counter() - since
            value = loss(config.training.seed, step)
            row = {"step": step, "loss": value, "ema_loss": value, "seconds": seconds, "tokens_per_second": 8 / seconds}
            if step == config.training.num_steps:
                row["validation_loss"] = value + 0.1
            file.write(json.dumps(row) + "\n")
            if step % SAVE_EVERY == 0 or step == config.training.num_steps or stopped:
                (workdir / "checkpoints" / str(step)).mkdir(parents=True)
            if stopped:
                return step
    return config.training.num_steps


def fail(fault: str) -> None:
    match fault:
        case "raise":
            raise ValueError("two lines\nof a bug")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "diverge":
            raise child.FailedError("step 7 is not finite")
        case "refuse":
            raise config_lib.ConfigError("model.d_model=7 is odd; make it even")
        case "hang":
            time.sleep(1000)


def run(workdir: pathlib.Path, jobs: int, **options) -> runner.Runner:
    """What the command does with a sweep, but for what it says."""
    folder.write(workdir, describe())
    folder.collect(workdir)
    ran = runner.Runner(
        workdir,
        jobs=jobs,
        board=runner.Board(),
        command=[sys.executable, __file__, "point"],
        environment=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        **options,
    )
    ran.run([name for name in NAMES if not outcome.is_done(workdir / name)])
    return ran


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", workdir, *jobs]:
            ran = run(pathlib.Path(workdir), int(jobs[0]) if jobs else 1)
            print(json.dumps(ran.problems))
            sys.exit(1 if ran.problems or ran.stopped else 0)
        case ["point", _]:
            del sys.argv[1]
            child.main(train, patience=float(os.environ.get("STUB_PATIENCE", "10")))
