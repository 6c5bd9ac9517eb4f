"""Documents in a column of Parquet files."""

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import TYPE_CHECKING

import numpy as np

from moejax.data import storage

if TYPE_CHECKING:  # pyarrow takes half a second to import, which only those who read Parquet should wait for
    import pyarrow
    from pyarrow import parquet

MAX_DECODED = 2**26  # bytes of decoded row groups kept by the process, over all files
_INTEGER_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_WANTED = {"text": "strings", "label": "strings or integers"}
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


class Parquet:
    """A column of text in a Parquet file, and one of labels if there is one.

    A document costs its row group, read and decoded whole, unless that is among those decoded last. So reads in order
    are fast, and reads at random as fast as the groups are small.
    """

    num_skipped = 0

    def __init__(self, file: storage.File, text_field: str, label_field: str = ""):
        """Raises config.ConfigError if the file is damaged, or has no such columns of text and labels."""
        self.file = file
        self._text_field, self._label_field = text_field, label_field
        with _opened(file, "is no whole Parquet file, so that none of its documents are readable") as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        _check_column(file, schema, text_field, "text")
        if label_field:
            _check_column(file, schema, label_field, "label")
        self._bounds = np.cumsum([0, *sizes])  # row group g holds rows bounds[g] to bounds[g + 1]

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def text(self, i: int) -> str:
        return self._string(i, self._text_field, "text")

    def labelled(self, i: int) -> tuple[str, str]:
        return self.text(i), self._string(i, self._label_field, "label")

    def _string(self, i: int, field: str, role: str) -> str:
        group = int(np.searchsorted(self._bounds, i, "right")) - 1
        key = (self.file, self._text_field, self._label_field, group)
        column = _recent.get(key, lambda: self._read_group(group)).column(field)
        value = column[i - int(self._bounds[group])]
        if not value.is_valid:
            what = f"record {i} has null in the column {field!r}, which must hold {_WANTED[role]}"
            raise storage.refusal(self.file, what, "mend it or leave the file out")
        if str(value.type) not in _TEXT_TYPES:
            return str(value.as_py())
        return storage.decode(self.file, f"record {i}", value.as_buffer().to_pybytes())

    def _read_group(self, group: int) -> "pyarrow.Table":
        import pyarrow as pa

        first, last = int(self._bounds[group]), int(self._bounds[group + 1]) - 1
        wanted = list({self._text_field, self._label_field} - {""})
        with _opened(self.file, f"is damaged in records {first} to {last}") as opened:
            table = opened.read_row_group(group, columns=wanted)
            return pa.table({name: table.column(name).cast(_plain(table.column(name).type)) for name in wanted})


def _check_column(file: storage.File, schema: "pyarrow.Schema", field: str, role: str) -> None:
    if field not in schema.names:
        raise storage.no_field(file, "", field, schema.names, role)
    kind = str(_plain(schema.field(field).type))
    if kind not in _TEXT_TYPES and not (role == "label" and kind in _INTEGER_TYPES):
        what = f"has {kind} in the column {field!r}, which must hold {_WANTED[role]}"
        raise storage.refusal(file, what, f"name another in {storage.SETTINGS[role]}")


def _plain(kind: "pyarrow.DataType") -> "pyarrow.DataType":
    """The type of what a dictionary holds; any other as it is."""
    import pyarrow as pa

    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind


@contextlib.contextmanager
def _opened(file: storage.File, what: str) -> Iterator["parquet.ParquetFile"]:
    """Whatever pyarrow raises as one line: `what` is wrong with the file."""
    import pyarrow as pa
    from pyarrow import parquet

    with storage.open_binary(file) as stream:
        try:
            # Pages without a checksum, which most writers leave out, are taken as they are.
            with parquet.ParquetFile(stream, page_checksum_verification=True) as opened:
                yield opened
        except (pa.ArrowException, OSError) as error:
            raise storage.refusal(file, f"{what} ({storage.one_line(error)})") from None


class _Recent:
    """The row groups used last, each decoded by one thread while others that want it wait."""

    def __init__(self):
        self._lock = threading.Lock()
        self._groups: collections.OrderedDict[tuple, futures.Future[pyarrow.Table]] = collections.OrderedDict()

    def get(self, key: tuple, decode: Callable[[], "pyarrow.Table"]) -> "pyarrow.Table":
        with self._lock:
            group = self._groups.get(key)
            if mine := group is None:
                group = self._groups[key] = futures.Future()
            self._groups.move_to_end(key)
        if mine:
            try:
                group.set_result(decode())
            except BaseException as error:
                with self._lock:
                    del self._groups[key]
                group.set_exception(error)
            else:
                self._drop_oldest()
        return group.result()

    def _drop_oldest(self) -> None:
        with self._lock:
            sizes = {key: group.result().nbytes for key, group in self._groups.items() if group.done()}
            excess = sum(sizes.values()) - MAX_DECODED
            for key in list(sizes)[:-1]:  # the last one stays, however large
                if excess > 0:
                    excess -= sizes[key]
                    del self._groups[key]


_recent = _Recent()
