"""Training steps on a made-up batch. Compiling is what takes the time in these tests: all of it is done once."""

import copy
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax import config as config_lib
from moejax import partition, rules
from moejax.analysis import reduction
from moejax.training import state


class Run(NamedTuple):
    """Some steps on one batch; what is a list has an entry a step."""

    models: list[Any]  # on the host
    metrics: list[dict[str, Any]]
    first: state.TrainState  # what went into the first step
    last: state.TrainState


def make_batch(config: config_lib.Config, seed: int = 0) -> dict[str, np.ndarray]:
    if config.model.has_encoder:
        return reduction.batch(config)
    rng = np.random.default_rng(seed)
    shape = (config.data.batch_size, config.data.seq_length)
    lengths = rng.integers(shape[1] // 3, shape[1] + 1, size=shape[0])  # some padding, unequal over the rows
    mask = np.arange(shape[1]) < lengths[:, None]
    segments = np.where(mask, 1 + (np.arange(shape[1]) >= 7), 0)
    return {
        "inputs_BL": rng.integers(0, 257, shape).astype(np.int32),
        "targets_BL": rng.integers(0, 257, shape).astype(np.int32),
        "segment_ids_BL": segments.astype(np.int32),
        "positions_BL": np.broadcast_to(np.arange(shape[1]), shape).astype(np.int32),
        "loss_mask_BL": mask,
    }


def place(config: config_lib.Config, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return jax.device_put(batch, partition.batch_sharding(make_mesh(config)))


def make_mesh(config: config_lib.Config) -> jax.sharding.Mesh:
    """Of as many devices as its sizes ask for; of one where fsdp is the rest, as in tiny.py."""
    sizes = [getattr(config.mesh, axis) for axis in partition.AXES]
    return partition.make_mesh(config.mesh, jax.devices()[: 1 if config.mesh.fsdp == -1 else math.prod(sizes)])


def initial(config: config_lib.Config) -> state.TrainState:
    """What state.create gives (test_state.py compares them), without compiling it for each mesh anew."""
    model = copy.deepcopy(config.model)
    model.moe.balance_weight = -1.0  # no part of the state
    return _put(config, _initial(model, copy.deepcopy(config.optimizer), config.training.seed))


def _put(config: config_lib.Config, leaves: list[Any]) -> state.TrainState:
    places, structure = _places(copy.deepcopy(config))
    return structure.unflatten(jax.device_put(leaves, places, may_alias=False))  # copies: a step consumes its state


@functools.cache
def _places(config: config_lib.Config):
    return jax.tree.flatten(state.shardings(config, make_mesh(config)))


@functools.cache
def _initial(model: config_lib.ModelConfig, optimizer: config_lib.OptimizerConfig, seed: int) -> list[np.ndarray]:
    config = config_lib.Config(model=model, optimizer=optimizer)
    config.training.seed = seed
    mesh = partition.make_mesh(config_lib.MeshConfig(data=1), jax.devices()[:1])
    return jax.device_get(jax.tree.leaves(state.create(config, mesh)))


@functools.cache
def _compiled(config: config_lib.Config):
    rules.validate(config)
    mesh = make_mesh(config)
    partition.check_batch(config, mesh)
    return state.make_train_step(config, mesh)


def take(
    config: config_lib.Config, before: state.TrainState, batch: dict[str, np.ndarray]
) -> tuple[state.TrainState, dict[str, Any]]:
    """One step from any state of this model, which stays; the next one and the metrics, on the host."""
    step = _compiled(copy.deepcopy(config))
    return jax.device_get(step(_put(config, jax.tree.leaves(before)), place(config, batch)))


def run(config: config_lib.Config, num_steps: int = 1, **more: np.ndarray) -> Run:
    """From initialisation, on the batch of make_batch with `more` in it."""
    step, batch = _compiled(copy.deepcopy(config)), place(config, make_batch(config) | more)
    first = current = initial(config)
    models, metrics = [], []
    for _ in range(num_steps):
        current, numbers = step(current, batch)
        models.append(jax.device_get(current.model))
        metrics.append(jax.device_get(numbers))
    return Run(models, metrics, first, current)
