"""Mamba language models from Hugging Face transformers (MambaForCausalLM) and back, as numpy arrays.

    config = mamba.config_from_hf(json.loads(pathlib.Path("config.json").read_text()))
    model = mamba.from_hf(safetensors.numpy.load_file("model.safetensors"), config)

P periods, V vocabulary, D model, I inner, X = 2 I: x, then the gate z, R dt rank, N state, S = R + 2 N: dt, B, C,
W conv width.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import config as config_lib
from moejax.convert import fields
from moejax.models import lm

# Hugging Face's name, {} a layer; its dims; our parameter; our dims. torch.nn.Linear keeps (out, in), we (in, out); "1"
# is a dim of size one. A layer of theirs is a period of ours, and our periods lie in one array: P.
_TABLE = (
    ("backbone.embeddings.weight", "VD", "embedding", "VD"),
    ("backbone.layers.{}.norm.weight", "D", "periods.blocks.0.norm.scale", "PD"),
    ("backbone.layers.{}.mixer.in_proj.weight", "XD", "periods.blocks.0.branches.0.in_proj", "PDX"),
    ("backbone.layers.{}.mixer.conv1d.weight", "I1W", "periods.blocks.0.branches.0.conv_kernel", "PWI"),
    ("backbone.layers.{}.mixer.conv1d.bias", "I", "periods.blocks.0.branches.0.conv_bias", "PI"),
    ("backbone.layers.{}.mixer.x_proj.weight", "SI", "periods.blocks.0.branches.0.x_proj", "PIS"),
    ("backbone.layers.{}.mixer.dt_proj.weight", "IR", "periods.blocks.0.branches.0.dt_proj", "PRI"),
    ("backbone.layers.{}.mixer.dt_proj.bias", "I", "periods.blocks.0.branches.0.dt_bias", "PI"),
    ("backbone.layers.{}.mixer.A_log", "IN", "periods.blocks.0.branches.0.A_log", "PIN"),
    ("backbone.layers.{}.mixer.D", "I", "periods.blocks.0.branches.0.D", "PI"),
    ("backbone.layers.{}.mixer.out_proj.weight", "DI", "periods.blocks.0.branches.0.out_proj", "PID"),
    ("backbone.norm_f.weight", "D", "norm.scale", "D"),
    ("lm_head.weight", "VD", "head", "DV"),  # tied: the embedding once more, and no parameter of ours
)

# Fields of MambaConfig with values that `models.lm.Lm` cannot express: those it can, and the remedy.
_ALLOWED = {
    "model_type": (("mamba",), "convert a MambaForCausalLM"),
    "hidden_act": (("silu", "swish"), "convert a model with this activation"),  # two names of one function
    "use_bias": ((False,), "convert a model without biases in in_proj and out_proj"),
    "use_conv_bias": ((True,), "convert a model whose convolution has a bias"),
    "tie_word_embeddings": ((False, True), "set it to one of them"),
    "residual_in_fp32": ((True,), "set it to True, which changes nothing when the weights are float32"),
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
    for name, (allowed, remedy) in _ALLOWED.items():
        value = fields.field(hf, name)
        if value not in allowed:
            raise config_lib.ConfigError(f"{name}={value} must be {' or '.join(map(str, allowed))}; {remedy}")
    d_model, expand, rank = fields.size(hf, "hidden_size"), _positive(hf, "expand"), fields.field(hf, "time_step_rank")
    if int(expand * d_model) < 1:
        raise config_lib.ConfigError(f"expand={expand} leaves no inner channel of hidden_size={d_model}; raise it")
    dt_min, dt_max = _positive(hf, "time_step_min"), _positive(hf, "time_step_max")
    if dt_min > dt_max:
        raise config_lib.ConfigError(f"time_step_min={dt_min} must be at most time_step_max={dt_max}; lower it")
    return config_lib.ModelConfig(
        vocab_size=fields.size(hf, "vocab_size"),
        d_model=d_model,
        period=("mamba",),
        num_periods=fields.size(hf, "num_hidden_layers"),
        norm="rmsnorm",
        norm_eps=_positive(hf, "layer_norm_epsilon"),
        final_norm=True,
        tie_embeddings=hf["tie_word_embeddings"],
        mamba=config_lib.MambaConfig(
            expand=expand,
            d_state=fields.size(hf, "state_size"),
            d_conv=fields.size(hf, "conv_kernel"),
            dt_rank=math.ceil(d_model / 16) if rank == "auto" else fields.size(hf, "time_step_rank"),
            dt_min=dt_min,
            dt_max=dt_max,
        ),
    )


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
    model = lm.abstract(config)
    parameters = _parameters(model)
    values, known = {}, set()
    for name, theirs, path, ours in _TABLE:
        if path not in parameters:
            continue
        size = dict(zip(ours, parameters[path].shape, strict=True))
        shape = tuple(size.get(dim, 1) for dim in theirs)
        layers = [name.format(layer) for layer in range(size.get("P", 1))]
        tensors = [_permute(_tensor(state_dict, layer, shape), theirs, ours.removeprefix("P")) for layer in layers]
        values[path] = jnp.array(np.stack(tensors) if "P" in size else tensors[0], jnp.float32)
        known.update(layers)
    if config.tie_embeddings and "lm_head.weight" in state_dict:
        if not np.array_equal(state_dict["lm_head.weight"], state_dict["backbone.embeddings.weight"]):
            raise ValueError(
                "lm_head.weight differs from backbone.embeddings.weight, but model.tie_embeddings=True; set it to False"
            )
        known.add("lm_head.weight")
    for name in state_dict:
        if name not in known:
            raise ValueError(f"{name} has no place in the model ({config.num_periods} layers); leave it out")

    return jax.tree_util.tree_map_with_path(
        lambda path, parameter: parameter.replace(values[_dotted(path)]), model, is_leaf=_is_variable
    )


def to_hf(model: lm.Lm) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: every tensor of MambaForCausalLM.state_dict(), so a tied embedding under both names.

    A gradient with respect to a model has the model's structure, and is renamed like its weights.

    Raises:
      ConfigError: the model has a parameter that a MambaForCausalLM has not, or lacks one.
    """
    parameters = _parameters(model)
    state_dict = {}
    for name, theirs, path, ours in _TABLE:
        if path not in parameters:
            state_dict[name] = state_dict["backbone.embeddings.weight"]
            continue
        value = np.asarray(parameters[path][...])
        for layer, tensor in enumerate(value if "P" in ours else [value]):
            state_dict[name.format(layer)] = np.array(_permute(tensor, ours.removeprefix("P"), theirs), order="C")
    return state_dict


