"""A Mamba block with experts in its projections equals loops over tokens in float64, with drops, documents, padding."""

import functools
import math

import jax
import jax.numpy as jnp
import moe_loop
import numpy as np
import pytest
from flax import nnx

from moejax import config as config_lib
from moejax.layers import mamba_moe

D_MODEL, EXPERTS, LENGTH = 4, 3, 10
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2, 3, 3, 3]], np.int32)

# name -> projections with experts, tokens a routing group, settings of the experts
CASES = {
    "conv": (("conv",), 5, {}),
    "gate": (("gate",), 20, {"activation": "swiglu", "bias": True}),
    "out": (("out",), 10, {"num_shared_experts": 1, "dispatch": "dropless"}),
    "gate and out": (("gate", "out"), 10, {}),
    "all": (("conv", "gate", "out"), 20, {}),
}


def make(projections, group=0, block=None, **settings):
    """d_model 4, inner 8: no mixture is square. block: arguments of the block; settings: of its experts."""
    experts = {"num_experts": EXPERTS, "d_expert": 6, "group_size": group, "capacity_factor": 0.6, "router": "switch"}
    experts |= {"eval_capacity_factor": 0.0, "dispatch": "capacity"}
    arguments = {
        "moe_projections": projections,
        "expand": 2.0,
        "d_state": 3,
        "d_conv": 3,
        "dt_rank": 0,
        "dt_min": 0.001,
        "dt_max": 0.1,
        "scan_implementation": None,
        "chunk_size": 4,
        "out_scale": 0.5,
        "init_scale": 1.0,
        "dtype": jnp.dtype("float32"),
    }
    config = config_lib.MoeConfig(**experts | settings)
    return mamba_moe.MambaMoe(D_MODEL, config, **arguments | (block or {}), rngs=nnx.Rngs(params=0))


def draw(seed, batch=2):
    return np.random.default_rng(seed).normal(size=(batch, LENGTH, D_MODEL)).astype(np.float32)


# --- the loops -------------------------------------------------------------------------------------------------------


def silu(x):
    return x / (1 + np.exp(-x))


def switch(x, valid, w, capacity):
    """One group: (y, balance loss, choices of each expert, how many it dropped)."""
    count, used, prob_sum = np.zeros(EXPERTS, int), np.zeros(EXPERTS, int), np.zeros(EXPERTS)
    y = np.zeros((len(x), w["down"].shape[-1]))
    for t in np.flatnonzero(valid):
        prob = np.exp(x[t] @ w["router"]["weight"])
        prob /= prob.sum()
        e = int(np.argmax(prob))
        count[e] += 1
        prob_sum += prob
        if used[e] < capacity:
            used[e] += 1
            y[t] = prob[e] * moe_loop.mlp(x[t], w, "swiglu" if "up_bias" in w else "relu", e)
    if "shared" in w:
        for t in range(len(x)):
            y[t] += moe_loop.mlp(x[t] if valid[t] else np.zeros(x.shape[1]), w["shared"], "relu")
    loss = EXPERTS * (count / max(1, count.sum()) * prob_sum / max(1, valid.sum())).sum()
    return y, loss, count, count - used


def project(x, segments, w, group, capacity, stats):
    """A matrix, or the mixture of each group of consecutive tokens, with its (loss, count, dropped) in stats."""
    if not isinstance(w, dict):
        return x @ w
    flat, valid = x.reshape(-1, x.shape[-1]), segments.reshape(-1) > 0
    parts = [switch(flat[i : i + group], valid[i : i + group], w, capacity) for i in range(0, len(flat), group)]
    y, loss, count, dropped = zip(*parts, strict=True)
    stats.append((np.mean(loss), np.sum(count, axis=0), np.sum(dropped, axis=0)))
    return np.concatenate(y).reshape(*x.shape[:2], -1)


