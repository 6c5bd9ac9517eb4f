"""Balance losses, updates and statistics, by loops over tokens in float64 and by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import balance, routing

T, E, D, M = 13, 6, 3, 2  # tokens, experts, groups of two experts, groups a token may use


def draw(seed=0, k=2, dense=False):
    """A group of random choices, {expert, gate, prob, load, logits, valid} in float64; about a third is padding.

    dense: column e of the choices is expert e, with a gate of 0 where the token does not use it.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(T, E))
    prob = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    valid = rng.random(T) < 0.7
    columns = E if dense else k
    gate = rng.uniform(0.1, 1, size=(T, columns))
    if dense:
        gate = np.where(rng.random(gate.shape) < 0.5, gate, 0)
        expert = np.where(gate > 0, np.arange(E), E)
    else:
        expert = np.argsort(-logits + rng.normal(size=(T, E)), axis=1)[:, :columns]
        expert[3, -1] = E  # a choice that was not made
        expert[5, :2] = 0  # one made twice
    expert = np.where(valid[:, None], expert, E)
    return {
        "expert": expert,
        "gate": np.where(valid[:, None], gate, 0),
        "prob": prob,
        "load": rng.uniform(0, 1, size=(T, E)),
        "logits": 3 * logits,
        "valid": valid,
    }


def share(expert, valid, num_counted=None):
    """Of the choices of valid tokens, how many fell on each expert."""
    count = np.zeros(E)
    for t in np.flatnonzero(valid):
        for e in expert[t, :num_counted]:
            if e < E:
                count[e] += 1
    return count / count.sum() if count.sum() else count


def mean(values, valid):
    return sum((values[t] for t in np.flatnonzero(valid)), np.zeros(values.shape[1:])) / max(valid.sum(), 1)


def load_balance(g, num_counted=None):
    f, p = share(g["expert"], g["valid"], num_counted), mean(g["prob"], g["valid"])
    return E * sum(f[e] * p[e] for e in range(E))


def device(g):
    """f_i = E / (K T) * count, 1 when uniform; its mean over the group times the group's probability."""
    f, p = E * share(g["expert"], g["valid"]), mean(g["prob"], g["valid"])
    size, loss = E // D, 0.0
    for d in range(D):
        inside = range(d * size, (d + 1) * size)
        loss += sum(f[e] for e in inside) / size * sum(p[e] for e in inside)
    return loss


def communication(g):
    p, size, loss = mean(g["prob"], g["valid"]), E // D, 0.0
    for d in range(D):
        inside = set(range(d * size, (d + 1) * size))
        sent = sum(bool(inside & set(g["expert"][t])) for t in np.flatnonzero(g["valid"]))
        loss += D / (M * max(g["valid"].sum(), 1)) * sent * sum(p[e] for e in inside)
    return loss


def cv(values):
    return np.var(values) / (np.mean(values) ** 2 + 1e-10)


def importance(g):
    total = np.zeros(E)
    for t in np.flatnonzero(g["valid"]):
        for e, gate in zip(g["expert"][t], g["gate"][t], strict=True):
            if e < E:
                total[e] += gate
    return cv(total)


def load(g):
    return cv(sum((g["load"][t] for t in np.flatnonzero(g["valid"])), np.zeros(E)))


def relu(g):
    used, gate = mean((g["gate"] > 0).astype(float), g["valid"]), mean(g["gate"], g["valid"])
    return E / 2 * sum(used[e] * gate[e] for e in range(E))


def z(g):
    return mean(np.log(np.exp(g["logits"]).sum(axis=1)) ** 2, g["valid"])


def entropy(g):
    return sum(-sum(p * math.log(p) for p in g["prob"][t] if p > 0) for t in np.flatnonzero(g["valid"]))


def of_assignment(function, **options):
    """The loss as a function of a whole group, as the numpy loops are."""

    def call(g):
        assignment = routing.Assignment(expert_TK=g["expert"], gate_TK=g["gate"], prob_TE=g["prob"], load_TE=g["load"])
        return function(assignment, g["valid"], **options)

    return call


