"""With every router, the mixture of experts equals loops over groups, tokens and experts: output, gradients, losses and
statistics."""

import functools

import jax
import jax.numpy as jnp
import moe_loop
import numpy as np
import pytest
from flax import nnx

from moejax import config as config_lib
from moejax import partition
from moejax.layers import moe
from moejax.ops import dispatch_rules

# Each router in two of the three group sizes and of the four activations; with every loss it may have, then its own.
GROUPS = (moe_loop.LENGTH // 2, 0, 2 * moe_loop.LENGTH)  # half a row, a row, two rows
CASES = {}
for _i, _router in enumerate(moe_loop.ROUTERS):
    _sparse = config_lib.ROUTERS[_router].sparse
    _losses = {f"{name}_weight": 0.5 for name in config_lib.ROUTERS[_router].losses if name != "relu"}
    _group, _activation = GROUPS[_i % 3], moe_loop.ACTIVATIONS[_i % 4]
    CASES[f"{_router}, capacity"] = {
        "router": _router,
        "group_size": _group,
        "activation": _activation,
        "dispatch": "capacity" if _sparse else "auto",
        "bias": _i % 2 == 0,
        "num_shared_experts": _i % 3,
        **_losses,
    }
    CASES[f"{_router}, dropless"] = {
        "router": _router,
        "group_size": GROUPS[(_i + 1) % 3],
        "activation": moe_loop.ACTIVATIONS[(_i + 1) % 4],
        "dispatch": "dropless" if _sparse and _router != "expert_choice" else "auto",
        "grouped_matmul": ("blocked", "ragged_dot")[_i % 2],
        "capacity_factor": 2.0 if _router == "expert_choice" else 0.0,
        "bias": _i % 2 == 1,
        "num_shared_experts": (_i + 2) % 3,
        "slots_per_expert": 2,
    }
CASES["top_k, choices first"] = {"router": "top_k", "top_k": 2, "capacity_order": "choices", "dispatch": "capacity"}
CASES["top_k, priority"] = {"router": "top_k", "top_k": 2, "capacity_order": "priority", "dispatch": "capacity"}
CASES["top_k, gates normalised after drops"] = {"router": "top_k", "top_k": 3, "normalise_gates": "after"}
CASES["gshard, gates normalised after drops"] = {"router": "gshard", "normalise_gates": "after"}
CASES["relu, choices first"] = {"router": "relu", "capacity_order": "choices", "dispatch": "capacity"}


@functools.cache
def results(case, fill):
    """(the config, the layer's output, aux and gradients, the loops, what is differentiated, in what).

    That is the output alone in the dropless cases, and with it the losses and the entropy in the others.
    """
    module = moe_loop.make(fill, **CASES[case])
    router = module.config.router
    x, inputs, keys = moe_loop.draw_inputs(router)
    dy = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    params, state, rebuild = moe_loop.split(module)

    def objective(y, losses, entropy):
        total = sum((i + 1) * losses[name] for i, name in enumerate(sorted(losses))) + 0.1 * entropy
        return (dy * y).sum() + (0 if "dropless" in case else total)

    @jax.jit
    def run(params, x, keys):
        def loss(params, x):
            y, aux = moe_loop.call(rebuild(params), x, inputs, keys)
            return objective(y, aux.losses, aux.entropy), (y, aux)

        gradients, (y, aux) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, aux, gradients

    actual = jax.device_get(run(params, x, keys))
    exact = jax.tree.map(lambda value: np.asarray(value, np.float64), params)

    def loop(params, x):
        return moe_loop.run(module.config, params, state, np.asarray(x, np.float64), inputs)

    return module.config, actual, loop, objective, (exact, x)


@pytest.mark.parametrize("case", list(CASES))
def test_output_losses_and_statistics_equal_loops(case, fill):
    """1e-5: float32 sums of a few products of size one. Counts and drops are exact."""
    config, (y, aux, _), loop, _, given = results(case, fill)
    expected = loop(*given)
    np.testing.assert_allclose(y, expected.y, rtol=1e-5, atol=1e-5)
    assert aux.dropped == expected.dropped
    assert aux.dropped.dtype == np.int32
    sparse = config_lib.ROUTERS[config.router].sparse
    np.testing.assert_allclose(aux.count_E, expected.count_E, rtol=0 if sparse else 1e-5)
    assert aux.count_E.dtype == (np.int32 if sparse else np.float32)
    assert aux.entropy == pytest.approx(expected.entropy, rel=1e-5, abs=1e-6)
    assert sorted(aux.losses) == sorted(config.loss_weights())
    for name, value in expected.losses.items():
        assert aux.losses[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
        assert aux.losses[name].dtype == np.float32
    np.testing.assert_array_equal(aux.preferred_BL, expected.preferred_BL)
    if aux.together_EE is not None:
        np.testing.assert_array_equal(aux.together_EE, expected.together_EE)
        assert aux.together_EE.dtype == np.int32
    elif sparse:
        np.testing.assert_array_equal(expected.together_EE, np.diag(expected.count_E))
    limited = config.dispatch == "capacity" or (config.dispatch == "auto" and config.capacity_factor > 0)
    assert (expected.dropped > 0) == (limited and sparse and config.router != "expert_choice")


@pytest.mark.parametrize("case", list(CASES))
def test_gradients_equal_those_of_loops(case, fill, slope):
    """2e-4: float32 sums of a few products, against central differences in float64."""
    _, (_, _, gradients), loop, objective, given = results(case, fill)
    rng = np.random.default_rng(3)
    leaves, structure = jax.tree.flatten(given)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(given)]
    for position, (path, value) in enumerate(zip(paths, leaves, strict=True)):

        def loss(moved, position=position):
            result = loop(*structure.unflatten([*leaves[:position], moved, *leaves[position + 1 :]]))
            return objective(result.y, result.losses, result.entropy)

        direction = rng.normal(size=value.shape)
        actual = (jax.tree.leaves(gradients)[position] * direction).sum()
        assert actual == pytest.approx(slope(loss, value, direction), rel=2e-4, abs=2e-5), path


@pytest.mark.parametrize("case", list(CASES))
def test_every_expert_that_received_a_token_learns_and_the_others_do_not_move(case, fill):
    config, (_, _, (gradient, _)), loop, _, given = results(case, fill)
    received = loop(*given).received_E > 0
    assert received.any()
    assert not (config.router in moe_loop.COLD and received[-1])
    for name in ("up", "down", "up_bias", "down_bias"):
        if name in gradient:
            moved = np.abs(gradient[name]).reshape(moe_loop.EXPERTS, -1).max(axis=1) > 0
            np.testing.assert_array_equal(moved, received, err_msg=name)


@pytest.mark.parametrize("router", moe_loop.ROUTERS)
def test_the_router_learns_from_the_output_alone(router, fill):
    _, (_, _, (gradient, _)), *_ = results(f"{router}, dropless", fill)
    assert ("router" in gradient) == (router not in ("hash", "label"))
    for name, value in gradient.get("router", {}).items():
        assert np.abs(value).max() > 1e-3, name


# --- settings --------------------------------------------------------------------------------------------------------


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
        (100, 1.1, 1, 11, 10),  # 10.000000000000002 in binary
    ],
)
def test_capacity_table(group_size, factor, top_k, num_experts, slots):
    config = config_lib.MoeConfig(num_experts=num_experts, top_k=top_k)
    module = jax.eval_shape(lambda: moe_loop.create(config))
    assert module.config.capacity(group_size, factor) == slots


