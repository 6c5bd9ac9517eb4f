"""A prepared folder: a corpus tokenised once, in ArrayRecord shards, and the manifest that says what they hold.

    manifest.json                          what was prepared, with which tokenizer, and every shard with its digest
    tokenizer.json                         the tokenizer itself
    train-00000-of-00004.array_record      a record a document (form "documents") or a packed row (form "rows")
    train-00000-of-00004.json              counts and digests of that shard; here once the shard is whole
    train-00000-of-00004.sizes.npy         form "documents": int32 [documents, 2], tokens and bytes of each
    validation-00000-of-00001...           the held-out documents, always a record a document

A record is little-endian uint16, or uint32 where the vocabulary asks for it: the tokens of a document, or the streams
of a row (`packing`) end to end, headed by their number and lengths as uint32.
"""

import bisect
import dataclasses
import io
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax import config as config_lib
from moejax.data import cache, documents, packing, records, storage, tokenizers

VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMS = ("documents", "rows")
# What rows are made with; a folder of documents can be read with any of these.
ROW_SETTINGS = ("packing", "seq_length", "objective", "noise_density", "mean_span_length", "seed")
WRITER_OPTIONS = "group_size:1"  # every record can be read by itself
_HEADER = np.dtype("<u4")
_AGAIN = "delete it with its .json, and run moejax data prepare again"


def dtype(vocab_size: int) -> np.dtype:
    """Of the tokens in a record."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def shard_name(split: str, index: int, count: int) -> str:
    """The name of a shard's files without their suffix."""
    return f"{split}-{index:05d}-of-{count:05d}"


def encode_row(streams: packing.Streams, token_type: np.dtype) -> bytes:
    """A row's record."""
    lengths = np.array([len(streams), *map(len, streams)], _HEADER)
    return lengths.tobytes() + b"".join(stream.astype(token_type).tobytes() for stream in streams)


def decode_row(record: bytes, token_type: np.dtype) -> packing.Streams:
    """The inverse of `encode_row`."""
    count = int(np.frombuffer(record, _HEADER, count=1)[0])
    lengths = np.frombuffer(record, _HEADER, count=count, offset=_HEADER.itemsize)
    tokens = np.frombuffer(record, token_type, offset=_HEADER.itemsize * (count + 1)).astype(np.int32)
    return packing.Streams(np.split(tokens, np.cumsum(lengths)[:-1]) if count else ())


@dataclasses.dataclass(frozen=True)
class Records(Sequence[bytes]):
    """The records of several ArrayRecord shards, by random access. Picklable, and safe to share between threads."""

    files: tuple[storage.File, ...]
    ends: tuple[int, ...]  # records up to and with each file

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> bytes:
        index = range(len(self))[index]
        shard = bisect.bisect_right(self.ends, index)
        place = index - (self.ends[shard - 1] if shard else 0)
        return records.read(self.files[shard], place, _AGAIN)


@dataclasses.dataclass(frozen=True, eq=False)
class Documents(Sequence[np.ndarray]):
    """The documents of a split, read from the folder; see `packing.Documents`."""

    records: Records
    token_type: np.dtype
    lengths: np.ndarray  # int32, tokens of each
    num_bytes: np.ndarray  # int32, of the text of each

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.frombuffer(self.records[index], self.token_type).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows that were packed when the folder was prepared; see `packing.Packer`."""

    records: Records
    token_type: np.dtype

    @property
    def num_rows(self) -> int:
        return len(self.records)

    def read(self, rows: Sequence[int]) -> list[packing.Streams]:
        return [decode_row(self.records[row], self.token_type) for row in rows]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A prepared folder that is whole."""

    path: str
    manifest: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    files: dict[str, storage.File]  # in it, by name

    @property
    def form(self) -> str:
        """documents or rows."""
        return self.manifest["form"]

    @property
    def digest(self) -> str:
        """Of every token in it."""
        what = [self.manifest[name] for name in ("form", "tokenizer", "splits")]
        return cache.digest([json.dumps(what, sort_keys=True)])

    def total(self, split: str, key: str) -> int:
        """Sum over the shards of a split: documents, tokens, bytes, blank or records."""
        return sum(shard[key] for shard in self.manifest["splits"][split])

    def stored(self, split: str) -> Documents:
        """The documents of a split that has a record a document."""
        shards = self.manifest["splits"][split]
        sizes = [_array(self.files[f"{shard['name']}.sizes.npy"]) for shard in shards]
        lengths, num_bytes = np.concatenate(sizes).T
        return Documents(self._records(split), dtype(self.tokenizer.vocab_size), lengths.copy(), num_bytes.copy())

    def in_memory(self, split: str, limit: int) -> documents.InMemory:
        """The first `limit` documents of a split (0: all), in memory."""
        stored = self.stored(split)
        count = min(limit or len(stored), len(stored))
        return documents.InMemory(
            tokens=np.concatenate([np.zeros(0, np.int32), *(stored[i] for i in range(count))]),
            offsets=np.concatenate([[0], np.cumsum(stored.lengths[:count], dtype=np.int64)]),
            num_bytes=int(stored.num_bytes[:count].sum(dtype=np.int64)),
        )

    def rows(self) -> Rows:
        """The training rows of a folder of that form."""
        return Rows(self._records("train"), dtype(self.tokenizer.vocab_size))

    def _records(self, split: str) -> Records:
        shards = self.manifest["splits"][split]
        files = tuple(self.files[f"{shard['name']}.array_record"] for shard in shards)
        return Records(files, tuple(itertools.accumulate(shard["records"] for shard in shards)))


