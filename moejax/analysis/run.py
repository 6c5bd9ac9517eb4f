"""A trained run, opened again: its model, its held-out loss, and text that it writes."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

from moejax import config as config_lib
from moejax import files, partition
from moejax.analysis import baselines, specialisation
from moejax.data import pipeline, tokenizers
from moejax.models import generate, lm
from moejax.training import checkpoint, evaluate, folder, state


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder with its newest sound checkpoint, on one device."""

    workdir: pathlib.Path
    config: config_lib.Config
    tokenizer: tokenizers.Tokenizer
    model: lm.Lm
    step: int
    mesh: jax.sharding.Mesh


def load(workdir: pathlib.Path) -> Run:
    """Opens a run's folder; changes nothing in it.

    Raises:
      ConfigError: the folder holds no run or no checkpoint that can be read, or its model does not run here.
    """
    config = folder.load_config(workdir)
    saved = workdir / "checkpoints"
    none = config_lib.ConfigError(f"--workdir={workdir} holds no checkpoint yet; run moejax train first")
    tokenizer = folder.load_tokenizer(workdir)
    if tokenizer is None:
        raise none
    mesh = partition.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    partition.check_scan(config, mesh)
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

    Keys: step, loss (nats a token), perplexity, bits_per_byte, tokens, documents, baselines (uniform, unigram, bigram;
    nats a token), and for MoE models dropped (share of the routed choices) and routing (what each expert takes; see
    `specialisation.Choices.summary`).
    """
    config, tokenizer = run.config, run.tokenizer
    data = pipeline.load(config.data, tokenizer)
    folder.check_corpus(data, run.workdir)
    batches = pipeline.validation_batches(data, config.data)
    choices = specialisation.Choices()
    result = evaluate.evaluate(run.model, choices.watch(evaluate.make_eval_step(run.mesh)), batches, run.mesh)
    of_split = baselines.compute(data.train, pipeline.validation_packer(data, config.data), tokenizer.vocab_size)
    summary = {
        "step": run.step,
        "loss": result["loss"],
        "perplexity": math.exp(min(result["loss"], 700.0)),
        "bits_per_byte": data.validation.bits_per_byte(result["loss"]),
        "tokens": int(result["tokens"]),
        "documents": len(data.validation),
        "baselines": dataclasses.asdict(of_split),
    }
    if "dropped" in result:
        summary |= {"dropped": result["dropped"], "routing": choices.summary(tokenizer, data.labels)}
    files.write(run.workdir / "eval.json", json.dumps(summary, indent=2) + "\n")
    return summary


def write_sample(
    run: Run,
    prompt: str,
    *,
    num_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    max_length: int = 0,
    num_samples: int = 1,
    label: str = "",
) -> list[str]:
    """Continuations of the prompt, each up to the first end-of-text; also appended to samples.jsonl.

    Args:
      run: the trained run.
      prompt: text the document begins with; may be empty.
      num_tokens: how many tokens to write at most.
      temperature: 0 takes the most probable token each time.
      top_k: draw from so many most probable tokens; 0 for all.
      seed: of the draws.
      max_length: most tokens of prompt and continuation together; 0 means data.seq_length, the length of training.
      num_samples: continuations to draw.
      label: of the document, for router=label; "" is the first label that the run's documents have.

    Raises:
      ConfigError: prompt and continuation are longer than max_length, or there is no such label.
    """
    tokenizer = run.tokenizer
    limit = max_length or run.config.data.seq_length
    prompt_L = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    if len(prompt_L) + num_tokens > limit:
        raise config_lib.ConfigError(
            f"--prompt has {len(prompt_L)} tokens and --num_tokens={num_tokens} more are asked for, together over "
            f"--max_length={limit} (by default the length of its training rows); "
            "shorten the prompt, lower --num_tokens or raise --max_length"
        )
    tokens_BN = generate.generate(
        run.model,
        np.tile(np.asarray(prompt_L, np.int32), (num_samples, 1)),
        jax.random.key(seed),
        num_tokens=num_tokens,
        temperature=temperature,
        top_k=top_k,
        vocab_size=tokenizer.vocab_size,
        label_B=np.full(num_samples, _label_id(run, label), np.int32),
    )
    texts = []
    for tokens_N in np.asarray(tokens_BN).tolist():
        if tokenizer.end_of_text in tokens_N:
            tokens_N = tokens_N[: tokens_N.index(tokenizer.end_of_text)]
        texts.append(tokenizer.decode(tokens_N))
    rows = [
        {"step": run.step, "prompt": prompt, "text": text, "temperature": temperature, "top_k": top_k, "seed": seed}
        for text in texts
    ]
    with (run.workdir / "samples.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return texts


def _label_id(run: Run, label: str) -> int:
    """The id of a label; of "" the first one's."""
    labels = files.read_json(run.workdir / folder.DATA_FILE).get("labels", [])
    if label and label not in labels:
        raise config_lib.ConfigError(
            f"--label={label} is none of the labels of this run's documents; choose one of "
            f"{', '.join(labels[:20]) or 'none: they have no labels'}"
        )
    return labels.index(label) if label else 0


def complete(workdir: pathlib.Path) -> None:
    """Makes what a report wants and the folder lacks: the evaluation and a sample of the newest checkpoint, if any."""
    steps = [int(entry.name) for entry in (workdir / "checkpoints").glob("*") if entry.name.isdigit()]
    evaluation = workdir / "eval.json"
    done = files.read_json(evaluation) if evaluation.exists() else {}
    # An evaluation of a MoE model from before there was "routing" is made again.
    evaluated = done.get("step") == max(steps, default=None) and ("routing" in done or "dropped" not in done)
    samples = workdir / "samples.jsonl"
    sampled = samples.exists() and any(row["step"] == max(steps, default=None) for row in files.read_rows(samples))
    if not steps or (evaluated and sampled):
        return
    run = load(workdir)
    if not evaluated:
        evaluate_run(run)
    if not sampled:
        write_sample(run, "", num_tokens=run.config.data.seq_length // 2, temperature=0.8, top_k=50, seed=0)