@pytest.mark.parametrize(
    ("rounding", "least", "group_size", "factor", "num_experts", "slots"),
    [
        ("down", 1, 65_536, 1.0, 42, 1560),  # MoE-Mamba's 25M, whose code has int()
        ("up", 1, 65_536, 1.0, 42, 1561),
        ("nearest", 1, 65_536, 1.0, 42, 1560),
        ("nearest", 1, 8, 1.25, 4, 2),  # 2.5: halves to even
        ("nearest", 1, 11, 1.25, 5, 3),  # 2.75
        ("down", 1, 100, 1.1, 10, 11),  # 11.000000000000002 in binary, and 0.3 * 10 below 3
        ("down", 1, 10, 0.3, 1, 3),
        ("down", 1, 2, 1.0, 8, 1),  # never none
        ("down", 4, 8, 1.0, 8, 4),  # Mesh-TensorFlow's least
        ("up", 4, 3, 1.0, 8, 3),  # but one a token at most
        ("down", 4, 8, 0.0, 8, 8),
    ],
)
def test_capacity_is_rounded_as_the_config_says(rounding, least, group_size, factor, num_experts, slots):
    config = config_lib.MoeConfig(num_experts=num_experts, capacity_rounding=rounding, min_capacity=least)
    assert config.capacity(group_size, factor) == slots


