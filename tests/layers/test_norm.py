"""Norms are their formulas in float32, and return the compute dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.layers import norm


def rms_norm(x, scale, bias):
    del bias
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-2) * scale


def layer_norm(x, scale, bias):
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-2) * scale + bias


@pytest.mark.parametrize(("kind", "formula"), [("rmsnorm", rms_norm), ("layernorm", layer_norm)])
def test_values_and_gradients_equal_numpy(kind, formula, slope, fill):
    """With an eps that counts. 1e-5: float32 over five values of size one."""
    rng = np.random.default_rng(0)
    x, dy, direction = (rng.normal(size=(3, 5)).astype(np.float32) for _ in range(3))
    module = fill(lambda: norm.build(kind, 5, eps=1e-2, dtype=jnp.dtype("float32")))
    weights = [np.asarray(module.scale[...], np.float64), 0.0]
    if isinstance(module, norm.LayerNorm):
        weights[1] = np.asarray(module.bias[...], np.float64)

    @jax.jit
    def run(x):
        y, pull_back = jax.vjp(module, x)
        return y, pull_back(dy)[0]

    y, gradient = run(x)
    np.testing.assert_allclose(y, formula(np.float64(x), *weights), atol=1e-5)
    expected = slope(lambda x: (dy * formula(x, *weights)).sum(), x, direction)
    assert (gradient * direction).sum() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_bfloat16_is_only_the_dtype_of_the_result(kind):
    module = norm.build(kind, 4, eps=1e-5, dtype=jnp.dtype("bfloat16"))
    x = np.array([1000.0, 1001.0, 1002.0, 1003.0], np.float32)  # bfloat16 would make these 1000, 1000, 1004, 1004
    y = jax.jit(module)(x)
    expected = (x - x.mean()) / x.std() if kind == "layernorm" else x / np.sqrt((x**2).mean())
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y), expected, rtol=2**-8)


def test_an_unknown_norm_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="norm=batchnorm is not known; choose one of rmsnorm, layernorm"):
        norm.build("batchnorm", 4, eps=1e-5, dtype=jnp.dtype("float32"))
