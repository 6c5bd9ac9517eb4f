"""The figures of the report: arrays in, panels of inline SVG and words out.

matplotlib draws, through `matplotlib.figure.Figure` and not pyplot, so that no global state is left behind. Every
figure is narrow and its text stays text, so that a page may scale it from a phone to a sheet of paper.
"""

# S steps, N bins of steps

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import colors, ticker
from matplotlib import figure as mpl_figure
from matplotlib import lines as mpl_lines

# Okabe & Ito's colours, distinct to colour-blind readers; without yellow, which is faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MAX_BINS = 200  # of a heat map or an averaged curve: about what the width of a page can show
_DASHES = ("-", "--", ":", "-.")
MARKERS = ("D", "o", "s", "^")
_MOST_RAW = 4  # runs whose every training step is drawn; those of more hide each other
WIDE, MEDIUM, NARROW = 5.2, 4.4, 3.7  # inches; a phone shows them at about their size, a wide page scales them up
_LONGEST_LABEL = 40  # characters of a run's name that fit the narrow width
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text, not outlines: it can be selected and searched, and is a third of the bytes
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
}


@dataclasses.dataclass(kw_only=True, slots=True)
class Panel:
    """A figure of the page with its words."""

    title: str
    caption: str  # how to read it
    svg: str  # an <svg> element
    wide: bool = False  # across the page, not in a column


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Style:
    """How the line of a run is drawn in every figure of a page."""

    colour: str
    dashes: str


@dataclasses.dataclass(kw_only=True, slots=True)
class LossCurves:
    """One run's losses in nats a token, an entry a step; NaN where a value is missing or not finite."""

    name: str
    steps_S: np.ndarray
    loss_S: np.ndarray
    ema_S: np.ndarray
    validation_S: np.ndarray


