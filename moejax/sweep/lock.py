"""Locks in a sweep's folder, which end with the process that holds them, however it ends.

They hold between processes of a machine, and between machines as far as their shared file system has locks (flock).
"""

import contextlib
import fcntl
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterator
from typing import IO

FILE = "lock"
PATIENCE = 10.0  # seconds for a process whose runner was killed to notice that, and to end


class HeldError(RuntimeError):
    """Another process has the lock; the message says which."""


@contextlib.contextmanager
def hold(folder: pathlib.Path, patience: float = PATIENCE) -> Iterator[None]:
    """Makes the folder, and holds its lock.

    Raises:
      HeldError: another process has held it for all of `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a+") as file:
        deadline = time.monotonic() + patience
        try:
            while not _take(file, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise HeldError(_written(file))
                time.sleep(0.05)
        except OSError as error:
            line = f"{folder} cannot be locked ({error.strerror}); let no two processes work in it at once"
            print(line, file=sys.stderr, flush=True)
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
        yield


def holder(folder: pathlib.Path) -> str | None:
    """Who holds the folder's lock, as "process 4097 on node03"; None: nobody, or its file system has no locks."""
    try:
        with (folder / FILE).open() as file:
            return None if _take(file, fcntl.LOCK_SH) else _written(file)
    except OSError:
        return None


def _take(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _written(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "another process"
