"""The law that the gradient of every expert, on a mesh that splits experts, is the slope of the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax import config as config_lib
from moejax import partition
from moejax.analysis import reduction
from moejax.training import state

STEP = 1e-3  # of each weight; float32 logits, with their loss in float64, are good to 2e-8
NUM_DIRECTIONS = 2


def config(dispatch: str) -> config_lib.Config:
    """One MoE layer, the last: its experts' weights move no choice. gelu: relu's corners have no slope."""
    c = tiny.get_config("unused")
    c.model.period, c.model.num_periods, c.model.attention.num_heads = ("attention", "moe"), 1, 2
    c.model.vocab_size, c.model.tie_embeddings = 64, False
    c.model.moe.num_experts, c.model.moe.top_k, c.model.moe.activation = 8, 2, "gelu"
    c.model.moe.dispatch, c.model.moe.bias, c.model.moe.capacity_factor = dispatch, True, 1.0
    return c


def experts_of(model):
    """name -> parameter of the MoE layer's experts, [period, expert, ...]."""
    layer = model.periods.blocks[1].branches[0]
    return {name: getattr(layer, name) for name in ("up", "down", "up_bias", "down_bias")}


@functools.cache
def slopes(dispatch: str):
    """(model, directions, slope_RE): of the loss along R directions of each expert's weights, on one device."""
    c = config(dispatch)
    model = tiny.model(c.model)
    rng = np.random.default_rng(0)
    directions = {
        name: rng.choice([-1.0, 1.0], size=(NUM_DIRECTIONS, *variable.shape)).astype(np.float32)
        for name, variable in experts_of(model).items()
    }
    batch = reduction.batch(c)

    def logits(inputs):
        direction, expert, step = inputs
        moved = jax.tree.map(lambda leaf: leaf, model)  # a copy
        for name, variable in experts_of(moved).items():
            one = np.arange(variable.shape[1]).reshape(1, -1, *[1] * (variable.ndim - 2)) == expert
            variable[...] = variable[...] + step * one * jnp.asarray(directions[name])[direction]
        return moved(
            batch["inputs_BL"], segment_ids_BL=batch["segment_ids_BL"], positions_BL=batch["positions_BL"], train=True
        )[0]

    places = np.stack(np.meshgrid(np.arange(NUM_DIRECTIONS), np.arange(8), [0, 1], indexing="ij"), -1).reshape(-1, 3)
    steps = np.where(places[:, 2] == 0, -STEP, STEP).astype(np.float32)
    logits_MBLV = jax.jit(lambda inputs: jax.lax.map(logits, inputs))((places[:, 0], places[:, 1], steps))
    logits_MBLV = np.asarray(logits_MBLV, np.float64)
    highest = logits_MBLV.max(-1)
    total = highest + np.log(np.exp(logits_MBLV - highest[..., None]).sum(-1))
    nats = total - np.take_along_axis(logits_MBLV, batch["targets_BL"][None, ..., None], -1)[..., 0]
    loss_M = nats[:, batch["loss_mask_BL"]].mean(-1)
    loss_RE2 = loss_M.reshape(NUM_DIRECTIONS, 8, 2)
    return model, directions, (loss_RE2[..., 1] - loss_RE2[..., 0]) / (2 * STEP)


@pytest.mark.parametrize(
    ("dispatch", "axis"),
    [("capacity", "tensor"), ("capacity", "sequence"), ("dropless", "fsdp"), ("dropless", "tensor")],
)
def test_the_gradient_of_every_expert_is_the_slope_of_the_loss(dispatch, axis):
    model, directions, slope_RE = slopes(dispatch)
    c = config(dispatch)
    c.mesh = config_lib.MeshConfig(**{"data": 1, "expert": 4, axis: 2})
    mesh = partition.make_mesh(c.mesh)
    now = state.TrainState(step=np.int32(0), model=model, opt_state=None)
    places = partition.tree_shardings(now, mesh), partition.batch_sharding(mesh)
    gradients = jax.jit(partition.on_mesh(mesh, state.make_gradients(c, mesh)), in_shardings=places)
    sums, grads = jax.device_get(gradients(*jax.device_put((now, reduction.batch(c)), places)))
    assert sums["moe"].count_E.min() > 0  # every expert has tokens
    assert (sums["moe"].dropped.sum() > 0) == (dispatch == "capacity")

    layer = grads["periods"]["blocks"][1]["branches"][0]
    product_RE, square_E = np.zeros(slope_RE.shape), np.zeros(slope_RE.shape[1])
    for name, direction in directions.items():
        grad = np.asarray(layer[name][...], np.float64)
        inner = tuple(range(3, direction.ndim))
        product_RE += (grad * direction).sum((1, *inner))
        square_E += np.square(grad).sum((0, *tuple(range(2, grad.ndim))))
    # along random signs a gradient's product is of the size of its norm
    assert np.all(np.abs(product_RE - slope_RE) < 1e-3 * np.sqrt(square_E))
