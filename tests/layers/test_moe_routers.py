"""Laws that hold for the mixture of experts with every router, and what each router's noise may do."""

import functools

import jax
import jax.numpy as jnp
import moe_loop
import numpy as np
import pytest

from moejax import config as config_lib

LENGTH, LAST = moe_loop.LENGTH, moe_loop.LENGTH - 1
CAUSAL = tuple(name for name in moe_loop.ROUTERS if config_lib.ROUTERS[name].causal)
SPARSE = tuple(name for name in moe_loop.ROUTERS if config_lib.ROUTERS[name].sparse)
DROPPING = tuple(name for name in SPARSE if name != "expert_choice")  # whose experts never get more than their capacity
# one activation without a kink, so that no difference is hidden in a dead unit
FREE = {"activation": "gelu", "capacity_factor": 0.0, "eval_capacity_factor": 0.0}
TIGHT = {"activation": "gelu", "eval_capacity_factor": 0.5, "capacity_order": "tokens", "dispatch": "capacity"}
every_router = pytest.mark.parametrize("router", moe_loop.ROUTERS)


@functools.cache
def evaluate(fill, router, tight=False):
    """(x, ids, labels, valid) -> (y, dropped) in evaluation, compiled once; with capacity and drops, or without."""
    settings = dict(TIGHT if tight and router in SPARSE else FREE)
    if router == "expert_choice":
        settings |= {"capacity_factor": 0.5, "eval_capacity_factor": 2.0}
    module = moe_loop.make(fill, router=router, **settings)

    @jax.jit
    def run(x, inputs):
        y, aux = moe_loop.call(module, x, inputs._replace(train=False))
        return y, aux.dropped

    return module, lambda x, inputs: jax.device_get(run(x, inputs._replace(train=0)))


def draw():
    x, inputs, _ = moe_loop.draw_inputs(train=False, padded=False)
    return x, inputs


@every_router
def test_without_drops_permuted_tokens_give_permuted_outputs(router, fill):
    x, inputs = draw()
    _, run = evaluate(fill, router)
    order = np.random.default_rng(0).permutation(LENGTH)
    moved = jax.tree.map(lambda a: a[:, order] if np.ndim(a) else a, inputs)
    y, dropped = run(x, inputs)
    assert dropped == 0
    np.testing.assert_allclose(run(x[:, order], moved)[0], y[:, order], atol=1e-5)


@pytest.mark.parametrize("router", CAUSAL)
def test_steps_equal_the_row(router, fill):
    x, inputs = draw()
    module, run = evaluate(fill, router)

    @jax.jit
    def steps(x, ids, labels):
        step = lambda x, ids, labels: module.step(x, ids_B=ids, labels_B=labels)  # noqa: E731
        return jax.lax.map(lambda one: step(*one), (x.swapaxes(0, 1), ids.T, labels.T)).swapaxes(0, 1)

    np.testing.assert_allclose(steps(x, inputs.ids_BL, inputs.labels_BL), run(x, inputs)[0], atol=1e-5)


@every_router
def test_a_nan_in_one_token_reaches_no_other(router, fill):
    """The others have what they would have if it were padding; with drops it may take a slot, but is read by none."""
    if router == "soft_moe":
        pytest.skip("a slot of Soft MoE holds some of every token: `routing.soft_moe`")
    x, inputs = draw()
    broken, others = x.copy(), np.ones(x.shape[:2], bool)
    broken[0, 3], others[0, 3] = np.nan, False
    _, run = evaluate(fill, router)
    y, _ = run(broken, inputs)
    np.testing.assert_allclose(y[others], run(x, inputs._replace(valid_BL=others))[0][others], atol=1e-5)
    if router in DROPPING:
        y, dropped = evaluate(fill, router, tight=True)[1](broken, inputs)
        assert dropped > 0
        assert np.isfinite(y[others]).all()


