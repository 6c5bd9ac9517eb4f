"""Every router by a table worked by hand; top-k at its edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import routing

top_k = jax.jit(routing.top_k, static_argnames=("k", "normalise"))

PROBABILITIES = np.array([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.4, 0.4, 0.2]])
LOGITS = np.log(PROBABILITIES).astype(np.float32)
VALID = np.array([True, True, False, True])


def check(assignment, expert, gate, prob=None, load=None):
    np.testing.assert_array_equal(assignment.expert_TK, expert)
    np.testing.assert_allclose(assignment.gate_TK, gate, rtol=1e-5, atol=1e-7)
    if prob is not None:
        np.testing.assert_allclose(assignment.prob_TE, prob, rtol=1e-5, atol=1e-7)
    if load is not None:
        np.testing.assert_allclose(assignment.load_TE, load, atol=1e-4)


def test_top_k_by_hand():
    """Gates are probabilities, not renormalised; ties go to the lower index; padding chooses expert E with gate 0."""
    assignment = top_k(LOGITS, k=2, valid_T=VALID)
    check(assignment, [[1, 2], [0, 1], [3, 3], [0, 1]], [[0.6, 0.3], [0.5, 0.25], [0, 0], [0.4, 0.4]])
    np.testing.assert_allclose(assignment.prob_TE[VALID], PROBABILITIES[VALID], rtol=1e-6)
    assert [x.dtype for x in assignment[:3]] == [jnp.int32, jnp.float32, jnp.float32]
    assert assignment.load_TE is None
    normalised = top_k(LOGITS, k=2, normalise=True)
    thirds = [2 / 3, 1 / 3]
    check(normalised, [[1, 2], [0, 1], [2, 0], [0, 1]], [thirds, thirds, [0.75, 0.25], [0.5, 0.5]], PROBABILITIES)


def test_one_choice_is_the_first_of_many_and_all_choices_are_a_ranking():
    first = jax.jit(routing.switch)(LOGITS)
    check(first, [[1], [0], [2], [0]], [[0.6], [0.5], [0.6], [0.4]], PROBABILITIES)
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

    def loss(logits):
        return (weights * top_k(logits, k=2, valid_T=VALID).gate_TK).sum()

    expected = np.zeros((4, 3))
    for t, chosen in enumerate([[1, 2], [0, 1], [], [0, 1]]):
        for k, i in enumerate(chosen):
            for j in range(3):
                p = PROBABILITIES[t]
                expected[t, j] += weights[t, k] * p[i] * ((i == j) - p[j])
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(LOGITS), expected, atol=1e-6)


def test_soft_by_hand():
    gates = np.where(VALID[:, None], PROBABILITIES, 0)
    check(jax.jit(routing.soft)(LOGITS, valid_T=VALID), [[0, 1, 2], [0, 1, 2], [3, 3, 3], [0, 1, 2]], gates)


def test_noisy_top_k_by_hand():
    """With sd 1 the first row's H is 2.5, 1, 2. Without expert 0 its best is 2, so that its load is Phi(0 - 2)."""
    logits = np.array([[0, 1, 3], [1, 1, 1]], np.float32)
    noise_logits = np.full((2, 3), np.log(np.e - 1), np.float32)  # the softplus is 1
    normal = np.array([[2.5, 0, -1], [0, 0, 0]], np.float32)
    noisy = jax.jit(routing.noisy_top_k, static_argnames=("k", "noise_epsilon"))
    probabilities = [[0.0420101, 0.1141952, 0.8437947], [1 / 3, 1 / 3, 1 / 3]]

    one = noisy(logits, noise_logits, normal, k=1, noise_epsilon=0.0)
    check(one, [[0], [0]], [[1], [1]], probabilities, [[0.02275, 0.06681, 0.69146], [0.5, 0.5, 0.5]])
    two = noisy(logits, noise_logits, normal, k=2, noise_epsilon=0.0)
    gates = [[0.6224593, 0.3775407], [0.5, 0.5]]
    check(two, [[0, 2], [0, 1]], gates, probabilities, [[0.15866, 0.15866, 0.97725], [0.5, 0.5, 0.5]])
    every = noisy(logits, noise_logits, normal, k=3, noise_epsilon=0.0)
    np.testing.assert_array_equal(every.load_TE, np.ones((2, 3)))

    quiet = noisy(logits, noise_logits, None, k=2)  # evaluation
    check(quiet, [[2, 1], [0, 1]], [[0.8807971, 0.1192029], [0.5, 0.5]], probabilities)
    assert quiet.load_TE is None


