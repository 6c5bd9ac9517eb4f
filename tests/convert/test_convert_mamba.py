"""Weights go to our layout and back unchanged, and what does not fit is named in one line. No torch."""

import math

import jax
import ml_dtypes
import numpy as np
import pytest

from moejax import config as config_lib
from moejax.convert import mamba
from moejax.layers import mamba as mamba_layer
from moejax.models import model as model_lib

HF = {
    "model_type": "mamba",
    "vocab_size": 11,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "state_size": 5,
    "conv_kernel": 3,
    "expand": 2,
    "time_step_rank": 7,
    "time_step_min": 0.002,
    "time_step_max": 0.2,
    "layer_norm_epsilon": 1e-4,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": True,
    "tie_word_embeddings": False,
}
TIED = HF | {"tie_word_embeddings": True}
# The names and shapes of MambaForCausalLM.state_dict(), written out by hand; none is square.
MIXER_SHAPES = {
    "in_proj.weight": (24, 6),
    "conv1d.weight": (12, 1, 3),
    "conv1d.bias": (12,),
    "x_proj.weight": (17, 12),
    "dt_proj.weight": (12, 7),
    "dt_proj.bias": (12,),
    "A_log": (12, 5),
    "D": (12,),
    "out_proj.weight": (6, 12),
}
SHAPES = {
    "backbone.embeddings.weight": (11, 6),
    "backbone.norm_f.weight": (6,),
    "lm_head.weight": (11, 6),
    **{f"backbone.layers.{n}.norm.weight": (6,) for n in range(2)},
    **{f"backbone.layers.{n}.mixer.{name}": shape for n in range(2) for name, shape in MIXER_SHAPES.items()},
}
MIXER = "backbone.layers.1.mixer"


def draw(hf):
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    if hf["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    return weights


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@pytest.mark.parametrize("hf", [HF, TIED], ids=["untied", "tied"])
def test_weights_come_back_bit_for_bit(hf):
    weights = draw(hf)
    assert_equal(mamba.to_hf(mamba.from_hf(weights, mamba.config_from_hf(hf))), weights)


def test_a_tied_head_may_be_left_out_as_in_checkpoint_files():
    weights = draw(TIED)
    file = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    assert_equal(mamba.to_hf(mamba.from_hf(file, mamba.config_from_hf(TIED))), weights)


def test_projections_are_transposed_the_taps_come_first_and_vectors_stay():
    weights = draw(HF)
    model = mamba.from_hf(weights, mamba.config_from_hf(HF))
    assert model.periods is not None
    assert model.head is not None
    np.testing.assert_array_equal(model.head[...], weights["lm_head.weight"].T)
    branch = model.periods.blocks[0].branches[0]
    assert isinstance(branch, mamba_layer.Mamba)
    for n in range(2):
        mixer = {name: weights[f"backbone.layers.{n}.mixer.{name}"] for name in MIXER_SHAPES}
        np.testing.assert_array_equal(branch.in_proj[n], mixer["in_proj.weight"].T)
        np.testing.assert_array_equal(branch.conv_kernel[n], mixer["conv1d.weight"][:, 0].T)
        np.testing.assert_array_equal(branch.conv_bias[n], mixer["conv1d.bias"])
        np.testing.assert_array_equal(branch.x_proj[n], mixer["x_proj.weight"].T)
        np.testing.assert_array_equal(branch.dt_proj[n], mixer["dt_proj.weight"].T)
        np.testing.assert_array_equal(branch.dt_bias[n], mixer["dt_proj.bias"])
        np.testing.assert_array_equal(branch.A_log[n], mixer["A_log"])
        np.testing.assert_array_equal(branch.D[n], mixer["D"])
        np.testing.assert_array_equal(branch.out_proj[n], mixer["out_proj.weight"].T)


def test_the_model_has_the_tree_and_shapes_of_one_made_here():
    config = mamba.config_from_hf(HF)
    made, converted = model_lib.abstract(config), mamba.from_hf(draw(HF), config)
    assert jax.tree.structure(made) == jax.tree.structure(converted)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(converted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_arrays_are_copies():
    weights, config = draw(HF), mamba.config_from_hf(HF)
    model = mamba.from_hf(weights, config)
    before = mamba.to_hf(model)
    for tensor in (*weights.values(), *mamba.to_hf(model).values()):
        tensor[...] = 0
    assert_equal(mamba.to_hf(model), before)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_floats_become_float32_of_the_same_value(dtype):
    narrow = {name: tensor.astype(dtype) for name, tensor in draw(HF).items()}
    wide = {name: tensor.astype(np.float32) for name, tensor in narrow.items()}
    assert_equal(mamba.to_hf(mamba.from_hf(narrow, mamba.config_from_hf(HF))), wide)


def test_every_field_lands_in_our_config():
    config = mamba.config_from_hf(HF)
    assert config == config_lib.ModelConfig(
        vocab_size=11,
        d_model=6,
        period=("mamba",),
        num_periods=2,
        norm="rmsnorm",
        norm_eps=1e-4,
        final_norm=True,
        tie_embeddings=False,
        mamba=config_lib.MambaConfig(expand=2.0, d_state=5, d_conv=3, dt_rank=7, dt_min=0.002, dt_max=0.2),
    )
    assert mamba.config_from_hf(HF | {"hidden_size": 33, "time_step_rank": "auto"}).mamba.dt_rank == 3
    without_tie = {name: value for name, value in HF.items() if name != "tie_word_embeddings"}
    assert mamba.config_from_hf(without_tie).tie_embeddings  # as transformers 4 writes config.json


# layers, width, parameters of the models on huggingface.co/state-spaces: those of `Mamba` trained on the Pile
PUBLISHED = [
    (24, 768, 129_135_360),
    (48, 1024, 371_516_416),
    (48, 1536, 793_204_224),
    (48, 2048, 1_372_178_432),
    (64, 2560, 2_768_345_600),
]


@pytest.mark.parametrize(("layers", "width", "parameters"), PUBLISHED)
def test_published_models_have_their_published_parameter_count(layers, width, parameters):
    sizes = {"vocab_size": 50280, "hidden_size": width, "num_hidden_layers": layers, "time_step_rank": "auto"}
    config = mamba.config_from_hf(TIED | sizes | {"state_size": 16, "conv_kernel": 4})
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model_lib.abstract(config))) == parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba2"}, "model_type=mamba2 must be mamba; convert a MambaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu must be silu or swish; convert a model with this activation"),
        (
            {"use_bias": True},
            "use_bias=True must be False; convert a model without biases in in_proj and out_proj",
        ),
        ({"use_conv_bias": False}, "use_conv_bias=False must be True; convert a model whose convolution has a bias"),
        (
            {"residual_in_fp32": False},
            "residual_in_fp32=False must be True; set it to True, which changes nothing when the weights are float32",
        ),
        ({"tie_word_embeddings": None}, "tie_word_embeddings=None must be False or True; set it to one of them"),
        ({"hidden_size": 0}, "hidden_size=0 must be an integer of 1 or more; change it"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0 must be an integer of 1 or more; change it"),
        ({"state_size": True}, "state_size=True must be an integer of 1 or more; change it"),
        ({"time_step_rank": 0}, "time_step_rank=0 must be an integer of 1 or more; change it"),
        ({"time_step_rank": "full"}, "time_step_rank='full' must be an integer of 1 or more; change it"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon=0.0 must be a positive number; change it"),
        ({"expand": math.nan}, "expand=nan must be a positive number; change it"),
        ({"expand": 0.1}, "expand=0.1 leaves no inner channel of hidden_size=6; raise it"),
        ({"time_step_min": 0.3}, "time_step_min=0.3 must be at most time_step_max=0.2; lower it"),
    ],
)
def test_what_we_cannot_express_is_refused_in_one_line(change, message):
    with pytest.raises(config_lib.ConfigError) as error:
        mamba.config_from_hf(HF | change)
    assert str(error.value) == message


