"""Every router that has logits: by numpy loops over tokens and experts, and what padding and a NaN may touch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import router_loops

from moejax.ops import routing

# (router, T, E, its arguments); the arrays that some need beside the logits come from ARRAYS
CASES = [
    ("soft", 5, 3, {}),
    ("soft", 2, 1, {}),
    ("noisy_top_k", 7, 5, {"k": 2}),
    ("noisy_top_k", 5, 4, {"k": 3, "noise_epsilon": 0.5}),
    ("noisy_top_k", 3, 3, {"k": 3}),
    ("noisy_top_k", 3, 1, {"k": 1}),
    ("switch", 5, 4, {}),
    ("switch", 3, 1, {}),
    ("gshard", 9, 4, {"threshold": 0.5}),
    ("gshard", 5, 2, {"threshold": 0.0}),
    ("gshard", 3, 1, {"threshold": 0.5}),
    ("top_k", 5, 4, {"k": 2}),
    ("top_k", 5, 4, {"k": 3, "normalise": True}),
    ("top_k", 3, 3, {"k": 3, "normalise": True}),
    ("group_limited", 7, 8, {"k": 3, "num_groups": 4, "top_groups": 2, "scale": 16.0}),
    ("group_limited", 5, 6, {"k": 6, "num_groups": 2, "top_groups": 2}),
    ("group_limited", 3, 1, {"k": 1, "num_groups": 1, "top_groups": 1}),
    ("sigmoid_bias", 7, 9, {"k": 4, "num_groups": 3, "top_groups": 2, "scale": 2.5}),
    ("sigmoid_bias", 5, 4, {"k": 2, "num_groups": 4, "top_groups": 3}),
    ("sigmoid_bias", 3, 2, {"k": 2, "num_groups": 1, "top_groups": 1}),
    ("sigmoid_bias", 3, 1, {"k": 1, "num_groups": 1, "top_groups": 1}),
    ("expert_choice", 7, 4, {"capacity": 3}),
    ("expert_choice", 5, 3, {"capacity": 8}),
    ("expert_choice", 3, 1, {"capacity": 1}),
    ("sinkhorn", 9, 4, {"k": 1, "balanced": True}),
    ("sinkhorn", 7, 4, {"k": 2, "balanced": True, "max_iterations": 2}),
    ("sinkhorn", 7, 4, {"k": 2, "balanced": False}),
    ("sinkhorn", 3, 1, {"k": 1, "balanced": True}),
    ("relu", 7, 4, {}),
    ("relu", 3, 1, {}),
]
ARRAYS = {
    "noisy_top_k": lambda rng, T, E: {
        "noise_logits_TE": rng.normal(size=(T, E)),
        "normal_TE": rng.normal(size=(T, E)),
    },
    "gshard": lambda rng, T, E: {"uniform_T": rng.uniform(size=T)},
    "sigmoid_bias": lambda rng, T, E: {"bias_E": rng.normal(size=E)},
}
SEES_OTHER_TOKENS = ("expert_choice", "sinkhorn")
every_case = pytest.mark.parametrize(("name", "num_tokens", "num_experts", "arguments"), CASES)


def make_inputs(name, num_tokens, num_experts):
    rng = np.random.default_rng(3)
    logits = 2 * rng.normal(size=(num_tokens, num_experts))
    return logits, ARRAYS.get(name, lambda *_: {})(rng, num_tokens, num_experts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(name, arguments, inputs, valid_T, weights_3TE):
    """The assignment, and the gradients in all inputs of a weighted sum of its gates, probabilities and loads."""

    def loss(inputs):
        logits_TE, arrays = inputs
        assignment = getattr(routing, name)(logits_TE, **arrays, **dict(arguments), valid_T=valid_T)
        return weigh(assignment[1:], valid_T, weights_3TE), assignment

    gradients, assignment = jax.grad(loss, has_aux=True)(inputs)
    return assignment, gradients


def weigh(values, valid_T, weights_3TE):
    """Padding's rows of probability mean nothing, and are left out."""
    rows = [(w[:, : v.shape[1]], v) for w, v in zip(weights_3TE, values, strict=False) if v is not None]
    return sum((w * v * valid_T[:, None]).sum() for w, v in rows)


def route(name, arguments, logits, arrays, valid):
    weights = np.random.default_rng(4).normal(size=(3, len(logits), max(2, logits.shape[1]))).astype(np.float32)
    inputs = jax.tree.map(np.float32, (logits, arrays))
    return jax.device_get(run(name, tuple(arguments.items()), inputs, valid, weights)), weights