@pytest.mark.parametrize("router", ["top_k", "noisy_top_k", "soft", "expert_choice", "sigmoid_bias"])
def test_a_nan_in_padding_reaches_no_gradient(router, fill):
    """0 * NaN is NaN: the padding itself is to be cleared, in the routed and in the shared experts."""
    module = moe_loop.make(fill, router=router, num_shared_experts=1)
    x, _, _ = moe_loop.draw_inputs(padded=False)
    x = np.array(x)
    valid = np.ones(x.shape[:2], bool)
    valid[0, LAST] = False
    x[0, LAST] = np.nan

    @jax.jit
    def gradient(module):
        def loss(module):
            y, aux = module(x, valid_BL=valid, train=True)
            return jnp.sum(jnp.where(valid[..., None], y, 0) ** 2) + sum(aux.losses.values())

        return jax.grad(loss)(module)

    for leaf in jax.tree.leaves(gradient(module)):
        assert np.isfinite(leaf).all()


# --- dispatch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", DROPPING)
def test_capacity_with_nothing_dropped_equals_dropless(router, fill):
    """With the gradient of the tokens, and for one router of all weights: those of the others are held against loops.

    Routers in turn in the one and the other grouped product, that one in both. 1e-5: float32 sums in another order.
    """
    x, inputs, keys = moe_loop.draw_inputs()
    dy = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    forms = [{"dispatch": "capacity"}]
    products = ("blocked", "ragged_dot")
    products = products if router == "top_k" else (products[DROPPING.index(router) % 2],)
    forms += [{"dispatch": "dropless", "grouped_matmul": name} for name in products]
    modules = [moe_loop.make(fill, router=router, bias=True, **FREE, **form) for form in forms]
    params, rebuilds = moe_loop.split(modules[0])[0], [moe_loop.split(module)[2] for module in modules]

    @jax.jit
    def run(params, x, keys):
        results = []
        for rebuild in rebuilds:

            def loss(x, params, rebuild=rebuild):
                y, aux = moe_loop.call(rebuild(params), x, inputs, keys)
                return (dy * y).sum(), (y, aux.dropped)

            results.append(jax.grad(loss, argnums=(0, 1) if router == "top_k" else 0, has_aux=True)(x, params))
        return results

    expected, *others = jax.device_get(run(params, x, keys))
    assert expected[1][1] == 0
    for actual in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), actual, expected)


# --- causality -------------------------------------------------------------------------------------------------------


def earlier_outputs_change(run, x, inputs):
    """Whether the outputs before the last token change by a bit for any of some last tokens, and what was dropped."""
    (before, dropped), changed = run(x, inputs), False
    for seed in range(5):
        rng, other = np.random.default_rng(seed), x.copy()
        other[:, LAST, 1:] = 3 * rng.normal(size=other[:, LAST, 1:].shape)
        ids, labels = inputs.ids_BL.copy(), inputs.labels_BL.copy()
        ids[:, LAST], labels[:, LAST] = rng.integers(moe_loop.VOCABULARY, size=2), rng.integers(5, size=2)
        after, also_dropped = run(other, inputs._replace(ids_BL=ids, labels_BL=labels))
        changed |= not np.array_equal(after[:, :LAST], before[:, :LAST])
        dropped = min(dropped, also_dropped)
    return changed, dropped > 0


@pytest.mark.parametrize("router", CAUSAL)
def test_with_drops_in_token_order_no_output_depends_on_a_later_token(router, fill):
    x, inputs = draw()
    assert earlier_outputs_change(evaluate(fill, router, tight=True)[1], x, inputs) == (False, router in DROPPING)


@pytest.mark.parametrize("case", ["choices", "priority", "expert_choice", "soft_moe"])
def test_what_is_said_to_see_later_tokens_does(case, fill):
    """The choice of what to drop has no gradient, so it shows in the values; that of Soft MoE shows in both."""
    x, inputs = draw()
    if case in moe_loop.ROUTERS:
        assert not config_lib.ROUTERS[case].causal
        run = evaluate(fill, case)[1]
    else:
        settings = TIGHT | {"capacity_order": case, "top_k": 2, "eval_capacity_factor": 0.7}
        module = moe_loop.make(fill, router="top_k", **settings)
        compiled = jax.jit(lambda x: (lambda y, aux: (y, aux.dropped))(*module(x)))
        run = lambda x, inputs: jax.device_get(compiled(x))  # noqa: E731
    assert earlier_outputs_change(run, x, inputs)[0]


