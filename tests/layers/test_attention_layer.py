"""Multi-head attention with rotary positions equals its formula, and its steps over a cache equal the row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers import attention

D_MODEL, HEADS, LENGTH, BASE = 8, 2, 5, 50.0


def make(dtype="float32", **settings):
    return attention.Attention(
        D_MODEL,
        num_heads=HEADS,
        rope_base=BASE,
        **{"init_scale": 1.0} | settings,
        dtype=jnp.dtype(dtype),
        rngs=nnx.Rngs(params=0),
    )


def multi_head(inputs, positions, segments, causal=True):
    """Float64, head after head: project, turn pairs (i, i + Q/2) as complex numbers, attend, project back."""
    x, qkv, out = (np.asarray(value, np.float64) for value in inputs)
    y, half = np.zeros(x.shape), D_MODEL // HEADS // 2
    frequency = BASE ** (-np.arange(half) / half)
    for b in range(x.shape[0]):
        turn = np.exp(1j * positions[b][:, None] * frequency)
        for h in range(HEADS):
            query, key, value = (x[b] @ qkv[i, :, h] for i in range(3))
            query, key = ((z[:, :half] + 1j * z[:, half:]) * turn for z in (query, key))
            score = (query @ key.conj().T).real / np.sqrt(2 * half)  # Re(a conj(b)) is the dot product of the pairs
            seen = segments[b][:, None] == segments[b]
            if causal:
                seen &= np.tri(x.shape[1], dtype=bool)
            weight = np.where(seen, np.exp(score), 0)
            y[b] += weight / weight.sum(axis=1, keepdims=True) @ value @ out[h]
    return y


def test_values_and_gradients_equal_numpy_in_packed_rows(slope, fill):
    """1e-5: float32 products over eight values of size one."""
    rng, module = np.random.default_rng(1), fill(make)
    x, dy = (rng.normal(size=(2, LENGTH, D_MODEL)).astype(np.float32) for _ in range(2))
    segments = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
    positions = np.array([[0, 1, 0, 1, 2], [0, 3, 4, 0, 2]])  # the second row skips some

    @jax.jit
    def run(module, x):
        y, pull_back = jax.vjp(lambda m, x: m(x, segment_ids_BL=segments, positions_BL=positions), module, x)
        return y, pull_back(dy)

    y, (gradient, dx) = run(module, x)
    inputs = [x, np.asarray(module.qkv[...]), np.asarray(module.out[...])]
    np.testing.assert_allclose(y, multi_head(inputs, positions, segments), atol=1e-5)
    for position, actual in enumerate((dx, gradient.qkv[...], gradient.out[...])):

        def loss(value, position=position):
            moved = [*inputs[:position], value, *inputs[position + 1 :]]
            return (dy * multi_head(moved, positions, segments)).sum()

        direction = rng.normal(size=inputs[position].shape)
        assert (actual * direction).sum() == pytest.approx(slope(loss, inputs[position], direction), rel=1e-4)


def test_an_encoders_attention_looks_both_ways_and_a_decoders_back_by_value_and_by_gradient(fill):
    x = np.random.default_rng(1).normal(size=(2, LENGTH, D_MODEL)).astype(np.float32)
    positions, segments = np.tile(np.arange(LENGTH), (2, 1)), np.array([[1, 1, 1, 2, 2], [1] * LENGTH])
    for settings, causal in (({}, True), ({"causal": False}, False)):
        module = fill(lambda settings=settings: make(**settings))

        @jax.jit
        def run(module, x):
            outputs = lambda x: module(x, segment_ids_BL=segments)  # noqa: E731
            return outputs(x), jax.jacobian(lambda x: outputs(x).sum(axis=(0, 2)))(x)

        y, jacobian_LBLD = run(module, x)
        inputs = [x, np.asarray(module.qkv[...]), np.asarray(module.out[...])]
        np.testing.assert_allclose(y, multi_head(inputs, positions, segments, causal), atol=1e-5)
        sees_BLL = np.abs(jacobian_LBLD).max(axis=3).swapaxes(0, 1) > 0
        same = segments[:, :, None] == segments[:, None]
        np.testing.assert_array_equal(sees_BLL, same & np.tri(LENGTH, dtype=bool) if causal else same)


def test_steps_over_a_cache_equal_the_row_with_positions_by_default(fill):
    module, x = fill(make), np.random.default_rng(1).normal(size=(2, LENGTH, D_MODEL)).astype(np.float32)

    @jax.jit
    def both(module, x):
        def step(cache, x_BD):
            y_BD, cache = module.step(x_BD, cache)
            return cache, y_BD

        cache, y_LBD = jax.lax.scan(step, module.init_cache(2, LENGTH + 2), x.swapaxes(0, 1))
        return y_LBD.swapaxes(0, 1), module(x), cache.length

    stepped, whole, length = both(module, x)
    np.testing.assert_allclose(stepped, whole, atol=1e-5)
    assert length == LENGTH


def test_bfloat16_keeps_its_dtype_in_the_row_and_in_the_cache(fill):
    module = fill(lambda: make("bfloat16"))
    x = jax.ShapeDtypeStruct((2, LENGTH, D_MODEL), jnp.bfloat16)
    assert jax.eval_shape(module, x).dtype == jnp.bfloat16
    assert jax.eval_shape(lambda: module.init_cache(2, LENGTH)).key_BHMQ.dtype == jnp.bfloat16


def test_weights_of_moe_mambas_scheme_have_the_sd_of_its_inputs_and_are_not_cut_at_two():
    """sqrt(scale / 8), cut at +-2 scale = 2: 5.7 sd of scale 1. 25 %: four standard deviations of the estimate."""
    module = make(scheme="moe_mamba")
    assert np.std(module.qkv[...]) == pytest.approx(np.sqrt(1 / D_MODEL), rel=0.25)
    assert np.abs(module.qkv[...]).max() > 2 * np.sqrt(1 / D_MODEL)
    assert np.abs(make().qkv[...]).max() < 2 * np.sqrt(1 / D_MODEL)