def masks(num_tokens):
    """All tokens, and all but two of five."""
    return np.ones(num_tokens, bool), np.arange(num_tokens) % 5 % 3 != 1


@every_case
def test_values_and_gradients_are_those_of_loops_with_and_without_padding(
    name, num_tokens, num_experts, arguments, slope
):
    logits, arrays = make_inputs(name, num_tokens, num_experts)
    rng = np.random.default_rng(5)
    for valid in masks(num_tokens):
        (assignment, gradients), weights = route(name, arguments, logits, arrays, valid)

        expected = getattr(router_loops, name)(logits, valid, **arrays, **arguments)
        assert assignment.expert_TK.dtype == jnp.int32
        np.testing.assert_array_equal(assignment.expert_TK, expected[0])
        assert (assignment.load_TE is None) == (name != "noisy_top_k")
        for actual, value in zip(assignment[1:], expected[1:], strict=False):
            assert actual.dtype == jnp.float32
            np.testing.assert_allclose(actual[valid], value[valid], rtol=2e-5, atol=1e-6)
        for padding in assignment.gate_TK[~valid], np.zeros(0) if name != "noisy_top_k" else assignment.load_TE[~valid]:
            np.testing.assert_array_equal(padding, 0)

        for _ in range(2):
            step = jax.tree.map(lambda x: rng.normal(size=x.shape), (logits, arrays))

            def loss(s, step=step, valid=valid, weights=weights):
                moved_TE, moved = jax.tree.map(lambda x, d: x + s * d, (logits, arrays), step)
                return weigh(getattr(router_loops, name)(moved_TE, valid, **moved, **arguments)[1:], valid, weights)

            actual = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradients, step)))
            np.testing.assert_allclose(actual, slope(loss, 0.0, 1.0), rtol=2e-4, atol=2e-5)


@every_case
def test_what_padding_holds_is_felt_nowhere(name, num_tokens, num_experts, arguments):
    """A NaN in it changes no bit of any output or gradient."""
    logits, arrays = make_inputs(name, num_tokens, num_experts)
    valid = masks(num_tokens)[1]
    with_nan, _ = route(name, arguments, np.where(valid[:, None], logits, np.nan), arrays, valid)
    without, _ = route(name, arguments, logits, arrays, valid)
    jax.tree.map(np.testing.assert_array_equal, with_nan, without)
    np.testing.assert_array_equal(with_nan[1][0][~valid], 0)


@every_case
def test_a_nan_in_one_token_changes_no_other(name, num_tokens, num_experts, arguments):
    """Where tokens share the experts, the others have what they would have without it."""
    logits, arrays = make_inputs(name, num_tokens, num_experts)
    others = np.arange(num_tokens) != num_tokens // 2
    present = others if name in SEES_OTHER_TOKENS else np.ones(num_tokens, bool)
    for bad in np.nan, np.inf:
        broken = logits.copy()
        broken[num_tokens // 2, -1] = bad
        (actual, gradients), _ = route(name, arguments, broken, arrays, np.ones(num_tokens, bool))
        (expected, expected_gradients), _ = route(name, arguments, logits, arrays, present)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[others], b[others]), actual, expected)
        np.testing.assert_array_equal(gradients[0][others], expected_gradients[0][others])
        if name in SEES_OTHER_TOKENS:
            np.testing.assert_array_equal(actual.expert_TK[num_tokens // 2], num_experts)
        if np.isnan(bad):
            assert np.isnan(actual.prob_TE[num_tokens // 2]).any(), "it is to show"


@every_case
def test_a_token_sees_no_later_one_except_where_the_router_says_so(name, num_tokens, num_experts, arguments):
    logits, arrays = make_inputs(name, num_tokens, num_experts)
    valid = np.ones(num_tokens, bool)
    changed = False
    for seed in range(5):
        other = logits.copy()
        other[-1] = 3 * np.random.default_rng(seed).normal(size=num_experts)
        (before, _), _ = route(name, arguments, logits, arrays, valid)
        (after, _), _ = route(name, arguments, other, arrays, valid)
        same = jax.tree.map(lambda a, b: np.array_equal(a[:-1], b[:-1]), before, after)
        changed |= not all(jax.tree.leaves(same))
    leaks = (name == "expert_choice" and arguments["capacity"] < num_tokens) or arguments.get("balanced")
    assert changed == bool(leaks and num_experts > 1)
