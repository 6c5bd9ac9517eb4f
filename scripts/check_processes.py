"""Trains one config as one, two and four processes of this machine, kills one, and moves the run to others.

    python scripts/check_processes.py [--config=configs/quickstart.py] [--num_steps=12] [--config.a.b=v ...]

Every run has eight virtual CPU devices. Prints the largest difference from the losses of the run that nothing
interrupted (relative), how long the processes that were left took to say whom they miss, and what they said; exit
status 1 if a difference is above 1e-5, or they took over 90 s.

Another order of summation rounds otherwise, and a new router is near ties: within some ten steps one token of ten
thousands goes to another expert than in the reference, which moves the losses from there on by some 1e-5. The loads of
the experts show it. The limit holds up to that step; it and the difference at the end are printed, too.
"""

import argparse
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

from moejax import files

DEVICES = 8
TOLERANCE = 1e-5  # relative, of a loss
SAME_LOAD = 1e-6  # share of the choices: less than one of them
NEAR_TIES = 1e-3  # share of the choices that rounding can change at once
LIMIT = 90.0  # seconds until a lost process is noticed


def launch(arguments: list[str], workdir: pathlib.Path, mesh: str, num_processes: int) -> list[subprocess.Popen]:
    """Starts the processes; mesh as "data=4,fsdp=2". Their logs are workdir.log.0, ..."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES // num_processes}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {os.environ.get('XLA_FLAGS', '')}"}
    sizes = {"data": "1", **dict(pair.split("=") for pair in mesh.split(","))}
    started = []
    for process in range(num_processes):
        command = [sys.executable, "-m", "moejax.cli", "train", f"--workdir={workdir}", *arguments]
        command += [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
        if num_processes > 1:
            command += [f"--coordinator={coordinator}", f"--num_processes={num_processes}", f"--process_id={process}"]
        with pathlib.Path(f"{workdir}.log.{process}").open("w") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return started


def finish(processes: list[subprocess.Popen], workdir: pathlib.Path) -> None:
    """Waits for all; exits if one fails."""
    for number, process in enumerate(processes):
        if process.wait():
            log = pathlib.Path(f"{workdir}.log.{number}").read_text()
            sys.exit(f"process {number} of {len(processes)} ended with status {process.returncode}; its log:\n{log}")


def rows(workdir: pathlib.Path) -> dict[int, dict[str, Any]]:
    """By step."""
    return {row["step"]: row for row in files.read_rows(workdir / "metrics.jsonl")}


def last_step(workdir: pathlib.Path) -> int:
    """0 before the first."""
    return max(rows(workdir), default=0) if (workdir / "metrics.jsonl").exists() else 0


class Comparison(NamedTuple):
    """Of losses, relative. before: the largest difference while every expert has the load that it has in the reference.
    changed: the first step where one has not, and the share of the choices that differ there. whole: in all steps.
    """

    before: float
    changed: tuple[int, float] | None
    whole: float

    def is_good(self) -> bool:
        return self.before <= TOLERANCE and (self.changed is None or self.changed[1] <= NEAR_TIES)

    def __str__(self) -> str:
        if self.changed is None:
            return f"{self.whole:.1e}"
        step, share = self.changed
        return f"{self.before:.1e} up to step {step}, where {share:.1e} of the choices change; {self.whole:.1e} after"


def compare(workdir: pathlib.Path, reference: dict[int, dict[str, Any]]) -> Comparison:
    """The run with the reference, step by step."""
    ours = rows(workdir)
    if ours.keys() != reference.keys():
        return Comparison(math.inf, None, math.inf)
    before, changed, whole = 0.0, None, 0.0
    for step, expected in reference.items():
        difference = abs(ours[step]["loss"] - expected["loss"]) / abs(expected["loss"])
        loads = [np.array(row.get("load", 0.0)) for row in (ours[step], expected)]
        share = float(np.abs(loads[0] - loads[1]).sum() / 2 / max(1.0, loads[1].sum()))
        if changed is None and share > SAME_LOAD:
            changed = step, share
        whole = max(whole, difference)
        before = whole if changed is None else before
    return Comparison(before, changed, whole)


def main() -> None:
    """Runs everything, one run after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--num_steps", type=int, default=12)
    options, overrides = parser.parse_known_args()
    every = max(1, options.num_steps // 3)
    arguments = [f"--config={options.config}", f"--config.training.num_steps={options.num_steps}", *overrides]
    arguments += [f"--config.checkpoint.every={every}", "--config.training.eval_batches=1"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no process is left behind
    failed = False
    running: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)

        def report(what: str, found: Comparison) -> None:
            nonlocal failed
            failed |= not found.is_good()
            print(f"{what:60} {found} {'ok' if found.is_good() else 'FAILED'}", flush=True)

        try:
            running = launch(arguments, folder / "1", f"data={DEVICES}", 1)
            finish(running, folder / "1")
            reference = rows(folder / "1")
            for num_processes, mesh in ((2, "data=8"), (4, "data=2,fsdp=2,expert=2")):
                workdir = folder / str(num_processes)
                running = launch(arguments, workdir, mesh, num_processes)
                finish(running, workdir)
                report(f"{num_processes} processes, {mesh}", compare(workdir, reference))

            workdir = folder / "moved"
            story = ((4, "data=4,expert=2", 0), (2, "fsdp=2,expert=2,tensor=2", 1))
            for number, (num_processes, mesh, victim) in enumerate(story, start=1):
                running = launch(arguments, workdir, mesh, num_processes)
                while last_step(workdir) <= number * every:  # a checkpoint is there, or on its way to the disk
                    if any(process.poll() is not None for process in running):
                        finish(running, workdir)
                    time.sleep(0.05)
                running[victim].send_signal(signal.SIGKILL)
                since = time.monotonic()
                left = [number for number in range(num_processes) if number != victim]
                statuses = [running[number].wait(timeout=2 * LIMIT) for number in left]
                seconds = time.monotonic() - since
                said = [pathlib.Path(f"{workdir}.log.{number}").read_text() for number in left]
                named = all(f"process {victim} on {socket.gethostname()} is lost" in log for log in said)
                failed |= seconds > LIMIT or not named or 0 in statuses
                print(
                    f"process {victim} of {num_processes} killed, {mesh}: the others end after {seconds:.1f} s, saying"
                )
                print(f"    {said[0].splitlines()[-1]}" if named else "    nothing of it: FAILED", flush=True)
            running = launch(arguments, workdir, "data=2,fsdp=2,expert=2", 1)
            finish(running, workdir)
            report("the same run ended by 1 process, data=2,fsdp=2,expert=2", compare(workdir, reference))
        finally:
            for process in running:
                process.kill()
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
