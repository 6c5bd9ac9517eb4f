"""The router chooses the most probable experts and weighs them by their probability, by tables and by numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.ops import routing

top_k = jax.jit(routing.top_k, static_argnames="k")

PROBABILITIES = np.array([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.4, 0.4, 0.2]])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def test_a_table_worked_by_hand():
    """Gates are probabilities, not renormalised; ties go to the lower index; padding chooses expert E with gate 0."""
    valid = np.array([True, True, False, True])
    assignment = top_k(LOGITS, k=2, valid_T=valid)
    np.testing.assert_array_equal(assignment.expert_TK, [[1, 2], [0, 1], [3, 3], [0, 1]])
    np.testing.assert_allclose(assignment.gate_TK, [[0.6, 0.3], [0.5, 0.25], [0, 0], [0.4, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(assignment.prob_TE, PROBABILITIES, rtol=1e-6)
    assert [x.dtype for x in assignment] == [jnp.int32, jnp.float32, jnp.float32]


def test_one_choice_is_the_first_of_many_and_all_choices_are_a_ranking():
    first = top_k(LOGITS, k=1)
    np.testing.assert_array_equal(first.expert_TK, [[1], [0], [2], [0]])
    every = top_k(LOGITS, k=3)
    np.testing.assert_array_equal(every.expert_TK, [[1, 2, 0], [0, 1, 2], [2, 0, 1], [0, 1, 2]])
    np.testing.assert_allclose(np.sum(every.gate_TK, axis=1), 1, rtol=1e-6)
    alone = top_k(np.array([[3.0], [-5.0]], np.float32), k=1)  # one expert: certain
    np.testing.assert_array_equal(alone.gate_TK, [[1], [1]])


def test_logits_of_any_size_and_dtype_give_finite_float32_probabilities():
    logits = jnp.array([[1e4, -1e4, 0.0], [300.0, 301.0, 299.0]], jnp.bfloat16)
    assignment = top_k(logits, k=1)
    exact = np.asarray(logits, np.float64)
    exact = np.exp(exact - exact.max(axis=1, keepdims=True))
    np.testing.assert_allclose(assignment.prob_TE, exact / exact.sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-30)


def test_the_gradient_of_a_gate_is_that_of_the_softmax_and_padding_has_none():
    """d p_i / d s_j = p_i (delta_ij - p_j)."""
    weights = np.array([[1.0, -2.0], [0.5, 3.0], [7.0, 7.0], [1.0, 1.0]])
    valid = np.array([True, True, False, True])

    def loss(logits):
        return (weights * top_k(logits, k=2, valid_T=valid).gate_TK).sum()

    expected = np.zeros((4, 3))
    for t, chosen in enumerate([[1, 2], [0, 1], [], [0, 1]]):
        for k, i in enumerate(chosen):
            for j in range(3):
                p = PROBABILITIES[t]
                expected[t, j] += weights[t, k] * p[i] * ((i == j) - p[j])
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(LOGITS), expected, atol=1e-6)
