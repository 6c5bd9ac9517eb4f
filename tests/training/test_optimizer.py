"""Laws of the optimizer: its update, its schedule, and what it decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax import config as config_lib
from moejax import rules
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


def rates(config, num_steps):
    return np.asarray(jax.vmap(optimizer.schedule(config))(jnp.arange(num_steps)), np.float64)


@pytest.mark.parametrize(("num_steps", "warmup"), [(1000, 10), (60, 0), (37, 36)])
def test_one_final_step_makes_the_schedule_of_llm_random_with_its_last_update(num_steps, warmup):
    """Its loop runs over range(n_steps + 1), and its cosine ends at n_steps, MoE-Mamba's at a tenth of the peak."""

    def of_llm_random(step, peak, lowest=0.1):
        if step < warmup:
            return peak * (step + 1) / warmup
        if step < num_steps:
            return peak * (lowest + (1 - lowest) * (1 + np.cos(np.pi * (step - warmup) / (num_steps - warmup))) / 2)
        return peak * lowest

    c = config_lib.Config()
    c.training.num_steps = num_steps + 1
    c.optimizer = config_lib.OptimizerConfig(learning_rate=5e-4, warmup_steps=warmup, final_steps=1)
    rules.validate(c)
    expected = [of_llm_random(step, 5e-4) for step in range(num_steps + 1)]
    np.testing.assert_allclose(rates(c, num_steps + 1), expected, rtol=2e-5)
    assert expected[-1] == pytest.approx(5e-5) != expected[-2]
    c.optimizer.final_steps = 0  # the cosine is a step longer
    assert rates(c, num_steps + 1)[-1] > 5e-5 * (1 + 1e-6)


def test_final_steps_keep_the_final_rate_to_the_end(config):
    config.optimizer.final_steps = 5
    found = rates(config, 24)
    np.testing.assert_allclose(found[19:], 0.01, rtol=1e-6)
    assert found[18] > 0.0105


def test_inverse_sqrt_is_flat_for_the_warmup_and_then_falls_with_the_root_of_the_step(config):
    """T5X: 1 / sqrt(max(step, 10000)), the first step being 0."""
    config.optimizer = config_lib.OptimizerConfig(learning_rate=1.0, schedule="inverse_sqrt", warmup_steps=4)
    rules.validate(config)
    np.testing.assert_allclose(rates(config, 24), 1 / np.sqrt([4] * 5 + list(range(5, 24))), rtol=1e-6)


def test_constant_is_the_peak_after_a_linear_warmup(config):
    config.optimizer = config_lib.OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=4)
    rules.validate(config)
    np.testing.assert_allclose(rates(config, 24)[:6], np.array([0.25, 0.5, 0.75, 1, 1, 1]) * 1e-3, rtol=1e-6)
    config.optimizer.warmup_steps = 0
    np.testing.assert_allclose(rates(config, 24), 1e-3, rtol=1e-6)


@pytest.mark.parametrize("name", ["inverse_sqrt", "constant"])
def test_linear_decay_takes_the_last_steps_down_a_line_that_ends_at_zero_after_the_last(config, name):
    """Mesh-TensorFlow: times min(1, (n - step) / (n share)), here over the last 6 of 24 steps."""
    config.optimizer = config_lib.OptimizerConfig(learning_rate=1.0, schedule=name, warmup_steps=4)
    flat = rates(config, 24)
    config.optimizer.linear_decay = 0.25
    rules.validate(config)
    line = np.array([1] * 18 + [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    np.testing.assert_allclose(rates(config, 24), flat * line, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"schedule": "linear"}, "optimizer.schedule=linear is not known; choose one of cosine, constant"),
        ({"schedule": "inverse_sqrt", "warmup_steps": 0}, "optimizer.warmup_steps=0 must be 1 or more"),
        ({"schedule": "inverse_sqrt", "final_fraction": 0.2}, "final_fraction=0.2 has no effect with optimizer.sched"),
        ({"schedule": "constant", "final_steps": 1}, "final_steps=1 has no effect with .*constant; leave it at 0"),
        ({"linear_decay": 0.1}, "optimizer.linear_decay=0.1 has no effect with optimizer.schedule=cosine"),
        ({"schedule": "constant", "linear_decay": 1.5}, "optimizer.linear_decay=1.5 must lie in"),
        ({"final_steps": 900}, "final_steps=900 and optimizer.warmup_steps=100 leave no step of .*num_steps=1000 to"),
        ({"final_steps": -1}, "optimizer.final_steps=-1 must be 0 or more"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_in_one_line(fields, line):
    c = config_lib.Config(optimizer=config_lib.OptimizerConfig(**fields))
    with pytest.raises(config_lib.ConfigError, match=line):
        rules.validate(c)


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


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_run_may_begin_or_end_clipping(config, name):
    config.optimizer.name = name
    params = model_lib.abstract(config.model)
    trees = []
    for clip_norm in (0.0, 1.0):
        config.optimizer.clip_norm = clip_norm
        trees.append(jax.tree.structure(jax.eval_shape(optimizer.build(config).init, params)))
    assert trees[0] == trees[1]
