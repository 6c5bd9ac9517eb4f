"""Tokens go to the slots that a slow loop gives them, and moves there and back equal dense one-hot products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import dispatch

ORDERS = ("tokens", "choices", "priority")
# (G, T, K, E, C): one expert; K = E, C = 1; more experts than tokens, C = T; overflow; more choices than are gathered
SHAPES = [(1, 5, 1, 1, 3), (2, 4, 3, 3, 1), (3, 3, 1, 5, 3), (2, 6, 2, 3, 2), (2, 4, dispatch.MAX_GATHERED + 1, 11, 2)]

capacity_slots = jax.jit(dispatch.capacity_slots, static_argnames=("num_experts", "capacity", "order"))
dropless_slots = jax.jit(dispatch.dropless_slots, static_argnames="num_experts")
dispatch_tokens, undispatch, combine = map(jax.jit, (dispatch.dispatch, dispatch.undispatch, dispatch.combine))


def draw_choices(shape, seed=0, none=0.2):
    """expert_GTK: distinct experts for a token, in any order, some of them none; and every token's priority."""
    num_groups, num_tokens, top_k, num_experts, _ = shape
    rng = np.random.default_rng(seed)
    ranks = rng.random((num_groups, num_tokens, num_experts)).argsort(axis=-1)[..., :top_k]
    chosen = np.where(rng.random(ranks.shape) < none, num_experts, ranks).astype(np.int32)
    priority = rng.choice([0.25, 0.5, 0.75, 1.0], size=(num_groups, num_tokens)).astype(np.float32)  # with ties
    return chosen, priority


def slots_by_loop(expert_GTK, num_experts, capacity, order, priority_GT):
    """(choice_S, slot_NK): one choice after another takes the next slot of its expert, while there is one."""
    num_groups, num_tokens, top_k = expert_GTK.shape
    choice_S = np.full(num_experts * num_groups * capacity, expert_GTK.size)
    slot_NK = np.full((num_groups * num_tokens, top_k), choice_S.size)
    for g in range(num_groups):
        tokens = list(range(num_tokens))
        if order == "priority":
            tokens.sort(key=lambda t, g=g: -priority_GT[g, t])
        if order == "tokens":
            queue = [(t, k) for t in tokens for k in range(top_k)]
        else:
            queue = [(t, k) for k in range(top_k) for t in tokens]
        used = [0] * num_experts
        for t, k in queue:
            e, n = expert_GTK[g, t, k], g * num_tokens + t
            if e < num_experts and used[e] < capacity:
                slot = (e * num_groups + g) * capacity + used[e]
                choice_S[slot], slot_NK[n, k] = n * top_k + k, slot
                used[e] += 1
    return choice_S, slot_NK


