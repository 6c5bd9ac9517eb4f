"""What the report says about routing: its numbers, figures and tables, of one run or several side by side.

Every statistic may be missing: which ones a run has depends on its router and on the version that made it.
"""

# S steps, N bins of steps, M MoE layers, E experts, T labels

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax import config
from moejax.analysis import figures, heatmaps, words

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl
_BY_LAYER = ("max_load", "unused_experts", "dropped", "router_entropy", "experts_per_token", "coactivation")
_NO_PART = ("ema_loss", "validation_loss", "vocabulary_z_loss")  # of what the routers add to the objective
_MAX_OPEN = 24  # rows of tables that are not folded away

_LOSSES = {
    "balance": "balance is 1 when every expert gets the same share and the number of experts when one gets all",
    "sequence": "sequence is balance within each row",
    "importance": "importance is the squared coefficient of variation of the experts' gates, 0 when they are even",
    "load": "load is that of the experts' expected loads, 0 when they are even",
    "z": "z is the squared log of the router's normaliser, small when its logits are",
    "device": "device is balance over the groups of experts",
    "communication": "communication is balance of what the groups are sent",
    "relu": "relu is the sum of the gates times its adaptive coefficient",
}


# --- numbers ---------------------------------------------------------------------------------------------------------


def column(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps_S, values_S...) of a statistic, from the rows that have it; NaN where it is null.

    max_load and unused_experts follow from the load, so that runs from before they were written have them too.
    """
    if name in ("max_load", "unused_experts"):
        steps_S, load_SME = column(rows, "load")
        if not steps_S.size:
            return steps_S, load_SME
        if name == "max_load":
            return steps_S, load_SME.max(axis=2) * load_SME.shape[2]
        return steps_S, np.where(np.isnan(load_SME), np.nan, load_SME == 0).mean(axis=2)
    rows = [row for row in rows if "load" in row and name in row]
    return np.array([row["step"] for row in rows], int), np.array([row[name] for row in rows], float)


def numbers(settings: Mapping[str, Any], rows: Rows, choices: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The routing of a run, over the last tenth of its steps; None for a model without MoE.

    Args:
        settings: the run's config, every leaf by its dotted path.
        rows: its metrics.
        choices: "routing" of its eval.json.

    Returns:
        min_load, max_load: the least and the most loaded expert's mean load, 1 = balanced. layers: of each statistic
        of `state.routing_metrics` a mean a layer; churn is the last one. losses: auxiliary losses. specialisation:
        `choices`. None stands for what the run lacks.
    """
    steps_S, load_SME = column(rows, "load")
    if not steps_S.size:
        return None
    first_step = steps_S[-math.ceil(len(steps_S) / 10)]
    load_ME = _mean(load_SME[steps_S >= first_step]) * load_SME.shape[2]
    return {
        "router": settings.get("model.moe.router"),
        "top_k": _top_k(settings),
        "first_step": int(first_step),
        "last_step": int(steps_S[-1]),
        "num_layers": load_ME.shape[0],
        "num_experts": load_ME.shape[1],
        "min_load": _finite(load_ME.min()),
        "max_load": _finite(load_ME.max()),
        "experts_without_load": np.argwhere(load_ME == 0).tolist(),  # [layer, expert], from 0
        "losses": {name: _finite(_late(rows, f"{name}_loss", first_step)) for name in _loss_names(rows)},
        "layers": {name: _list(_late(rows, name, first_step)) for name in _BY_LAYER}
        | {"churn": _list(next(iter(column(rows, "churn")[1][-1:]), None))},
        "specialisation": choices,
    }


def layer_mean(routing: Mapping[str, Any] | None, name: str) -> float | None:
    """A statistic of `numbers`, averaged over the layers."""
    values_M = routing["layers"][name] if routing is not None else None
    known = [value for value in values_M or () if value is not None]
    return sum(known) / len(known) if known else None


def _top_k(settings: Mapping[str, Any]) -> int | str | None:
    """K, experts a token; a router that mixes all of them has "all"."""
    router = config.ROUTERS.get(settings.get("model.moe.router", ""))
    if router is not None and not router.sparse:
        return "all"
    return settings.get("model.moe.top_k") or (router.top_k if router is not None else None)


def _loss_names(rows: Rows) -> list[str]:
    found = dict.fromkeys(name for row in rows if "load" in row for name in row if name.endswith("_loss"))
    return [name.removesuffix("_loss") for name in found if name not in _NO_PART]


def _late(rows: Rows, name: str, first_step: int) -> Any:
    """The mean from that step on; None if there is nothing."""
    steps_S, values_S = column(rows, name)
    values_S = values_S[steps_S >= first_step]
    return _mean(values_S) if len(values_S) else None


