"""Laws of training a model with experts inside its Mamba blocks: loss, statistics, layout, generation, counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
import tiny
from flax import nnx

from moejax import config as config_lib
from moejax import partition
from moejax.layers import block
from moejax.models import model as model_lib
from moejax.training import optimizer, tables, trainer


@pytest.fixture
def config() -> config_lib.Config:
    """Two mixtures, one in each of two Mamba blocks; two rows a routing group."""
    c = tiny.get_config("unused")
    c.model.period, c.model.num_periods = ("mamba_moe",), 2
    c.model.mamba.moe_projections = ("gate",)
    c.model.mamba.chunk_size = 4
    c.model.moe.router, c.model.moe.group_size, c.model.moe.z_weight = "switch", 64, 0.5
    c.model.moe.balance_weight = 0.0
    c.model.embedding_std = 0.5
    c.optimizer.eps = 1e-3  # Adam's first update is g / (|g| + eps): a tiny eps turns rounding of a tiny g into a flip
    c.optimizer.clip_norm = 0.0
    return c


def test_metrics_have_a_row_for_every_mixture_in_depth_order(config):
    initial, batch = steps.initial(config), steps.make_batch(config)
    _, metrics = steps.take(config, initial, batch)
    routing = metrics["routing"]
    assert routing["load"].shape == (2, 4)
    np.testing.assert_allclose(routing["load"].sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(routing["experts_per_token"], 1, rtol=1e-6)
    assert np.isfinite(metrics["loss"])
    later = dataclasses.replace(initial, step=initial.step + 1)
    assert steps.take(config, later, batch)[1]["routing"]["z_loss"] != routing["z_loss"]  # other keys
    config.model.prefix, config.model.suffix = ("mamba_moe",), ("moe", "mamba_moe")
    config.model.mamba.moe_projections, config.model.moe.group_size = ("gate", "out"), 0
    model, tokens = model_lib.abstract(config.model), jax.ShapeDtypeStruct((2, 32), jnp.int32)
    _, aux = jax.eval_shape(lambda model, tokens: model(tokens), model, tokens)
    assert aux.count_E.shape == (9, 4)
    places = [np.arange(9)[place].tolist() for _, place in model_lib.moe_layers(model)]
    assert places == [0, 1, [2, 4], [3, 5], 6, 7, 8]


def test_auxiliary_losses_enter_the_objective_with_their_weight_as_a_mean_over_mixtures(config):
    """With no token counted, Adam's first moment of a router is 0.1 of half the gradient of the mean z-loss.

    Against differences of the reported mean, in float32: 1 %. They move the last router, whose logits alone then move,
    smoothly; the noise is that of the step's keys in all of them.
    """
    before, batch = steps.initial(config), steps.make_batch(config)
    batch["loss_mask_BL"] = np.zeros_like(batch["loss_mask_BL"])
    weight = before.model.periods.blocks[0].branches[0].gate_proj.router.weight[...]
    after, _ = steps.take(config, before, batch)
    moment = after.opt_state[1][0].mu["periods"]["blocks"][0]["branches"][0]["gate_proj"]["router"]
    direction = np.random.default_rng(0).normal(size=weight.shape).astype(np.float32)
    direction[0] = 0

    def z_loss(moved):
        model = jax.tree.map(lambda leaf: leaf, before.model)
        model.periods.blocks[0].branches[0].gate_proj.router.weight.set_value(moved)
        return steps.take(config, dataclasses.replace(before, model=model), batch)[1]["routing"]["z_loss"]

    slope = (z_loss(weight + 1e-2 * direction) - z_loss(weight - 1e-2 * direction)) / 2e-2
    assert np.abs(slope) > 1e-2
    np.testing.assert_allclose((moment["weight"][...] * direction).sum(), 0.1 * 0.5 * slope, rtol=0.01)


def test_layout_changes_no_number(config):
    """Two microbatches on four devices against one batch on one; noise included, groups of two rows."""
    initial, batch = steps.initial(config), steps.make_batch(config)
    whole, metrics = steps.take(config, initial, batch)
    config.mesh, config.training.num_microbatches = config_lib.MeshConfig(data=1, fsdp=1, expert=2, tensor=2), 2
    split, others = steps.take(config, initial, batch)
    for name in metrics["routing"]:
        np.testing.assert_allclose(others["routing"][name], metrics["routing"][name], rtol=5e-5, atol=1e-6)
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(split.model), jax.tree.leaves(whole.model), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=0)


def test_every_parameter_can_be_split_over_every_axis(config):
    """No parameter asks for one mesh axis twice."""
    mesh = partition.make_mesh(config_lib.MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    config.model.mamba.moe_projections, config.model.moe.num_shared_experts = ("conv", "gate", "out"), 1
    places = partition.tree_shardings(model_lib.abstract(config.model), mesh)
    branch = places.periods.blocks[0].branches[0]
    spec = lambda parameter: tuple(jax.tree.leaves(parameter)[0].spec[1:])  # noqa: E731
    for experts in (branch.conv_proj, branch.gate_proj, branch.out_proj):
        assert spec(experts.up) == ("expert", "fsdp", "tensor")
        assert spec(experts.down) == ("expert", "tensor", "fsdp")
        assert spec(experts.shared.down) == ("tensor", "fsdp")


def test_decay_touches_matrices_of_projections_and_experts_and_spares_the_recurrence(config):
    """A_log, D and dt's bias are spared, as state-spaces/mamba marks them, unless everything is decayed."""
    config.model.mamba.moe_projections = ("conv",)
    model = model_lib.abstract(config.model)
    masks = jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(model, "matrices"))
    decayed = {path[-2].name for path, decays in masks if decays}
    assert decayed == {"up", "down", "weight", "gate_proj", "out_proj", "x_proj", "dt_proj"}
    assert {"A_log", "D", "dt_bias"} <= {path[-2].name for path, decays in masks if not decays}
    assert all(jax.tree.leaves(optimizer.decay_mask(model, "all")))


