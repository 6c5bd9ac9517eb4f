"""The report of one run or several: one self-contained HTML page, and the same numbers as JSON.

`write` reads only a run's folder (config.json and metrics.jsonl; eval.json and samples.jsonl if they exist), so a
report can be made while the run goes on, and on a machine without jax.
"""

# S steps, L layers, E experts

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from moejax import config, files
from moejax.analysis import figures

NUM_SAMPLES = 2  # newest samples shown
_BASELINES = ("uniform", "unigram", "bigram")
_VALIDATION = ("step", "loss", "perplexity", "bits_per_byte", "tokens", "documents")
_MISSING = "–"


@dataclasses.dataclass(kw_only=True, slots=True)
class Run:
    """What a run's folder holds, as read."""

    name: str  # the folder's name
    config: dict[str, Any]  # every leaf by its dotted path
    rows: list[dict[str, Any]]  # of metrics.jsonl, one a step, ascending; never empty
    evaluation: dict[str, Any] | None  # eval.json
    samples: list[dict[str, Any]]  # samples.jsonl

    def column(self, name: str) -> np.ndarray:
        """One scalar of the metrics, an entry a step; NaN where a row has none or null."""
        return np.array([row.get(name) for row in self.rows], float)

    def routed(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps_S, values_S...) of a routing statistic, NaN where it is null; both empty for a model without MoE."""
        rows = [row for row in self.rows if "load" in row]
        return np.array([row["step"] for row in rows], int), np.array([row[name] for row in rows], float)


def write(folders: Sequence[pathlib.Path], output: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the page of these runs, and its numbers as JSON beside it; each appears whole or not at all.

    Args:
        folders: runs' folders, the --workdir of `moejax train`.
        output: the page, `*.html`; None means `report.html` in the first folder.

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
    runs = [read(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run, folder in zip(runs, folders, strict=True):
            run.name = str(folder)
    if not output.parent.is_dir():
        raise config.ConfigError(f"output={output} lies in a folder that does not exist; make {output.parent}")
    results = [_numbers(run) for run in runs]
    files.write(output, _page(runs, results))
    files.write(output.with_suffix(".json"), json.dumps({"runs": results}, indent=2, allow_nan=False) + "\n")
    return output


def numbers(folder: pathlib.Path) -> dict[str, Any]:
    """The numbers of a run's report, ready for JSON; None stands for what the run does not have or what is not finite.

    Losses are in nats a token, `difference` is the model's loss less the baseline's, `load` is an expert's share of its
    layer's routed tokens times the number of experts (1 = balanced), averaged over the last tenth of the steps.
    """
    return _numbers(read(folder))


def read(folder: pathlib.Path) -> Run:
    """Reads a run's folder; raises ConfigError if it is not one."""
    if not folder.is_dir():
        raise config.ConfigError(f"{folder} does not exist; name a run's folder, the --workdir of moejax train")
    for name in ("metrics.jsonl", "config.json"):
        if not (folder / name).is_file():
            raise config.ConfigError(f"{folder} has no {name}; name a run's folder, the --workdir of moejax train")
    # A step that stands twice counts once, as it was written last.
    rows = {row["step"]: row for row in files.read_rows(folder / "metrics.jsonl")}
    if not rows:
        raise config.ConfigError(f"{folder}/metrics.jsonl has no complete row yet; wait for the first step")
    evaluation, samples = folder / "eval.json", folder / "samples.jsonl"
    return Run(
        name=folder.resolve().name,
        config=_flatten(files.read_json(folder / "config.json")),
        rows=[rows[step] for step in sorted(rows)],
        evaluation=files.read_json(evaluation) if evaluation.is_file() else None,
        samples=files.read_rows(samples) if samples.is_file() else [],
    )


def _flatten(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    # config.flatten would refuse a run of another version, whose fields differ.
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return flat


# --- numbers ---------------------------------------------------------------------------------------------------------


def _numbers(run: Run) -> dict[str, Any]:
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
        "routing": _routing(run),
    }


def _validation(run: Run) -> dict[str, Any] | None:
    """The newest loss on the held-out split: of eval.json, or of a later step's evaluation if the run went on."""
    seen = [row for row in run.rows if row.get("validation_loss") is not None]
    done = run.evaluation
    if done is not None and (not seen or done["step"] >= seen[-1]["step"]):
        return {name: _finite(done.get(name)) for name in _VALIDATION}
    if not seen:
        return None
    step, loss = seen[-1]["step"], seen[-1]["validation_loss"]
    return dict.fromkeys(_VALIDATION) | {"step": step, "loss": loss, "perplexity": _perplexity(loss)}


def _routing(run: Run) -> dict[str, Any] | None:
    """Statistics over the last tenth of the steps."""
    steps_S, load_SLE = run.routed("load")
    if not steps_S.size:
        return None
    num_rows = math.ceil(len(steps_S) / 10)
    load_LE = _mean(load_SLE[-num_rows:]) * load_SLE.shape[2]
    layers = {name: _mean(run.routed(name)[1][-num_rows:]) for name in ("dropped", "router_entropy")}
    return {
        "first_step": int(steps_S[-num_rows]),
        "last_step": int(steps_S[-1]),
        "num_layers": load_LE.shape[0],
        "num_experts": load_LE.shape[1],
        "min_load": _finite(float(load_LE.min())),
        "max_load": _finite(float(load_LE.max())),
        "experts_without_load": np.argwhere(load_LE == 0).tolist(),  # [layer, expert], from 0
        "balance_loss": _finite(float(_mean(run.routed("balance_loss")[1][-num_rows:]))),
        **{name: [_finite(value) for value in mean_L.tolist()] for name, mean_L in layers.items()},
    }


