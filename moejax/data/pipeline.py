"""From a config to batches. Training batch n is a pure function of (documents, config, n).

It does not depend on how many hosts read it, each its part, nor on the number of workers, nor on where a run stopped:
the state of the pipeline is the step. A batch is a dict of arrays of shape [B, L], as `packing.NextToken.arrays` or
`corruption.row` define them for a row; labels_BL only where documents have labels.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from moejax import config as config_lib
from moejax.data import cache, corpora, documents, objectives, packing, pairs, prepared, randomness, sources, tokenizers
from moejax.data import labels as labels_lib

Batch = packing.Arrays

MAX_IN_MEMORY = 2**31  # bytes of files whose documents may all be read, or tokenised, before the first step
ON_THE_FLY = 2**25  # bytes of files from which on rows that need no lengths are tokenised when they are read
MAX_BEST_FIT = 10**7  # documents; more would take minutes and gigabytes to pack

# A batch takes a millisecond or a few to make, mostly under the interpreter's lock: more threads or a longer queue only
# hold memory (Grain's defaults are 16 threads and 500 batches). Where that is too slow, data.num_workers helps.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


@dataclasses.dataclass(frozen=True)
class Data:
    """A corpus ready to train on: no document, and no text, is on both sides."""

    tokenizer: tokenizers.Tokenizer
    objective: packing.Objective
    train: packing.Packer
    validation: documents.InMemory
    digest: str  # of the tokens; of documents tokenised on the fly, of their files' names, sizes and beginnings
    num_documents: int  # to train on
    num_tokens: int | None  # of them, their ends included; None where nobody has counted
    num_left_out: int | None  # blank documents and entries that can't be read, of both sides; None: not counted
    num_cut: int = 0  # pairs, of both sides, whose input is longer than the encoder
    labels: tuple[str, ...] = ()  # what documents are labelled with; () if they are not, or rows don't carry it
    train_labels: packing.LabelIds | None = None  # by document: place in labels; -1: not there; None: no labels
    validation_labels: packing.LabelIds | None = None

    def describe(self) -> dict[str, Any]:
        """Sizes and the digest, for a run's folder."""
        return {
            "digest": self.digest,
            "train_documents": self.num_documents,
            "train_tokens": self.num_tokens,
            "validation_documents": len(self.validation),
            "validation_tokens": self.validation.num_targets,
            "vocab_size": self.tokenizer.vocab_size,
            "left_out": self.num_left_out,
            "labels": list(self.labels),
        }


def load(config: config_lib.DataConfig, tokenizer: tokenizers.Tokenizer | None = None) -> Data:
    """Opens the corpus, its tokenizer and its packer.

    Held-out documents are always tokenised here, and training documents where the packer needs their lengths, they are
    pairs, whose targets must fit, or few (`ON_THE_FLY`); else they are read and tokenised row by row.

    Args:
      config: the data of a run.
      tokenizer: used as it is, e.g. one that a run saved; None builds the one that the config names.

    Raises:
      config.ConfigError: the data can't be read, or are not what the config says.
    """
    labels_lib.check(config)
    if config.source.startswith("prepared:"):
        return _load_prepared(config, tokenizer)
    texts = open_texts(config)
    if tokenizer is None:
        tokenizer = tokenizers.build(config, texts.train)
    objective = objectives.make(config, tokenizer)
    validation = documents.tokenize(texts.validation, tokenizer)
    _require_documents(len(validation), "held-out", "data.validation_source or data.source")
    num_cut = objectives.check(objective, validation)
    are_pairs = config.objective == "text_to_text"
    if config.packing in ("sample", "pad") and not are_pairs and texts.train.num_bytes > ON_THE_FLY:
        train: documents.OnTheFly | documents.InMemory = documents.OnTheFly(texts.train, tokenizer)
        lengths = num_left_out = None
        digest = cache.digest([texts.fingerprint, tokenizer.digest])
    else:
        why = f"data.packing={config.packing} needs the length of every document"
        remedy = "set data.packing=sample or pad, or tokenise it once with moejax data prepare"
        if are_pairs:
            why, remedy = "data.objective=text_to_text needs the length of every target", "give fewer pairs"
        _check_in_memory(texts.train, why, remedy)
        train = documents.tokenize(texts.train, tokenizer)
        _require_documents(len(train), "training", "data.source")
        lengths = train.lengths
        num_cut += objectives.check(objective, train)
        num_left_out = texts.num_skipped + train.num_blank + validation.num_blank
        digest = documents.digest(train, validation)
    labels = labels_lib.load(config, (texts.train, train), (texts.validation, validation), MAX_IN_MEMORY)
    return Data(
        tokenizer=tokenizer,
        objective=objective,
        train=_train_packer(config, train, lengths, objective),
        validation=validation,
        digest=labels.digest(digest, config),
        num_documents=len(train),
        num_tokens=_num_targets(config, lengths),
        num_left_out=num_left_out,
        num_cut=num_cut,
        labels=labels.names,
        train_labels=labels.train,
        validation_labels=labels.validation,
    )


