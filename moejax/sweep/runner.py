"""Trains the points of a sweep on this machine, each in a process of its own, so many at a time."""

import collections
import contextlib
import dataclasses
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import IO, Any

from moejax.sweep import child as child_lib
from moejax.sweep import folder as folder_lib
from moejax.sweep import outcome

CHILD = (sys.executable, "-m", "moejax.sweep.child")
POLL = 0.1  # seconds
GPU_MEMORY = 0.9  # share of a GPU that the processes on it may take; jax alone takes 0.75


class Board:
    """Is told how the points go; this one keeps it to itself."""

    def started(self, name: str) -> None:
        """A process has begun to train the point."""

    def ended(self, name: str, how: str) -> None:
        """The point's process has ended. how: done, or a line that says why not."""

    def draw(self, running: Collection[str]) -> None:
        """Called several times a second. running: the points that are being trained."""


@dataclasses.dataclass
class _Child:
    """A process that trains a point. slot: its share of the machine, from 0."""

    name: str
    slot: int
    process: subprocess.Popen
    log: IO[bytes]
    since: float

    def end(self) -> int:
        """Frees what it held; its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.log.close()
        return self.process.wait()


class Runner:
    """Runs points of the sweep in workdir, where points.json lists them.

    problems: of each point that is not done, why in a line. seconds: of the last attempt at each point, from the start
    of its process to its end. stopped: the name of the signal that has stopped it, if any.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        jobs: int,
        board: Board,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = CHILD,
        attempts: int = 2,
        limit: float = math.inf,
    ):
        """jobs: points at a time. environment: of their processes; None: this one's. command: what trains a point.
        attempts: at a point that crashes, before it has failed. limit: seconds of an attempt, which then ends."""
        self.problems: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.stopped: str | None = None
        self._workdir, self._board, self._command = workdir, board, command
        self._most_attempts, self._limit = attempts, limit
        self._environment = dict(os.environ if environment is None else environment)
        self._jobs = jobs
        self._shares: list[dict[str, str]] = []
        self._cores: list[set[int]] = []
        self._children: list[_Child] = []
        self._previous: dict[int, Any] = {}
        self._attempts: collections.Counter[str] = collections.Counter()
        self._asked_to_stop = False

    def run(self, names: Sequence[str]) -> None:
        """Returns when each of these points is done or has failed, or when a signal has come and all have saved.

        SIGTERM and SIGINT go on to the processes, so that they save; a second one ends all at once.
        """
        queue = collections.deque(names)
        jobs = max(1, min(self._jobs, len(names)))
        self._shares, self._cores = device_shares(jobs, self._environment), core_shares(jobs, self._environment)
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._children or (queue and not self.stopped):
                for slot in self._free_slots() if not self.stopped else ():
                    if queue:
                        self._start(queue.popleft(), slot)
                self._board.draw([child.name for child in self._children])
                time.sleep(POLL)
                if self.stopped and not self._asked_to_stop:
                    # not SIGTERM, which SLURM gives to every process of a job: a second one would end them at once
                    self._stop(signal.SIGINT)
                for child in self._children:
                    if time.monotonic() - child.since > self._limit:
                        child.process.kill()
                for child in [child for child in self._children if child.process.poll() is not None]:
                    if self._take(child):
                        queue.appendleft(child.name)
        finally:
            self._stop(signal.SIGKILL)
            while self._children:
                self._children.pop().end()
            self._collect()
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        signal.signal(number, self._previous[number])
        self.stopped = signal.Signals(number).name

    def _stop(self, number: int) -> None:
        self._asked_to_stop = True
        for child in self._children:
            child.process.send_signal(number)

    def _collect(self) -> None:
        folder_lib.collect(self._workdir, running=[child.name for child in self._children])

    def _free_slots(self) -> list[int]:
        taken = {child.slot for child in self._children}
        return [slot for slot in range(len(self._shares)) if slot not in taken]

    def _start(self, name: str, slot: int) -> None:
        folder = self._workdir / name
        folder.mkdir(parents=True, exist_ok=True)
        outcome.clear(folder)  # what an attempt before has come to
        self._attempts[name] += 1
        log = (folder / folder_lib.LOG).open("ab")
        process = subprocess.Popen(
            [*self._command, str(folder)],
            env=self._environment | self._shares[slot],
            stdin=subprocess.PIPE,  # it closes when this process ends, however it does
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for this process to pass on
        )
        if self._cores:
            with contextlib.suppress(ProcessLookupError):  # it has ended already, which _take sees
                os.sched_setaffinity(process.pid, self._cores[slot])
        self._children.append(_Child(name, slot, process, log, time.monotonic()))
        self._board.started(name)
        self._collect()

    def _take(self, child: _Child) -> bool:
        """Notes how a process that has ended did; says whether its point is to be tried once more."""
        self._children.remove(child)
        status = child.end()
        name, folder = child.name, self._workdir / child.name
        self.seconds[name] = time.monotonic() - child.since
        found = outcome.read(folder)
        again, problem = False, None
        if found is not None and found.status == "done":
            self._board.ended(name, "done")
        elif status == child_lib.BUSY:
            problem = f"{_last_line(folder)}; run the same command again when that has ended"
        elif status == -signal.SIGKILL and self.seconds[name] > self._limit:
            reason = f"it took over {self._limit:.0f} s"
            problem = f"failed: {reason}"
            outcome.write(folder, outcome.Outcome(status="failed", error=reason))
        elif self.stopped:
            problem = f"stopped by {self.stopped}"
        elif found is not None and status in (child_lib.FAILED, child_lib.REFUSED):
            problem = f"failed: {found.error}"
        else:
            reason = found.error if found is not None else _died(status)
            again = self._attempts[name] < self._most_attempts
            if again:
                self._board.ended(name, f"crashed ({reason}); it is tried once more, from its last checkpoint")
            else:
                problem = f"failed: {reason}"
                outcome.write(folder, outcome.Outcome(status="failed", error=reason))
        if problem is not None:
            self.problems[name] = problem
            self._board.ended(name, problem)
        self._collect()
        return again