def ssm(x, w):
    """One document: convolution, choice and recurrence, token by token (arXiv 2312.00752, Algorithm 2)."""
    taps, rank, states = len(w["conv_kernel"]), len(w["dt_proj"]), w["A_log"].shape[1]
    h, y = np.zeros(w["A_log"].shape), np.zeros_like(x)
    for t in range(len(x)):
        v = silu(w["conv_bias"] + sum(w["conv_kernel"][taps - 1 - lag] * x[t - lag] for lag in range(min(taps, t + 1))))
        dt, B, C = np.split(v @ w["x_proj"], [rank, rank + states])
        dt = np.log1p(np.exp(dt @ w["dt_proj"] + w["dt_bias"]))
        h = np.exp(-dt[:, None] * np.exp(w["A_log"])) * h + np.outer(dt * v, B)
        y[t] = h @ C + w["D"] * v
    return y


def block(u, segments, w, group, capacity):
    """(y, the stats of each mixture in the order conv, gate, out)."""
    stats = []
    x = project(u, segments, w["conv_proj"], group, capacity, stats)
    z = project(u, segments, w["gate_proj"], group, capacity, stats)
    y = np.zeros_like(x)
    for row, ids in enumerate(segments):
        for document in np.unique(ids):
            y[row, ids == document] = ssm(x[row, ids == document], w)
    return project(y * silu(z), segments, w["out_proj"], group, capacity, stats), stats


# --- laws ------------------------------------------------------------------------------------------------------------


@functools.cache
def compiled(case, fill):
    """(the parameters, nested by name; run(params, u, weight of the losses) -> (y, aux, gradients in params and u))."""
    projections, group, settings = CASES[case]
    graph, params = nnx.split(fill(lambda: make(projections, group, **settings), scale=0.7))

    def rebuild(pure):
        copy = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(copy, pure)
        return nnx.merge(graph, copy)

    @jax.jit
    def run(pure, u, weight):
        def objective(pure, u):
            y, aux = rebuild(pure)(u, segment_ids_BL=SEGMENTS, train=True)
            losses = sum((i + 1) * layer.losses["balance"] for i, layer in enumerate(aux))
            return (draw(2) * y).sum() + weight * losses, (y, aux)

        gradients, (y, aux) = jax.grad(objective, argnums=(0, 1), has_aux=True)(pure, u)
        return y, aux, gradients

    return nnx.to_pure_dict(params), lambda *arguments: jax.device_get(run(*arguments))


def exact(case, fill):
    """(the same parameters in float64, loop(params, u))."""
    _, group, _ = CASES[case]
    capacity = group if case == "out" else math.ceil(0.6 * group / EXPERTS)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), compiled(case, fill)[0])
    return params, lambda params, u: block(np.asarray(u, np.float64), SEGMENTS, params, group, capacity)


@pytest.mark.parametrize("case", list(CASES))
def test_output_losses_and_statistics_equal_loops(case, fill):
    params, run = compiled(case, fill)
    y, aux, _ = run(params, draw(1), 1.0)
    weights, loop = exact(case, fill)
    expected, stats = loop(weights, draw(1))
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    assert len(aux) == len(stats) == len(CASES[case][0])
    for layer, (loss, count, dropped) in zip(aux, stats, strict=True):
        np.testing.assert_array_equal(layer.count_E, count)
        assert layer.dropped == dropped.sum()
        assert (layer.dropped > 0) == (case != "out")
        assert layer.losses["balance"] == pytest.approx(loss, rel=1e-5)
        assert layer.preferred_BL.shape == SEGMENTS.shape


