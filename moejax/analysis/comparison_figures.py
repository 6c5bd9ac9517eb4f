"""The figures of a sweep's comparison, drawn from its numbers."""

# N bins of steps, L levels of the loss

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker

from moejax.analysis import figures, sweep_results, words

Numbers = Mapping[str, Any]  # of `comparison.numbers`
_ABOVE = 0.25  # share of a run whose losses may lie above the scale: they would press the rest into a line
_CLOSE = 1.05  # ratio up to which two sizes or token budgets are one: a solved grid strays by a percent
_REFERENCE = {"color": "#555555", "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}


def losses(found: Numbers, styles: Mapping[str, figures.Style]) -> list[figures.Panel]:
    """The loss against steps, tokens, FLOPs and wall time, a line a group and a band over its seeds."""
    curves = {group: _arrays(curve) for group, curve in found["curves"].items() if curve["step"]}
    if not curves:
        return []
    limits = _limits(list(curves.values()))
    compute, compute_unit = words.flops_unit(max(curve["flops"].max() for curve in curves.values()))
    wall, wall_unit = _time_unit(max(curve["seconds"].max() for curve in curves.values()))
    return [
        _loss(curves, styles, column, limits, title=title, label=label, caption=caption, unit=unit)
        for column, title, label, unit, caption in (
            ("step", "Loss against steps", "step", 1.0, "At the same number of updates."),
            (
                "tokens",
                "Loss against tokens",
                "tokens",
                1.0,
                "At the same data, padding not counted: what speed-up is read from.",
            ),
            (
                "flops",
                "Loss against compute",
                f"useful compute ({compute_unit})",
                compute,
                "At the same useful FLOPs: the model's own products, without recomputation and empty slots.",
            ),
            (
                "seconds",
                "Loss against wall time",
                f"wall time ({wall_unit})",
                wall,
                "As measured, with compilation. Points that ran side by side slowed each other.",
            ),
        )
    ]


def _loss(
    curves: Mapping[str, Mapping[str, np.ndarray]],
    styles: Mapping[str, figures.Style],
    column: str,
    limits: tuple[float, float],
    *,
    title: str,
    label: str,
    caption: str,
    unit: float,
) -> figures.Panel:
    with matplotlib.rc_context(figures.STYLE):
        figure = mpl_figure.Figure(figsize=(figures.MEDIUM, 3.0))
        axes = figure.add_subplot()
        handles = {}
        for group, curve in curves.items():
            x_N, style = curve[column] / unit, styles[group]
            _band(axes, x_N, curve["loss"], curve["deviation"], style)
            handles[group] = axes.plot(
                x_N,
                curve["loss"],
                color=style.colour,
                linestyle=style.dashes,
                linewidth=1.3,
                marker="o" if len(x_N) == 1 else None,
            )[0]
        axes.set_ylim(*limits)
        axes.set_xlim(left=0)
        axes.set_ylabel("training loss (nats/token)")
        _number_axis(axes, label)
        figures.legend(figure, handles)
        return figures.Panel(title=title, caption=caption, svg=figures.svg(figure, f"loss-{column}"))


def speedup(found: Numbers, styles: Mapping[str, figures.Style], caption: str) -> figures.Panel | None:
    """Speed-up over the baseline against the level of the loss, which falls to the right."""
    levels = {group: _columns(entries) for group, entries in found["speedup"].items() if entries}
    if not levels:
        return None
    with matplotlib.rc_context(figures.STYLE):
        figure = mpl_figure.Figure(figsize=(figures.MEDIUM, 3.0))
        axes = figure.add_subplot()
        handles = {}
        for group, column in levels.items():
            style = styles[group]
            _band(axes, column["loss"], column["mean"], column["deviation"], style)
            handles[group] = axes.plot(
                column["loss"], column["mean"], color=style.colour, linestyle=style.dashes, linewidth=1.3
            )[0]
        handles[f"{found['baseline']} = 1"] = axes.axhline(1, **_REFERENCE)
        axes.invert_xaxis()
        axes.set_ylabel("speed-up in tokens (×)")
        _number_axis(axes, "training loss (nats/token), falling")
        figures.legend(figure, handles)
        svg = figures.svg(figure, "speedup")
    return figures.Panel(title=f"Speed-up over {found['baseline']}", caption=caption, svg=svg)


def final(found: Numbers, styles: Mapping[str, figures.Style], measure: str) -> list[figures.Panel]:
    """The final loss against the number of experts and against total parameters; each where it has two values."""
    groups = [group for group in found["groups"] if group["loss"]["mean"] is not None]
    sparse = [group for group in groups if group["axes"].get("experts")]
    dense = [group for group in groups if not group["axes"].get("experts")]
    seeds = "Bars: one standard deviation either side, over the seeds." if _has_deviation(groups) else ""
    panels = []
    if len({group["axes"]["experts"] for group in sparse}) > 1:
        svg = _final(
            "final-experts",
            series(sparse),
            {group["group"]: group["axes"]["experts"] for group in sparse},
            levels=dense,
            styles=styles,
            label="experts (logarithmic)",
            ylabel=f"{measure} (nats/token)",
        )
        caption = f"{seeds} Lines join settings that differ in the number of experts alone, at like active parameters."
        if dense:
            caption += " Level lines: settings without a MoE layer."
        panels.append(figures.Panel(title="Final loss against experts", caption=caption.strip(), svg=svg))
    if len({group["axes"].get("granularity", 1) for group in sparse}) > 1:
        svg = _final(
            "final-granularity",
            series(sparse, along="granularity"),
            {group["group"]: group["axes"].get("granularity", 1) for group in sparse},
            levels=dense,
            styles=styles,
            label="granularity (logarithmic)",
            ylabel=f"{measure} (nats/token)",
        )
        caption = f"{seeds} Lines join settings that differ in the granularity alone, at like active parameters."
        panels.append(figures.Panel(title="Final loss against granularity", caption=caption.strip(), svg=svg))
    if len({group["non_embedding_total"] for group in groups}) > 1:
        lines = series(sparse) | {group["group"]: [group] for group in dense}
        svg = _final(
            "final-total",
            lines,
            {group["group"]: group["non_embedding_total"] for group in groups},
            levels=[],
            styles=styles,
            label="total parameters (logarithmic)",
            ylabel=f"{measure} (nats/token)",
        )
        caption = f"{seeds} Parameters without embedding and head."
        panels.append(figures.Panel(title="Final loss against parameters", caption=caption.strip(), svg=svg))
    return panels


def _final(
    name: str,
    lines: Mapping[str, Sequence[Numbers]],
    x: Mapping[str, float],
    *,
    levels: Sequence[Numbers],
    styles: Mapping[str, figures.Style],
    label: str,
    ylabel: str,
) -> str:
    own = figures.style([title for title in lines if title not in styles], None)
    if len(own) == 1:  # a group's colour would be taken for that group
        own = dict.fromkeys(own, figures.Style(colour="#777777", dashes="-"))
    with matplotlib.rc_context(figures.STYLE):
        figure = mpl_figure.Figure(figsize=(figures.MEDIUM, 3.0))
        axes = figure.add_subplot()
        handles: dict[str, Any] = {}
        for group in levels:
            style, loss = styles[group["group"]], group["loss"]
            handles[group["group"]] = axes.axhline(
                loss["mean"], color=style.colour, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1.5
            )
            if loss["deviation"] is not None:
                axes.axhspan(
                    loss["mean"] - loss["deviation"],
                    loss["mean"] + loss["deviation"],
                    color=style.colour,
                    alpha=0.12,
                    lw=0,
                )
        for index, (title, members) in enumerate(lines.items()):
            members = sorted(members, key=lambda group: x[group["group"]])
            places = [x[group["group"]] for group in members]
            is_line = len(set(places)) == len(places) > 1
            style = styles.get(title) or own[title]
            handles[title] = axes.errorbar(
                places,
                [group["loss"]["mean"] for group in members],
                yerr=[group["loss"]["deviation"] or 0.0 for group in members],
                color=style.colour,
                linestyle=style.dashes if is_line else "none",
                marker=figures.MARKERS[index % len(figures.MARKERS)],
                markersize=5,
                linewidth=1.3,
                capsize=3,
            )
        axes.set_xscale("log")
        value_ticks(axes, sorted(set(x.values())))
        axes.set_xlabel(label)
        axes.set_ylabel(ylabel)
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(figures.short))
        figures.legend(figure, handles)
        return figures.svg(figure, name)


