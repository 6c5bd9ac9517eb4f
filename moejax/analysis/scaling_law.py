"""How the loss of a sweep's points follows from active parameters, experts, granularity and tokens, and how surely.

Points that differ in the seed alone are averaged first: they repeat one setting, share the error of the form there,
and tell nothing about the others. The fit is that of `robust_fit` to the log of the loss, the form that of
`scaling_forms`.
"""

# B parameter vectors side by side, X settings, P parameters, Q quantities

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moejax import config
from moejax.analysis import figures, robust_fit, scaling_forms, sweep_results

_BEYOND = (2, 4)  # times the largest value of an axis: how far the law is extrapolated


@dataclasses.dataclass(kw_only=True, slots=True)
class Interval:
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(kw_only=True, slots=True)
class Setting:
    """A cell of the grid that was fitted. Losses in nats a token."""

    group: str
    seeds: int
    observed: float  # geometric mean over the seeds
    fitted: float


@dataclasses.dataclass(kw_only=True, slots=True)
class Extrapolation:
    """What the law says where no point is: an axis beyond its largest value, the others at theirs."""

    axis: str
    factor: int  # times the largest value
    value: float
    loss: Interval  # of the mean over seeds


@dataclasses.dataclass(kw_only=True, slots=True)
class Fit:
    """A fitted law."""

    formula: str
    source: str  # of the form
    measure: sweep_results.Measure  # which loss
    coefficients: dict[str, Interval]
    meanings: dict[str, str]
    doublings: dict[str, Interval]  # axis -> relative change of the loss when it doubles, at the middle of the grid
    settings: list[Setting]
    extrapolations: list[Extrapolation]
    residual_deviation: float  # of ln(loss), over the settings less the coefficients
    seed_deviation: float | None  # of ln(loss) of one point about its setting; None with one seed a setting
    notes: list[str]  # what the law leaves out


def fit(results: sweep_results.Results, *, num_resamples: int = robust_fit.NUM_RESAMPLES, seed: int = 0) -> Fit:
    """The law of a sweep's finished points; the same points give the same law.

    Points without a MoE layer are another architecture and left out.

    Raises:
      ConfigError: the finished points cannot identify it; the line names the axis that is missing.
    """
    done = [row for row in results.points if row.status == "done"]
    sparse = [row for row in done if row.axes.get("experts", 0) > 0]
    if not sparse:
        raise config.ConfigError(
            f"points={len(done)} have finished and none of them has a MoE layer; add points with experts"
            if done
            else f"points=0 of {len(results.points)} have finished; run the sweep on"
        )
    measure = sweep_results.measure(sparse)
    groups: dict[str, list[sweep_results.Row]] = {}
    for row in sparse:
        groups.setdefault(row.group, []).append(row)
    cells = [_cell(rows[0]) for rows in groups.values()]
    form = scaling_forms.choose(cells)
    logs = [[math.log(_loss(row, measure)) for row in rows] for rows in groups.values()]
    observed_X = np.array([statistics.fmean(log) for log in logs])
    curve = robust_fit.Curve(at=lambda theta_BP: form.at(cells, theta_BP), starts=form.starts(cells, observed_X))
    try:
        estimate = robust_fit.fit(curve, observed_X, num_resamples=num_resamples, seed=seed)
    except robust_fit.UndeterminedError as error:
        idle = " and ".join(list(form.meanings)[index] for index in error.indices)
        raise config.ConfigError(
            f"points={len(cells)} settings leave {idle} of {form.formula} undetermined: the loss hardly depends on "
            "them, or rises where the form falls; add points further apart"
        ) from error
    fitted_X = observed_X - estimate.residual_X
    return Fit(
        formula=form.formula,
        source=form.source,
        measure=measure,
        coefficients=dict(zip(form.meanings, _intervals(estimate, form.coefficients), strict=True)),
        meanings=form.meanings,
        doublings=_doublings(form, cells, estimate),
        settings=[
            Setting(group=group, seeds=len(rows), observed=math.exp(observed), fitted=math.exp(fitted))
            for (group, rows), observed, fitted in zip(groups.items(), observed_X, fitted_X, strict=True)
        ],
        extrapolations=_extrapolations(form, cells, estimate),
        residual_deviation=math.sqrt(
            float(estimate.residual_X @ estimate.residual_X) / (len(cells) - len(form.meanings))
        ),
        seed_deviation=_within(logs),
        notes=_notes(results, sparse, form),
    )


def _cell(row: sweep_results.Row) -> scaling_forms.Cell:
    granularity = row.axes.get("granularity", 1.0)
    return scaling_forms.Cell(
        expansion=row.axes["experts"] / granularity,
        granularity=granularity,
        active=row.non_embedding_active,
        tokens=row.tokens,
    )


def _loss(row: sweep_results.Row, measure: sweep_results.Measure) -> float:
    loss = getattr(row, measure)
    if loss is None or loss <= 0:
        raise config.ConfigError(f"{row.name} has finished with {measure}={loss}, which has no logarithm; run it again")
    return loss


