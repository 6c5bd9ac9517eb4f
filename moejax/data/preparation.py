"""Tokenising a corpus once into a prepared folder (`prepared`), by any number of processes, each its shards.

Every shard is a pure function of the corpus and the settings. It is written beside its place and renamed when it is
whole, then its .json is written, then, by whoever finishes last, the manifest: so a run that was killed goes on with
the shards that have no .json, and ends with the same bytes.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import sys
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from moejax import config as config_lib
from moejax import files
from moejax.data import objectives, packing, pipeline, prepared, sources, tokenizers

PLAN = "plan.json"
SHARD_BYTES = 2**28  # of source files a shard, where the number of shards is not given
_CHUNK = 1024  # documents tokenised at a time
_PARTIAL = re.compile(r"\.(plan|tokenizer|manifest|train-|validation-).*\.[0-9a-f]{32}")  # as `files.write` names them
# Recorded, but free to change when a call goes on: digests of the corpus and of the tokenizer say what they are.
_PLACES = ("data.source", "data.validation_source", "data.tokenizer", "data.vocab_size")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call has done, and what the folder lacks."""

    made: tuple[str, ...]  # names of shards
    missing: tuple[str, ...]  # shards of other processes that are not there yet; none: the manifest is written
    manifest: dict[str, Any] | None


