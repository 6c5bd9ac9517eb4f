"""A sweep's folder: the points that it holds, and sweep.json, which follows from them.

points.json has what each point is. Its run is in the folder of its name, an ordinary run's, beside result.json
(`outcome`), log.txt and a lock (`lock`). Nothing else is kept, so that sweep.json can be made again at any time, by any
of the runners that share the folder.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moejax import config as config_lib
from moejax import files
from moejax.analysis import sweep_results
from moejax.config import plain
from moejax.sweep import lock, outcome

if TYPE_CHECKING:
    from moejax.sweep import grid

FILE = "points.json"
COLLECT_SECONDS = 60.0  # that a runner may take to collect, while others wait
LOG = "log.txt"  # in a point's folder: what its process has said


@dataclasses.dataclass(frozen=True)
class Description:
    """What points.json holds: a row of sweep.json for each point, as it is before it runs, and the point's config."""

    baseline: str | None
    rows: dict[str, sweep_results.Row]
    configs: dict[str, config_lib.Config]

    @property
    def names(self) -> list[str]:
        """The points, in the order of the grid."""
        return list(self.rows)


def describe(points: Sequence["grid.Point"], baseline: str | None) -> Description:
    """Of these points; counts their parameters and FLOPs."""
    from moejax.sweep import cost, grid  # they need jax, which a process that only watches others can do without

    rows = {}
    for point in points:
        counts = cost.parameters(point.config.model)
        rows[point.name] = sweep_results.Row(
            name=point.name,
            group=point.group,
            seed=point.seed,
            status="waiting",
            settings=json.loads(json.dumps(point.settings)),  # as it will be read back
            axes=grid.axes(point),
            total=counts["total"],
            active=counts["active"],
            non_embedding_total=counts["non_embedding_total"],
            non_embedding_active=counts["non_embedding_active"],
            steps=point.config.training.num_steps,
            tokens=cost.tokens(point.config),
            flops=cost.flops(point.config),
        )
    return Description(baseline or None, rows, {point.name: point.config for point in points})


def read(workdir: pathlib.Path) -> Description | None:
    """What the folder's points.json says; None where there is none."""
    path = workdir / FILE
    if not path.is_file():
        return None
    try:
        values = files.read_json(path)
        rows = {entry["row"]["name"]: sweep_results.Row(**entry["row"]) for entry in values["points"]}
        configs = {entry["row"]["name"]: plain.from_dict(entry["config"]) for entry in values["points"]}
        return Description(values["baseline"], rows, configs)
    except (TypeError, KeyError, config_lib.ConfigError) as error:
        raise config_lib.ConfigError(f"{path} is no list of points ({error}); choose another --workdir") from None


def check(workdir: pathlib.Path, new: Description, only: Collection[str] = ()) -> list[str]:
    """Refuses a folder that holds another sweep, or none but something else; reads only.

    Points may join a sweep, and settings change on which no result depends (`outcome.free`).

    only: the points that are asked for, where it is not all: then the folder may have others that the sweep has not, as
    where a job was queued before seeds have joined.

    Returns:
      What is new, as lines.
    """
    if workdir.exists() and not workdir.is_dir():
        raise config_lib.ConfigError(f"--workdir={workdir} is a file; name a folder")
    old = read(workdir)
    if old is None:
        if (workdir / "config.json").exists():
            raise config_lib.ConfigError(f"--workdir={workdir} is the folder of a run; name another for the sweep")
        return []
    changed = {}
    for name, there in old.configs.items():
        if name not in new.configs:
            if only:
                continue
            raise config_lib.ConfigError(
                f"--workdir={workdir} holds another sweep: its point {name} is not in this one; put it back, or choose "
                "another --workdir"
            )
        for path, before, now in plain.differences(there, new.configs[name]):
            if not outcome.free(path):
                raise config_lib.ConfigError(
                    f"{path}={now} of point {name}, but --workdir={workdir} holds a sweep with {path}={before}; set it "
                    "back, or choose another --workdir"
                )
            changed[path] = f"{path}={now} (was {before}) from here on"
    joined = [name for name in new.names if name not in old.configs]
    return [f"new points: {', '.join(joined)}"] * bool(joined) + list(changed.values())


def write(workdir: pathlib.Path, new: Description) -> None:
    """Writes points.json, whole or not at all, where it says anything else. Points that it has beside these stay."""
    workdir.mkdir(parents=True, exist_ok=True)
    with _alone(workdir):  # two that join points at once would each leave the other's out
        old = read(workdir) or Description(None, {}, {})
        rows, configs = new.rows | (old.rows | new.rows), new.configs | (old.configs | new.configs)
        points = [{"row": dataclasses.asdict(rows[name]), "config": plain.to_dict(configs[name])} for name in rows]
        text = json.dumps({"baseline": new.baseline, "points": points}, indent=1) + "\n"
        path = workdir / FILE
        if not path.exists() or path.read_text() != text:
            files.write(path, text)


def refresh(workdir: pathlib.Path) -> None:
    """`collect` of a sweep's folder that may be one's own: points may have ended, or been killed, since. Elsewhere, as
    in a copy that cannot be written to, what is there stays."""
    if (workdir / FILE).is_file():
        with contextlib.suppress(PermissionError):
            collect(workdir)


def collect(workdir: pathlib.Path, running: Collection[str] = ()) -> sweep_results.Results:
    """Makes sweep.json from what the points' folders say, and returns what it holds.

    running: points that the caller has begun, whose processes may not have their locks yet.
    """
    # an older view must not be written over a newer one
    with _alone(workdir):
        description = read(workdir)
        if description is None:
            raise config_lib.ConfigError(f"--workdir={workdir} has no {FILE}; give it to moejax sweep first")
        rows = [
            _row(workdir / name, row, description.configs[name], is_begun=name in running)
            for name, row in description.rows.items()
        ]
        results = sweep_results.Results(baseline=description.baseline, points=rows)
        sweep_results.write(workdir, results)
    return results


@contextlib.contextmanager
def _alone(workdir: pathlib.Path) -> Iterator[None]:
    try:
        with lock.hold(workdir, COLLECT_SECONDS):
            yield
    except lock.HeldError as error:
        raise config_lib.ConfigError(f"--workdir={workdir} is held by {error}; end it, and run again") from None


def _row(
    folder: pathlib.Path, row: sweep_results.Row, config: config_lib.Config, *, is_begun: bool
) -> sweep_results.Row:
    """The row, with what the point's folder adds to it. A damaged folder is that point's failure, not the sweep's."""
    try:
        found = outcome.read(folder)
        if found is None and (is_begun or lock.holder(folder)):
            return dataclasses.replace(row, status="running")
        if found is None:
            found = outcome.of_run(folder, config)  # trained by a cluster, or by a process killed before it said so
            if found is None:
                return row
            outcome.write(folder, found)
    except config_lib.ConfigError as error:
        return dataclasses.replace(row, status="failed", error=str(error))
    measured: dict[str, Any] = dataclasses.asdict(found.numbers)
    return dataclasses.replace(row, status=found.status, error=found.error, **measured)
