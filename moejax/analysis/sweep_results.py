"""What a sweep's folder says about its points: sweep.json, typed, and read back.

The sweep writes it whole after each change, so it can be read while points run.
"""

import dataclasses
import json
import math
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from moejax import config, files

FILE = "sweep.json"
EMA_ALPHA = 0.001  # weight of the new loss in ema_loss, whatever training.ema_alpha is (MoE-Mamba: 0.001)
Status = Literal["waiting", "running", "done", "failed", "does not fit"]
Measure = Literal["validation_loss", "ema_loss", "loss"]
MEASURES: Mapping[Measure, str] = types.MappingProxyType(
    {
        "validation_loss": "validation loss",
        "ema_loss": f"training loss (EMA, alpha {EMA_ALPHA})",
        "loss": "training loss of the last step",
    }
)
# Settings that show in a point's axes, parameters or tokens. Any other makes it another recipe or architecture.
MEASURED_SETTINGS = frozenset(
    (
        *(f"model.moe.{name}" for name in ("num_experts", "d_expert", "top_k", "num_shared_experts")),
        *("model.d_model", "model.num_periods"),
        *("training.num_steps", "optimizer.warmup_steps", "data.batch_size", "data.seq_length"),
    )
)


@dataclasses.dataclass(kw_only=True, slots=True)
class Row:
    """A point of a sweep. Losses are in nats a token; None stands for what there is not, or not yet."""

    name: str  # also its folder, an ordinary run's, inside the sweep's
    group: str  # the name without the seed: points of one group repeat each other
    seed: int
    status: Status
    error: str | None = None  # one line where it failed
    settings: dict[str, Any]  # field by its dotted path -> value, what differs from the base config but the seed
    axes: dict[str, float]  # "experts" (0: no MoE layer), "granularity", "top_k"
    total: int  # parameters
    active: int  # parameters that take part in the output of one token
    non_embedding_total: int
    non_embedding_active: int
    steps: int  # of the whole run, as are the next two
    tokens: int
    flops: float  # useful ones, of `analysis.flops`
    loss: float | None = None  # of the last step
    ema_loss: float | None = None  # `ema` of the training loss after the last step, with EMA_ALPHA
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None  # wall time of the steps
    dropped: float | None = None  # share of the routed choices; this and the rest: end of the run, mean over layers
    imbalance: float | None = None  # load of the busiest expert, 1 = balanced
    entropy: float | None = None  # of the router, nats
    churn: float | None = None  # share of a fixed batch's tokens that changed their expert


@dataclasses.dataclass(kw_only=True, slots=True)
class Results:
    """A sweep's points, in the order of its grid."""

    baseline: str | None  # the group that the others are compared with
    points: list[Row]


def read(folder: pathlib.Path) -> Results:
    """Reads a sweep's folder; raises ConfigError if it is not one, or its sweep.json is damaged."""
    path = folder / FILE
    if not path.is_file():
        what = f"has no {FILE}" if folder.is_dir() else "does not exist"
        raise config.ConfigError(f"{folder} {what}; name a sweep's folder, the --workdir of moejax sweep")
    content = files.read_json(path)
    if not isinstance(content, dict) or content.keys() != {"baseline", "points"}:
        raise _damaged(path, "must hold baseline and points, and nothing else")
    baseline, points = content["baseline"], content["points"]
    if not isinstance(baseline, str | None) or not isinstance(points, list):
        raise _damaged(path, "must have a name or null for baseline and a list for points")
    results = Results(baseline=baseline, points=[_row(path, index, point) for index, point in enumerate(points)])
    names = [row.name for row in results.points]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _damaged(path, f"has two points with the name {twice}")
    return results


def write(folder: pathlib.Path, results: Results) -> None:
    """Writes the folder's sweep.json, whole or not at all."""
    files.write(folder / FILE, json.dumps(to_json(results), indent=2, allow_nan=False) + "\n")


def to_json(results: Results) -> dict[str, Any]:
    """As sweep.json has it. A number that is not finite becomes null: JSON has no other way."""
    points = [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in map(dataclasses.asdict, results.points)
    ]
    return {"baseline": results.baseline, "points": points}


def ema(loss_S: np.ndarray, alpha: float = EMA_ALPHA) -> np.ndarray:
    """The moving average after each step, from the first loss on: m <- (1 - alpha) m + alpha loss.

    alpha: weight of the new loss. A loss that is not finite leaves the average as it was; it is NaN before the first
    that is.
    """
    average_S = np.full(len(loss_S), np.nan)
    average = math.nan
    for step, loss in enumerate(loss_S):
        if math.isfinite(loss):
            average = loss if math.isnan(average) else (1 - alpha) * average + alpha * loss
        average_S[step] = average
    return average_S


def measure(points: Sequence[Row]) -> Measure:
    """Which loss these finished points are compared by: the best that all of them have.

    The validation loss; else the moving average, unless a run is so short that over 1% of it is still the first step's
    loss; else the last step's.
    """
    if all(row.validation_loss is not None for row in points):
        return "validation_loss"
    forgotten = all((1 - EMA_ALPHA) ** row.steps < 0.01 for row in points)
    return "ema_loss" if forgotten and all(row.ema_loss is not None for row in points) else "loss"


def _row(path: pathlib.Path, index: int, entry: Any) -> Row:
    hints = typing.get_type_hints(Row)
    if not isinstance(entry, dict) or entry.keys() != hints.keys():
        wrong = sorted(hints.keys() ^ entry.keys()) if isinstance(entry, dict) else ["every field"]
        raise _damaged(path, f"has other fields than a point has in points[{index}]: {', '.join(wrong)}")
    for name, hint in hints.items():
        if not _fits(entry[name], hint):
            raise _damaged(path, f"has points[{index}].{name}={entry[name]!r}, which is no {_described(hint)}")
    if not all(_fits(value, float) for value in entry["axes"].values()):
        raise _damaged(path, f"has points[{index}].axes={entry['axes']!r}, which are not all numbers")
    return Row(**entry)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is float:  # JSON writes 3.0 as 3 at times
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, origin or hint) and not isinstance(value, bool)


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"status ({', '.join(typing.get_args(hint))})"
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    names = {str: "text", int: "whole number", float: "finite number", dict: "object", type(None): "null"}
    return " or ".join(names[typing.get_origin(part) or part] for part in parts)


def _damaged(path: pathlib.Path, what: str) -> config.ConfigError:
    return config.ConfigError(f"{path} {what}; mend it, or run the sweep's command again")
