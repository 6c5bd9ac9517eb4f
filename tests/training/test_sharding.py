"""What a device keeps of the training state, and what it never holds."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
import tiny

from moejax import config as config_lib
from moejax import partition
from moejax.training import state


def settings(**mesh):
    c = tiny.get_config("unused")
    c.model.period, c.model.num_periods = ("mamba", "moe", "attention", "mlp"), 1
    c.model.d_model, c.model.attention.num_heads, c.model.mlp.d_ff = 48, 8, 64
    c.model.vocab_size, c.data.batch_size = 264, 16
    c.model.moe.num_experts, c.model.moe.d_expert, c.model.moe.activation = 40, 20, "swiglu"
    c.model.moe.num_shared_experts = 1
    c.mesh = config_lib.MeshConfig(data=1, **mesh)
    return c, partition.make_mesh(c.mesh)


UP, DOWN = 40 * 48 * 2 * 20, 40 * 20 * 48  # elements of all experts' matrices


def shares(config, mesh):
    """(path, elements, those of a device) of every leaf of the state."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.abstract(config, mesh)):
        yield jax.tree_util.keystr(path), leaf.size, math.prod(leaf.sharding.shard_shape(leaf.shape))


@pytest.mark.parametrize(
    "axes", [{"fsdp": 8}, {"fsdp": 4, "expert": 2}, {"expert": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}]
)
def test_a_device_keeps_an_eighth_of_the_experts_and_of_their_moments(axes):
    parts = sorted((size, part) for _, size, part in shares(*settings(**axes)) if size in (UP, DOWN))
    assert parts == [(DOWN, DOWN // 8)] * 3 + [(UP, UP // 8)] * 3  # parameters, two moments of AdamW


def test_over_fsdp_a_device_keeps_an_eighth_of_all_but_what_the_table_leaves_whole():
    """Norms, and what Mamba has without a dim of the model's width: under a fiftieth of the state."""
    found = list(shares(*settings(fsdp=8)))
    whole = {path: size for path, size, part in found if part == size}
    assert all(part * 8 == size for path, size, part in found if path not in whole)
    names = {re.findall(r"\w+", path)[-2 if path.endswith("value") else -1] for path in whole}
    assert names <= {
        *("scale", "count", "step", "conv_kernel", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D"),
    }, names
    assert sum(whole.values()) < sum(size for _, size, _ in found) / 50


def test_no_step_holds_all_experts_and_none_gathers_them_over_their_axis():
    config, mesh = settings(expert=4, fsdp=2)
    model = state.abstract(config, mesh)
    shape, place = (config.data.batch_size, config.data.seq_length), partition.batch_sharding(mesh)
    names = ("inputs_BL", "targets_BL", "segment_ids_BL", "positions_BL")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place) for name in names}
    batch["loss_mask_BL"] = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=place)
    text = state.make_train_step(config, mesh).lower(model, batch).compile().as_text() or ""
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", text)}
    assert {(10, 24, 2, 20), (10, 48, 2, 20)} <= {dims[-4:] for dims in shapes}  # as they are kept; gathered over fsdp
    assert not [dims for dims in shapes if math.prod(dims) in (UP, DOWN) or (40 in dims[:-2] and dims[-2:] == (2, 20))]
