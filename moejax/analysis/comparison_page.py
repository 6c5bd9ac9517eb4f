"""The page of a sweep's comparison: its words and tables, and the figures that go with them."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.analysis import (
    comparison_figures,
    figures,
    heatmaps,
    pages,
    routing_report,
    run_files,
    sweep_results,
    words,
)

Numbers = Mapping[str, Any]  # of `comparison.numbers`
_MAX_OPEN = 6  # heat maps that are not folded away
_LONG_NAME = 14  # characters up to which every name is shown whole


def page(folder: pathlib.Path, results: sweep_results.Results, found: Numbers) -> str:
    """The page as HTML.

    Args:
        folder: of the sweep, for the routing in its points' metrics.
        results: its sweep.json.
        found: `comparison.numbers` of the same.
    """
    labels = short_names([group["group"] for group in found["groups"]], found["baseline"])
    found = _relabelled(found, labels)
    groups = found["groups"]
    styles = figures.style([group["group"] for group in groups], found["baseline"])
    measure = sweep_results.MEASURES[found["measure"]]
    routing, load = _routing(folder, results, labels, styles)
    settings = _settings(groups)
    return pages.render(
        "comparison.html.j2",
        title=folder.resolve().name,
        summary=_summary(found),
        progress=_progress(results),
        problems=[row for row in results.points if row.status in ("failed", "does not fit")],
        notes=_notes(results, found) + _shortened(labels),
        groups=groups,
        baseline=found["baseline"],
        measure=measure,
        kept=_kept(groups),
        alpha=found["alpha"],
        losses=comparison_figures.losses(found, styles),
        final=comparison_figures.final(found, styles, measure),
        by_setting=comparison_figures.by_setting(found, styles, measure),
        speedup=comparison_figures.speedup(found, styles, _speedup_caption(found)),
        several_budgets=len({group["tokens"] for group in groups}) > 1,
        routed=[group for group in groups if group["imbalance"] is not None],
        routing=routing,
        load=load,
        load_open=len(load) <= _MAX_OPEN,
        settings=settings,
        fields=list(dict.fromkeys(field for values in settings.values() for field in values)),
    )


# --- names -----------------------------------------------------------------------------------------------------------


def short_names(names: Sequence[str], baseline: str | None) -> dict[str, str]:
    """name -> what the page calls it: long names without the words that all but the baseline's begin or end with.

    Words stand between underscores; one at least is left.
    """
    parts = {name: name.split("_") for name in names if name != baseline}
    if len(parts) < 2 or max(map(len, parts)) <= _LONG_NAME:
        return {name: name for name in names}
    begin = _shared(list(parts.values()))
    end = _shared([part[begin:][::-1] for part in parts.values()])
    short = {name: "_".join(part[begin : len(part) - end]) for name, part in parts.items()}
    if baseline in short.values():
        return {name: name for name in names}
    return {name: short.get(name, name) for name in names}


def _shared(parts: Sequence[list[str]]) -> int:
    """With how many words all begin, of those that leave one to each."""
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return min(sum(1 for _ in same), min(map(len, parts)) - 1)


def _shortened(labels: Mapping[str, str]) -> list[str]:
    name = next((name for name, label in labels.items() if name != label), None)
    if name is None:
        return []
    return [f"Names are without what all have in common: {labels[name]} is {name}."]


def _relabelled(found: Numbers, labels: Mapping[str, str]) -> Numbers:
    """The numbers with the names that the page uses."""
    return {
        **found,
        "baseline": None if found["baseline"] is None else labels[found["baseline"]],
        "points": [{**point, "group": labels[point["group"]]} for point in found["points"]],
        "groups": [{**group, "group": labels[group["group"]]} for group in found["groups"]],
        "curves": {labels[group]: curve for group, curve in found["curves"].items()},
        "speedup": {labels[group]: levels for group, levels in found["speedup"].items()},
    }


# --- words -----------------------------------------------------------------------------------------------------------


def _summary(found: Numbers) -> str:
    finished = [group for group in found["groups"] if group["loss"]["mean"] is not None]
    if not finished:
        return f"None of the {len(found['points'])} points has finished yet."
    measure = sweep_results.MEASURES[found["measure"]]
    best = min(finished, key=lambda group: group["loss"]["mean"])
    text = f"Of {len(finished)} settings, {best['group']} has the lowest {measure}: "
    text += f"{words.spread(best['loss'])} nats/token"
    difference, ratio = best["difference"], best["speedup"]["mean"]
    if difference["mean"] is not None:
        side = "below" if difference["mean"] < 0 else "above"
        text += f", {words.number(abs(difference['mean']))} {side} {found['baseline']}"
        if difference["p"] is not None:
            text += f" (p = {words.probability(difference['p'])})".replace("= <", "< ")
    if ratio is not None:
        text += f"; {found['baseline']} took {ratio:.2f} times as many tokens"
        text += " to the lowest training loss that both reached"
    return text + "."


def _progress(results: sweep_results.Results) -> str:
    """How far an unfinished sweep is; empty for a finished one."""
    counts = {status: sum(row.status == status for row in results.points) for status in ("running", "waiting")}
    left = [f"{count} {status}" for status, count in counts.items() if count]
    if not left:
        return ""
    done = sum(row.status == "done" for row in results.points)
    return f"The sweep goes on: {done} of {len(results.points)} points have finished, {' and '.join(left)}."


def _notes(results: sweep_results.Results, found: Numbers) -> list[str]:
    """What stands in the way of a conclusion."""
    notes = []
    if results.baseline is None:
        notes.append("The sweep names no baseline, so there is no speed-up, no difference and no test.")
    elif found["baseline"] is None:
        notes.append(
            f"The baseline {results.baseline} is no setting of this sweep, so there is nothing to compare with."
        )
    else:
        tested = sum(group["difference"]["p"] is not None for group in found["groups"])
        compared = sum(group["difference"]["pairs"] > 0 for group in found["groups"])
        if compared and not tested:
            notes.append(
                f"One seed beside {found['baseline']}: there is no test, and a difference as small as that between two "
                "seeds says nothing."
            )
        if tested > 1:
            notes.append(
                f"p is that of each comparison alone; with {tested} of them, one is convincing below "
                f"{0.05 / tested:.2g} (0.05 / {tested})."
            )
    return notes


def _kept(groups: Sequence[Numbers]) -> float:
    """The share of the moving average with sweep_results.EMA_ALPHA that the first step's loss still has."""
    return (1 - sweep_results.EMA_ALPHA) ** (min((group["steps"] for group in groups), default=1) - 1)


