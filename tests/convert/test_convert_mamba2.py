"""Mamba-2's weights go to our layout and back unchanged, and what does not fit is named in one line. No torch."""

import math

import jax
import numpy as np
import pytest

from moejax import config as config_lib
from moejax.convert import mamba2
from moejax.layers import mamba2 as mamba2_layer
from moejax.models import model as model_lib

HF = {
    "model_type": "mamba2",
    "vocab_size": 11,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "state_size": 5,
    "conv_kernel": 3,
    "expand": 2,
    "num_heads": 4,
    "head_dim": 3,
    "n_groups": 2,
    "time_step_min": 0.002,
    "time_step_max": 0.2,
    "time_step_limit": (0.0, math.inf),
    "layer_norm_epsilon": 1e-4,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": True,
    "tie_word_embeddings": False,
    "chunk_size": 256,
}
TIED = HF | {"tie_word_embeddings": True}
# The names and shapes of Mamba2ForCausalLM.state_dict(), written out by hand; none is square.
MIXER_SHAPES = {
    "in_proj.weight": (48, 6),  # 12 z, 12 x, 10 B, 10 C, 4 dt
    "conv1d.weight": (32, 1, 3),
    "conv1d.bias": (32,),
    "dt_bias": (4,),
    "A_log": (4,),
    "D": (4,),
    "norm.weight": (12,),
    "out_proj.weight": (6, 12),
}
SHAPES = {
    "backbone.embeddings.weight": (11, 6),
    "backbone.norm_f.weight": (6,),
    "lm_head.weight": (11, 6),
    **{f"backbone.layers.{n}.norm.weight": (6,) for n in range(2)},
    **{f"backbone.layers.{n}.mixer.{name}": shape for n in range(2) for name, shape in MIXER_SHAPES.items()},
}


