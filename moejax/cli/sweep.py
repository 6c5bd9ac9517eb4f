"""The subcommand `moejax sweep`: plans, runs, resumes and collects a grid."""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from moejax import config as config_lib
from moejax.cli import overrides as overrides_lib
from moejax.training import processes

if TYPE_CHECKING:
    from moejax.analysis import plan as plan_lib
    from moejax.analysis import topology as topology_lib
    from moejax.sweep import grid

LAUNCHERS = ("local", "slurm", "gke")
Plans = Mapping[str, "plan_lib.Plan"]  # by the group of points that it is of


def sweep(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Trains every point of a grid, goes on with those that are not done, and collects their results."""
    _check(arguments)
    environment = dict(os.environ)  # of the points' processes: what a plan needs is not for them
    where = _topology(arguments)
    declared = overrides_lib.read_sweep(arguments.config, overrides, arguments.seeds)
    import jax

    jax.config.update("jax_platforms", "cpu")  # accelerators are for the points' processes
    from moejax.sweep import folder, grid, outcome

    points = grid.points(declared)
    chosen = _chosen(points, arguments.only)
    workdir, done = None, set[str]()
    if arguments.workdir is not None and arguments.launcher != "gke":
        workdir = pathlib.Path(arguments.workdir).expanduser().absolute()
        description = folder.describe(points, declared.baseline)
        for line in folder.check(workdir, description, [point.name for point in chosen] if arguments.only else ()):
            processes.say(line)
        if not arguments.dry_run:
            folder.write(workdir, description)
            folder.collect(workdir)
        done = {point.name for point in chosen if outcome.is_done(workdir / point.name)}
    todo = [point for point in chosen if point.name not in done]
    plans = _plans(chosen if arguments.dry_run else todo, where, environment)
    unfit = _unfit(todo, plans)
    fits = [point for point in todo if point.name not in unfit]
    if workdir is not None and not arguments.dry_run:
        for name, reason in unfit.items():
            outcome.write(workdir / name, outcome.Outcome(status="does not fit", error=reason))
    for name, reason in unfit.items():
        processes.say(f"{name} does not fit: {reason}")
    match arguments.launcher:
        case "gke":
            return _launch_gke(arguments, fits)
        case "slurm":
            assert workdir is not None
            return _launch_slurm(arguments, overrides, fits, workdir)
    if arguments.dry_run:
        return _list(arguments, chosen, done, plans, environment)
    assert workdir is not None
    return _run(arguments, [point.name for point in chosen], [point.name for point in fits], workdir, environment)


def fit(arguments: argparse.Namespace, _: list[str]) -> int:
    """Fits a scaling law to a sweep: loss by active parameters, experts and tokens, with intervals."""
    from moejax.analysis import scaling_law, sweep_results

    law = scaling_law.fit(sweep_results.read(arguments.folder))
    print(json.dumps(scaling_law.to_json(law)) if arguments.json else scaling_law.table(law))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuses options that cannot be, or that do not go together."""
    from moejax.sweep import estimate

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise config_lib.ConfigError(message)

    local, least = arguments.launcher == "local", estimate.LEAST_STEPS
    after = " ".join(arguments.after)
    require(arguments.jobs >= 0, f"--jobs={arguments.jobs} must be 0 or more; change it")
    require(
        local or arguments.jobs == 1,
        f"--jobs={arguments.jobs} has no effect with --launcher={arguments.launcher}; leave it out",
    )
    require(
        arguments.probe_steps == 0 or arguments.probe_steps >= least,
        f"--probe_steps={arguments.probe_steps} must be 0, for none, or {least} or more; change it",
    )
    require(
        arguments.plan or (arguments.topology is None and arguments.slices == 1),
        f"--topology={arguments.topology} --slices={arguments.slices} say what to plan for; add --plan",
    )
    require(
        not arguments.plan or arguments.topology is not None, "--plan needs a slice; add --topology, e.g. v5e:16x16"
    )
    require(not (local and after), f"{after} after -- is for a launcher; add --launcher=slurm or --launcher=gke")
    require(
        arguments.workdir is not None or (local and arguments.dry_run),
        "--workdir is missing; name the sweep's folder, e.g. --workdir=runs/experts",
    )
    require(
        not arguments.json or local or arguments.dry_run,
        f"--json with --launcher={arguments.launcher} goes with --dry-run; leave one of them out",
    )
    if arguments.launcher == "slurm":
        from moejax.sweep import slurm

        slurm.parameters(arguments.after)


def _chosen(points: Sequence["grid.Point"], only: str) -> list["grid.Point"]:
    """The points that --only names; all without it."""
    names = [point.name for point in points]
    asked = only.split(",") if only else names
    for name in asked:
        if name not in names:
            raise config_lib.ConfigError(f"--only={name} is no point of this sweep; it has {', '.join(names)}")
    return [point for point in points if point.name in asked]


# --- planning --------------------------------------------------------------------------------------------------------


def _topology(arguments: argparse.Namespace) -> "topology_lib.Topology | None":
    """What --plan is for. Before jax is imported, as libtpu asks."""
    if not arguments.plan:
        return None
    from moejax.analysis import topology

    where = topology.parse(arguments.topology, arguments.slices)
    topology.prepare()
    return where


def _plans(
    points: Sequence["grid.Point"], where: "topology_lib.Topology | None", environment: Mapping[str, str]
) -> dict[str, "plan_lib.Plan"]:
    """A plan of each group of points, compiled for where; none without one. Leaves the environment as it was."""
    if where is None:
        return {}
    from moejax.analysis import plan as plan_lib
    from moejax.analysis import topology

    configs, devices = {point.group: point.config for point in points}, topology.devices(where)
    meshes = {group: plan_lib.mesh_of(config, devices) for group, config in configs.items()}
    plans = {}
    for group, config in configs.items():
        processes.say(f"compiling {group} for {meshes[group].size} devices of {where.name}")
        plans[group] = plan_lib.make(config, where, meshes[group])
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    return plans


def _unfit(points: Sequence["grid.Point"], plans: Plans) -> dict[str, str]:
    """The points that do not fit, and why."""
    return {
        point.name: f"{plan.topology}: {plan.memory.refusal}"
        for point in points
        if (plan := plans.get(point.group)) is not None and not plan.memory.fits
    }


def _list(
    arguments: argparse.Namespace,
    points: Sequence["grid.Point"],
    done: Set[str],
    plans: Plans,
    environment: Mapping[str, str],
) -> int:
    """Says what a call without --dry-run would run, and how long that takes: points that are done, no time."""
    from moejax.analysis import plan_table
    from moejax.sweep import estimate, listing

    seconds, jobs, steps = {}, max(1, arguments.jobs), arguments.probe_steps
    todo = [point for point in points if point.name not in done]
    if steps and todo and not plans:  # what is planned for a slice is seldom for this machine
        seconds = estimate.seconds(todo, probe_steps=steps, jobs=jobs, say=processes.say, environment=environment)
    seconds |= dict.fromkeys(done, 0.0)
    rows = listing.rows(points, seconds)
    if arguments.json:
        extra: list[dict[str, Any]] = [
            {"plan": plans[point.group].to_json()} if point.group in plans else {} for point in points
        ]
        print(json.dumps({"points": [row | more for row, more in zip(rows, extra, strict=True)]}))
        return 0
    print(listing.table(rows))
    if plans:
        print("\n" + plan_table.grid(list(plans.values()), [{"point": group} for group in plans]))
    if len(seconds) == len(points) and jobs > 1:
        from moejax.training import metrics

        print(f"{metrics.duration(estimate.side_by_side(seconds.values(), jobs))} with --jobs={jobs}")
    return 0


# --- running ---------------------------------------------------------------------------------------------------------


def _run(
    arguments: argparse.Namespace,
    chosen: Sequence[str],
    todo: Sequence[str],
    workdir: pathlib.Path,
    environment: Mapping[str, str],
) -> int:
    """Trains the points to do, here, and says what has come of all that are chosen."""
    from moejax.analysis import sweep_results
    from moejax.sweep import board, folder, runner

    problems: dict[str, str] = {}
    stopped = None
    if arguments.jobs and todo:
        if len(todo) < len(chosen):
            processes.say(f"{len(todo)} of {len(chosen)} points are to be run; the others are done, or do not fit")
        rows = [row for row in folder.collect(workdir).points if row.name in chosen]
        console = board.Console(workdir, rows, arguments.jobs)
        run = runner.Runner(workdir, jobs=arguments.jobs, board=console, environment=environment)
        run.run(todo)
        console.close()
        problems, stopped = run.problems, run.stopped
    results = folder.collect(workdir)
    print(json.dumps(sweep_results.to_json(results)) if arguments.json else board.table(results.points))
    for name, problem in problems.items():
        processes.say(f"moejax: {name} {problem} (see {workdir / name / folder.LOG})")
    if stopped:
        processes.say(f"moejax: stopped by {stopped}; run the same command to go on")
    failed = any(row.status == "failed" for row in results.points if row.name in chosen)
    return 1 if problems or stopped or failed else 0


# --- clusters --------------------------------------------------------------------------------------------------------


def _launch_slurm(
    arguments: argparse.Namespace, overrides: list[str], points: Sequence["grid.Point"], workdir: pathlib.Path
) -> int:
    """Submits a task for each of these points, or prints the batch script."""
    from moejax.sweep import slurm

    given = slurm.parameters(arguments.after)
    again = [sys.executable, "-m", "moejax.cli", "sweep", f"--config={arguments.config}", f"--workdir={workdir}"]
    again += [f"--seeds={arguments.seeds}"] * bool(arguments.seeds)
    commands = [[*again, f"--only={point.name}", *overrides] for point in points]
    if not commands:
        processes.say("every point is done, or does not fit")
    if arguments.dry_run and (commands or arguments.json):
        _show(arguments, points, [slurm.script(workdir, commands, given)] if commands else [])
    elif commands and not arguments.dry_run:
        jobs = slurm.submit(workdir, commands, given)
        for point, job in zip(points, jobs, strict=True):
            print(f"{point.name} is job {job}")
    return 0


def _launch_gke(arguments: argparse.Namespace, points: Sequence["grid.Point"]) -> int:
    """Creates a JobSet for each of these points, or prints the manifests."""
    from moejax.sweep import gke

    base, configs = overrides_lib.read_config(arguments.config, []), {point.name: point.config for point in points}
    calls = gke.commands(arguments.config, base, configs, arguments.workdir, arguments.after)
    if arguments.dry_run:
        _show(arguments, points, list(gke.launch(calls, dry_run=True)))
    else:
        for said in gke.launch(calls, dry_run=False):
            print(said, end="", flush=True)
    return 0


def _show(arguments: argparse.Namespace, points: Sequence["grid.Point"], submits: list[str]) -> None:
    """What would be submitted; as JSON, beside the points."""
    from moejax.sweep import listing

    if arguments.json:
        print(json.dumps({"points": listing.rows(points), "submits": submits}))
    else:
        print("---\n".join(submits), end="")