def open_folder(path: str) -> Folder:
    """Opens a prepared folder, local or remote.

    Raises:
      config.ConfigError: it is none, or is not finished, or a file is missing or has another size.
    """
    there = {file.name: file for file in storage.contents(path)[1]}
    for name in (TOKENIZER, MANIFEST):
        if name not in there:
            what = "is not finished" if TOKENIZER in there else "is no prepared folder"
            raise config_lib.ConfigError(
                f"data.source=prepared:{path} {what} ({name} is missing); "
                f"run moejax data prepare --output={path} to its end"
            )
    try:
        manifest = json.loads(storage.read(there[MANIFEST], 0, there[MANIFEST].size))
        shards = [(split, shard["name"], shard["size"]) for split, made in manifest["splits"].items() for shard in made]
        if manifest["version"] != VERSION:
            raise config_lib.ConfigError(
                f"data.source=prepared:{path} has version {manifest['version']} of the format, and this moejax reads "
                f"{VERSION}; prepare it again"
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, config_lib.ConfigError):
            raise
        raise config_lib.ConfigError(
            f"data.source=prepared:{path}: {MANIFEST} is damaged ({error}); delete it and run moejax data prepare again"
        ) from None
    for split, name, size in shards:
        _check(path, there, f"{name}.array_record", size)
        if split != "train" or manifest["form"] == "documents":
            _check(path, there, f"{name}.sizes.npy")
    local = there[TOKENIZER] if there[TOKENIZER].is_local else storage.local_copy(there[TOKENIZER])
    return Folder(path, manifest, tokenizers.load(pathlib.Path(local.path)), there)


def _check(path: str, there: dict[str, storage.File], name: str, size: int | None = None) -> None:
    if name not in there:
        raise config_lib.ConfigError(f"data.source=prepared:{path}: {name} is missing; run moejax data prepare again")
    if size is not None and there[name].size != size:
        what = f"has {there[name].size:,} bytes where the manifest says {size:,}"
        raise storage.refusal(there[name], what, _AGAIN)


def _array(file: storage.File) -> np.ndarray:
    try:
        return np.load(io.BytesIO(storage.read(file, 0, file.size)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise storage.refusal(file, f"is damaged ({storage.one_line(error)})", _AGAIN) from None


def check_settings(folder: Folder, config: config_lib.DataConfig, run_tokenizer: tokenizers.Tokenizer | None) -> None:
    """Refuses a folder that was made with another tokenizer than the config's, or than the one a run has saved; or
    whose rows were packed in another way."""
    made = folder.manifest["data"]
    wanted = run_tokenizer
    kind = config.tokenizer.partition(":")[0]
    if wanted is None and kind in ("sentencepiece", "hf"):
        wanted = tokenizers.build(config, ())
    if wanted is not None:
        same = wanted.digest == folder.tokenizer.digest
    else:  # gpt2 and bytes are one each; bpe was trained on this corpus
        same = kind == folder.tokenizer.name and (kind != "bpe" or config.vocab_size == made["vocab_size"])
    if not same:
        asked = f"{config.tokenizer} with {config.vocab_size} entries" if kind == "bpe" else config.tokenizer
        whose = "the run's tokenizer" if run_tokenizer else "data.tokenizer"
        raise config_lib.ConfigError(
            f"data.source={config.source} was made with the tokenizer {made['tokenizer']} "
            f"({folder.tokenizer.vocab_size} entries) and {whose} is {asked}; "
            f"set data.tokenizer={made['tokenizer']}, or prepare the corpus with the other one"
        )
    if folder.form == "rows":
        for name in ROW_SETTINGS:
            if name in ("noise_density", "mean_span_length") and config.objective == "next_token":
                continue
            if name != "seed" and getattr(config, name) != made[name]:
                raise config_lib.ConfigError(
                    f"data.{name}={getattr(config, name)} but the rows in {folder.path} were packed with "
                    f"data.{name}={made[name]}; set it so, or prepare the corpus with --form=documents"
                )
