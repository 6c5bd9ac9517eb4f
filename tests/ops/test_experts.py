"""Each expert's feed-forward network is the matrix products of its definition on its own slots."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import experts

ACTIVATIONS = ("relu", "gelu", "swiglu")


def activate(hidden, activation):
    """float64; gelu in its tanh form (arXiv 1606.08415), swiglu as silu(first half) * second half."""
    if activation == "relu":
        return np.maximum(hidden, 0)
    if activation == "gelu":
        return 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    half = hidden.shape[-1] // 2
    return hidden[..., :half] / (1 + np.exp(-hidden[..., :half])) * hidden[..., half:]


def loop(inputs, activation):
    x, up, down = (np.asarray(value, np.float64) for value in inputs)
    y = np.zeros((*x.shape[:3], down.shape[-1]))
    for g, e, c in np.ndindex(*x.shape[:3]):
        y[g, e, c] = activate(x[g, e, c] @ up[e], activation) @ down[e]
    return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_equal_a_loop(activation, slope):
    """1e-5: float32 sums of a few products of size one."""
    rng = np.random.default_rng(0)
    columns = 4 * experts.hidden_multiple(activation)
    shapes = ((2, 3, 2, 3), (3, 3, columns), (3, 4, 3), (2, 3, 2, 3))
    *inputs, dy = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

    @jax.jit
    def run(*inputs):
        y, pull_back = jax.vjp(lambda *inputs: experts.expert_ffn(*inputs, activation=activation), *inputs)
        return y, pull_back(dy)

    y, gradients = run(*inputs)
    np.testing.assert_allclose(y, loop(inputs, activation), atol=1e-5)
    for position, name in enumerate(("x", "up", "down")):

        def loss(value, position=position):
            return (dy * loop([*inputs[:position], value, *inputs[position + 1 :]], activation)).sum()

        direction = rng.normal(size=inputs[position].shape)
        expected = slope(loss, inputs[position], direction)
        assert (gradients[position] * direction).sum() == pytest.approx(expected, rel=1e-4), name


def test_the_output_has_the_dtype_of_the_tokens():
    struct = jax.ShapeDtypeStruct
    weights = struct((1, 3, 4), jnp.float32), struct((1, 4, 3), jnp.float32)
    ffn = functools.partial(experts.expert_ffn, activation="relu")
    assert jax.eval_shape(ffn, struct((1, 1, 2, 3), jnp.bfloat16), *weights).dtype == jnp.bfloat16


def test_only_a_gated_activation_has_two_columns_a_hidden_unit():
    assert [experts.hidden_multiple(name) for name in ACTIVATIONS] == [1, 1, 2]


def test_an_unknown_activation_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="activation=tanh is not known; choose one of relu, gelu, swiglu"):
        experts.activate(jnp.ones(2), "tanh")
