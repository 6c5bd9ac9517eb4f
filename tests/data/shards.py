"""Files of documents in every form that is read, made by other people's writers, and texts that are hard to keep."""

import gzip
import json
import pathlib
import random

import fsspec
import pyarrow as pa
import pytest
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from pyarrow import parquet
from tensorboardX import record_writer

from moejax import config as config_lib
from moejax.data import lines, records, storage, tables, zipped

# Line ends of all kinds, which a reader of lines could split at or rewrite, nothing, and all planes of Unicode.
TEXTS = [
    "plain",
    "",
    "two\nlines\n",
    "two\r\nlines\r\n",
    "a lone\rreturn",
    "separators \u2028 and \u2029 and \x85 and \x0b and \x1e",
    '\ufeffa mark, NUL \0, tab \t, quote " and backslash \\n',
    "naïve café, 日本語, שלום, 👩‍🚀, \U0010ffff",
    " \n ",
    "long " * 40_000,
    "the end",
]


def write(folder: pathlib.Path, form: str, texts, field="text", stem="docs", **fields) -> pathlib.Path:
    """Writes texts, and other fields that all have, in one of the forms of `FORMS`."""
    suffix, writer = FORMS[form]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.{suffix}"
    writer(path, [{"url": f"https://example.com/{i}", **fields, field: text} for i, text in enumerate(texts)])
    return path


def _array_record(path, rows):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(example(row))
    writer.close()


def _tfrecord(path, rows):
    writer = record_writer.RecordWriter(str(path))
    for row in rows:
        writer.write(example(row))
    writer.close()


def _json(path, rows):
    path.write_bytes(json_lines(rows))


def _json_gz(path, rows):
    path.write_bytes(gzip.compress(json_lines(rows)))


def _parquet(path, rows):
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


FORMS = {
    "array_record": ("array_record-00000-of-00001", _array_record),
    "tfrecord": ("tfrecord-00000-of-00001", _tfrecord),
    "json": ("jsonl", _json),
    "gzip": ("json.gz", _json_gz),
    "parquet": ("parquet", _parquet),
}


def json_lines(rows) -> bytes:
    """Half of the rows with escapes, half in UTF-8."""
    return b"".join(json.dumps(row, ensure_ascii=bool(i % 2)).encode() + b"\n" for i, row in enumerate(rows))


def example(row) -> bytes:
    """A tf.train.Example in protobuf's wire format, spelled out: str and bytes are texts, ints are numbers."""
    features = b""
    for key, value in row.items():
        if isinstance(value, int):
            feature = _field(3, b"\x0a" + _varint(1) + _varint(value))  # int64_list, packed
        else:
            values = value if isinstance(value, list) else [value]
            feature = _field(1, b"".join(_field(1, v.encode() if isinstance(v, str) else v) for v in values))
        features += _field(1, _field(1, key.encode()) + _field(2, feature))
    return _field(1, features)


def _field(number, data):
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


def _varint(value):
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def fresh_cache(tmp_path_factory, monkeypatch) -> pathlib.Path:
    """A fixture: a cache folder of the test's own, and nothing on fsspec's memory:// file system."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MOEJAX_CACHE", str(folder))
    fsspec.filesystem("memory").store.clear()
    return folder


def in_memory(path: pathlib.Path, folder: str = "bucket") -> str:
    """The path of a copy on fsspec's memory:// file system."""
    fsspec.filesystem("memory").pipe(f"/{folder}/{path.name}", path.read_bytes())
    return f"memory://{folder}/{path.name}"


def refusal(call, *args, start="data.source", **kwargs) -> str:
    """The message of the ConfigError, which must be one line with a remedy and begin with what is wrong."""
    with pytest.raises(config_lib.ConfigError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(start)
    assert "; " in message
    return message


# --- reading them back ----------------------------------------------------------------------------------------------

READERS = {
    "array_record": records.ArrayRecord,
    "tfrecord": records.TfRecord,
    "json": lines.JsonLines,
    "gzip": zipped.GzipJsonLines,
    "parquet": tables.Parquet,
}


def opened(form, path, field="text"):
    (file,) = storage.find(str(path))
    return READERS[form](file, field)


def texts_of(shard):
    return [shard.text(i) for i in range(len(shard))]


def damaged(folder, name, content):
    """A file of its own for every content: one written over within a clock tick would pass for the one before."""
    path = folder / f"{random.getrandbits(64):x}-{name}"
    path.write_bytes(content)
    return path


def outcome(form, path):
    """The texts, or the message of the one-line refusal."""
    try:
        return texts_of(opened(form, path))
    except ValueError:
        return refusal(lambda: texts_of(opened(form, path)))
