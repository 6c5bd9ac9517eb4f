"""The mixture of experts equals a loop over groups, tokens and choices, in values, gradients and statistics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers import moe

BATCH, LENGTH, D_MODEL, D_EXPERT, EXPERTS = 2, 8, 4, 3, 4
ACTIVATE = {
    "relu": lambda h: np.maximum(h, 0),
    "gelu": lambda h: 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "swiglu": lambda h: h[:D_EXPERT] / (1 + np.exp(-h[:D_EXPERT])) * h[D_EXPERT:],
}
WEIGHTS = ("router", "up", "down")


def make(**settings):
    defaults = {
        "num_experts": EXPERTS,
        "d_expert": D_EXPERT,
        "activation": "gelu",
        "top_k": 1,
        "capacity_factor": 0.0,
        "eval_capacity_factor": 0.0,
        "group_size": 0,
        "init_scale": 1.0,
        "dtype": jnp.dtype("float32"),
    }
    return moe.Moe(D_MODEL, rngs=nnx.Rngs(params=0), **{**defaults, **settings})


def draw(seed=1):
    return np.random.default_rng(seed).normal(size=(BATCH, LENGTH, D_MODEL)).astype(np.float32)


def weights_of(module):
    return {name: np.asarray(getattr(module, name)[...], np.float64) for name in WEIGHTS}


def loop(x, w, *, top_k, activation, group_size, factor, valid=None):
    """(y, balance loss, counts, drops, entropy) in float64: group by group, token by token, choice by choice."""
    tokens = np.asarray(x, np.float64).reshape(-1, D_MODEL)
    valid = np.ones(len(tokens), bool) if valid is None else valid.reshape(-1)
    num_experts, size = w["router"].shape[1], group_size or x.shape[1]
    capacity = size if factor == 0 else min(size, math.ceil(factor * size * top_k / num_experts))
    y, counts, dropped, entropy, losses = np.zeros(tokens.shape), np.zeros(num_experts, int), 0, 0.0, []
    for start in range(0, len(tokens), size):
        used, chosen, mean = np.zeros(num_experts, int), np.zeros(num_experts, int), np.zeros(num_experts)
        for t in range(start, start + size):
            if not valid[t]:
                continue
            logits = tokens[t] @ w["router"]
            prob = np.exp(logits - logits.max())
            prob /= prob.sum()
            entropy -= (prob * np.log(prob)).sum()
            mean += prob / valid[start : start + size].sum()
            for e in np.argsort(-prob)[:top_k]:
                chosen[e] += 1
                if used[e] == capacity:
                    dropped += 1
                    continue
                used[e] += 1
                y[t] += prob[e] * (ACTIVATE[activation](tokens[t] @ w["up"][e]) @ w["down"][e])
        counts += chosen
        losses.append(num_experts * (chosen / max(chosen.sum(), 1) * mean).sum())
    return y.reshape(x.shape), np.mean(losses), counts, dropped, entropy


# relu / gelu / swiglu; K = 1 and 2; without and with drops; groups of a row, of half a row and of two rows; padding
CASES = {
    "top-1, no drops": ({"activation": "relu"}, False),
    "top-2, drops, group of a row": ({"activation": "gelu", "top_k": 2, "capacity_factor": 0.75}, True),
    "top-2, drops, group of half a row": (
        {"activation": "swiglu", "top_k": 2, "capacity_factor": 1.0, "group_size": LENGTH // 2},
        False,
    ),
    "top-1, drops, group of two rows": (
        {"activation": "relu", "capacity_factor": 0.6, "group_size": 2 * LENGTH},
        True,
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_values_gradients_and_statistics_equal_a_loop(case, slope, fill):
    """1e-5 in values, 2e-4 in slopes: float32 sums of a few products. Counts and drops are exact."""
    settings, padded = CASES[case]
    module, x, dy, rng = fill(lambda: make(**settings), scale=1.0), draw(1), draw(2), np.random.default_rng(3)
    valid = np.arange(LENGTH) < np.array([[LENGTH - 2], [LENGTH]]) if padded else None
    group = {name: settings.get(name, default) for name, default in (("top_k", 1), ("group_size", 0))}
    group |= {"activation": settings["activation"], "factor": settings.get("capacity_factor", 0), "valid": valid}

    @jax.jit
    def run(module, x):
        def loss(module, x):
            y, aux = module(x, valid_BL=valid, train=True)
            return (dy * y).sum() + 3 * aux.balance_loss + aux.entropy, (y, aux)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(module, x)

    (gradient, dx), (y, aux) = run(module, x)
    w = weights_of(module)
    expected_y, balance_loss, counts, dropped, entropy = loop(x, w, **group)
    assert (dropped > 0) == ("capacity_factor" in settings)
    np.testing.assert_allclose(y, expected_y, atol=1e-5)
    assert float(aux.balance_loss) == pytest.approx(balance_loss, rel=1e-5)
    assert float(aux.entropy) == pytest.approx(entropy, rel=1e-5)
    np.testing.assert_array_equal(aux.count_E, counts)
    assert aux.dropped == dropped
    assert aux.count_E.dtype == aux.dropped.dtype == jnp.int32

    def objective(x, w):
        y, balance_loss, _, _, entropy = loop(x, w, **group)
        return (dy * y).sum() + 3 * balance_loss + entropy

    direction = rng.normal(size=x.shape)
    expected = slope(lambda x: objective(x, w), x, direction)
    assert (dx * direction).sum() == pytest.approx(expected, rel=2e-4)
    for name in WEIGHTS:
        direction = rng.normal(size=w[name].shape)
        expected = slope(lambda value, name=name: objective(x, {**w, name: value}), w[name], direction)
        assert (np.asarray(getattr(gradient, name)[...]) * direction).sum() == pytest.approx(expected, rel=2e-4), name


@pytest.mark.parametrize("top_k", [1, 2])
def test_every_expert_that_got_a_token_learns_and_the_others_do_not_move(top_k, fill):
    """The router learns from the output alone, its gate not being 1, and from the balance loss alone."""
    module, x = fill(lambda: make(num_experts=12, top_k=top_k), scale=1.0), draw()[:, :2]

    @jax.jit
    def run(module, x):
        output = lambda module: module(x)[0].sum()  # noqa: E731
        balance = lambda module: module(x)[1].balance_loss  # noqa: E731
        return jax.grad(output)(module), jax.grad(balance)(module), module(x)[1].count_E

    from_output, from_balance, count_E = run(module, x)
    got = np.asarray(count_E) > 0
    assert got.any()
    assert not got.all()
    for name in ("up", "down"):
        moved = np.abs(np.asarray(getattr(from_output, name)[...])).max(axis=(1, 2)) > 0
        np.testing.assert_array_equal(moved, got)
        assert not np.any(getattr(from_balance, name)[...])
    assert np.abs(from_output.router[...]).max() > 1e-3
    assert np.abs(from_balance.router[...]).max() > 1e-3


def test_without_drops_tokens_do_not_see_one_another(fill):
    """Permuted tokens give permuted outputs; a NaN in one token reaches no other; steps equal the row."""
    module, x = fill(lambda: make(top_k=2), scale=1.0), draw()
    run = jax.jit(lambda module, x: module(x)[0])
    y, order = run(module, x), np.random.default_rng(0).permutation(LENGTH)
    np.testing.assert_allclose(run(module, x[:, order]), y[:, order], atol=1e-6)
    broken = x.copy()
    broken[0, 3] = np.nan
    others = np.ones((BATCH, LENGTH), bool)
    others[0, 3] = False
    y_broken = np.asarray(run(module, broken))
    assert np.isnan(y_broken[0, 3]).all()
    np.testing.assert_allclose(y_broken[others], np.asarray(y)[others], atol=1e-6)
    steps = jax.jit(jax.vmap(module.step, in_axes=1, out_axes=1))
    np.testing.assert_allclose(steps(x), y, atol=1e-6)


def test_with_drops_a_nan_may_take_a_slot_but_is_read_by_no_other_token(fill):
    module, x = fill(lambda: make(capacity_factor=0.5), scale=1.0), draw()
    x[0, 3] = np.nan
    y, aux = jax.jit(lambda x: module(x, train=True))(x)
    assert aux.dropped > 0
    assert np.isnan(y).any(axis=-1).sum() <= 1


@pytest.mark.parametrize(
    ("group_size", "factor", "top_k", "num_experts", "slots"),
    [
        (8, 1.0, 1, 4, 2),
        (8, 1.25, 1, 4, 3),  # 2.5, rounded up
        (8, 1.0, 2, 4, 4),  # choices, not tokens
        (8, 0.001, 1, 4, 1),  # never none
        (8, 2.0, 4, 4, 8),  # a token takes one slot of an expert at most
        (8, 0.0, 1, 4, 8),  # 0: one for every token
        (5, 1.0, 1, 1, 5),
        (3, 1.0, 1, 8, 1),
    ],
)
def test_capacity_table(group_size, factor, top_k, num_experts, slots):
    module = jax.eval_shape(lambda: make(num_experts=num_experts, top_k=top_k))
    assert module.capacity(group_size, factor) == slots


def test_training_and_evaluation_have_their_own_capacity(fill):
    module = fill(lambda: make(capacity_factor=0.5, eval_capacity_factor=0.0), scale=1.0)
    run = jax.jit(lambda x: [module(x, train=train)[1].dropped for train in (True, False)])
    train, evaluation = run(draw())
    assert train > 0
    assert evaluation == 0


def test_the_router_keeps_float32_where_bfloat16_would_tie():
    """Columns 1 and 1 + 2^-10 are one number in bfloat16, and a tie goes to expert 0; in float32 expert 1 wins."""
    module = jax.eval_shape(lambda: make(num_experts=2, dtype=jnp.dtype("bfloat16")))
    module = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), module)
    module.router[...] = np.broadcast_to(np.array([1, 1 + 2**-10], np.float32), (D_MODEL, 2))
    y, aux = jax.jit(lambda x: module(x))(jnp.ones((BATCH, LENGTH, D_MODEL), jnp.bfloat16))
    np.testing.assert_array_equal(aux.count_E, [0, BATCH * LENGTH])
    assert y.dtype == jnp.bfloat16
    assert aux.balance_loss.dtype == aux.entropy.dtype == jnp.float32
