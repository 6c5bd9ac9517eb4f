"""Laws of the optimizer: its update, its schedule, and what it decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax import config as config_lib
from moejax.models import model as model_lib
from moejax.training import optimizer


@pytest.fixture
def config() -> config_lib.Config:
    c = tiny.get_config("unused")
    c.optimizer = config_lib.OptimizerConfig(learning_rate=0.1, warmup_steps=4, final_fraction=0.1, clip_norm=0.5)
    c.training.num_steps = 24
    return c


def test_schedule_warms_up_linearly_from_one_share_and_falls_as_a_cosine_to_the_final_fraction(config):
    rates = [float(optimizer.schedule(config)(step)) for step in range(30)]
    np.testing.assert_allclose(rates[:4], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    for step in range(4, 24):
        share = 0.5 * (1 + np.cos(np.pi * (step - 4) / 20))
        np.testing.assert_allclose(rates[step], 0.1 * (0.1 + 0.9 * share), rtol=1e-5)
    np.testing.assert_allclose(rates[24:], 0.01, rtol=1e-5)


def test_schedule_without_warmup_starts_at_the_peak(config):
    config.optimizer.warmup_steps = 0
    np.testing.assert_allclose(optimizer.schedule(config)(0), 0.1, rtol=1e-6)


def test_matrices_decays_the_weights_of_linear_maps_and_all_decays_everything(config):
    config.model.period = ("mamba", "mamba2", "moe", "attention", "mlp")
    config.model.mlp.bias = config.model.moe.bias = True
    model = model_lib.abstract(config.model)
    decayed, spared = set(), set()
    for path, decays in jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(model, "matrices")):
        (decayed if decays else spared).add(path[-2].name)
    assert decayed == {"in_proj", "x_proj", "dt_proj", "out_proj", "weight", "up", "down", "qkv", "out"}
    assert spared == {
        "embedding", "A_log", "D", "dt_bias", "conv_kernel", "conv_bias", "scale", "norm_scale", "up_bias", "down_bias",
    }  # fmt: skip
    assert all(jax.tree.leaves(optimizer.decay_mask(model, "all")))


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_updates_equal_adamw_written_out_in_numpy(config, decay):
    config.optimizer.decay = decay
    model = tiny.model(config.model)
    mask = [bool(x) for x in jax.tree.leaves(optimizer.decay_mask(model, decay))]
    tx, rate, c = optimizer.build(config), optimizer.schedule(config), config.optimizer
    opt_state = tx.init(model)
    params = [np.asarray(x, np.float64) for x in jax.tree.leaves(model)]
    first, second = [np.zeros_like(x) for x in params], [np.zeros_like(x) for x in params]
    for step in range(3):
        rng = np.random.default_rng(step)
        grads = [rng.normal(size=x.shape) * (10.0 ** -(step * 2)) for x in params]  # clipped, clipped, not clipped
        as_tree = jax.tree.unflatten(jax.tree.structure(model), [jnp.asarray(g, jnp.float32) for g in grads])
        updates, opt_state = tx.update(as_tree, opt_state, model)
        model = jax.tree.map(jnp.add, model, updates)

        norm = np.sqrt(sum((g**2).sum() for g in grads))
        assert (norm > c.clip_norm) == (step < 2)
        for i, gradient in enumerate(grads):
            gradient = gradient * min(1.0, c.clip_norm / norm)
            first[i] = c.beta1 * first[i] + (1 - c.beta1) * gradient
            second[i] = c.beta2 * second[i] + (1 - c.beta2) * gradient**2
            mean = first[i] / (1 - c.beta1 ** (step + 1))
            scale = np.sqrt(second[i] / (1 - c.beta2 ** (step + 1))) + c.eps
            decay_term = c.weight_decay * params[i] if mask[i] else 0.0
            params[i] = params[i] - float(rate(step)) * (mean / scale + decay_term)
        for ours, expected in zip(jax.tree.leaves(model), params, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-6)  # float32 against float64
