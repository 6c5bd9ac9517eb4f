"""The comparison of a sweep's points: losses, what they cost, and speed-up over the baseline, with their spread.

`write` reads sweep.json and the metrics of the points' runs, so the page can be made while the sweep goes on.
"""

# S steps, N bins of steps, R repetitions (seeds), L levels of the loss

import csv
import dataclasses
import io
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from moejax import config, files
from moejax.analysis import comparison_page, figures, routing_report, run_files, sweep_results

# share of a run that the average of its curve looks back on: MoE-Mamba's alpha 0.001 in 15,000 steps
LOOK_BACK = 1 / 15
FIRST = 0.1  # share of the baseline's tokens from which on the curve of the speed-up begins: warmup decides it before
_LEVELS = 100
_MEASURED = ("tokens_per_second", "seconds", "dropped", "imbalance", "entropy", "churn")  # of Row
_PLANNED = ("total", "active", "non_embedding_total", "non_embedding_active", "steps", "tokens", "flops")


@dataclasses.dataclass(kw_only=True, slots=True)
class Curve:
    """A point's training, an entry a step, or a group's, an entry a bin of steps."""

    step: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray  # useful ones
    seconds: np.ndarray  # wall time of the steps
    loss: np.ndarray  # moving average, nats a token


def write(folder: pathlib.Path, output: pathlib.Path, *, baseline: str | None = None) -> pathlib.Path:
    """Writes the sweep's page, and its numbers beside it; each file appears whole or not at all.

    The JSON is `numbers(folder)`. CSVs have the same: NAME.csv a row a group, NAME_points.csv a row a point,
    NAME_curves.csv a row a group and bin of steps, NAME_speedup.csv a row a group and level of the loss,
    NAME_routing.csv a row a group, statistic and bin of steps.

    baseline: the setting that others are compared with, in the place of the sweep's own.

    Returns:
        The path of the page.

    Raises:
        config.ConfigError: the folder does not hold a sweep, a file of it is damaged, or it has no such baseline.
    """
    results = sweep_results.read(folder)
    if baseline is not None:
        settings = list(dict.fromkeys(row.group for row in results.points))
        if baseline not in settings:
            raise config.ConfigError(
                f"--baseline={baseline} is no setting of this sweep; choose one of {', '.join(settings)}"
            )
        results.baseline = baseline
    found = _numbers(folder, results)
    tables = {
        ".csv": [_flat(group) for group in found["groups"]],
        "_points.csv": [_flat(point) for point in found["points"]],
        "_curves.csv": [
            {"group": group, **dict(zip(curve, values, strict=True))}
            for group, curve in found["curves"].items()
            for values in zip(*curve.values(), strict=True)
        ],
        "_speedup.csv": [{"group": group, **level} for group, levels in found["speedup"].items() for level in levels],
        "_routing.csv": [
            {"group": group, "seed": entry["seed"], "statistic": name, "step": step, "value": value}
            for group, entry in found["routing"].items()
            for name, curve in entry["curves"].items()
            for step, value in zip(curve["step"], curve["value"], strict=True)
        ],
    }
    texts = {ending: _csv(rows) for ending, rows in tables.items()}
    texts[".json"] = json.dumps(found, indent=2, allow_nan=False) + "\n"
    texts[output.suffix] = comparison_page.page(folder, results, found)
    for ending, text in texts.items():
        files.write(output.with_name(output.stem + ending), text)
    return output


def numbers(folder: pathlib.Path) -> dict[str, Any]:
    """The numbers of a sweep's comparison, ready for JSON; losses in nats a token, None stands for what there is not.

    baseline: its group. measure: which loss of sweep.json the groups are compared by, of `sweep_results.MEASURES`.
    alpha: weight of a new loss in the average of the curves. points: as in sweep.json. groups: a dict a group, see
    `_group`. curves: group -> {"step", "tokens", "flops", "seconds", "loss", "deviation"}, lists over bins of steps of
    means over its seeds; of its finished points, or of those that run if none has finished. speedup: group ->
    [{"loss", "mean", "deviation"}], see `speedup`. routing: group with two experts or more -> {"seed", "curves":
    statistic -> {"step", "value"}}, of one point, means over layers.
    """
    return _numbers(folder, sweep_results.read(folder))


