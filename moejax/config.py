"""Every setting of a run, as nested dataclasses, and its way to JSON and back.

A config file under configs/ returns a `Config`; the command line overrides fields by their path
(`--config.model.moe.num_experts=32`), and `rules.validate` runs once after the overrides. Neither module imports jax,
so a launcher can read a config anywhere.
"""

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any

BRANCHES = ("mamba", "attention", "mlp", "moe")
NUM_BYTES = 256  # the byte tokenizer has these and one end-of-text token
GPT2_VOCAB_SIZE = 50_257
CORPORA = ("wikipedia", "docstrings")  # sources that need no files
SOURCES = (*CORPORA, "files", "tfds", "prepared")
TOKENIZERS = ("bpe", "bytes", "gpt2", "sentencepiece", "hf")


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
    """Documents, tokens and rows. Batch n is a pure function of (seed, n), whatever the number of hosts or workers."""

    source: str = (
        "wikipedia"  # wikipedia, docstrings, files:PATTERN[,PATTERN], tfds:NAME/CONFIG:VERSION, prepared:FOLDER
    )
    validation_source: str = ""  # held-out documents; "" = the source's own split, else a part of source
    validation_fraction: float = 0.05  # that part: a share of the documents, chosen by a hash of the text
    validation_documents: int = 4096  # held-out documents used at most, the first ones; 0 = all
    text_field: str = "text"  # the field of a record that holds the text
    tfds_dir: str = ""  # where tfds: looks; "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets
    tokenizer: str = "bpe"  # bpe (trained on the training documents), bytes, gpt2[:FOLDER], sentencepiece:FILE, hf:FILE
    end_of_text: str = ""  # tokenizer=hf: the token between documents; "" = the one of the usual names that it has
    vocab_size: int = 4096  # tokenizer=bpe: entries, end-of-text included
    packing: str = "best_fit"  # best_fit (whole documents), concatenate, sample (MoE-Mamba), pad (a document a row)
    isolate_documents: bool = True  # documents of a row do not see one another (convolution, state, attention)
    objective: str = "next_token"  # next_token, span_corruption (T5; for encoder-decoder models)
    noise_density: float = 0.15  # objective=span_corruption: share of the tokens that is replaced
    mean_span_length: float = 3.0  # objective=span_corruption: tokens a replaced span
    seq_length: int = 256  # L, tokens a row; objective=span_corruption: of the encoder
    batch_size: int = 16  # rows a step, over all devices
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


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`. An unknown field is a ConfigError; a missing one keeps its default."""
    config = Config()
    _fill(config, values, "")
    return config


def _fill(node: Any, values: dict[str, Any], path: str) -> None:
    known = {field.name for field in dataclasses.fields(node)}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{path}{name} is not a field of this version's config; remove it")
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
