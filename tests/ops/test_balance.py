"""The load-balance loss and the router's statistics, by closed forms and by numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import balance, routing


@functools.partial(jax.jit, static_argnames="k")
def _statistics(logits, valid, k):
    assignment = routing.top_k(logits, k=k, valid_T=valid)
    return balance.load_balance_loss(assignment), balance.router_entropy(assignment)


def statistics(logits, valid=None, k=1):
    """(load-balance loss, summed entropy) of the router's choice on these logits."""
    valid = np.ones(len(logits), bool) if valid is None else np.asarray(valid)
    return _statistics(np.asarray(logits, np.float32), valid, k)


def load_balance(prob, expert):
    """E sum_e f_e P_e by loops over tokens; expert E is padding."""
    num_tokens, num_experts = prob.shape
    share, mean, choices, tokens = np.zeros(num_experts), np.zeros(num_experts), 0, 0
    for t in range(num_tokens):
        if expert[t, 0] < num_experts:
            mean += prob[t]
            tokens += 1
            for e in expert[t]:
                share[e] += 1
                choices += 1
    return num_experts * sum(share / choices * mean / tokens)


@pytest.mark.parametrize("num_experts", [1, 4])
def test_the_loss_is_one_at_perfect_balance_and_the_number_of_experts_at_collapse(num_experts):
    even, _ = statistics(1e4 * np.eye(num_experts)[np.arange(8) % num_experts])
    np.testing.assert_allclose(even, 1.0, rtol=1e-6)
    collapsed, _ = statistics(1e4 * np.eye(num_experts)[np.zeros(8, int)])
    np.testing.assert_allclose(collapsed, num_experts, rtol=1e-6)
    uniform, _ = statistics(np.zeros((8, num_experts)))  # all ties, so all choose expert 0, but with P_e = 1/E
    np.testing.assert_allclose(uniform, 1.0, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_values_and_gradients_equal_numpy_and_ignore_padding(k):
    """f is a constant of the gradient: d/ds of E sum_e f_e P_e through P alone, and 0 at padding tokens."""
    rng = np.random.default_rng(0)
    logits, valid = rng.normal(size=(10, 4)), rng.random(10) < 0.7

    @jax.jit
    def loss_and_gradient(logits):
        return jax.value_and_grad(lambda x: _statistics(x, valid, k)[0])(logits)

    loss, gradient = loss_and_gradient(logits.astype(np.float32))
    prob = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expert = np.where(valid[:, None], np.argsort(-prob, axis=1)[:, :k], 4)
    np.testing.assert_allclose(loss, load_balance(prob, expert), rtol=1e-5)
    share = np.array([(expert == e).sum() for e in range(4)]) / (expert < 4).sum()
    weight = 4 * share / valid.sum()  # of each probability
    expected = prob * (weight - (prob * weight).sum(axis=1, keepdims=True)) * valid[:, None]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert k == 4 or np.abs(gradient[valid]).min() > 1e-5  # it reaches the router at every token
    moved = np.where(valid[:, None], logits, 100 * rng.normal(size=logits.shape))
    np.testing.assert_allclose(loss_and_gradient(moved.astype(np.float32))[0], loss, rtol=1e-6)


def test_padding_alone_has_no_loss_and_no_nan():
    assert statistics(np.ones((8, 4)), valid=np.zeros(8, bool)) == (0, 0)


def test_counts_are_exact_integers_without_padding():
    expert = np.array([[0, 2], [2, 1], [4, 4], [2, 0]])  # 4: padding
    counts = jax.jit(balance.count_choices, static_argnums=1)(expert, 4)
    np.testing.assert_array_equal(counts, [2, 1, 3, 0])
    assert counts.dtype == jnp.int32


def test_entropy_is_summed_over_tokens_that_are_not_padding():
    """ln 4 for a uniform token, ln 2 for a coin, 0 for a certain one; a padding token adds nothing."""
    prob = np.array([[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25] * 4])
    with np.errstate(divide="ignore"):
        logits = np.maximum(np.log(prob), -1e4)
    _, entropy = statistics(logits, valid=[True, True, True, False])
    np.testing.assert_allclose(entropy, np.log(4) + np.log(2), rtol=1e-6)
