"""The points of a sweep as a job array of SLURM, submitted by submitit: a task a point.

A task runs `moejax sweep --only=POINT`. Before its time limit, and where it is pre-empted, it saves and goes back into
the queue.
"""

import contextlib
import importlib.util
import inspect
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from moejax import config as config_lib

FOLDER = "slurm"  # in the sweep's: the scripts and logs of its tasks
SAVE_SECONDS = 180  # before the limit, in which to end a step and save
REQUEUES = 100  # at most, after time limits
POLL = 0.5  # seconds


class Task:
    """What a task of the array does; submitit pickles it."""

    def __init__(self, command: Sequence[str]):
        """command: trains a point, and goes on where it was."""
        self.command = list(command)
        self._process: subprocess.Popen | None = None
        self._told_to_end = False

    def __call__(self) -> int:
        """Runs the command to its end, and returns 0; any other exit status is an error."""
        from submitit.core import job_environment

        # SLURM sends this one, which asks submitit to save, to every process of the task; it would end the others
        signal_to_save: Any = job_environment.JobEnvironment._usr_sig()
        previous = signal.signal(signal.SIGTERM, self._note)
        process = subprocess.Popen(self.command, preexec_fn=lambda: signal.signal(signal_to_save, signal.SIG_IGN))
        self._process = process
        while process.poll() is None:
            time.sleep(POLL)
        if process.returncode and self._told_to_end:
            # Pre-empted or cancelled: it has saved. SLURM ends what is cancelled soon; to what is pre-empted it sends
            # the other signal, on which submitit puts it back into the queue.
            time.sleep(SAVE_SECONDS)
        signal.signal(signal.SIGTERM, previous)
        if process.returncode:
            raise RuntimeError(f"{shlex.join(self.command)} ended with status {process.returncode}")
        return 0

    def checkpoint(self) -> Any:
        """Called by submitit in a signal's handler: has the command save, and says what to run in its next life."""
        from submitit.core import utils

        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(
                signal.SIGINT
            )  # it may have had SIGTERM from SLURM; a second would end it at once
            with contextlib.suppress(ChildProcessError):  # Popen.wait is not for signal handlers
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return utils.DelayedSubmission(Task(self.command))

    def _note(self, *_: object) -> None:
        self._told_to_end = True


def parameters(options: Sequence[str]) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor that options such as --time=720 and --partition=gpu stand for.

    What submitit does not know goes to sbatch as it is.

    Raises:
      ConfigError: submitit is not installed, an option is not --NAME=VALUE, or there is no time limit.
    """
    if importlib.util.find_spec("submitit") is None:
        raise config_lib.ConfigError("--launcher=slurm needs submitit; run pip install -e '.[slurm]'")
    from submitit.slurm import slurm

    known = inspect.signature(slurm._make_sbatch_string).parameters
    found: dict[str, Any] = {"job_name": "moejax", "signal_delay_s": SAVE_SECONDS, "stderr_to_stdout": True}
    others: dict[str, Any] = {}
    for option in options:
        name, equals, text = option.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not option.startswith("--") or not name or "\n" in option:
            raise config_lib.ConfigError(
                f"{option} is no option of a SLURM job; write --NAME=VALUE, as --partition=gpu"
            )
        value: Any = True if not equals else int(text) if text.isdecimal() else text
        if name in ("setup", "teardown", "srun_args"):
            found[name] = [*found.get(name, []), text]
        elif name in known and name not in ("command", "folder", "map_count", "additional_parameters", "use_srun"):
            found[name] = value
        else:
            others[name] = value
    if type(found.get("time")) is not int or found["time"] < 1:
        raise config_lib.ConfigError(
            f"--time={found.get('time', '')} must say in minutes how long a task may take, after --; e.g. -- --time=720"
        )
    return found | ({"additional_parameters": others} if others else {})


def script(workdir: pathlib.Path, commands: Sequence[Sequence[str]], given: dict[str, Any]) -> str:
    """The batch script that `submit` would give to sbatch, and as comments what its tasks run."""
    from submitit.slurm import slurm

    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(workdir / FOLDER))}"
    array: dict[str, Any] = {"map_count": len(commands)} if len(commands) > 1 else {}
    text = slurm._make_sbatch_string(command=command, folder=workdir / FOLDER, **given, **array)
    tasks = [f"# task {number}: {shlex.join(words)}" for number, words in enumerate(commands)]
    return "\n".join([text.rstrip(), "", *tasks, ""])


def submit(workdir: pathlib.Path, commands: Sequence[Sequence[str]], given: dict[str, Any]) -> list[str]:
    """Submits a task for each command; the ids of their jobs.

    Raises:
      ConfigError: this is no machine that can submit, or sbatch refuses.
    """
    import submitit

    try:
        executor = submitit.SlurmExecutor(workdir / FOLDER, max_num_timeout=REQUEUES)
        executor.update_parameters(**given)
        return [job.job_id for job in executor.submit_array([Task(command) for command in commands])]
    except Exception as error:  # submitit has no class of its own for what it or sbatch refuses
        reason = " ".join(str(error).split())[:300]
        raise config_lib.ConfigError(
            f"--launcher=slurm: {reason}; run it where sbatch works, or add --dry-run to see what it would be given"
        ) from None
