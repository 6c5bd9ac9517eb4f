"""The Mamba block equals the paper's equations in float64, and its steps equal the row."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers import mamba

SETTINGS = {
    "expand": 2.0,
    "d_state": 3,
    "d_conv": 4,
    "dt_rank": 0,
    "dt_min": 0.001,
    "dt_max": 0.1,
    "scan_implementation": None,
    "chunk_size": 4,
    "out_scale": 1.0,
    "dtype": jnp.dtype("float32"),
}
NAMES = ("in_proj", "conv_kernel", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D", "out_proj")
LENGTHS = (3, 6, 1)  # documents of a packed row


def make(d_model=6, **settings):
    return mamba.Mamba(d_model, rngs=nnx.Rngs(params=0), **{**SETTINGS, **settings})


def weights_of(module):
    return {name: np.asarray(getattr(module, name)[...], np.float64) for name in NAMES}


def silu(x):
    return x / (1 + np.exp(-x))


def mamba_block(u, w):
    """One document, float64, as section 3.4 and Algorithm 2 of arXiv 2312.00752 and mamba_simple.py have it."""
    (length, _), (taps, inner), states = u.shape, w["conv_kernel"].shape, w["A_log"].shape[1]
    x, z = np.split(u @ w["in_proj"], 2, axis=1)
    convolved = np.zeros_like(x)
    for t in range(length):
        convolved[t] = w["conv_bias"]
        for lag in range(min(taps, t + 1)):
            convolved[t] += w["conv_kernel"][taps - 1 - lag] * x[t - lag]
    x = silu(convolved)
    projected, rank = x @ w["x_proj"], w["dt_proj"].shape[0]
    dt = np.log1p(np.exp(projected[:, :rank] @ w["dt_proj"] + w["dt_bias"]))
    B, C = projected[:, rank : rank + states], projected[:, rank + states :]
    A, h, y = -np.exp(w["A_log"]), np.zeros((inner, states)), np.zeros_like(x)
    for t in range(length):
        h = np.exp(dt[t][:, None] * A) * h + (dt[t] * x[t])[:, None] * B[t]
        y[t] = h @ C[t] + w["D"] * x[t]
    return (y * silu(z)) @ w["out_proj"]


def packed(u, w):
    """Each row a packed row of documents of LENGTHS."""
    rows = [np.split(np.asarray(row, np.float64), np.cumsum(LENGTHS)[:-1]) for row in u]
    return np.stack([np.concatenate([mamba_block(document, w) for document in row]) for row in rows])


def draw(seed, d_model=6):
    return np.random.default_rng(seed).normal(size=(2, sum(LENGTHS), d_model)).astype(np.float32)


SEGMENTS = np.broadcast_to(np.repeat([1, 2, 0], LENGTHS), (2, sum(LENGTHS)))


def test_values_and_gradients_equal_the_paper_in_packed_rows(slope, fill):
    """1e-5 in values and 2e-4 in slopes: float32 through five products and an exponential."""
    module, u, dy, rng = fill(make), draw(1), draw(2), np.random.default_rng(3)

    @jax.jit
    def run(module, u):
        y, pull_back = jax.vjp(lambda module, u: module(u, segment_ids_BL=SEGMENTS), module, u)
        return y, pull_back(dy)

    y, (gradient, du) = run(module, u)
    w = weights_of(module)
    np.testing.assert_allclose(y, packed(u, w), atol=1e-5 * np.abs(y).max())
    direction = rng.normal(size=u.shape)
    expected = slope(lambda u: (dy * packed(u, w)).sum(), u, direction)
    assert (du * direction).sum() == pytest.approx(expected, rel=2e-4)
    for name in NAMES:
        direction = rng.normal(size=w[name].shape)
        expected = slope(lambda value, name=name: (dy * packed(u, {**w, name: value})).sum(), w[name], direction)
        actual = (np.asarray(getattr(gradient, name)[...]) * direction).sum()
        assert actual == pytest.approx(expected, rel=2e-4), name


def test_initial_weights_are_those_of_the_reference_code():
    """Uniform bounds 1/sqrt(fan in), the fan-in of the depthwise convolution being its taps."""
    w = weights_of(jax.jit(lambda: make(64, d_state=16, out_scale=0.25))())
    np.testing.assert_allclose(w["A_log"], np.broadcast_to(np.log(np.arange(1, 17)), (128, 16)), rtol=1e-6)
    np.testing.assert_array_equal(w["D"], 1)
    dt = np.log1p(np.exp(w["dt_bias"]))
    assert dt.min() >= 0.001 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    assert dt.max() / dt.min() > 10
    fan_in = {"in_proj": 64, "conv_kernel": 4, "conv_bias": 4, "x_proj": 128, "dt_proj": 4, "out_proj": 128 * 16}
    for name, inputs in fan_in.items():
        bound = inputs**-0.5
        assert 0.95 * bound < np.abs(w[name]).max() <= bound * (1 + 1e-6), name
    shapes = {name: value.shape for name, value in w.items()}
    assert shapes["in_proj"] == (64, 256)
    assert shapes["x_proj"] == (128, 4 + 2 * 16)


@pytest.mark.parametrize(("d_model", "dt_rank", "rank"), [(16, 0, 1), (17, 0, 2), (64, 0, 4), (64, 7, 7)])
def test_the_rank_of_dt_is_a_sixteenth_of_the_width_rounded_up_by_default(d_model, dt_rank, rank):
    module = jax.eval_shape(lambda: make(d_model, dt_rank=dt_rank))
    assert module.dt_proj.shape == (rank, 2 * d_model)
    assert module.x_proj.shape == (2 * d_model, rank + 2 * 3)


def test_a_fraction_of_an_inner_channel_is_cut():
    assert jax.eval_shape(lambda: make(5, expand=1.5)).D.shape == (7,)


def test_steps_equal_the_row(fill):
    module, u = fill(make), draw(1)

    @jax.jit
    def both(module, u):
        def step(cache, u_BD):
            y_BD, cache = module.step(u_BD, cache)
            return cache, y_BD

        cache, y_LBD = jax.lax.scan(step, module.init_cache(2), u.swapaxes(0, 1))
        return y_LBD.swapaxes(0, 1), module(u), cache

    stepped, whole, cache = both(module, u)
    np.testing.assert_allclose(stepped, whole, atol=1e-5)
    assert cache.window_BWI.shape == (2, 3, 12)
    assert cache.state_BIN.dtype == jnp.float32


def test_bfloat16_is_finite_and_close_and_leaves_dt_and_the_scan_in_float32(fill):
    """Within 3 % of the largest value: bfloat16 keeps 8 bits, through five products."""
    module, u = fill(lambda: make(dtype=jnp.dtype("bfloat16"))), draw(1)

    def run(module, u):
        y, pull_back = jax.vjp(lambda module, u: module(u, segment_ids_BL=SEGMENTS), module, u)
        return y, pull_back(jnp.ones_like(y))[0]

    y, gradient = jax.jit(run)(module, u.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    expected = packed(u, weights_of(module))
    np.testing.assert_allclose(np.float64(y), expected, atol=0.03 * np.abs(expected).max())
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
    program = str(jax.make_jaxpr(run)(module, u.astype(jnp.bfloat16)))
    exponentials = re.findall(r":(\w+)\[[\d,]*\] = (?:exp|log1p) ", program)  # of A, of dt A, in the softplus
    assert len(exponentials) >= 3
    assert set(exponentials) == {"f32"}