def test_soft_moe_sees_later_tokens_in_the_gradient_and_the_others_do_not(fill):
    x, inputs = draw()
    for router in ("soft_moe", "top_k"):
        module = evaluate(fill, router)[0]
        first = lambda x, module=module: moe_loop.call(module, x, inputs)[0][:, 0].sum()  # noqa: E731
        later = np.abs(jax.jit(jax.grad(first))(x)[:, 1:])
        assert (later.max(axis=-1) > 1e-5).all() if router == "soft_moe" else not later.any()


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", [*moe_loop.NOISY, "top_k"])
def test_noise_is_that_of_each_rows_key_and_only_in_training_with_keys(router, fill):
    """Of the routers that have any; rows and keys that change places give rows that change places."""
    x, _, keys = moe_loop.draw_inputs(padded=False)
    module = moe_loop.make(fill, router=router, second_threshold=1.0, dispatch="capacity", **FREE)

    @jax.jit
    def run(x, keys, train_keys):
        call = lambda x, keys, train: module(x, keys_B=keys, train=train)[0]  # noqa: E731
        y, other = call(x, keys, True), call(x, train_keys, True)
        return (
            y,
            other,
            call(x[::-1], keys[::-1], True),
            call(x, keys, False),
            call(x, None, True),
            call(x, None, False),
        )

    y, other, swapped, evaluation, without_keys, without_both = jax.device_get(run(x, keys, keys[jnp.array([0, 0])]))
    np.testing.assert_array_equal(run(x, keys, keys)[1], y)
    np.testing.assert_allclose(swapped[::-1], y, atol=1e-6)
    np.testing.assert_allclose(other[0], y[0], atol=1e-6)
    np.testing.assert_array_equal(evaluation, without_both)
    np.testing.assert_allclose(without_keys, without_both, atol=1e-6)
    for row in 0, 1:
        assert (np.abs(y[row] - evaluation[row]).max() > 1e-3) == (router in moe_loop.NOISY)
    assert (np.abs(other[1] - y[1]).max() > 1e-3) == (router in moe_loop.NOISY)


def test_noise_alone_chooses_at_first_and_both_its_weights_learn():
    """noisy_top_k starts with zeros: the experts are spread by the noise, and its scale has a gradient."""
    config = config_lib.MoeConfig(router="noisy_top_k", num_experts=6, d_expert=3, activation="gelu")
    x, inputs, keys = moe_loop.draw_inputs()
    dy = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    @jax.jit
    def run(x, keys):
        params, _, rebuild = moe_loop.split(moe_loop.create(config))

        def loss(params):
            y, aux = moe_loop.call(rebuild(params), x, inputs, keys)
            return (dy * y).sum(), aux.count_E

        return params["router"], *jax.grad(loss, has_aux=True)(params)

    weights, gradient, count_E = jax.device_get(run(x, keys))
    assert not any(map(np.any, weights.values()))
    assert (count_E > 0).sum() > 2
    assert all(np.abs(value).max() > 1e-3 for value in gradient["router"].values())


# --- what a router must be given -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("router", "what"), [("hash", r"token ids \(ids_BL\)"), ("label", r"labels \(labels_BL\)")])
def test_a_router_without_what_it_needs_is_an_error_that_says_so(router, what, fill):
    module = moe_loop.make(fill, router=router)
    with pytest.raises(ValueError, match=f"router={router} needs the {what}"):
        jax.eval_shape(lambda x: module(x), jnp.zeros((2, LENGTH, moe_loop.D_MODEL)))
