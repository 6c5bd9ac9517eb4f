"""Mamba language models from Hugging Face transformers (MambaForCausalLM) and back, as numpy arrays.

    config = mamba.config_from_hf(json.loads(pathlib.Path("config.json").read_text()))
    model = mamba.from_hf(safetensors.numpy.load_file("model.safetensors"), config)

P periods, V vocabulary, D model, I inner, X = 2 I: x, then the gate z, R dt rank, N state, S = R + 2 N: dt, B, C,
W conv width.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax import config as config_lib
from moejax.convert import causal_lm, fields
from moejax.models import lm

_FAMILY = causal_lm.Family(
    architecture="MambaForCausalLM",
    branch="mamba",
    table=(
        ("in_proj.weight", "XD", "in_proj", "DX"),
        ("conv1d.weight", "I1W", "conv_kernel", "WI"),
        ("conv1d.bias", "I", "conv_bias", "I"),
        ("x_proj.weight", "SI", "x_proj", "IS"),
        ("dt_proj.weight", "IR", "dt_proj", "RI"),
        ("dt_proj.bias", "I", "dt_bias", "I"),
        ("A_log", "IN", "A_log", "IN"),
        ("D", "I", "D", "I"),
        ("out_proj.weight", "DI", "out_proj", "ID"),
    ),
)

# Fields of MambaConfig with values that `models.lm.Lm` cannot express: those it can, and the remedy.
_ALLOWED = {
    "model_type": (("mamba",), "convert a MambaForCausalLM"),
    **causal_lm.ALLOWED,
}


def config_from_hf(hf: Mapping[str, Any]) -> config_lib.ModelConfig:
    """The model that a Hugging Face MambaConfig describes.

    Args:
      hf: MambaConfig.to_dict() or the content of config.json. Of the settings for initialisation, only time_step_min
        and time_step_max are read.

    Raises:
      ConfigError: a field is missing or out of range, or asks for what `models.lm.Lm` cannot express.
    """
    hf = {"tie_word_embeddings": True, **hf}  # transformers 4 does not write this default
    causal_lm.check_allowed(hf, _ALLOWED)
    d_model, expand = fields.size(hf, "hidden_size"), fields.positive(hf, "expand")
    rank = fields.field(hf, "time_step_rank")
    if int(expand * d_model) < 1:
        raise config_lib.ConfigError(f"expand={expand} leaves no inner channel of hidden_size={d_model}; raise it")
    dt_rank = math.ceil(d_model / 16) if rank == "auto" else fields.size(hf, "time_step_rank")
    return causal_lm.config_from_hf(_FAMILY, hf, dt_rank=dt_rank)


def from_hf(state_dict: Mapping[str, np.ndarray], config: config_lib.ModelConfig) -> lm.Lm:
    """The model with these weights, float32.

    Args:
      state_dict: MambaForCausalLM.state_dict() as numpy arrays of float32, or of a narrower float that float32 holds
        exactly. With tied embeddings lm_head.weight may be left out, as it is in checkpoint files.
      config: what `config_from_hf` returns, perhaps with another scan, compute_dtype or remat.

    Raises:
      ConfigError: the config has a parameter that a MambaForCausalLM has not, or lacks one.
      ValueError: a tensor is missing, unknown, or of the wrong shape or dtype.
    """
    return causal_lm.from_hf(_FAMILY, state_dict, config)


def to_hf(model: lm.Lm) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: every tensor of MambaForCausalLM.state_dict(), so a tied embedding under both names.

    A gradient with respect to a model has the model's structure, and is renamed like its weights.

    Raises:
      ConfigError: the model has a parameter that a MambaForCausalLM has not, or lacks one.
    """
    return causal_lm.to_hf(_FAMILY, model)
