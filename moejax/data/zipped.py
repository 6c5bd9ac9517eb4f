"""Documents in JSON lines under gzip, by random access."""

import functools
import io
import struct
import threading
import zlib
from collections.abc import Iterator

import indexed_gzip
import numpy as np

from moejax import config as config_lib
from moejax.data import lines, storage

_SPACING = 2**20  # bytes of text between the points of a gzip file at which reading can begin
_PIECE = 2**14  # bytes decompressed at a time to check a file
_HEADER = struct.Struct("<5s2BQQIII")  # magic, version, flags, sizes, spacing, window, points
_POINT = np.dtype([("compressed", "<u8"), ("text", "<u8"), ("bits", "u1"), ("has_window", "u1")])


class GzipJsonLines(lines.JsonLines):
    """JSON lines under gzip: a line costs about a megabyte of decompression, from the point before it.

    indexed_gzip finds the points, each with the 32 KB of text that decompression refers back to. It takes a cut or
    damaged file for a short one, and holds all windows of a file in memory with a lock around every read: so the pass
    that finds the points decompresses a second time, with the CRC checked, and reads go through zlib.
    """

    def _index(self) -> storage.Index:
        passed = functools.cache(_GzipPass(self.file).run)  # one pass makes both
        self._points = storage.index(self.file, "points", lambda: passed()[1])
        return storage.index(self.file, "lines", lambda: passed()[0])

    def _blocks(self) -> Iterator[bytes]:
        unzip = _Unzip()
        return (text for block in storage.blocks(self.file) for text in unzip.feed(block))

    def _read(self, start: int, stop: int, i: int) -> bytes:
        """Bytes of the text."""
        points = self._points.ints(0, self._points.num_ints).reshape(-1, 5)
        data = b""
        try:
            while start + len(data) < stop:  # once for each gzip member
                at = int(np.searchsorted(points[:, 1], start + len(data), "right")) - 1
                if _touched_last(self, at):  # in order: half a megabyte a line would cost far more than tokenising it
                    text = int(points[at, 1])
                    piece = _segment(self, at)[start + len(data) - text : stop - text]
                else:
                    piece = self._read_member(points, at, start + len(data), stop)
                if not piece:
                    raise zlib.error("it ends early")
                data += piece
        except zlib.error as error:
            raise storage.refusal(self.file, f"is damaged in document {i} ({error}), or its cached index is") from None
        return data

    def _read_member(self, points: np.ndarray, at: int, start: int, stop: int) -> bytes:
        """Text from `start`, which lies after point `at`, to `stop` or the end of the member."""
        compressed, text, bits, window_start, window_length = points[at].tolist()
        after = int(np.searchsorted(points[:, 1], stop))
        end = int(points[after, 0]) if after < len(points) else self.file.size
        first = compressed - (bits > 0)
        raw = storage.read(self.file, first, end - first)
        window = zlib.decompress(self._points.blob(window_start, window_length)) if window_length else b""
        unzip = zlib.decompressobj(-zlib.MAX_WBITS, zdict=window)
        # Deflate starts inside a byte, at its last `bits` bits.
        return unzip.decompress(_shift(raw, 8 - bits) if bits else raw, stop - text)[start - text :]

    def segment(self, at: int) -> bytes:
        """All text from a point to the next."""
        points = self._points.ints(0, self._points.num_ints).reshape(-1, 5)
        end = points[at + 1, 1] if at + 1 < len(points) else self._bounds.ints(len(self), 1)[0]
        return self._read_member(points, at, int(points[at, 1]), int(end))


_recent = threading.local()  # .place: where this thread has read last


def _touched_last(shard: GzipJsonLines, at: int) -> bool:
    """Whether this thread's last read was after the same point."""
    last, _recent.place = getattr(_recent, "place", None), (shard, at)
    return last == (shard, at)


@functools.lru_cache(maxsize=8)  # some megabytes
def _segment(shard: GzipJsonLines, at: int) -> bytes:
    return shard.segment(at)


def _shift(data: bytes, bits: int) -> bytes:
    """Without the first so many bits, lowest first; zeros follow."""
    codes = np.frombuffer(data, np.uint8)
    following = np.append(codes[1:], np.uint8(0))
    return (codes >> bits | following << (8 - bits)).tobytes()


