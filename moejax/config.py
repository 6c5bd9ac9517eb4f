"""Every setting of a run, as nested dataclasses, and the rules that hold between them.

A config file under configs/ returns a `Config`; the command line overrides fields by their path
(`--config.model.moe.num_experts=32`). `validate()` runs once after the overrides and raises `ConfigError` with one
line: field, value, rule, remedy. This module imports no jax, so a launcher can read a config anywhere.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from typing import Any

BRANCHES = ("mamba", "attention", "mlp", "moe")
NUM_BYTES = 256  # the byte tokenizer has these and one end-of-text token


class ConfigError(ValueError):
    """A setting the user can mend; the message is one line with field, value, rule and remedy."""


@typing.dataclass_transform(kw_only_default=True)
def _config(cls):
    return dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)(cls)


@_config
class MambaConfig:
    """Mamba-1 (arXiv 2312.00752); the defaults are those of state-spaces/mamba."""

    expand: float = 2.0  # inner width I = int(expand * d_model)
    d_state: int = 16  # N, states a channel
    d_conv: int = 4  # W, taps of the causal convolution
    dt_rank: int = 0  # R, rank of the dt projection; 0 means ceil(d_model / 16)
    dt_min: float = 0.001  # dt at initialisation is log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1
    scan: str = "auto"  # auto, associative, reference
    chunk_size: int = 8  # tokens scanned associatively at a time; the state is carried between chunks


@_config
class AttentionConfig:
    """Causal multi-head attention with rotary positions (arXiv 2104.09864)."""

    num_heads: int = 8  # must divide d_model; the head width d_model / num_heads must be even
    rope_base: float = 10_000.0  # base of the rotary frequencies


@_config
class MlpConfig:
    """The dense feed-forward sublayer."""

    d_ff: int = 1024  # hidden width
    activation: str = "relu"  # relu, gelu, swiglu
    bias: bool = False


@_config
class MoeConfig:
    """Sparse mixture of expert MLPs (Switch Transformers, arXiv 2101.03961)."""

    num_experts: int = 8
    d_expert: int = 1024  # hidden width of one expert
    activation: str = "relu"  # relu, gelu, swiglu
    top_k: int = 1  # K, experts a token; a gate is the router's probability (1: the Switch router)
    capacity_factor: float = 1.25  # slots an expert has, over tokens * top_k / num_experts; 0 = never drop
    eval_capacity_factor: float = 2.0  # the same in evaluation (T5X: 2.0); generation never drops
    group_size: int = 0  # tokens among which capacity is counted; 0 = one row (data.seq_length)
    balance_weight: float = 0.01  # weight of the load-balance loss (Switch eq. 4), averaged over layers


@_config
class ModelConfig:
    """A decoder-only language model: prefix + period * num_periods + suffix, each entry a residual branch."""

    vocab_size: int = 4096  # V, at least the tokenizer's
    d_model: int = 256  # D
    prefix: tuple[str, ...] = ()  # sublayers before the periods, e.g. ("attention", "mlp")
    period: tuple[str, ...] = ("mamba", "moe")  # "mamba|moe" puts two branches in parallel under one norm
    num_periods: int = 4
    suffix: tuple[str, ...] = ()
    norm: str = "rmsnorm"  # rmsnorm, layernorm
    norm_eps: float = 1e-5
    final_norm: bool = True  # MoE-Mamba's reference code has none
    tie_embeddings: bool = True
    init_scale: float = 0.1  # s in sd = sqrt(s / fan_in), cut at 2 sd (Switch section 2.4)
    embedding_std: float = 0.02
    rescale_out_proj: bool = True  # Mamba's out_proj over sqrt(number of residual branches)
    remat: str = "none"  # none, period: recompute a period's activations in the backward pass
    compute_dtype: str = "float32"  # float32, bfloat16; router, norms, dt, A and the scan stay float32
    mamba: MambaConfig = dataclasses.field(default_factory=MambaConfig)
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    mlp: MlpConfig = dataclasses.field(default_factory=MlpConfig)
    moe: MoeConfig = dataclasses.field(default_factory=MoeConfig)

    @property
    def sublayers(self) -> tuple[str, ...]:
        """Every residual branch in depth order."""
        return (*self.prefix, *self.period * self.num_periods, *self.suffix)

    def uses(self, branch: str) -> bool:
        """Whether any sublayer has this branch."""
        return any(branch in sublayer.split("|") for sublayer in self.sublayers)


@_config
class DataConfig:
    """Documents, tokens and rows. Batch n is a pure function of (seed, n)."""

    source: str = "wikipedia"  # wikipedia, docstrings, text
    paths: tuple[str, ...] = ()  # source=text: files and folders
    tokenizer: str = "bpe"  # bpe (trained on the training documents), bytes
    vocab_size: int = 4096  # tokenizer=bpe: entries, end-of-text included
    seq_length: int = 256  # L, tokens a row
    batch_size: int = 16  # rows a step, over all devices
    validation_fraction: float = 0.05  # of the documents; chosen by a hash of the text
    seed: int = 42
    num_workers: int = 0  # Grain worker processes; 0 = threads in this process


@_config
class OptimizerConfig:
    """AdamW with linear warmup and cosine decay."""

    learning_rate: float = 1e-3  # the peak
    warmup_steps: int = 100
    final_fraction: float = 0.1  # the learning rate ends at this share of the peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: str = "matrices"  # matrices (weights of two dims and more, not A_log or embeddings), all
    clip_norm: float = 1.0  # global norm of the gradient; 0 = no clipping


@_config
class TrainingConfig:
    """The length of a run and what it writes."""

    num_steps: int = 1000
    seed: int = 0  # of the parameters at initialisation
    num_microbatches: int = 1  # a batch is run in this many parts, one after another
    ema_alpha: float = 0.001  # weight of the new loss in ema_loss (MoE-Mamba: 0.001)
    eval_every: int = 200  # steps between evaluations on the held-out split; the last step is always one
    eval_batches: int = 0  # batches an evaluation reads; 0 = the whole split
    log_every: int = 10  # steps between lines on a console that is not a terminal


@_config
class CheckpointConfig:
    """Checkpoints are written in the background and appear whole or not at all."""

    every: int = 100  # steps between checkpoints; the last step and a stop by signal always save
    keep_last: int = 2  # newest checkpoints kept
    keep_every: int = 0  # besides, keep each whose step is a multiple of this; 0 = none


@_config
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 for the rest."""

    data: int = -1  # rows are split over data, fsdp and expert
    fsdp: int = 1  # parameters are split over it and gathered where they are used
    expert: int = 1  # experts are split over it
    tensor: int = 1  # hidden widths are split over it