def _num_targets(config: config_lib.DataConfig, lengths: np.ndarray | None) -> int | None:
    """Tokens and ends that an epoch reads; of documents longer than a row, packing=pad reads one row.

    Of pairs, those of inputs too, whole ones.
    """
    if lengths is None:
        return None
    targets, is_cut = lengths.astype(np.int64) + 1, config.packing == "pad" and config.objective != "text_to_text"
    return int(np.minimum(targets, config.seq_length).sum() if is_cut else targets.sum())


def _require_documents(count: int, which: str, field: str) -> None:
    if not count:
        raise config_lib.ConfigError(f"the {which} documents are all blank, without a token; give {field} with text")


def _load_prepared(config: config_lib.DataConfig, tokenizer: tokenizers.Tokenizer | None) -> Data:
    folder = prepared.open_folder(config.source.removeprefix("prepared:"))
    prepared.check_settings(folder, config, tokenizer)
    objective = objectives.make(config, folder.tokenizer)
    for split in ("train", "validation"):
        _require_documents(folder.total(split, "documents"), split, "data.source")
    num_tokens: int | None = folder.total("train", "tokens") + folder.total("train", "documents")
    if folder.form == "rows":
        train: packing.Packer = folder.rows()
    else:
        stored = folder.stored("train")
        num_tokens = _num_targets(config, stored.lengths)
        train = _train_packer(config, stored, stored.lengths, objective)
    return Data(
        tokenizer=folder.tokenizer,
        objective=objective,
        train=train,
        validation=folder.in_memory("validation", config.validation_documents),
        digest=folder.digest,
        num_documents=folder.total("train", "documents"),
        num_tokens=num_tokens,
        num_left_out=folder.total("train", "blank") + folder.total("validation", "blank"),
    )


# --- texts ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Texts:
    """Both sides of a corpus before it is tokenised."""

    train: sources.Source
    validation: sources.Source
    num_skipped: int

    @property
    def fingerprint(self) -> str:
        """Of both sides."""
        return cache.digest([self.train.fingerprint, self.validation.fingerprint])


def open_texts(config: config_lib.DataConfig) -> Texts:
    """The documents of data.source and those held out.

    These are data.validation_source (of a tfds: data set its split `validation`), else the source's own split
    `validation`, else a share of the documents, chosen by a hash of the text.

    Raises:
      config.ConfigError: a side can't be read, or both read the same file.
    """
    source = _open_source(config, config.source)
    splits = sources.splits(config.source, tfds_dir=config.tfds_dir)
    if config.validation_source:
        try:
            train, held_out = source, _open_source(config, config.validation_source, "validation")
        except config_lib.ConfigError as error:
            raise config_lib.ConfigError(str(error).replace("data.source", "data.validation_source", 1)) from None
    elif "validation" in splits:
        train, held_out = source, _open_source(config, config.source, "validation")
    else:
        _check_in_memory(
            source,
            "to hold out a share of the documents by their hash all of them would be read",
            "name the held-out documents in data.validation_source",
        )
        sides = corpora.split(source, config.validation_fraction)
        train, held_out = (corpora.Subset(source, side) for side in sides)
    if config.validation_source and (config.validation_source == config.source or source.paths & held_out.paths):
        both = next(iter(sorted(source.paths & held_out.paths)), config.source)
        raise config_lib.ConfigError(
            f"data.validation_source={config.validation_source} and data.source both read {both}, so that training "
            "would see the held-out documents; name other files, or leave data.validation_source empty"
        )
    num_skipped = source.num_skipped + (held_out.num_skipped if not isinstance(held_out, corpora.Subset) else 0)
    limit = config.validation_documents
    if limit and len(held_out) > limit:
        held_out = corpora.Subset(held_out, np.arange(limit))
    return Texts(train, held_out, num_skipped)


def _open_source(config: config_lib.DataConfig, spec: str, split: str = "train") -> sources.Source:
    if spec in config_lib.CORPORA:
        return corpora.load(spec)
    if config.objective == "text_to_text":
        fields = {"text_field": config.text_field, "target_field": config.target_field}
        return pairs.open_source(spec, split=split, tfds_dir=config.tfds_dir, **fields)
    return sources.open_source(
        spec, split=split, text_field=config.text_field, label=config.label, tfds_dir=config.tfds_dir
    )


def _check_in_memory(source: sources.Source, why: str, remedy: str) -> None:
    if source.num_bytes > MAX_IN_MEMORY:
        raise config_lib.ConfigError(
            f"data.source has {source.num_bytes / 1e9:.0f} GB of files, over {MAX_IN_MEMORY / 1e9:.0f} GB, and {why}; "
            f"{remedy}"
        )


# --- rows ----------------------------------------------------------------------------------------------------------


