"""Generation is the model's own forward pass, one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import config as config_lib
from moejax.models import generate, lm

VOCAB, ALLOWED = 16, 12  # the last four ids are beyond the tokenizer
PROMPT = np.array([[0, 3, 1], [0, 7, 7]], np.int32)
NUM_TOKENS = 5


def make():
    config = config_lib.ModelConfig(vocab_size=VOCAB, d_model=8, prefix=("attention",), period=("mamba|moe",))
    config.num_periods, config.attention.num_heads, config.mamba.d_state = 2, 2, 2
    config.moe = config_lib.MoeConfig(num_experts=3, d_expert=8, eval_capacity_factor=0.0)
    return lm.Lm(config, rngs=nnx.Rngs(params=0))


@pytest.fixture(scope="module")
def model(fill):
    model = fill(make)
    model.embedding[...][ALLOWED:] *= 3  # an unmasked argmax would often fall here
    return model


def write(model, key=0, temperature=0.0, top_k=0, vocab_size=ALLOWED):
    return np.asarray(
        generate.generate(
            model,
            PROMPT,
            jax.random.key(key),
            num_tokens=NUM_TOKENS,
            temperature=temperature,
            top_k=top_k,
            vocab_size=vocab_size,
        )
    )


def test_greedy_equals_the_argmax_of_a_full_forward_pass_at_every_token(model):
    """Over the tokenizer's ids alone, whatever the key. Rows are padded on the right, which a causal model ignores."""
    forward = jax.jit(lambda model, tokens: model(tokens)[0])
    row, masked = np.zeros((2, PROMPT.shape[1] + NUM_TOKENS), np.int32), False
    row[:, : PROMPT.shape[1]] = PROMPT
    for t in range(PROMPT.shape[1], row.shape[1]):
        logits = np.asarray(forward(model, row))[:, t - 1]
        row[:, t] = logits[:, :ALLOWED].argmax(axis=1)
        masked |= bool((logits.argmax(axis=1) >= ALLOWED).any())
    assert masked  # the limit on ids did count
    for key in (0, 1):
        np.testing.assert_array_equal(write(model, key=key), row[:, PROMPT.shape[1] :])


def test_sampling_repeats_with_its_key_and_keeps_to_the_tokenizers_ids(model):
    samples = [write(model, key=key, temperature=5.0) for key in (0, 0, 1)]
    np.testing.assert_array_equal(samples[0], samples[1])
    assert (samples[0] != samples[2]).any()
    assert max(sample.max() for sample in samples) < ALLOWED


def test_one_candidate_and_no_temperature_are_greedy():
    logits = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
    for temperature, top_k in ((0.7, 1), (0.0, 0)):
        sample = functools.partial(generate.sample, temperature=temperature, top_k=top_k)
        np.testing.assert_array_equal(jax.jit(sample)(logits, jax.random.key(0)), logits.argmax(axis=1))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 2), (1.0, 99)])
def test_samples_follow_the_softmax_over_the_most_probable_tokens(temperature, top_k):
    """20,000 draws: a share is within 0.015 (4 sigma) of its probability."""
    logits = np.log([0.4, 0.1, 0.3, 0.2]).astype(np.float32)
    sample = jax.jit(functools.partial(generate.sample, temperature=temperature, top_k=top_k))
    tokens = sample(jnp.broadcast_to(logits, (20_000, 4)), jax.random.key(0))
    weights = np.exp(logits / temperature)
    if top_k == 2:
        weights[[1, 3]] = 0
    assert tokens.dtype == jnp.int32
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 20_000, weights / weights.sum(), atol=0.015)
