"""Laws of the train step: its loss, microbatches, meshes, and what it reports."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
import tiny
from flax import nnx
from steps import make_batch

from moejax import config as config_lib
from moejax import partition
from moejax.models import lm
from moejax.ops import scan
from moejax.training import evaluate, loss, state


def one_step(config: config_lib.Config):
    """The model and the metrics after one update from initialisation."""
    done = steps.run(config)
    return done.models[0], done.metrics[0]


@pytest.fixture
def config() -> config_lib.Config:
    c = tiny.get_config("unused")
    c.model.period = ("mamba", "moe", "attention", "mlp")
    c.model.num_periods = 1
    c.model.attention.num_heads = 2
    c.model.mlp.d_ff = 16
    c.model.mamba.chunk_size = 2
    c.optimizer.eps = 1e-3  # Adam's first update is g / (|g| + eps): a tiny eps turns rounding of a tiny g into a flip
    return c


def assert_same_update(first, second, tolerance):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)


def test_loss_is_the_mean_over_counted_tokens_plus_the_weighted_balance_loss(config):
    batch = make_batch(config)

    @jax.jit
    def forward(batch):
        model = lm.Lm(config.model, rngs=nnx.Rngs(params=config.training.seed))
        return model(batch["inputs_BL"], segment_ids_BL=batch["segment_ids_BL"], positions_BL=batch["positions_BL"],
                     train=True)  # fmt: skip

    logits, aux = forward(batch)
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_prob = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nats = [-log_prob[b, t, batch["targets_BL"][b, t]] for b, t in zip(*np.nonzero(batch["loss_mask_BL"]), strict=True)]
    _, metrics = one_step(config)
    np.testing.assert_allclose(metrics["loss"], np.mean(nats), rtol=1e-5)
    assert metrics["tokens"] == len(nats)
    np.testing.assert_allclose(metrics["routing"]["balance_loss"], np.mean(aux.losses["balance"]), rtol=1e-5)
    np.testing.assert_allclose(metrics["routing"]["load"].sum(axis=-1), 1.0, rtol=1e-6)


def test_balance_weight_reaches_the_router_and_no_other_expert_parameter(config):
    alone = copy.deepcopy(config.model)
    alone.period = ("moe",)
    batch = make_batch(config)

    @jax.jit
    @jax.grad
    def gradient(model, weight):
        return weight * jnp.mean(loss.sums(model, batch, train=True)["moe"].losses["balance"])

    model = tiny.model(alone)
    moe, none = (gradient(model, weight).periods.blocks[0].branches[0] for weight in (1.0, 0.0))
    assert np.abs(moe.router.weight[...]).max() > 0
    assert np.abs(none.router.weight[...]).max() == 0
    assert np.abs(moe.up[...]).max() == 0

    plain, _ = one_step(config)  # with 0.01
    config.model.moe.balance_weight = 10.0
    weighted, _ = one_step(config)
    routers = [model.periods.blocks[1].branches[0].router.weight[...] for model in (plain, weighted)]
    assert np.abs(routers[0] - routers[1]).max() > 1e-4


def assert_same_numbers(first, second, tolerance):
    numbers, others = ({**metrics, **metrics["routing"]} for metrics in (first, second))
    assert numbers.keys() == others.keys()
    for name in numbers.keys() - {"routing"}:
        np.testing.assert_allclose(others[name], numbers[name], rtol=tolerance, atol=1e-6, err_msg=name)
    for name in ("load", "dropped"):
        np.testing.assert_array_equal(others[name], numbers[name], err_msg=name)


# Every axis, and every pair that shares a leaf or a row, and as many microbatches as rows of a device, which count
# different tokens; test_router_training.py has other routers on other meshes.
MESHES = {
    "rows and parts of rows": ({"data": 2, "sequence": 4}, 4),
    "parameters": ({"fsdp": 2, "expert": 2, "tensor": 2}, 1),
}


@pytest.mark.parametrize("split", MESHES)
def test_the_update_does_not_depend_on_the_mesh_or_on_microbatches(config, split):
    one, one_metrics = one_step(config)
    axes, config.training.num_microbatches = MESHES[split]
    config.mesh = config_lib.MeshConfig(**({"data": 1} | axes))
    many, many_metrics = one_step(config)
    assert_same_numbers(one_metrics, many_metrics, 1e-4)
    np.testing.assert_allclose(many_metrics["loss"], one_metrics["loss"], rtol=1e-5)
    assert_same_update(one, many, 2e-5)


def test_training_and_evaluation_are_traced_on_their_mesh(config):
    """Else XLA alone would split the sequence: the same numbers, but it would gather whole rows for the scan."""
    config.model.period = ("mamba",)
    for axis in ("data", "sequence"):
        config.mesh = config_lib.MeshConfig(**{"data": 1, axis: 8})
        mesh, batch = partition.make_mesh(config.mesh), make_batch(config)
        initial = state.abstract(config, mesh)
        programs = (
            state.make_train_step(config, mesh).trace(initial, batch),
            evaluate.make_eval_step(mesh).trace(initial.model, batch),
        )
        for program in programs:
            assert ("ppermute" in str(program.jaxpr)) == (axis == "sequence")


def test_the_state_lives_where_its_shardings_say_and_the_old_one_is_consumed(config):
    config.mesh = config_lib.MeshConfig(data=1, **MESHES["parameters"][0])
    mesh = partition.make_mesh(config.mesh)
    places = jax.tree.leaves(state.shardings(config, mesh))
    done = steps.run(config)
    created = state.create(config, mesh)
    for leaf, place in zip(jax.tree.leaves(done.last), places, strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    for leaf, same, place in zip(jax.tree.leaves(created), jax.tree.leaves(steps.initial(config)), places, strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        np.testing.assert_array_equal(leaf, same)  # made on one device, whatever the mesh
    up = done.last.model.periods.blocks[1].branches[0].up[...]
    assert up.addressable_shards[0].data.size == up.size // 8  # expert=2 x fsdp=2 x tensor=2
    assert done.first.model.embedding[...].is_deleted()


def test_bf16_compute_trains_close_to_float32_with_float32_parameters(config):
    _, exact = one_step(config)
    config.model.compute_dtype = "bfloat16"
    model, rough = one_step(config)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(model))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))
    assert rough["loss"] != exact["loss"]
    np.testing.assert_allclose(rough["loss"], exact["loss"], rtol=5e-3)  # bf16 has 8 bits: 0.4 % a rounding


def test_steps_give_each_device_its_part_of_a_kernel(config):
    """In training and in evaluation: a kernel that is not told of the mesh gathers everything, or fails."""
    config.model.period, config.model.mamba.scan = ("mamba", "mlp"), "pallas_tpu"
    mesh = partition.make_mesh(config.mesh)
    model, batch = state.abstract(config, mesh), make_batch(config)
    with scan.interpreted():
        train = str(state.make_train_step(config, mesh).trace(model, batch).jaxpr)
        held_out = str(evaluate.make_eval_step(mesh).trace(model.model, batch).jaxpr)
    assert "shard_map[" in train
    assert "shard_map[" in held_out
