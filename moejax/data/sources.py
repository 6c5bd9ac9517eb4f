"""Sources: random-access sequences of text documents out of files, local or remote, in the forms people have C4 in."""

import functools
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import NamedTuple, Protocol

import numpy as np
import tqdm

from moejax import config as config_lib
from moejax.data import cache, lines, records, storage, tables, zipped

TEXT_SUFFIXES = (".txt", ".md", ".text")
FOLDER_SUFFIXES = (".txt", ".md")  # a folder stands for these of its files
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4")  # never text
_BEGINNING = 2**16  # bytes of a file that its fingerprint covers
_NUM_RECENT = 256  # records whose label is likely to be asked for soon after their text
_NUM_OPENERS = 16  # files opened at a time: opening waits for a disk or a network


class Source(Protocol):
    """Documents in a fixed order. It can be pickled and read from any thread."""

    @property
    def num_bytes(self) -> int:
        """Of the files, compressed as they are: a gauge of how large the corpus is."""
        ...

    @property
    def num_skipped(self) -> int:
        """Entries left out: blank pieces of text files."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the files' names, sizes and first bytes, not of their folders, and of the text field and the label."""
        ...

    @property
    def paths(self) -> frozenset[str]:
        """Of the files."""
        ...

    @property
    def has_labels(self) -> bool:
        """Whether every document has one."""
        ...

    def label(self, index: int, /) -> str | None:
        """What a document is labelled with; None where documents have no labels. Raises as `__getitem__` does."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, index: int, /) -> str:
        """The text of a document, which may be blank; -1 is the last one.

        Raises:
          IndexError: there is no such document.
          config.ConfigError: the document is damaged, or holds no such text; the line says which, and the remedy.
        """
        ...


class Shard(Protocol):
    """The documents of one file."""

    file: storage.File
    num_skipped: int

    def __init__(self, file: storage.File, text_field: str, label_field: str = ""): ...
    def __len__(self) -> int: ...
    def text(self, i: int) -> str: ...

    def labelled(self, i: int) -> tuple[str, str]:
        """The text and the label; not to be called without a label field."""
        ...


def open_source(
    spec: str, *, split: str = "train", text_field: str = "text", label: str = "", tfds_dir: str = ""
) -> Source:
    """The documents that a spec names.

    - files:PATTERN[,PATTERN...]: paths and glob patterns, local or with a protocol (gs://, s3://, hf://, ...). Files
      come in the order of the patterns, and by name within one; a file comes once. What a file holds is told by its
      name: ...array_record..., ...tfrecord..., .json, .jsonl, .ndjson (one object a line), these with .gz, .parquet,
      or text: .txt, .md, .text, and any other file that is named without a wildcard. A folder stands for its *.txt and
      *.md files at any depth.
    - tfds:NAME[/CONFIG][:VERSION]: a data set as TensorFlow Datasets prepares it, without a version the highest that
      is there. If it is there in both forms, the ArrayRecord files are read.

    Args:
      spec: as above.
      split: of a tfds: data set; `files:` has none, and reads all its files.
      text_field: which field, key or column of a record is the text; text files have none.
      label: field:NAME, that field of a record, or folder, the name of the folder that a file lies in; "" for none.
      tfds_dir: the folder of the data sets; "" is $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
      config.ConfigError: nothing is there, or not all of it, or a file is damaged in a way that shows at once.
    """
    scheme, _, rest = spec.partition(":")
    match scheme:
        case "files":
            files = _files(rest)
        case "tfds":
            files = _tfds_shards(_parse_tfds(spec), split, tfds_dir)
        case _:
            raise config_lib.ConfigError(
                f"data.source={spec} is no source of files; write files:PATTERN or tfds:NAME/CONFIG:VERSION"
            )
    label_field = label.removeprefix("field:") if label.startswith("field:") else ""
    return _Files(_open_all(files, text_field, label_field), text_field, label)


def splits(spec: str, *, tfds_dir: str = "") -> tuple[str, ...]:
    """The splits that the folder of a tfds: spec holds, by name; () for any other spec, which has none."""
    if not spec.startswith("tfds:"):
        return ()
    return tuple(sorted({shard.split for shard in _tfds_folder(_parse_tfds(spec), tfds_dir)[1]}))


class _Files(Sequence[str]):
    """The documents of shards, one shard after another."""

    def __init__(self, shards: Sequence[Shard], text_field: str, label: str):
        self._shards, self._label = shards, label
        self._starts = np.cumsum([0, *map(len, shards)])
        self.num_bytes = sum(shard.file.size for shard in shards)
        self.num_skipped = sum(shard.num_skipped for shard in shards)
        self.paths = frozenset(shard.file.path for shard in shards)
        files = (part for shard in shards for part in (shard.file.name, str(shard.file.size)))
        labels = [label, *(shard.file.folder for shard in shards if label == "folder")] if label else []
        self.fingerprint = cache.digest([text_field, *files, *_beginnings(shards), *labels])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> str:
        shard, i = self._place(index)
        return _labelled(shard, i)[0] if self._label.startswith("field:") else shard.text(i)

    @property
    def has_labels(self) -> bool:
        return bool(self._label)

    def label(self, index: int) -> str | None:
        if not self._label:
            return None
        shard, i = self._place(index)
        return shard.file.folder if self._label == "folder" else _labelled(shard, i)[1]

    def _place(self, index: int) -> tuple[Shard, int]:
        index = range(len(self))[index]
        shard = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._shards[shard], index - int(self._starts[shard])


@functools.lru_cache(maxsize=_NUM_RECENT)  # a row's texts are asked for, then their labels: records are read once
def _labelled(shard: Shard, i: int) -> tuple[str, str]:
    return shard.labelled(i)


def _beginnings(shards: Sequence[Shard]) -> Iterator[str]:
    """The first bytes of every file, as a digest: files of one name and size may still differ."""
    with futures.ThreadPoolExecutor(_NUM_OPENERS) as pool:
        heads = pool.map(lambda shard: storage.read(shard.file, 0, min(shard.file.size, _BEGINNING)), shards)
        yield from (hashlib.blake2b(head, digest_size=16).hexdigest() for head in heads)


def _open_all(files: Sequence[tuple[storage.File, type[Shard]]], text_field: str, label_field: str) -> list[Shard]:
    """Opens the files, several at a time; the error raised is that of the first file that has one."""
    shards = []
    with futures.ThreadPoolExecutor(_NUM_OPENERS) as pool:
        try:
            opened = pool.map(lambda found: _open_shard(found[0], found[1], text_field, label_field), files)
            # Making the indices of a large corpus for the first time reads all of it: then there is a bar.
            for shard in tqdm.tqdm(opened, "opening", len(files), unit=" files", delay=5, leave=False):
                shards.append(shard)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if not any(map(len, shards)):
        names = ", ".join(shard.file.path for shard in shards[:3]) + (", ..." if len(shards) > 3 else "")
        raise config_lib.ConfigError(
            f"data.source: {len(shards)} files hold no document, all of them empty ({names}); give files with text"
        )
    return shards


def _open_shard(file: storage.File, form: type[Shard], text_field: str, label_field: str) -> Shard:
    if file.size == 0 and form is not lines.Text:
        raise storage.refusal(file, "is empty (0 bytes)", "fetch the file again, or leave it out")
    return form(file, text_field, label_field)


# --- files: --------------------------------------------------------------------------------------------------------


def _files(patterns: str) -> list[tuple[storage.File, type[Shard]]]:
    """The files of comma-separated patterns, each once, with the class that reads it."""
    found: dict[storage.File, type[Shard]] = {}
    for pattern in patterns.split(","):
        for file, form in _matches(pattern.strip()):
            found.setdefault(file, form)
    return list(found.items())


def _matches(pattern: str) -> list[tuple[storage.File, type[Shard]]]:
    if not pattern:
        raise config_lib.ConfigError("data.source=files: has an empty pattern; write files:PATTERN[,PATTERN...]")
    if (inside := storage.walk(pattern)) is not None:
        wanted = [file for file in inside if file.name.lower().endswith(FOLDER_SUFFIXES)]
        if not wanted:
            raise config_lib.ConfigError(
                f"data.source: the folder {pattern} holds no {' or '.join(f'*{suffix}' for suffix in FOLDER_SUFFIXES)} "
                "file at any depth; name another folder, or its files by a pattern"
            )
        return [(file, lines.Text) for file in wanted]
    files = storage.find(pattern)
    if not files:
        raise config_lib.ConfigError(
            f"data.source: no file matches {pattern} (seen from {os.getcwd()}); name files or folders that exist"
        )
    is_named = len(files) == 1 and (not glob.has_magic(pattern) or files[0].path.endswith(pattern))
    return [(file, _form(file, is_named)) for file in files]


def _form(file: storage.File, is_named: bool) -> type[Shard]:
    """The class that reads a file, by its name."""
    name = file.name.lower()
    if "array_record" in name or "arrayrecord" in name:
        return records.ArrayRecord
    if "tfrecord" in name:
        return records.TfRecord
    if name.endswith(JSON_SUFFIXES):
        return lines.JsonLines
    if name.endswith(tuple(f"{suffix}.gz" for suffix in JSON_SUFFIXES)):
        return zipped.GzipJsonLines
    if name.endswith(".parquet"):
        return tables.Parquet
    if name.endswith(TEXT_SUFFIXES) or (is_named and not name.endswith(_COMPRESSED)):
        return lines.Text
    raise storage.refusal(
        file,
        "is of no known form: a name has array_record or tfrecord in it, or ends in "
        f"{', '.join(JSON_SUFFIXES)} (or these with .gz), .parquet, {', '.join(TEXT_SUFFIXES)}",
        "rename it, or narrow the pattern",
    )


# --- tfds: ---------------------------------------------------------------------------------------------------------

_SPEC = re.compile(r"tfds:(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# c4-train.array_record-00003-of-00008. A split may hold dashes (c4/multilingual has bg-Latn-validation), a data set's
# name may not. The prefix need not be the name that the folder has.
_SHARD = re.compile(
    r"(?P<prefix>[^-]+)-(?P<split>.+)\.(?P<form>array_record|tfrecord)-(?P<index>\d{5,})-of-(?P<total>\d{5,})"
)


class _TfdsShard(NamedTuple):
    file: storage.File
    prefix: str
    split: str
    form: str
    index: int
    total: int


def _parse_tfds(spec: str) -> re.Match[str]:
    if (match := _SPEC.fullmatch(spec)) is None:
        raise config_lib.ConfigError(
            f"data.source={spec} is no data set's name; write tfds:NAME[/CONFIG][:VERSION], such as tfds:c4/en:3.1.0"
        )
    return match


def _tfds_folder(spec: re.Match[str], tfds_dir: str) -> tuple[str, list[_TfdsShard]]:
    """The folder of a data set's version, and all shards in it."""
    root = tfds_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    parent = f"{root.rstrip('/')}/{spec['name']}"
    folders, _ = storage.contents(parent)
    versions = [name for name in folders if _VERSION.fullmatch(name)]
    version = spec["version"] or max(versions, key=lambda name: [*map(int, name.split("."))], default="")
    if version not in versions:
        there = f"holds {', '.join(folders)}" if folders else "is no folder, or an empty one"
        wanted = f"version {spec['version']}" if spec["version"] else "version"
        raise config_lib.ConfigError(
            f"data.source={spec[0]}: no {wanted} in {parent}, which {there}; set data.tfds_dir (or TFDS_DATA_DIR) to "
            "the folder that holds NAME/CONFIG/VERSION, or name what is there"
        )
    folder = f"{parent}/{version}"
    shards = []
    for file in storage.contents(folder)[1]:
        if match := _SHARD.fullmatch(file.name):
            parts = match["prefix"], match["split"], match["form"], int(match["index"]), int(match["total"])
            shards.append(_TfdsShard(file, *parts))
    if not shards:
        raise config_lib.ConfigError(
            f"data.source={spec[0]}: {folder} holds neither *-SPLIT.array_record-*-of-* nor *-SPLIT.tfrecord-*-of-* "
            "files; prepare the data set in one of these forms"
        )
    return folder, shards


def _tfds_shards(spec: re.Match[str], split: str, tfds_dir: str) -> list[tuple[storage.File, type[Shard]]]:
    """The shards of a split in their order, all of them, in the form that is read."""
    folder, shards = _tfds_folder(spec, tfds_dir)
    known = sorted({shard.split for shard in shards})
    if split not in known:
        raise config_lib.ConfigError(
            f"data.source={spec[0]}: {folder} has no split {split}, only {', '.join(known)}; name one of these"
        )
    shards = [shard for shard in shards if shard.split == split]
    form = min(shard.form for shard in shards)  # array_record before tfrecord
    shards = [shard for shard in shards if shard.form == form]
    sets = sorted({f"{shard.prefix}-{split}.{form}-*-of-{shard.total:05d}" for shard in shards})
    if len(sets) > 1:
        raise config_lib.ConfigError(
            f"data.source={spec[0]}: {folder} holds {len(sets)} sets of {split} files, {' and '.join(sets)}; "
            "remove all but one, or name one as files:PATTERN"
        )
    total = shards[0].total
    missing = sorted(set(range(total)) - {shard.index for shard in shards})
    if missing:
        first = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise config_lib.ConfigError(
            f"data.source={spec[0]}: {folder} lacks {len(missing)} of the {total} {split}.{form} files: {first}; "
            "fetch them too"
        )
    reader = records.ArrayRecord if form == "array_record" else records.TfRecord
    return [(shard.file, reader) for shard in sorted(shards, key=lambda shard: shard.index)]
