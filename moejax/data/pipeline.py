"""From a config to batches. Training batch n is a pure function of (documents, config, n).

A batch is a dict of arrays of shape [B, L]: inputs_BL, targets_BL, segment_ids_BL, positions_BL (int32) and
loss_mask_BL (bool), as `packing.row` defines them.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags, logging

from moejax import config as config_lib
from moejax.data import corpora, packing, tokenizers

Batch = dict[str, np.ndarray]

# A batch takes about a millisecond to make, under the interpreter's lock: more threads or a longer queue only hold
# memory (Grain's defaults are 16 threads and 500 batches).
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


@dataclasses.dataclass(frozen=True, eq=False)
class Documents(Sequence[np.ndarray]):
    """Tokenised documents; `documents[i]` is the int32 tokens of document i, without end-of-text."""

    tokens: np.ndarray  # int32, all documents end to end
    offsets: np.ndarray  # int64, document i is tokens[offsets[i] : offsets[i + 1]]
    num_bytes: int  # of the texts in UTF-8

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]  # -1 is the last; IndexError beyond it
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def num_targets(self) -> int:
        """What a model predicts in one pass: every token, and every document's end."""
        return len(self.tokens) + len(self)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """A mean loss over all targets as bits a byte of text, which compares models of different tokenizers."""
        return nats_per_token * self.num_targets / (self.num_bytes * math.log(2))


def tokenize(texts: Sequence[str], tokenizer: tokenizers.Tokenizer) -> Documents:
    """The documents of these texts, in their order."""
    ids = tokenizer.encode_batch(texts)
    lengths = [len(document) for document in ids]
    return Documents(
        tokens=np.fromiter(itertools.chain.from_iterable(ids), np.int32, count=sum(lengths)),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        num_bytes=sum(len(text.encode()) for text in texts),
    )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A corpus ready to train on: no document, and no text, is on both sides."""

    tokenizer: tokenizers.Tokenizer
    train: Documents
    validation: Documents

    def describe(self) -> dict[str, int | str]:
        """Sizes, and a digest of every token of both sides: equal digests mean equal rows."""
        digest = hashlib.blake2b(digest_size=16)
        for documents in (self.train, self.validation):
            digest.update(documents.offsets.tobytes())
            digest.update(documents.tokens.tobytes())
        return {
            "digest": digest.hexdigest(),
            "train_documents": len(self.train),
            "train_tokens": self.train.num_targets,
            "validation_documents": len(self.validation),
            "validation_tokens": self.validation.num_targets,
            "vocab_size": self.tokenizer.vocab_size,
        }


def prepare(config: config_lib.DataConfig, tokenizer: tokenizers.Tokenizer | None = None) -> Prepared:
    """Loads the corpus, splits it and tokenises both sides.

    Args:
      config: source, paths, tokenizer, vocab_size and validation_fraction matter.
      tokenizer: used as it is, e.g. one that a run saved; None builds the one that the config names.

    Raises:
      config.ConfigError: see `corpora.load` and `corpora.split`.
    """
    corpus = corpora.load(config)
    train_indices, validation_indices = corpora.split(corpus, config.validation_fraction)
    train_texts = [corpus[i] for i in train_indices]
    if tokenizer is None:
        tokenizer = tokenizers.build(config, train_texts)
    train = tokenize(train_texts, tokenizer)
    validation = tokenize([corpus[i] for i in validation_indices], tokenizer)
    logging.info("%d tokens to train on, %d held out", len(train.tokens), len(validation.tokens))
    return Prepared(tokenizer, train, validation)


class Rows(Sequence[Batch]):
    """The rows of packed documents, by random access; a Grain source.

    Which documents share a row is fixed by the documents and the seed, which shuffles them before they are packed;
    without one they are packed in their order.
    """

    def __init__(self, documents: Documents, seq_length: int, end_of_text: int, seed: int | None = None):
        order = np.arange(len(documents)) if seed is None else np.random.default_rng(seed).permutation(len(documents))
        lengths = np.diff(documents.offsets)[order] + 1  # a document's end is a target too
        self.pieces = [
            tuple((int(order[document]), start, stop) for document, start, stop in pieces)
            for pieces in packing.best_fit(lengths, seq_length)
        ]
        self._documents = documents
        self._seq_length = seq_length
        self._end_of_text = end_of_text

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> Batch:
        return packing.row(self.pieces[index], self._documents, self._seq_length, self._end_of_text)


def train_dataset(prepared: Prepared, config: config_lib.DataConfig) -> grain.MapDataset[Batch]:
    """All training batches, without end: `dataset[n]` is batch n.

    The rows are read in epochs, each of them every row once in an order of its own; a batch may span two epochs.
    """
    rows = Rows(prepared.train, config.seq_length, prepared.tokenizer.end_of_text, config.seed)
    dataset = grain.MapDataset.source(rows).seed(config.seed).shuffle().repeat()
    return dataset.batch(config.batch_size, batch_fn=packing.batch)


def train_batches(
    prepared: Prepared, config: config_lib.DataConfig, start_step: int = 0
) -> grain.DatasetIterator[Batch]:
    """Training batches from batch `start_step` on, without end, whatever `data.num_workers` is.

    Call `close()` on the iterator to stop its workers at once; else they stop with the process.
    """
    dataset = train_dataset(prepared, config)[start_step:].to_iter_dataset(_READ_OPTIONS)
    if config.num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its own flags when it starts workers, from any program
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.num_workers))
    return iter(dataset)


def validation_batches(prepared: Prepared, config: config_lib.DataConfig, num_batches: int = 0) -> Iterator[Batch]:
    """The held-out documents, each once, in a fixed order; the last batch is filled with rows of padding.

    Args:
      prepared: whose validation side is read.
      config: seq_length and batch_size matter.
      num_batches: stop after so many; 0 reads all.
    """
    end_of_text = prepared.tokenizer.end_of_text
    rows = Rows(prepared.validation, config.seq_length, end_of_text)
    empty = packing.row((), prepared.validation, config.seq_length, end_of_text)
    starts = range(0, len(rows), config.batch_size)
    for start in starts[: num_batches or None]:
        group = [rows[i] for i in range(start, min(start + config.batch_size, len(rows)))]
        yield packing.batch(group + [empty] * (config.batch_size - len(group)))