def _within(logs: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation about the means of the groups."""
    spare = sum(len(log) - 1 for log in logs)
    squares = sum((value - statistics.fmean(log)) ** 2 for log in logs for value in log)
    return math.sqrt(squares / spare) if spare else None


def _notes(results: sweep_results.Results, sparse: Sequence[sweep_results.Row], form: scaling_forms.Form) -> list[str]:
    notes = list(form.absent)
    dense = sum(row.status == "done" and not row.axes.get("experts") for row in results.points)
    if dense:
        notes.append(f"{dense} finished points without a MoE layer are another architecture and not in the fit")
    unfinished = len(results.points) - len(sparse) - dense
    if unfinished:
        notes.append(f"{unfinished} of {len(results.points)} points have not finished and are not in the fit")
    top_k = sorted({row.axes.get("top_k", 1) for row in sparse})
    if len(top_k) > 1 and "granularity" not in form.axes:
        notes.append(f"top_k, which varies ({', '.join(f'{k:g}' for k in top_k)}), but for its part in N")
    fields = dict.fromkeys(field for row in sparse for field in row.settings)
    for field in fields:
        values = list(dict.fromkeys(str(row.settings.get(field, "the base's")) for row in sparse))
        if len(values) > 1 and field not in sweep_results.MEASURED_SETTINGS:
            notes.append(
                f"{field}, which varies ({', '.join(values)}): what it does is taken for the work of what is in the "
                "law; fit points that agree in it"
            )
    return notes


def _name(axis: str, law: Fit) -> str:
    """What the tables call an axis."""
    whole = axis == "expansion" and "granularity" in law.doublings
    return "experts / granularity" if whole else scaling_forms.NAMES[axis]


# --- quantities with their intervals ---------------------------------------------------------------------------------


def _intervals(estimate: robust_fit.Estimate, of: Callable[[np.ndarray], np.ndarray]) -> list[Interval]:
    found_3Q = estimate.interval(of)
    return [Interval(value=value, low=low, high=high) for value, low, high in found_3Q.T.tolist()]


def _doublings(
    form: scaling_forms.Form, cells: Sequence[scaling_forms.Cell], estimate: robust_fit.Estimate
) -> dict[str, Interval]:
    middle = scaling_forms.Cell(*np.exp(np.log(np.array(cells, float)).mean(axis=0)).tolist())
    doubled = [middle._replace(**{axis: 2 * getattr(middle, axis)}) for axis in form.axes]

    def change(theta_BP: np.ndarray) -> np.ndarray:
        log_BX = form.at([middle, *doubled], theta_BP)[0]
        return np.expm1(log_BX[:, 1:] - log_BX[:, :1])

    return dict(zip(form.axes, _intervals(estimate, change), strict=True))


def _extrapolations(
    form: scaling_forms.Form, cells: Sequence[scaling_forms.Cell], estimate: robust_fit.Estimate
) -> list[Extrapolation]:
    largest = scaling_forms.Cell(*np.max(np.array(cells, float), axis=0).tolist())
    places = [(axis, factor, factor * getattr(largest, axis)) for axis in form.axes for factor in _BEYOND]
    beyond = [largest._replace(**{axis: value}) for axis, _, value in places]
    losses = _intervals(estimate, lambda theta_BP: np.exp(form.at(beyond, theta_BP)[0]))
    return [
        Extrapolation(axis=axis, factor=factor, value=value, loss=loss)
        for (axis, factor, value), loss in zip(places, losses, strict=True)
    ]


# --- the law as text and JSON ----------------------------------------------------------------------------------------


def table(law: Fit) -> str:
    """The law as aligned lines of text."""
    percent = f"{robust_fit.LEVEL:.0%} interval"
    points = sum(setting.seeds for setting in law.settings)
    lines = [
        law.formula,
        f"{law.source}; of the {sweep_results.MEASURES[law.measure]} in nats/token",
        "N active parameters without embedding and head, E experts / granularity, G granularity, D tokens",
        f"{points} points in {len(law.settings)} settings; intervals from a bootstrap over the settings",
        "",
        f"{'coefficient':<12}{'estimate':>12}   {percent:<26}",
    ]
    for name, one in law.coefficients.items():
        lines.append(f"{name:<12}{one.value:>12.5g}   {_range(one, '.5g'):<26}{law.meanings[name]}")
    lines += ["", f"{'doubling':<22}{'loss':>8}   {percent} (at the middle of the grid)"]
    for axis, one in law.doublings.items():
        lines.append(f"{_name(axis, law):<22}{one.value:>+8.2%}   {_range(one, '+.2%')}")
    width = max(len("setting"), *(len(setting.group) for setting in law.settings))
    lines += ["", f"{'setting':<{width}}{'seeds':>7}{'loss':>9}{'fitted':>9}{'residual':>10}"]
    for setting in law.settings:
        residual = math.log(setting.observed / setting.fitted)
        lines.append(
            f"{setting.group:<{width}}{setting.seeds:>7}{setting.observed:>9.4f}{setting.fitted:>9.4f}{residual:>+10.2%}"
        )
    deviation = f"residuals' standard deviation {law.residual_deviation:.2%}"
    if law.seed_deviation is not None:
        deviation += f"; of a point about its setting's mean {law.seed_deviation:.2%}"
    places = [
        f"{_name(one.axis, law)} {figures.short(one.value)} ({one.factor}x the largest)" for one in law.extrapolations
    ]
    width = max(map(len, places))
    lines += [deviation, "", f"{'EXTRAPOLATED':<{width}}{'loss':>9}   {percent}; no point is there to check it"]
    for place, one in zip(places, law.extrapolations, strict=True):
        lines.append(f"{place:<{width}}{one.loss.value:>9.4f}   {_range(one.loss, '.4f')}")
    return "\n".join(lines + [""] * bool(law.notes) + [f"not in the law: {note}" for note in law.notes])


def to_json(law: Fit) -> dict[str, Any]:
    """Everything of the law; an extrapolation is marked as one."""
    content = dataclasses.asdict(law)
    content["level"] = robust_fit.LEVEL
    content["extrapolations"] = [entry | {"extrapolated": True} for entry in content["extrapolations"]]
    return content


def _range(interval: Interval, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"
