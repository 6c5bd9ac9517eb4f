"""Rules of config.model, but for its experts."""

import math

from moejax import config as config_lib
from moejax.rules import experts
from moejax.rules.checks import at_least, get, one_of, positive, require


def validate(model: config_lib.ModelConfig) -> None:
    config = config_lib.Config(model=model)
    for part in ("prefix", "period", "suffix"):
        for sublayer in getattr(model, part):
            for branch in sublayer.split("|"):
                one_of(f"model.{part}", branch, config_lib.BRANCHES)
    at_least(config, 1, "model.vocab_size", "model.d_model")
    at_least(config, 0, "model.num_periods")
    require(bool(model.sublayers), "model has no sublayers; set model.period and model.num_periods, or model.prefix")
    one_of("model.norm", model.norm, ("rmsnorm", "layernorm"))
    one_of("model.init", model.init, ("switch", "moe_mamba"))
    at_least(config, 1, "model.num_softmaxes")
    one_of("model.remat", model.remat, ("none", "period"))
    one_of("model.compute_dtype", model.compute_dtype, ("float32", "bfloat16"))
    positive(config, "model.norm_eps", "model.init_scale", "model.embedding_std")
    if model.uses("mamba") or model.uses("mamba_moe"):
        _validate_mamba("mamba", config)
    if model.uses("mamba2"):
        _validate_mamba("mamba2", config)
    if model.uses("attention"):
        heads = model.attention.num_heads
        at_least(config, 1, "model.attention.num_heads")
        fitting = [h for h in range(1, model.d_model + 1) if model.d_model % h == 0 and (model.d_model // h) % 2 == 0]
        require(
            heads in fitting,
            f"model.attention.num_heads={heads} must divide model.d_model={model.d_model} into heads of even width; "
            f"set it to one of {', '.join(map(str, fitting)) or 'none: make model.d_model even'}",
        )
        require(
            model.attention.rope_base > 1,
            f"model.attention.rope_base={model.attention.rope_base} must be over 1; raise it",
        )
    if model.uses("mlp"):
        at_least(config, 1, "model.mlp.d_ff")
        one_of("model.mlp.activation", model.mlp.activation, config_lib.ACTIVATIONS)
    experts.validate_projections(model)
    if model.has_experts:
        experts.validate(model.moe, config)


def _validate_mamba(kind: str, config: config_lib.Config) -> None:
    mamba, path = get(config, f"model.{kind}"), f"model.{kind}"
    at_least(config, 1, f"{path}.d_state", f"{path}.d_conv")
    at_least(config, 0 if kind == "mamba" else 1, f"{path}.chunk_size")
    inner = int(mamba.expand * config.model.d_model)
    require(inner >= 1, f"{path}.expand={mamba.expand} leaves no inner channel; raise it")
    require(
        1e-4 <= mamba.dt_min <= mamba.dt_max,  # 1e-4 is the floor of Mamba's reference code
        f"{path}.dt_min={mamba.dt_min} must lie between 0.0001 and dt_max={mamba.dt_max}; change it",
    )
    if kind == "mamba":
        at_least(config, 0, "model.mamba.dt_rank")
        one_of("model.mamba.scan", mamba.scan, tuple(config_lib.SCANS))
        most = config_lib.SCAN_STATES.get(mamba.scan, mamba.d_state)
        require(
            mamba.d_state <= most,
            f"model.mamba.d_state={mamba.d_state} is over the {most} states that model.mamba.scan={mamba.scan} can "
            "hold; lower it, or set scan=auto",
        )
        return
    one_of("model.mamba2.scan", mamba.scan, ("auto", "chunked", "quadratic", "reference"))
    require(
        0 < mamba.A_min <= mamba.A_max < math.inf,
        f"model.mamba2.A_min={mamba.A_min} must be positive and at most A_max={mamba.A_max}, both finite; change it",
    )
    for field, whole, what in (
        ("d_head", inner, f"inner width of {inner} (expand * d_model)"),
        ("num_groups", inner // max(1, mamba.d_head), "{} heads (inner width over d_head)"),
    ):
        size, fitting = getattr(mamba, field), [n for n in range(1, whole + 1) if whole % n == 0]
        require(
            size in fitting,
            f"model.mamba2.{field}={size} does not divide the {what.format(whole)}; "
            f"set it to one of {', '.join(map(str, fitting))}",
        )


def validate_causal(config: config_lib.Config) -> None:
    """What reads the future may not predict it."""
    model, objective = config.model, config.data.objective
    require(
        model.causal or objective != "next_token",
        "model.causal=False would let the model read the tokens that it predicts with data.objective=next_token; "
        "set model.causal=True",
    )
    if not (model.causal and model.has_experts):
        return
    router = model.moe.router
    require(
        config_lib.ROUTERS[router].causal,
        f"model.moe.router={router} chooses among all tokens of a group, so in a causal model a token's output would "
        "depend on the tokens it predicts; use top_k, switch or sigmoid_bias, or an encoder (model.causal=False)",
    )
    require(
        model.moe.capacity_order != "priority",
        "model.moe.capacity_order=priority gives slots to the most certain tokens of a group, so in a causal model a "
        "token's output would depend on later tokens; use capacity_order=tokens, or an encoder (model.causal=False)",
    )