@_config
class Config:
    """A whole run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _one_of(path: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{path}={value} is not known; choose one of {', '.join(allowed)}")


def _at_least(config: Config, minimum: float, *paths: str) -> None:
    for path in paths:
        value = get(config, path)
        _require(
            math.isfinite(value) and value >= minimum,
            f"{path}={value} must be {minimum} or more, and finite; change it",
        )


def _positive(config: Config, *paths: str) -> None:
    for path in paths:
        _require(0 < get(config, path) < math.inf, f"{path}={get(config, path)} must be positive; raise it")


def get(config: Config, path: str) -> Any:
    """The value of a field by its dotted path."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def validate(config: Config) -> None:
    """Checks every rule that a field or a pair of fields must keep; raises ConfigError at the first that is broken."""
    _check_types(config)
    _validate_model(config.model)
    _validate_data(config)
    _validate_training(config)


def _validate_model(model: ModelConfig) -> None:
    config = Config(model=model)
    for part in ("prefix", "period", "suffix"):
        for sublayer in getattr(model, part):
            for branch in sublayer.split("|"):
                _one_of(f"model.{part}", branch, BRANCHES)
    _at_least(config, 1, "model.vocab_size", "model.d_model")
    _at_least(config, 0, "model.num_periods")
    _require(bool(model.sublayers), "model has no sublayers; set model.period and model.num_periods, or model.prefix")
    _one_of("model.norm", model.norm, ("rmsnorm", "layernorm"))
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
        _one_of("model.mamba.scan", mamba.scan, ("auto", "associative", "reference"))
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
        _one_of("model.mlp.activation", model.mlp.activation, ("relu", "gelu", "swiglu"))
    if model.uses("moe"):
        _validate_moe(model.moe, config)