@pytest.mark.parametrize(
    ("settings", "factor", "dropless"),
    [
        ({"router": "top_k"}, 1.25, False),
        ({"router": "top_k", "num_experts": 8}, 0.0, True),  # four experts a choice
        ({"router": "top_k", "num_experts": 6}, 0.0, False),  # three
        ({"router": "relu", "num_experts": 6}, 1.25, True),
        ({"router": "expert_choice"}, 2.0, False),
        ({"router": "soft"}, 0.0, False),
        ({"router": "top_k", "dispatch": "dropless"}, 1.25, True),
        ({"router": "top_k", "dispatch": "capacity"}, 0.0, False),
    ],
)
def test_tokens_are_sorted_where_nothing_may_be_dropped_and_experts_are_many(settings, factor, dropless, monkeypatch):
    rule = dispatch_rules.Rule(full_capacity=3.0, grouped_matmul="blocked", measured="")
    monkeypatch.setattr(dispatch_rules, "RULES", {"gpu": rule})
    config = config_lib.MoeConfig(**{"num_experts": 8, "top_k": 2 if settings["router"] == "top_k" else 0} | settings)
    assert jax.eval_shape(lambda: moe_loop.create(config)).is_dropless(factor) == dropless


def test_training_and_evaluation_have_their_own_capacity(fill):
    module = moe_loop.make(fill, router="top_k", capacity_factor=0.5, eval_capacity_factor=0.0)
    x, _, _ = moe_loop.draw_inputs()
    train, evaluation = jax.jit(lambda x: [module(x, train=train)[1].dropped for train in (True, False)])(x)
    assert train > 0
    assert evaluation == 0


def test_the_router_keeps_float32_where_bfloat16_would_tie():
    """Columns 1 and 1 + 2^-10 are one number in bfloat16, and a tie goes to expert 0; in float32 expert 1 wins."""
    config = config_lib.MoeConfig(num_experts=2, d_expert=3)
    module = jax.eval_shape(lambda: moe_loop.create(config, dtype=jnp.dtype("bfloat16")))
    module = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), module)
    module.router.weight.set_value(np.broadcast_to(np.array([1, 1 + 2**-10], np.float32), (moe_loop.D_MODEL, 2)))
    shape = (moe_loop.BATCH, moe_loop.LENGTH, moe_loop.D_MODEL)
    y, aux = jax.jit(lambda x: module(x))(jnp.ones(shape, jnp.bfloat16))
    np.testing.assert_array_equal(aux.count_E, [0, moe_loop.BATCH * moe_loop.LENGTH])
    assert y.dtype == jnp.bfloat16
    assert aux.losses["balance"].dtype == aux.entropy.dtype == jnp.float32


@pytest.mark.parametrize(
    ("normalise", "weights"),
    [
        ("none", [[0.6, 0.3, 0, 0], [0, 0, 0.4, 0]]),
        ("before", [[2 / 3, 1 / 3, 0, 0], [0, 0, 4 / 9, 0]]),
        ("after", [[2 / 3, 1 / 3, 0, 0], [0, 0, 1, 0]]),
    ],
)
def test_gates_are_normalised_before_or_after_drops_by_hand(normalise, weights):
    """One slot an expert: token 0 takes experts 0 and 1, token 1 finds 0 full and takes 2. Expert e gives unit e."""
    config = config_lib.MoeConfig(
        num_experts=3, d_expert=1, top_k=2, eval_capacity_factor=0.5, normalise_gates=normalise, bias=True
    )
    module = moe_loop.zeros(config)
    module.router.weight[...][:2] = np.log([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]])
    module.down_bias[...][:] = np.eye(3, moe_loop.D_MODEL)
    y, aux = jax.jit(lambda x: module(x))(np.eye(2, moe_loop.D_MODEL, dtype=np.float32)[None])
    np.testing.assert_allclose(y[0], weights, atol=1e-6)
    assert aux.dropped == 1


