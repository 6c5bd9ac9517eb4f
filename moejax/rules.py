"""The rules that every config keeps: types, ranges, and what fields mean to one another. Imports no jax."""

import dataclasses
import math
import typing
from typing import Any

from moejax import config as config_lib


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise config_lib.ConfigError(message)


def _one_of(path: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{path}={value} is not known; choose one of {', '.join(allowed)}")


def _at_least(config: config_lib.Config, minimum: float, *paths: str) -> None:
    for path in paths:
        value = _get(config, path)
        _require(
            math.isfinite(value) and value >= minimum,
            f"{path}={value} must be {minimum} or more, and finite; change it",
        )


def _positive(config: config_lib.Config, *paths: str) -> None:
    for path in paths:
        _require(0 < _get(config, path) < math.inf, f"{path}={_get(config, path)} must be positive; raise it")


def _get(config: config_lib.Config, path: str) -> Any:
    """The value of a field by its dotted path."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def validate(config: config_lib.Config) -> None:
    """Checks every rule that a field or a pair of fields must keep; raises ConfigError at the first that is broken.

    The error is one line: field, value, rule, remedy.
    """
    _check_types(config)
    _validate_model(config.model)
    _validate_data(config)
    _validate_causal(config.model, config)
    _validate_labels(config)
    _validate_training(config)


def _validate_model(model: config_lib.ModelConfig) -> None:
    config = config_lib.Config(model=model)
    for part in ("prefix", "period", "suffix"):
        for sublayer in getattr(model, part):
            for branch in sublayer.split("|"):
                _one_of(f"model.{part}", branch, config_lib.BRANCHES)
    _at_least(config, 1, "model.vocab_size", "model.d_model")
    _at_least(config, 0, "model.num_periods")
    _require(bool(model.sublayers), "model has no sublayers; set model.period and model.num_periods, or model.prefix")
    _one_of("model.norm", model.norm, ("rmsnorm", "layernorm"))
    _one_of("model.init", model.init, ("switch", "moe_mamba"))
    _at_least(config, 1, "model.num_softmaxes")
    _one_of("model.remat", model.remat, ("none", "period"))
    _one_of("model.compute_dtype", model.compute_dtype, ("float32", "bfloat16"))
    _positive(config, "model.norm_eps", "model.init_scale", "model.embedding_std")
    if model.uses("mamba"):
        mamba = model.mamba
        _at_least(config, 1, "model.mamba.d_state", "model.mamba.d_conv", "model.mamba.chunk_size")
        _at_least(config, 0, "model.mamba.dt_rank")
        inner = int(mamba.expand * model.d_model)
        _require(inner >= 1, f"model.mamba.expand={mamba.expand} leaves no inner channel; raise it")
        _require(
            1e-4 <= mamba.dt_min <= mamba.dt_max,  # 1e-4 is the floor of Mamba's reference code
            f"model.mamba.dt_min={mamba.dt_min} must lie between 0.0001 and dt_max={mamba.dt_max}; change it",
        )
        _one_of("model.mamba.scan", mamba.scan, tuple(config_lib.SCANS))
    if model.uses("attention"):
        heads = model.attention.num_heads
        _at_least(config, 1, "model.attention.num_heads")
        fitting = [h for h in range(1, model.d_model + 1) if model.d_model % h == 0 and (model.d_model // h) % 2 == 0]
        _require(
            heads in fitting,
            f"model.attention.num_heads={heads} must divide model.d_model={model.d_model} into heads of even width; "
            f"set it to one of {', '.join(map(str, fitting)) or 'none: make model.d_model even'}",
        )
        _require(
            model.attention.rope_base > 1,
            f"model.attention.rope_base={model.attention.rope_base} must be over 1; raise it",
        )
    if model.uses("mlp"):
        _at_least(config, 1, "model.mlp.d_ff")
        _one_of("model.mlp.activation", model.mlp.activation, config_lib.ACTIVATIONS)
    if model.uses("moe"):
        _validate_moe(model.moe, config)


# Settings of model.moe that only some routers read.
_READ_BY = {
    "jitter": ("switch",),
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


def _validate_moe(moe: config_lib.MoeConfig, config: config_lib.Config) -> None:
    _one_of("model.moe.router", moe.router, tuple(config_lib.ROUTERS))
    router, choices = config_lib.ROUTERS[moe.router], moe.num_choices
    _at_least(config, 1, "model.moe.num_experts", "model.moe.d_expert", "model.moe.slots_per_expert")
    _at_least(config, 0, "model.moe.top_k", "model.moe.num_shared_experts", "model.moe.group_size")
    remedy = f"raise num_experts to {choices}" if router.fixed else f"set top_k to {moe.num_experts} or less"
    _require(
        choices <= moe.num_experts,
        f"model.moe.top_k={choices} is more than model.moe.num_experts={moe.num_experts}; {remedy}",
    )
    for name, routers in _READ_BY.items():
        value = getattr(moe, name)
        _require(
            moe.router in routers or value == getattr(config_lib.MoeConfig(), name),
            f"model.moe.{name}={value} has no effect with router={moe.router}, only with {' and '.join(routers)}; "
            "leave it at its default",
        )
    _require(
        not (router.fixed and moe.top_k not in (0, router.top_k)),
        f"model.moe.top_k={moe.top_k} is not for router={moe.router}, which has its own number of experts a token; "
        "leave it at 0, or set router=top_k",
    )
    _one_of("model.moe.activation", moe.activation, config_lib.ACTIVATIONS)
    _one_of("model.moe.normalise_gates", moe.normalise_gates, ("none", "before", "after"))
    _require(
        moe.normalise_gates == "none" or moe.router in ("top_k", "gshard"),
        f"model.moe.normalise_gates={moe.normalise_gates} is not for router={moe.router}; set it to none",
    )
    normalised = moe.router in ("noisy_top_k", "sigmoid_bias") or (
        moe.router == "top_k" and moe.normalise_gates != "none"
    )
    _require(
        not (normalised and choices == 1 < moe.num_experts),
        f"model.moe.top_k=1 makes every gate of router={moe.router} the same whatever the router says, so that the "
        "language-model loss would never train it; set top_k to 2 or more"
        + (", or normalise_gates=none" if moe.router == "top_k" else ""),
    )
    _at_least(config, 0, "model.moe.capacity_factor", "model.moe.eval_capacity_factor", "model.moe.noise_epsilon")
    _at_least(config, 0, "model.moe.bias_rate", "model.moe.relu_coefficient", "model.moe.second_threshold")
    _positive(config, "model.moe.gate_scale")
    for path, minimum in (("model.moe.expert_dropout", 0), ("model.moe.jitter", 0)):
        _require(minimum <= _get(config, path) < 1, f"{path}={_get(config, path)} must lie in [0, 1); change it")
    _require(
        moe.relu_multiplier > 1,
        f"model.moe.relu_multiplier={moe.relu_multiplier} must be over 1 (ReMoE: 1.2); raise it",
    )
    _require(
        moe.router != "relu" or choices < moe.num_experts or moe.num_experts == 1,
        f"model.moe.top_k={choices} asks router=relu for every expert, which its loss can't bring about; lower it",
    )
    _validate_dispatch(moe, router)
    if moe.router in ("group_limited", "sigmoid_bias"):
        _at_least(config, 1, "model.moe.num_groups", "model.moe.top_groups")
        _require(
            moe.num_experts % moe.num_groups == 0,
            f"model.moe.num_groups={moe.num_groups} does not divide model.moe.num_experts={moe.num_experts}; "
            "change one of them",
        )
        _require(
            moe.top_groups <= moe.num_groups,
            f"model.moe.top_groups={moe.top_groups} is more than model.moe.num_groups={moe.num_groups}; lower it",
        )
        reachable = moe.top_groups * (moe.num_experts // moe.num_groups)
        _require(
            choices <= reachable,
            f"model.moe.top_k={choices} is more than the {reachable} experts of model.moe.top_groups={moe.top_groups} "
            "groups; lower it or raise top_groups",
        )
    if moe.router == "hash":
        _require(
            moe.hash_table in ("random", "balanced") or moe.hash_table.endswith(".npy"),
            f"model.moe.hash_table={moe.hash_table} is not known; choose random, balanced or a FILE.npy",
        )
    _one_of("model.moe.layer_reduction", moe.layer_reduction, ("mean", "sum"))
    for name in config_lib.MOE_LOSSES:
        weight = getattr(moe, f"{name}_weight")
        _require(
            0 <= weight < math.inf or weight == -1,
            f"model.moe.{name}_weight={weight} must be 0 or more, and finite, or -1 for the router's own; change it",
        )
        _require(
            name in router.losses or weight in (-1, 0),
            f"model.moe.{name}_weight={weight} has no effect with router={moe.router}; set it to -1",
        )


def _validate_dispatch(moe: config_lib.MoeConfig, router: config_lib.Router) -> None:
    _one_of("model.moe.dispatch", moe.dispatch, ("auto", "capacity", "dropless"))
    _one_of("model.moe.grouped_matmul", moe.grouped_matmul, ("auto", "blocked", "ragged_dot"))
    _one_of("model.moe.capacity_order", moe.capacity_order, ("auto", "tokens", "choices", "priority"))
    _require(
        router.sparse or moe.dispatch == "auto",
        f"model.moe.dispatch={moe.dispatch} is not for router={moe.router}, which dispatches no token; set it to auto",
    )
    _require(
        moe.grouped_matmul == "auto" or moe.dispatch != "capacity",
        f"model.moe.grouped_matmul={moe.grouped_matmul} has no effect with dispatch=capacity; set it to auto",
    )
    _require(
        router.sparse or moe.expert_dropout == 0,
        f"model.moe.expert_dropout={moe.expert_dropout} is not for router={moe.router}, which dispatches no token; "
        "set it to 0",
    )
    _require(
        moe.router != "expert_choice" or moe.dispatch != "dropless",
        "model.moe.dispatch=dropless is not for router=expert_choice, whose experts each take as many tokens as their "
        "capacity; set it to auto",
    )
    _require(
        moe.router != "expert_choice" or (moe.capacity_factor > 0 and moe.eval_capacity_factor > 0),
        "model.moe.capacity_factor=0 would let each expert of router=expert_choice take every token; "
        "set both capacity factors above 0 (arXiv 2202.09368: 2)",
    )


def _validate_causal(model: config_lib.ModelConfig, config: config_lib.Config) -> None:
    """What reads the future may not predict it."""
    objective = config.data.objective
    _require(
        model.causal or objective != "next_token",
        "model.causal=False would let the model read the tokens that it predicts with data.objective=next_token; "
        "set model.causal=True",
    )
    if not (model.causal and model.uses("moe")):
        return
    router = model.moe.router
    _require(
        config_lib.ROUTERS[router].causal,
        f"model.moe.router={router} chooses among all tokens of a group, so in a causal model a token's output would "
        "depend on the tokens it predicts; use top_k, switch or sigmoid_bias, or an encoder (model.causal=False)",
    )
    _require(
        model.moe.capacity_order != "priority",
        "model.moe.capacity_order=priority gives slots to the most certain tokens of a group, so in a causal model a "
        "token's output would depend on later tokens; use capacity_order=tokens, or an encoder (model.causal=False)",
    )


def _validate_labels(config: config_lib.Config) -> None:
    data, kind = config.data, config.data.source.partition(":")[0]
    _require(
        data.label in ("", "folder") or (data.label.startswith("field:") and len(data.label) > len("field:")),
        f"data.label={data.label} is not known; write field:NAME, folder, or leave it empty for the corpus's own",
    )
    if config.model.uses("moe") and config.model.moe.router == "label":
        _require(
            kind in config_lib.CORPORA or (data.label != "" and kind != "prepared"),
            f"model.moe.router=label needs a label for each document, and data.source={data.source} has none; "
            "set data.label=field:NAME or folder, or use a source with labels (wikipedia has topics)",
        )


def _validate_data(config: config_lib.Config) -> None:
    data = config.data
    for path, source in (("data.source", data.source), ("data.validation_source", data.validation_source)):
        kind, _, rest = source.partition(":")
        if path == "data.validation_source" and not source:
            continue
        _one_of(path, kind, config_lib.SOURCES)
        _require(
            bool(rest) == (kind not in config_lib.CORPORA),
            f"{path}={source} is not complete; write files:PATTERN, tfds:NAME/CONFIG:VERSION, prepared:FOLDER, "
            f"or one of {', '.join(config_lib.CORPORA)}",
        )
    _require(
        not (data.validation_source and data.source.startswith("prepared:")),
        "data.validation_source has no effect with data.source=prepared:FOLDER, which has its own; leave it empty",
    )
    kind, _, rest = data.tokenizer.partition(":")
    _one_of("data.tokenizer", kind, config_lib.TOKENIZERS)
    _require(
        bool(rest) or kind not in ("sentencepiece", "hf"),
        f"data.tokenizer={data.tokenizer} names no file; write {kind}:FILE",
    )
    _require(
        not rest or kind not in ("bpe", "bytes"),
        f"data.tokenizer={data.tokenizer} takes nothing after the colon; write {kind}",
    )
    _require(
        not data.end_of_text or kind == "hf",
        f"data.end_of_text={data.end_of_text} has no effect with data.tokenizer={data.tokenizer}; leave it empty",
    )
    _one_of("data.objective", data.objective, ("next_token", "span_corruption"))
    _one_of("data.packing", data.packing, ("best_fit", "concatenate", "sample", "pad"))
    _at_least(config, 2, "data.seq_length")
    _at_least(config, 1, "data.batch_size")
    _at_least(config, 0, "data.num_workers", "data.validation_documents")
    for path, seed in (("data.seed", data.seed), ("training.seed", config.training.seed)):
        _require(0 <= seed < 2**31, f"{path}={seed} must lie in [0, 2^31); change it")
    for path in ("data.validation_fraction", "data.noise_density"):
        _require(0 < _get(config, path) < 1, f"{path}={_get(config, path)} must lie between 0 and 1; change it")
    _at_least(config, 1, "data.mean_span_length")
    if data.tokenizer == "bpe":
        minimum = config_lib.NUM_BYTES + 1
        _require(
            data.vocab_size >= minimum,
            f"data.vocab_size={data.vocab_size} must be {minimum} or more (256 bytes and end-of-text); raise it",
        )
    size = {"bpe": data.vocab_size, "bytes": config_lib.NUM_BYTES + 1, "gpt2": config_lib.GPT2_VOCAB_SIZE}.get(kind, 0)
    _require(
        config.model.vocab_size >= size,
        f"model.vocab_size={config.model.vocab_size} is below the {size} tokens of data.tokenizer={data.tokenizer}; "
        f"set it to {size} or more",
    )


def _validate_training(config: config_lib.Config) -> None:
    training, optimizer = config.training, config.optimizer
    _at_least(config, 1, "training.num_steps", "training.num_microbatches", "training.eval_every", "training.log_every")
    _at_least(config, 0, "training.eval_batches", "checkpoint.keep_every", "optimizer.warmup_steps")
    _at_least(config, 1, "checkpoint.every", "checkpoint.keep_last")
    _require(0 < training.ema_alpha <= 1, f"training.ema_alpha={training.ema_alpha} must lie in (0, 1]; change it")
    _require(
        config.data.batch_size % training.num_microbatches == 0,
        f"training.num_microbatches={training.num_microbatches} does not divide "
        f"data.batch_size={config.data.batch_size}; change one of them",
    )
    _at_least(config, 0, "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.clip_norm")
    for path in ("optimizer.beta1", "optimizer.beta2"):
        _require(0 <= _get(config, path) < 1, f"{path}={_get(config, path)} must lie in [0, 1); change it")
    _require(
        0 <= optimizer.final_fraction <= 1,
        f"optimizer.final_fraction={optimizer.final_fraction} must lie in [0, 1]; change it",
    )
    _positive(config, "optimizer.eps")
    _one_of("optimizer.decay", optimizer.decay, ("matrices", "all"))
    sizes = dataclasses.asdict(config.mesh)
    for name, size in sizes.items():
        _require(size >= 1 or size == -1, f"mesh.{name}={size} must be 1 or more, or -1 for the rest; change it")
    rest = [name for name, size in sizes.items() if size == -1]
    _require(
        len(rest) <= 1, f"mesh has -1 for {' and '.join(rest)}; one axis can be the rest: set the others to numbers"
    )


def _check_types(node: Any, path: str = "") -> None:
    for field, annotation in zip(dataclasses.fields(node), typing.get_type_hints(type(node)).values(), strict=True):
        value, name = getattr(node, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(annotation):
            _require(
                isinstance(value, typing.cast(type, annotation)),
                f"{name}={value!r} must be a {field.type}; set its fields",
            )
            _check_types(value, f"{name}.")
        elif typing.get_origin(annotation) is tuple:
            ok = isinstance(value, tuple) and all(isinstance(entry, str) for entry in value)
            _require(ok, f"{name}={value!r} must be a tuple of strings; write it as \"('a', 'b')\"")
        elif annotation is float:
            ok = isinstance(value, (int, float)) and not isinstance(value, bool)
            _require(ok, f"{name}={value!r} must be a float; change it")
            setattr(node, field.name, float(value))  # 1 and 1.0 are one setting
        else:
            ok = type(value) is annotation
            _require(ok, f"{name}={value!r} must be of type {getattr(annotation, '__name__', annotation)}; change it")