# Experts 0 and 1 with two slots each; tokens 0 to 3 prefer 0 then 1, 0 then none, 0 then 1, 1 then 0.
BY_HAND = {
    # 0 takes both, 1 fills expert 0, 2 finds it full and fills expert 1, 3 finds both full
    "tokens": ([0, 2, 1, 5], [[0, 2], [1, 4], [4, 3], [4, 4]]),
    # the first choices are 0, 0, 0 (full), 1; of the second ones, 1 of token 0 fits
    "choices": ([0, 2, 6, 1], [[0, 3], [1, 4], [4, 4], [2, 4]]),
    # in the order 3, 2, 0, 1: first choices 1, 0, 0, 0 (full); second ones 0 (full) and 1 of token 2
    "priority": ([4, 0, 6, 5], [[1, 4], [4, 4], [0, 3], [2, 4]]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_table_worked_by_hand_for_every_order(order):
    expert, priority = np.array([[[0, 1], [0, 2], [0, 1], [1, 0]]]), np.array([[0.5, 0.1, 0.6, 0.9]])
    choice_S, slot_NK = BY_HAND[order]
    slots = capacity_slots(expert, num_experts=2, capacity=2, order=order, priority_GT=priority)
    np.testing.assert_array_equal(slots.choice_S, choice_S)
    np.testing.assert_array_equal(slots.slot_NK, slot_NK)
    np.testing.assert_array_equal(dispatch.kept(slots), np.array(slot_NK) < 4)


def test_slots_lie_expert_by_expert_then_group_by_group():
    """Two groups of two tokens, two experts of one slot: group 0 sends to 0 and 1, group 1 to 1 twice."""
    slots = capacity_slots(np.array([[[0], [1]], [[1], [1]]]), num_experts=2, capacity=1)
    np.testing.assert_array_equal(slots.choice_S, [0, 4, 1, 2])  # e0 g0, e0 g1, e1 g0, e1 g1
    np.testing.assert_array_equal(slots.slot_NK, [[0], [2], [3], [4]])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_slots_equal_a_loop_and_are_one_to_one(shape, order):
    """Random choices, and tokens that all choose the last expert alone."""
    *_, num_experts, capacity = shape
    for seed in range(4):
        expert, priority = draw_choices(shape, seed)
        if seed == 0:
            expert[..., 0], expert[..., 1:] = num_experts - 1, num_experts
        slots = capacity_slots(expert, num_experts=num_experts, capacity=capacity, order=order, priority_GT=priority)
        choice_S, slot_NK = slots_by_loop(expert, num_experts, capacity, order, priority)
        np.testing.assert_array_equal(slots.choice_S, choice_S)
        np.testing.assert_array_equal(slots.slot_NK, slot_NK)
        assert slots.choice_S.dtype == slots.slot_NK.dtype == jnp.int32
        check_one_to_one(slots)


def kept(slots):
    return np.asarray(slots.slot_NK) < len(slots.choice_S)


def check_one_to_one(slots):
    choice_S, slot_M = np.asarray(slots.choice_S), np.asarray(slots.slot_NK).reshape(-1)
    filled, served = np.flatnonzero(choice_S < slot_M.size), np.flatnonzero(slot_M < choice_S.size)
    np.testing.assert_array_equal(slot_M[choice_S[filled]], filled)
    np.testing.assert_array_equal(choice_S[slot_M[served]], served)


@pytest.mark.parametrize("shape", SHAPES)
def test_dropless_slots_are_all_choices_sorted_by_expert(shape):
    num_experts = shape[3]
    for seed in range(3):
        expert = draw_choices(shape, seed)[0].reshape(-1, shape[2])
        slots, count_E = dropless_slots(expert, num_experts=num_experts)
        flat = expert.reshape(-1)
        by_expert = [m for e in range(num_experts) for m in range(flat.size) if flat[m] == e]
        empty = flat.size - len(by_expert)
        np.testing.assert_array_equal(slots.choice_S, by_expert + [flat.size] * empty)
        np.testing.assert_array_equal(count_E, [sum(flat == e) for e in range(num_experts)])
        np.testing.assert_array_equal(dispatch.kept(slots), expert < num_experts)
        assert count_E.dtype == slots.choice_S.dtype == slots.slot_NK.dtype == jnp.int32
        check_one_to_one(slots)


def test_choices_of_none_alone_fill_no_slot():
    none = np.full((1, 3, 2), 4)
    for slots in capacity_slots(none, num_experts=4, capacity=2), dropless_slots(none[0], num_experts=4)[0]:
        assert (np.asarray(slots.choice_S) == 6).all()
        assert not dispatch.kept(slots).any()


def drops_that_change_with_later_tokens(order):
    """Whether, over some groups, what is kept of a token depends on those after it; and whether anything is dropped."""
    shape, changed, dropped = (1, 10, 2, 3, 4), False, False
    expert, _ = draw_choices(shape, none=0)
    before = kept(capacity_slots(expert, num_experts=3, capacity=4, order=order))
    for t in range(1, 10):
        other = expert.copy()
        other[:, t:] = draw_choices(shape, seed=t, none=0)[0][:, t:]
        after = kept(capacity_slots(other, num_experts=3, capacity=4, order=order))
        changed |= not np.array_equal(after[:t], before[:t])
        dropped |= not after[:t].all()
    return changed, dropped


def test_whether_a_choice_is_dropped_depends_on_a_later_token_only_if_first_choices_come_first():
    assert drops_that_change_with_later_tokens("tokens") == (False, True)
    assert drops_that_change_with_later_tokens("choices") == (True, True)


def test_an_unknown_order_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="order=random is not known; choose one of tokens, choices, priority"):
        dispatch.capacity_slots(jnp.zeros((1, 1, 1), int), num_experts=1, capacity=1, order="random")


# --- moving rows ---------------------------------------------------------------------------------------------------


@jax.jit
def moves(slots, x, y, value, cotangents):
    """name -> (value, gradients) of each move."""
    functions = {
        "dispatch": (dispatch.dispatch, (x,)),
        "undispatch": (dispatch.undispatch, (y,)),
        "to_slots": (dispatch.to_slots, (value,)),
        "combine": (dispatch.combine, (y, value)),
    }
    results = {}
    for name, (function, inputs) in functions.items():
        out, pull_back = jax.vjp(lambda *inputs, function=function: function(*inputs, slots), *inputs)
        results[name] = out, pull_back(cotangents[name])
    return results


def dense(slots, x, y, value, cotangents):
    """The same in float64, with kept[n, k, s] = 1 where the choice fills the slot."""
    kept = (np.asarray(slots.slot_NK)[..., None] == np.arange(slots.choice_S.size)).astype(np.float64)
    x, y, value, d = jax.tree.map(np.float64, (x, y, value, cotangents))
    to_slots, back = functools.partial(np.einsum, "nks,nd->sd", kept), functools.partial(np.einsum, "nks,sd->nd", kept)
    dy = d["combine"]
    return {
        "dispatch": (to_slots(x), (back(d["dispatch"]),)),
        "undispatch": (back(y), (to_slots(d["undispatch"]),)),
        "to_slots": (np.einsum("nks,nk->s", kept, value), (np.einsum("nks,s->nk", kept, d["to_slots"]),)),
        "combine": (
            np.einsum("nks,sd,nk->nd", kept, y, value),
            (np.einsum("nks,nk,nd->sd", kept, value, dy), np.einsum("nks,sd,nd->nk", kept, y, dy)),
        ),
    }


@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_moves_and_their_gradients_equal_dense_one_hot_products(shape, dropless):
    """1e-5: float32 sums of at most K products of size one. dispatch and undispatch are each other's gradient."""
    expert, _ = draw_choices(shape)
    if dropless:
        slots, _ = dropless_slots(expert.reshape(-1, shape[2]), num_experts=shape[3])
    else:
        slots = capacity_slots(expert, num_experts=shape[3], capacity=shape[4])
    assert not kept(slots).all()
    rng, width = np.random.default_rng(1), 3
    draw = lambda *size: rng.normal(size=size).astype(np.float32)  # noqa: E731
    (num_tokens, top_k), num_slots = slots.slot_NK.shape, slots.choice_S.size
    x, y, value = draw(num_tokens, width), draw(num_slots, width), draw(num_tokens, top_k)
    names = ("dispatch", "undispatch", "to_slots", "combine")
    shapes = (num_slots, width), (num_tokens, width), (num_slots,), (num_tokens, width)
    cotangents = {name: draw(*size) for name, size in zip(names, shapes, strict=True)}
    actual, expected = (function(slots, x, y, value, cotangents) for function in (moves, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)
    np.testing.assert_allclose((actual["dispatch"][0] * y).sum(), (x * actual["undispatch"][0]).sum(), rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, dispatch.MAX_GATHERED + 1])
def test_a_nan_reaches_its_own_token_and_slots_alone(top_k):
    """Also one in the output of an empty slot: it reaches no token."""
    shape = (1, 4, top_k, top_k + 2, 2)
    slots = capacity_slots(draw_choices(shape, none=0)[0], num_experts=top_k + 2, capacity=2)
    token_S = np.asarray(slots.choice_S) // top_k
    x = np.ones((4, 2), np.float32)
    x[1] = np.nan
    np.testing.assert_array_equal(np.isnan(dispatch_tokens(x, slots)).all(axis=1), token_S == 1)
    y = np.ones((len(token_S), 2), np.float32)
    y[(token_S == 1) | (token_S == 4)] = np.nan
    assert (token_S == 4).any()
    for out in undispatch(y, slots), combine(y, np.ones((4, top_k), np.float32), slots):
        np.testing.assert_array_equal(np.isnan(out).any(axis=1), np.arange(4) == 1)


def test_combine_keeps_the_dtype_of_the_experts_outputs():
    struct = jax.ShapeDtypeStruct
    slots = dispatch.Slots(choice_S=struct((1,), jnp.int32), slot_NK=struct((1, 1), jnp.int32))
    y = jax.eval_shape(dispatch.combine, struct((1, 2), jnp.bfloat16), struct((1, 1), jnp.float32), slots)
    assert y.dtype == jnp.bfloat16
