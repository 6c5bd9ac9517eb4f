"""Routers in which tokens see each other: expert choice, Sinkhorn and Soft MoE."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.ops import routing


# numpy's arrays come out, as every indexing of a jax array compiles
def numpy_of(function):
    return lambda *args, **kwargs: jax.device_get(function(*args, **kwargs))


expert_choice = numpy_of(jax.jit(routing.expert_choice, static_argnames="capacity"))
sinkhorn = numpy_of(jax.jit(routing.sinkhorn, static_argnames=("k", "balanced", "max_iterations")))
soft_moe = numpy_of(jax.jit(routing.soft_moe))

PHI = jnp.asarray(np.random.default_rng(3).normal(size=(4, 2, 3)).astype(np.float32))


def test_expert_choice_by_hand():
    """Expert 0 takes token 1 and, of the equal 0 and 2, the earlier; expert 1 takes 3 and 0; token 2 has no expert."""
    probabilities = np.array([[0.6, 0.4], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    logits = np.log(probabilities).astype(np.float32)
    taken = expert_choice(logits, capacity=2)
    np.testing.assert_array_equal(taken.expert_TK, [[0, 1], [0, 2], [2, 2], [2, 1]])
    np.testing.assert_allclose(taken.gate_TK, [[0.6, 0.4], [0.7, 0], [0, 0], [0, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(taken.prob_TE, probabilities, rtol=1e-6)

    valid = np.array([False, True, True, True])
    later = expert_choice(logits, capacity=2, valid_T=valid)
    np.testing.assert_array_equal(later.expert_TK, [[2, 2], [0, 2], [0, 1], [2, 1]])
    everything = expert_choice(logits, capacity=9, valid_T=valid)
    np.testing.assert_array_equal(everything.expert_TK, [[2, 2], [0, 1], [0, 1], [0, 1]])
    np.testing.assert_allclose(everything.gate_TK, probabilities * valid[:, None], rtol=1e-6)


def test_expert_choice_leaks_a_later_token_takes_an_earlier_ones_place():
    logits = np.log(np.array([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5], [0.2, 0.8]])).astype(np.float32)
    np.testing.assert_array_equal(expert_choice(logits, capacity=2).expert_TK[0], [0, 2])
    logits[3] = 5.0, 0.0
    np.testing.assert_array_equal(expert_choice(logits, capacity=2).expert_TK[0], [2, 1])


def test_sinkhorn_by_hand():
    """Odds of 4 and 2 for expert 0, times d1_0 / d1_1 = 1 / sqrt(8), are above and below 1: a token each."""
    logits = np.log(np.array([[4.0, 1.0], [2.0, 1.0]])).astype(np.float32)
    one = sinkhorn(logits, k=1, balanced=True)
    np.testing.assert_array_equal(one.expert_TK, [[0], [1]])
    np.testing.assert_allclose(one.gate_TK, [[0.8], [0.5]], rtol=1e-6)  # sigmoid of log 4 and of 0
    np.testing.assert_allclose(one.prob_TE, [[0.8, 0.2], [2 / 3, 1 / 3]], rtol=1e-6)
    two = sinkhorn(logits, k=2, balanced=True)
    np.testing.assert_array_equal(two.expert_TK, [[0, 1], [1, 0]])
    np.testing.assert_allclose(two.gate_TK, [[0.8, 0.2], [1 / 3, 2 / 3]], rtol=1e-6)
    evaluation = sinkhorn(logits, k=1, balanced=False)
    np.testing.assert_array_equal(evaluation.expert_TK, [[0], [0]])
    np.testing.assert_allclose(evaluation.gate_TK, [[0.8], [2 / 3]], rtol=1e-6)


def test_sinkhorn_balances_and_a_shift_of_a_row_by_hundreds_changes_no_choice():
    """exp(300) is inf in float32, and exp(-300) is 0."""
    rng = np.random.default_rng(0)
    logits = rng.normal(loc=[3, 1, 0, -3], size=(64, 4)).astype(np.float32)
    plain = sinkhorn(logits, k=1, balanced=True)
    assert np.bincount(sinkhorn(logits, k=1, balanced=False).expert_TK[:, 0], minlength=4).max() > 50
    counts = np.bincount(plain.expert_TK[:, 0], minlength=4)
    assert counts.min() >= 12
    assert counts.max() <= 20
    shifted = np.float32(logits + rng.choice([-300, 0, 300], size=(64, 1)))
    np.testing.assert_array_equal(sinkhorn(shifted, k=1, balanced=True).expert_TK, plain.expert_TK)


def test_sinkhorn_of_logits_of_300_is_finite_and_takes_the_largest():
    logits = np.array([[300, -300, -300], [300, -301, -300], [-300, 300, -300], [300, -300, 299], [-300, -300, -300]])

    @jax.jit
    def run(logits, valid):
        def loss(logits):
            assignment = routing.sinkhorn(logits, k=2, balanced=True, valid_T=valid)
            return (assignment.gate_TK[:, 0]).sum(), assignment

        return jax.grad(loss, has_aux=True)(logits)

    for valid in np.ones(5, bool), np.arange(5) < 4, np.zeros(5, bool):
        gradient, assignment = jax.device_get(run(np.float32(logits), valid))
        assert all(np.isfinite(x).all() for x in (gradient, assignment.gate_TK, assignment.prob_TE))
        np.testing.assert_array_equal(assignment.expert_TK[:3, 0], np.where(valid[:3], [0, 0, 1], 3))
        assert not valid.any() or assignment.expert_TK[1, 1] == 2  # -300 before -301, though both are 0 beside 300


def test_groups_that_take_unequal_numbers_of_iterations_are_routed_as_each_alone():
    rng = np.random.default_rng(1)
    logits_GTE = (rng.normal(size=(3, 8, 4)) * np.array([0.01, 1, 4])[:, None, None]).astype(np.float32)
    router = functools.partial(routing.sinkhorn, k=1, balanced=True)
    together = jax.device_get(jax.jit(jax.vmap(router))(logits_GTE))
    for g, logits in enumerate(logits_GTE):
        np.testing.assert_array_equal(together.expert_TK[g], sinkhorn(logits, k=1, balanced=True).expert_TK)


def test_soft_moe_by_hand():
    """Unit tokens and slots with scale log 3: e^logits are 3 1, 1 3, 3 1."""
    x = np.array([[3, 0], [0, 2], [4, 0]], np.float32)
    phi = np.array([[1, 0], [0, 5]], np.float32)
    by_token = np.array([[3 / 7, 1 / 5], [1 / 7, 3 / 5], [3 / 7, 1 / 5]])
    by_slot = np.array([[0.75, 0.25], [0.25, 0.75], [0.75, 0.25]])
    for shape in (2, 2, 1), (2, 1, 2):  # two experts with a slot each, one expert with two: the softmax is over all
        dispatch, combine = soft_moe(x, phi.reshape(shape), math.log(3))
        np.testing.assert_allclose(dispatch.reshape(3, 2), by_token, rtol=1e-5)
        np.testing.assert_allclose(combine.reshape(3, 2), by_slot, rtol=1e-5)
    dispatch, combine = soft_moe(x, phi.reshape(2, 2, 1), math.log(3), valid_T=np.array([True, True, False]))
    np.testing.assert_allclose(dispatch[..., 0], [[0.75, 0.25], [0.25, 0.75], [0, 0]], rtol=1e-5)
    np.testing.assert_allclose(combine[..., 0], by_slot * [[1], [1], [0]], rtol=1e-5)


def soft_moe_by_loops(x, phi, scale, valid):
    num_tokens, (_, num_experts, num_slots) = len(x), phi.shape
    powers = np.zeros((num_tokens, num_experts, num_slots))
    for t in np.flatnonzero(valid):
        for e in range(num_experts):
            for s in range(num_slots):
                slot = phi[:, e, s]
                cosine = sum(x[t] * slot) / (math.sqrt(sum(x[t] ** 2)) + 1e-6) / (math.sqrt(sum(slot**2)) + 1e-6)
                powers[t, e, s] = math.exp(scale * cosine)
    rows = powers.sum(axis=(1, 2), keepdims=True)
    return powers / powers.sum(axis=0), powers / np.where(rows > 0, rows, 1)


def test_soft_moe_is_that_of_loops_with_gradients_and_padding(slope):
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(5, 4)), rng.normal(size=(4, 2, 3)), np.array(2.5)
    weights = rng.normal(size=(2, 5, 2, 3))

    def weigh(results):
        return sum((w * r).sum() for w, r in zip(weights, results, strict=True))

    gradient = jax.jit(jax.grad(lambda inputs, valid: weigh(routing.soft_moe(*inputs, valid_T=valid))))
    for valid in np.ones(5, bool), np.array([True, False, True, True, False]):
        single = jax.tree.map(np.float32, inputs)
        single[0][~valid] = np.nan
        for actual, expected in zip(soft_moe(*single, valid_T=valid), soft_moe_by_loops(*inputs, valid), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
        gradients = jax.device_get(gradient(single, valid))
        np.testing.assert_array_equal(gradients[0][~valid], 0)
        for _ in range(3):
            step = jax.tree.map(lambda x: rng.normal(size=x.shape), inputs)

            def loss(s, step=step, valid=valid):
                moved = [x + s * d for x, d in zip(inputs, step, strict=True)]
                return weigh(soft_moe_by_loops(*moved, valid=valid))

            actual = sum((g * d).sum() for g, d in zip(gradients, step, strict=True))
            np.testing.assert_allclose(actual, slope(loss, 0.0, 1.0), rtol=1e-4, atol=1e-5)


def test_soft_moe_of_zeros_and_of_padding_alone_has_finite_gradients():
    def loss(x, valid):
        return sum(r[..., 0].sum() for r in routing.soft_moe(x, PHI, jnp.ones(()), valid_T=valid))

    gradient = jax.jit(jax.grad(loss))
    for valid in np.ones(3, bool), np.zeros(3, bool):
        assert np.isfinite(gradient(np.zeros((3, 4), np.float32), valid)).all()


def test_soft_moe_leaks_a_later_token_changes_what_an_earlier_one_gives_to_a_slot():
    """The dispatch is a softmax over tokens; the combine is one a token, and sees no other."""
    x = np.random.default_rng(4).normal(size=(5, 4)).astype(np.float32)
    dispatch, combine = jax.jit(jax.jacobian(lambda x: [r[0, 0, 0] for r in routing.soft_moe(x, PHI, jnp.ones(()))]))(x)
    assert (np.abs(dispatch).max(axis=1) > 1e-3).all()
    assert np.abs(combine[0]).max() > 1e-3
    np.testing.assert_array_equal(combine[1:], 0)
