"""What is slow to make and cheap to keep: files named by a hash of all that went into them."""

import hashlib
import os
import pathlib
from collections.abc import Iterable

from absl import logging

from moejax import files


def folder() -> pathlib.Path:
    """`$MOEJAX_CACHE`, else `$XDG_CACHE_HOME/moejax`, else `~/.cache/moejax`."""
    if own := os.environ.get("MOEJAX_CACHE"):
        return pathlib.Path(own)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "moejax"


def digest(parts: Iterable[str]) -> str:
    """A hash (blake2b, 128 bits, hex) of the parts and of where each of them ends."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode(errors="surrogatepass")  # a file name may hold any bytes
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def store(path: pathlib.Path, text: str) -> None:
    """`files.write`, but a folder that can't be written costs a warning and not the run."""
    try:
        files.write(path, text)
    except OSError as error:
        logging.warning("%s is not cached (%s); set MOEJAX_CACHE to a folder that can be written", path, error)
