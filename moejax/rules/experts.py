"""Rules of the experts: config.model.moe, and the projections of Mamba blocks that are experts."""

import math

from moejax import config as config_lib
from moejax.config import routers
from moejax.rules.checks import at_least, get, one_of, positive, require

# Settings of model.moe that only some routers read.
_READ_BY = {
    "exploration": ("switch",),
    "jitter": ("switch",),
    "router_dropout": ("switch",),
    "second_threshold": ("gshard",),
    "noise_epsilon": ("noisy_top_k",),
    "num_groups": ("group_limited", "sigmoid_bias"),
    "top_groups": ("group_limited", "sigmoid_bias"),
    "gate_scale": ("group_limited", "sigmoid_bias"),
    "bias_rate": ("sigmoid_bias",),
    "slots_per_expert": ("soft_moe",),
    "hash_table": ("hash",),
    "relu_coefficient": ("relu",),
    "relu_multiplier": ("relu",),
}


def validate(moe: config_lib.MoeConfig, config: config_lib.Config) -> None:
    one_of("model.moe.router", moe.router, tuple(config_lib.ROUTERS))
    router, choices = config_lib.ROUTERS[moe.router], moe.num_choices
    at_least(config, 1, "model.moe.num_experts", "model.moe.d_expert", "model.moe.slots_per_expert")
    at_least(config, 0, "model.moe.top_k", "model.moe.num_shared_experts", "model.moe.group_size")
    remedy = f"raise num_experts to {choices}" if router.fixed else f"set top_k to {moe.num_experts} or less"
    require(
        choices <= moe.num_experts,
        f"model.moe.top_k={choices} is more than model.moe.num_experts={moe.num_experts}; {remedy}",
    )
    for name, readers in _READ_BY.items():
        value = getattr(moe, name)
        require(
            moe.router in readers or value == getattr(config_lib.MoeConfig(), name),
            f"model.moe.{name}={value} has no effect with router={moe.router}, only with {' and '.join(readers)}; "
            "leave it at its default",
        )
    require(
        not (router.fixed and moe.top_k not in (0, router.top_k)),
        f"model.moe.top_k={moe.top_k} is not for router={moe.router}, which has its own number of experts a token; "
        "leave it at 0, or set router=top_k",
    )
    one_of("model.moe.activation", moe.activation, config_lib.ACTIVATIONS)
    one_of("model.moe.normalise_gates", moe.normalise_gates, ("none", "before", "after"))
    require(
        moe.normalise_gates == "none" or moe.router in ("top_k", "gshard"),
        f"model.moe.normalise_gates={moe.normalise_gates} is not for router={moe.router}; set it to none",
    )
    normalised = moe.router in ("noisy_top_k", "sigmoid_bias") or (
        moe.router == "top_k" and moe.normalise_gates != "none"
    )
    require(
        not (normalised and choices == 1 < moe.num_experts),
        f"model.moe.top_k=1 makes every gate of router={moe.router} the same whatever the router says, so that the "
        "language-model loss would never train it; set top_k to 2 or more"
        + (", or normalise_gates=none" if moe.router == "top_k" else ""),
    )
    at_least(config, 0, "model.moe.capacity_factor", "model.moe.eval_capacity_factor", "model.moe.noise_epsilon")
    at_least(config, 0, "model.moe.bias_rate", "model.moe.relu_coefficient", "model.moe.second_threshold")
    positive(config, "model.moe.gate_scale")
    one_of("model.moe.exploration", moe.exploration, config_lib.EXPLORATIONS)
    one_of("model.moe.router_dtype", moe.router_dtype, ("float32", "bfloat16"))
    one_of("model.moe.capacity_rounding", moe.capacity_rounding, ("up", "down", "nearest"))
    at_least(config, 1, "model.moe.min_capacity")
    for path in ("model.moe.expert_dropout", "model.moe.jitter", "model.moe.router_dropout"):
        require(0 <= get(config, path) < 1, f"{path}={get(config, path)} must lie in [0, 1); change it")
    for name, exploration in (("jitter", "jitter"), ("router_dropout", "dropout")):
        value = getattr(moe, name)
        require(
            moe.exploration == exploration or value == getattr(config_lib.MoeConfig(), name),
            f"model.moe.{name}={value} has no effect with exploration={moe.exploration}; leave it at its default",
        )
    require(
        moe.relu_multiplier > 1,
        f"model.moe.relu_multiplier={moe.relu_multiplier} must be over 1 (ReMoE: 1.2); raise it",
    )
    require(
        moe.router != "relu" or choices < moe.num_experts or moe.num_experts == 1,
        f"model.moe.top_k={choices} asks router=relu for every expert, which its loss can't bring about; lower it",
    )
    _validate_dispatch(moe, router)
    if moe.router in ("group_limited", "sigmoid_bias"):
        at_least(config, 1, "model.moe.num_groups", "model.moe.top_groups")
        require(
            moe.num_experts % moe.num_groups == 0,
            f"model.moe.num_groups={moe.num_groups} does not divide model.moe.num_experts={moe.num_experts}; "
            "change one of them",
        )
        require(
            moe.top_groups <= moe.num_groups,
            f"model.moe.top_groups={moe.top_groups} is more than model.moe.num_groups={moe.num_groups}; lower it",
        )
        reachable = moe.top_groups * (moe.num_experts // moe.num_groups)
        require(
            choices <= reachable,
            f"model.moe.top_k={choices} is more than the {reachable} experts of model.moe.top_groups={moe.top_groups} "
            "groups; lower it or raise top_groups",
        )
    if moe.router == "hash":
        require(
            moe.hash_table in ("random", "balanced") or moe.hash_table.endswith(".npy"),
            f"model.moe.hash_table={moe.hash_table} is not known; choose random, balanced or a FILE.npy",
        )
    one_of("model.moe.layer_reduction", moe.layer_reduction, ("mean", "sum"))
    for name in config_lib.MOE_LOSSES:
        weight = getattr(moe, f"{name}_weight")
        require(
            0 <= weight < math.inf or weight == -1,
            f"model.moe.{name}_weight={weight} must be 0 or more, and finite, or -1 for the router's own; change it",
        )
        require(
            name in router.losses or weight in (-1, 0),
            f"model.moe.{name}_weight={weight} has no effect with router={moe.router}; set it to -1",
        )


def _validate_dispatch(moe: config_lib.MoeConfig, router: routers.Router) -> None:
    one_of("model.moe.dispatch", moe.dispatch, ("auto", "capacity", "dropless"))
    one_of("model.moe.grouped_matmul", moe.grouped_matmul, config_lib.GROUPED_MATMULS)
    one_of("model.moe.exchange", moe.exchange, ("auto", "ragged", "gather"))
    require(moe.num_chunks >= 1, f"model.moe.num_chunks={moe.num_chunks} must be 1 or more; change it")
    one_of("model.moe.capacity_order", moe.capacity_order, ("auto", "tokens", "choices", "priority"))
    require(
        router.sparse or moe.dispatch == "auto",
        f"model.moe.dispatch={moe.dispatch} is not for router={moe.router}, which dispatches no token; set it to auto",
    )
    require(
        moe.grouped_matmul == "auto" or moe.dispatch != "capacity",
        f"model.moe.grouped_matmul={moe.grouped_matmul} has no effect with dispatch=capacity; set it to auto",
    )
    factors = moe.capacity_factor, moe.eval_capacity_factor
    where = f"router={moe.router}, dispatch={moe.dispatch} and these capacity factors"
    require(
        moe.exchange == "auto" or any(moe.is_dropless(factor, full_capacity=1.0) for factor in factors),
        f"model.moe.exchange={moe.exchange} has no effect with {where}, where nothing is dropless; set it to auto",
    )
    has_slots = moe.router == "soft_moe" or (
        router.sparse and not all(moe.is_dropless(factor, full_capacity=1.0) for factor in factors)
    )
    require(
        moe.num_chunks == 1 or has_slots,
        f"model.moe.num_chunks={moe.num_chunks} has no effect with {where}, where experts have no slots; set it to 1",
    )
    require(
        router.sparse or moe.expert_dropout == 0,
        f"model.moe.expert_dropout={moe.expert_dropout} is not for router={moe.router}, which dispatches no token; "
        "set it to 0",
    )
    require(
        moe.router != "expert_choice" or moe.dispatch != "dropless",
        "model.moe.dispatch=dropless is not for router=expert_choice, whose experts each take as many tokens as their "
        "capacity; set it to auto",
    )
    require(
        moe.router != "expert_choice" or (moe.capacity_factor > 0 and moe.eval_capacity_factor > 0),
        "model.moe.capacity_factor=0 would let each expert of router=expert_choice take every token; "
        "set both capacity factors above 0 (arXiv 2202.09368: 2)",
    )


def validate_projections(model: config_lib.ModelConfig) -> None:
    """Of "mamba_moe"; puts them in order, as ("out", "gate") and ("gate", "out") are one setting."""
    given, known = model.mamba.moe_projections, config_lib.MAMBA_PROJECTIONS
    for name in given:
        one_of("model.mamba.moe_projections", name, known)
        require(given.count(name) == 1, f"model.mamba.moe_projections={given} has {name} twice; name it once")
    require(
        bool(given) or not model.uses("mamba_moe"),
        "model.mamba.moe_projections=() leaves mamba_moe without experts; set it to some of "
        f"{', '.join(known)}, or use mamba",
    )
    require(
        not given or model.uses("mamba_moe"),
        f"model.mamba.moe_projections={given} has no effect without a mamba_moe sublayer; put one in model.period, "
        "or set it to ()",
    )
    model.mamba.moe_projections = tuple(name for name in known if name in given)
