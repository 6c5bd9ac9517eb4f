"""One mixture-of-experts layer from Hugging Face transformers and back, as numpy arrays.

    config = moe.config_from_hf("mixtral", json.loads(pathlib.Path("config.json").read_text()))
    prefix = "model.layers.3.block_sparse_moe."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in file.items() if name.startswith(prefix)}
    layer = moe.from_hf("mixtral", tensors, config)

Names are those inside the layer. Its experts may lie in one tensor (experts.gate_up_proj), as in the modules of
transformers 5, or in one each (experts.0.w1.weight), as in checkpoint files. What each function computes is in
moejax/ops/routing.py: top_k for mixtral (arXiv 2401.04088) and olmoe (2409.02060), group_limited for deepseek_v2
(2405.04434), sigmoid_bias for deepseek_v3 (2412.19437), switch (2101.03961).

E experts, D model, F hidden.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import config as config_lib
from moejax.convert import fields, weights
from moejax.layers import moe


class _Family(NamedTuple):
    """How a family names things; {} is an expert."""

    router: str  # ours
    weight: str = "gate.weight"  # of the router
    bias: str | None = None  # what balances the router
    # for a gated activation the half that is activated comes first, as in ours
    up: tuple[str, ...] = ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight")
    down: str = "experts.{}.down_proj.weight"
    fused: tuple[str, ...] = ("experts.gate_up_proj", "experts.down_proj")
    shared: str | None = None  # {} a projection
    num_experts: str = "num_experts"  # these two are fields of its config
    d_expert: str = "intermediate_size"


_DEEPSEEK = _Family(
    router="group_limited",
    shared="shared_experts.{}.weight",
    num_experts="n_routed_experts",
    d_expert="moe_intermediate_size",
)
_FAMILIES = {
    "mixtral": _Family(
        router="top_k",
        up=("experts.{}.w1.weight", "experts.{}.w3.weight"),
        down="experts.{}.w2.weight",
        num_experts="num_local_experts",
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK._replace(router="sigmoid_bias", bias="gate.e_score_correction_bias"),
    "olmoe": _Family(router="top_k"),
    "switch": _Family(
        router="switch",
        weight="router.classifier.weight",
        up=("experts.expert_{}.wi.weight",),
        down="experts.expert_{}.wo.weight",
        fused=(),
        d_expert="d_ff",
    ),
}

# Fields with values that `layers.moe.Moe` cannot express: those it can, the first where the field is left out.
_TOP_K = {"scoring_func": ("softmax",), "routed_scaling_factor": (1.0,), "n_shared_experts": (0, None)}
_ALLOWED = {
    "mixtral": _TOP_K
    | {
        "model_type": ("mixtral",),
        "norm_topk_prob": (True,),
        "router_jitter_noise": (0.0,),  # there it multiplies the input of the experts too
    },
    "deepseek_v2": {
        "model_type": ("deepseek_v2",),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),  # transformers does not read it, DeepSeek's code does
        "mlp_bias": (False,),
    },
    "deepseek_v3": {
        "model_type": ("deepseek_v3",),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True,),
    },
    "olmoe": _TOP_K | {"model_type": ("olmoe",), "norm_topk_prob": (False, True)},
    "switch": {"model_type": ("switch_transformers",), "router_bias": (False,), "router_dtype": ("float32",)},
}

# Our gelu is the tanh form; theirs of the name gelu is not.
_ACTIVATIONS = {
    1: {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"},
    2: {"silu": "swiglu", "swish": "swiglu", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu"},
}


def config_from_hf(family: str, hf: Mapping[str, Any], *, seq_length: int = 0) -> config_lib.MoeConfig:
    """The layer that a Hugging Face config describes.

    The weights of the losses come along where transformers has them. Its loss for mixtral and olmoe is K times ours,
    so the weight is K times theirs; it pools the tokens of all rows and layers, where ours is the mean over them.

    Args:
      family: mixtral, deepseek_v2, deepseek_v3, olmoe or switch.
      hf: to_dict() of its config, or the content of config.json.
      seq_length: switch only: tokens a row. Its expert_capacity is a number of tokens, ours a factor of tokens a row,
        so that the two agree on rows of this length.

    Raises:
      ConfigError: a field is missing or out of range, or asks for what `layers.moe.Moe` cannot express.
    """
    theirs, allowed = _family(family), _ALLOWED[family]
    hf = {name: values[0] for name, values in allowed.items()} | dict(hf)
    for name, values in allowed.items():
        if hf[name] not in values:
            raise config_lib.ConfigError(
                f"{name}={hf[name]} must be {' or '.join(map(str, values))} for {family}; convert such a model"
            )
    num_experts, gated = fields.size(hf, theirs.num_experts), len(theirs.up) == 2
    common = {
        "router": theirs.router,
        "num_experts": num_experts,
        "d_expert": fields.size(hf, theirs.d_expert),
        "activation": _activation(hf, "hidden_act" if gated else "dense_act_fn", len(theirs.up)),
    }
    if family == "switch":
        return config_lib.MoeConfig(**common, **_switch_settings(hf, num_experts, seq_length))
    top_k = fields.size(hf, "num_experts_per_tok")
    if top_k > num_experts:
        raise config_lib.ConfigError(
            f"num_experts_per_tok={top_k} is more than {theirs.num_experts}={num_experts}; lower it"
        )
    own = _deepseek_settings if theirs.shared else _top_k_settings
    return config_lib.MoeConfig(
        **common, top_k=top_k, capacity_factor=0.0, eval_capacity_factor=0.0, **own(hf, num_experts, top_k)
    )


def from_hf(
    family: str, tensors: Mapping[str, np.ndarray], config: config_lib.MoeConfig, *, dtype: Any = jnp.float32
) -> moe.Moe:
    """The layer with these weights, float32.

    Args:
      family: mixtral, deepseek_v2, deepseek_v3, olmoe or switch.
      tensors: state_dict() of its module, or the layer's part of a checkpoint, by the names inside the layer: numpy
        arrays of float32, or of a narrower float that float32 holds exactly.
      config: what `config_from_hf` returns, perhaps with another dispatch, capacity, or weights of the losses.
      dtype: what the experts compute in.

    Raises:
      ConfigError: a tensor is missing, unknown, or of the wrong shape or dtype, or the config is not one of the family.
    """
    theirs = _family(family)
    _check_config(family, config)
    d_model = weights.tensor(tensors, theirs.weight, (config.num_experts, None)).shape[1]
    layer = jax.eval_shape(
        lambda: moe.Moe(d_model, config, init_scale=1.0, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(params=0))
    )
    single, fused = _places(theirs, config, per_expert=True), _places(theirs, config, per_expert=False)
    places = single if (single.keys() - fused.keys()) & tensors.keys() else fused

    values = {
        path: _merge(variable, np.zeros(variable.shape, np.float32))
        for path, variable in weights.parameters(layer).items()
    }
    values = {path: _swap(value) for path, value in values.items()}
    for name, (path, index) in places.items():
        part = values[path][index]
        part[...] = weights.tensor(tensors, name, part.shape)
    for name in tensors:
        if name not in places:
            raise config_lib.ConfigError(
                f"{name} has no place in a layer of {family} ({config.num_experts} experts); leave it out"
            )
    return weights.replace(layer, {path: _swap(value) for path, value in values.items()})


def to_hf(family: str, layer: moe.Moe, *, per_expert: bool = False) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: every tensor of the module's state_dict().

    A gradient with respect to a layer has the layer's structure, and is renamed like its weights.

    Args:
      family: mixtral, deepseek_v2, deepseek_v3, olmoe or switch.
      layer: one layer; where a model has them stacked, jax.tree.map(lambda leaf: leaf[i], layers).
      per_expert: the names of checkpoint files instead, with tensors of their own for each expert.

    Raises:
      ConfigError: the layer is not one of the family, or is a stack.
    """
    _check_config(family, layer.config)
    if weights.parameters(layer)["router.weight"].ndim != 2:
        raise config_lib.ConfigError(
            "the layer is a stack of layers; pass one, jax.tree.map(lambda leaf: leaf[i], layers)"
        )
    values = {path: _swap(_merge(variable, variable[...])) for path, variable in weights.parameters(layer).items()}
    places = _places(_family(family), layer.config, per_expert=per_expert)
    return {name: np.array(values[path][index], order="C") for name, (path, index) in places.items()}