def by_setting(found: Numbers, styles: Mapping[str, figures.Style], measure: str) -> figures.Panel | None:
    """The final loss of every seed, a line a setting."""
    groups = [group for group in found["groups"] if group["loss"]["mean"] is not None]
    if not groups:
        return None
    seeds = {group["group"]: [] for group in groups}
    for point in found["points"]:
        if point["status"] == "done":
            seeds[point["group"]].append(point[found["measure"]])
    with matplotlib.rc_context(figures.STYLE):
        figure = mpl_figure.Figure(figsize=(figures.MEDIUM, 0.8 + 0.4 * len(groups)))
        axes = figure.add_subplot()
        for row, group in enumerate(groups):
            style, mean = styles[group["group"]], group["loss"]["mean"]
            axes.plot(
                seeds[group["group"]], [row] * len(seeds[group["group"]]), "o", color=style.colour, mfc="white", ms=5
            )
            axes.plot([mean, mean], [row - 0.2, row + 0.2], color=style.colour, linewidth=2.4)
            if group["group"] == found["baseline"]:
                axes.axvline(mean, **_REFERENCE)
            # above its line, from the left edge: beside the axis a long name would take the figure's width
            axes.text(
                0.0,
                row - 0.4,
                figures.plain(group["group"]),
                transform=axes.get_yaxis_transform(),
                size=8.5,
                va="center",
            )
        axes.set_ylim(len(groups) - 0.6, -0.8)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        _number_axis(axes, f"{measure} (nats/token)")
        svg = figures.svg(figure, "final-settings")
    caption = "Circles: seeds; bars: their mean. Lower, to the left, is better."
    if found["baseline"] in seeds:
        caption += f" Dashed: {found['baseline']}."
    return figures.Panel(title="Final loss by setting", caption=caption, svg=svg)


