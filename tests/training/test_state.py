"""Laws of the train step: its loss, microbatches, meshes, and what it reports."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax import config as config_lib
from moejax import partition, rules
from moejax.ops import scan
from moejax.training import evaluate, loss, state


def make_batch(config: config_lib.Config, seed: int = 0) -> dict[str, np.ndarray]:
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


def one_step(config: config_lib.Config):
    """The model and the metrics after one update from initialisation."""
    return _one_step(copy.deepcopy(config))


@functools.cache  # compiling is what takes the time here
def _one_step(config: config_lib.Config):
    rules.validate(config)
    batch = make_batch(config)
    mesh = partition.make_mesh(config.mesh, jax.devices()[:1] if config.mesh.fsdp == -1 else None)
    partition.check_batch(config, mesh)
    initial = state.create(config, mesh)
    placed = jax.device_put(batch, partition.batch_sharding(mesh))
    new, metrics = state.make_train_step(config, mesh)(initial, placed)
    return jax.device_get(new.model), jax.device_get(metrics)


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
    model = tiny.model(config.model, config.training.seed)
    logits, aux = model(batch["inputs_BL"], segment_ids_BL=batch["segment_ids_BL"], positions_BL=batch["positions_BL"],
                        train=True)  # fmt: skip
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
    batch = make_batch(config)

    def gradient(weight):
        def objective(model):
            sums = loss.sums(model, batch, train=True)
            return weight * jnp.mean(sums["moe"].losses["balance"])

        return jax.jit(jax.grad(objective))(tiny.model(config.model))

    with_weight, without = gradient(1.0), gradient(0.0)
    moe, none = with_weight.periods.blocks[1].branches[0], without.periods.blocks[1].branches[0]
    assert np.abs(moe.router.weight[...]).max() > 0
    assert np.abs(none.router.weight[...]).max() == 0
    assert np.abs(moe.up[...]).max() == 0

    config.model.moe.balance_weight = 0.0
    plain, _ = one_step(config)
    config.model.moe.balance_weight = 10.0
    weighted, _ = one_step(config)
    routers = [model.periods.blocks[1].branches[0].router.weight[...] for model in (plain, weighted)]
    assert np.abs(routers[0] - routers[1]).max() > 1e-4


@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_change_no_number_though_rows_count_different_tokens(config, parts):
    whole, whole_metrics = one_step(config)
    config.training.num_microbatches = parts
    split, split_metrics = one_step(config)
    assert_same_update(whole, split, 2e-5)
    for name, value in {**whole_metrics, **whole_metrics["routing"]}.items():
        if name != "routing":
            split_value = {**split_metrics, **split_metrics["routing"]}[name]
            np.testing.assert_allclose(split_value, value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_microbatches_of_rows_and_parts_of_rows_on_eight_devices_change_no_number(config):
    config.model.moe.router = "switch"  # with noise: keys are split by rows alone
    whole, whole_metrics = one_step(config)
    config.mesh = config_lib.MeshConfig(data=2, sequence=4)
    config.training.num_microbatches = 2
    split, split_metrics = one_step(config)
    assert_same_update(whole, split, 2e-5)
    np.testing.assert_allclose(split_metrics["loss"], whole_metrics["loss"], rtol=1e-5)


@pytest.mark.parametrize("axis", ["data", "fsdp", "expert", "sequence", "tensor"])
def test_the_update_does_not_depend_on_the_mesh(config, axis):
    one, one_metrics = one_step(config)
    config.mesh = config_lib.MeshConfig(data=-1)
    if axis != "data":
        setattr(config.mesh, axis, 2 if axis == "tensor" else 4)
    many, many_metrics = one_step(config)
    np.testing.assert_allclose(many_metrics["loss"], one_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(many_metrics["grad_norm"], one_metrics["grad_norm"], rtol=1e-4)
    np.testing.assert_array_equal(many_metrics["routing"]["load"], one_metrics["routing"]["load"])
    np.testing.assert_array_equal(many_metrics["routing"]["dropped"], one_metrics["routing"]["dropped"])
    assert_same_update(one, many, 2e-5)


def test_training_and_evaluation_are_traced_on_their_mesh(config):
    """Else XLA alone would split the sequence: the same numbers, but it would gather whole rows for the scan."""
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
    config.mesh = config_lib.MeshConfig(data=2, fsdp=2, expert=2)
    mesh = partition.make_mesh(config.mesh)
    places = jax.tree.leaves(state.shardings(config, mesh))
    initial = state.create(config, mesh)
    step = state.make_train_step(config, mesh)
    new, _ = step(initial, jax.device_put(make_batch(config), partition.batch_sharding(mesh)))
    for leaf, place in zip(jax.tree.leaves(new), places, strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    up = new.model.periods.blocks[1].branches[0].up[...]
    assert up.addressable_shards[0].data.size == up.size // 4  # expert=2 x fsdp=2
    assert initial.model.embedding[...].is_deleted()


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