def _speedup_caption(found: Numbers) -> str:
    return (
        f"Tokens that {found['baseline']} took to reach a training loss, over those that the setting took; above 1 the "
        "setting is faster. Mean and standard deviation over pairs of one seed, as far as all of them reached."
    )


def _settings(groups: Sequence[Numbers]) -> dict[str, dict[str, str]]:
    """group -> field -> value, of the fields that differ."""
    fields = dict.fromkeys(field for group in groups for field in group["settings"])
    return {
        group["group"]: {
            field: words.setting(group["settings"][field]) if field in group["settings"] else words.MISSING
            for field in fields
        }
        for group in groups
    }


# --- routing ---------------------------------------------------------------------------------------------------------


def routed(results: sweep_results.Results) -> dict[str, sweep_results.Row]:
    """group -> the point whose routing is shown: its first finished one, else the first that runs."""
    found: dict[str, sweep_results.Row] = {}
    for status in ("done", "running"):
        for row in results.points:
            if row.status == status and row.axes.get("experts", 0) > 1:  # one expert gets everything
                found.setdefault(row.group, row)
    return found


def _routing(
    folder: pathlib.Path,
    results: sweep_results.Results,
    labels: Mapping[str, str],
    styles: Mapping[str, figures.Style],
) -> tuple[list[figures.Panel], list[figures.Panel]]:
    """Statistics with a line a group, and the experts' load a figure a group: of each group's first finished point."""
    shown, curves, load = routed(results), {}, []
    for group, label in labels.items():
        if group not in shown:
            continue
        rows = run_files.rows(folder / shown[group].name)
        curves[label] = routing_report.curves(rows)
        steps_S, load_SME = routing_report.column(rows, "load")
        if steps_S.size:
            for panel in heatmaps.load(f"load{len(load)}", steps_S, load_SME):
                title = panel.title.replace("Expert load", f"{label}, seed {shown[group].seed}")
                load.append(dataclasses.replace(panel, title=title, caption="", wide=False))
    return routing_report.comparison_panels(curves, styles), load
