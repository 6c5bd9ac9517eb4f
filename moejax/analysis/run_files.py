"""What a run's folder holds, as plain numbers: read without jax, and while the run goes on."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from moejax import config, files


@dataclasses.dataclass(kw_only=True, slots=True)
class Run:
    """What a run's folder holds, as read."""

    name: str  # the folder's name
    config: dict[str, Any]  # every leaf by its dotted path
    rows: list[dict[str, Any]]  # of metrics.jsonl, one a step, ascending; never empty
    evaluation: dict[str, Any] | None  # eval.json
    samples: list[dict[str, Any]]  # samples.jsonl

    def column(self, name: str) -> np.ndarray:
        """One scalar of the metrics, an entry a step; NaN where a row has none or null."""
        return column(self.rows, name)


def read(folder: pathlib.Path) -> Run:
    """Reads a run's folder; raises ConfigError if it is not one."""
    if not folder.is_dir():
        raise config.ConfigError(f"{folder} does not exist; name a run's folder, the --workdir of moejax train")
    for name in ("metrics.jsonl", "config.json"):
        if not (folder / name).is_file():
            raise config.ConfigError(f"{folder} has no {name}; name a run's folder, the --workdir of moejax train")
    found = rows(folder)
    if not found:
        raise config.ConfigError(f"{folder}/metrics.jsonl has no complete row yet; wait for the first step")
    evaluation, samples = folder / "eval.json", folder / "samples.jsonl"
    return Run(
        name=folder.resolve().name,
        config=_flatten(files.read_json(folder / "config.json")),
        rows=found,
        evaluation=files.read_json(evaluation) if evaluation.is_file() else None,
        samples=files.read_rows(samples) if samples.is_file() else [],
    )


def rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, ascending by step; none if the run has not begun.

    A step that stands twice counts once, as it was written last.
    """
    metrics = folder / "metrics.jsonl"
    found = files.read_rows(metrics) if metrics.is_file() else []
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in found):
        raise config.ConfigError(f"{metrics} has rows without a step; it is no run's, or damaged: move it away")
    by_step = {row["step"]: row for row in found}
    return [by_step[step] for step in sorted(by_step)]


def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """One scalar of the rows; NaN where a row has none or null."""
    return np.array([row.get(name) for row in rows], float)


def _flatten(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    # config.flatten would refuse a run of another version, whose fields differ.
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return flat