def _validate_moe(moe: MoeConfig, config: Config) -> None:
    _at_least(config, 1, "model.moe.num_experts", "model.moe.top_k", "model.moe.d_expert")
    _require(
        moe.top_k <= moe.num_experts,
        f"model.moe.top_k={moe.top_k} is more than model.moe.num_experts={moe.num_experts}; "
        f"set top_k to {moe.num_experts} or less",
    )
    _one_of("model.moe.activation", moe.activation, ("relu", "gelu", "swiglu"))
    _at_least(config, 0, "model.moe.capacity_factor", "model.moe.eval_capacity_factor", "model.moe.group_size")
    _at_least(config, 0, "model.moe.balance_weight")


def _validate_data(config: Config) -> None:
    data = config.data
    _one_of("data.source", data.source, ("wikipedia", "docstrings", "text"))
    _require(
        data.source != "text" or bool(data.paths),
        "data.source=text needs data.paths; set it, e.g. --config.data.paths=\"('my_texts/',)\"",
    )
    _one_of("data.tokenizer", data.tokenizer, ("bpe", "bytes"))
    _at_least(config, 2, "data.seq_length")
    _at_least(config, 1, "data.batch_size")
    _at_least(config, 0, "data.num_workers")
    for path, seed in (("data.seed", data.seed), ("training.seed", config.training.seed)):
        _require(0 <= seed < 2**31, f"{path}={seed} must lie in [0, 2^31); change it")
    _require(
        0 < data.validation_fraction < 1,
        f"data.validation_fraction={data.validation_fraction} must lie between 0 and 1; change it",
    )
    if data.tokenizer == "bpe":
        minimum = NUM_BYTES + 1
        _require(
            data.vocab_size >= minimum,
            f"data.vocab_size={data.vocab_size} must be {minimum} or more (256 bytes and end-of-text); raise it",
        )
    size = data.vocab_size if data.tokenizer == "bpe" else NUM_BYTES + 1
    _require(
        config.model.vocab_size >= size,
        f"model.vocab_size={config.model.vocab_size} is below the {size} tokens of data.tokenizer={data.tokenizer}; "
        f"set it to {size} or more",
    )


def _validate_training(config: Config) -> None:
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
        _require(0 <= get(config, path) < 1, f"{path}={get(config, path)} must lie in [0, 1); change it")
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


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`. An unknown field is an error; a missing one keeps its default."""
    config = Config()
    _fill(config, values, "")
    validate(config)
    return config


def _fill(node: Any, values: dict[str, Any], path: str) -> None:
    known = {field.name for field in dataclasses.fields(node)}
    for name, value in values.items():
        _require(name in known, f"{path}{name} is not a field of this version's config; remove it")
        if isinstance(value, dict):
            _fill(getattr(node, name), value, f"{path}{name}.")
        else:
            setattr(node, name, tuple(value) if isinstance(value, list) else value)


def flatten(config: Config) -> dict[str, Any]:
    """Every leaf field by its dotted path, in order of declaration."""

    def leaves(values: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{path}{name}.")
            else:
                yield f"{path}{name}", value

    return dict(leaves(to_dict(config), ""))


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of every field that differs."""
    before, after = flatten(old), flatten(new)
    return [(path, before[path], after[path]) for path in before if before[path] != after[path]]
