"""Text that a trained run writes: prompts in, continuations out, as they are made.

B rows, S samples, C tokens a call.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from moejax import config as config_lib
from moejax import files
from moejax.analysis import run as run_lib
from moejax.data import corruption, pairs, pipeline, tokenizers
from moejax.models import generate
from moejax.training import folder

INCOMPLETE = "\ufffd"  # what a tokenizer writes for the first bytes of a character


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to write; the fields are the options of `moejax generate`.

    prompts: what documents begin with; may be empty texts. Of an encoder-decoder, texts with the names of sentinels in
      the place of what is to be written: "Thank you <extra_id_0> me to your party <extra_id_1> week".
    num_tokens: how many tokens to write at most.
    num_samples: continuations of each prompt. A sample's draws depend on the seed and on its number alone, so a prompt
      is continued alike in any batch.
    temperature, top_k, top_p: see `generate.sample`.
    stop: a continuation ends before the first of these that occurs in it.
    max_length: most tokens of prompt and continuation together (of an encoder-decoder, of either); 0 means any number
      where the cache does not grow with them, else data.seq_length, the length of training (of what a decoder writes,
      the longer row of the two stacks).
    label: of the documents, for router=label; "" is the first label that the run's documents have.
    """

    prompts: tuple[str, ...]
    num_tokens: int = 100
    num_samples: int = 1
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_length: int = 0
    label: str = ""

    def validate(self) -> None:
        """Raises ConfigError at what can't be, whatever the run."""
        for name, minimum in (
            ("num_tokens", 1),
            ("num_samples", 1),
            ("temperature", 0),
            ("top_k", 0),
            ("seed", 0),
            ("max_length", 0),
        ):
            value = getattr(self, name)
            if not minimum <= value < 2**31:
                raise config_lib.ConfigError(f"--{name}={value} must be {minimum} or more, and finite; change it")
        if not 0 < self.top_p <= 1:
            raise config_lib.ConfigError(f"--top_p={self.top_p} must lie in (0, 1], where 1 keeps all; change it")
        if "" in self.stop:
            raise config_lib.ConfigError("--stop= is empty, so it occurs everywhere; give it a text or leave it out")
        if not self.prompts:
            raise config_lib.ConfigError("there is no prompt; give --prompt or a --prompts=FILE with a line for each")


def request(arguments: argparse.Namespace) -> Request:
    """What the options of `moejax generate` ask for.

    Raises:
      ConfigError: options that can't be, whatever the run; a --prompts file that is not text.
    """
    prompts = [*arguments.prompt]
    if arguments.prompts is not None:
        try:
            lines = arguments.prompts.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            raise config_lib.ConfigError(f"--prompts={arguments.prompts} is not UTF-8 text; convert it") from None
        prompts += lines[:-1] if lines[-1] == "" else lines
    names = {field.name for field in dataclasses.fields(Request)} - {"prompts", "stop"}
    options = {name: getattr(arguments, name) for name in names}
    asked = Request(prompts=tuple(prompts), stop=tuple(arguments.stop), **options)
    asked.validate()
    return asked


def streams(arguments: argparse.Namespace, asked: Request) -> bool:
    """Whether to show tokens as they are made; by default on a terminal, if there is one continuation.

    Raises:
      ConfigError: --stream where it can't be.
    """
    num_rows = len(asked.prompts) * asked.num_samples
    if arguments.stream and (num_rows > 1 or arguments.json):
        why = "--json prints whole lines" if arguments.json else f"{num_rows} continuations would mix"
        raise config_lib.ConfigError(f"--stream shows one continuation as text, but {why}; leave it out")
    if arguments.stream is None:
        return sys.stdout.isatty() and num_rows == 1 and not arguments.json
    return arguments.stream


