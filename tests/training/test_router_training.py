"""Laws of the train step that hold with every router: its state, its noise, and no dependence on the layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
import tiny

from moejax import config as config_lib
from moejax import partition
from moejax.models import model as model_lib
from moejax.training import state

# Those with noise, state, a choice over a whole group, or a dispatch of their own; test_state.py has top_k, and gshard
# draws its second choices from the same keys. The tests of a router share its settings and so its compiled step.
ROUTERS = ("noisy_top_k", "switch", "sigmoid_bias", "sinkhorn", "relu")
NOISE = {"switch": ("jitter", 0.5), "gshard": ("second_threshold", 1.0)}  # and noisy_top_k, always


def settings(router: str) -> config_lib.Config:
    c = tiny.get_config("unused")
    c.model.period, c.model.num_periods = ("moe",), 2
    c.model.moe.router = router
    c.data.label = "folder"
    c.optimizer.eps = 1e-3  # Adam's first update is g / (|g| + eps): a tiny eps turns rounding of a tiny g into a flip
    c.model.embedding_std = 0.5
    match router:
        case "noisy_top_k":
            c.model.moe.load_weight = 0.5
        case "switch" | "gshard":
            setattr(c.model.moe, *NOISE[router])
        case "sigmoid_bias":
            c.optimizer.decay = "all"
            c.model.moe.dispatch = "capacity"  # relu has the grouped products
        case "relu":
            c.model.moe.relu_coefficient = 1e-3
    return c


def labels(config: config_lib.Config) -> dict[str, np.ndarray]:
    segments_BL = steps.make_batch(config)["segment_ids_BL"]
    return {"labels_BL": np.where(segments_BL > 0, segments_BL - 1, -1)}


def run(config: config_lib.Config, num_steps: int = 1) -> steps.Run:
    return steps.run(config, num_steps, **labels(config))


@pytest.mark.parametrize("router", ROUTERS)
def test_layout_changes_no_number_with_any_router(router):
    """Two microbatches on eight devices against one batch on one: loss, statistics, update and state, with noise."""
    config = settings(router)
    whole = run(config)
    third = "sequence" if router == "switch" else "tensor"  # the keys of noise are split by rows alone
    config.mesh, config.training.num_microbatches = config_lib.MeshConfig(data=2, expert=2, **{third: 2}), 2
    split = run(config)
    numbers = {**whole.metrics[0], **whole.metrics[0]["routing"]}
    others = {**split.metrics[0], **split.metrics[0]["routing"]}
    for name in numbers.keys() - {"routing"}:
        np.testing.assert_allclose(others[name], numbers[name], rtol=5e-5, atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(split.models[0]), jax.tree.leaves(whole.models[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=0)


def test_the_gradient_of_the_balance_loss_does_not_depend_on_devices_or_microbatches():
    """The loss alone: with no token counted, the router's first update is that of the balance loss."""
    config = balanced()
    expected = balance_gradient(config)
    config.training.num_microbatches = 4
    config.mesh = config_lib.MeshConfig(data=2, tensor=4)
    actual = balance_gradient(config)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(actual, expected, atol=2e-6, rtol=1e-4)


def balanced() -> config_lib.Config:
    """Groups of two rows, and a step that its two tests share."""
    config = settings("top_k")
    config.data.batch_size, config.model.moe.balance_weight = 16, 1.0
    config.model.moe.group_size = 2 * config.data.seq_length
    return config


def balance_gradient(config: config_lib.Config) -> np.ndarray:
    """Of the router's weight, from Adam's first moment."""
    config.optimizer.clip_norm, config.optimizer.weight_decay, config.optimizer.warmup_steps = 0.0, 0.0, 0
    config.optimizer.learning_rate, config.optimizer.eps = 1.0, 1e6  # so an update is -g / 1e6
    after = steps.run(config, loss_mask_BL=np.zeros((config.data.batch_size, config.data.seq_length), bool)).last
    moved = after.opt_state[1][0].mu["periods"]["blocks"][0]["branches"][0]["router"]["weight"][...]
    return np.asarray(moved, np.float64) / (1 - config.optimizer.beta1)


def test_biases_move_by_the_rate_towards_balance_and_no_optimizer_touches_them():
    config = settings("sigmoid_bias")
    done = run(config, num_steps=3)
    expected = np.zeros((2, 4), np.float32)
    for numbers in done.metrics:
        expected += np.float32(config.model.moe.bias_rate) * np.sign(1 / 4 - numbers["routing"]["load"] + 0.0)
    state_LE = done.models[-1].periods.blocks[0].branches[0].router.state[...]
    assert config.optimizer.decay == "all"
    assert np.abs(state_LE).max() > 0
    np.testing.assert_allclose(state_LE, expected, atol=1e-7)


