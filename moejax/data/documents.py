"""Tokenised documents, held in memory or tokenised whenever they are read."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from moejax.data import sources, tokenizers

_CHUNK = 1024  # texts a call of the tokenizer, which spreads them over its threads


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory(Sequence[np.ndarray]):
    """Documents that lie in memory; `documents[i]` is the int32 tokens of document i, without end-of-text."""

    tokens: np.ndarray  # int32, all documents end to end
    offsets: np.ndarray  # int64, document i is tokens[offsets[i] : offsets[i + 1]]
    num_bytes: int  # of the texts in UTF-8
    num_blank: int = 0  # texts without a token, left out

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
        """What a model predicts in one pass: every token, and every document's end."""
        return len(self.tokens) + len(self)

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


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """The int32 tokens of a text; none of a blank one."""
    return np.array(tokenizer.encode(text) if text.strip() else [], np.int32)


def tokenize(texts: Iterable[str], tokenizer: tokenizers.Tokenizer) -> InMemory:
    """The documents of these texts, in their order; those without a token are counted and left out."""
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    num_bytes = num_blank = 0
    remaining = iter(texts)
    while chunk := list(itertools.islice(remaining, _CHUNK)):
        ids = tokenizer.encode_batch([text if text.strip() else "" for text in chunk])
        for text, document in zip(chunk, ids, strict=True):
            if document:
                lengths.append(len(document))
                num_bytes += len(text.encode())
            else:
                num_blank += 1
        count = sum(map(len, ids))
        parts.append(np.fromiter(itertools.chain.from_iterable(ids), np.int32, count=count))
    return InMemory(
        tokens=np.concatenate([np.zeros(0, np.int32), *parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        num_bytes=num_bytes,
        num_blank=num_blank,
    )
