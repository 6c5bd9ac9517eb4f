"""A trained run, opened again: its model and its held-out loss."""

import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

import jax

from moejax import config as config_lib
from moejax import files, partition
from moejax.analysis import baselines, specialisation
from moejax.data import pipeline, tokenizers
from moejax.models import model as model_lib
from moejax.training import checkpoint, evaluate, folder, state


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder with its newest sound checkpoint, on one device."""

    workdir: pathlib.Path
    config: config_lib.Config
    tokenizer: tokenizers.Tokenizer
    model: model_lib.Model
    step: int
    mesh: jax.sharding.Mesh


def load(workdir: pathlib.Path) -> Run:
    """Opens a run's folder; changes nothing in it.

    Raises:
      ConfigError: the folder holds no run, or no checkpoint that can be read.
    """
    config = folder.load_config(workdir)
    saved = workdir / "checkpoints"
    none = config_lib.ConfigError(f"--workdir={workdir} holds no checkpoint yet; run moejax train first")
    tokenizer = folder.load_tokenizer(workdir)
    if tokenizer is None:
        raise none
    mesh = partition.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    try:
        partition.check_platform(config, mesh)
    except config_lib.ConfigError as error:  # the scans differ in speed alone
        print(f"moejax: {error.args[0].split(';')[0]}; model.mamba.scan=auto is used", file=sys.stderr)
        config.model.mamba.scan = "auto"
    checkpoints = checkpoint.Checkpoints(saved, config.checkpoint, read_only=True)
    try:
        restored = checkpoints.restore(state.abstract(config, mesh), on_corrupt=folder.report_corrupt(workdir))
    finally:
        checkpoints.close()
    if restored is None:
        raise none
    return Run(workdir, config, tokenizer, restored[0].model, restored[1], mesh)


def evaluate_run(run: Run) -> dict[str, Any]:
    """The loss on the whole held-out split, with baselines of the same split; also written to eval.json.

    Keys: step, loss (nats a token), perplexity, bits_per_byte (of pairs, of their targets; None of span
    corruption, which predicts a part of the text), tokens, documents, baselines (uniform, unigram, bigram; nats a
    token), and for MoE models dropped (share of the routed choices) and routing (what each expert takes; see
    `specialisation.Choices.summary`).
    """
    config, tokenizer = run.config, run.tokenizer
    data = pipeline.load(config.data, tokenizer)
    folder.check_corpus(data, run.workdir)
    batches = pipeline.validation_batches(data, config.data)
    choices = specialisation.Choices()
    result = evaluate.evaluate(run.model, choices.watch(evaluate.make_eval_step(run.mesh)), batches, run.mesh)
    held_out = pipeline.validation_packer(data, config.data)
    of_split = baselines.compute(data.train, held_out, data.objective, tokenizer.vocab_size)
    is_whole = config.data.objective != "span_corruption"
    summary = {
        "step": run.step,
        "loss": result["loss"],
        "perplexity": math.exp(min(result["loss"], 700.0)),
        "bits_per_byte": data.validation.bits_per_byte(result["loss"]) if is_whole else None,
        "tokens": int(result["tokens"]),
        "documents": len(data.validation),
        "baselines": dataclasses.asdict(of_split),
    }
    if "dropped" in result:
        summary |= {"dropped": result["dropped"], "routing": choices.summary(tokenizer, data.labels)}
    files.write(run.workdir / "eval.json", json.dumps(summary, indent=2) + "\n")
    return summary
