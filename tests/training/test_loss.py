"""Laws of the z-loss of the vocabulary: its value and gradient, and that nothing else of a run depends on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
import tiny

from moejax import config as config_lib
from moejax import partition, rules
from moejax.models import lm
from moejax.training import loss, state


@pytest.fixture
def config() -> config_lib.Config:
    c = tiny.get_config("unused")
    c.model.period, c.model.num_periods, c.model.mlp.d_ff = ("mlp",), 1, 16
    c.optimizer.clip_norm, c.optimizer.eps = 0.0, 1e-3
    return c


def test_z_loss_and_its_gradient_have_their_closed_forms():
    """d/dl of sum_t w_t log(Z_t)^2 is w_t 2 log(Z_t) softmax(l_t); float64 against float32."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(2, 5, 7)) + 2
    mask = rng.random((2, 5)) < 0.6
    batch = {"inputs_BL": 0, "segment_ids_BL": 0, "positions_BL": 0, "targets_BL": np.zeros((2, 5), int)}

    def z(logits):
        given = batch | {"loss_mask_BL": mask}
        return loss.sums(lambda *_, **__: (logits, None), given, train=True, with_z=True)["z"]

    found, gradient = jax.value_and_grad(z)(jnp.asarray(logits, jnp.float32))
    normaliser = np.exp(logits).sum(-1)
    np.testing.assert_allclose(found, (np.log(normaliser) ** 2 * mask).sum(), rtol=1e-6)
    closed = (2 * np.log(normaliser) * mask / normaliser)[..., None] * np.exp(logits)
    np.testing.assert_allclose(gradient, closed, rtol=1e-5, atol=1e-6)


def test_the_gradient_gets_the_weight_times_that_of_the_mean_over_counted_tokens(config):
    """Of the head W: W_bar = sum_t h_t (w 2 log(Z_t) softmax(l_t) / n)^T, with h found from the logits h W."""
    config.model.tie_embeddings = False
    batch, mesh, gradients = steps.make_batch(config), steps.make_mesh(config), []
    for config.training.z_weight in (0.0, 0.3):
        function = jax.jit(partition.on_mesh(mesh, state.make_gradients(config, mesh)))
        gradients.append(np.asarray(function(steps.initial(config), batch)[1]["head"][...], np.float64))
    model = steps.initial(config).model
    logits = np.float64(jax.jit(lm.Lm.__call__)(model, batch["inputs_BL"])[0])
    normaliser, mask = np.exp(logits).sum(-1), batch["loss_mask_BL"]
    hidden = logits @ np.linalg.pinv(np.float64(model.head[...]))
    scale = 0.3 * 2 * np.log(normaliser) / normaliser * mask / mask.sum()
    closed = np.einsum("bld,blv->dv", hidden, scale[..., None] * np.exp(logits))
    np.testing.assert_allclose(gradients[1] - gradients[0], closed, rtol=1e-3, atol=1e-5 * np.abs(closed).max())


def test_the_weighted_z_loss_moves_the_weights_and_not_the_reported_loss_on_any_mesh_or_microbatch(config):
    without = steps.run(config)
    config.training.z_weight = 0.5
    rules.validate(config)
    with_z = steps.run(config)
    assert "vocabulary_z_loss" not in without.metrics[0]
    assert with_z.metrics[0]["loss"] == pytest.approx(without.metrics[0]["loss"], rel=1e-6)
    assert with_z.metrics[0]["grad_norm"] > 1.01 * without.metrics[0]["grad_norm"]

    batch = steps.make_batch(config)
    logits, _ = jax.jit(lm.Lm.__call__)(steps.initial(config).model, batch["inputs_BL"])
    log_z = np.log(np.exp(np.float64(logits)).sum(-1))
    mean = (log_z[batch["loss_mask_BL"]] ** 2).mean()
    np.testing.assert_allclose(with_z.metrics[0]["vocabulary_z_loss"], mean, rtol=1e-5)

    config.training.num_microbatches, config.mesh.data, config.mesh.fsdp = 2, 2, 2
    elsewhere = steps.run(config)
    np.testing.assert_allclose(elsewhere.metrics[0]["vocabulary_z_loss"], mean, rtol=1e-5)
    for ours, expected in zip(jax.tree.leaves(elsewhere.models[0]), jax.tree.leaves(with_z.models[0]), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_a_z_weight_that_has_no_effect_or_no_sense_is_refused(config):
    config.training.z_weight = -1e-4
    with pytest.raises(config_lib.ConfigError, match=r"training\.z_weight=-0\.0001 must be 0 or more"):
        rules.validate(config)
    config.training.z_weight, config.model.num_softmaxes = 1e-4, 2
    with pytest.raises(
        config_lib.ConfigError, match=r"z_weight=0\.0001 has no effect with model\.num_softmaxes=2; lea"
    ):
        rules.validate(config)
