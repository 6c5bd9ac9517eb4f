"""Experts on a mesh give what they give on one device, values and gradients; `tests/layers` holds one device to loops.

Sums over devices come in another order than on one: float32 keeps 7 digits, and 2e-5 of the largest value is a bound
with room.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import partition
from moejax.ops import expert_parallel
from moejax.ops.expert_parallel import Choices, Settings, Weights

B, L, D, E, K, F = 16, 4, 4, 8, 2, 4
EXPERT, MANY, ROWS = {"data": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 4, "sequence": 2}
CASES = [
    ("capacity", {"expert": 8}),
    ("capacity", {"expert": 2, "sequence": 2, "tensor": 2}),
    ("capacity", {"fsdp": 4, "sequence": 2}),
    ("normalised", MANY),
    ("normalised", ROWS),
    ("in chunks", EXPERT),
    ("small groups", MANY),
    ("small groups", ROWS),
    ("gather", {"expert": 8}),
    ("gather", {"expert": 2, "sequence": 2, "tensor": 2}),
    ("gather with dropout", EXPERT),
    ("ragged", {"expert": 8}),
    ("ragged", MANY),
    ("ragged", ROWS),
    ("all experts", MANY),
    ("all experts", ROWS),
    ("mixtures", MANY),
]
HOW = {
    "capacity": (Settings("swiglu", jnp.float32), {"capacity": 1, "group_size": L, "order": "tokens"}),
    "normalised": (Settings("relu", jnp.float32, normalise=True), {"capacity": 2, "group_size": L, "order": "tokens"}),
    "in chunks": (
        Settings("gelu", jnp.float32, num_chunks=3),
        {"capacity": 5, "group_size": 2 * L, "order": "priority"},
    ),
    "small groups": (
        Settings("geglu", jnp.float32, drop_rate=0.4),
        {"capacity": 1, "group_size": L // 2, "order": "choices"},
    ),
    "gather": (Settings("swiglu", jnp.float32, normalise=True, grouped_matmul="reference"), {}),
    "gather with dropout": (Settings("relu", jnp.float32, drop_rate=0.4, grouped_matmul="reference"), {}),
    "ragged": (
        Settings("swiglu", jnp.float32, drop_rate=0.4, exchange="ragged", grouped_matmul="reference"),
        {},
    ),
    "all experts": (Settings("swiglu", jnp.float32), {}),
    "mixtures": (Settings("geglu", jnp.float32, num_chunks=2), {}),
}


def mesh_of(**sizes):
    return partition.make_mesh(config_lib.MeshConfig(**{"data": 1, **sizes}))


def draw(activation, seed=0):
    rng = np.random.default_rng(seed)
    halves = 2 if activation in ("swiglu", "geglu") else 1
    weights = Weights(
        *(rng.normal(size=s).astype(np.float32) for s in ((E, D, halves, F), (E, F, D), (E, halves, F), (E, D)))
    )
    scores = rng.normal(size=(B, L, E)) + np.linspace(0, 2, E)  # uneven: some devices get more than others
    expert = np.argsort(-scores)[..., :K].astype(np.int32)
    expert[0, 1, 1] = expert[3, 2] = E  # choices of no expert
    gate = rng.uniform(0.1, 1, size=(B, L, K)).astype(np.float32)
    seed_BLKZ = rng.integers(0, 2**32, size=(B, L, K, 2), dtype=np.uint32)
    x = rng.normal(size=(B, L, D)).astype(np.float32)
    return x, gate, weights, expert, seed_BLKZ, rng.uniform(size=(B, L)).astype(np.float32)


def run(name, *inputs):
    """(y, dropped choices)."""
    settings, how = HOW[name]

    def on_part(x, gate, expert, seed, priority, *weights):
        weights, seed = Weights(*weights), seed if settings.drop_rate else None
        whole = Choices(expert, gate, seed)
        mine = jax.tree.map(lambda leaf: partition.part(leaf, "sequence", 1), whole)
        dropped = jnp.zeros((), jnp.int32)
        match name:
            case "gather" | "gather with dropout" | "ragged":
                y = expert_parallel.dropless(x, mine, weights, settings)
            case "all experts":
                gate_BLE = jnp.concatenate([mine.gate_BLK] * (E // K), axis=-1)
                y = expert_parallel.all_experts(x, gate_BLE, weights, settings)
            case "mixtures":
                x_ECD = jnp.stack([x.reshape(-1, D) * (1 + e) for e in range(E)])
                y = expert_parallel.slots(x_ECD, weights, settings).sum(axis=0).reshape(x.shape)
            case _:
                y, dropped = expert_parallel.capacity(x, whole, weights, settings, priority_BM=priority, **how)
        return y, partition.summed(dropped, *partition.BATCH_AXES)

    x, gate, weights, *rest = inputs
    dims = f"BLD BMK BMK BMKZ BM {expert_parallel.AXES}"
    return partition.on_shards(on_part, dims, "BLD .")(x, gate, *rest, *weights)


def with_gradients(name, x, gate, weights, *rest):
    def loss(x, gate, weights):
        y, dropped = run(name, x, gate, weights, *rest)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), (y, dropped)

    gradients, values = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gate, weights)
    return *values, gradients


@functools.cache
def on_one_device(name):
    inputs = draw(HOW[name][0].activation)
    return jax.device_get(jax.jit(functools.partial(with_gradients, name))(*inputs))


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """jax.lax.ragged_all_to_all as its documentation describes it, which XLA does not have on CPU."""
    rows, at, size, to = (
        jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    me, row_R = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    for sender in range(len(rows)):
        place_R = row_R - to[sender, me]
        mine_R = (place_R >= 0) & (place_R < size[sender, me])
        output = jnp.where(mine_R[:, None], rows[sender].at[at[sender, me] + place_R].get(mode="clip"), output)
    agreed = (recv_sizes == size[:, me]).all() & (size.sum(axis=0)[me] <= len(output))
    return jnp.where(agreed, output, jnp.asarray(77, output.dtype))


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_values_drops_and_gradients_are_those_of_one_device(name, sizes, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    mesh, inputs = mesh_of(**sizes), draw(HOW[name][0].activation)
    function = partition.on_mesh(mesh, functools.partial(with_gradients, name))
    y, dropped, gradients = jax.jit(function, in_shardings=partition.replicated(mesh))(*inputs)
    expected_y, expected_dropped, expected_gradients = on_one_device(name)
    assert (expected_dropped > 0) == (name in ("capacity", "in chunks", "small groups", "normalised"))
    np.testing.assert_array_equal(dropped, expected_dropped)
    for actual, expected in zip(
        jax.tree.leaves((y, gradients)), jax.tree.leaves((expected_y, expected_gradients)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
