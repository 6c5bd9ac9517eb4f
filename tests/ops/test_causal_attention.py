"""Rotary positions are rotations, and attention is the softmax of its definition over a document, or its past."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import attention

BATCH, LENGTH, HEADS, WIDTH = 2, 5, 2, 4
SEGMENTS = np.array([[1, 1, 2, 2, 0], [3, 1, 1, 1, 1]])


def draw(count, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(BATCH, LENGTH, HEADS, WIDTH)).astype(np.float32) for _ in range(count)]


def attend(inputs, segments, causal=True):
    """By loops in float64 over rows, heads and positions."""
    query, key, value = (np.asarray(x, np.float64) for x in inputs)
    y = np.zeros(query.shape)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            for t in range(query.shape[1]):
                end = t + 1 if causal else query.shape[1]
                seen = [s for s in range(end) if segments[b, s] == segments[b, t]]
                weights = np.exp([query[b, t, h] @ key[b, s, h] / np.sqrt(query.shape[3]) for s in seen])
                y[b, t, h] = sum(w * value[b, s, h] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return y


def test_rotary_turns_each_pair_as_a_complex_number():
    """5e-6: float32 angles of up to 40 radians."""
    (x,) = draw(1)
    positions = np.array([[0, 1, 2, 7, 40], [3, 0, 1, 0, 1]])
    pairs = np.asarray(x, np.float64)
    pairs = pairs[..., : WIDTH // 2] + 1j * pairs[..., WIDTH // 2 :]
    frequency = 10_000.0 ** (-2 * np.arange(WIDTH // 2) / WIDTH)
    turned = pairs * np.exp(1j * positions[..., None, None] * frequency)
    rotary = jax.jit(functools.partial(attention.rotary, base=10_000.0))
    actual = rotary(x, positions)
    np.testing.assert_allclose(actual, np.concatenate([turned.real, turned.imag], axis=-1), atol=5e-6)
    assert rotary(x.astype(jnp.bfloat16), positions).dtype == jnp.bfloat16


def test_rotary_products_depend_on_the_distance_alone():
    query, key = draw(2)

    @jax.jit
    def product(shift):
        positions = jnp.arange(LENGTH) + jnp.full((BATCH, 1), shift)
        turned = [attention.rotary(x, positions, base=100.0) for x in (query, key)]
        return jnp.einsum("blhq,bmhq->bhlm", *turned)

    near, far = product(0), product(11)
    np.testing.assert_allclose(near, far, atol=2e-5)  # angles of 16 radians in float32
    assert np.abs(near - np.einsum("blhq,bmhq->bhlm", query, key)).max() > 0.1  # it does turn


@functools.partial(jax.jit, static_argnames="causal")
def run(query, key, value, segments, dy, *, causal):
    def outputs(*qkv):
        return attention.attention(*qkv, segment_ids_BL=segments, **({} if causal else {"causal": False}))

    y, pull_back = jax.vjp(outputs, query, key, value)
    return y, pull_back(dy)


@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_equal_a_loop(causal, slope):
    """Packed and not; causal by default. 1e-5: float32 softmax over five terms of size one."""
    *qkv, dy = draw(4)
    directions = draw(3, seed=1)
    for segments in (SEGMENTS, None):
        ids = np.ones((BATCH, LENGTH)) if segments is None else segments
        y, gradients = run(*qkv, segments, dy, causal=causal)
        np.testing.assert_allclose(y, attend(qkv, ids, causal), atol=1e-5)
        for position in range(3):

            def loss(x, position=position, ids=ids):
                return (dy * attend([*qkv[:position], x, *qkv[position + 1 :]], ids, causal)).sum()

            expected = slope(loss, qkv[position], directions[position])
            np.testing.assert_allclose((gradients[position] * directions[position]).sum(), expected, rtol=1e-4)


@pytest.mark.parametrize("block_size", [2, 4, 256])
def test_steps_over_a_cache_equal_the_sequence(block_size):
    """In a cache of 6, which 4 does not divide; what lies before a row's start or is not yet filled does not count."""
    inputs, start = draw(3), np.array([0, 2])
    heads_first = [np.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, 1), (0, 0))) for x in inputs]

    @jax.jit
    def stepped(query, key, value):
        def step(place):
            seen = (jnp.arange(6) >= start[:, None]) & (jnp.arange(6) <= place)
            filled = [jnp.where(seen[:, None, :, None], x, 1e3) for x in (key, value)]
            return attention.attention_step(query[:, :, place], *filled, start, place + 1, block_size=block_size)

        return jax.lax.map(step, jnp.arange(LENGTH)).swapaxes(0, 1)

    after_start = np.arange(LENGTH) >= start[:, None]
    expected = attend(inputs, after_start)
    np.testing.assert_allclose(stepped(*heads_first)[after_start], expected[after_start], atol=1e-5)
