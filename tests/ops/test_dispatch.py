"""Tokens go to the slots that a slow loop gives them, and the moves there and back are transposes of one another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import dispatch

# (T, K, E, C): overflow, K = 2, one expert, K = E, a slot for every token, more slots than tokens, one slot
SHAPES = [(8, 1, 3, 2), (8, 2, 4, 3), (5, 1, 1, 3), (4, 3, 3, 2), (6, 2, 3, 6), (3, 1, 5, 4), (7, 2, 2, 1)]

dispatch_tokens, combine = jax.jit(dispatch.dispatch), jax.jit(dispatch.combine)
assign = jax.jit(dispatch.assign_slots, static_argnames=("num_experts", "capacity"))


def draw_choices(num_tokens, top_k, num_experts, seed=0, padding=0.2):
    """expert_TK: distinct experts for a token, in any order; a padding token has expert E for every choice."""
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)]).astype(np.int32)
    return np.where(rng.random((num_tokens, 1)) < padding, num_experts, chosen).astype(np.int32)


def fill_slots(expert_TK, num_experts, capacity):
    """[(e, c, t, k)] of every filled slot: token after token, choice after choice, until the expert is full."""
    used, filled = [0] * num_experts, []
    for t, chosen in enumerate(expert_TK):
        for k, e in enumerate(chosen):
            if e < num_experts and used[e] < capacity:
                filled.append((e, used[e], t, k))
                used[e] += 1
    return filled


def test_a_table_worked_by_hand():
    """Experts 0, 1, 2 with two slots each; tokens 0..4 choose 0, 0, 2, padding, 0: token 4 finds expert 0 full."""
    slots = assign(np.array([[0], [0], [2], [3], [0]]), num_experts=3, capacity=2)
    np.testing.assert_array_equal(slots.choice_EC, [[0, 1], [5, 5], [2, 5]])
    np.testing.assert_array_equal(slots.slot_TK, [[0], [1], [4], [6], [6]])
    x = np.arange(10, 20, dtype=np.float32).reshape(5, 2)
    np.testing.assert_array_equal(
        dispatch_tokens(x, slots), [[[10, 11], [12, 13]], [[0, 0], [0, 0]], [[14, 15], [0, 0]]]
    )
    y = np.arange(1, 13, dtype=np.float32).reshape(3, 2, 2)
    gates = np.array([[0.5], [1.0], [2.0], [9.0], [9.0]])
    np.testing.assert_array_equal(combine(y, gates, slots), [[0.5, 1], [3, 4], [18, 20], [0, 0], [0, 0]])


def test_second_choices_queue_with_their_token_and_not_behind_all_first_choices():
    """One slot an expert. Token 0 prefers 0 then 1, token 1 prefers 1 then 0: token 0 takes both."""
    slots = assign(np.array([[0, 1], [1, 0]]), num_experts=2, capacity=1)
    np.testing.assert_array_equal(slots.choice_EC, [[0], [1]])
    np.testing.assert_array_equal(slots.slot_TK, [[0, 1], [2, 2]])


@pytest.mark.parametrize("shape", SHAPES)
def test_slots_equal_a_loop(shape):
    num_tokens, top_k, num_experts, capacity = shape
    for seed in range(5):
        expert_TK = draw_choices(num_tokens, top_k, num_experts, seed)
        choice_EC = np.full((num_experts, capacity), num_tokens * top_k)
        slot_TK = np.full((num_tokens, top_k), num_experts * capacity)
        for e, c, t, k in fill_slots(expert_TK, num_experts, capacity):
            choice_EC[e, c], slot_TK[t, k] = t * top_k + k, e * capacity + c
        slots = assign(expert_TK, num_experts=num_experts, capacity=capacity)
        np.testing.assert_array_equal(slots.choice_EC, choice_EC)
        np.testing.assert_array_equal(slots.slot_TK, slot_TK)
        assert slots.choice_EC.dtype == slots.slot_TK.dtype == jnp.int32


def test_whether_a_choice_is_dropped_depends_on_no_later_token():
    expert_TK = draw_choices(10, 2, 3, padding=0)
    slots = assign(expert_TK, num_experts=3, capacity=3)
    assert (np.asarray(slots.slot_TK) == 9).any()  # some are dropped
    for t in range(1, 10):
        others = np.concatenate([expert_TK[:t], draw_choices(10 - t, 2, 3, seed=t)])
        np.testing.assert_array_equal(assign(others, num_experts=3, capacity=3).slot_TK[:t], slots.slot_TK[:t])


@functools.partial(jax.jit, static_argnames=("num_experts", "capacity"))
def moves(x_TD, y_ECD, gate_TK, expert_TK, cotangents, *, num_experts, capacity):
    """Values and gradients of dispatch, collect and combine, and of their dense one-hot forms."""
    slots = dispatch.assign_slots(expert_TK, num_experts=num_experts, capacity=capacity)
    # [t, k, e, c] is 1 where the choice fills the slot
    one_hot = jax.nn.one_hot(slots.slot_TK, num_experts * capacity).reshape(*gate_TK.shape, num_experts, capacity)
    precise = functools.partial(jnp.einsum, precision="highest")
    pairs = [
        (lambda x: dispatch.dispatch(x, slots), lambda x: precise("td,tkec->ecd", x, one_hot), (x_TD,)),
        (lambda y: dispatch.collect(y, slots), lambda y: precise("ecd,tkec->tkd", y, one_hot), (y_ECD,)),
        (
            lambda y, gate: dispatch.combine(y, gate, slots),
            lambda y, gate: precise("ecd,tk,tkec->td", y, gate, one_hot),
            (y_ECD, gate_TK),
        ),
    ]
    results = []
    for (fast, dense, inputs), cotangent in zip(pairs, cotangents, strict=True):
        (value, pull_back), (dense_value, dense_pull_back) = jax.vjp(fast, *inputs), jax.vjp(dense, *inputs)
        results.append(((value, pull_back(cotangent)), (dense_value, dense_pull_back(cotangent))))
    return results


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_moves_and_their_gradients_equal_loops_and_dense_one_hot_products(shape):
    """Also on overflow, empty experts, E = 1 and K = E. 1e-5: at most K float32 products a sum."""
    (num_tokens, top_k, num_experts, capacity), width = shape, 3
    expert_TK, rng = draw_choices(num_tokens, top_k, num_experts), np.random.default_rng(1)
    slots_shape = (num_experts, capacity, width)
    x, y, gate, *cotangents = (
        rng.normal(size=size).astype(np.float32)
        for size in (
            (num_tokens, width),
            slots_shape,
            (num_tokens, top_k),
            slots_shape,
            (num_tokens, top_k, width),
            (num_tokens, width),
        )
    )
    results = moves(x, y, gate, expert_TK, cotangents, num_experts=num_experts, capacity=capacity)
    for fast, dense in results:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), fast, dense)
    dispatched, collected, combined = (fast[0] for fast, _ in results)
    expected_x, expected_y = np.zeros(slots_shape), np.zeros((num_tokens, top_k, width))
    for e, c, t, k in fill_slots(expert_TK, num_experts, capacity):
        expected_x[e, c], expected_y[t, k] = x[t], y[e, c]
    np.testing.assert_array_equal(dispatched, expected_x)
    np.testing.assert_array_equal(collected, expected_y)
    np.testing.assert_allclose(combined, (gate[..., None] * expected_y).sum(axis=1), atol=1e-5)


def test_combine_keeps_the_dtype_of_the_experts_outputs():
    slots = assign(np.array([[0]]), num_experts=1, capacity=1)
    assert combine(jnp.ones((1, 1, 2), jnp.bfloat16), jnp.ones((1, 1)), slots).dtype == jnp.bfloat16


def test_a_nan_in_one_slot_reaches_only_its_token():
    slots = assign(np.array([[0], [0], [1]]), num_experts=2, capacity=1)  # token 1 is dropped
    y = np.array([[[np.nan]], [[2.0]]], np.float32)
    np.testing.assert_array_equal(combine(y, np.ones((3, 1), np.float32), slots), [[np.nan], [0], [2]])