def _mean(values_S: np.ndarray) -> np.ndarray:
    """The mean over steps of the finite values, NaN if there is none."""
    return figures.bin_means(np.arange(len(values_S)), values_S, max_bins=1)[1][0]


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _list(values_M: np.ndarray | None) -> list[float | None] | None:
    return None if values_M is None else [_finite(value) for value in values_M]


# --- words -----------------------------------------------------------------------------------------------------------


def sentence(routing: Mapping[str, Any]) -> str:
    """How evenly the experts were used at the end of the run."""
    first, last, idle = routing["first_step"], routing["last_step"], routing["experts_without_load"]
    steps = f"In the last tenth of the steps ({first:,} to {last:,})" if first < last else f"In step {last:,}"
    total = routing["num_layers"] * routing["num_experts"]
    if routing["min_load"] is None:
        return f"{steps} the expert load was not finite."
    least, most = words.load(routing["min_load"]), words.load(routing["max_load"])
    text = f"{steps} the least loaded expert had {least} and the most loaded {most} times the balanced share; "
    if not idle:
        return f"{text}every one of the {total} experts has load."
    shown = ", ".join(f"layer {layer} expert {expert}" for layer, expert in idle[:6])
    return f"{text}{len(idle)} of {total} experts had no load at all: {shown}{', …' if len(idle) > 6 else ''}."


