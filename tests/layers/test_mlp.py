"""The dense feed-forward sublayer is its two products."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers import mlp

ACTIVATE = {
    "relu": lambda h: np.maximum(h, 0),
    "gelu": lambda h: 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "swiglu": lambda h: h[..., :6] / (1 + np.exp(-h[..., :6])) * h[..., 6:],
}


def make(activation, bias, dtype="float32"):
    return mlp.Mlp(
        4, d_ff=6, activation=activation, bias=bias, init_scale=1.0, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(params=0)
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATE))
def test_values_equal_numpy(activation, bias, fill):
    """The gradients are those of ops.experts and of jax's own products."""
    module = fill(lambda: make(activation, bias))
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    weights = [module.up, module.up_bias, module.down, module.down_bias]
    up, up_bias, down, down_bias = (np.zeros(()) if w is None else np.asarray(w[...], np.float64) for w in weights)
    expected = ACTIVATE[activation](np.float64(x) @ up + up_bias) @ down + down_bias
    np.testing.assert_allclose(jax.jit(module)(x), expected, rtol=1e-5, atol=1e-4)


def test_biases_start_at_zero_or_are_not_there():
    assert make("relu", False).up_bias is make("relu", False).down_bias is None
    module = make("relu", True)
    assert module.up_bias is not None
    assert module.down_bias is not None
    assert not np.any(module.up_bias[...])
    assert not np.any(module.down_bias[...])


def test_bfloat16_runs_in_bfloat16_over_float32_weights(fill):
    module = fill(lambda: make("swiglu", True, "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(module)} == {jnp.dtype("float32")}
    assert jax.eval_shape(module, jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16