def test_expert_dropout_drops_its_share_of_every_choices_hidden_units_and_scales_the_rest():
    """Hidden units of 1, matrices of 1 and 10 in the diagonal and gates of 1/2 write two masks into an output's digits.

    0.03: four standard deviations of a mean of 4096 draws.
    """
    width, rate = 256, 0.4

    def module_with(dispatch):
        config = config_lib.MoeConfig(
            num_experts=2, d_expert=width, top_k=2, capacity_factor=0, bias=True, expert_dropout=rate, dispatch=dispatch
        )
        module = moe_loop.zeros(config, width)
        module.up_bias[...][:] = 1
        module.down[...][:] = np.eye(width), 10 * np.eye(width)
        return module

    @jax.jit
    def run(capacity, dropless, x, keys):
        dropped = [module(x, keys_B=keys, train=True)[0] for module in (capacity, dropless)]
        whole = [capacity(x, train=True)[0], dropless(x, keys_B=keys)[0]]
        return dropped, whole, dropless(x, keys_B=keys[::-1], train=True)[0]

    modules, keys = (
        [module_with(dispatch) for dispatch in ("capacity", "dropless")],
        jax.random.split(jax.random.key(0)),
    )
    (y, dropless), whole, swapped = run(*modules, np.zeros((2, 4, width), np.float32), keys)
    np.testing.assert_array_equal(dropless, y)
    np.testing.assert_array_equal(swapped[::-1], y)
    for unchanged in whole:
        np.testing.assert_allclose(unchanged, 5.5)
    digits = np.asarray(y) * 2 * (1 - rate)
    np.testing.assert_allclose(digits, np.round(digits), atol=1e-5)
    kept = np.stack([np.round(digits) % 10, np.round(digits) // 10])  # of the two choices of each token
    assert set(np.unique(kept)) == {0, 1}
    assert kept.mean() == pytest.approx(1 - rate, abs=0.03)
    masks = kept.reshape(-1, width)
    assert len(np.unique(masks, axis=0)) == len(masks)


def test_the_second_matrix_counts_the_inputs_of_all_experts_in_moe_mambas_scheme():
    """As its code does; 3 %: four standard deviations of an estimate from 10,240 draws."""
    config = config_lib.MoeConfig(num_experts=8, d_expert=32)
    for scheme, fan_in, cut in (("moe_mamba", 8 * 32, 1), ("switch", 32, 0.8796)):  # 0.8796: the sd of a cut at 2 sd
        module = jax.jit(lambda scheme=scheme: moe_loop.create(config, 40, scheme=scheme, init_scale=0.1))()
        assert np.std(module.down[...]) == pytest.approx(cut * np.sqrt(0.1 / fan_in), rel=0.03)
        assert np.std(module.up[...]) == pytest.approx(cut * np.sqrt(0.1 / 40), rel=0.03)


def test_biases_start_at_zero_or_are_not_there():
    bare, biased = (jax.eval_shape(lambda b=b: moe_loop.create(config_lib.MoeConfig(bias=b))) for b in (False, True))
    assert bare.up_bias is bare.down_bias is None
    assert biased.up_bias.shape == (8, 1024)
    module = moe_loop.create(config_lib.MoeConfig(num_experts=2, d_expert=3, bias=True))
    assert not np.any(module.up_bias[...])
    assert not np.any(module.down_bias[...])


@pytest.mark.parametrize("axes", [{"fsdp": 2}, {"tensor": 2}, {"expert": 2}, {"sequence": 2}])
def test_few_tokens_in_evaluation_are_those_of_one_device_on_any_mesh(axes):
    """As few as in a step of decoding, which takes a way of its own."""
    c = config_lib.MoeConfig(num_experts=8, d_expert=8, eval_capacity_factor=0.0, activation="swiglu")
    layer = moe.Moe(4, c, init_scale=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(params=0))
    x = np.random.default_rng(0).normal(size=(2 if {"fsdp", "expert"} & set(axes) else 1, 4, 4)).astype(np.float32)
    mesh = partition.make_mesh(config_lib.MeshConfig(**{"data": 1, **axes}), jax.devices()[:2])
    placed = jax.device_put(layer, partition.tree_shardings(layer, mesh))
    program = jax.jit(partition.on_mesh(mesh, lambda layer, x: layer(x)[0]))
    actual = program(placed, jax.device_put(x, partition.replicated(mesh)))
    np.testing.assert_allclose(actual, jax.jit(lambda layer, x: layer(x)[0])(layer, x), atol=1e-5)