def prepare(
    config: config_lib.DataConfig,
    folder: pathlib.Path,
    *,
    form: str = "documents",
    num_shards: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Outcome:
    """Makes the shards of a prepared folder that are still missing.

    Args:
      config: source, held-out documents and tokenizer; form "rows" also packs by packing, seq_length, seed and
        objective.
      folder: a local folder; made if it is not there.
      form: "documents" (any packing and seq_length can be chosen in training) or "rows" (packed here: training needs
        no memory for the documents' lengths; documents are shuffled and packed within their shard).
      num_shards: of the training documents; 0 takes one for each 256 MB of the source's files.
      part: (i, n): of n processes this is the i-th, and makes shards i, i + n, ...

    Raises:
      config.ConfigError: the source can't be read, or the folder was begun with other settings. No part of a shard or
        manifest is left under its name.
    """
    if form == "rows" and config.packing == "sample":
        raise config_lib.ConfigError(
            "--form=rows cannot hold data.packing=sample, whose rows have no end; use --form=documents"
        )
    if config.objective == "text_to_text":
        raise config_lib.ConfigError(
            "data.objective=text_to_text is not for prepared folders, which hold a text a record; train on the files "
            "themselves"
        )
    if config.label or config.labels:
        raise config_lib.ConfigError(
            f"data.{'label' if config.label else 'labels'} is set and a prepared folder holds no labels; leave it "
            "empty, or train on the files themselves"
        )
    texts = pipeline.open_texts(config)
    num_shards = num_shards or max(1, -(-texts.train.num_bytes // SHARD_BYTES))
    if num_shards > len(texts.train):
        raise config_lib.ConfigError(
            f"--num_shards={num_shards} is more than the {len(texts.train)} documents of data.source; lower it"
        )
    tokenizer = tokenizers.build(config, texts.train)
    if form == "rows":
        objectives.make(config, tokenizer)  # refuses what can't be before anything is written
    plan = _plan(config, texts, tokenizer, form, num_shards)
    _begin(folder, plan, tokenizer)

    jobs = [
        *_jobs("train", texts.train, num_shards, form),
        *_jobs("validation", texts.validation, 1, "documents"),
    ]
    made = []
    mine = [job for place, job in enumerate(jobs) if place % part[1] == part[0] and not job.done(folder)]
    with tqdm.tqdm(total=sum(len(job.indices) for job in mine), unit=" documents", disable=None) as bar:
        for job in mine:
            facts = _write(job, folder, config, tokenizer, bar)
            made.append(job.name)
            tqdm.tqdm.write(
                f"{job.name}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, {facts['blank']:,} blank",
                file=sys.stderr,
            )
    missing = tuple(job.name for job in jobs if not job.done(folder))
    if not missing:
        for split, side in (("train", jobs[:-1]), ("validation", jobs[-1:])):
            if not any(files.read_json(folder / f"{job.name}.json")["documents"] for job in side):
                raise config_lib.ConfigError(
                    f"the {split} documents are all blank, without a token; give data with text"
                )
    return Outcome(tuple(made), missing, None if missing else _finish(folder, plan, jobs))


# --- the folder ----------------------------------------------------------------------------------------------------


def _plan(
    config: config_lib.DataConfig, texts: pipeline.Texts, tokenizer: tokenizers.Tokenizer, form: str, num_shards: int
) -> dict[str, Any]:
    """What decides every byte of the folder."""
    names = ["source", "validation_source", "validation_documents", "tokenizer", "vocab_size"]
    if form == "rows":
        names += prepared.ROW_SETTINGS
    return {
        "version": prepared.VERSION,
        "form": form,
        "num_shards": num_shards,
        "corpus": texts.fingerprint,
        "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest},
        "data": {name: getattr(config, name) for name in names},
    }


def _begin(folder: pathlib.Path, plan: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> None:
    """Writes plan and tokenizer, or checks that they are those of the calls before; many processes may come at once."""
    path = folder / PLAN
    # A call that was killed here, or failed at the first shard, or another process, may have left or be writing these.
    ours = (PLAN, prepared.TOKENIZER)
    others = folder.exists() and any(e.name not in ours and not e.name.startswith(".") for e in folder.iterdir())
    if others and not path.exists():
        raise config_lib.ConfigError(f"--output={folder} holds other files and no {PLAN}; choose an empty folder")
    if not others:
        files.write(path, json.dumps(plan, indent=2) + "\n")
    begun, now = _flat(files.read_json(path)), _flat(plan)
    for name, value in now.items():
        if begun.get(name) != value and name not in _PLACES:
            raise config_lib.ConfigError(
                f"--output={folder} was begun with {name}={begun.get(name)} and now {name}={value}; "
                "set it back, or choose another folder"
            )
    saved = folder / prepared.TOKENIZER
    try:
        if tokenizers.load(saved).digest == tokenizer.digest:
            return
    except (OSError, config_lib.ConfigError):  # missing, or damaged
        pass
    tokenizer.save(saved)


def _clear(folder: pathlib.Path) -> None:
    """Removes what killed calls have left half written, once nothing is to be written any more."""
    for entry in folder.iterdir():
        if _PARTIAL.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


def _flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return flat


def _finish(folder: pathlib.Path, plan: dict[str, Any], jobs: Sequence["_Job"]) -> dict[str, Any]:
    splits: dict[str, list[Any]] = {}
    for job in jobs:
        splits.setdefault(job.split, []).append(files.read_json(folder / f"{job.name}.json"))
    manifest = {**plan, "splits": splits}
    text = json.dumps(manifest, indent=2) + "\n"
    path = folder / prepared.MANIFEST
    if not path.exists() or path.read_text() != text:
        files.write(path, text)
    _clear(folder)
    return manifest


# --- a shard -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Job:
    """A shard to make."""

    split: str
    index: int  # of the shard
    name: str
    texts: sources.Source
    indices: range
    form: str

    def done(self, folder: pathlib.Path) -> bool:
        """Whether the shard is there, whole."""
        record = folder / f"{self.name}.array_record"
        try:
            facts = files.read_json(folder / f"{self.name}.json")
            if self.form == "documents":
                table = np.load(folder / f"{self.name}.sizes.npy", mmap_mode="r")
                if len(table) != facts["documents"]:
                    return False
            return record.stat().st_size == facts["size"]
        except (OSError, ValueError, EOFError, KeyError):
            return False


def _jobs(split: str, texts: sources.Source, count: int, form: str) -> Iterator[_Job]:
    for index in range(count):
        indices = range(index * len(texts) // count, (index + 1) * len(texts) // count)
        yield _Job(split, index, prepared.shard_name(split, index, count), texts, indices, form)


def _write(
    job: _Job, folder: pathlib.Path, config: config_lib.DataConfig, tokenizer: tokenizers.Tokenizer, bar: tqdm.tqdm
) -> dict[str, Any]:
    """Makes a shard; returns what its .json says."""
    path = folder / f"{job.name}.array_record"
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    token_type = prepared.dtype(tokenizer.vocab_size)
    sizes: list[tuple[int, int]] = []
    num_blank = num_records = 0
    try:
        writer = array_record_module.ArrayRecordWriter(str(partial), prepared.WRITER_OPTIONS)
        kept = []
        for tokens, num_bytes in _tokenised(job, tokenizer, bar):
            if not len(tokens):
                num_blank += 1
                continue
            sizes.append((len(tokens), num_bytes))
            if job.form == "rows":
                kept.append(tokens)
            else:
                writer.write(tokens.astype(token_type).tobytes())
                num_records += 1
        if job.form == "rows":
            for streams in _pack(kept, config, tokenizer, job.index):
                writer.write(prepared.encode_row(streams, token_type))
                num_records += 1
        writer.close()
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        partial.replace(path)
    except RuntimeError as error:  # the writer's, e.g. a full disk
        raise OSError(0, " ".join(str(error).split()), str(path)) from None
    finally:
        partial.unlink(missing_ok=True)
    table = np.array(sizes, "<i4").reshape(-1, 2)
    if job.form == "documents":
        _save(folder / f"{job.name}.sizes.npy", table)
    facts = {
        "name": job.name,
        "records": num_records,
        "documents": len(sizes),
        "tokens": int(table[:, 0].sum(dtype=np.int64)),
        "bytes": int(table[:, 1].sum(dtype=np.int64)),
        "blank": num_blank,
        "size": path.stat().st_size,
        "sha256": digest,
    }
    files.write(folder / f"{job.name}.json", json.dumps(facts, indent=2) + "\n")
    return facts


def _tokenised(job: _Job, tokenizer: tokenizers.Tokenizer, bar: tqdm.tqdm) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens, bytes of the text) of each document; none for a blank one."""
    for start in range(job.indices.start, job.indices.stop, _CHUNK):
        chunk = [job.texts[index] for index in range(start, min(start + _CHUNK, job.indices.stop))]
        ids = tokenizer.encode_batch([text if text.strip() else "" for text in chunk])
        for text, document in zip(chunk, ids, strict=True):
            yield np.array(document, np.int32), len(text.encode())
        bar.update(len(chunk))


def _pack(
    tokenised: list[np.ndarray], config: config_lib.DataConfig, tokenizer: tokenizers.Tokenizer, shard: int
) -> Iterator[packing.Streams]:
    lengths = np.array([len(tokens) for tokens in tokenised], np.int64)
    order = pipeline.shuffled(config.seed, shard, len(tokenised))
    packer = pipeline.make_packer(config, tokenised, lengths, objectives.make(config, tokenizer), order)
    assert packer.num_rows is not None
    for row in range(packer.num_rows):
        yield from packer.read([row])


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with partial.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
