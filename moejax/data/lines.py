"""Documents in files of text: JSON lines, and plain text."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from moejax import config as config_lib
from moejax.data import storage

MAX_TEXT = 2**16  # characters; a longer text file is cut into documents, so that one file can be split

# --- JSON lines ----------------------------------------------------------------------------------------------------

_JSON_SPACE = b" \t\r\n"


class JsonLines:
    """A file of one JSON object a line, blank lines left out. Where the lines start is found once, and cached."""

    num_skipped = 0

    def __init__(self, file: storage.File, text_field: str, label_field: str = ""):
        """Raises config.ConfigError if the file is cut short or damaged, or its first line is no JSON object."""
        self.file = file
        self._text_field, self._label_field = text_field, label_field
        self._bounds = self._index()

    def __len__(self) -> int:
        return self._bounds.num_ints - 1

    def text(self, i: int) -> str:
        return self._string(self._row(i), i, self._text_field, "text")

    def labelled(self, i: int) -> tuple[str, str]:
        row = self._row(i)
        return self._string(row, i, self._text_field, "text"), self._string(row, i, self._label_field, "label")

    def _row(self, i: int) -> dict[str, Any]:
        start, stop = self._bounds.ints(i, 2).tolist()  # of line i and any blank ones after it
        raw = self._read(start, stop, i)
        try:
            row = json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            what = f"{self._line(i)} is not UTF-8 at its byte {error.start} ({error.reason})"
            raise storage.refusal(self.file, what, "convert it or leave it out") from None
        except (ValueError, RecursionError) as error:
            what = f"{self._line(i)} is no JSON object ({_reason(error)})"
            raise storage.refusal(self.file, what, "give one object a line") from None
        if not isinstance(row, dict):
            what = f"{self._line(i)} is a JSON {type(row).__name__} and no object"
            raise storage.refusal(self.file, what, "give one object a line")
        return row

    def _string(self, row: dict[str, Any], i: int, field: str, role: str) -> str:
        """The text or the label; a label may be an integer."""
        if field not in row:
            raise storage.no_field(self.file, self._line(i), field, row, role)
        value = row[field]
        if role == "label" and type(value) is int:  # true and false, which are of int too, are no labels
            return str(value)
        if not isinstance(value, str):
            wanted = "a string" if role == "text" else "a string or an integer"
            what = f"{self._line(i)} has {type(value).__name__} in the field {field!r}, which must hold {wanted}"
            raise storage.refusal(self.file, what, f"name another in {storage.SETTINGS[role]}")
        try:
            value.encode()
        except UnicodeEncodeError:  # "\ud800" is JSON, and no character
            what = f"{self._line(i)} holds half of a surrogate pair, which is no valid Unicode"
            raise storage.refusal(self.file, what, "mend it or leave the file out") from None
        return value

    def _line(self, i: int) -> str:
        """Its number from 1 on, counted only when it is wanted, since blank lines are not in the index."""
        left = int(self._bounds.ints(i, 1)[0])
        number = 1
        for block in self._blocks():
            number += block.count(b"\n", 0, left)
            left -= len(block)
            if left <= 0:
                break
        return f"line {number}"

    # What differs in a compressed file:

    def _index(self) -> storage.Index:
        return storage.index(self.file, "lines", lambda: (_find_lines(self.file), b""))

    def _blocks(self) -> Iterator[bytes]:
        return storage.blocks(self.file)

    def _read(self, start: int, stop: int, i: int) -> bytes:
        return storage.read(self.file, start, stop - start)


def _reason(error: Exception) -> str:
    """Without the line and column in the document, which would be taken for those in the file."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at its character {error.pos}"
    return storage.one_line(error)


def _find_lines(file: storage.File) -> np.ndarray:
    finder = LineFinder(file)
    for block in storage.blocks(file):
        finder.add(block)
    return finder.bounds()


