"""The language model with any router: what flows to MoE layers, what a causal one may not see, encoders, and heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import config as config_lib
from moejax.models import lm
from moejax.models import model as model_lib

VOCAB, LENGTH = 11, 8


def make(router="top_k", moe=None, **changes):
    config = config_lib.ModelConfig(vocab_size=VOCAB, d_model=8, period=("attention", "moe"), num_periods=2)
    config.attention.num_heads, config.embedding_std = 2, 1.0
    config.moe = config_lib.MoeConfig(router=router, num_experts=4, d_expert=8, num_groups=2, top_groups=1)
    config.moe = dataclasses.replace(config.moe, **(moe or {}))
    config = dataclasses.replace(config, **changes)
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(lambda: lm.Lm(config, rngs=nnx.Rngs(params=0)), compiler_options=options)()


def draw_tokens(seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, size=(2, LENGTH)).astype(np.int32)


@pytest.mark.parametrize("router", [name for name, router in config_lib.ROUTERS.items() if router.causal])
def test_evaluation_sees_no_later_token_with_any_causal_router_even_where_it_drops(router):
    """By value: whether a choice is dropped is no smooth function."""
    model = make(router, {"eval_capacity_factor": 0.5})
    labels = np.zeros((2, LENGTH), np.int32)
    run = jax.jit(lambda tokens: model(tokens, labels_BL=labels))
    first, second = draw_tokens(), draw_tokens()
    second[:, 5:] = (second[:, 5:] + 3) % VOCAB
    (before, aux), (after, _) = run(first), run(second)
    routed = config_lib.ROUTERS[router]
    assert (np.asarray(aux.dropped).sum() > 0) == (routed.sparse and not routed.dropless)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.asarray(before[:, 5:]) != np.asarray(after[:, 5:])).any()


@pytest.mark.parametrize("router", ["hash", "label"])
def test_ids_and_labels_reach_every_layer_in_rows_and_steps(router):
    model, tokens = make(router), draw_tokens()
    labels = np.array([[2], [1]], np.int32) * np.ones_like(tokens)
    logits, aux = jax.jit(lambda tokens, labels: model(tokens, labels_BL=labels))(tokens, labels)
    if router == "label":
        np.testing.assert_array_equal(aux.count_E, [[0, LENGTH, LENGTH, 0]] * 2)
    else:
        tables = next(layer.router.state[...] for layer, _ in model_lib.moe_layers(model))
        for table, count in zip(np.asarray(tables), np.asarray(aux.count_E), strict=True):
            np.testing.assert_array_equal(count, np.bincount(table[tokens.reshape(-1)], minlength=4))

    def step(cache, inputs):
        logits, cache = model.step(inputs, cache, labels_B=labels[:, 0])
        return cache, logits

    _, steps = jax.jit(lambda tokens: jax.lax.scan(step, model.init_cache(2, LENGTH), tokens.T))(tokens)
    np.testing.assert_allclose(np.swapaxes(steps, 0, 1), logits, atol=1e-5)


def test_a_router_by_label_says_what_it_lacks():
    model = make("label")
    with pytest.raises(ValueError, match="router=label needs the labels"):
        jax.eval_shape(lambda tokens: model(tokens)[0], draw_tokens())


def test_noise_differs_between_layers_and_rows_and_only_trains():
    model, tokens = make("switch", {"jitter": 0.9}), np.zeros((2, LENGTH), np.int32)
    run = jax.jit(lambda keys, train: model(tokens, keys_B=keys, train=train)[0], static_argnums=1)
    keys = jax.random.split(jax.random.key(0), 2)
    noisy, still = run(keys, True), run(keys, False)
    assert (np.asarray(noisy[0]) != np.asarray(noisy[1])).any()
    np.testing.assert_array_equal(still[0], still[1])
    np.testing.assert_array_equal(run(keys[::-1], True)[::-1], noisy)
    quiet = run(None, True)
    np.testing.assert_array_equal(quiet[0], quiet[1])  # no keys, no noise


@pytest.mark.parametrize("router", ["expert_choice", "soft_moe"])
def test_an_encoder_takes_the_routers_that_look_at_all_tokens_and_every_token_sees_every_other(router):
    model = make(router, {"eval_capacity_factor": 1.0}, causal=False)
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, 8))

    layer = jax.tree.map(lambda leaf: leaf[0], model.periods).blocks[1]
    run = jax.jit(lambda x: layer(x)[0])
    if router == "soft_moe":  # the leak: later tokens are in the first one's output
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(layer(x)[0][0, 0] ** 2)))(x)
        assert np.abs(gradient[0, 1:]).min() > 0
    else:  # an expert that takes a later token leaves an earlier one
        later = jax.random.normal(jax.random.key(1), (16, 1, LENGTH, 8)).at[:, :, :4].set(x[:, :4])
        outputs = np.stack([run(x) for x in later])
        assert (outputs[:, 0, :4] != outputs[0, 0, :4]).any()
    logits, aux = jax.jit(lambda tokens: model(tokens))(draw_tokens())
    assert np.isfinite(logits).all()
    assert aux.count_E.shape == (2, 4)


def test_attention_of_an_encoder_looks_both_ways():
    tokens = draw_tokens()
    changed = tokens.copy()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    for causal in (True, False):
        model = make("top_k", {"eval_capacity_factor": 0.0}, causal=causal)
        run = jax.jit(lambda tokens, model=model: model(tokens)[0])
        same = np.asarray(run(tokens)[:, 0]) == np.asarray(run(changed)[:, 0])
        assert same.all() == causal


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_mixture_of_softmaxes_gives_log_probabilities_and_trains(tied):
    model, tokens = make(num_softmaxes=3, tie_embeddings=tied), draw_tokens()
    logits, _ = jax.jit(lambda tokens: model(tokens))(tokens)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), 0, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda model: -model(tokens)[0][..., 0].mean()))(model)
    for leaf in (gradient.mixture.prior, gradient.mixture.latent, gradient.embedding):
        assert np.abs(leaf[...]).max() > 0