def _permute(x: np.ndarray, source: str, target: str) -> np.ndarray:
    """Transposes x from the dims `source` to the dims `target`, either of which may have dims "1"."""
    ones = [tuple(i for i, dim in enumerate(dims) if dim == "1") for dims in (source, target)]
    source, target = source.replace("1", ""), target.replace("1", "")
    x = np.squeeze(x, ones[0]).transpose([source.index(dim) for dim in target])
    return np.expand_dims(x, ones[1])


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _parameters(model: lm.Lm) -> dict[str, nnx.Variable]:
    """Every parameter by its path; refuses a model of another shape than Mamba's."""
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_variable)
    parameters = {_dotted(path): variable for path, variable in leaves}
    wanted = {path for _, _, path, _ in _TABLE}
    for path in sorted((parameters.keys() ^ wanted) - {"head"}):
        raise config_lib.ConfigError(
            f"the model {'has' if path in parameters else 'lacks'} {path}, unlike MambaForCausalLM; set "
            "model.period=('mamba',), model.prefix=(), model.suffix=(), model.norm=rmsnorm, model.final_norm=True"
        )
    return parameters


def _tensor(state_dict: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in state_dict:
        raise ValueError(f"{name} is missing, of shape {shape}; add it, or mend the config that asks for it")
    tensor = state_dict[name]
    if not isinstance(tensor, np.ndarray):
        raise ValueError(f"{name} is a {type(tensor).__name__}, not a numpy array; convert it")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tensor.shape}, but the config makes it {shape}; mend one of them")
    if not (jnp.issubdtype(tensor.dtype, jnp.floating) and np.can_cast(tensor.dtype, np.float32)):
        raise ValueError(f"{name} has dtype {tensor.dtype}, which float32 does not hold exactly; cast it to float32")
    return tensor


def _positive(hf: Mapping[str, Any], name: str) -> float:
    value = fields.field(hf, name)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise config_lib.ConfigError(f"{name}={value!r} must be a positive number; change it")
    return float(value)
