"""The heat maps of the report: expert load over time, who takes which label, and which experts are chosen together.

cividis throughout: it reads the same to colour-blind readers, and in grey.
"""

# S steps, N bins of steps, M MoE layers, E experts, T labels

import math
from collections.abc import Callable, Sequence
from typing import Literal

import matplotlib
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import image as mpl_image
from matplotlib import ticker

from moejax.analysis import figures

MAX_LABELS = 24  # columns whose names fit the width
_LONGEST_LABEL = 24  # characters
_SHEET = 6.0  # inches of heat maps that fit a sheet of paper
_MISSING = "#dddddd"


def load(name: str, steps_S: np.ndarray, load_SME: np.ndarray) -> list[figures.Panel]:
    """Expert load over time, with one scale of colour for all layers.

    Layers are dealt to as many figures as it takes for each to fit a sheet of paper.

    Args:
        name: unique in the page; prefixes the SVGs' ids.
        steps_S: steps, ascending.
        load_SME: share of the layer's routed tokens; a balanced expert has 1 / E, shown as 1.
    """
    num_experts = load_SME.shape[2]
    _, load_NME = figures.bin_means(steps_S, load_SME * num_experts)
    # A few early bins of a collapsed router would otherwise take all the colours from the rest of the run.
    top = max(2.0, float(np.nanpercentile(load_NME, 99.5))) if np.isfinite(load_NME).any() else 2.0
    caption = (
        "Each row is an expert, from the first step on the left to the last on the right. Dark blue is an expert that "
        "gets few tokens, yellow one that gets many; rows of one even colour are a balanced layer."
    )
    if len(load_NME) < len(steps_S):
        caption += f" Steps are averaged into {len(load_NME)} bins."

    def draw(axes: mpl_axes.Axes, layer: int) -> mpl_image.AxesImage:
        extent = (steps_S[0] - 0.5, steps_S[-1] + 0.5, num_experts - 0.5, -0.5)
        return _image(axes, load_NME[:, layer].T, top=top, extent=extent)

    return _stacked(
        name,
        load_SME.shape[1:],
        draw,
        figures.step_axis,
        title="Expert load",
        caption=caption,
        scale="load: share of tokens × number of experts (1 = balanced)",
        over=np.nanmax(load_NME, initial=0.0) > top,
    )


def labels(name: str, names: Sequence[str], num_tokens_T: Sequence[int], share_MET: np.ndarray) -> list[figures.Panel]:
    """Which expert takes the tokens of which label.

    Args:
        name: unique in the page; prefixes the SVGs' ids.
        names: of the labels.
        num_tokens_T: how many tokens have each label; of more than MAX_LABELS the most frequent are shown.
        share_MET: share of the label's tokens that the expert takes; NaN for a label without a token.
    """
    num_experts = share_MET.shape[1]
    shown: list[int] = sorted(np.argsort(-np.asarray(num_tokens_T), kind="stable")[:MAX_LABELS].tolist())
    top = max(2 / num_experts, float(np.nanmax(share_MET, initial=0.0)))
    caption = (
        "Each column is a label of documents, each row an expert: the share of the label's tokens that prefer the "
        f"expert; spread evenly it would be 1/{num_experts} = {1 / num_experts:.3g}. A row of one colour is an expert "
        "to which the label does not matter; a spot that stands out in its row is a speciality."
    )
    if len(shown) < len(names):
        caption += f" Shown are the {len(shown)} most frequent of {len(names)} labels; eval.json has all."

    def name_columns(axes: mpl_axes.Axes) -> None:
        short = [_beginning(names[label]) for label in shown]
        axes.set_xticks(range(len(shown)), short, rotation=45, ha="right", rotation_mode="anchor")
        axes.tick_params(axis="x", labelsize=8)

    return _stacked(
        name,
        share_MET.shape[:2],
        lambda axes, layer: _image(axes, share_MET[layer][:, shown], top=top),
        name_columns,
        title="Labels",
        caption=caption,
        scale="share of the label's tokens",
        below=0.8,
    )