def series(groups: Sequence[Numbers], along: str = "experts") -> dict[str, list[Numbers]]:
    """Groups that differ along one of the axes alone, by what sets them apart from the other series.

    along: experts, or granularity, with which the numbers of experts and of a token's choices go.
    """
    parts = {
        "active": _clusters([group["non_embedding_active"] for group in groups], "{} active"),
        "tokens": _clusters([group["tokens"] for group in groups], "{} tokens"),
    }
    granularity = [group["axes"].get("granularity", 1) for group in groups]
    if along == "experts":
        parts["granularity"] = [f"granularity {value:g}" for value in granularity]
        parts["top_k"] = [f"top-{group['axes'].get('top_k', 1):g}" for group in groups]
    else:
        whole = [group["axes"]["experts"] / value for group, value in zip(groups, granularity, strict=True)]
        parts["experts"] = [f"{value:g} experts / granularity" for value in whole]
    fields = dict.fromkeys(name for group in groups for name in group["settings"])
    for name in fields:
        if name not in sweep_results.MEASURED_SETTINGS:
            word = name.rpartition(".")[2]
            parts[name] = [_setting(word, group["settings"].get(name)) for group in groups]
    varying = [labels for labels in parts.values() if len(set(labels)) > 1]
    found: dict[str, list[Numbers]] = {}
    for index, group in enumerate(groups):
        found.setdefault(", ".join(labels[index] for labels in varying) or "with experts", []).append(group)
    return found


# --- parts -----------------------------------------------------------------------------------------------------------


def _setting(word: str, value: Any) -> str:
    if value is None:
        return f"default {word}"
    return f"{word} {value:g}" if type(value) in (int, float) else words.setting(value)


def _clusters(values: Sequence[float], text: str) -> list[str]:
    """A label a value, the same for those that hardly differ."""
    first, labels = math.nan, {}
    last = math.nan
    for value in sorted(set(values)):
        if not value <= _CLOSE * last:
            first = value
        last = value
        labels[value] = text.format(figures.short(first))
    return [labels[value] for value in values]


def _limits(curves: Sequence[Mapping[str, np.ndarray]]) -> tuple[float, float]:
    """Holds everything after the first part of each run."""
    low, high = [], []
    for curve in curves:
        late_N = curve["step"] >= _ABOVE * curve["step"].max()
        loss_N = curve["loss"][late_N][np.isfinite(curve["loss"][late_N])]
        if loss_N.size:
            low.append(loss_N.min())
            high.append(loss_N.max())
    if not low:
        return 0.0, 1.0
    margin = 0.06 * (max(high) - min(low)) or 0.5
    return float(min(low) - margin), float(max(high) + margin)


def _band(
    axes: mpl_axes.Axes, x_N: np.ndarray, mean_N: np.ndarray, deviation_N: np.ndarray, style: figures.Style
) -> None:
    if np.isfinite(deviation_N).any():
        axes.fill_between(x_N, mean_N - deviation_N, mean_N + deviation_N, color=style.colour, alpha=0.2, linewidth=0)


def _number_axis(axes: mpl_axes.Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(figures.short))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(figures.short))


def value_ticks(axes: mpl_axes.Axes, values: Sequence[float]) -> None:
    """Ticks at the values themselves, as many as stand apart."""
    span = math.log(values[-1] / values[0]) or 1.0
    shown: list[float] = []
    labels: list[str] = []
    for value in values:
        label = figures.short(float(f"{value:.3g}"))
        width = 0.035 + 0.018 * len(label)  # of the axis
        if not shown or math.log(value / shown[-1]) > width * span:
            shown.append(value)
            labels.append(label)
    axes.set_xticks(shown, labels)
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def _time_unit(seconds: float) -> tuple[float, str]:
    return next(
        (size, name) for size, name in ((3600.0, "h"), (60.0, "min"), (1.0, "s")) if seconds >= 2 * size or size == 1
    )


def _arrays(columns: Mapping[str, Sequence[float | None]]) -> dict[str, np.ndarray]:
    return {name: np.array(values, float) for name, values in columns.items()}


def _columns(entries: Sequence[Numbers]) -> dict[str, np.ndarray]:
    return {name: np.array([entry[name] for entry in entries], float) for name in entries[0]}


def _has_deviation(groups: Sequence[Numbers]) -> bool:
    return any(group["loss"]["deviation"] is not None for group in groups)