class _Unzip:
    """Decompresses what is fed in order, members and the zeros that may follow them, with every CRC checked."""

    def __init__(self):
        self.in_member = True  # at least one is expected
        self._member = zlib.decompressobj(zlib.MAX_WBITS + 16)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Text, a block at a time at most; raises zlib.error if it is damaged."""
        while data:
            if not self.in_member:
                data = data.lstrip(b"\0")
                if not data:
                    break
                self._member, self.in_member = zlib.decompressobj(zlib.MAX_WBITS + 16), True
            yield self._member.decompress(data, storage.BLOCK)
            self.in_member = not self._member.eof
            data = self._member.unconsumed_tail if self.in_member else self._member.unused_data


class _GzipPass(io.RawIOBase):
    """One pass over a file: as indexed_gzip reads it for its points, the lines are found and the CRCs checked.

    It must not raise into indexed_gzip, which would lose the reason: it keeps the error and ends the file there.
    """

    def __init__(self, file: storage.File):
        self._file = file
        self._position = 0
        self._num_seen = 0  # bytes
        self._unzip = _Unzip()
        self._lines = lines.LineFinder(file)
        self._error: Exception | None = None

    def run(self) -> tuple[tuple[np.ndarray, bytes], tuple[np.ndarray, bytes]]:
        """The two indices: bounds of lines; points and their windows, as `_points_of` has them."""
        exported, failure = io.BytesIO(), None
        try:
            points = indexed_gzip.IndexedGzipFile(
                fileobj=self, spacing=_SPACING, readbuf_size=2**22, skip_crc_check=True
            )
            points.seek(1100 * self._file.size)  # beyond the end, at most 1032 times as far; lets other threads run
            points.export_index(fileobj=exported)
        except indexed_gzip.ZranError as error:
            failure = error
        while self._error is None and self.read(storage.BLOCK):  # what it left unread
            pass
        if isinstance(self._error, config_lib.ConfigError):
            raise self._error
        if self._error is None and self._unzip.in_member:
            raise self._lines.ends_inside()
        if error := self._error or failure:
            what = f"is damaged in line {self._lines.num_lines + 1} or soon after it ({storage.one_line(error)}; "
            raise storage.refusal(
                self._file, f"{what}at most {self._lines.num_documents} documents before it are readable)"
            )
        return (self._lines.bounds(), b""), _points_of(exported.getvalue())

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        assert self._position <= self._num_seen, "indexed_gzip skipped a part of the file"
        size = min(size, self._file.size - self._position)
        if self._error or size <= 0:
            return b""
        try:
            data = storage.read(self._file, self._position, size)
            new = data[self._num_seen - self._position :]
            self._position += size
            self._num_seen = max(self._num_seen, self._position)
            for place in range(0, len(new), _PIECE):  # what is lost of a damaged piece is not counted as readable
                for text in self._unzip.feed(new[place : place + _PIECE]):
                    self._lines.add(text)
        except (config_lib.ConfigError, zlib.error) as error:
            self._error = error
            return b""
        return data


def _points_of(exported: bytes) -> tuple[np.ndarray, bytes]:
    """int64 [5 * num_points], and the windows one after another, each under zlib.

    Of each point: where it lies in the file and in the text; how many bits of the byte before it belong to it; where
    its window starts and how long it is, 0 at the start of a gzip member.
    """
    magic, version, _, _, _, _, window_size, num = _HEADER.unpack_from(exported)
    assert (magic, version) == (b"GZIDX", 1), (magic, version)
    table = np.frombuffer(exported, _POINT, num, _HEADER.size)
    points = np.zeros((num, 5), np.int64)
    points[:, :3] = np.stack([table["compressed"], table["text"], table["bits"]], axis=1)
    windows = bytearray()
    position = _HEADER.size + num * _POINT.itemsize
    for point in np.flatnonzero(table["has_window"]):
        window = zlib.compress(exported[position : position + window_size], 1)
        position += window_size
        points[point, 3:] = len(windows), len(window)
        windows += window
    return points.ravel(), bytes(windows)