def test_gshard_by_hand():
    """g_2 is 1/3, 1/3, 1/4, 1/2, and the second expert kept below twice that."""
    gshard = jax.jit(routing.gshard, static_argnames="threshold")
    first, second = [1, 0, 2, 0], np.array([2, 1, 0, 1])
    gates = np.array([[2 / 3, 1 / 3], [2 / 3, 1 / 3], [0.75, 0.25], [0.5, 0.5]])
    for uniform, kept in ([0.66, 0.67, 0.49, 0.999], [1, 0, 1, 1]), ([0.67, 0.66, 0.51, 0.0], [0, 1, 0, 1]):
        expert = np.stack([first, np.where(kept, second, 3)], axis=1)
        check(
            gshard(LOGITS, np.array(uniform, np.float32), threshold=0.5),
            expert,
            gates * np.stack([np.ones(4), kept], axis=1),
        )
    check(gshard(LOGITS, np.ones(4, np.float32), threshold=0.0), np.stack([first, second], axis=1), gates)
    check(gshard(LOGITS, None, threshold=0.5), np.stack([first, second], axis=1), gates, PROBABILITIES)


def test_group_limited_by_hand():
    """Groups 0, 1 and 2, 3: the best expert's group wins, not the group with the larger sum."""
    probabilities = np.array([[0.4, 0.05, 0.3, 0.25], [0.3, 0.3, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]])
    logits = np.concatenate([np.log(probabilities), [[-1, -1, 0, -300]]]).astype(np.float32)
    route = functools.partial(routing.group_limited, k=2, num_groups=2, top_groups=1, scale=10.0)
    last = 10 / (1 + 2 * np.exp(-1))  # its second choice has probability 0 in float32, and is of the group all the same
    check(jax.jit(route)(logits), [[0, 1], [0, 1], [3, 2], [2, 3]], [[4, 0.5], [3, 3], [4, 3], [last, 0]])


def test_sigmoid_bias_by_hand():
    """s + bias are .5 .85 | .45 .125 and .5 .7 | .1 .9: the sums of the groups choose, the s alone weigh."""
    s = np.array([[0.5, 0.25, 0.75, 0.125], [0.5, 0.1, 0.4, 0.9]])
    bias = np.array([0, 0.6, -0.3, 0], np.float32)
    logits = np.log(s / (1 - s)).astype(np.float32)
    route = functools.partial(routing.sigmoid_bias, k=2, num_groups=2, top_groups=1, scale=3.0)
    check(jax.jit(route)(logits, bias), [[1, 0], [1, 0]], [[1, 2], [0.5, 2.5]], s / s.sum(axis=1, keepdims=True))


def test_sigmoids_that_underflow_have_finite_gradients():
    """The paper's division by their sum + 1e-20, differentiated in float32, is 0 * inf."""

    @jax.jit
    def values_and_gradient(logits):
        def loss(logits):
            assignment = routing.sigmoid_bias(logits, jnp.zeros(4), k=2, num_groups=1, top_groups=1)
            return assignment.gate_TK[:, 0].sum() + assignment.prob_TE[:, 0].sum(), assignment

        return jax.grad(loss, has_aux=True)(logits)

    gradient, assignment = values_and_gradient(jnp.array([[-60.0] * 4, [-300.0] * 4, [-46.0] * 4, [300.0] * 4]))
    gate = [0, 0, 1 / (2 + 1e-20 / np.exp(-46.0)), 0.5]  # s / (2 s + 1e-20)
    np.testing.assert_allclose(assignment.gate_TK[:, 0], gate, atol=1e-5)
    np.testing.assert_allclose(assignment.prob_TE, 0.25)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("router", ["group_limited", "sigmoid_bias"])
