"""The Mamba-2 block equals the paper's equations in float64, and its steps and its prefill equal the row."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers import mamba2

SETTINGS = {
    "expand": 2.0,
    "d_state": 3,
    "d_head": 4,
    "num_groups": 2,
    "d_conv": 4,
    "dt_min": 0.001,
    "dt_max": 0.1,
    "A_min": 1.0,
    "A_max": 16.0,
    "norm_eps": 1e-5,
    "scan_implementation": None,
    "chunk_size": 4,
    "out_scale": 1.0,
    "dtype": jnp.dtype("float32"),
}
NAMES = ("in_proj", "conv_kernel", "conv_bias", "dt_bias", "A_log", "D", "norm_scale", "out_proj")
LENGTHS = (3, 6, 1)  # documents of a packed row
LENGTH = sum(LENGTHS)
D_MODEL, INNER, HEADS = 8, 16, 4


def make(d_model=D_MODEL, **settings):
    return mamba2.Mamba2(d_model, rngs=nnx.Rngs(params=0), **{**SETTINGS, **settings})


def weights_of(module):
    return {name: np.asarray(getattr(module, name)[...], np.float64) for name in NAMES}


def silu(x):
    return x / (1 + np.exp(-x))


def mamba2_block(u, w, groups=2, eps=1e-5):
    """One document, float64, head by head: section 7 of arXiv 2405.21060, in mamba2.py's order z, x, B, C, dt."""
    (length, _), (taps, convolved), heads = u.shape, w["conv_kernel"].shape, len(w["D"])
    inner = len(w["norm_scale"])
    width, states = inner // heads, (convolved - inner) // (2 * groups)
    projected = u @ w["in_proj"]
    z, xBC, dt = projected[:, :inner], projected[:, inner : inner + convolved], projected[:, inner + convolved :]
    padded = np.concatenate([np.zeros((taps - 1, convolved)), xBC])
    xBC = silu(
        np.stack([(padded[t : t + taps] * w["conv_kernel"]).sum(axis=0) for t in range(length)]) + w["conv_bias"]
    )
    x = xBC[:, :inner]
    B = xBC[:, inner : inner + groups * states].reshape(length, groups, states)
    C = xBC[:, inner + groups * states :].reshape(length, groups, states)
    dt = np.log1p(np.exp(dt + w["dt_bias"]))
    y = np.zeros((length, inner))
    for head in range(heads):
        own, group = slice(head * width, (head + 1) * width), head * groups // heads
        state = np.zeros((width, states))
        for t in range(length):
            drive = dt[t, head] * np.outer(x[t, own], B[t, group])
            state = np.exp(-dt[t, head] * np.exp(w["A_log"][head])) * state + drive
            y[t, own] = state @ C[t, group] + w["D"][head] * x[t, own]
    gated = (y * silu(z)).reshape(length, groups, inner // groups)
    normed = gated / np.sqrt(np.mean(gated**2, axis=-1, keepdims=True) + eps)
    return (normed.reshape(length, inner) * w["norm_scale"]) @ w["out_proj"]


def packed(u, w):
    """Each row a packed row of documents of LENGTHS."""
    rows = [np.split(np.asarray(row, np.float64), np.cumsum(LENGTHS)[:-1]) for row in u]
    return np.stack([np.concatenate([mamba2_block(document, w) for document in row]) for row in rows])


def draw(seed, length=LENGTH):
    return np.random.default_rng(seed).normal(size=(2, length, D_MODEL)).astype(np.float32)


SEGMENTS = np.broadcast_to(np.repeat([1, 2, 0], LENGTHS), (2, LENGTH))


def test_values_and_gradients_equal_the_paper_in_packed_rows(slope, fill):
    """1e-5 in values and 2e-4 in slopes: float32 through products, an exponential and a norm."""
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


def test_a_packed_row_gives_its_documents_what_they_get_alone_and_not_without_segment_ids(fill):
    """Outputs, and gradients of the inputs and of every weight, within 1e-5 of the largest."""
    module, u, dy = fill(make), draw(1), draw(2)

    @jax.jit
    def run(module, u, dy, segments):
        y, pull_back = jax.vjp(lambda module, u: module(u, segment_ids_BL=segments), module, u)
        return y, *pull_back(dy)

    ends = np.cumsum(LENGTHS)
    longest = max(LENGTHS)
    rows = [(slice(end - size, end), size) for end, size in zip(ends, LENGTHS, strict=True)]
    alone = lambda x: np.concatenate(  # noqa: E731
        [np.pad(x[:, part], ((0, 0), (0, longest - size), (0, 0))) for part, size in rows]
    )
    expected_y, expected_dw, expected_du = run(module, alone(u), alone(dy), None)
    isolated, leaking = run(module, u, dy, SEGMENTS), run(module, u, dy, None)

    def errors(actual):
        y, dw, du = actual
        pairs = [*zip(jax.tree.leaves(dw), jax.tree.leaves(expected_dw), strict=True)]
        for number, (part, size) in enumerate(rows):
            own = slice(2 * number, 2 * number + 2)
            pairs += [(y[:, part], expected_y[own, :size]), (du[:, part], expected_du[own, :size])]
        return [np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]

    assert max(errors(isolated)) < 1e-5
    assert np.median(errors(leaking)) > 1e-2


def test_initial_weights_are_those_of_the_reference_code():
    """Uniform bounds 1/sqrt(fan in), the fan-in of the depthwise convolution being its taps; -A uniform in [1, 16]."""
    made = jax.jit(lambda: make(64, d_state=5, d_head=1, out_scale=0.25))()
    w = weights_of(made)
    A = np.exp(w["A_log"])
    assert 1 <= A.min() < 1.5
    assert 15.5 < A.max() <= 16
    assert np.mean(A) == pytest.approx(8.5, abs=1.2)  # three standard errors of 128 draws; log-uniform would give 5.4
    np.testing.assert_array_equal(w["D"], 1)
    np.testing.assert_array_equal(w["norm_scale"], 1)
    dt = np.log1p(np.exp(w["dt_bias"]))
    assert dt.min() >= 0.001 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    assert np.median(dt) == pytest.approx(0.01, rel=0.5)  # log-uniform; uniform would give 0.05
    for name, inputs in {"in_proj": 64, "conv_kernel": 4, "conv_bias": 4, "out_proj": 128 * 16}.items():
        bound = inputs**-0.5
        assert 0.95 * bound < np.abs(w[name]).max() <= bound * (1 + 1e-6), name
    shapes = {name: value.shape for name, value in w.items()}
    assert shapes["in_proj"] == (64, 2 * 128 + 2 * 2 * 5 + 128)  # papers.md: 2 I + 2 G N + H
    assert shapes["conv_kernel"] == (4, 128 + 2 * 2 * 5)


@pytest.mark.parametrize(("begin", "split"), [(0, 1), (2, 3), (2, 9)])  # the first two fill no window
def test_a_prefill_and_steps_after_it_equal_the_row(fill, begin, split):
    """The last document of the row begins at `begin`: what is before it is in no cache."""
    module, u = fill(make), draw(1)
    segments = np.broadcast_to(np.repeat([1, 2], [begin, LENGTH - begin]), (2, LENGTH))

    @jax.jit
    def both(module, u):
        def step(cache, u_BD):
            y_BD, cache = module.step(u_BD, cache)
            return cache, y_BD

        y_BLD, cache = module.prefill(u[:, :split], segment_ids_BL=segments[:, :split])
        stepped, _ = jax.lax.scan(step, module.init_cache(2), u[:, begin:split].swapaxes(0, 1))
        last, rest_LBD = jax.lax.scan(step, cache, u[:, split:].swapaxes(0, 1))
        y_BLD = jnp.concatenate([y_BLD, rest_LBD.swapaxes(0, 1)], axis=1)
        return y_BLD, module(u, segment_ids_BL=segments), cache, stepped, last

    y, whole, cache, stepped, last = both(module, u)
    np.testing.assert_allclose(y, whole, atol=1e-5 * np.abs(whole).max())
    for actual, expected in zip(cache, stepped, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert last.window_BWY.shape == (2, 3, INNER + 2 * 2 * 3)
    assert last.state_BHPN.shape == (2, HEADS, 4, 3)
    assert last.state_BHPN.dtype == jnp.float32
    assert jax.tree.map(jnp.shape, last) == jax.tree.map(jnp.shape, module.init_cache(2))


def test_steps_from_an_empty_cache_equal_the_row(fill):
    module, u = fill(make), draw(1)

    @jax.jit
    def both(module, u):
        def step(cache, u_BD):
            y_BD, cache = module.step(u_BD, cache)
            return cache, y_BD

        _, y_LBD = jax.lax.scan(step, module.init_cache(2), u.swapaxes(0, 1))
        return y_LBD.swapaxes(0, 1), module(u)

    stepped, whole = both(module, u)
    np.testing.assert_allclose(stepped, whole, atol=1e-5 * np.abs(whole).max())


def test_bfloat16_is_finite_and_close_and_leaves_dt_the_scan_and_the_norm_in_float32(fill):
    """Within 3 % of the largest value: bfloat16 keeps 8 bits, through the products."""
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
    delicate = re.findall(r":(\w+)\[[\d,]*\] = (?:exp|log1p|rsqrt) ", program)  # of A, dt A, the softplus, the norm
    assert len(delicate) >= 4
    assert set(delicate) == {"f32"}