def token_tables(choices: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A table a MoE layer: {"layer", "open": not folded away, "rows": [(expert, load, share of tokens, tokens)]}."""
    layers = (choices or {}).get("layers", [])
    everything = sum(len(layer["tokens"]) for layer in layers) <= _MAX_OPEN
    return [
        {
            "layer": number,
            "open": everything or number == 0,
            "rows": list(zip(layer["load"], layer["preferred"], layer["tokens"], strict=True)),
        }
        for number, layer in enumerate(layers)
    ]


# --- panels ----------------------------------------------------------------------------------------------------------


def panels(rows: Rows, choices: Mapping[str, Any] | None, name: str) -> list[figures.Panel]:
    """The figures of one run; `name` is unique in the page and prefixes the ids."""
    steps_S, load_SME = column(rows, "load")
    num_experts = load_SME.shape[2]
    balanced = math.log(num_experts)
    drawn = [
        *heatmaps.load(f"{name}-load", steps_S, load_SME),
        _by_layer(
            rows,
            f"{name}-imbalance",
            "max_load",
            title="Imbalance",
            caption="Load of the busiest expert in each step, by layer: 1 is perfect balance, "
            f"{num_experts} is one expert that takes all.",
            ylabel="largest load (× balanced)",
            level=("balanced", 1.0),
        ),
        _by_layer(
            rows,
            f"{name}-unused",
            "unused_experts",
            title="Unused experts",
            caption="Share of the experts that got no token in a step, by layer. They cost memory and learn nothing.",
            ylabel="share of experts",
            from_zero=True,
        ),
        _by_layer(
            rows,
            f"{name}-dropped",
            "dropped",
            title="Dropped tokens",
            caption="Share of the routed tokens that found their expert full, by layer. It falls as load evens out.",
            ylabel="share dropped",
            from_zero=True,
        ),
        _by_layer(
            rows,
            f"{name}-entropy",
            "router_entropy",
            title="Router entropy",
            caption="How undecided the router is about a token, by layer. On the dashed line every expert is "
            "as likely as any other; at 0 the choice is certain.",
            ylabel="entropy (nats)",
            from_zero=True,
            level=(f"ln {num_experts} = {balanced:.2f}", balanced),
        ),
        _losses(rows, f"{name}-losses"),
        _by_layer(
            rows,
            f"{name}-churn",
            "churn",
            title="Churn",
            caption="Share of the tokens of a fixed held-out batch whose preferred expert is another than at the "
            "evaluation before, by layer. It falls as experts settle on what they take.",
            ylabel="share of tokens",
            from_zero=True,
            binned=False,
        ),
        _experts_per_token(rows, f"{name}-experts"),
    ]
    return [panel for panel in (*drawn, *_held_out(choices, name)) if panel is not None]


def _by_layer(rows: Rows, name: str, statistic: str, *, binned: bool = True, **drawing: Any) -> figures.Panel | None:
    """A curve a layer; None if the run has no such statistic. binned: averaged over neighbouring steps."""
    steps_N, values_NM = column(rows, statistic)
    if not steps_N.size:
        return None
    if binned:
        steps_N, values_NM = figures.bin_means(steps_N, values_NM)
    curves = {f"layer {layer}": (steps_N, values_N) for layer, values_N in enumerate(values_NM.T)}
    return figures.lines(name, curves, ordered=True, **drawing)


def _losses(rows: Rows, name: str) -> figures.Panel | None:
    names = _loss_names(rows)
    if not names:
        return None
    curves = {f"{loss} loss": figures.bin_means(*column(rows, f"{loss}_loss")) for loss in names}
    meanings = "; ".join(_LOSSES[loss] for loss in names if loss in _LOSSES)
    only = names[0] if len(names) == 1 else None
    return figures.lines(
        name,
        curves,
        title=f"{only.capitalize()} loss" if only else "Auxiliary losses",
        caption=f"Before {'its weight' if only else 'their weights'}, averaged over the layers: {meanings}.",
        ylabel=f"{only} loss" if only else "loss",
        wide_range=True,
        level=("balanced", 1.0) if only == "balance" else None,
    )


def _experts_per_token(rows: Rows, name: str) -> figures.Panel | None:
    values_SM = column(rows, "experts_per_token")[1]
    finite = values_SM[np.isfinite(values_SM)]
    if not finite.size or np.ptp(finite) < 1e-6:
        return None
    return _by_layer(
        rows,
        name,
        "experts_per_token",
        title="Experts per token",
        caption="Mean number of experts that a token is sent to, by layer; this router decides it token by token.",
        ylabel="experts",
        from_zero=True,
    )


def _held_out(choices: Mapping[str, Any] | None, name: str) -> list[figures.Panel]:
    layers = (choices or {}).get("layers", [])
    drawn = []
    if layers and layers[0]["coactivation"] is not None:
        together_MEE = np.array([layer["coactivation"] for layer in layers], float)
        drawn += heatmaps.coactivation(f"{name}-together", together_MEE)
    if choices and choices["labels"]:
        share_MET = np.array([layer["labels"] for layer in layers], float)
        drawn += heatmaps.labels(f"{name}-labels", choices["labels"], choices["label_tokens"], share_MET)
    return drawn


@dataclasses.dataclass(kw_only=True, slots=True)
class Curves:
    """A run's routing over its steps, averaged over its layers."""

    num_experts: int
    statistics: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (steps_N, values_N), of those that it has


def curves(rows: Rows) -> Curves | None:
    """What `comparison_panels` draws of a run; None for a model without MoE."""
    load_SME = column(rows, "load")[1]
    if not load_SME.size:
        return None
    found = {}
    for name in ("max_load", "unused_experts", "dropped", "router_entropy", "churn"):
        steps_S, values_SM = column(rows, name)
        if steps_S.size:
            steps_N, values_NM = (steps_S, values_SM) if name == "churn" else figures.bin_means(steps_S, values_SM)
            found[name] = (steps_N, np.array([_mean(values_M) for values_M in values_NM]))
    return Curves(num_experts=load_SME.shape[2], statistics=found)


def comparison_panels(
    runs: Mapping[str, Curves | None], styles: Mapping[str, figures.Style] | None = None
) -> list[figures.Panel]:
    """The routing of every MoE run, averaged over its layers; runs: name -> `curves`. styles: of names, for all."""
    found = {name: run for name, run in runs.items() if run is not None}

    def panel(name: str, statistic: str, **drawing: Any) -> figures.Panel | None:
        drawn = {run: found[run].statistics[statistic] for run in found if statistic in found[run].statistics}
        return figures.lines(f"runs-{name}", drawn, styles=styles, **drawing) if drawn else None

    nums = {run.num_experts for run in found.values()}
    num_experts = nums.pop() if len(nums) == 1 else None
    even = (f"ln {num_experts} = {math.log(num_experts):.2f}", math.log(num_experts)) if num_experts else None
    drawn = [
        panel(
            "imbalance",
            "max_load",
            title="Imbalance of the runs",
            caption="Load of the busiest expert in each step, averaged over the layers. 1 is perfect balance.",
            ylabel="largest load (× balanced)",
            wide_range=True,
            level=("balanced", 1.0),
        ),
        panel(
            "entropy",
            "router_entropy",
            title="Router entropy of the runs",
            caption="How undecided each router is about a token, averaged over the layers; at 0 its choice is "
            "certain. ln E, the most there is, is an even choice among E experts.",
            ylabel="entropy (nats)",
            from_zero=True,
            level=even,
        ),
        panel(
            "unused",
            "unused_experts",
            title="Unused experts of the runs",
            caption="Share of the experts that got no token in a step, averaged over the layers.",
            ylabel="share of experts",
            from_zero=True,
        ),
        panel(
            "dropped",
            "dropped",
            title="Dropped tokens of the runs",
            caption="Share of the routed tokens that found their expert full, averaged over the layers.",
            ylabel="share dropped",
            from_zero=True,
        ),
        panel(
            "churn",
            "churn",
            title="Churn of the runs",
            caption="Share of the tokens of a fixed held-out batch whose preferred expert is another than at the "
            "evaluation before, averaged over the layers.",
            ylabel="share of tokens",
            from_zero=True,
        ),
    ]
    return [one for one in drawn if one is not None]