def device_shares(jobs: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """What is set in the environment of each of so many processes side by side, so that they share the GPUs evenly.

    One process alone has them all, as in `moejax train`. Where there are fewer GPUs than processes, several share one.
    """
    gpus = _gpus(environment)
    if jobs == 1 or not gpus:
        return [{}] * jobs
    if jobs <= len(gpus):
        each = len(gpus) // jobs
        return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot * each : (slot + 1) * each])} for slot in range(jobs)]
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{GPU_MEMORY / -(-jobs // len(gpus)):.3f}"}
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" in environment:
        memory = {}
    return [{"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} | memory for slot in range(jobs)]


def core_shares(jobs: int, environment: Mapping[str, str]) -> list[set[int]]:
    """The cores of each of so many processes side by side, where they compute on cores; else none are set.

    Each of two processes that has half of the cores for itself is faster than where both use all of them.
    """
    if jobs == 1 or not hasattr(os, "sched_setaffinity") or _gpus(environment):
        return []
    cores = sorted(os.sched_getaffinity(0))
    if jobs >= len(cores):
        return [{cores[slot % len(cores)]} for slot in range(jobs)]
    return [set(cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs]) for slot in range(jobs)]


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """Of this machine, as CUDA_VISIBLE_DEVICES names them. jax is not asked: it would take them for this process."""
    if environment.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.split() if found.returncode == 0 else []


def _died(status: int) -> str:
    """Why a process ended that has left no outcome."""
    if status == child_lib.DONE:
        return "its process was stopped by a signal"
    if status > 0:
        return f"its process ended with status {status}"
    memory = "; was there too little memory?" if -status == signal.SIGKILL else ""
    return f"its process was killed by {signal.Signals(-status).name}{memory}"


def _last_line(folder: pathlib.Path) -> str:
    lines: list[Any] = (folder / folder_lib.LOG).read_text(errors="replace").splitlines()
    return lines[-1] if lines else ""
