"""Points of a sweep one after another against side by side, each with cores of its own: tokens a second of the machine.

    python scripts/bench_jobs.py [--config=configs/sweeps/experts_mini.py] [--jobs=2] [--steps=60] [--only=e8_s0]

Trains `jobs` copies of a point in a temporary folder, once alone, once side by side, and side by side without cores of
their own. Prints the sum over the processes of the median speed of the second half of their steps, and the ratio to one
process alone.
"""

import argparse
import copy
import dataclasses
import pathlib
import statistics
import tempfile

from moejax import files
from moejax.cli import overrides
from moejax.sweep import folder, grid, runner


def speed(points: list[grid.Point], *, own_cores: bool) -> float:
    """Tokens a second of all these points at once."""
    with tempfile.TemporaryDirectory(prefix="moejax-jobs-") as name:
        workdir = pathlib.Path(name)
        folder.write(workdir, folder.describe(points, None))
        ran = runner.Runner(workdir, jobs=len(points), board=runner.Board(), attempts=1)
        if not own_cores:
            runner.core_shares = lambda jobs, environment: []
        ran.run([point.name for point in points])
        if ran.problems:
            raise SystemExit("; ".join(f"{name} {problem}" for name, problem in ran.problems.items()))
        total = 0.0
        for point in points:
            rows = files.read_rows(workdir / point.name / "metrics.jsonl")
            total += statistics.median(row["tokens_per_second"] for row in rows[len(rows) // 2 : -1])
        return total


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/sweeps/experts_mini.py")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default="e8_s0")
    arguments = parser.parse_args()
    found = {point.name: point for point in grid.points(overrides.read_sweep(arguments.config, []))}
    config = copy.deepcopy(found[arguments.only].config)
    config.training.num_steps, config.training.eval_batches = arguments.steps, 1
    config.training.eval_every = config.checkpoint.every = arguments.steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, arguments.steps)
    points = [
        dataclasses.replace(found[arguments.only], name=f"copy{copy_number}", config=config)
        for copy_number in range(arguments.jobs)
    ]
    alone = speed(points[:1], own_cores=True)
    print(f"one process on all cores                 {alone:8,.0f} tokens/s", flush=True)
    for label, own_cores in (("each with its own cores", True), ("all on all cores", False)):
        both = speed(points, own_cores=own_cores)
        print(f"{arguments.jobs} side by side, {label:<24} {both:8,.0f} tokens/s, {both / alone:.2f} times", flush=True)


if __name__ == "__main__":
    main()