def _numbers(folder: pathlib.Path, results: sweep_results.Results) -> dict[str, Any]:
    groups: dict[str, list[sweep_results.Row]] = {}
    for row in results.points:
        groups.setdefault(row.group, []).append(row)
    done = [row for row in results.points if row.status == "done"]
    measure = sweep_results.measure(done)
    shortest = min((row.steps for row in results.points), default=1)
    alpha = min(1.0, max(sweep_results.EMA_ALPHA, 1 / (LOOK_BACK * shortest)))
    curves = {group: _curves(folder, rows, alpha) for group, rows in groups.items()}
    finished = {group: {row.seed: row for row in rows if row.status == "done"} for group, rows in groups.items()}
    baseline = results.baseline if results.baseline in groups else None
    pairs = {
        group: [
            (curves[baseline][seed], curves[group][seed])
            for seed in rows
            if seed in finished[baseline] and {seed} <= curves[baseline].keys() & curves[group].keys()
        ]
        for group, rows in finished.items()
        if baseline is not None and group != baseline
    }
    return {
        "baseline": baseline,
        "measure": measure,
        "alpha": alpha,
        "points": sweep_results.to_json(results)["points"],
        "groups": [
            _group(
                rows,
                list(finished[group].values()),
                measure,
                [] if baseline is None or baseline == group else list(finished[baseline].values()),
                [ratio for base, point in pairs.get(group, []) if math.isfinite(ratio := _end(base, point))],
            )
            for group, rows in groups.items()
        ],
        "curves": {group: _mean_curve(list(found.values())) for group, found in curves.items() if found},
        "speedup": _speedups({group: found for group, found in pairs.items() if found}),
        "routing": _routing(folder, results),
    }


def _routing(folder: pathlib.Path, results: sweep_results.Results) -> dict[str, Any]:
    found = {}
    for group, row in comparison_page.routed(results).items():
        curves = routing_report.curves(run_files.rows(folder / row.name))
        if curves is not None:
            statistics_of = {
                name: {"step": _finite(step_N), "value": _finite(value_N)}
                for name, (step_N, value_N) in curves.statistics.items()
            }
            found[group] = {"seed": row.seed, "curves": statistics_of}
    return found


def _finite(value_N: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in value_N.tolist()]


def _curves(folder: pathlib.Path, rows: Sequence[sweep_results.Row], alpha: float) -> dict[int, Curve]:
    """seed -> curve, of the finished points of a group; of those that run if none has finished."""
    finished = [row for row in rows if row.status == "done"]
    found = {}
    for row in finished or [row for row in rows if row.status == "running"]:
        metrics = run_files.rows(folder / row.name)
        if metrics:
            step = run_files.column(metrics, "step")
            found[row.seed] = Curve(
                step=step,
                tokens=run_files.column(metrics, "tokens"),
                flops=row.flops * step / row.steps,
                seconds=np.nancumsum(run_files.column(metrics, "seconds")),
                loss=sweep_results.ema(run_files.column(metrics, "loss"), alpha),
            )
    return found


def _group(
    rows: Sequence[sweep_results.Row],
    finished: Sequence[sweep_results.Row],
    measure: sweep_results.Measure,
    baseline: Sequence[sweep_results.Row],
    speedups: Sequence[float],
) -> dict[str, Any]:
    """What the tables say about a group; {"mean", "deviation"} are over the seeds of its finished points.

    loss: of `measure`. difference: see `paired`. speedup: at the lowest loss that both reach.
    """

    def over_seeds(name: str) -> dict[str, float | None]:
        return spread([value for row in finished if (value := getattr(row, name)) is not None])

    return {
        "group": rows[0].group,
        "axes": rows[0].axes,
        "settings": rows[0].settings,
        **{name: getattr(rows[0], name) for name in _PLANNED},
        "points": len(rows),
        "seeds": [row.seed for row in finished],
        "loss": over_seeds(measure),
        "validation_loss": over_seeds("validation_loss"),
        "ema_loss": over_seeds("ema_loss"),
        "last_loss": over_seeds("loss"),
        "difference": paired(
            {row.seed: getattr(row, measure) for row in finished}, {row.seed: getattr(row, measure) for row in baseline}
        ),
        "speedup": spread(speedups),
        **{name: over_seeds(name)["mean"] for name in _MEASURED},
    }


# --- statistics ------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """{"mean", "deviation"}: the standard deviation of a sample, over n - 1. None where there are too few values."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def paired(point: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> dict[str, Any]:
    """The difference point - baseline over the seeds that both have, with Student's paired test.

    Args:
        point: seed -> loss.
        baseline: the same; its run of a seed saw the same data in the same order.

    Returns:
        pairs: their number. mean: None without a pair. low, high: the 95% interval; p: two-sided. These three are None
        as well for one pair, or where all pairs differ by the same.
    """
    pairs = [
        (loss, base) for seed, loss in point.items() if loss is not None and (base := baseline.get(seed)) is not None
    ]
    found: dict[str, Any] = {"pairs": len(pairs), "mean": None, "low": None, "high": None, "p": None}
    if not pairs:
        return found
    losses, bases = np.array(pairs).T
    found["mean"] = float((losses - bases).mean())
    if np.ptp(losses - bases) > 1e-12:
        test = stats.ttest_rel(losses, bases)
        interval = test.confidence_interval(0.95)
        found |= {"low": float(interval.low), "high": float(interval.high), "p": float(test.pvalue)}
    return found