def bin_means(steps_S: np.ndarray, values_S: np.ndarray, max_bins: int = MAX_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `max_bins` bins of equal width in steps.

    Bin n holds the steps s with floor((s - s_first) * N / (s_last - s_first + 1)) = n. `values_S` may have more dims
    behind the first. Values that are not finite do not count; a bin without any is NaN.

    Returns:
        The middle of each bin in steps, and the means.
    """
    span = int(steps_S[-1] - steps_S[0]) + 1
    num_bins = min(max_bins, span)
    bin_S = (steps_S - steps_S[0]).astype(int) * num_bins // span
    finite_S = np.isfinite(values_S)
    total_N, count_N = np.zeros((2, num_bins, *values_S.shape[1:]))
    np.add.at(total_N, bin_S, np.where(finite_S, values_S, 0.0))
    np.add.at(count_N, bin_S, finite_S)
    mean_N = np.divide(total_N, count_N, out=np.full_like(total_N, np.nan), where=count_N > 0)
    return steps_S[0] - 0.5 + (np.arange(num_bins) + 0.5) * span / num_bins, mean_N


def short(value: float, _: object = None) -> str:
    """2,440,185 is 2.44M, 12345.6 is 12,346, 0.00050 is 0.0005. matplotlib passes a tick's position as well."""
    for size, suffix in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"


# --- the loss --------------------------------------------------------------------------------------------------------


def loss(name: str, curves: Sequence[LossCurves], baselines: Mapping[str, float]) -> Panel:
    """Training loss (raw faint, moving average bold) and validation loss (markers), with the baselines as lines.

    Args:
        name: unique in the page; prefixes the SVG's ids.
        curves: one a run.
        baselines: label -> nats a token, the same for every run.
    """
    limits = _loss_limits(curves, baselines)
    caption = "Faint: each training step; bold: the moving average; diamonds: the held-out split. Lower is better."
    if len(curves) > _MOST_RAW:
        caption = "Lines: the moving average of the training loss; markers: the held-out split. Lower is better."
    if baselines:
        caption += (
            " Dashed: predictors that only count, on the held-out split; a model below bigram uses longer context."
        )
    off = [f"{label} ({level:.2f})" for label, level in baselines.items() if not limits[0] <= level <= limits[1]]
    if off:
        caption += f" Off the scale: {' and '.join(off)}."
    peak = max(run.loss_S.max(initial=-np.inf, where=np.isfinite(run.loss_S)) for run in curves)
    if peak > limits[1]:
        caption += f" Some steps lie above the scale, up to {peak:.2f}."
    return Panel(title="Loss", caption=caption, svg=_draw_loss(name, curves, baselines, limits), wide=True)


def _loss_limits(curves: Sequence[LossCurves], baselines: Mapping[str, float]) -> tuple[float, float]:
    # Holds every validation loss, all but the highest 5% of the training losses and every baseline but uniform: the
    # first steps and the uniform baseline would press the rest of the run into a line.
    levels = [level for label, level in baselines.items() if label != "uniform"]
    for run in curves:
        for values_S, highest in ((run.loss_S, 95), (run.ema_S, 95), (run.validation_S, 100)):
            finite_S = values_S[np.isfinite(values_S)]
            if finite_S.size:
                levels += [finite_S.min(), np.percentile(finite_S, highest)]
    if not levels:
        return 0.0, 1.0
    margin = 0.05 * (max(levels) - min(levels)) or 0.5
    return float(min(levels) - margin), float(max(levels) + margin)


def _draw_loss(
    name: str, curves: Sequence[LossCurves], baselines: Mapping[str, float], limits: tuple[float, float]
) -> str:
    with matplotlib.rc_context(STYLE):
        figure = mpl_figure.Figure(figsize=(WIDE, 3.4))
        axes = figure.add_subplot()
        handles: dict[str, mpl_lines.Line2D] = {}
        for index, run in enumerate(curves):
            colour, dashes = _colour(index), _dashes(index)
            marker = "o" if np.isfinite(run.loss_S).sum() == 1 else None  # a line through one point is invisible
            # A tint, not opacity: browsers draw thin transparent lines opaque where they cross themselves.
            tint = tuple(0.35 * part + 0.65 for part in colors.to_rgb(colour))
            shown_S = run.loss_S if len(curves) <= _MOST_RAW else np.full_like(run.loss_S, np.nan)
            raw = axes.plot(run.steps_S, shown_S, color=tint, linewidth=0.7, marker=marker, zorder=1.5)[0]
            ema = axes.plot(run.steps_S, run.ema_S, color=colour, linestyle=dashes, linewidth=2, zorder=2.5)[0]
            seen_S = np.isfinite(run.validation_S)
            size = min(5.5, max(2.0, 160 / max(1, seen_S.sum())))  # many markers shrink, not to hide the average
            validation = axes.plot(
                run.steps_S[seen_S],
                run.validation_S[seen_S],
                linestyle="none",
                marker=MARKERS[index // len(PALETTE) % len(MARKERS)],
                markersize=size,
                color=PALETTE[1] if len(curves) == 1 else colour,
                markeredgecolor="white" if len(curves) == 1 else "black",
                markeredgewidth=size / 8,
                zorder=3,
            )[0]
            if len(curves) > 1:
                handles[run.name] = ema
            else:
                handles = {"training step": raw, "moving average": ema}
                handles |= {"validation": validation} if seen_S.any() else {}
        legend(figure, handles)
        shown = sorted((level, label) for label, level in baselines.items() if limits[0] <= level <= limits[1])
        lowest = -np.inf
        for level, label in shown:
            axes.axhline(level, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            lowest = max(level, lowest + 0.06 * (limits[1] - limits[0]))  # a line of text above the last label
            axes.text(1.01, lowest, f"{label} {level:.2f}", transform=axes.get_yaxis_transform(), va="center", size=8.5)
        axes.set_ylim(*limits)
        axes.set_ylabel("loss (nats/token)")
        step_axis(axes)
        return svg(figure, name)


# --- curves ----------------------------------------------------------------------------------------------------------


def lines(
    name: str,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str,
    caption: str,
    ylabel: str,
    from_zero: bool = False,
    wide_range: bool = False,
    ordered: bool = False,
    wide: bool = False,
    level: tuple[str, float] | None = None,
    styles: Mapping[str, Style] | None = None,
) -> Panel:
    """Curves label -> (steps, values) in one small figure; the legend is left out where there is one curve.

    Args:
        name: unique in the page; prefixes the SVG's ids.
        curves: drawn in this order.
        title: of the panel.
        caption: of the panel.
        ylabel: quantity and unit.
        from_zero: the axis starts at zero.
        wide_range: the axis is logarithmic if the values are positive and span more than a factor of 20.
        ordered: more curves than colours are shaded from first to last, as layers are; else dashes tell them apart.
        wide: across the page.
        level: (label, value) of a horizontal line to compare with.
        styles: of labels; None means by their order.
    """
    with matplotlib.rc_context(STYLE):
        figure = mpl_figure.Figure(figsize=(WIDE, 2.8) if wide else (NARROW, 2.5))
        axes = figure.add_subplot()
        handles: dict[str, mpl_lines.Line2D] = {}
        for index, (label, (steps_S, values_S)) in enumerate(curves.items()):
            marker = "o" if np.isfinite(values_S).sum() == 1 else None
            handles[label] = axes.plot(
                steps_S,
                values_S,
                color=styles[label].colour if styles else _shade(index, len(curves)) if ordered else _colour(index),
                linestyle=styles[label].dashes if styles else _dashes(index),
                linewidth=1.1,
                marker=marker,
            )[0]
        if level is not None:
            handles[level[0]] = axes.axhline(level[1], color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        if len(handles) > 1:
            legend(figure, handles)
        drawn = np.concatenate([values_S for _, values_S in curves.values()])
        drawn = drawn[np.isfinite(drawn)]
        if wide_range and drawn.size and drawn.min() > 0 and drawn.max() > 20 * drawn.min():
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        elif from_zero:
            some = drawn.size and drawn.max() > 0
            axes.set_ylim(*((0, 1.08 * drawn.max()) if some else (-0.02, 1)))  # zeros stay clear of the axis
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(short))
        axes.set_ylabel(ylabel)
        step_axis(axes)
        return Panel(title=title, caption=caption, svg=svg(figure, name), wide=wide)


def style(labels: Sequence[str], reference: str | None) -> dict[str, Style]:
    """A style a label, in their order; that of the reference is black, and no other's is."""
    others = [label for label in labels if label != reference]
    chosen = {
        label: Style(
            colour=PALETTE[index % (len(PALETTE) - 1)], dashes=_DASHES[index // (len(PALETTE) - 1) % len(_DASHES)]
        )
        for index, label in enumerate(others)
    }
    return {label: chosen.get(label, Style(colour=PALETTE[-1], dashes="-")) for label in labels}


# --- parts -----------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text for matplotlib, which reads $ as mathematics; a long one keeps its end: it tells runs of a sweep apart."""
    text = text if len(text) <= _LONGEST_LABEL else f"…{text[1 - _LONGEST_LABEL :]}"
    return text.replace("$", r"\$")


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _shade(index: int, count: int) -> str | tuple[float, float, float, float]:
    if count <= len(PALETTE):
        return _colour(index)
    return matplotlib.colormaps["cividis"](0.9 * index / (count - 1))  # in order; the last tenth is too light on white


def _dashes(index: int) -> str:
    return _DASHES[index // len(PALETTE) % len(_DASHES)]


def step_axis(axes: mpl_axes.Axes) -> None:
    """Names the x axis and its ticks."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(short))


def legend(figure: mpl_figure.Figure, handles: Mapping[str, mpl_lines.Line2D]) -> None:
    """A legend above the axes, where it covers no curve; the figure grows by its rows."""
    labels = [plain(label) for label in handles]
    fitting = int(15 * figure.get_figwidth()) // (max(map(len, labels)) + 6)  # 15 characters an inch; 6 for the sample
    columns = max(1, min(len(labels), fitting))
    labels = [f"{' ' * label.startswith('_')}{label}" for label in labels]  # matplotlib skips one that starts with _
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * rows)
    order = [index for column in range(columns) for index in range(column, len(labels), columns)]  # read along the rows
    lines = list(handles.values())
    figure.legend(
        [lines[index] for index in order],
        [labels[index] for index in order],
        loc="outside upper left",
        ncols=columns,
        columnspacing=1.2,
    )


def svg(figure: mpl_figure.Figure, name: str) -> str:
    """The figure as an <svg> element for an HTML page: no size, no namespaces, ids that start with `name`."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids that are the same every time
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's <style> has a rule for `*`, which would hold for the whole page; the template scopes it.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML knows svg by name
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if element.tag == "image":
            attributes.pop("id", None)  # a hash of what it shows, which two layers may share
        if "id" in attributes:
            attributes["id"] = f"{name}-{attributes['id']}"
        for key, value in attributes.items():
            # matplotlib numbers ids afresh in each figure, and a reference finds the first in the whole page.
            value = value.replace("url(#", f"url(#{name}-")
            attributes[key] = f"#{name}-{value[1:]}" if key == "href" and value.startswith("#") else value
        element.attrib.clear()
        element.attrib.update(attributes)
    del root.attrib["width"], root.attrib["height"]
    return ElementTree.tostring(root, encoding="unicode")
