"""Each expert's feed-forward network is the matrix products of its definition, on whichever rows it is given."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax.ops import experts

D, F, E = 3, 4, 3
COUNT = np.array([3, 0, 2], np.int32)  # dropless: rows of each expert, of six
FORMS = ("capacity", "dropless", "weighted")


def activate(hidden, activation):
    """float64; gelu in its tanh form (arXiv 1606.08415), the gated ones as act(first half) * second half."""
    gelu = lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))  # noqa: E731
    half = hidden.shape[-1] // 2
    gate, up = hidden[..., :half], hidden[..., half:]
    return {
        "relu": lambda: np.maximum(hidden, 0),
        "gelu": lambda: gelu(hidden),
        "swiglu": lambda: gate / (1 + np.exp(-gate)) * up,
        "geglu": lambda: gelu(gate) * up,
    }[activation]()


def loop(form, inputs, activation, mask):
    x, gate, up, down, *biases = inputs
    up_bias, down_bias = biases or (np.zeros((E, up.shape[2])), np.zeros((E, D)))
    y = np.zeros((len(x), D))
    for n, e in np.ndindex(len(x), E):
        first = COUNT[:e].sum()
        mine = {"capacity": n // 2 == e, "weighted": True}.get(form, first <= n < first + COUNT[e])
        if mine:
            hidden = activate(x[n] @ up[e] + up_bias[e], activation) * mask[n]
            y[n] += (hidden @ down[e] + down_bias[e]) * (gate[n, e] if form == "weighted" else 1)
    return y


def ffn(form, inputs, activation, mask):
    x, gate, *weights = inputs
    weights, drop = experts.Weights(*weights), lambda hidden_SF: hidden_SF * mask
    if form == "capacity":
        return experts.capacity_ffn(x, weights, activation=activation, drop=drop)
    if form == "weighted":
        return experts.weighted_ffn(x, gate, weights, activation=activation, drop=drop)
    return experts.dropless_ffn(x, COUNT, weights, activation=activation, implementation="blocked", drop=drop)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_equal_a_loop(form, bias, slope):
    """With every activation, and with hidden units dropped. 1e-5: float32 sums of a few products."""
    rng = np.random.default_rng(0)
    activations = config_lib.ACTIVATIONS[bias::2] if form == "capacity" else ("geglu",)
    mask = rng.integers(0, 3, size=(6, F)).astype(np.float32)
    all_inputs, dy = {}, rng.normal(size=(6, D)).astype(np.float32)
    for name in activations:
        columns = F * experts.hidden_multiple(name)
        shapes = [(6, D), (6, E), (E, D, columns), (E, F, D)] + [(E, columns), (E, D)] * bias
        all_inputs[name] = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    @jax.jit
    def run(all_inputs):
        results = {}
        for name, inputs in all_inputs.items():
            y, pull_back = jax.vjp(lambda inputs, name=name: ffn(form, inputs, name, mask), inputs)
            results[name] = y, pull_back(dy)[0]
        return results

    for name, (y, gradients) in jax.device_get(run(all_inputs)).items():
        exact = [value.astype(np.float64) for value in all_inputs[name]]
        np.testing.assert_allclose(y, loop(form, exact, name, mask), atol=1e-5)
        for position, value in enumerate(exact):

            def loss(moved, position=position, exact=exact, name=name):
                return (dy * loop(form, [*exact[:position], moved, *exact[position + 1 :]], name, mask)).sum()

            direction = rng.normal(size=value.shape)
            expected = slope(loss, value, direction)
            assert (gradients[position] * direction).sum() == pytest.approx(expected, rel=1e-4, abs=1e-5), position


def test_rows_past_the_last_expert_give_nothing_with_biases_too():
    weights = experts.Weights(*(jnp.ones(s) for s in ((E, D, F), (E, F, D), (E, F), (E, D))))
    ffn = functools.partial(experts.dropless_ffn, activation="relu", implementation="blocked")
    y = jax.jit(ffn)(jnp.ones((6, D)), COUNT, weights)
    np.testing.assert_array_equal(np.abs(y).max(axis=1) > 0, [True] * 5 + [False])


@pytest.mark.parametrize("bias", [False, True])
def test_choices_one_after_another_equal_a_loop(bias):
    """Two choices a token, one of them no expert. 1e-5: float32 sums of a few products."""
    rng = np.random.default_rng(0)
    shapes = [(E, D, 2 * F), (E, F, D)] + [(E, 2 * F), (E, D)] * bias
    weights = experts.Weights(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))
    x, gate = (rng.normal(size=shape).astype(np.float32) for shape in ((4, D), (4, 2)))
    expert = np.array([[2, 0], [1, E], [0, 2], [2, 1]])
    y = jax.jit(functools.partial(experts.chosen_ffn, activation="geglu"))(x, expert, gate, weights)
    expected = np.zeros((4, D))
    for n, k in np.ndindex(4, 2):
        if (e := expert[n, k]) < E:
            up, down, *biases = (np.asarray(value[e], np.float64) for value in weights if value is not None)
            up_bias, down_bias = biases or (0, 0)
            hidden = activate(x[n] @ up + up_bias, "geglu")
            expected[n] += gate[n, k] * (hidden @ down + down_bias)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_output_has_the_dtype_of_the_tokens(form):
    struct = jax.ShapeDtypeStruct
    inputs = [struct((6, D), jnp.bfloat16)]
    inputs += [struct(s, jnp.float32) for s in ((6, E), (E, D, F), (E, F, D), (E, F), (E, D))]
    y = jax.eval_shape(lambda *inputs: ffn(form, inputs, "relu", jnp.ones((6, F), jnp.bfloat16)), *inputs)
    assert (y.shape, y.dtype) == ((6, D), jnp.bfloat16)


def test_only_a_gated_activation_has_two_columns_a_hidden_unit():
    names = ("relu", "gelu", "swiglu", "geglu")
    assert names == config_lib.ACTIVATIONS
    assert [experts.hidden_multiple(name) for name in names] == [1, 1, 2, 2]


def test_an_unknown_activation_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="activation=tanh is not known; choose one of relu, gelu, swiglu, geglu"):
        experts.activate(jnp.ones(2), "tanh")
