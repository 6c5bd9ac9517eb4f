"""The dense feed-forward sublayer is its two products."""

import jax
import jax.numpy as jnp
import moe_loop
import numpy as np
import pytest
from flax import nnx

from moejax.layers import mlp


def make(activation, bias, dtype="float32", width=4, d_ff=6, scheme="switch", init_scale=1.0):
    return mlp.Mlp(
        width,
        d_ff=d_ff,
        activation=activation,
        bias=bias,
        scheme=scheme,
        init_scale=init_scale,
        dtype=jnp.dtype(dtype),
        rngs=nnx.Rngs(params=0),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", moe_loop.ACTIVATIONS)
def test_values_equal_numpy(activation, bias, fill):
    """The gradients are those of ops.experts and of jax's own products."""
    module = fill(lambda: make(activation, bias))
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    weights = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    assert ("up_bias" in weights) == ("down_bias" in weights) == bias
    expected = moe_loop.mlp(x.astype(np.float64), weights, activation)
    np.testing.assert_allclose(jax.jit(module)(x), expected, rtol=1e-5, atol=1e-4)


def test_biases_start_at_zero_or_are_not_there():
    assert make("relu", False).up_bias is make("relu", False).down_bias is None
    module = make("relu", True)
    assert module.up_bias is not None
    assert module.down_bias is not None
    assert not np.any(module.up_bias[...])
    assert not np.any(module.down_bias[...])


def test_biases_of_moe_mambas_scheme_are_those_of_torch_and_its_matrices_are_not_cut_at_two_sd():
    """Uniform in +-1/sqrt(inputs), of sd 1/sqrt(3 inputs): 1000 draws of which are within 6 % of that, at 4 sd."""
    module = jax.jit(lambda: make("relu", True, width=1000, d_ff=1200, scheme="moe_mamba", init_scale=0.1))()
    for bias, inputs in ((module.up_bias, 1000), (module.down_bias, 1200)):
        assert np.std(bias[...]) == pytest.approx(1 / np.sqrt(3 * inputs), rel=0.06)
        assert 0.98 / np.sqrt(inputs) < np.abs(bias[...]).max() <= 1 / np.sqrt(inputs)
    for matrix, inputs in ((module.up, 1000), (module.down, 1200)):
        sd = np.sqrt(0.1 / inputs)
        assert np.std(matrix[...]) == pytest.approx(sd, rel=0.01)
        assert np.abs(matrix[...]).max() > 4 * sd


def test_bfloat16_runs_in_bfloat16_over_float32_weights(fill):
    module = fill(lambda: make("swiglu", True, "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(module)} == {jnp.dtype("float32")}
    assert jax.eval_shape(module, jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16