@pytest.mark.parametrize("case", list(CASES))
def test_gradients_equal_those_of_loops(case, fill, slope):
    """2e-4 of the larger of the slope and one: float32 through six products, against differences in float64."""
    params, run = compiled(case, fill)
    _, _, gradients = run(params, draw(1), 0.5)
    weights, loop = exact(case, fill)
    rng = np.random.default_rng(3)
    leaves, structure = jax.tree.flatten((weights, draw(1)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path((weights, draw(1)))]
    for place, (path, gradient) in enumerate(zip(paths, jax.tree.leaves(gradients), strict=True)):

        def objective(moved, place=place):
            y, stats = loop(*structure.unflatten([*leaves[:place], moved, *leaves[place + 1 :]]))
            return (draw(2) * y).sum() + 0.5 * sum((i + 1) * loss for i, (loss, _, _) in enumerate(stats))

        direction = rng.normal(size=leaves[place].shape)
        expected = slope(objective, leaves[place], direction)
        assert (gradient * direction).sum() == pytest.approx(expected, rel=2e-4, abs=2e-4), path


def test_every_expert_that_got_a_token_and_every_router_has_a_gradient_of_the_output_alone(fill):
    params, run = compiled("all", fill)
    _, _, (gradients, _) = run(params, draw(1), 0.0)
    weights, loop = exact("all", fill)
    _, stats = loop(weights, draw(1))
    for name, (_, count, dropped) in zip(("conv_proj", "gate_proj", "out_proj"), stats, strict=True):
        gradient = gradients[name]
        for matrix in ("up", "down"):
            got_one = np.abs(gradient[matrix]).max(axis=(1, 2)) > 0
            np.testing.assert_array_equal(got_one, count > dropped, err_msg=f"{name} {matrix}")
        assert np.abs(gradient["router"]["weight"]).max() > 1e-4, name


def test_what_lies_in_padding_changes_nothing(fill):
    """In a group of both rows, where the first row's padding comes before the second row's tokens."""
    params, run = compiled("all", fill)
    y, aux, (gradients, _) = run(params, draw(1), 1.0)
    other = np.where(SEGMENTS[..., None] > 0, draw(1), 100 * draw(4))
    other_y, other_aux, (other_gradients, _) = run(params, other, 1.0)
    np.testing.assert_array_equal(y, other_y)
    for a, b in zip(jax.tree.leaves((aux, gradients)), jax.tree.leaves((other_aux, other_gradients)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_packed_row_equals_its_documents_alone_where_nothing_is_dropped(fill):
    """Values and gradients; without segment ids they differ."""
    module, u, dy = fill(lambda: make(("conv", "out")), scale=0.8), draw(1), draw(2)
    packed = np.array([[1] * 4 + [2] * 6, [0] * LENGTH], np.int32)
    alone = np.array([[1] * 4 + [0] * 6, [1] * 6 + [0] * 4], np.int32)

    def spread(x):
        """Document by document, each at the start of a row of its own."""
        first, second = np.zeros_like(x[0]), np.zeros_like(x[0])
        first[:4], second[:6] = x[0, :4], x[0, 4:]
        return np.stack([first, second])

    @jax.jit
    def run(module, u, segments, dy):
        def objective(module):
            y, _ = module(u, segment_ids_BL=segments)
            return (dy * y).sum(), y

        return jax.grad(objective, has_aux=True)(module)

    u[1] = dy[1] = 0
    gradient, y = run(module, u, packed, dy)
    expected_gradient, expected = run(module, spread(u), alone, spread(dy))
    np.testing.assert_allclose(y[0], np.concatenate([expected[0, :4], expected[1, :6]]), atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-6)  # the largest are in the hundreds
    _, leaking = run(module, u, np.minimum(packed, 1), dy)
    assert np.abs(leaking[0, :4] - y[0, :4]).max() < 1e-6
    assert np.abs(leaking[0, 4:] - y[0, 4:]).max() > 1e-2


@pytest.mark.parametrize(("projections", "router"), [(("gate",), "hash"), (("conv", "out"), "label")])
def test_steps_equal_the_row_where_nothing_is_dropped(projections, router, fill):
    """In training each expert has 2 slots a row of 10; evaluation here and steps drop nothing."""
    module, u = fill(lambda: make(projections, router=router, block={"vocab_size": 4})), draw(1)
    for part in module.moes:
        if router == "hash":
            part.router.state.set_value(np.array([2, 0, 1, 0], np.int32))
    ids, labels = np.random.default_rng(0).integers(0, 3, size=(2, 2, LENGTH)).astype(np.int32)

    @jax.jit
    def both(module, u):
        def step(cache, inputs):
            u_BD, ids_B, labels_B = inputs
            y_BD, cache = module.step(u_BD, cache, ids_B=ids_B, labels_B=labels_B)
            return cache, y_BD

        _, y_LBD = jax.lax.scan(step, module.init_cache(2), (u.swapaxes(0, 1), ids.T, labels.T))
        return y_LBD.swapaxes(0, 1), module(u, ids_BL=ids, labels_BL=labels)

    stepped, (whole, aux) = both(module, u)
    np.testing.assert_allclose(stepped, whole, atol=1e-5 * np.abs(whole).max())
    expert = labels if router == "label" else np.array([2, 0, 1])[ids]
    for layer in aux:
        assert layer.dropped == 0
        np.testing.assert_array_equal(layer.count_E, np.bincount(expert.reshape(-1), minlength=EXPERTS))


def test_each_projection_has_noise_of_its_own(fill):
    module, u = fill(lambda: make(("conv", "gate"), jitter=0.5)), draw(1)
    module.gate_proj = module.conv_proj
    keys = jax.random.split(jax.random.key(0), 2)
    run = jax.jit(lambda keys: [layer.entropy for layer in module(u, keys_B=keys, train=True)[1]])
    conv, gate = run(keys)
    assert conv != gate
    quiet_conv, quiet_gate = run(None)
    assert quiet_conv == quiet_gate != conv


def test_bfloat16_is_close_and_routes_in_float32(fill):
    """Within 5 % of the largest value: bfloat16 keeps 8 bits, through six products. One expert: no choice may flip."""

    def run(dtype):
        module = fill(lambda: make(("out",), block={"dtype": jnp.dtype(dtype)}, num_experts=1))
        return jax.jit(lambda u: module(u.astype(dtype)))(draw(1))

    (expected, _), (y, aux) = run("float32"), run("bfloat16")
    assert y.dtype == jnp.bfloat16
    assert all(layer.losses["balance"].dtype == layer.entropy.dtype == np.float32 for layer in aux)
    np.testing.assert_allclose(np.float32(y), expected, atol=0.05 * np.abs(expected).max())


def test_initial_weights_are_those_of_the_reference_code_and_plain_siblings_are_matrices_without_bias():
    """Two-layer experts d_in -> F -> d_out; a projection without experts is uniform in 1/sqrt(fan in)."""
    settings = {"block": {"scheme": "moe_mamba", "init_scale": 0.1}, "d_expert": 352, "num_experts": 16}
    module = jax.jit(lambda: make(("conv",), **settings))()
    assert module.conv_proj.up.shape == (16, 4, 352)
    assert module.conv_proj.down.shape == (16, 352, 8)
    assert module.conv_proj.up_bias is module.conv_proj.down_bias is None
    for weight, shape, bound in ((module.gate_proj, (4, 8), 4**-0.5), (module.out_proj, (8, 4), 0.5 * 8**-0.5)):
        assert weight.shape == shape
        assert 0.8 * bound < np.abs(weight[...]).max() <= bound
    # sd sqrt(0.1 / fan in); of the second matrix it counts the hidden units of all experts
    assert np.std(module.conv_proj.down[...]) == pytest.approx(math.sqrt(0.1 / (16 * 352)), rel=0.02)
    assert np.abs(module.conv_proj.up[...]).max() <= 0.2 * (1 + 1e-6)
    other = jax.eval_shape(lambda: make(("out", "gate"), **settings))
    assert (other.gate_proj.up.shape, other.gate_proj.down.shape) == ((16, 4, 352), (16, 352, 8))
    assert (other.out_proj.up.shape, other.out_proj.down.shape) == ((16, 8, 352), (16, 352, 4))
    assert other.conv_proj.shape == (4, 8)