@pytest.mark.parametrize("name", [name for name in HF if name != "tie_word_embeddings"])
def test_a_missing_field_is_named(name):
    with pytest.raises(config_lib.ConfigError, match=f"^{name} is missing; pass the whole dict"):
        mamba.config_from_hf({key: value for key, value in HF.items() if key != name})


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_tensor_is_named(name):
    weights = draw(HF)
    del weights[name]
    with pytest.raises(ValueError, match="is missing") as error:
        mamba.from_hf(weights, mamba.config_from_hf(HF))
    assert (
        str(error.value) == f"{name} is missing, of shape {SHAPES[name]}; add it, or mend the config that asks for it"
    )


@pytest.mark.parametrize("name", SHAPES)
def test_a_transposed_tensor_is_named(name):
    weights = draw(HF)
    weights[name] = weights[name].T if weights[name].ndim > 1 else weights[name][:-1]
    with pytest.raises(ValueError, match="has shape") as error:
        mamba.from_hf(weights, mamba.config_from_hf(HF))
    wrong = weights[name].shape
    assert str(error.value) == f"{name} has shape {wrong}, but it must have {SHAPES[name]}; mend it or the config"


@pytest.mark.parametrize(
    ("hf", "change", "message"),
    [
        (HF, {f"{MIXER}.in_proj.bias": np.zeros(24, np.float32)}, "in_proj.bias has no place in the model"),
        (HF, {"backbone.layers.2.norm.weight": np.ones(6, np.float32)}, r"has no place in the model \(2 layers\)"),
        (HF, {f"{MIXER}.D": np.zeros(12, np.float64)}, "mixer.D has dtype float64, which float32 does not hold"),
        (HF, {f"{MIXER}.D": np.zeros(12, np.int8)}, "mixer.D has dtype int8, which float32 does not hold"),
        (HF, {f"{MIXER}.D": [0.0] * 12}, "mixer.D is a list, not a numpy array; convert it"),
        (TIED, {"lm_head.weight": np.zeros((11, 6), np.float32)}, "lm_head.weight differs from backbone.embeddings"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_in_one_line(hf, change, message):
    with pytest.raises(ValueError, match=message) as error:
        mamba.from_hf(draw(hf) | change, mamba.config_from_hf(hf))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(next(iter(change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"period": ("mamba", "mlp")}, "the model has periods.blocks.1.branches.0"),
        ({"period": ("attention",)}, "the model lacks periods.blocks.0.branches.0.A_log"),
        ({"period": ("mamba_moe",)}, "the model has periods.blocks.0.branches.0.conv_proj"),
        ({"prefix": ("mamba",)}, "the model has prefix.0"),
        ({"norm": "layernorm"}, "the model has norm.bias"),
        ({"final_norm": False}, "the model lacks norm.scale"),
    ],
)
def test_a_model_of_another_shape_is_refused(change, message):
    config = mamba.config_from_hf(HF)
    for name, value in change.items():
        setattr(config, name, value)
    config.attention.num_heads = 1
    for convert in (lambda: mamba.from_hf(draw(HF), config), lambda: mamba.to_hf(model_lib.abstract(config))):
        with pytest.raises(config_lib.ConfigError, match=message):
            convert()