def test_what_is_said_and_refused_of_experts_counts_those_inside_mamba(config):
    mesh = partition.make_mesh(config.mesh, jax.devices()[:1])
    config.model.moe.group_size = 100
    with pytest.raises(config_lib.ConfigError, match=r"model\.moe\.group_size=100 does not divide the 256 tokens"):
        partition.check_batch(config, mesh)
    config.model.moe.router, config.model.moe.hash_table = "hash", "nowhere.npy"
    with pytest.raises(config_lib.ConfigError, match=r"hash_table=nowhere\.npy: there is no such file"):
        tables.read(config)
    config.model.moe.router = "sinkhorn"
    assert "router=sinkhorn balances over all tokens of a group" in trainer.notes(config, None)[0]


@pytest.mark.parametrize("router", ["hash", "label"])
def test_ids_and_labels_reach_the_mixtures_in_rows_and_steps(config, router, fill):
    config.model.moe.router, config.model.moe.group_size = router, 0
    layer = fill(lambda: block.Block("mamba_moe", config.model, rngs=nnx.Rngs(params=0)))
    if router == "hash":
        layer.branches[0].gate_proj.router.state.set_value(jnp.arange(260, dtype=jnp.int32) % 4)
    x = np.random.default_rng(0).normal(size=(2, 1, 16)).astype(np.float32)
    ids, labels = np.array([[7], [9]], np.int32), np.array([[2], [1]], np.int32)

    @jax.jit
    def both(layer):
        y, aux = layer(x, ids_BL=ids, labels_BL=labels)
        return y, aux, layer.step(x[:, 0], layer.init_cache(2, 1), ids_B=ids[:, 0], labels_B=labels[:, 0])[0]

    y, (aux,), one = both(layer)
    np.testing.assert_array_equal(aux.count_E, [0, 1, 0, 1] if router == "hash" else [0, 1, 1, 0])
    np.testing.assert_allclose(one, y[:, 0], atol=1e-5)
