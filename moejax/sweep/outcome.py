"""What a point has come to: result.json in its folder, and the numbers of a run that is done."""

import dataclasses
import json
import pathlib
import statistics
from typing import Literal, get_args

import numpy as np

from moejax import config as config_lib
from moejax import files
from moejax.analysis import run_files, sweep_results
from moejax.config import plain

FILE = "result.json"
Status = Literal["done", "failed", "does not fit"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """The measured fields of a `sweep_results.Row`."""

    loss: float | None = None
    ema_loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    dropped: float | None = None
    imbalance: float | None = None
    entropy: float | None = None
    churn: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a point's run. error: one line where it is not done."""

    status: Status
    error: str | None = None
    numbers: Numbers = Numbers()


def read(folder: pathlib.Path) -> Outcome | None:
    """What result.json in the point's folder says; None: there is no outcome yet."""
    path = folder / FILE
    try:
        values = files.read_json(path)
        outcome = Outcome(**values | {"numbers": Numbers(**values["numbers"])})
    except FileNotFoundError:
        return None
    except (TypeError, KeyError) as error:
        raise config_lib.ConfigError(f"{path} is no outcome of a point ({error}); remove it") from None
    if outcome.status not in get_args(Status):
        raise config_lib.ConfigError(f"{path} has status={outcome.status}, which is none; remove it")
    return outcome


def is_done(folder: pathlib.Path) -> bool:
    """Whether the point in this folder has been trained to its end. A damaged result.json says nothing of it."""
    try:
        found = read(folder)
    except config_lib.ConfigError:
        return False
    return found is not None and found.status == "done"


def write(folder: pathlib.Path, outcome: Outcome) -> None:
    """Writes result.json, whole or not at all."""
    files.write(folder / FILE, json.dumps(dataclasses.asdict(outcome), indent=2, allow_nan=False) + "\n")


def clear(folder: pathlib.Path) -> None:
    """Forgets the outcome, but for that of a point that is done."""
    if not is_done(folder):
        (folder / FILE).unlink(missing_ok=True)


def of_run(folder: pathlib.Path, config: config_lib.Config) -> Outcome | None:
    """The outcome that a run's folder shows, whoever trained there; None: the run has not come to its end.

    A run of another model or other data than the point's has failed.
    """
    num_steps = config.training.num_steps
    if not ((folder / "checkpoints" / str(num_steps)).is_dir() and (folder / "config.json").is_file()):
        return None
    values = files.read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise config_lib.ConfigError(f"{folder}/config.json is no config; move {folder} away to train it anew")
    made_with = plain.from_dict(values)
    for path, there, here in plain.differences(made_with, config):
        if not free(path):
            error = f"it was trained with {path}={there}, and the point has {here}; move {folder} away to train it anew"
            return Outcome(status="failed", error=error)
    return Outcome(status="done", numbers=measure(folder, config))


def measure(folder: pathlib.Path, config: config_lib.Config) -> Numbers:
    """The numbers of a run that is done: losses and speed over all of it, routing over its last tenth.

    Raises:
      ConfigError: its metrics.jsonl is not there, or not that of a run to its end.
    """
    path = folder / "metrics.jsonl"
    rows = run_files.rows(folder)
    if not rows or rows[-1].get("step") != config.training.num_steps:
        raise config_lib.ConfigError(
            f"{path} does not go to step {config.training.num_steps}, to which the point was trained; move {folder} "
            "away to train it anew"
        )
    if not all(isinstance(row.get(name), int | float) for row in rows for name in ("seconds", "tokens_per_second")):
        raise config_lib.ConfigError(f"{path} has rows without seconds or speed; move {folder} away to train it anew")
    loss_S = np.array([row["loss"] for row in rows], float)  # null is NaN
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    numbers = Numbers(
        loss=rows[-1]["loss"],
        ema_loss=float(sweep_results.ema(loss_S)[-1]),
        validation_loss=validation[-1] if validation else None,
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in rows),
        seconds=sum(row["seconds"] for row in rows),
    )
    if not config.model.has_experts:
        return numbers
    from moejax.analysis import routing_report  # it draws, too, and takes a second to import

    routing = routing_report.numbers(plain.flatten(config), rows, None)
    return dataclasses.replace(
        numbers,
        dropped=routing_report.layer_mean(routing, "dropped"),
        imbalance=routing_report.layer_mean(routing, "max_load"),
        entropy=routing_report.layer_mean(routing, "router_entropy"),
        churn=routing_report.layer_mean(routing, "churn"),
    )


def free(path: str) -> bool:
    """Whether this field of a config may change while a sweep goes on: no result depends on it.

    The remedies, then, for a point that ran out of memory do not cost those that are done.
    """
    return path.startswith(("mesh.", "checkpoint.")) or path in (
        "training.num_microbatches",
        "training.log_every",
        "data.num_workers",
    )