# name: (ours, by loops, the input that it moves)
LOSSES = {
    "load_balance": (of_assignment(balance.load_balance_loss), load_balance, "prob"),
    "first_choices": (
        of_assignment(balance.load_balance_loss, num_counted=1),
        lambda g: load_balance(g, num_counted=1),
        "prob",
    ),
    "device": (of_assignment(balance.device_loss, num_groups=D), device, "prob"),
    "communication": (
        of_assignment(balance.communication_loss, num_groups=D, top_groups=M),
        communication,
        "prob",
    ),
    "importance": (of_assignment(balance.importance_loss), importance, "gate"),
    "load": (of_assignment(balance.load_loss), load, "load"),
    "relu": (of_assignment(balance.relu_loss, k=2), relu, "gate"),
    "z": (lambda g: balance.z_loss(g["logits"], g["valid"]), z, "logits"),
    "entropy": (lambda g: balance.router_entropy(g["prob"], g["valid"]), entropy, "prob"),
}
every_loss = pytest.mark.parametrize("name", list(LOSSES))
FLOATS = ("gate", "prob", "load", "logits")
COMPILED = {}


def run(name, g):
    """(loss, {input: its gradient}) of ours, in float32; compiled once a loss and shape."""
    if name not in COMPILED:
        ours = LOSSES[name][0]
        COMPILED[name] = jax.jit(jax.value_and_grad(lambda floats, rest: ours({**floats, **rest})))
    floats = {key: np.asarray(g[key], np.float32) for key in FLOATS}
    return COMPILED[name](floats, {"expert": np.asarray(g["expert"], np.int32), "valid": np.asarray(g["valid"])})


def group(name, **options):
    return draw(dense=name == "relu", **options)


@pytest.mark.parametrize(("name", "k"), [(name, k) for name in LOSSES for k in (1, 2, E) if name != "relu" or k == E])
def test_values_and_gradients_equal_loops_over_tokens(name, k, slope):
    """Counts and shares are constants of the gradient, which reaches the valid tokens of one input and nothing else."""
    g, (_, by_loops, moved) = group(name, k=k), LOSSES[name]
    loss, gradients = run(name, g)
    np.testing.assert_allclose(loss, by_loops(g), rtol=1e-5)
    direction = np.random.default_rng(1).normal(size=g[moved].shape)
    if name == "relu":
        direction *= g["gate"] > 0  # the share of tokens jumps where a gate leaves 0
    along = slope(lambda x: by_loops({**g, moved: x}), g[moved], direction)
    np.testing.assert_allclose(np.sum(np.float64(gradients[moved]) * direction), along, rtol=1e-4, atol=1e-6)
    assert np.abs(gradients[moved][g["valid"]]).max() > 1e-3
    assert not np.any(gradients[moved][~g["valid"]])
    assert not any(np.any(gradients[other]) for other in FLOATS if other != moved)


@every_loss
def test_what_stands_in_padding_does_not_matter_even_a_nan(name):
    g = group(name)
    hole = ~g["valid"]
    dirty = {key: g[key].copy() for key in g}
    for key in FLOATS:
        dirty[key][hole] = np.nan
    dirty["expert"][hole] = 0
    (loss, gradients), (clean, clean_gradients) = run(name, dirty), run(name, g)
    np.testing.assert_array_equal(loss, clean)
    for key in FLOATS:
        np.testing.assert_array_equal(gradients[key], clean_gradients[key])


@every_loss
def test_padding_alone_has_no_loss_no_gradient_and_no_nan(name):
    loss, gradients = run(name, {**group(name), "valid": np.zeros(T, bool)})
    assert loss == 0
    assert not any(np.any(gradient) for gradient in gradients.values())


@every_loss
def test_the_order_of_the_experts_does_not_matter(name):
    """Where groups count, whole groups move, and experts inside them."""
    g = group(name)
    order = (
        np.array([3, 2, 0, 1, 5, 4]) if name in ("device", "communication") else np.random.default_rng(2).permutation(E)
    )
    rank = np.append(np.argsort(order), E)  # column order[j] becomes j
    moved = {**g, "expert": rank[g["expert"]], **{key: g[key][:, order] for key in ("prob", "load", "logits")}}
    if name == "relu":
        moved["gate"] = g["gate"][:, order]
        moved["expert"] = np.where(moved["gate"] > 0, np.arange(E), E)
    np.testing.assert_allclose(run(name, moved)[0], run(name, g)[0], rtol=1e-5)


@every_loss
def test_vmap_over_groups_equals_each_group_alone(name):
    groups = [group(name, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves).astype(leaves[0].dtype), *groups)
    expected = [LOSSES[name][1](g) for g in groups]
    np.testing.assert_allclose(jax.jit(jax.vmap(LOSSES[name][0]))(stacked), expected, rtol=1e-5)