def make_packer(
    config: config_lib.DataConfig,
    tokenised: packing.Documents,
    lengths: np.ndarray | None,
    objective: packing.Objective,
    order: np.ndarray,
) -> packing.Packer:
    """The packer that reads every document once an epoch; for packing=sample that is `Concatenate`.

    Args:
      config: packing matters.
      tokenised: the documents.
      lengths: tokens of each; best_fit and concatenate need them.
      objective: what the rows are for.
      order: the documents in the order in which they are packed.
    """
    if config.packing == "pad":
        return packing.Pad(tokenised, objective, order)
    assert lengths is not None
    if config.packing == "best_fit" and len(lengths) > MAX_BEST_FIT:
        raise config_lib.ConfigError(
            f"data.packing=best_fit would search rows for {len(lengths):,} documents, over {MAX_BEST_FIT:,}; set "
            "data.packing=concatenate, or pack in shards with moejax data prepare --form=rows"
        )
    kind = packing.BestFit if config.packing == "best_fit" else packing.Concatenate
    return kind.make(tokenised, lengths, order, objective)


def shuffled(seed: int, index: int, count: int) -> np.ndarray:
    """The order in which `count` documents are packed for training; `index` tells shards apart."""
    return randomness.permutation(seed, "documents", index, count)


def _train_packer(
    config: config_lib.DataConfig,
    tokenised: packing.Documents,
    lengths: np.ndarray | None,
    objective: packing.Objective,
) -> packing.Packer:
    if config.packing == "sample":
        return packing.Sample(tokenised, objective, config.seed)
    return make_packer(config, tokenised, lengths, objective, shuffled(config.seed, 0, len(tokenised)))


def validation_packer(data: Data, config: config_lib.DataConfig) -> packing.Packer:
    """The held-out documents in their order, packed as in training; for packing=sample end to end, each once."""
    held_out = data.validation
    return make_packer(config, held_out, held_out.lengths, data.objective, np.arange(len(held_out)))


# --- batches -------------------------------------------------------------------------------------------------------


class TrainBatches(Sequence[Batch]):
    """Some of `num_parts` equal parts of every training batch; a Grain source. `batches[n]` is those of batch n, any n.

    The rows are read in epochs, each of them every row once in an order of its own; a batch may span two epochs.
    """

    def __init__(self, data: Data, config: config_lib.DataConfig, parts: Sequence[int] = (0,), num_parts: int = 1):
        if config.batch_size % num_parts:
            raise config_lib.ConfigError(
                f"data.batch_size={config.batch_size} does not divide into {num_parts} parts; "
                f"set it to a multiple of {num_parts}"
            )
        self._packer, self._objective, self._labels = data.train, data.objective, data.train_labels
        self._seed = config.seed
        size = config.batch_size // num_parts
        self._batch_size = config.batch_size
        self._places = [place for part in parts for place in range(part * size, (part + 1) * size)]

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, step: int) -> Batch:
        rows = []
        for place in self._places:  # one by one: labels are looked up while records are at hand
            index = step * self._batch_size + place
            (streams,) = self._packer.read([self._row(index)])
            rows.append(self._objective.arrays(streams, index, self._labels))
        return packing.batch(rows)

    def _row(self, index: int) -> int:
        """The row that is read at this place of the endless sequence of rows."""
        num_rows = self._packer.num_rows
        if num_rows is None:
            return index
        epoch, place = divmod(index, num_rows)
        return grain.experimental.index_shuffle(
            place, max_index=num_rows - 1, seed=_epoch_seed(self._seed, epoch), rounds=4
        )


@functools.cache
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(randomness.bits(seed, "rows", epoch, 1)[0]) >> 32


def train_batches(
    data: Data, config: config_lib.DataConfig, start_step: int = 0, *, parts: Sequence[int] = (0,), num_parts: int = 1
) -> grain.DatasetIterator[Batch]:
    """A host's parts of the training batches from batch `start_step` on, without end, whatever data.num_workers is.

    Parts 0, 1, ... num_parts - 1 one after another are the batch that a single host would read. Call `close()` on the
    iterator to stop its workers at once; else they stop with the process.
    """
    source = TrainBatches(data, config, parts, num_parts)
    dataset = grain.MapDataset.source(source)[start_step:].to_iter_dataset(_READ_OPTIONS)
    if config.num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its own flags when it starts workers, from any program
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.num_workers))
    return iter(dataset)


def validation_batches(data: Data, config: config_lib.DataConfig, num_batches: int = 0) -> Iterator[Batch]:
    """The held-out rows, each once, in a fixed order; the last batch is filled with rows of padding.

    Args:
      data: whose validation side is read.
      config: packing and batch_size matter.
      num_batches: stop after so many; 0 reads all.
    """
    packer = validation_packer(data, config)
    assert packer.num_rows is not None
    starts = range(0, packer.num_rows, config.batch_size)
    for start in starts[: num_batches or None]:
        indices = range(start, start + config.batch_size)
        streams = packer.read([index for index in indices if index < packer.num_rows])
        streams += [packing.Streams()] * (config.batch_size - len(streams))
        of_rows = zip(streams, indices, strict=True)
        yield packing.batch([data.objective.arrays(*row, data.validation_labels) for row in of_rows])