def _mean(values_S: np.ndarray) -> np.ndarray:
    """The mean over steps of the finite values, NaN if there is none."""
    return figures.bin_means(np.arange(len(values_S)), values_S, max_bins=1)[1][0]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None  # beyond, it is no float


# --- words -----------------------------------------------------------------------------------------------------------


def _summary(result: dict[str, Any]) -> str:
    validation, lost = result["validation"], result["steps_without_finite_loss"]
    text = f"After {result['steps']:,} steps and {figures.short(result['tokens'])} tokens "
    if validation is None:
        loss = _number(result["training_loss"])
        text += f"the average training loss is {loss} nats/token; the run has not been validated yet."
    else:
        at = "" if validation["step"] == result["steps"] else f" (of step {validation['step']:,})"
        text += f"the validation loss{at} is {_number(validation['loss'])} nats/token"
        if validation["bits_per_byte"] is not None:
            text += f" ({_number(validation['bits_per_byte'])} bits per byte)"
        bigram = result["baselines"].get("bigram")
        if bigram is not None and bigram["difference"] is not None:
            side = "below" if bigram["difference"] < 0 else "above"
            text += f", {_number(abs(bigram['difference']))} {side} the bigram baseline"
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
    loss = f"{_number(best['validation'][key])} {unit}"
    return f"Of {len(results)} runs, {best['name']} has the lowest validation loss: {loss}."


def _load_sentence(routing: dict[str, Any]) -> str:
    first, last, idle = routing["first_step"], routing["last_step"], routing["experts_without_load"]
    steps = f"In the last tenth of the steps ({first:,} to {last:,})" if first < last else f"In step {last:,}"
    total = routing["num_layers"] * routing["num_experts"]
    if routing["min_load"] is None:
        return f"{steps} the expert load was not finite."
    least, most = _load(routing["min_load"]), _load(routing["max_load"])
    text = f"{steps} the least loaded expert had {least} and the most loaded {most} times the balanced share; "
    if not idle:
        return f"{text}every one of the {total} experts has load."
    shown = ", ".join(f"layer {layer} expert {expert}" for layer, expert in idle[:6])
    return f"{text}{len(idle)} of {total} experts had no load at all: {shown}{', …' if len(idle) > 6 else ''}."


def _load(value: float | None) -> str:
    return "under 0.01" if value is not None and 0 < value < 0.01 else _number(value, 2)


def _number(value: float | None, places: int = 3) -> str:
    return _MISSING if value is None else f"{value:,.{places}f}"


def _short(value: float | None) -> str:
    return _MISSING if value is None else figures.short(value)


def _signed(value: float | None) -> str:
    return _MISSING if value is None else f"{value:+,.3f}".replace("-", "−")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    minutes, hours = whole // 60, whole // 3600
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {whole % 60} s"


# --- the page --------------------------------------------------------------------------------------------------------


def _page(runs: Sequence[Run], results: Sequence[dict[str, Any]]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "signed": _signed, "short": _short, "duration": _duration, "load": _load}
    paths = list(dict.fromkeys(path for run in runs for path in run.config))
    settings = [(path, [run.config.get(path, _MISSING) for run in runs]) for path in paths]
    return environment.get_template("report.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        summary=_summary(results[0]) if len(runs) == 1 else _comparison(results),
        results=results,
        baseline_names=[name for name in _BASELINES if any(name in result["baselines"] for result in results)],
        loss=_loss_panel(runs, results),
        progress=_progress_panels(runs),
        routing=[
            (run.name, _load_sentence(result["routing"]), _routing_panels(run, f"run{index}"))
            for index, (run, result) in enumerate(zip(runs, results, strict=True))
            if result["routing"]
        ],
        samples=[(run.name, run.samples[-NUM_SAMPLES:]) for run in runs if run.samples],
        settings=settings,
        differing=[(path, values) for path, values in settings if any(value != values[0] for value in values)],
    )


def _loss_panel(runs: Sequence[Run], results: Sequence[dict[str, Any]]) -> figures.Panel:
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


def _progress_panels(runs: Sequence[Run]) -> list[figures.Panel]:
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


def _routing_panels(run: Run, name: str) -> list[figures.Panel]:
    steps_S, load_SLE = run.routed("load")
    balanced = math.log(load_SLE.shape[2])

    def curves(statistic: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        steps_N, mean_NL = figures.bin_means(*run.routed(statistic))
        return {f"layer {layer}": (steps_N, mean_N) for layer, mean_N in enumerate(mean_NL.T)}

    return [
        *figures.load(f"{name}-load", steps_S, load_SLE),
        figures.lines(
            f"{name}-dropped",
            curves("dropped"),
            title="Dropped tokens",
            caption="Share of the routed tokens that found their expert full, by layer. It falls as load evens out.",
            ylabel="share dropped",
            from_zero=True,
        ),
        figures.lines(
            f"{name}-entropy",
            curves("router_entropy"),
            title="Router entropy",
            caption="How undecided the router is about a token, by layer. On the dashed line every expert is "
            "as likely as any other; at 0 the choice is certain.",
            ylabel="entropy (nats)",
            from_zero=True,
            level=(f"ln {load_SLE.shape[2]} = {balanced:.2f}", balanced),
        ),
        figures.lines(
            f"{name}-balance",
            {"balance loss": figures.bin_means(*run.routed("balance_loss"))},
            title="Balance loss",
            caption="The load-balance loss before its weight, averaged over the layers. 1 is perfect balance.",
            ylabel="balance loss",
            level=("balanced", 1.0),
        ),
    ]
