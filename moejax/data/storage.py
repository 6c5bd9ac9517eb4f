"""Files of a corpus, local or remote: what they are called, their bytes by position, and indices kept beside them.

A path with a protocol (gs://, s3://, hf://, memory://, ...) is read through fsspec, any other from the local disk. No
object here holds an open handle, so all of them can be pickled; handles live in caches of the process.
"""

import contextlib
import dataclasses
import datetime
import functools
import glob
import os
import pathlib
import resource
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import fsspec
import google_crc32c
import numpy as np
from absl import logging
from fsspec.registry import known_implementations  # fsspec.registry is a mapping, which hides the module

from moejax import config as config_lib
from moejax.data import cache

BLOCK = 2**24  # bytes asked for at a time when a file is read in order: few requests, and 16 MB in memory
_SOFT, _HARD = resource.getrlimit(resource.RLIMIT_NOFILE)
if 0 <= _SOFT < (_HARD % 2**32):  # many systems let a process open more files than it may at first
    _SOFT = min(_HARD % 2**32, 2**14)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(_SOFT, resource.getrlimit(resource.RLIMIT_NOFILE)[0]), _HARD))
# Shards kept open at a time, of each kind of handle. Opening one again takes 40 ms, keeping it some megabytes.
MAX_OPEN = min(max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**32, 256) // 4, 2048)
SETTINGS = {"text": "data.text_field", "label": "data.label=field:NAME"}  # which field of a record is what
# Where file systems say when, or as what, an object was last written.
_VERSION_FIELDS = ("etag", "ETag", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclasses.dataclass(frozen=True)
class File:
    """A file, as it was when it was found."""

    path: str  # absolute, or with its protocol
    size: int  # bytes
    version: str  # changes when the file is written again; "" where the file system does not say

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def folder(self) -> str:
        """The name of the folder it lies in; "" right under the root."""
        return self.path.split("/")[-2]

    @property
    def is_local(self) -> bool:
        return "://" not in self.path

    def __str__(self) -> str:
        return self.path


# --- finding files -------------------------------------------------------------------------------------------------


def find(pattern: str) -> list[File]:
    """The file of that name, else the files that match it as a glob pattern, by name; [] if there are none.

    Raises:
      config.ConfigError: the protocol's package is missing, or the file system can't be asked. So do all below.
    """
    with _refusals(pattern):
        if not _is_remote(pattern):
            path = _local_path(pattern)
            paths = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
            files = [_local_file(path) for path in paths if os.path.isfile(path)]
        else:
            system, path = fsspec.core.url_to_fs(pattern)
            system.invalidate_cache()
            if glob.has_magic(path):
                infos = list(system.glob(path, detail=True).values())
            else:
                infos = [system.info(path)] if system.exists(path) else []
            files = [_remote_file(system, info) for info in infos if info["type"] == "file"]
    return _by_name(files)


def walk(folder: str) -> list[File] | None:
    """The files in a folder at any depth, by name; None if it is no folder."""
    with _refusals(folder):
        if not _is_remote(folder):
            path = _local_path(folder)
            if not os.path.isdir(path):
                return None
            paths = [os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names]
            return _by_name([_local_file(path) for path in paths if os.path.isfile(path)])
        if glob.has_magic(folder):
            return None
        system, path = fsspec.core.url_to_fs(folder)
        system.invalidate_cache()
        if not system.isdir(path):
            return None
        return _by_name([_remote_file(system, info) for info in system.find(path, detail=True).values()])


def contents(folder: str) -> tuple[list[str], list[File]]:
    """(names of the folders, files) right in a folder, each by name; ([], []) if there is no such folder."""
    with _refusals(folder):
        if not _is_remote(folder):
            path = _local_path(folder)
            entries = list(os.scandir(path)) if os.path.isdir(path) else []
            folders = [entry.name for entry in entries if entry.is_dir()]
            return sorted(folders), _by_name([_local_file(entry.path) for entry in entries if entry.is_file()])
        system, path = fsspec.core.url_to_fs(folder)
        system.invalidate_cache()
        infos = system.ls(path, detail=True) if system.isdir(path) else []
        folders = [info["name"].rstrip("/").rsplit("/", 1)[-1] for info in infos if info["type"] == "directory"]
        return sorted(folders), _by_name([_remote_file(system, info) for info in infos if info["type"] == "file"])


def _is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def _local_path(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def _local_file(path: str) -> File:
    stat = os.stat(path)
    return File(path, stat.st_size, str(stat.st_mtime_ns))


def _remote_file(system: fsspec.AbstractFileSystem, info: dict[str, Any]) -> File:
    if info.get("size") is None:  # some listings leave it out
        info = system.info(info["name"])
    version = next((value for field in _VERSION_FIELDS if (value := info.get(field)) is not None), "")
    if isinstance(version, datetime.datetime):  # a listing and a look at one file may differ in this
        version = version.timestamp()
    return File(system.unstrip_protocol(info["name"]), int(info["size"]), str(version))


def _by_name(files: Sequence[File]) -> list[File]:
    return sorted(files, key=lambda file: file.path.split("/"))


# --- bytes ---------------------------------------------------------------------------------------------------------


def read(file: File, start: int, length: int) -> bytes:
    """Those bytes of a file; from any thread.

    Raises:
      config.ConfigError: the file is gone, or no longer as long as it was.
    """
    with _refusals(file.path):
        if file.is_local:
            descriptor = _descriptor(file)  # held by name: another thread may push it out of the cache at any moment
            data = os.pread(descriptor.number, length, start)
        else:
            system, path = fsspec.core.url_to_fs(file.path)
            data = system.cat_file(path, start=start, end=start + length) if length else b""
    if len(data) != length:
        raise config_lib.ConfigError(
            f"data.source: {file} has changed since it was opened: {len(data)} bytes where {length} were, "
            f"at byte {start}; start again"
        )
    return data


def blocks(file: File) -> Iterator[bytes]:
    """The bytes of a file in order, a block at a time."""
    for start in range(0, file.size, BLOCK):
        yield read(file, start, min(BLOCK, file.size - start))


def open_binary(file: File) -> BinaryIO:
    """A file object, for a library that wants one."""
    with _refusals(file.path):
        if file.is_local:
            return open(file.path, "rb")
        system, path = fsspec.core.url_to_fs(file.path)
        return system.open(path, "rb", cache_type="none")


def local_copy(file: File) -> File:
    """A copy of a remote file in the cache folder, fetched once.

    Raises:
      config.ConfigError: the cache folder can't be written.
    """
    path = cache.folder() / "copies" / f"{cache.digest([file.path, str(file.size), file.version])}-{file.name}"
    if not path.is_file():
        system, remote = fsspec.core.url_to_fs(file.path)
        logging.info("fetching %s", file)
        try:
            _write(path, lambda partial: _fetch(file, system, remote, partial))
        except OSError as error:
            raise config_lib.ConfigError(
                f"data.source: {file} needs a local copy and {path} can't be written ({error.strerror or error}); "
                "set MOEJAX_CACHE to a folder with room"
            ) from error
    return _local_file(str(path))


def _fetch(file: File, system: fsspec.AbstractFileSystem, remote: str, partial: pathlib.Path) -> None:
    with _refusals(file.path):
        system.get_file(remote, str(partial))


def _write(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """`files.write` for a file that `write` makes under the name it is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Descriptor:
    """Closes when the last thread that reads from it lets go, not when the cache does."""

    number: int

    def __del__(self):
        os.close(self.number)


@functools.lru_cache(maxsize=MAX_OPEN)
def _descriptor(file: File) -> _Descriptor:
    return _Descriptor(os.open(file.path, os.O_RDONLY | os.O_CLOEXEC))


@contextlib.contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Whatever the operating system or a remote file system raises, as one line."""
    try:
        yield
    except config_lib.ConfigError:
        raise
    except ImportError as error:
        raise config_lib.ConfigError(
            f"data.source: {path} needs a package that is not installed ({one_line(error)}); "
            f"run: pip install {_package_of(path)}"
        ) from error
    except OSError as error:
        raise config_lib.ConfigError(
            f"data.source: {path} can't be read ({error.strerror or one_line(error)}); mend it or leave it out"
        ) from error
    except Exception as error:  # every remote file system has exceptions of its own
        raise config_lib.ConfigError(
            f"data.source: {path} can't be read ({type(error).__name__}: {one_line(error)}); "
            "mend the path, or how you sign in"
        ) from error


def _package_of(path: str) -> str:
    protocol = path.partition("://")[0]
    name = known_implementations.get(protocol, {}).get("class", "fsspec")
    package = name.partition(".")[0]
    return f"'fsspec[{protocol}]'" if package == "fsspec" else package


def one_line(error: object) -> str:
    return " ".join(str(error).split())


def refusal(file: File, what: str, remedy: str = "fetch the file again") -> config_lib.ConfigError:
    """The error to raise about a file; `what` goes on from its name."""
    return config_lib.ConfigError(f"data.source: {file} {what}; {remedy}")


def no_field(file: File, what: str, field: str, fields: Iterable[str], role: str) -> config_lib.ConfigError:
    """`what` in the file, "" for all of it, has fields and not the one that is to be the text or the label (`role`)."""
    known = ", ".join(sorted(fields)) or "nothing"
    what = f"{what} has no field {field!r} but {known}".strip()
    return refusal(file, what, f"name the {role}'s in {SETTINGS[role]}")


def decode(file: File, what: str, raw: bytes) -> str:
    """The text of UTF-8 bytes, every character as it stands.

    Raises:
      config.ConfigError: they are not UTF-8; `what` in the file they are goes into the message.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        what = f"{what} is not UTF-8 at byte {error.start} ({error.reason})".strip()
        raise refusal(file, what, "convert it or leave it out") from None


# --- indices -------------------------------------------------------------------------------------------------------

_MAGIC = b"moejax01"  # a new number for a new layout
_HEADER = struct.Struct("<8sqqI")  # magic, integers, bytes of the blob, CRC32C of the first two and the integers


@dataclasses.dataclass(frozen=True)
class Index:
    """What it took a pass over a file to find: int64 numbers and a blob.

    They stay on disk and are read by position, so that a thousand shards cost no memory; where the cache folder can't
    be written they are held in memory. The CRC covers the numbers only: the blob's owner checks what it reads.
    """

    stored: File | bytes
    num_ints: int

    def ints(self, start: int, count: int) -> np.ndarray:
        """Numbers start, start + 1, ..., as an int64 array [count]; no bounds are checked."""
        return np.frombuffer(self._read(_HEADER.size + 8 * start, 8 * count), "<i8")

    def blob(self, start: int, length: int) -> bytes:
        return self._read(_HEADER.size + 8 * self.num_ints + start, length)

    def _read(self, start: int, length: int) -> bytes:
        if isinstance(self.stored, bytes):
            return self.stored[start : start + length]
        try:
            return read(self.stored, start, length)
        except config_lib.ConfigError as error:
            raise config_lib.ConfigError(
                f"data.source: the cached index {self.stored} has gone or changed since it was opened; "
                "start again to have it made anew"
            ) from error


def index(file: File, kind: str, build: Callable[[], tuple[np.ndarray, bytes]]) -> Index:
    """The index of a file, from the cache folder if it is there, else built, and stored there.

    It is stored under a hash of path, size and version: a file written again gets a new one.

    Args:
      file: what is indexed.
      kind: how, in a word; files are named by it.
      build: returns the integers, int64 [n], and the blob.
    """
    key = cache.digest([_MAGIC.decode(), file.path, str(file.size), file.version])
    path = cache.folder() / "indices" / f"{kind}-{key}"
    if (found := _stored_index(path)) is not None:
        return found
    ints, blob = build()
    ints = ints.astype("<i8")
    head = _HEADER.pack(_MAGIC, len(ints), len(blob), 0)[:-4]
    data = head + _checksum(head, ints.tobytes()) + ints.tobytes() + blob
    try:
        _write(path, lambda partial: partial.write_bytes(data))
        return Index(_local_file(str(path)), len(ints))
    except OSError as error:
        logging.warning("%s is not cached (%s); set MOEJAX_CACHE to a folder that can be written", path, error)
        return Index(data, len(ints))


def _stored_index(path: pathlib.Path) -> Index | None:
    """None if it is not there, or damaged."""
    try:
        with path.open("rb") as stored:
            header = stored.read(_HEADER.size)
            magic, num_ints, num_blob, _ = _HEADER.unpack(header)
            size = _HEADER.size + 8 * num_ints + num_blob
            whole = magic == _MAGIC and os.fstat(stored.fileno()).st_size == size
            if whole and header[-4:] == _checksum(header[:-4], stored.read(8 * num_ints)):
                return Index(_local_file(str(path)), num_ints)
    except (OSError, struct.error):
        pass
    return None


def _checksum(head: bytes, ints: bytes) -> bytes:
    return struct.pack("<I", google_crc32c.extend(google_crc32c.value(head), ints))
