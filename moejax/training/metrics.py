"""Where a run's numbers go: metrics.jsonl, TensorBoard events, and the console; process 0 alone writes."""

import json
import math
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm

from moejax import config as config_lib
from moejax import files

SCALARS = (
    "loss",
    "ema_loss",
    "validation_loss",
    "learning_rate",
    "grad_norm",
    "vocabulary_z_loss",
    *(f"{name}_loss" for name in (*config_lib.MOE_LOSSES, "relu")),
    "tokens_per_second",
)
# Of these a row has a number a MoE layer; see `state.routing_metrics` and `probe.Probe`.
BY_LAYER = ("max_load", "unused_experts", "dropped", "router_entropy", "experts_per_token", "coactivation", "churn")


class Writer:
    """Where rows go; this one writes nothing: process 0 has a `MetricsWriter`, and the others leave it to that."""

    last: dict[str, Any] | None = None  # the row of the step that the run goes on from

    def write(self, row: dict[str, Any]) -> None:
        """Takes the row of a step."""

    def flush(self) -> None:
        """Returns when every row is safe."""

    def close(self) -> None:
        """No row comes after this."""


class MetricsWriter(Writer):
    """Appends a row a step. What `flush` returns from survives the death of the process."""

    def __init__(self, workdir: pathlib.Path, *, step: int):
        """Rows after `step`, from before an interruption, are dropped: the run will write them again."""
        path = workdir / "metrics.jsonl"
        kept = [row for row in files.read_rows(path) if row["step"] <= step] if path.exists() else []
        self.last = kept[-1] if kept else None
        files.write(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", buffering=1)  # a row is in the file as soon as its step is done
        self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """row: plain numbers, lists or arrays. A number that is not finite becomes null: JSON has no other way."""
        self._file.write(json.dumps({name: _plain(value) for name, value in row.items()}) + "\n")
        for name in SCALARS:
            if name in row:
                self._events.add_scalar(name, row[name], row["step"])
        for name in BY_LAYER:
            for layer, value in enumerate(row.get(name, ())):
                self._events.add_scalar(f"{name}/layer_{layer}", value, row["step"])

    def flush(self) -> None:
        """Puts every row on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        self._file.close()
        self._events.close()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def say(line: str) -> None:
    """One line on the log, which is standard error: standard output is for results. From process 0 alone."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


class Console:
    """A progress bar with loss, tokens/s and time left on a terminal; a plain line every log_every steps in a log."""

    def __init__(self, *, num_steps: int, step: int, log_every: int):
        self._num_steps, self._log_every = num_steps, log_every
        self._bar = None
        if sys.stderr.isatty() and jax.process_index() == 0:
            self._bar = tqdm.tqdm(total=num_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1)

    def show(self, row: dict[str, Any], *, tokens_per_second: float, seconds_left: float) -> None:
        """Shows the row of one step."""
        step, validation = row["step"], row.get("validation_loss")
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {row['loss']:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._log_every == 0 or step in (1, self._num_steps):
            self.say(
                f"step {step}/{self._num_steps}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  "
                f"grad norm {row['grad_norm']:.2f}  {tokens_per_second:,.0f} tokens/s  {duration(seconds_left)} left"
            )
        if validation is not None:
            self.say(f"step {step}/{self._num_steps}  validation loss {validation:.4f}")

    def say(self, line: str) -> None:
        """One line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            say(line)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """4000.0 is 1:06:40, 90.0 is 1:30."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
