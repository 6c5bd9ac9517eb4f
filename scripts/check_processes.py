"""Trains one config as one, two and four processes of this machine, kills one, and moves the run to others.

    python scripts/check_processes.py [--config=configs/quickstart.py] [--num_steps=12] [--config.a.b=v ...]

Every run has eight virtual CPU devices. Prints the largest difference from the losses of the run that nothing
interrupted (relative), how long the processes that were left took to say whom they miss, and what they said; exit
status 1 if a difference is above 1e-5, or they took over 90 s.

The one process, too, sums between its devices by Gloo, as several have to: XLA's own sums of one process round
otherwise, and then within some ten steps a token near a tie goes to another expert, which moves the losses from there
on by some 1e-5. Other meshes round otherwise anyway; in a long run that shows.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

from moejax import files

DEVICES = 8
TOLERANCE = 1e-5  # relative, of a loss
LIMIT = 90.0  # seconds until a lost process is noticed


# As jax.distributed starts several. Without it one process has XLA's own collectives.
ALONE = """
import sys, jax
jax.distributed.initialize(sys.argv[1], num_processes=1, process_id=0)
from moejax import cli
cli.main(sys.argv[2:])
"""


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
        start = ["-m", "moejax.cli"] if num_processes > 1 else ["-c", ALONE, coordinator]
        command = [sys.executable, *start, "train", f"--workdir={workdir}", *arguments]
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


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """By step."""
    return {row["step"]: row["loss"] for row in files.read_rows(workdir / "metrics.jsonl")}


def last_step(workdir: pathlib.Path) -> int:
    """0 before the first."""
    return max(losses(workdir), default=0) if (workdir / "metrics.jsonl").exists() else 0


def difference(workdir: pathlib.Path, reference: dict[int, float]) -> float:
    """The largest relative difference of a loss; infinite if a step is missing."""
    ours = losses(workdir)
    if ours.keys() != reference.keys():
        return float("inf")
    return max(abs(ours[step] - loss) / abs(loss) for step, loss in reference.items())


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

        def report(what: str, found: float) -> None:
            nonlocal failed
            failed |= not found <= TOLERANCE
            print(f"{what:60} {found:.1e} {'ok' if found <= TOLERANCE else 'FAILED'}", flush=True)

        try:
            running = launch(arguments, folder / "1", f"data={DEVICES}", 1)
            finish(running, folder / "1")
            reference = losses(folder / "1")
            for num_processes, mesh in ((2, "data=8"), (4, "data=8"), (4, "data=2,fsdp=2,expert=2")):
                workdir = folder / f"{num_processes} {mesh}"
                running = launch(arguments, workdir, mesh, num_processes)
                finish(running, workdir)
                report(f"{num_processes} processes, {mesh}", difference(workdir, reference))

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
            report("the same run ended by 1 process, data=2,fsdp=2,expert=2", difference(workdir, reference))
        finally:
            for process in running:
                process.kill()
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