def draw(hf):
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    if hf["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    return weights


@pytest.mark.parametrize("hf", [HF, TIED], ids=["untied", "tied"])
def test_weights_come_back_bit_for_bit(hf):
    weights = draw(hf)
    actual = mamba2.to_hf(mamba2.from_hf(weights, mamba2.config_from_hf(hf)))
    assert actual.keys() == weights.keys()
    for name, expected in weights.items():
        np.testing.assert_array_equal(actual[name], expected, err_msg=name)


def test_projections_are_transposed_the_taps_come_first_and_vectors_stay():
    weights = draw(HF)
    model = mamba2.from_hf(weights, mamba2.config_from_hf(HF))
    assert model.periods is not None
    branch = model.periods.blocks[0].branches[0]
    assert isinstance(branch, mamba2_layer.Mamba2)
    for n in range(2):
        mixer = {name: weights[f"backbone.layers.{n}.mixer.{name}"] for name in MIXER_SHAPES}
        np.testing.assert_array_equal(branch.in_proj[n], mixer["in_proj.weight"].T)
        np.testing.assert_array_equal(branch.conv_kernel[n], mixer["conv1d.weight"][:, 0].T)
        np.testing.assert_array_equal(branch.conv_bias[n], mixer["conv1d.bias"])
        np.testing.assert_array_equal(branch.norm_scale[n], mixer["norm.weight"])
        np.testing.assert_array_equal(branch.out_proj[n], mixer["out_proj.weight"].T)
        for name in ("dt_bias", "A_log", "D"):
            np.testing.assert_array_equal(getattr(branch, name)[n], mixer[name], err_msg=name)


def test_the_model_has_the_tree_and_shapes_of_one_made_here():
    config = mamba2.config_from_hf(HF)
    made, converted = model_lib.abstract(config), mamba2.from_hf(draw(HF), config)
    assert jax.tree.structure(made) == jax.tree.structure(converted)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(converted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_every_field_lands_in_our_config():
    expected = config_lib.ModelConfig(
        vocab_size=11,
        d_model=6,
        period=("mamba2",),
        num_periods=2,
        norm="rmsnorm",
        norm_eps=1e-4,
        final_norm=True,
        tie_embeddings=False,
        mamba2=config_lib.Mamba2Config(
            expand=2.0, d_state=5, d_head=3, num_groups=2, d_conv=3, dt_min=0.002, dt_max=0.2
        ),
    )
    assert mamba2.config_from_hf(HF) == expected
    as_transformers_4_writes_it = {name: value for name, value in HF.items() if name != "tie_word_embeddings"}
    assert mamba2.config_from_hf(as_transformers_4_writes_it | {"rms_norm": True, "norm_before_gate": True}) == expected


@pytest.mark.parametrize("limit", [(0.0, math.inf), [0.0, math.inf], [0, {"__float__": "Infinity"}], (-1.0, math.inf)])
def test_a_limit_of_the_time_step_that_limits_nothing_is_none(limit):
    assert mamba2.config_from_hf(HF | {"time_step_limit": limit}) == mamba2.config_from_hf(HF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type=mamba must be mamba2; convert a Mamba2ForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu must be silu or swish; convert a model with this activation"),
        ({"use_bias": True}, "use_bias=True must be False; convert a model without biases in in_proj and out_proj"),
        ({"use_conv_bias": False}, "use_conv_bias=False must be True; convert a model whose convolution has a bias"),
        ({"rms_norm": False}, "rms_norm=False must be True; convert a model with the gated norm"),
        (
            {"residual_in_fp32": False},
            "residual_in_fp32=False must be True; set it to True, which changes nothing when the weights are float32",
        ),
        (
            {"time_step_limit": (0.0, 0.5)},
            "time_step_limit=(0.0, 0.5) must be (0.0, inf); convert a model whose time step has no limit",
        ),
        (
            {"time_step_limit": None},
            "time_step_limit=None must be (0.0, inf); convert a model whose time step has no limit",
        ),
        (
            {"num_heads": 5},
            "num_heads=5 of head_dim=3 are not the 12 channels of expand=2 times hidden_size=6; mend one of them",
        ),
        ({"n_groups": 3}, "n_groups=3 does not divide num_heads=4; change it"),
        ({"n_groups": 0}, "n_groups=0 must be an integer of 1 or more; change it"),
        ({"expand": -2}, "expand=-2 must be a positive number; change it"),
        ({"time_step_min": 0.3}, "time_step_min=0.3 must be at most time_step_max=0.2; lower it"),
    ],
)
def test_what_we_cannot_express_is_refused_in_one_line(change, message):
    with pytest.raises(config_lib.ConfigError) as error:
        mamba2.config_from_hf(HF | change)
    assert str(error.value) == message


@pytest.mark.parametrize("name", [name for name in HF if name not in ("tie_word_embeddings", "chunk_size")])
def test_a_missing_field_is_named(name):
    with pytest.raises(config_lib.ConfigError, match=f"^{name} is missing; pass the whole dict"):
        mamba2.config_from_hf({key: value for key, value in HF.items() if key != name})


def test_tensors_that_do_not_fit_are_named():
    config, weights = mamba2.config_from_hf(HF), draw(HF)
    name = "backbone.layers.1.mixer.norm.weight"
    with pytest.raises(ValueError, match=rf"^{name} is missing, of shape \(12,\)"):
        mamba2.from_hf({key: value for key, value in weights.items() if key != name}, config)
    with pytest.raises(ValueError, match=rf"^{name} has shape \(6,\), but it must have \(12,\)"):
        mamba2.from_hf(weights | {name: weights[name][:6]}, config)
    with pytest.raises(ValueError, match=r"x_proj.weight has no place in the model \(2 layers\); leave it out"):
        mamba2.from_hf(weights | {"backbone.layers.1.mixer.x_proj.weight": weights[name]}, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"period": ("mamba",)},
            "the model has periods.blocks.0.branches.0.dt_proj, unlike Mamba2ForCausalLM; set model.period=",
        ),
        ({"period": ("mamba2", "mlp")}, "the model has periods.blocks.1.branches.0"),
        (
            {"final_norm": False},
            r"lacks norm.scale, unlike .*; set model.period=\('mamba2',\), .*final_norm=True",
        ),
    ],
)
def test_a_model_of_another_shape_is_refused(change, message):
    config = mamba2.config_from_hf(HF)
    for name, value in change.items():
        setattr(config, name, value)
    for convert in (lambda: mamba2.from_hf(draw(HF), config), lambda: mamba2.to_hf(model_lib.abstract(config))):
        with pytest.raises(config_lib.ConfigError, match=message):
            convert()