def test_groups_that_cannot_be_are_refused(router):
    arrays = [jnp.zeros((2, 6)), jnp.zeros(6)][: 1 + (router == "sigmoid_bias")]
    route = functools.partial(getattr(routing, router), *arrays)
    with pytest.raises(ValueError, match="num_groups=4 does not divide the 6 experts"):
        route(k=1, num_groups=4, top_groups=1)
    with pytest.raises(ValueError, match=r"top_groups=2 of 3 groups of 2 .* k=5 experts; set it to 3 to 3, or k to at"):
        route(k=5, num_groups=3, top_groups=2)
    with pytest.raises(ValueError, match="top_groups=4 of 3 groups"):
        route(k=1, num_groups=3, top_groups=4)


def test_relu_by_hand():
    """A token may have any number of experts; one that has none has no probabilities."""
    logits = np.array([[1, -2, 3], [-1, -1, 0], [0.5, 0, 0], [1, 1, 1]], np.float32)
    assignment = jax.jit(routing.relu)(logits, valid_T=np.array([True, True, True, False]))
    expert = [[0, 3, 2], [3, 3, 3], [0, 3, 3], [3, 3, 3]]
    check(assignment, expert, [[1, 0, 3], [0, 0, 0], [0.5, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(assignment.prob_TE[:3], [[0.25, 0, 0.75], [0, 0, 0], [1, 0, 0]])


def test_labels_and_hashes_by_hand():
    """What is no expert, or no token id, is expert E with gate 0: nothing wraps around or is clamped."""
    valid = np.array([True, True, True, True, False])
    labels = jax.jit(functools.partial(routing.label, num_experts=3))(np.array([2, 0, -1, 3, 1]), valid_T=valid)
    one_hot = [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    check(labels, [[2], [0], [3], [3], [3]], [[1], [1], [0], [0], [0]], one_hot)
    assert labels.expert_TK.dtype == jnp.int32

    table = np.array([1, 2, 9, 0], np.int32)
    hashed = jax.jit(functools.partial(routing.hash, num_experts=3))(np.array([1, 3, -1, 4, 0]), table, valid_T=valid)
    check(hashed, [[2], [0], [3], [3], [3]], [[1], [1], [0], [0], [0]], one_hot)
    check(routing.hash(jnp.array([2, 0]), table, num_experts=3), [[3], [1]], [[0], [1]], [[0, 0, 0], [0, 1, 0]])


def test_a_balanced_table_by_hand():
    """Token 1 (9) to expert 0, 0 and 3 (5 each) to expert 1, 4 (3) to expert 0, 2 (1) to expert 1."""
    for frequency in np.array([5, 9, 1, 5, 3]), np.array([0.5, 0.9, 0.1, 0.5, 0.3]):
        np.testing.assert_array_equal(routing.balanced_table(frequency, 2), [1, 0, 1, 1, 0])
    np.testing.assert_array_equal(routing.balanced_table(np.ones(5, int), 3), [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(routing.balanced_table(np.array([200, 200, 201], np.uint8), 2), [1, 1, 0])
    assert routing.balanced_table(np.ones(5), 3).dtype == np.int32


def test_a_balanced_table_spreads_the_tokens_of_a_corpus_evenly():
    frequency = np.round(1e7 / np.arange(1, 5001)).astype(int)  # Zipf
    load = np.bincount(routing.balanced_table(frequency, 4), weights=frequency, minlength=4)
    assert load.max() / load.mean() < 1.001
