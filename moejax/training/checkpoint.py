"""Checkpoints of the training state: written in the background, whole or not at all, and checked when read.

A checkpoint is a flat table from a leaf's path to its array, so it restores onto any mesh and number of processes. It
carries a checksum of every leaf: the storage underneath notices a file that is missing or cut short, but not a flipped
bit. Every process calls every method, and writes and reads its part; process 0 alone renames and removes.
"""

import contextlib
import functools
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
from jax.experimental import multihost_utils

from moejax import config as config_lib
from moejax.training import state as state_lib

_CHECKSUMS = "checksums"


def _is_no_progress(record: logging.LogRecord) -> bool:
    """False for what orbax reports of its progress, at the level of warnings."""
    return record.levelno >= logging.ERROR or "orbax" not in pathlib.Path(record.pathname).parts


class _Manager(ocp.CheckpointManager):
    """Orbax's, but the step after which a signal stops the run is for the trainer to agree on, in its own count."""

    def reached_preemption(self, step: int) -> bool:
        return False


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
            # the steps that all see are those that process 0 sees
            single_host_load_and_broadcast=jax.process_count() > 1,
        )
        self._options = options
        self._manager = _Manager(folder.absolute(), options=options)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: state_lib.TrainState, step: int) -> None:
        """Starts to save; returns once the arrays are copied, while the files are still being written."""
        if step in self.steps():
            return
        leaves = _flatten(state)
        leaves[_CHECKSUMS] = _checksums(list(leaves.values()), state.step.sharding)
        self._manager.save(step, args=ocp.args.StandardSave(leaves))

    def restore(
        self, abstract: state_lib.TrainState, on_corrupt: Callable[[int, str], None]
    ) -> tuple[state_lib.TrainState, int] | None:
        """The newest checkpoint that reads back whole, and its step; None if the folder has none.

        Args:
          abstract: shapes, dtypes and shardings to restore to.
          on_corrupt: called with (step, reason) for each newer checkpoint that is damaged, for any process. Unless this
            object is read-only, those are moved aside to `<step>.corrupt`, so that their steps can be saved again.

        Raises:
          ConfigError: there are checkpoints, and every one is damaged; nothing has been moved.
        """
        damaged = []
        for step in reversed(self.steps()):
            state, problem = None, ""
            try:
                with _quiet():
                    leaves = self._read(abstract, step)
            except (MemoryError, PermissionError):
                raise  # says nothing about the files
            except Exception as error:  # storage raises many kinds; all mean that this checkpoint cannot be had
                leaves = None
                problem = " ".join(str(error).split()).partition(" See ")[0][:120] or type(error).__name__
            if _on_all(leaves is not None):
                assert leaves is not None
                state, problem = _check(abstract, leaves)
            if state is None:
                on_corrupt(step, problem or "another process cannot read it")
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

    def _read(self, abstract: state_lib.TrainState, step: int) -> dict[str, Array]:
        """The leaves and their checksums. Each process reads by itself: orbax would hang where one of them fails."""
        targets = _flatten(abstract)
        checksums = jax.ShapeDtypeStruct((len(targets),), jnp.uint32, sharding=abstract.step.sharding)  # on all devices
        here = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process_{here}"
        )
        options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=alone)
        with ocp.CheckpointManager(self.folder.absolute(), options=options) as reader:
            return reader.restore(step, args=ocp.args.StandardRestore({**targets, _CHECKSUMS: checksums}))

    def _set_aside(self, steps: list[int]) -> None:
        if self._options.read_only or not steps:
            return
        self._manager.close()
        if jax.process_index() == 0:
            for step in steps:
                names = (f"{step}.corrupt{number or ''}" for number in itertools.count())
                target = next(path for path in map(self.folder.joinpath, names) if not path.exists())
                (self.folder / str(step)).rename(target)
        multihost_utils.sync_global_devices("damaged checkpoints are moved aside")
        self._manager = _Manager(self.folder.absolute(), options=self._options)


def _on_all(here: bool) -> bool:
    """Whether it is so on every process."""
    return bool(np.all(multihost_utils.process_allgather(np.array(here))))


def _check(abstract: state_lib.TrainState, leaves: dict[str, Array]) -> tuple[state_lib.TrainState | None, str]:
    """The state of these leaves, or None and which of them is not what was saved: the same on every process."""
    names = list(_flatten(abstract))
    saved, actual = (
        np.asarray(leaves[_CHECKSUMS]),
        np.asarray(_checksums([leaves[name] for name in names], abstract.step.sharding)),
    )
    for name, expected, found in zip(names, saved, actual, strict=True):
        if expected != found:
            return None, f"the checksum of {name} does not match"
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in names]), ""


def _flatten(state: state_lib.TrainState) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@functools.partial(jax.jit, static_argnums=1)
def _checksums(leaves: list[Array], replicated: jax.sharding.Sharding) -> Array:
    """One number a leaf: sum over its elements of (2 i + 1) * bits, mod 2^32; all of them on every device.

    The weights are odd, so a change of any one element changes the sum. Computed where the shards are.
    """

    def checksum(leaf: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
        index = jnp.zeros(leaf.shape, jnp.uint32)
        for dim, size in enumerate(leaf.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)
        return jnp.sum((2 * index + 1) * bits, dtype=jnp.uint32)

    return jax.lax.with_sharding_constraint(jnp.stack([checksum(leaf) for leaf in leaves]), replicated)


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
