"""How many parameters a model has, in all and active for one token, by component. Nothing is allocated."""

import math
from typing import Any

import jax
from flax import nnx

from moejax import config as config_lib
from moejax import partition
from moejax.layers import attention, head, mamba, mamba2, mamba_moe, mlp, moe, router
from moejax.models import model as model_lib

COMPONENTS = ("embedding", "head", "norm", "mamba", "mamba2", "attention", "mlp", "router", "experts", "shared experts")


def count(config: config_lib.ModelConfig) -> dict[str, Any]:
    """Parameter counts of the model that this config describes.

    Returns:
      total: all parameters. active: those that take part in the output of one token: top_k experts of each MoE layer
      (with a ReLU router or expert choice, on average; with soft gating all), the router whole, everything else.
      non_embedding_total, non_embedding_active: the same without embedding and head, as MoE-Mamba's tables count.
      components: {component: {"total": ..., "active": ...}}.
    """
    model = model_lib.abstract(config)
    components = {name: {"total": 0, "active": 0} for name in COMPONENTS}
    variables = jax.tree_util.tree_leaves_with_path(model, is_leaf=partition.is_variable)
    for path, variable in variables:
        if not isinstance(variable, nnx.Param):
            continue  # what a router keeps beside its weights
        name, size = component(model, path), math.prod(variable.shape)
        active = size
        if name == "experts" and config_lib.ROUTERS[config.moe.router].sparse:
            active = size // config.moe.num_experts * config.moe.num_choices
        components[name]["total"] += size
        components[name]["active"] += active
    outer = ("embedding", "head")
    return {
        "total": sum(entry["total"] for entry in components.values()),
        "active": sum(entry["active"] for entry in components.values()),
        "non_embedding_total": sum(entry["total"] for name, entry in components.items() if name not in outer),
        "non_embedding_active": sum(entry["active"] for name, entry in components.items() if name not in outer),
        "components": components,
    }


def component(model: nnx.Module, path: tuple[Any, ...]) -> str:
    """Which of COMPONENTS a parameter belongs to: the module that holds it says.

    path: of `jax.tree_util.tree_leaves_with_path`, with variables as leaves.
    """
    node: Any = model
    shared: bool = False  # inside a MoE layer's shared experts
    for entry in path[:-1]:
        if isinstance(entry, jax.tree_util.GetAttrKey):
            shared |= isinstance(node, moe.Moe) and entry.name == "shared"
            node = getattr(node, entry.name)
        else:
            node = node[entry.idx]
    name = path[-1].name
    match node:
        case mamba.Mamba() | mamba_moe.MambaMoe():
            return "mamba"
        case mamba2.Mamba2():
            return "mamba2"
        case attention.Attention() | attention.CrossAttention() | attention.RelativeBias():
            return "attention"
        case mlp.Mlp():
            return "shared experts" if shared else "mlp"
        case moe.Moe():
            return "experts"
        case router.Router():
            return "router"
        case head.MixtureOfSoftmaxes():
            return "head"
    return name if name in ("embedding", "head") else "norm"


def table(counts: dict[str, Any]) -> str:
    """The counts as aligned lines of text."""
    rows = [(name, entry["total"], entry["active"]) for name, entry in counts["components"].items() if entry["total"]]
    rows.append(("all", counts["total"], counts["active"]))
    rows.append(("without embedding and head", counts["non_embedding_total"], counts["non_embedding_active"]))
    lines = [f"{'component':<28}{'total':>16}{'active':>16}"]
    return "\n".join(lines + [f"{name:<28}{total:>16,}{active:>16,}" for name, total, active in rows])
