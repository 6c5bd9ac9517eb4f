"""Sweeps' folders made by hand: sweep.json and the metrics of its points, with curves like those of real runs."""

import json
import math
import pathlib
from collections.abc import Callable

import numpy as np

from moejax.analysis import sweep_results

TOKENS = 2048  # a step
NUM_LAYERS = 2


def make_row(group: str, seed: int = 0, *, experts: int = 0, status: str = "done", **fields) -> sweep_results.Row:
    """A point of 400 steps; a finished one has losses unless `fields` say otherwise."""
    about = {
        "settings": {"model.moe.num_experts": experts} if experts else {"model.period": ["mamba"]},
        "axes": {"experts": experts, "granularity": 1, "top_k": 1},
        "total": 30_000_000 + 3_000_000 * experts,
        "active": 30_000_000,
        "non_embedding_total": 26_000_000 + 3_000_000 * experts,
        "non_embedding_active": 26_000_000,
        "steps": 400,
        "tokens": 400 * TOKENS,
        "flops": 1.2e15,
    }
    if status == "done":
        about |= {"loss": 3.7, "ema_loss": 5.2, "validation_loss": 3.68, "tokens_per_second": 4000.0, "seconds": 201.0}
    if status == "done" and experts:
        about |= {"dropped": 0.02, "imbalance": 1.4, "entropy": 1.9, "churn": 0.1}
    return sweep_results.Row(name=f"{group}_s{seed}", group=group, seed=seed, status=status, **about | fields)


def make_metrics(folder: pathlib.Path, losses: list[float], *, experts: int = 0, seed: int = 0) -> None:
    """A row a step; a model with experts has its routing."""
    rng = np.random.default_rng(seed)
    rows = []
    for step, loss in enumerate(losses, start=1):
        row = {"step": step, "tokens": TOKENS * step, "loss": loss, "ema_loss": loss, "seconds": 0.5}
        if experts:
            load = rng.dirichlet(np.full(experts, 3.0 + step / 20), NUM_LAYERS)
            row |= {
                "load": load.tolist(),
                "dropped": [0.3 / math.sqrt(step)] * NUM_LAYERS,
                "router_entropy": [math.log(experts) * (1 - 0.4 * step / len(losses))] * NUM_LAYERS,
            }
            if step % 100 == 0:
                row["churn"] = [10 / step] * NUM_LAYERS
        rows.append(row)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_sweep(
    folder: pathlib.Path,
    rows: list[sweep_results.Row],
    losses: Callable[[sweep_results.Row], list[float]],
    baseline: str | None = "mamba",
) -> pathlib.Path:
    """losses: of the steps that a point has done; none if it has not begun."""
    for index, row in enumerate(rows):
        done = losses(row)
        if done:
            make_metrics(folder / row.name, done, experts=int(row.axes["experts"]), seed=index)
    folder.mkdir(exist_ok=True)
    sweep_results.write(folder, sweep_results.Results(baseline=baseline, points=rows))
    return folder


def curve(end: float, *, steps: int = 400, seed: int = 0, noise: float = 0.06) -> list[float]:
    """A training loss that falls from ln(vocabulary) to `end`, noisy from batch to batch."""
    rng = np.random.default_rng(seed)
    step = np.arange(1, steps + 1)
    smooth = end + (9.0 - end) * (1 + step / 8) ** -0.8 * (1 - 0.9 * step / steps)
    return (smooth + noise * rng.normal(size=steps)).tolist()
