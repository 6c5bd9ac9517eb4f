"""Documents in files of tf.train.Example records, ArrayRecord and TFRecord, read without TensorFlow."""

import functools
import struct
from typing import Any

import google_crc32c
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory, text_format

from moejax import config as config_lib
from moejax.data import storage

# --- tf.train.Example ----------------------------------------------------------------------------------------------


# What is read of https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example/example.proto; the parser
# steps over numbers in fields beside the text: integers stay an Int64List's bytes until a label is taken from them. A
# package of its own, so that it can't clash with TensorFlow's.
_EXAMPLE = """
  name: "example.proto"  package: "moejax"  syntax: "proto3"
  message_type {
    name: "Example"
    field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".moejax.Features" }
  }
  message_type {
    name: "Features"  # a map is a repeated message of key and value
    field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".moejax.Features.Entry" }
    nested_type {
      name: "Entry"
      field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
      field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".moejax.Feature" }
    }
  }
  message_type {
    name: "Feature"
    field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".moejax.BytesList" }
    field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type: TYPE_BYTES }
  }
  message_type {
    name: "BytesList"
    field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES }
  }
  message_type {
    name: "Int64List"
    field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 }
  }
"""


def _message_classes() -> tuple[Any, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    names = ("moejax.Example", "moejax.Int64List")
    example, int64_list = (message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names)
    return example, int64_list


_Example, _Int64List = _message_classes()


class _Examples:
    """The documents of a file of Examples, whatever the file's form."""

    file: storage.File
    num_skipped = 0
    _text_field: str
    _label_field: str

    def text(self, i: int) -> str:
        return self._string(self._features(i), i, self._text_field, "text")

    def labelled(self, i: int) -> tuple[str, str]:
        row = self._features(i)
        return self._string(row, i, self._text_field, "text"), self._string(row, i, self._label_field, "label")

    def _record(self, i: int) -> bytes:
        raise NotImplementedError

    def _features(self, i: int) -> dict[str, Any]:
        """By name. Raises config.ConfigError if the record is no Example."""
        record = self._record(i)
        try:
            return {entry.key: entry.value for entry in _Example.FromString(record).features.feature}
        except message.DecodeError:
            raise storage.refusal(self.file, f"record {i} is no tf.train.Example", "name files of Examples") from None

    def _string(self, features: dict[str, Any], i: int, field: str, role: str) -> str:
        """The text or the label, which must be one string in UTF-8; a label may be an integer."""
        if field not in features:
            raise storage.no_field(self.file, f"record {i}", field, features, role)
        values = list(features[field].bytes_list.value)
        if role == "label":
            values += [str(number).encode() for number in _Int64List.FromString(features[field].int64_list).value]
        if len(values) != 1:
            what = f"record {i} holds {len(values)} {role}s in the field {field!r}, which must hold one"
            raise storage.refusal(self.file, what, f"name another in {storage.SETTINGS[role]}")
        return storage.decode(self.file, f"record {i}", values[0])


# --- ArrayRecord ---------------------------------------------------------------------------------------------------


class ArrayRecord(_Examples):
    """An ArrayRecord file of Examples; see `array_record_reader`."""

    def __init__(self, file: storage.File, text_field: str, label_field: str = ""):
        """Raises config.ConfigError if the file is cut short, or is no ArrayRecord file."""
        self.file = file
        self._text_field, self._label_field = text_field, label_field
        self._num_records = array_record_reader(file).num_records()

    def __len__(self) -> int:
        return self._num_records

    def _record(self, i: int) -> bytes:
        return read(self.file, i)


def read(file: storage.File, i: int, remedy: str = "fetch the file again") -> bytes:
    """Record i of an ArrayRecord file.

    Raises:
      config.ConfigError: the file is damaged; `remedy` ends the line.
    """
    reader = array_record_reader(file)
    try:
        return reader.read(i, i + 1)[0]  # as a range: a list of one takes time in proportion to the file's records
    except (RuntimeError, IndexError) as error:
        raise storage.refusal(file, f"record {i} is damaged ({storage.one_line(error)})", remedy) from None


@functools.lru_cache(maxsize=storage.MAX_OPEN)
def array_record_reader(file: storage.File) -> array_record_module.ArrayRecordReader:
    """The library's reader of an ArrayRecord file (https://github.com/google/array_record), for any thread.

    The records have an index of their own at the file's end. A remote file is read in place on gs://, which the library
    can do, else from a copy in the cache folder.

    Raises:
      config.ConfigError: the file is cut short, or is no ArrayRecord file.
    """
    readable = file if file.is_local or file.path.startswith("gs://") else storage.local_copy(file)
    # Reading ahead would fetch megabytes for every record read at random.
    options = "readahead_buffer_size:0"
    reader = array_record_module.ArrayRecordReader(readable.path, options=options, file_reader_buffer_size=2**15)
    if not reader.ok():
        what = "is no whole ArrayRecord file: the index at its end is missing or damaged, so none of its documents are "
        raise storage.refusal(file, f"{what}readable")
    return reader


# --- TFRecord ------------------------------------------------------------------------------------------------------

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_HEAD = _LENGTH.size + _CRC.size


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and offset as in TFRecord files, so that a CRC of data that holds CRCs is still one."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class TfRecord(_Examples):
    """A TFRecord file: each record is its length (8 bytes), a CRC of that, the payload, and a CRC of that.

    The format has no index: one is made from the lengths, in a pass over the file, and cached. So a cut or a damaged
    length shows when the file is opened; the CRC of a payload is checked whenever it is read.
    """

    def __init__(self, file: storage.File, text_field: str, label_field: str = ""):
        """Raises config.ConfigError if the file is cut short, damaged, or no TFRecord file."""
        self.file = file
        self._text_field, self._label_field = text_field, label_field
        self._bounds = storage.index(file, "tfrecord", lambda: (_record_bounds(file), b""))

    def __len__(self) -> int:
        return self._bounds.num_ints - 1

    def _record(self, i: int) -> bytes:
        start, stop = self._bounds.ints(i, 2).tolist()
        record = storage.read(self.file, start, stop - start)
        payload = record[_HEAD : -_CRC.size]
        (crc,) = _CRC.unpack(record[-_CRC.size :])
        if masked_crc(payload) != crc:
            raise storage.refusal(self.file, f"record {i} is damaged: its CRC does not match")
        return payload


def _record_bounds(file: storage.File) -> np.ndarray:
    """int64 [num_records + 1]: record i is the bytes bounds[i] to bounds[i + 1]."""
    bounds = [0]
    position = start = 0  # of the next record; of the block
    block = b""
    while position < file.size:
        at = position - start
        if at + _HEAD > len(block):  # in order, and whole blocks: a request a record would take hours
            start, at = position, 0
            block = storage.read(file, start, min(storage.BLOCK, file.size - start))
        if len(block) < _HEAD:
            raise _ends_inside(file, len(bounds) - 1)
        length, crc = _LENGTH.unpack_from(block, at)[0], _CRC.unpack_from(block, at + _LENGTH.size)[0]
        if masked_crc(block[at : at + _LENGTH.size]) != crc:
            num = len(bounds) - 1
            if num == 0:
                raise storage.refusal(
                    file,
                    "is no TFRecord file, or its first record is damaged: the CRC of record 0's length does not match",
                    "fetch it again, or decompress it",
                )
            raise storage.refusal(
                file,
                f"record {num} is damaged: the CRC of its length does not match "
                f"({num} documents before it are readable)",
            )
        position += _HEAD + length + _CRC.size
        if position > file.size:
            raise _ends_inside(file, len(bounds) - 1)
        bounds.append(position)
    return np.array(bounds, np.int64)


def _ends_inside(file: storage.File, num: int) -> config_lib.ConfigError:
    return storage.refusal(file, f"ends inside record {num} ({num} documents before it are readable)")
