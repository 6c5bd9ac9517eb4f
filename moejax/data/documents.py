"""Tokenised documents, held in memory or tokenised whenever they are read."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from moejax.data import pairs, sources, tokenizers

_CHUNK = 1024  # texts a call of the tokenizer, which spreads them over its threads


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory(Sequence[np.ndarray]):
    """Documents that lie in memory; `documents[i]` is the int32 tokens of document i, without end-of-text."""

    tokens: np.ndarray  # int32, all documents end to end
    offsets: np.ndarray  # int64, document i is tokens[offsets[i] : offsets[i + 1]]
    num_bytes: int  # of the texts in UTF-8; of pairs, of the targets
    num_blank: int = 0  # texts without a token, left out
    indices: np.ndarray | None = None  # int64, of the texts that they are; None: of all
    num_given: int = 0  # tokens that are not predicted: inputs of pairs, and the marks after them

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]  # -1 is the last; IndexError beyond it
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.offsets)

    @property
    def num_targets(self) -> int:
        """What a model predicts in one pass: every token, or those of targets, and every document's end."""
        return len(self.tokens) - self.num_given + len(self)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """A mean loss over all targets as bits a byte of text, which compares models of different tokenizers."""
        return nats_per_token * self.num_targets / (self.num_bytes * math.log(2))


@dataclasses.dataclass(frozen=True)
class OnTheFly(Sequence[np.ndarray]):
    """Documents that are tokenised at every read: nothing to wait for and nothing in memory. A blank one is empty."""

    texts: sources.Source
    tokenizer: tokenizers.Tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> np.ndarray:
        return encode(self.tokenizer, self.texts[index])


def digest(*sides: InMemory) -> str:
    """Of every token of these documents."""
    state = hashlib.blake2b(digest_size=16)
    for side in sides:
        state.update(side.offsets.tobytes())
        state.update(side.tokens.tobytes())
    return state.hexdigest()


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """The int32 tokens of a text, or of a pair (`pairs.join`); none of a blank one."""
    if isinstance(text, pairs.Pair):
        inputs, targets = (encode(tokenizer, side).tolist() for side in (text.source, text.target))
        return np.array(pairs.join(inputs, targets, tokenizer.end_of_text), np.int32)
    return np.array(tokenizer.encode(text) if text.strip() else [], np.int32)


def _encode_batch(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, as `encode` gives them, by all cores."""
    both = [text for text in texts if isinstance(text, pairs.Pair)]
    if not both:
        return tokenizer.encode_batch([text if text.strip() else "" for text in texts])
    sides = ([pair.source for pair in both], [pair.target for pair in both])
    inputs, targets = (_encode_batch(tokenizer, side) for side in sides)
    return [pairs.join(*ids, tokenizer.end_of_text) for ids in zip(inputs, targets, strict=True)]


def tokenize(texts: Iterable[str], tokenizer: tokenizers.Tokenizer) -> InMemory:
    """The documents of these texts, in their order; those without a token are counted and left out."""
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    indices: list[int] = []
    num_bytes = num_seen = num_given = 0
    remaining = iter(texts)
    while chunk := list(itertools.islice(remaining, _CHUNK)):
        ids = _encode_batch(tokenizer, chunk)
        for index, (text, document) in enumerate(zip(chunk, ids, strict=True), start=num_seen):
            if document:
                lengths.append(len(document))
                indices.append(index)
                is_pair = isinstance(text, pairs.Pair)
                num_bytes += len((text.target if is_pair else text).encode())
                num_given += document.index(tokenizer.end_of_text) + 1 if is_pair else 0
        num_seen += len(chunk)
        count = sum(map(len, ids))
        parts.append(np.fromiter(itertools.chain.from_iterable(ids), np.int32, count=count))
    return InMemory(
        tokens=np.concatenate([np.zeros(0, np.int32), *parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        num_bytes=num_bytes,
        num_blank=num_seen - len(indices),
        indices=np.array(indices, np.int64),
        num_given=num_given,
    )