class Continuation:
    """Text that grows by tokens, until end_of_text or a stop string.

    text: what is certain: up to the last whole character, and not beyond what may become a stop string.
    num_tokens: tokens taken, end_of_text not among them. ended: "end_of_text", "stop", or "length": not by itself.
    """

    def __init__(self, prompt: str, tokenizer: tokenizers.Tokenizer, stop: Sequence[str]):
        self.prompt, self.text, self.num_tokens, self.ended = prompt, "", 0, "length"
        self._tokenizer, self._stop = tokenizer, stop
        # The newest tokens, of which the first few have been read. Those stay in front for one more turn: some
        # tokenizers decode a token at the start of a text in another way.
        self._ids: list[int] = []
        self._num_read = 0
        self._held = ""  # characters that may be the beginning of a stop string

    def to_json(self) -> dict[str, Any]:
        """For a program to read."""
        return {"prompt": self.prompt, "text": self.text, "num_tokens": self.num_tokens, "ended": self.ended}

    def add(self, ids: Iterable[int]) -> str:
        """Takes tokens, up to the end; returns by what `text` has grown."""
        before = len(self.text)
        for token in ids:
            if token == self._tokenizer.end_of_text:
                self.finish()
                if self.ended == "length":
                    self.ended = "end_of_text"
            if self.ended != "length":
                break
            self._ids.append(token)
            self.num_tokens += 1
            fresh = self._fresh()
            if fresh and not fresh.endswith(INCOMPLETE):
                self._ids, self._num_read = self._ids[self._num_read :], len(self._ids) - self._num_read
                self._take(fresh)
        return self.text[before:]

    def finish(self) -> str:
        """No token will come: takes what was held back; returns by what `text` has grown."""
        before = len(self.text)
        if self.ended == "length":
            self._take(self._fresh())
        if self.ended == "length":
            self.text += self._held
        self._ids, self._num_read, self._held = [], 0, ""
        return self.text[before:]

    def _fresh(self) -> str:
        known = self._tokenizer.decode(self._ids[: self._num_read])
        return self._tokenizer.decode(self._ids)[len(known) :]

    def _take(self, fresh: str) -> None:
        self._held += fresh
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if found:
            self.text, self.ended = self.text + self._held[: min(found)], "stop"
            return
        ends = (size for stop in self._stop for size in range(1, len(stop)) if self._held.endswith(stop[:size]))
        certain = len(self._held) - max(ends, default=0)
        self.text, self._held = self.text + self._held[:certain], self._held[certain:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """num_tokens drawn in so many seconds, prompts and compiling apart; a row's cache, for max_length tokens."""

    num_tokens: int
    seconds: float
    cache: generate.CacheSize
    max_length: int

    def __str__(self) -> str:
        num_bytes = self.cache.num_bytes
        size = f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"
        growth = f"for at most {self.max_length:,} tokens" if self.cache.grows else "of constant size"
        return (
            f"{self.num_tokens:,} tokens, {self.num_tokens / self.seconds:,.1f} tokens/s; cache {size} a row, {growth}"
        )


def write(
    run: run_lib.Run, request: Request, *, show: Callable[[str], None] | None = None
) -> tuple[list[Continuation], Cost]:
    """The continuations, all samples of a prompt together; also appended to samples.jsonl.

    Args:
      run: the trained run.
      request: what to write.
      show: gets each piece of the first continuation once it is certain. Tokens are then drawn one by one, else in
        chunks.

    Raises:
      ConfigError: a prompt and its continuation are longer than max_length, or there is no such label.
    """
    tokenizer = run.tokenizer
    prompts = [_encode(run, prompt) for prompt in request.prompts]
    _check_length(run, prompts, request)
    number_B = np.tile(np.arange(request.num_samples), len(prompts))
    key = jax.random.key(request.seed)
    writer = generate.Writer(
        run.model,
        [prompt for prompt in prompts for _ in range(request.num_samples)],
        jax.vmap(lambda number: jax.random.fold_in(key, number))(number_B),
        num_tokens=request.num_tokens,
        settings=generate.Settings(request.temperature, request.top_k, request.top_p),
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        labels_B=np.full(len(number_B), _label_id(run, request.label), np.int32),
        start=tokenizer.pad,  # as `data.corruption` has it
    )
    texts = [Continuation(p, tokenizer, request.stop) for p in request.prompts for _ in range(request.num_samples)]
    begin = time.perf_counter()
    while not writer.done().all():
        tokens_BC = writer.advance(generate.CHUNK if show is None else 1)
        for text, tokens_C in zip(texts, tokens_BC.tolist(), strict=True):
            piece = text.add(tokens_C)
            if show is not None and text is texts[0]:
                show(piece)
        writer.stop(np.array([text.ended != "length" for text in texts]))
    seconds = time.perf_counter() - begin
    for text in texts:
        piece = text.finish()
        if show is not None and text is texts[0]:
            show(piece)
    _keep(run, request, texts)
    return texts, Cost(
        num_tokens=sum(text.num_tokens for text in texts),
        seconds=seconds,
        cache=generate.cache_size(run.model, writer.max_length),
        max_length=writer.max_length,
    )


def _encode(run: run_lib.Run, prompt: str) -> list[int]:
    """What the model reads: a beginning after the token that begins a document; inputs and the token that ends them.

    Raises:
      ConfigError: a sentinel that the tokenizer has not, or experts that need all tokens of a group.
    """
    tokenizer, model = run.tokenizer, run.config.model
    if not model.has_encoder:
        return [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    if not _can_write(model):
        raise config_lib.ConfigError(
            f"--workdir={run.workdir} has model.moe.router={model.moe.router}, whose experts choose among all tokens "
            "of a group: it can't write; name a run with another router"
        )
    ids: list[int] = []
    for place, piece in enumerate(re.split(r"<extra_id_(\d+)>", prompt)):
        if place % 2 == 0:
            ids += tokenizer.encode(piece)
        elif int(piece) < tokenizer.num_sentinels:
            ids.append(tokenizer.first_sentinel - int(piece))
        else:
            raise config_lib.ConfigError(
                f"--prompt has <extra_id_{piece}>, and the tokenizer has {tokenizer.num_sentinels} sentinels; "
                "number them from 0"
            )
    return [*ids, tokenizer.end_of_text]


def _can_write(model: config_lib.ModelConfig) -> bool:
    """Whether a token's experts can be chosen before later tokens are there."""
    return not model.has_experts or config_lib.ROUTERS[model.moe.router].causal


def _check_length(run: run_lib.Run, prompts: list[list[int]], request: Request) -> None:
    """Refuses what is longer than the cache may get."""
    limit, what = request.max_length, "--max_length"
    if not limit:
        if not generate.cache_size(run.model, 1).grows:
            return
        limit, what = run.config.data.seq_length, "data.seq_length, the rows that attention was trained on,"
    longest = max(range(len(prompts)), key=lambda place: len(prompts[place]))
    length = len(prompts[longest])
    which = "--prompt" if len(prompts) == 1 else f"prompt {longest + 1} of {len(prompts)}"
    asked = f"{which} has {length} tokens and --num_tokens={request.num_tokens} more are asked for"
    remedy = "shorten the prompt, lower --num_tokens or raise --max_length"
    if run.config.model.has_encoder:
        # a decoder may go on beyond its own rows, as far as the longer ones of the two stacks
        written = request.max_length or max(corruption.row_lengths(run.config.data))
        if length > limit:
            line = f"{which} has {length} tokens, over {what}={limit}; shorten the prompt or raise --max_length"
            raise config_lib.ConfigError(line)
        if request.num_tokens > written:
            of_rows = "" if request.max_length else ", the longer of data.seq_length and the decoder's row"
            raise config_lib.ConfigError(
                f"--num_tokens={request.num_tokens} is over {written}{of_rows}; lower it or raise --max_length"
            )
    elif length + request.num_tokens > limit:
        raise config_lib.ConfigError(f"{asked}, together over {what}={limit}; {remedy}")


def _label_id(run: run_lib.Run, label: str) -> int:
    """The id of a label; of "" the first one's."""
    labels = files.read_json(run.workdir / folder.DATA_FILE).get("labels", [])
    if label and label not in labels:
        raise config_lib.ConfigError(
            f"--label={label} is none of the labels of this run's documents; choose one of "
            f"{', '.join(labels[:20]) or 'none: they have no labels'}"
        )
    return labels.index(label) if label else 0


def _keep(run: run_lib.Run, request: Request, texts: list[Continuation]) -> None:
    settings = {name: getattr(request, name) for name in ("temperature", "top_k", "top_p", "seed")}
    rows = [{"step": run.step, "prompt": text.prompt, "text": text.text, **settings} for text in texts]
    with (run.workdir / "samples.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def complete(workdir: pathlib.Path) -> None:
    """Makes what a report wants and the folder lacks: the evaluation and a sample of the newest checkpoint, if any.

    No sample of a model that can't write, or of pairs whose held-out inputs are all longer than the encoder.
    """
    steps = [int(entry.name) for entry in (workdir / "checkpoints").glob("*") if entry.name.isdigit()]
    evaluation = workdir / "eval.json"
    done = files.read_json(evaluation) if evaluation.exists() else {}
    # An evaluation of a MoE model from before there was "routing" is made again.
    evaluated = done.get("step") == max(steps, default=None) and ("routing" in done or "dropped" not in done)
    samples = workdir / "samples.jsonl"
    sampled = samples.exists() and any(row["step"] == max(steps, default=None) for row in files.read_rows(samples))
    if not steps or (evaluated and sampled):
        return
    run = run_lib.load(workdir)
    if not evaluated:
        run_lib.evaluate_run(run)
    asked = None if sampled or not _can_write(run.config.model) else _sample(run)
    if asked:
        write(run, asked)


def _sample(run: run_lib.Run) -> Request | None:
    """What a report's sample is of: a new text, or the first held-out input that the encoder has slots for."""
    data = run.config.data
    if not run.config.model.has_encoder:
        return Request(prompts=("",), num_tokens=data.seq_length // 2)
    inputs_length, targets_length = corruption.row_lengths(data)
    if data.objective != "text_to_text":
        return Request(prompts=("<extra_id_0>",), num_tokens=targets_length)
    held_out = pipeline.open_texts(data).validation
    for pair in map(held_out.__getitem__, range(len(held_out))):
        if isinstance(pair, pairs.Pair) and pair.source.strip() and len(_encode(run, pair.source)) <= inputs_length:
            return Request(prompts=(pair.source,), num_tokens=targets_length)
    return None