def even(expert, prob=None):
    """A group without padding, from the choices; probabilities are those of the first choice unless given."""
    expert = np.asarray(expert)
    prob = np.eye(E)[expert[:, 0]] if prob is None else np.asarray(prob)
    ones, gate = np.ones((len(expert), E), np.float32), np.ones(expert.shape, np.float32)
    return {"expert": expert, "gate": gate, "prob": prob, "load": ones, "logits": ones, "valid": ones[:, 0] > 0}


ROUND = np.arange(12)[:, None] % E
COLLAPSE = np.zeros((12, 1), int)


@pytest.mark.parametrize(
    ("name", "choices", "expected"),
    [
        ("load_balance", ROUND, 1),
        ("load_balance", COLLAPSE, E),
        ("load_balance", np.hstack([ROUND, (ROUND + 1) % E]), 1),  # K choices are not K times the loss
        ("load_balance", np.hstack([COLLAPSE, COLLAPSE + 1]), E / 2),
        ("first_choices", np.hstack([COLLAPSE, ROUND]), E),
        ("first_choices", np.hstack([ROUND, COLLAPSE]), 1),
        ("device", ROUND, 1),
        ("device", COLLAPSE, D),
        ("device", np.hstack([ROUND, ROUND // 2 * 2]), 1),  # unequal inside the groups, equal among them
        ("communication", np.hstack([ROUND, (ROUND + 2) % E]), 1),  # every token uses its two groups
        ("communication", np.hstack([ROUND, ROUND ^ 1]), 1 / 2),  # both choices in one group: half the messages
        ("communication", np.hstack([COLLAPSE, COLLAPSE + 1]), D / 2),
        ("importance", ROUND, 0),
        ("importance", COLLAPSE, E - 1),  # (12^2 / E - 2^2) / 2^2
    ],
)
def test_balance_collapse_and_what_lies_between(name, choices, expected):
    np.testing.assert_allclose(LOSSES[name][0](even(choices)), expected, rtol=1e-6, atol=1e-12)


def test_a_single_expert_is_balanced():
    ones = np.ones((4, 1), np.float32)
    one = routing.Assignment(expert_TK=np.zeros((4, 1), int), gate_TK=ones, prob_TE=ones, load_TE=ones)
    assert balance.load_balance_loss(one, np.ones(4, bool)) == 1
    assert balance.importance_loss(one, np.ones(4, bool)) == 0
    assert balance.load_loss(one, np.ones(4, bool)) == 0


def test_ties_in_the_choice_cost_nothing_while_the_probabilities_are_even():
    """All tokens choose expert 0, but with P_e = 1/E: the loss sees choices through probabilities alone."""
    g = even(COLLAPSE, prob=np.full((12, E), 1 / E))
    np.testing.assert_allclose(LOSSES["load_balance"][0](g), 1.0, rtol=1e-6)


def test_relu_loss_weighs_each_gate_by_how_many_tokens_use_its_expert():
    """Gates 1 on the diagonal, one of E a token: (E / k) * sum_e 1/E * 1/E = 1/k. All of them on: E/k * E."""
    one = {**even(np.tile(np.arange(E), (E, 1))), "gate": np.eye(E)}
    np.testing.assert_allclose(LOSSES["relu"][0](one), 1 / 2, rtol=1e-6)
    np.testing.assert_allclose(LOSSES["relu"][0]({**one, "gate": np.ones((E, E))}), E * E / 2, rtol=1e-6)


def test_cv_squared_by_hand():
    np.testing.assert_allclose(balance.cv_squared(np.float32([1, 3])), 1 / 4, rtol=1e-6)  # variance 1, mean 2
    np.testing.assert_allclose(balance.cv_squared(np.float32([1, 3]), eps=4.0), 1 / 8, rtol=1e-6)
    assert balance.cv_squared(jnp.zeros(4)) == 0


def test_z_loss_is_that_of_the_logits_in_float32():
    """E equal logits of x: (x + ln E)^2."""
    logits = jnp.full((4, E), 3, jnp.bfloat16)
    loss = balance.z_loss(logits, np.ones(4, bool))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, (3 + math.log(E)) ** 2, rtol=1e-6)


def test_entropy_is_summed_and_finite_where_a_probability_is_zero():
    """ln 4 for a uniform token, ln 2 for a coin, 0 for a certain one; a padding token adds nothing."""
    prob = np.float32([[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25] * 4])
    valid = np.array([True, True, True, False])
    value, gradient = jax.value_and_grad(balance.router_entropy)(prob, valid)
    np.testing.assert_allclose(value, math.log(4) + math.log(2), rtol=1e-6)
    expected = np.where(prob > 0, -1 - np.log(np.maximum(prob, 1e-9)), 0) * valid[:, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


count = jax.jit(balance.count_choices, static_argnums=1)
coactivation = jax.jit(balance.coactivation, static_argnums=1)


def test_counts_are_exact_integers_without_padding():
    counts = count(np.array([[0, 2], [2, 1], [4, 4], [2, 0]]), 4)  # 4: no expert
    np.testing.assert_array_equal(counts, [2, 1, 3, 0])
    assert counts.dtype == jnp.int32


def test_counting_every_expert_of_every_token_costs_no_array_of_tokens_by_choices_by_experts():
    choices = jax.ShapeDtypeStruct((4096, 128), jnp.int32)
    memory = count.lower(choices, 128).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 128 * 128 / 8


def test_coactivation_counts_tokens_that_chose_both():
    """Three tokens: {0, 2}, {2, 1} and, twice, 3; then padding."""
    counts = coactivation(np.array([[0, 2], [2, 1], [3, 3], [4, 4]]), 4)
    np.testing.assert_array_equal(counts, [[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 2, 0], [0, 0, 0, 1]])
    assert counts.dtype == jnp.int32


def test_coactivation_equals_loops_and_its_diagonal_the_counts():
    expert = draw(k=3)["expert"]
    counts, expected = coactivation(expert, E), np.zeros((E, E), int)
    for chosen in expert:
        for i in set(chosen) - {E}:
            for j in set(chosen) - {E}:
                expected[i, j] += 1
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(np.diag(counts), count(expert, E))


BIG = 2**24
COUNTS = {
    "by hand": [4, 2, 3, 3],  # the mean is 3
    "between two counts": [1, 2, 2, 2],  # 1.75
    "idle": [0, 0, 0, 0],
    "one apart where float32 rounds": [BIG + 1, BIG + 1, BIG + 1, BIG],
    "all equal where float32 rounds": [BIG + 1] * 4,
    "a sum beyond int32": [2**30, 2**30 - 1, 2**30 + 1, 2**30],
    "a count times E beyond int32": [8_388_608 * (e % 3) for e in range(256)],
    "all on one of many": [8_388_608] + [0] * 255,
}


@pytest.mark.parametrize("case", list(COUNTS))
def test_the_bias_rises_below_the_mean_falls_above_it_and_stays_at_it(case):
    counts = COUNTS[case]
    rng = np.random.default_rng(0)
    total, order = sum(counts), rng.permutation(len(counts))  # Python's integers: exact
    sign = np.array([(total > len(counts) * c) - (total < len(counts) * c) for c in counts])
    bias = rng.normal(size=len(counts)).astype(np.float32)
    update = jax.jit(balance.bias_update)
    new = update(bias, np.array(counts, np.int32), 0.001)
    assert new.dtype == jnp.float32
    np.testing.assert_array_equal(new, bias + np.float32(0.001) * sign.astype(np.float32))
    moved = update(bias[order], np.array(counts, np.int32)[order], 0.001)
    np.testing.assert_array_equal(moved, new[order])


def test_counts_that_round_are_refused():
    with pytest.raises(AssertionError, match="bfloat16"):
        balance.bias_update(jnp.zeros(4), jnp.zeros(4, jnp.bfloat16), 0.001)


@pytest.mark.parametrize(
    ("num_active", "num_tokens", "k", "factor"),
    [
        (21, 10, 2, 1.2),  # more than 2 experts a token: too dense
        (20, 10, 2, 1 / 1.2),
        (19, 10, 2, 1 / 1.2),
        (0, 10, 1, 1 / 1.2),
        (2**30, 2**29, 8, 1 / 1.2),  # k * num_tokens is beyond int32
    ],
)
def test_the_coefficient_grows_until_the_gates_are_as_sparse_as_k_says(num_active, num_tokens, k, factor):
    new = balance.coefficient_update(
        jnp.float32(1e-8), jnp.int32(num_active), jnp.int32(num_tokens), k=k, multiplier=1.2
    )
    np.testing.assert_allclose(new, 1e-8 * factor, rtol=1e-6)
    assert (1 - num_active / (num_tokens * 16) < 1 - k / 16) == (factor > 1)  # the paper's words, with 16 experts
