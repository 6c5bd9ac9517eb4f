"""Mamba-2 language models from Hugging Face transformers (Mamba2ForCausalLM) and back, as numpy arrays.

    config = mamba2.config_from_hf(json.loads(pathlib.Path("config.json").read_text()))
    model = mamba2.from_hf(safetensors.numpy.load_file("model.safetensors"), config)

P periods, V vocabulary, D model, I inner, H heads, Y what goes through the convolution: x, B, C, X = I + Y + H: the
gate z, then Y, then dt, W conv width.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax import config as config_lib
from moejax.convert import causal_lm, fields
from moejax.models import lm

_FAMILY = causal_lm.Family(
    architecture="Mamba2ForCausalLM",
    branch="mamba2",
    table=(
        ("in_proj.weight", "XD", "in_proj", "DX"),
        ("conv1d.weight", "Y1W", "conv_kernel", "WY"),
        ("conv1d.bias", "Y", "conv_bias", "Y"),
        ("dt_bias", "H", "dt_bias", "H"),
        ("A_log", "H", "A_log", "H"),
        ("D", "H", "D", "H"),
        ("norm.weight", "I", "norm_scale", "I"),
        ("out_proj.weight", "DI", "out_proj", "ID"),
    ),
)

# Fields of Mamba2Config with values that `models.lm.Lm` cannot express: those it can, and the remedy.
_ALLOWED = {
    "model_type": (("mamba2",), "convert a Mamba2ForCausalLM"),
    "rms_norm": ((True,), "convert a model with the gated norm"),
    **causal_lm.ALLOWED,
}
# What config.json may lack: transformers 4 does not write its default, and only it knew rms_norm.
_DEFAULTS = {"tie_word_embeddings": False, "rms_norm": True}


def config_from_hf(hf: Mapping[str, Any]) -> config_lib.ModelConfig:
    """The model that a Hugging Face Mamba2Config describes.

    chunk_size is not taken over: it changes no result, and a good one depends on the hardware. Nor is norm_before_gate,
    which some published files have: transformers gates before the norm whatever it says.

    Args:
      hf: Mamba2Config.to_dict() or the content of config.json. Of the settings for initialisation, only time_step_min
        and time_step_max are read.

    Raises:
      ConfigError: a field is missing or out of range, or asks for what `models.lm.Lm` cannot express.
    """
    hf = {**_DEFAULTS, **hf}
    causal_lm.check_allowed(hf, _ALLOWED)
    _check_limit(fields.field(hf, "time_step_limit"))
    d_model, expand = fields.size(hf, "hidden_size"), fields.positive(hf, "expand")
    heads, d_head, groups = (fields.size(hf, name) for name in ("num_heads", "head_dim", "n_groups"))
    if expand * d_model != heads * d_head:
        raise config_lib.ConfigError(
            f"num_heads={heads} of head_dim={d_head} are not the {expand * d_model:g} channels of expand={expand:g} "
            f"times hidden_size={d_model}; mend one of them"
        )
    if heads % groups:
        raise config_lib.ConfigError(f"n_groups={groups} does not divide num_heads={heads}; change it")
    return causal_lm.config_from_hf(_FAMILY, hf, d_head=d_head, num_groups=groups)


def from_hf(state_dict: Mapping[str, np.ndarray], config: config_lib.ModelConfig) -> lm.Lm:
    """The model with these weights, float32.

    Args:
      state_dict: Mamba2ForCausalLM.state_dict() as numpy arrays of float32, or of a narrower float that float32 holds
        exactly. With tied embeddings lm_head.weight may be left out, as it is in checkpoint files.
      config: what `config_from_hf` returns, perhaps with another scan, chunk_size, compute_dtype or remat.

    Raises:
      ConfigError: the config has a parameter that a Mamba2ForCausalLM has not, or lacks one.
      ValueError: a tensor is missing, unknown, or of the wrong shape or dtype.
    """
    return causal_lm.from_hf(_FAMILY, state_dict, config)


def to_hf(model: lm.Lm) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: every tensor of Mamba2ForCausalLM.state_dict(), so a tied embedding under both names.

    A gradient with respect to a model has the model's structure, and is renamed like its weights.

    Raises:
      ConfigError: the model has a parameter that a Mamba2ForCausalLM has not, or lacks one.
    """
    return causal_lm.to_hf(_FAMILY, model)


def _check_limit(limit: Any) -> None:
    """Only the limits that limit nothing: dt is a softplus, which is positive. JSON has no infinity but this one."""
    unlimited = (0.0, math.inf)
    try:
        low, high = (float(value["__float__"] if isinstance(value, Mapping) else value) for value in limit)
    except (TypeError, ValueError, KeyError):
        low, high = math.nan, math.nan
    if not (low <= unlimited[0] and high == unlimited[1]):
        raise config_lib.ConfigError(
            f"time_step_limit={limit} must be {unlimited}; convert a model whose time step has no limit"
        )
