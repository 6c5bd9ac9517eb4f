"""Checkpoints of the training state: written in the background, whole or not at all, and checked when read.

A checkpoint is a flat table from a leaf's path to its array, so it restores onto any mesh. It carries a checksum of
every leaf: the storage underneath notices a file that is missing or cut short, but not a flipped bit.
"""

import contextlib
import gc
import itertools
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from moejax import config as config_lib
from moejax.training import state as state_lib

_CHECKSUMS = "checksums"


def _is_no_progress(record: logging.LogRecord) -> bool:
    """False for what orbax reports of its progress, at the level of warnings."""
    return record.levelno >= logging.ERROR or "orbax" not in pathlib.Path(record.pathname).parts


class Checkpoints:
    """The checkpoints in a folder, named by their step."""

    def __init__(self, folder: pathlib.Path, config: config_lib.CheckpointConfig, *, read_only: bool = False):
        """Opens the folder; unless read_only, makes it, and clears what an interrupted save has left."""
        self.folder = folder
        logging.getLogger("absl").addFilter(_is_no_progress)  # one and the same function is added once
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_last,
            keep_period=config.keep_every or None,
            read_only=read_only,
            create=not read_only,
        )
        self._options = options
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: state_lib.TrainState, step: int) -> None:
        """Starts to save; returns once the arrays are copied, while the files are still being written."""
        if step in self.steps():
            return
        leaves = _flatten(state)
        leaves[_CHECKSUMS] = _checksums(list(leaves.values()))
        self._manager.save(step, args=ocp.args.StandardSave(leaves))

    def restore(
        self, abstract: state_lib.TrainState, on_corrupt: Callable[[int, str], None]
    ) -> tuple[state_lib.TrainState, int] | None:
        """The newest checkpoint that reads back whole, and its step; None if the folder has none.

        Args:
          abstract: shapes, dtypes and shardings to restore to.
          on_corrupt: called with (step, reason) for each newer checkpoint that is damaged. Unless this object is
            read-only, those are moved aside to `<step>.corrupt`, so that their steps can be saved again.

        Raises:
          ConfigError: there are checkpoints, and every one is damaged; nothing has been moved.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                with _quiet():
                    state = self._read(abstract, step)
            except (MemoryError, PermissionError):
                raise  # says nothing about the files
            except Exception as error:  # storage raises many kinds; all mean that this checkpoint cannot be had
                on_corrupt(step, " ".join(str(error).split()).partition(" See ")[0][:120] or type(error).__name__)
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return state, step
        if damaged:
            raise config_lib.ConfigError(
                f"none of the {len(damaged)} checkpoints in {self.folder} can be read; "
                "bring one back from a copy, or choose another --workdir"
            )
        return None

    def wait(self) -> None:
        """Returns when every save that was started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the background threads."""
        self._manager.close()

    def _read(self, abstract: state_lib.TrainState, step: int) -> state_lib.TrainState:
        targets = _flatten(abstract)
        checksums = jax.ShapeDtypeStruct((len(targets),), jnp.uint32, sharding=abstract.step.sharding)  # on all devices
        leaves = self._manager.restore(step, args=ocp.args.StandardRestore({**targets, _CHECKSUMS: checksums}))
        saved = np.asarray(leaves[_CHECKSUMS])
        actual = np.asarray(_checksums([leaves[name] for name in targets]))
        for name, expected, found in zip(targets, saved, actual, strict=True):
            if expected != found:
                raise ValueError(f"the checksum of {name} does not match")
        return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in targets])

    def _set_aside(self, steps: list[int]) -> None:
        if self._options.read_only or not steps:
            return
        self._manager.close()
        for step in steps:
            names = (f"{step}.corrupt{number or ''}" for number in itertools.count())
            target = next(path for path in map(self.folder.joinpath, names) if not path.exists())
            (self.folder / str(step)).rename(target)
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=self._options)


def _flatten(state: state_lib.TrainState) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@jax.jit
def _checksums(leaves: list[Array]) -> Array:
    """One number a leaf: sum over its elements of (2 i + 1) * bits, mod 2^32.

    The weights are odd, so a change of any one element changes the sum. Computed where the shards are.
    """

    def checksum(leaf: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
        index = jnp.zeros(leaf.shape, jnp.uint32)
        for dim, size in enumerate(leaf.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)
        return jnp.sum((2 * index + 1) * bits, dtype=jnp.uint32)

    return jnp.stack([checksum(leaf) for leaf in leaves])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the readers that an error abandons from printing tracebacks of their own as they are collected."""
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook = sys.excepthook = lambda *_: None
    try:
        yield
    finally:
        gc.collect()
        sys.unraisablehook, sys.excepthook = hooks