def test_the_coefficient_of_relu_routing_grows_until_few_enough_experts_are_used():
    config = settings("relu")
    done = run(config, num_steps=3)
    coefficient = config.model.moe.relu_coefficient
    for numbers in done.metrics:
        too_dense = numbers["routing"]["experts_per_token"].mean() > 1
        coefficient *= 1.2 if too_dense else 1 / 1.2
    router = done.models[-1].periods.blocks[0].branches[0].router
    np.testing.assert_allclose(router.state[...], coefficient, rtol=1e-5)
    assert done.metrics[0]["routing"]["relu_loss"] > 0


def test_router_state_has_no_moments_and_is_no_parameter():
    config = settings("sigmoid_bias")
    abstract = state.abstract(config, partition.make_mesh(config.mesh, jax.devices()[:1]))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract.opt_state)]
    assert any("router" in path and "weight" in path for path in paths)
    assert not any("state" in path.split("router")[-1] for path in paths if "router" in path)


@pytest.mark.parametrize("router", ["switch", "gshard", "noisy_top_k"])
def test_noise_is_new_every_step_and_the_same_for_the_same_step(router):
    config = settings(router)
    initial, batch = steps.initial(config), steps.make_batch(config) | labels(config)

    def loss_at(number):
        return steps.take(config, dataclasses.replace(initial, step=initial.step + number), batch)[1]["loss"]

    first, second = loss_at(0), loss_at(1)
    assert first == loss_at(0)
    assert first != second


@pytest.mark.parametrize("router", NOISE)
def test_a_step_draws_no_number_once_its_noise_is_off(router):
    config = settings(router)
    batch = steps.make_batch(config)
    drawn = []
    for value in (NOISE[router][1], 0.0):
        setattr(config.model.moe, NOISE[router][0], value)
        mesh = steps.make_mesh(config)
        traced = state.make_train_step(config, mesh).trace(state.abstract(config, mesh), batch)
        drawn.append("random_" in str(traced.jaxpr))
    assert drawn == [True, False]


def test_layers_are_summed_or_averaged():
    config, gradients = balanced(), {}
    for reduction in ("mean", "sum"):
        config.model.moe.layer_reduction = reduction
        gradients[reduction] = balance_gradient(config)
    np.testing.assert_allclose(gradients["sum"], 2 * gradients["mean"], rtol=1e-4, atol=1e-7)


def test_moe_layers_names_every_layer_once_in_depth_order():
    c = tiny.get_config("unused").model
    c.prefix, c.period, c.num_periods, c.suffix = ("moe",), ("moe", "mlp|moe"), 2, ("mlp", "moe")
    places = []
    for layer, place in model_lib.moe_layers(model_lib.abstract(c)):
        stacked = layer.up.shape[0] == 2 and len(layer.up.shape) == 4
        places.append(list(range(*place.indices(6))) if isinstance(place, slice) else place)
        assert stacked == isinstance(place, slice)
    assert places == [0, [1, 3], [2, 4], 5]


def test_statistics_of_a_step_equal_those_of_hand_made_counts():
    from moejax.layers import moe

    aux = moe.MoeAux(
        losses={"balance": jnp.array([1.0, 3.0])},
        count_E=jnp.array([[6, 2, 0, 0], [2, 2, 2, 2]]),
        dropped=jnp.array([2, 0]),
        entropy=jnp.array([4.0, 8.0]),
        together_EE=jnp.array([[[6, 2, 0, 0], [2, 2, 0, 0], [0] * 4, [0] * 4], np.eye(4) * 2]).astype(jnp.int32),
        preferred_BL=None,
    )
    numbers = state.routing_metrics(aux, jnp.array(4))
    expected = {
        "balance_loss": 2.0, "load": [[0.75, 0.25, 0, 0], [0.25] * 4], "max_load": [3.0, 1.0],
        "unused_experts": [0.5, 0.0], "dropped": [0.25, 0.0], "router_entropy": [1.0, 2.0],
        "experts_per_token": [2.0, 2.0], "coactivation": [0.5, 0.0],
    }  # fmt: skip
    assert numbers.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(numbers[name], value, rtol=1e-6, err_msg=name)
