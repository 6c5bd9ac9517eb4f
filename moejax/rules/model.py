"""Rules of config.model, but for its experts."""

import dataclasses
import math

from moejax import config as config_lib
from moejax.rules import experts
from moejax.rules.checks import at_least, get, one_of, positive, require


def validate(model: config_lib.ModelConfig) -> None:
    config = config_lib.Config(model=model)
    for part in ("prefix", "period", "suffix", "encoder_period"):
        for sublayer in getattr(model, part):
            for branch in sublayer.split("|"):
                one_of(f"model.{part}", branch, config_lib.BRANCHES)
    at_least(config, 1, "model.vocab_size", "model.d_model")
    at_least(config, 0, "model.num_periods", "model.num_encoder_periods")
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
    require(0 <= model.dropout < 1, f"model.dropout={model.dropout} must lie in [0, 1); change it")
    require(
        model.tie_embeddings or not model.scale_tied_logits,
        "model.scale_tied_logits=True has no effect with model.tie_embeddings=False; change one of them",
    )
    _validate_encoder(model)
    if model.uses("attention") or model.uses("cross_attention"):
        _validate_attention(model, config)
    if model.uses("mlp"):
        at_least(config, 1, "model.mlp.d_ff")
        one_of("model.mlp.activation", model.mlp.activation, config_lib.ACTIVATIONS)
    experts.validate_projections(model)
    if model.has_experts:
        experts.validate(model.moe, config)


def _validate_encoder(model: config_lib.ModelConfig) -> None:
    given = f"model.encoder_period={model.encoder_period}"
    require(
        bool(model.encoder_period) == bool(model.num_encoder_periods),
        f"{given} with model.num_encoder_periods={model.num_encoder_periods} is half an encoder; set both for an "
        "encoder-decoder, or neither",
    )
    require(
        model.has_encoder or not model.uses("cross_attention"),
        "model.period has cross_attention, but there is no encoder to look at; set model.encoder_period and "
        "model.num_encoder_periods, or use attention",
    )
    if not model.has_encoder:
        return
    encoder = model.encoder()
    require(
        not encoder.uses("cross_attention"),
        f"{given} has cross_attention, which is for the decoder; use attention there",
    )
    for branch in ("mamba", "mamba2", "mamba_moe"):
        require(
            not encoder.uses(branch),
            f"{given} has {branch}, which reads from left to right alone: the early tokens of a text would be read "
            "without the later ones; use attention there (the decoder may have it)",
        )
    require(
        "cross_attention" in "|".join(model.sublayers).split("|"),
        f"{given} is an encoder that nothing reads; put cross_attention into model.period",
    )
    require(
        model.causal,
        "model.causal=False is for an encoder alone, and the decoder of an encoder-decoder predicts its next token; "
        "set model.causal=True",
    )
    require(
        model.num_softmaxes == 1,
        f"model.num_softmaxes={model.num_softmaxes} is for models without an encoder; set it to 1",
    )
    require(
        not (model.has_experts and model.moe.router == "label"),
        "model.moe.router=label needs a label for each token, and rows of an encoder-decoder have none; use hash",
    )


def _validate_attention(model: config_lib.ModelConfig, config: config_lib.Config) -> None:
    attention, d_model = model.attention, model.d_model
    heads, path = attention.num_heads, "model.attention"
    at_least(config, 1, f"{path}.num_heads")
    at_least(config, 0, f"{path}.d_head")
    one_of(f"{path}.position", attention.position, ("rotary", "relative", "none"))
    multiple, what = (2, "heads of even width") if attention.position == "rotary" else (1, "heads")
    if attention.d_head == 0:
        fitting = [h for h in range(1, d_model + 1) if d_model % h == 0 and (d_model // h) % multiple == 0]
        require(
            heads in fitting,
            f"{path}.num_heads={heads} must divide model.d_model={d_model} into {what}; "
            f"set it to one of {', '.join(map(str, fitting)) or 'none: make model.d_model even'}",
        )
    require(
        attention.d_head % multiple == 0,
        f"{path}.d_head={attention.d_head} must be even for position=rotary; change one of them",
    )
    require(attention.rope_base > 1, f"{path}.rope_base={attention.rope_base} must be over 1; raise it")
    if attention.position != "relative":
        return
    looks_ahead = model.has_encoder or not model.causal
    least = 4 if looks_ahead else 2  # half of a direction's buckets have one distance each
    require(
        attention.num_buckets >= least and attention.num_buckets % least == 0,
        f"{path}.num_buckets={attention.num_buckets} must be a multiple of {least}; T5 has 32",
    )
    require(
        attention.max_distance > attention.num_buckets // 2,
        f"{path}.max_distance={attention.max_distance} must be over num_buckets/2={attention.num_buckets // 2}, the "
        "distances that a decoder has one bucket each for; raise it (T5: 128)",
    )


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


def validate_objective(config: config_lib.Config) -> None:
    """Whether the model is one for what data.objective makes of documents."""
    model, data = config.model, config.data
    encoder_decoder = data.objective != "next_token"
    require(
        not (model.has_encoder and not encoder_decoder),
        f"model.encoder_period={model.encoder_period} makes an encoder-decoder, and data.objective={data.objective} "
        "has rows for a decoder alone; set data.objective=span_corruption or text_to_text, or model.encoder_period=() "
        "and model.num_encoder_periods=0",
    )
    require(
        not encoder_decoder or model.has_encoder or not model.causal,
        f"data.objective={data.objective} has rows for an encoder-decoder, and the model is a decoder alone; set "
        "model.encoder_period, model.num_encoder_periods and a cross_attention in model.period, or "
        "data.objective=next_token",
    )
    group, length = model.moe.group_size, data.seq_length
    require(
        not (model.has_encoder and model.has_experts) or group % length == 0,
        f"model.moe.group_size={group} is not a multiple of data.seq_length={length}: in an encoder-decoder a group is "
        "whole rows, the same in both stacks; set it to 0 (one row) or a multiple",
    )


def validate_trainable(config: config_lib.Config) -> None:
    """What `validate` lets pass for the sake of its rows and layers, but has no objective."""
    require(
        config.model.causal,
        "model.causal=False is an encoder alone, for which there is no objective to train it on; set "
        "model.causal=True, or give the model a decoder (model.encoder_period)",
    )


def validate_causal(config: config_lib.Config) -> None:
    """What reads the future may not predict it."""
    model, objective = config.model, config.data.objective
    require(
        model.causal or objective != "next_token",
        "model.causal=False would let the model read the tokens that it predicts with data.objective=next_token; "
        "set model.causal=True",
    )
    decoder = dataclasses.replace(model, encoder_period=(), num_encoder_periods=0)
    if not (model.causal and decoder.has_experts):
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