class LineFinder:
    """Finds the lines that are not blank in text that comes in blocks."""

    def __init__(self, file: storage.File):
        self.num_documents = 0
        self.num_lines = 0  # that have ended
        self._file = file
        self._starts: list[np.ndarray] = []
        self._position = 0  # bytes in lines that have ended
        self._tail: list[bytes] = []  # after the last line end

    def add(self, block: bytes) -> None:
        cut = block.rfind(b"\n") + 1
        if not cut:
            self._tail.append(block)
            return
        data = b"".join([*self._tail, block[:cut]])
        self._tail = [block[cut:]]
        codes = np.frombuffer(data, np.uint8)
        stops = np.flatnonzero(codes == ord("\n")) + 1
        starts = np.concatenate([[0], stops[:-1]])
        kept = np.ones(len(starts), bool)
        for line in np.flatnonzero(np.isin(codes[starts], np.frombuffer(_JSON_SPACE, np.uint8))):
            kept[line] = bool(data[starts[line] : stops[line]].strip(_JSON_SPACE))
        if kept.any() and not self.num_documents:
            first = int(np.argmax(kept))
            self._check_first(data[starts[first] : stops[first]], self.num_lines + first + 1)
        self._starts.append(starts[kept] + self._position)
        self._position += len(data)
        self.num_documents += int(kept.sum())
        self.num_lines += len(starts)

    def bounds(self) -> np.ndarray:
        """int64 [num_documents + 1]: line i that is not blank starts at bounds[i], the last one ends at bounds[-1].

        Raises:
          config.ConfigError: the last line has no end and is no JSON object either, so the file was cut.
        """
        tail = b"".join(self._tail)
        if tail.strip(_JSON_SPACE):
            if not self.num_documents:
                self._check_first(tail, self.num_lines + 1)
            if not _is_object(tail):
                raise self.ends_inside()
            self._starts.append(np.array([self._position]))
            self.num_documents += 1
        return np.concatenate([*self._starts, [self._position + len(tail)]])

    def ends_inside(self) -> config_lib.ConfigError:
        what = f"ends inside line {self.num_lines + 1} ({self.num_documents} documents before it are readable)"
        return storage.refusal(self._file, what)

    def _check_first(self, line: bytes, number: int) -> None:
        """A file that is JSON of another kind, such as one array, shows it at once."""
        if not _is_object(line):
            what = f"line {number} is no JSON object, so that none of its documents are readable"
            raise storage.refusal(self._file, what, "give one object a line")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


# --- text ----------------------------------------------------------------------------------------------------------


class Text:
    """A text file: one document, or several if it is longer than MAX_TEXT; blank pieces are skipped."""

    def __init__(self, file: storage.File, text_field: str = "", label_field: str = ""):
        """Raises config.ConfigError if the file is not UTF-8, or a field is asked for: it has none."""
        if label_field:
            what = f"is text, which has no field {label_field!r} to be the label"
            raise storage.refusal(file, what, "set data.label=folder, or name files of records")
        self.file = file
        text = storage.decode(file, "", b"".join(storage.blocks(file)))
        self.num_skipped = 0
        self._bounds = []  # where each document starts and stops, bytes
        start = 0
        for piece in _cut(text, MAX_TEXT):
            stop = start + len(piece.encode())
            if piece.strip():
                self._bounds.append((start, stop))
            else:
                self.num_skipped += 1
            start = stop

    def __len__(self) -> int:
        return len(self._bounds)

    def text(self, i: int) -> str:
        start, stop = self._bounds[i]
        return storage.decode(self.file, f"document {i}", storage.read(self.file, start, stop - start))

    def labelled(self, i: int) -> tuple[str, str]:
        return self.text(i), ""


def _cut(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most `limit` characters; joined, they are the text."""
    start = 0
    while len(text) - start > limit:
        stop = start + limit
        for endings in (("\n\n", "\n\r\n"), ("\n",)):
            found = [at + len(ending) for ending in endings if (at := text.rfind(ending, start, stop)) >= 0]
            if found:
                stop = max(found)
                break
        yield text[start:stop]
        start = stop
    yield text[start:]
