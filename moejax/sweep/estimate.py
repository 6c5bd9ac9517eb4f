"""How long the points of a sweep take on this machine, measured: a few steps of one point of each group."""

import copy
import dataclasses
import heapq
import math
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moejax import config as config_lib
from moejax import files
from moejax.sweep import folder as folder_lib
from moejax.sweep import grid, runner

LEAST_STEPS = 3  # that a probe measures; with fewer its evaluations and its checkpoint would meet
LIMIT = 600.0  # seconds of a probe: what takes longer is for another machine


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of the parts of a run on this machine.

    start: the process, the data, the parameters and the last checkpoint. compile: of both programs. step: of training.
    batch: of an evaluation. save: what a checkpoint between two steps takes from them.
    """

    start: float
    compile: float
    step: float
    batch: float
    save: float


def seconds(
    points: Sequence[grid.Point],
    *,
    probe_steps: int,
    jobs: int,
    say: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    command: Sequence[str] = runner.CHILD,
    limit: float = LIMIT,
) -> dict[str, float]:
    """Seconds of each point's run, by name: from short runs in a temporary folder, `jobs` of them side by side.

    Points of a group take equally long. Those whose probe fails are left out, and `say` told why.
    """
    first = {point.group: point for point in reversed(points)}
    probes = [dataclasses.replace(point, config=probe(point.config, probe_steps)) for point in points]
    probes = [point for point in probes if first[point.group].name == point.name]
    costs: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="moejax-probe-") as temporary:
        workdir = pathlib.Path(temporary)
        folder_lib.write(workdir, folder_lib.describe(probes, None))
        say(
            f"measuring {len(probes)} points, {probe_steps} steps of each, up to {limit:.0f} s; --probe_steps=0 leaves "
            "it out"
        )
        ran = runner.Runner(
            workdir, jobs=jobs, board=_Listener(say), environment=environment, command=command, attempts=1, limit=limit
        )
        ran.run([point.name for point in probes])
        if ran.stopped:
            raise KeyboardInterrupt
        for point in probes:
            if point.name in ran.problems:
                continue
            rows = files.read_rows(workdir / point.name / "metrics.jsonl")
            cost = measured(rows, ran.seconds[point.name], probe_steps)
            config, data = first[point.group].config, files.read_json(workdir / point.name / "data.json")
            costs[point.group] = of_run(config, cost, num_batches(config, data))
    return {point.name: costs[point.group] for point in points if point.group in costs}


def probe(config: config_lib.Config, num_steps: int) -> config_lib.Config:
    """A run that shows what the parts of this one cost: `num_steps` steps beside one that compiles, one that follows a
    checkpoint, and two with an evaluation of one batch, the first of which compiles that."""
    config = copy.deepcopy(config)
    last = num_steps + 4
    config.training.num_steps, config.training.eval_every, config.training.eval_batches = last, last - 1, 1
    config.checkpoint.every = num_steps + 1
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, last)
    return config


def measured(rows: Sequence[Mapping[str, Any]], wall: float, num_steps: int) -> Cost:
    """The costs that a probe's metrics show. wall: seconds from the start of its process to its end."""
    first, *plain, saved, compiled, last = (row["seconds"] for row in rows)
    assert len(plain) == num_steps, f"{len(rows)} rows of a probe of {num_steps} steps"
    step = statistics.median(plain)
    batch = max(0.0, last - step)
    return Cost(
        start=max(0.0, wall - sum(row["seconds"] for row in rows)),
        compile=max(0.0, first - step) + max(0.0, compiled - last),
        step=step,
        batch=batch,
        save=max(0.0, saved - step),
    )


def num_batches(config: config_lib.Config, data: Mapping[str, Any]) -> int:
    """Batches of an evaluation; nearly, as rows are filled to their end. data: of the run's data.json."""
    rows = data["validation_tokens"] / config.data.seq_length
    if config.data.packing == "pad":
        rows = data["validation_documents"]
    whole = math.ceil(rows / config.data.batch_size)
    return min(whole, config.training.eval_batches or whole)


def of_run(config: config_lib.Config, cost: Cost, batches: int) -> float:
    """Seconds of a whole run with evaluations of so many batches."""
    num_steps = config.training.num_steps
    evaluations = math.ceil(num_steps / config.training.eval_every)  # the last step is always one
    saves = (num_steps - 1) // config.checkpoint.every
    total = cost.start + cost.compile + num_steps * cost.step
    return total + evaluations * batches * cost.batch + saves * cost.save


def side_by_side(seconds: Iterable[float], jobs: int) -> float:
    """Seconds until all points are done, so many at a time, each begun as soon as another has ended."""
    ends = [0.0] * max(1, jobs)
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)


class _Listener(runner.Board):
    """Tells what is measured, and what cannot be, and why."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say

    def started(self, name: str) -> None:
        self._say(f"measuring {name}")

    def ended(self, name: str, how: str) -> None:
        if how != "done":
            self._say(f"how long {name} takes is not known: its probe {how}")