def coactivation(name: str, together_MEE: np.ndarray) -> list[figures.Panel]:
    """Which experts are chosen together.

    Args:
        name: unique in the page; prefixes the SVGs' ids.
        together_MEE: tokens that chose both experts, on the diagonal those that chose the one.
    """
    num_layers, num_experts = together_MEE.shape[:2]
    chosen_ME1 = np.diagonal(together_MEE, axis1=1, axis2=2)[..., None]
    share_MEE = np.divide(together_MEE, chosen_ME1, out=np.full(together_MEE.shape, np.nan), where=chosen_ME1 > 0)
    share_MEE[:, np.arange(num_experts), np.arange(num_experts)] = np.nan
    top = float(np.nanmax(share_MEE, initial=0.0)) or 1.0
    caption = (
        "Of the held-out tokens that chose the row's expert, the share that also chose the column's. Yellow pairs work "
        "together; even colour means that every partner is as likely. Grey: an expert with itself, or never chosen."
    )
    columns = min(3, num_layers)
    a_figure = columns * 3
    panels = []
    for first in range(0, num_layers, a_figure):
        layers = range(first, min(first + a_figure, num_layers))
        rows = math.ceil(len(layers) / columns)
        with matplotlib.rc_context(figures.STYLE):
            side = min(2.6, figures.WIDE / columns)
            figure = mpl_figure.Figure(figsize=(figures.WIDE, side * rows + 0.8))
            grid = figure.subplots(rows, columns, squeeze=False)
            for axes in grid.flat[len(layers) :]:
                axes.set_visible(False)
            images = []
            for layer, axes in zip(layers, grid.flat, strict=False):
                images.append(_image(axes, share_MEE[layer], top=top, aspect="equal"))
                axes.set_title(f"MoE layer {layer}", loc="left")
                axes.xaxis.set_major_locator(_expert_ticks())
            for axes in grid[:, 0]:
                axes.set_ylabel("expert")
            figure.colorbar(
                images[0], ax=grid.ravel().tolist(), location="top", aspect=45, label="share of the row's tokens"
            )
            svg = figures.svg(figure, f"{name}-{first}")
        title = f"Experts chosen together{_part(layers, num_layers)}"
        panels.append(figures.Panel(title=title, caption=caption, svg=svg, wide=True))
    return panels


# --- parts -----------------------------------------------------------------------------------------------------------


def _stacked(
    name: str,
    shape: tuple[int, int],
    draw: Callable[[mpl_axes.Axes, int], mpl_image.AxesImage],
    name_x: Callable[[mpl_axes.Axes], None],
    *,
    title: str,
    caption: str,
    scale: str,
    over: bool = False,
    below: float = 0.0,
) -> list[figures.Panel]:
    """A heat map a layer, one below the other over one x axis, with rows of experts.

    shape: layers and experts. draw: fills the axes of a layer. name_x: names the columns. scale: what the colours mean.
    over: some values lie above the scale. below: inches that the names of the columns take.
    """
    num_layers, num_experts = shape
    height = min(1.8, max(0.95, 0.12 * num_experts))  # inches
    a_figure = int(_SHEET / height)
    panels = []
    for first in range(0, num_layers, a_figure):
        layers = range(first, min(first + a_figure, num_layers))
        with matplotlib.rc_context(figures.STYLE):
            figure = mpl_figure.Figure(figsize=(figures.WIDE, height * len(layers) + 1.2 + below))
            rows = figure.subplots(len(layers), sharex=True, squeeze=False)[:, 0]
            images = []
            for layer, axes in zip(layers, rows, strict=True):
                images.append(draw(axes, layer))
                axes.set_title(f"MoE layer {layer}", loc="left")
                axes.set_ylabel("expert")
            name_x(rows[-1])
            figure.colorbar(
                images[0],
                ax=rows.tolist(),
                location="top",
                aspect=45,
                extend="max" if over else "neither",
                label=scale,
            )
            svg = figures.svg(figure, f"{name}-{first}")
        panels.append(figures.Panel(title=f"{title}{_part(layers, num_layers)}", caption=caption, svg=svg, wide=True))
    return panels


def _image(
    axes: mpl_axes.Axes,
    value_EX: np.ndarray,
    *,
    top: float,
    extent: tuple[float, float, float, float] | None = None,
    aspect: Literal["auto", "equal"] = "auto",
) -> mpl_image.AxesImage:
    axes.grid(visible=False)
    axes.set_facecolor(_MISSING)  # where there is no value
    axes.yaxis.set_major_locator(_expert_ticks())
    # one pixel a value in the file; the browser scales it
    return axes.imshow(value_EX, extent=extent, aspect=aspect, interpolation="none", cmap="cividis", vmin=0, vmax=top)


def _expert_ticks() -> ticker.Locator:
    return ticker.MaxNLocator(4, integer=True, steps=[1, 2, 4, 8, 10])


def _part(layers: range, num_layers: int) -> str:
    return f", layers {layers[0]} to {layers[-1]}" if len(layers) < num_layers else ""


def _beginning(label: str) -> str:
    return figures.plain(label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…")