# --- settings --------------------------------------------------------------------------------------------------------


def _top_k_settings(hf: Mapping[str, Any], num_experts: int, top_k: int) -> dict[str, Any]:
    return {
        "normalise_gates": "before" if hf["norm_topk_prob"] else "none",
        "balance_weight": fields.number(hf, "router_aux_loss_coef") * top_k,
    }


def _deepseek_settings(hf: Mapping[str, Any], num_experts: int, top_k: int) -> dict[str, Any]:
    scale = fields.number(hf, "routed_scaling_factor")
    if scale == 0:
        raise config_lib.ConfigError("routed_scaling_factor=0 would leave nothing of the experts; raise it")
    settings = {"num_shared_experts": fields.size(hf, "n_shared_experts"), "gate_scale": scale}
    if hf["topk_method"] == "greedy":  # one group is no limit, and its losses are constants
        return settings | {"num_groups": 1, "top_groups": 1, "device_weight": 0.0, "communication_weight": 0.0}
    num_groups, top_groups = fields.size(hf, "n_group"), fields.size(hf, "topk_group")
    if num_experts % num_groups:
        raise config_lib.ConfigError(f"n_group={num_groups} does not divide n_routed_experts={num_experts}; change it")
    if top_groups > num_groups or top_k > top_groups * (num_experts // num_groups):
        raise config_lib.ConfigError(
            f"topk_group={top_groups} of n_group={num_groups} groups cannot give num_experts_per_tok={top_k} of "
            f"{num_experts} experts; change it"
        )
    return settings | {"num_groups": num_groups, "top_groups": top_groups}


def _switch_settings(hf: Mapping[str, Any], num_experts: int, seq_length: int) -> dict[str, Any]:
    if seq_length < 1:
        raise config_lib.ConfigError(
            f"seq_length={seq_length} must be 1 or more for switch, whose expert_capacity is for a row; pass its tokens"
        )
    factor = fields.size(hf, "expert_capacity") * num_experts / seq_length
    return {
        "capacity_factor": factor,
        "eval_capacity_factor": factor,
        "jitter": fields.number(hf, "router_jitter_noise"),
        "expert_dropout": fields.share(hf, "dropout_rate"),
        "balance_weight": fields.number(hf, "router_aux_loss_coef"),
        "z_weight": fields.number(hf, "router_z_loss_coef"),
    }


def _activation(hf: Mapping[str, Any], field: str, columns: int) -> str:
    name, known = fields.field(hf, field), _ACTIVATIONS[columns]
    if name not in known:
        raise config_lib.ConfigError(f"{field}={name} must be {' or '.join(known)}; convert such a model")
    return known[name]


# --- tensors ---------------------------------------------------------------------------------------------------------


def _places(theirs: _Family, config: config_lib.MoeConfig, *, per_expert: bool) -> dict[str, tuple[str, Any]]:
    """Where each of their tensors lies: our parameter, and an index into it with its last two dims swapped.

    torch.nn.Linear keeps (out, in), we (in, out).
    """
    places: dict[str, tuple[str, Any]] = {theirs.weight: ("router.weight", ...)}
    if theirs.bias:
        places[theirs.bias] = ("router.state", ...)
    if theirs.fused and not per_expert:
        places |= zip(theirs.fused, (("up", ...), ("down", ...)), strict=True)
    else:
        for expert in range(config.num_experts):
            for half, name in enumerate(theirs.up):
                places[name.format(expert)] = ("up", (expert, _half(half, config.d_expert)))
            places[theirs.down.format(expert)] = ("down", (expert,))
    if theirs.shared:
        width = config.num_shared_experts * config.d_expert
        for half, name in enumerate(("gate_proj", "up_proj")):
            places[theirs.shared.format(name)] = ("shared.up", (_half(half, width),))
        places[theirs.shared.format("down_proj")] = ("shared.down", ...)
    return places


def _half(number: int, width: int) -> slice:
    return slice(number * width, (number + 1) * width)


def _merge(variable: nnx.Variable, value: Any) -> np.ndarray:
    """The halves of a gated activation in one dim."""
    x = np.asarray(value)
    return x.reshape(*x.shape[:-2], -1) if "half" in variable.get_metadata()["axes"] else x


def _swap(x: np.ndarray) -> np.ndarray:
    return x if x.ndim == 1 else np.swapaxes(x, -1, -2)


def _family(name: str) -> _Family:
    if name not in _FAMILIES:
        raise config_lib.ConfigError(f"family={name} is not known; choose one of {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def _check_config(family: str, config: config_lib.MoeConfig) -> None:
    """Refuses a config whose layer is of another shape than the family's, or computes something else."""
    theirs = _family(family)
    wanted = {
        "router": (theirs.router,),
        "activation": tuple(dict.fromkeys(_ACTIVATIONS[len(theirs.up)].values())),
        "bias": (False,),
        "normalise_gates": {"mixtral": ("before",), "olmoe": ("none", "before")}.get(family, ("none",)),
    }
    for field, values in wanted.items():
        value = getattr(config, field)
        if value not in values:
            raise config_lib.ConfigError(
                f"{field}={value} is not one of {family}; set it to {' or '.join(map(str, values))}"
            )
    if bool(config.num_shared_experts) != bool(theirs.shared):
        raise config_lib.ConfigError(
            f"num_shared_experts={config.num_shared_experts} is not one of {family}; "
            f"set it to {'1 or more' if theirs.shared else '0'}"
        )
