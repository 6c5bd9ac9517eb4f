"""Weights of language models whose layers are all alike, from Hugging Face's names to ours and back, by a table.

P periods, V vocabulary, D model; a family's table has letters of its own.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import config as config_lib
from moejax.convert import fields, weights
from moejax.models import lm


class Family(NamedTuple):
    """The parameters of a model that is an embedding, equal layers of one residual branch, a norm and a head.

    architecture: Hugging Face's class.
    branch: ours, of every layer.
    table: of what lies inside a layer: Hugging Face's name; its dims; our parameter of the branch; our dims.
      torch.nn.Linear keeps (out, in), we (in, out); "1" is a dim of size one.
    """

    architecture: str
    branch: str
    table: tuple[tuple[str, str, str, str], ...]

    def rows(self) -> tuple[tuple[str, str, str, str], ...]:
        """Every parameter, {} being a layer of theirs: a period of ours. Our periods lie in one array: P."""
        block = "periods.blocks.0"
        return (
            ("backbone.embeddings.weight", "VD", "embedding", "VD"),
            ("backbone.layers.{}.norm.weight", "D", f"{block}.norm.scale", "PD"),
            *(
                (f"backbone.layers.{{}}.mixer.{name}", theirs, f"{block}.branches.0.{parameter}", f"P{ours}")
                for name, theirs, parameter, ours in self.table
            ),
            ("backbone.norm_f.weight", "D", "norm.scale", "D"),
            ("lm_head.weight", "VD", "head", "DV"),  # tied: the embedding once more, and no parameter of ours
        )


# Fields of both families with values that `models.lm.Lm` cannot express: those it can, and the remedy.
ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "convert a model with this activation"),  # two names of one function
    "use_bias": ((False,), "convert a model without biases in in_proj and out_proj"),
    "use_conv_bias": ((True,), "convert a model whose convolution has a bias"),
    "tie_word_embeddings": ((False, True), "set it to one of them"),
    "residual_in_fp32": ((True,), "set it to True, which changes nothing when the weights are float32"),
}


def check_allowed(hf: Mapping[str, Any], allowed: dict[str, tuple[tuple[Any, ...], str]]) -> None:
    """Raises ConfigError unless every one of these fields has a value that it may have."""
    for name, (values, remedy) in allowed.items():
        value = fields.field(hf, name)
        if value not in values:
            raise config_lib.ConfigError(f"{name}={value} must be {' or '.join(map(str, values))}; {remedy}")


def config_from_hf(family: Family, hf: Mapping[str, Any], **settings: Any) -> config_lib.ModelConfig:
    """The model that a Hugging Face config describes.

    Args:
      family: what the config is of.
      hf: the fields of config.json.
      settings: of the family's branch, beside those that every family has.

    Raises:
      ConfigError: a field is missing or out of range.
    """
    dt_min, dt_max = fields.positive(hf, "time_step_min"), fields.positive(hf, "time_step_max")
    if dt_min > dt_max:
        raise config_lib.ConfigError(f"time_step_min={dt_min} must be at most time_step_max={dt_max}; lower it")
    config = config_lib.ModelConfig(
        vocab_size=fields.size(hf, "vocab_size"),
        d_model=fields.size(hf, "hidden_size"),
        period=(family.branch,),
        num_periods=fields.size(hf, "num_hidden_layers"),
        norm="rmsnorm",
        norm_eps=fields.positive(hf, "layer_norm_epsilon"),
        final_norm=True,
        tie_embeddings=hf["tie_word_embeddings"],
    )
    settings |= {"expand": fields.positive(hf, "expand"), "dt_min": dt_min, "dt_max": dt_max}
    settings |= {"d_state": fields.size(hf, "state_size"), "d_conv": fields.size(hf, "conv_kernel")}
    for name, value in settings.items():
        setattr(getattr(config, family.branch), name, value)
    return config


def from_hf(family: Family, state_dict: Mapping[str, np.ndarray], config: config_lib.ModelConfig) -> lm.Lm:
    """The model with these weights, float32.

    Args:
      family: what the state_dict is of.
      state_dict: of the family's class, as numpy arrays of float32, or of a narrower float that float32 holds exactly.
        With tied embeddings lm_head.weight may be left out, as it is in checkpoint files.
      config: the model.

    Raises:
      ConfigError: the config has a parameter that the family has not, or lacks one; or a tensor is missing, or of the
        wrong shape or dtype.
      ValueError: a tensor is unknown, or a tied head is not the embedding.
    """
    model = jax.eval_shape(lambda: lm.Lm(config, rngs=nnx.Rngs(params=0)))
    parameters = _parameters(family, model)
    values, known = {}, set()
    for name, theirs, path, ours in family.rows():
        if path not in parameters:
            continue
        size = dict(zip(ours, parameters[path].shape, strict=True))
        shape = tuple(size.get(dim, 1) for dim in theirs)
        layers = [name.format(layer) for layer in range(size.get("P", 1))]
        tensors = [
            _permute(weights.tensor(state_dict, layer, shape), theirs, ours.removeprefix("P")) for layer in layers
        ]
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

    return weights.replace(model, values)


def to_hf(family: Family, model: lm.Lm) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: every tensor of the class's state_dict(), so a tied embedding under both names.

    A gradient with respect to a model has the model's structure, and is renamed like its weights.

    Raises:
      ConfigError: the model has a parameter that the family has not, or lacks one.
    """
    parameters = _parameters(family, model)
    state_dict = {}
    for name, theirs, path, ours in family.rows():
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


def _parameters(family: Family, model: lm.Lm) -> dict[str, nnx.Variable]:
    """Every parameter by its path; refuses a model of another shape than the family's."""
    parameters = weights.parameters(model)
    wanted = {path for _, _, path, _ in family.rows()}
    for path in sorted((parameters.keys() ^ wanted) - {"head"}):
        raise config_lib.ConfigError(
            f"the model {'has' if path in parameters else 'lacks'} {path}, unlike {family.architecture}; set "
            f"model.period=('{family.branch}',), model.prefix=(), model.suffix=(), model.norm=rmsnorm, "
            "model.final_norm=True"
        )
    return parameters
