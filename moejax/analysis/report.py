"""The report of one run or several: one self-contained HTML page, and the same numbers as JSON.

`write` reads only a run's folder (config.json and metrics.jsonl; eval.json and samples.jsonl if they exist), so a
report can be made while the run goes on, and on a machine without jax.
"""

# S steps

import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax import config, files
from moejax.analysis import comparison, figures, pages, routing_report, run_files, sweep_results, words

NUM_SAMPLES = 2  # newest samples shown
_BASELINES = ("uniform", "unigram", "bigram")
_VALIDATION = ("step", "loss", "perplexity", "bits_per_byte", "tokens", "documents")


def write(
    folders: Sequence[pathlib.Path], output: pathlib.Path | None = None, *, baseline: str | None = None
) -> pathlib.Path:
    """Writes the page of these runs, and its numbers as JSON beside it; each appears whole or not at all.

    Args:
        folders: runs' folders, the --workdir of `moejax train`; or one sweep's folder, whose page is `comparison`'s.
        output: the page, `*.html`; None means `report.html` in the first folder.
        baseline: of a sweep, the setting that others are compared with; None: the sweep's own.

    Returns:
        The path of the page. The JSON has the same path with the suffix `.json`: `{"runs": [numbers(folder), ...]}`.

    Raises:
        config.ConfigError: a folder does not hold a run, or `output` cannot be written.
    """
    if not folders:
        raise config.ConfigError("a report needs a run's folder; name one or more")
    output = folders[0] / "report.html" if output is None else output
    if output.suffix != ".html":
        raise config.ConfigError(f"output={output} must end in .html, for the numbers go beside it; rename it")
    sweep = is_sweep(folders)
    runs = [] if sweep else [run_files.read(folder) for folder in folders]
    if not output.parent.is_dir():
        raise config.ConfigError(f"output={output} lies in a folder that does not exist; make {output.parent}")
    if sweep:
        return comparison.write(folders[0], output, baseline=baseline)
    if len({run.name for run in runs}) < len(runs):
        for run, folder in zip(runs, folders, strict=True):
            run.name = str(folder)
    results = [_numbers(run) for run in runs]
    files.write(output, _page(runs, results))
    files.write(output.with_suffix(".json"), json.dumps({"runs": results}, indent=2, allow_nan=False) + "\n")
    return output


def is_sweep(folders: Sequence[pathlib.Path]) -> bool:
    """Whether it is a sweep that the page is about; raises ConfigError if it is a sweep and something else."""
    sweeps = [folder for folder in folders if (folder / sweep_results.FILE).is_file()]
    if sweeps and len(folders) > 1:
        raise config.ConfigError(f"{sweeps[0]} is a sweep, which has a page of its own; name it alone")
    return bool(sweeps)


def numbers(folder: pathlib.Path) -> dict[str, Any]:
    """The numbers of a run's report, ready for JSON; None stands for what the run does not have or what is not finite.

    Losses are in nats a token, `difference` is the model's loss less the baseline's. `routing` is described at
    `routing_report.numbers`.
    """
    return _numbers(run_files.read(folder))


# --- numbers ---------------------------------------------------------------------------------------------------------


def _numbers(run: run_files.Run) -> dict[str, Any]:
    validation = _validation(run)
    speeds = [row["tokens_per_second"] for row in run.rows if row.get("tokens_per_second") is not None]
    baselines = (run.evaluation or {}).get("baselines", {})
    model_loss = validation["loss"] if validation is not None else None
    return {
        "name": run.name,
        "steps": run.rows[-1]["step"],
        "tokens": run.rows[-1]["tokens"],
        "seconds": float(np.nansum(run.column("seconds"))),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "training_loss": _finite(run.rows[-1].get("ema_loss")),
        "steps_without_finite_loss": int((~np.isfinite(run.column("loss"))).sum()),
        "validation": validation,
        "baselines": {
            name: {
                "loss": baselines[name],
                "perplexity": _perplexity(baselines[name]),
                "difference": None if model_loss is None else model_loss - baselines[name],
            }
            for name in _BASELINES
            if name in baselines
        },
        "routing": routing_report.numbers(run.config, run.rows, (run.evaluation or {}).get("routing")),
    }