def tokens_to_reach(curve: Curve, level_L: np.ndarray) -> np.ndarray:
    """Tokens after which the loss first was at or below each level, on a line between steps; NaN where it never was.

    NaN as well for a level above the first step's loss: when it was reached was not seen.
    """
    level_L = np.asarray(level_L, float)
    seen_S = np.isfinite(curve.loss)
    loss_S, tokens_S = curve.loss[seen_S], curve.tokens[seen_S]
    after_L = np.searchsorted(-np.minimum.accumulate(loss_S), -level_L)
    reached_L = (after_L > 0) & (after_L < len(loss_S))
    after_L = after_L[reached_L]
    fallen_L = (loss_S[after_L - 1] - level_L[reached_L]) / (loss_S[after_L - 1] - loss_S[after_L])
    found_L = np.full(len(level_L), np.nan)
    found_L[reached_L] = tokens_S[after_L - 1] + fallen_L * (tokens_S[after_L] - tokens_S[after_L - 1])
    return found_L


def speedup(baseline: Curve, point: Curve, level_L: np.ndarray) -> np.ndarray:
    """Tokens that the baseline took to reach each level of the loss over those that the point took (MoE-Mamba, app. D).

    NaN where one of them did not reach it.
    """
    return tokens_to_reach(baseline, level_L) / tokens_to_reach(point, level_L)


def _end(baseline: Curve, point: Curve) -> float:
    """The speed-up at the lowest loss that both reached; NaN where one of them never fell."""
    if not (np.isfinite(baseline.loss).any() and np.isfinite(point.loss).any()):
        return math.nan
    level = max(np.nanmin(baseline.loss), np.nanmin(point.loss))
    return float(speedup(baseline, point, np.array([level]))[0])


def _speedups(pairs: Mapping[str, Sequence[tuple[Curve, Curve]]]) -> dict[str, list[dict[str, float | None]]]:
    """The speed-up over levels of the loss that every pair of the group reached, from high to low."""
    baselines = [base for found in pairs.values() for base, _ in found]
    if not baselines:
        return {}
    highest = statistics.fmean(float(np.interp(FIRST * base.tokens[-1], base.tokens, base.loss)) for base in baselines)
    lowest = min(float(np.nanmin(base.loss)) for base in baselines)
    level_L = np.linspace(highest, lowest, _LEVELS)
    result = {}
    for group, found in pairs.items():
        ratio_RL = np.stack([speedup(base, point, level_L) for base, point in found])
        reached_L = np.isfinite(ratio_RL).all(axis=0)
        result[group] = [
            {"loss": float(level), **spread(ratio_R.tolist())}
            for level, ratio_R in zip(level_L[reached_L], ratio_RL.T[reached_L], strict=True)
        ]
    return result


def _mean_curve(curves: Sequence[Curve]) -> dict[str, list[float | None]]:
    """Mean over the seeds at the steps that all have, then over bins of steps; deviation is that of the loss."""
    shared_S = curves[0].step
    for curve in curves[1:]:
        shared_S = np.intersect1d(shared_S, curve.step)
    places = [np.searchsorted(curve.step, shared_S) for curve in curves]
    columns = {
        name: np.stack([getattr(curve, name)[place_S] for curve, place_S in zip(curves, places, strict=True)])
        for name in ("step", "tokens", "flops", "seconds", "loss")
    }
    means = {name: value_RS.mean(axis=0) for name, value_RS in columns.items()}
    means["deviation"] = columns["loss"].std(axis=0, ddof=1) if len(curves) > 1 else np.full(len(shared_S), np.nan)
    if not len(shared_S):
        return {name: [] for name in means}
    return {name: _finite(figures.bin_means(shared_S, mean_S)[1]) for name, mean_S in means.items()}


# --- CSV -------------------------------------------------------------------------------------------------------------


def _flat(group: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Without dicts within: {"loss": {"mean": 3.7}} is {"loss_mean": 3.7}."""
    flat = {}
    for name, value in group.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{path}{name}_")
        elif isinstance(value, list):
            flat[path + name] = " ".join(map(str, value))
        else:
            flat[path + name] = value
    return flat


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows with the columns of all of them; what a row lacks, or None, is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
