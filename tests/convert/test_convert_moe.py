"""One layer's weights go to our layout and back unchanged, and what does not fit is named in one line. No torch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from moejax import config as config_lib
from moejax.convert import moe
from moejax.layers import moe as moe_layer

E, D, F, S = 3, 5, 7, 2  # experts, model, hidden, shared experts; no two sizes alike
DEEPSEEK = {
    "n_routed_experts": E,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": F,
    "n_shared_experts": S,
    "hidden_act": "silu",
}
HF = {
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": E,
        "num_experts_per_tok": 2,
        "intermediate_size": F,
        "hidden_act": "silu",
        "router_aux_loss_coef": 0.02,
    },
    "deepseek_v2": DEEPSEEK
    | {
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
    },
    "deepseek_v3": DEEPSEEK
    | {"model_type": "deepseek_v3", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5},
    "olmoe": {
        "model_type": "olmoe",
        "num_experts": E,
        "num_experts_per_tok": 2,
        "intermediate_size": F,
        "hidden_act": "silu",
        "router_aux_loss_coef": 0.01,
    },
    "switch": {
        "model_type": "switch_transformers",
        "num_experts": E,
        "d_ff": F,
        "expert_capacity": 4,
        "dense_act_fn": "relu",
        "router_jitter_noise": 0.01,
        "dropout_rate": 0.1,
        "router_aux_loss_coef": 0.001,
        "router_z_loss_coef": 0.002,
    },
}
# The names and shapes of the modules' state_dict(), and of checkpoint files, written out by hand.
FUSED = {"gate.weight": (E, D), "experts.gate_up_proj": (E, 2 * F, D), "experts.down_proj": (E, D, F)}
SHARED = {
    "shared_experts.gate_proj.weight": (S * F, D),
    "shared_experts.up_proj.weight": (S * F, D),
    "shared_experts.down_proj.weight": (D, S * F),
}
BIAS = {"gate.e_score_correction_bias": (E,)}
PROJECTIONS = {
    f"experts.{e}.{name}.weight": shape
    for e in range(E)
    for name, shape in {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}.items()
}
SINGLE = {"gate.weight": (E, D)} | PROJECTIONS
MIXTRAL = {"gate.weight": (E, D)} | {
    f"experts.{e}.{name}.weight": shape
    for e in range(E)
    for name, shape in {"w1": (F, D), "w2": (D, F), "w3": (F, D)}.items()
}
SWITCH = {"router.classifier.weight": (E, D)} | {
    f"experts.expert_{e}.{name}.weight": shape for e in range(E) for name, shape in {"wi": (F, D), "wo": (D, F)}.items()
}
# (family, whether the experts have tensors of their own): names and shapes
LAYOUTS = {
    ("mixtral", False): FUSED,
    ("mixtral", True): MIXTRAL,
    ("deepseek_v2", False): FUSED | SHARED,
    ("deepseek_v2", True): SINGLE | SHARED,
    ("deepseek_v3", False): FUSED | SHARED | BIAS,
    ("deepseek_v3", True): SINGLE | SHARED | BIAS,
    ("olmoe", False): FUSED,
    ("olmoe", True): SINGLE,
    ("switch", False): SWITCH,
    ("switch", True): SWITCH,
}
every_layout = pytest.mark.parametrize(("family", "per_expert"), LAYOUTS)
every_family = pytest.mark.parametrize("family", HF)


def settings(family, **changes):
    return moe.config_from_hf(family, HF[family] | changes, seq_length=8)


def draw(family, per_expert=False):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in LAYOUTS[family, per_expert].items()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@every_layout
def test_weights_come_back_bit_for_bit(family, per_expert):
    weights = draw(family, per_expert)
    layer = moe.from_hf(family, weights, settings(family))
    assert_equal(moe.to_hf(family, layer, per_expert=per_expert), weights)


@every_family
def test_a_layer_has_the_tree_and_shapes_of_one_made_here(family):
    config = settings(family)
    made = jax.eval_shape(
        lambda: moe_layer.Moe(D, config, init_scale=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(params=0))
    )
    converted = moe.from_hf(family, draw(family), config)
    assert jax.tree.structure(made) == jax.tree.structure(converted)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(converted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_both_layouts_give_the_layer_whose_gate_half_comes_first():
    weights = draw("mixtral", per_expert=True)
    layer = moe.from_hf("mixtral", weights, settings("mixtral"))
    np.testing.assert_array_equal(layer.router.weight[...], weights["gate.weight"].T)
    for e in range(E):
        for half, name in enumerate(("w1", "w3")):
            np.testing.assert_array_equal(layer.up[e, :, half], weights[f"experts.{e}.{name}.weight"].T)
        np.testing.assert_array_equal(layer.down[e], weights[f"experts.{e}.w2.weight"].T)
    fused = moe.to_hf("mixtral", layer)
    assert_equal(moe.to_hf("mixtral", moe.from_hf("mixtral", fused, settings("mixtral")), per_expert=True), weights)


def silu(x):
    return x / (1 + np.exp(-x))


def test_deepseek_v3_with_groups_of_one_expert_equals_a_loop_over_tokens():
    """A case that transformers cannot run: it wants the two best scores of each group."""
    weights = {name: tensor.astype(np.float64) for name, tensor in draw("deepseek_v3", per_expert=True).items()}
    config = settings("deepseek_v3", n_group=E, topk_group=2)
    layer = moe.from_hf("deepseek_v3", draw("deepseek_v3", per_expert=True), config)
    x_BLD = np.random.default_rng(1).normal(size=(2, 4, D)).astype(np.float32)

    def mlp(x_D, prefix):
        gate, up, down = [weights[f"{prefix}.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")]
        return down @ (silu(gate @ x_D) * (up @ x_D))

    def token(x_D):
        score_E = 1 / (1 + np.exp(-weights["gate.weight"] @ x_D))
        chosen = np.argsort(-(score_E + weights["gate.e_score_correction_bias"]))[:2]
        gates = 2.5 * score_E[chosen] / score_E[chosen].sum()
        routed = sum(gate * mlp(x_D, f"experts.{e}") for gate, e in zip(gates, chosen, strict=True))
        return routed + mlp(x_D, "shared_experts")

    expected_BLD = np.apply_along_axis(token, 2, x_BLD.astype(np.float64))
    y_BLD, _ = jax.jit(layer)(x_BLD)
    np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-4, atol=1e-4)


def test_switch_drops_beyond_its_capacity_in_a_row():
    layer = moe.from_hf("switch", draw("switch"), settings("switch", num_experts=E, expert_capacity=2))
    assert [layer.config.capacity(8, factor) for factor in (layer.config.capacity_factor, 0.0)] == [2, 8]
    token_D = np.random.default_rng(2).normal(size=D).astype(np.float32)
    y_BLD, aux = jax.jit(layer)(np.broadcast_to(token_D, (2, 8, D)))
    assert aux.dropped == 2 * 6
    np.testing.assert_array_equal(np.asarray(y_BLD).any(axis=-1), np.arange(8) < np.array([[2], [2]]))


@pytest.mark.parametrize("seq_length", [1, 3, 7, 37, 512, 1000])
@pytest.mark.parametrize("capacity", [1, 3, 64])
@pytest.mark.parametrize("num_experts", [1, 3, 7, 128])
def test_the_factor_of_switch_gives_back_its_capacity(seq_length, capacity, num_experts):
    hf = HF["switch"] | {"expert_capacity": capacity, "num_experts": num_experts}
    config = moe.config_from_hf("switch", hf, seq_length=seq_length)
    layer = jax.eval_shape(
        lambda: moe_layer.Moe(2, config, init_scale=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(params=0))
    )
    for factor in (config.capacity_factor, config.eval_capacity_factor):
        assert layer.config.capacity(seq_length, factor) == min(capacity, seq_length)


@every_family
def test_arrays_are_copies(family):
    weights, config = draw(family), settings(family)
    layer = moe.from_hf(family, weights, config)
    before = moe.to_hf(family, layer)
    for tensor in (*weights.values(), *moe.to_hf(family, layer).values()):
        tensor[...] = 0
    assert_equal(moe.to_hf(family, layer), before)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_floats_become_float32_of_the_same_value(dtype):
    narrow = {name: tensor.astype(dtype) for name, tensor in draw("deepseek_v3").items()}
    wide = {name: tensor.astype(np.float32) for name, tensor in narrow.items()}
    layer = moe.from_hf("deepseek_v3", narrow, settings("deepseek_v3"), dtype=jnp.bfloat16)
    assert_equal(moe.to_hf("deepseek_v3", layer), wide)
    assert layer.dtype == layer.shared.dtype == jnp.bfloat16


def test_one_of_a_stack_of_layers_is_converted_and_the_stack_refused():
    layer = moe.from_hf("olmoe", draw("olmoe"), settings("olmoe"))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), layer)
    second = moe.to_hf("olmoe", jax.tree.map(lambda leaf: leaf[1], stack))
    assert_equal(second, {name: 2 * tensor for name, tensor in draw("olmoe").items()})
    with pytest.raises(config_lib.ConfigError, match=r"^the layer is a stack of layers; pass one"):
        moe.to_hf("olmoe", stack)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mixtral", {"model_type": "olmoe"}, "model_type=olmoe must be mixtral for mixtral; convert such a model"),
        (
            "mixtral",
            {"hidden_act": "gelu"},
            "hidden_act=gelu must be silu or swish or gelu_new or gelu_pytorch_tanh; convert such a model",
        ),
        ("switch", {"dense_act_fn": "gated-gelu"}, "dense_act_fn=gated-gelu must be relu or gelu_new or"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 must be 0.0 for mixtral"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob=False must be True for mixtral"),
        ("olmoe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5 must be 1.0 for olmoe"),
        ("olmoe", {"n_shared_experts": 1}, "n_shared_experts=1 must be 0 or None for olmoe"),
        ("olmoe", {"scoring_func": "sigmoid"}, "scoring_func=sigmoid must be softmax for olmoe"),
        ("olmoe", {"norm_topk_prob": None}, "norm_topk_prob=None must be False or True for olmoe"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True must be False for deepseek_v2"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func=sigmoid must be softmax for deepseek_v2"),
        (
            "deepseek_v2",
            {"topk_method": "noaux_tc"},
            "topk_method=noaux_tc must be greedy or group_limited_greedy for deepseek_v2; convert such a model",
        ),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias=True must be False for deepseek_v2"),
        ("deepseek_v2", {"n_group": None}, "n_group=None must be an integer of 1 or more; change it"),
        ("deepseek_v2", {"n_group": 2}, "n_group=2 does not divide n_routed_experts=3; change it"),
        (
            "deepseek_v2",
            {"topk_group": 1},
            "topk_group=1 of n_group=3 groups cannot give num_experts_per_tok=2 of 3 experts; change it",
        ),
        ("deepseek_v3", {"topk_group": 2}, "topk_group=2 of n_group=1 groups cannot give"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob=False must be True for deepseek_v3"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func=softmax must be sigmoid for deepseek_v3"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method=greedy must be noaux_tc for deepseek_v3"),
        ("deepseek_v3", {"routed_scaling_factor": 0}, "routed_scaling_factor=0 would leave nothing of the experts"),
        ("deepseek_v3", {"routed_scaling_factor": math.inf}, "routed_scaling_factor=inf must be a number of 0 or more"),
        ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts=0 must be an integer of 1 or more; change it"),
        ("mixtral", {"num_experts_per_tok": 4}, "num_experts_per_tok=4 is more than num_local_experts=3; lower it"),
        ("mixtral", {"num_local_experts": 8.0}, "num_local_experts=8.0 must be an integer of 1 or more; change it"),
        ("switch", {"router_bias": True}, "router_bias=True must be False for switch"),
        ("switch", {"router_dtype": "bfloat16"}, "router_dtype=bfloat16 must be float32 for switch"),
        ("switch", {"expert_capacity": 0}, "expert_capacity=0 must be an integer of 1 or more; change it"),
        ("switch", {"dropout_rate": -0.1}, "dropout_rate=-0.1 must be a number of 0 or more; change it"),
        ("switch", {"dropout_rate": 1}, "dropout_rate=1.0 must lie in [0, 1); change it"),
    ],
)
def test_what_we_cannot_express_is_refused_in_one_line(family, change, message):
    with pytest.raises(config_lib.ConfigError) as error:
        settings(family, **change)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


FIELDS = [(family, field) for family, hf in HF.items() for field in hf if field not in ("model_type", "topk_method")]


@pytest.mark.parametrize(("family", "field"), FIELDS)
def test_a_missing_field_is_named(family, field):
    hf = {name: value for name, value in HF[family].items() if name != field}
    with pytest.raises(config_lib.ConfigError, match=f"^{field} is missing; pass the whole dict"):
        moe.config_from_hf(family, hf, seq_length=8)


def test_what_is_asked_for_wrongly_is_named():
    with pytest.raises(config_lib.ConfigError, match=r"^seq_length=0 must be 1 or more for switch"):
        moe.config_from_hf("switch", HF["switch"])
    for convert in (
        lambda: moe.config_from_hf("jamba", {}),
        lambda: moe.from_hf("jamba", {}, settings("mixtral")),
        lambda: moe.to_hf("jamba", moe.from_hf("mixtral", draw("mixtral"), settings("mixtral"))),
    ):
        with pytest.raises(config_lib.ConfigError, match=r"^family=jamba is not known; choose one of mixtral"):
            convert()


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mixtral", {"router": "switch"}, "router=switch is not one of mixtral; set it to top_k"),
        ("mixtral", {"normalise_gates": "none"}, "normalise_gates=none is not one of mixtral; set it to before"),
        ("olmoe", {"activation": "relu"}, "activation=relu is not one of olmoe; set it to swiglu or geglu"),
        ("switch", {"activation": "swiglu"}, "activation=swiglu is not one of switch; set it to relu or gelu"),
        ("switch", {"bias": True}, "bias=True is not one of switch; set it to False"),
        ("olmoe", {"num_shared_experts": 1}, "num_shared_experts=1 is not one of olmoe; set it to 0"),
        ("deepseek_v3", {"num_shared_experts": 0}, "num_shared_experts=0 is not one of deepseek_v3; set it to 1 or"),
    ],
)
def test_a_config_of_another_layer_is_refused(family, change, message):
    config = dataclasses.replace(settings(family), **change)
    made = jax.eval_shape(
        lambda: moe_layer.Moe(D, config, init_scale=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(params=0))
    )
    for convert in (lambda: moe.from_hf(family, draw(family), config), lambda: moe.to_hf(family, made)):
        with pytest.raises(config_lib.ConfigError) as error:
            convert()
        assert str(error.value).startswith(message)


def test_dispatch_capacity_and_losses_may_be_changed():
    config = dataclasses.replace(settings("olmoe"), dispatch="dropless", capacity_factor=1.5, z_weight=0.001)
    assert moe.from_hf("olmoe", draw("olmoe"), config).config == config


NAMES = [(family, single, name) for (family, single), shapes in LAYOUTS.items() for name in shapes]
ROUTERS = ("gate.weight", "router.classifier.weight")


@pytest.mark.parametrize(("family", "per_expert", "name"), NAMES)
def test_a_missing_or_transposed_tensor_is_named(family, per_expert, name):
    weights, shape = draw(family, per_expert), LAYOUTS[family, per_expert][name]
    wanted = f"({E}, d_model)" if name in ROUTERS else str(shape)
    tensor = weights.pop(name)
    with pytest.raises(config_lib.ConfigError) as error:
        moe.from_hf(family, weights, settings(family))
    assert str(error.value) == f"{name} is missing, of shape {wanted}; add it, or mend the config that asks for it"
    weights[name] = np.swapaxes(tensor, -1, -2) if tensor.ndim > 1 else tensor[:-1]
    with pytest.raises(config_lib.ConfigError) as error:
        moe.from_hf(family, weights, settings(family))
    wrong = weights[name].shape
    assert str(error.value) == f"{name} has shape {wrong}, but it must have {wanted}; mend it or the config"


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mixtral", {"gate.bias": np.zeros(E, np.float32)}, "gate.bias has no place in a layer of mixtral (3 experts)"),
        ("olmoe", BIAS, "gate.e_score_correction_bias has no place in a layer of olmoe"),
        ("switch", {"experts.expert_3.wi.weight": (F, D)}, "experts.expert_3.wi.weight has no place in a layer of"),
        (
            "deepseek_v3",
            {"gate.e_score_correction_bias": np.zeros(E)},
            "gate.e_score_correction_bias has dtype float64",
        ),
        ("mixtral", {"experts.down_proj": np.zeros((E, D, F), np.int8)}, "experts.down_proj has dtype int8, which"),
        ("mixtral", {"gate.weight": [[0.0] * D] * E}, "gate.weight is a list, not a numpy array; convert it"),
        ("mixtral", {"gate.weight": np.zeros(E, np.float32)}, "gate.weight has shape (3,), but it must have (3, d_"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_in_one_line(family, change, message):
    change = {
        name: np.zeros(value, np.float32) if isinstance(value, tuple) else value for name, value in change.items()
    }
    with pytest.raises(config_lib.ConfigError) as error:
        moe.from_hf(family, draw(family) | change, settings(family))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_mixture_of_both_layouts_is_refused():
    weights = draw("olmoe", per_expert=True)
    weights["experts.gate_up_proj"] = draw("olmoe")["experts.gate_up_proj"]
    with pytest.raises(config_lib.ConfigError, match=r"^experts.gate_up_proj has no place in a layer of olmoe"):
        moe.from_hf("olmoe", weights, settings("olmoe"))