def _validation(run: run_files.Run) -> dict[str, Any] | None:
    """The newest loss on the held-out split: of eval.json, or of a later step's evaluation if the run went on."""
    seen = [row for row in run.rows if row.get("validation_loss") is not None]
    done = run.evaluation
    if done is not None and (not seen or done["step"] >= seen[-1]["step"]):
        return {name: _finite(done.get(name)) for name in _VALIDATION}
    if not seen:
        return None
    step, loss = seen[-1]["step"], seen[-1]["validation_loss"]
    return dict.fromkeys(_VALIDATION) | {"step": step, "loss": loss, "perplexity": _perplexity(loss)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None  # beyond, it is no float


# --- words -----------------------------------------------------------------------------------------------------------


def _summary(result: dict[str, Any]) -> str:
    validation, lost = result["validation"], result["steps_without_finite_loss"]
    text = f"After {result['steps']:,} steps and {figures.short(result['tokens'])} tokens "
    if validation is None:
        loss = words.number(result["training_loss"])
        text += f"the average training loss is {loss} nats/token; the run has not been validated yet."
    else:
        at = "" if validation["step"] == result["steps"] else f" (of step {validation['step']:,})"
        text += f"the validation loss{at} is {words.number(validation['loss'])} nats/token"
        if validation["bits_per_byte"] is not None:
            text += f" ({words.number(validation['bits_per_byte'])} bits per byte)"
        bigram = result["baselines"].get("bigram")
        if bigram is not None and bigram["difference"] is not None:
            side = "below" if bigram["difference"] < 0 else "above"
            text += f", {words.number(abs(bigram['difference']))} {side} the bigram baseline"
        text += "."
    return text + (f" The loss was not finite in {lost:,} of the steps." if lost else "")


def _comparison(results: Sequence[dict[str, Any]]) -> str:
    validated = [result for result in results if result["validation"] and result["validation"]["loss"] is not None]
    if not validated:
        return f"{len(results)} runs, none of which has been validated yet."
    # Bits per byte compare across tokenizers; nats a token do not.
    by_byte = all(result["validation"]["bits_per_byte"] is not None for result in validated)
    key, unit = ("bits_per_byte", "bits per byte") if by_byte else ("loss", "nats/token")
    best = min(validated, key=lambda result: result["validation"][key])
    loss = f"{words.number(best['validation'][key])} {unit}"
    return f"Of {len(results)} runs, {best['name']} has the lowest validation loss: {loss}."


# --- the page --------------------------------------------------------------------------------------------------------


def _page(runs: Sequence[run_files.Run], results: Sequence[dict[str, Any]]) -> str:
    paths = list(dict.fromkeys(path for run in runs for path in run.config))
    settings = [(path, [run.config.get(path, words.MISSING) for run in runs]) for path in paths]
    return pages.render(
        "report.html.j2",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        summary=_summary(results[0]) if len(runs) == 1 else _comparison(results),
        results=results,
        baseline_names=[name for name in _BASELINES if any(name in result["baselines"] for result in results)],
        loss=_loss_panel(runs, results),
        progress=_progress_panels(runs),
        routing=[
            _routing(run, result["routing"], f"run{index}")
            for index, (run, result) in enumerate(zip(runs, results, strict=True))
            if result["routing"]
        ],
        routing_compared=routing_report.comparison_panels({run.name: routing_report.curves(run.rows) for run in runs})
        if len(runs) > 1
        else [],
        layer_mean=routing_report.layer_mean,
        samples=[(run.name, run.samples[-NUM_SAMPLES:]) for run in runs if run.samples],
        settings=settings,
        differing=[(path, values) for path, values in settings if any(value != values[0] for value in values)],
    )


def _loss_panel(runs: Sequence[run_files.Run], results: Sequence[dict[str, Any]]) -> figures.Panel:
    curves = [
        figures.LossCurves(
            name=run.name,
            steps_S=run.column("step"),
            loss_S=run.column("loss"),
            ema_S=run.column("ema_loss"),
            validation_S=run.column("validation_loss"),
        )
        for run in runs
    ]
    # Lines are drawn only where they hold for every run that has baselines: another tokenizer has others.
    known = [{name: entry["loss"] for name, entry in result["baselines"].items()} for result in results]
    known = [levels for levels in known if levels]
    return figures.loss("loss", curves, known[0] if known and all(levels == known[0] for levels in known) else {})


def _progress_panels(runs: Sequence[run_files.Run]) -> list[figures.Panel]:
    speed = "Tokens trained on per second. The first step compiles; a later dip is a pause of machine or data."
    rate = "The schedule as it was applied: a linear warmup to the peak, then the decay."
    norm = "Global norm before clipping. Spikes that the loss follows are a sign of too high a learning rate."
    return [
        figures.lines(
            name,
            {run.name: (run.column("step"), run.column(name)) for run in runs},
            title=title,
            caption=caption,
            ylabel=ylabel,
            from_zero=True,
            wide_range=name == "grad_norm",
        )
        for name, title, ylabel, caption in (
            ("tokens_per_second", "Throughput", "tokens/s", speed),
            ("learning_rate", "Learning rate", "learning rate", rate),
            ("grad_norm", "Gradient norm", "gradient norm", norm),
        )
    ]


def _routing(run: run_files.Run, routing: dict[str, Any], name: str) -> dict[str, Any]:
    choices = routing["specialisation"]
    return {
        "name": run.name,
        "sentence": routing_report.sentence(routing),
        "panels": routing_report.panels(run.rows, choices, name),
        "tables": routing_report.token_tables(choices),
        "min_count": (choices or {}).get("min_count"),
        "step": (run.evaluation or {}).get("step"),
    }
