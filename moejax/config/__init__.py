"""Every setting of a run, as nested dataclasses; `plain` is their way to JSON and back.

A config file under configs/ returns a `Config`; the command line overrides fields by their path
(`--config.model.moe.num_experts=32`), and `rules.validate` runs once after the overrides. Neither module imports jax,
so a launcher can read a config anywhere.
"""

import dataclasses
import math
import typing

from moejax.config import routers

BRANCHES = ("mamba", "mamba2", "mamba_moe", "attention", "cross_attention", "mlp", "moe")
MAMBA_PROJECTIONS = ("conv", "gate", "out")
NUM_BYTES = 256  # the byte tokenizer has these and one end-of-text token
NUM_SENTINELS = 100  # of a tokenizer that has none of its own (T5; extra_ids=100 of seqio.SentencePieceVocabulary)
GPT2_VOCAB_SIZE = 50_257
CORPORA = ("wikipedia", "docstrings")  # sources that need no files
SOURCES = (*CORPORA, "files", "tfds", "prepared")
TOKENIZERS = ("bpe", "bytes", "gpt2", "sentencepiece", "hf")


# Devices of an axis up to which exchange=auto is ragged: above 32 it has crashed on TPUs (openxla/xla#47283).
MAX_RAGGED = 32

# Implementations of Mamba's scan, and the platform that each needs; "" = any
SCANS = {"auto": "", "associative": "", "unrolled": "", "reference": "", "pallas_tpu": "tpu", "pallas_gpu": "gpu"}
SCAN_STATES = {"pallas_tpu": 128, "pallas_gpu": 64}  # states a channel that a kernel can hold on the chip
EXPLORATIONS = ("jitter", "dropout", "sample", "argmax")
ACTIVATIONS = ("relu", "gelu", "swiglu", "geglu")
GROUPED_MATMULS = ("auto", "blocked", "ragged_dot")
MOE_LOSSES = ("balance", "importance", "load", "z", "device", "communication", "sequence")
ROUTERS = routers.ROUTERS


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
    # one of SCANS; auto: pallas_tpu on TPU (up to 128 states), unrolled on CPU (chunks up to 32), else associative
    scan: str = "auto"
    # scan=unrolled, associative: tokens scanned at a time, the state carried on; 0 = d_state, but at least 8
    chunk_size: int = 0
    # Of "mamba_moe" sublayers: which of their projections are experts, with the settings of model.moe (MoE-Mamba's
    # Table 3): some of conv (to what is convolved and scanned), gate (to what gates it) and out. A "mamba" has none.
    moe_projections: tuple[str, ...] = ()


@_config
class Mamba2Config:
    """Mamba-2 (arXiv 2405.21060); the defaults are those of state-spaces/mamba."""

    expand: float = 2.0  # inner width I = int(expand * d_model)
    d_state: int = 128  # N, states a channel
    d_head: int = 64  # P, channels a head; must divide I. A head has one decay
    num_groups: int = 1  # G, groups of heads that share B and C; must divide the I / P heads
    d_conv: int = 4  # W, taps of the causal convolution
    dt_min: float = 0.001  # dt at initialisation is log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1
    A_min: float = 1.0  # -A at initialisation is uniform in [A_min, A_max]
    A_max: float = 16.0
    scan: str = "auto"  # auto, chunked, quadratic, reference
    chunk_size: int = 64  # tokens of a matrix product; the state is carried between chunks


@_config
class AttentionConfig:
    """Multi-head attention, of a stack to itself and of a decoder to its encoder."""

    num_heads: int = 8
    d_head: int = 0  # Q, width of a head; 0 = d_model / num_heads. Even, if position=rotary
    # rotary (arXiv 2104.09864); relative: a bias for each head and distance, one table for all layers of a stack (T5,
    # arXiv 1910.10683); none. Cross attention has none
    position: str = "rotary"
    rope_base: float = 10_000.0  # position=rotary: base of the frequencies
    num_buckets: int = 32  # position=relative: entries of the table; half of them for the future where that is seen
    max_distance: int = 128  # position=relative: distances from here on share the last bucket


@_config
class MlpConfig:
    """The dense feed-forward sublayer."""

    d_ff: int = 1024  # hidden width
    activation: str = "relu"  # relu, gelu, swiglu, geglu
    bias: bool = False


@_config
class MoeConfig:
    """Mixture of expert MLPs; each router is described in moejax/ops/routing.py, with its source.

    Every mixture of a model has these settings: those of "moe" sublayers, and those inside "mamba_moe" sublayers.
    """

    router: str = "top_k"  # one of ROUTERS
    num_experts: int = 8
    d_expert: int = 1024  # hidden width of one expert
    activation: str = "relu"  # relu, gelu, swiglu, geglu
    bias: bool = False  # in both matrices of an expert
    num_shared_experts: int = 0  # experts of width d_expert that every token goes through, beside the routed ones
    top_k: int = 0  # K, experts a token; relu: on average; 0 = the router's own (`num_choices`)
    # router=top_k: none, before (the gates of a token sum to 1), after (those of its choices that were not dropped);
    # router=gshard: none is before, as in its paper
    normalise_gates: str = "none"
    capacity_factor: float = 1.25  # slots an expert has, over tokens * top_k / num_experts; 0 = never drop
    eval_capacity_factor: float = 2.0  # the same in evaluation (T5X: 2.0); generation never drops
    capacity_rounding: str = "up"  # of slots to a whole number: up, down (MoE-Mamba's code, Mesh-TF), nearest (T5X)
    min_capacity: int = 1  # slots that an expert has at least (Mesh-TF, T5X: 4; T5X's XXL and C: 2)
    # who gets the slots: tokens (in their order), choices (first choices of all tokens first), priority (the tokens of
    # highest probability); auto: tokens, but choices for gshard in training
    capacity_order: str = "auto"
    # tokens among which capacity is counted; 0 = one row (data.seq_length). In an encoder-decoder of the encoder's: the
    # decoder counts among its tokens of the same rows
    group_size: int = 0
    # capacity; dropless: every choice is computed, capacity factors do not apply; auto: dropless for the routers whose
    # papers are (`Router`), and where the capacity factor is 0 if that is faster (ops/dispatch_rules.py)
    dispatch: str = "auto"
    grouped_matmul: str = "auto"  # dispatch=dropless: blocked, ragged_dot, auto: the faster as measured
    # dispatch=dropless, where mesh.expert splits experts: ragged (a choice is sent once; TPU, GPU), gather (every token
    # to all devices of the axis); auto: what sends less, and gather beyond MAX_RAGGED devices
    exchange: str = "auto"
    num_chunks: int = 1  # dispatch=capacity, there too: parts of the slots, one of which travels beside another's work
    expert_dropout: float = 0.0  # of hidden units of the routed experts, in training (Switch: 0.4 in fine-tuning)
    # router=switch, in training (Switch's Table 11): jitter of its input, dropout of it, sample: an expert by its
    # probability, argmax: the most probable, as in evaluation
    exploration: str = "jitter"
    jitter: float = 0.01  # exploration=jitter: the router's input is multiplied by uniform [1 - j, 1 + j] (Mesh-TF)
    router_dropout: float = 0.1  # exploration=dropout: share of the router's input that is left out (Mesh-TF)
    router_dtype: str = "float32"  # bfloat16: logits, probabilities and gates too, as in Switch's Table 2
    second_threshold: float = 0.2  # router=gshard: in training the second is used with probability gate / threshold
    noise_epsilon: float = 0.01  # router=noisy_top_k: the least standard deviation of the noise (Tensor2Tensor)
    num_groups: int = 4  # router=group_limited, sigmoid_bias: groups of experts (devices, in DeepSeek-V2)
    top_groups: int = 2  # router=group_limited, sigmoid_bias: groups that a token may choose from
    gate_scale: float = 1.0  # router=group_limited, sigmoid_bias: gates times this (DeepSeek-V2 16, V3 2.5)
    bias_rate: float = 0.001  # router=sigmoid_bias: what a step adds to or takes from an expert's bias
    slots_per_expert: int = 1  # router=soft_moe: slots of each expert in a group
    hash_table: str = "random"  # router=hash: random, balanced (by token frequency), or FILE.npy of vocab_size experts
    relu_coefficient: float = 1e-8  # router=relu: the coefficient of its loss at the start (ReMoE)
    relu_multiplier: float = 1.2  # router=relu: what a step multiplies or divides the coefficient by
    layer_reduction: str = "mean"  # auxiliary losses over the layers: mean (T5X, MoE-Mamba), sum (Mesh-TF)
    # Weights of the auxiliary losses (ops/balance.py) of the mean or sum over layers; -1 = as in the router's paper
    balance_weight: float = -1.0  # load balance (Switch eq. 4)
    importance_weight: float = -1.0  # squared coefficient of variation of the gates (Shazeer 2017, eq. 7)
    load_weight: float = -1.0  # and of the smooth load (Shazeer 2017, eq. 11)
    z_weight: float = -1.0  # router z-loss (ST-MoE eq. 5: 0.001)
    device_weight: float = -1.0  # balance over groups of experts (DeepSeek-V2 eq. 26)
    communication_weight: float = -1.0  # balance of what groups are sent (DeepSeek-V2 eq. 29)
    sequence_weight: float = -1.0  # load balance within each row (DeepSeek-V3 eq. 17)

    @property
    def num_choices(self) -> int:
        """K of this router: top_k, or its own where that is 0. relu, soft and expert_choice may use every expert."""
        return self.top_k or ROUTERS[self.router].top_k

    def is_dropless(self, factor: float, full_capacity: float) -> bool:
        """Whether tokens are sorted by expert at this capacity factor; else every expert has slots of its own.

        full_capacity: of `ops.dispatch_rules`, for dispatch=auto where nothing may be dropped.
        """
        router = ROUTERS[self.router]
        if self.dispatch != "auto" or not router.sparse or self.router == "expert_choice":
            return self.dispatch == "dropless"
        return router.dropless or (factor == 0 and self.num_experts > full_capacity * self.num_choices)

    def capacity(self, group_size: int, factor: float) -> int:
        """Slots an expert has in a group: factor * tokens * K / E, rounded, at most one a token (Switch eq. 3)."""
        if factor == 0:
            return group_size
        slots = factor * group_size * self.num_choices / self.num_experts
        match self.capacity_rounding:  # 1.1 * 100 / 11 is 10 slots, though not in binary
            case "up":
                whole = math.ceil(slots - 1e-9)
            case "down":
                whole = math.floor(slots + 1e-9)
            case _:
                whole = round(slots)
        return min(group_size, max(self.min_capacity, whole))

    def slot_order(self, train: bool) -> str:
        """capacity_order, resolved. Evaluation does not look ahead unless told to."""
        if self.capacity_order == "auto":
            return "choices" if self.router == "gshard" and train else "tokens"
        return self.capacity_order

    def loss_weights(self) -> dict[str, float]:
        """The auxiliary losses that this router trains with, by name, and their weights; none that is 0."""
        own = ROUTERS[self.router].losses
        given = {name: getattr(self, f"{name}_weight", -1.0) for name in own}
        weights = {name: own[name] if weight == -1 else weight for name, weight in given.items()}
        return {name: weight for name, weight in weights.items() if weight}


@_config
class ModelConfig:
    """A language model: prefix + period * num_periods + suffix, each entry a residual branch.

    With an encoder_period it is an encoder-decoder (T5): the encoder is encoder_period * num_encoder_periods and looks
    both ways; the above is the decoder, whose sublayers may be "cross_attention". All else is the same for both.
    """

    causal: bool = True  # False: an encoder alone, whose attention looks both ways
    vocab_size: int = 4096  # V, at least the tokenizer's
    d_model: int = 256  # D
    prefix: tuple[str, ...] = ()  # sublayers before the periods, e.g. ("attention", "mlp")
    period: tuple[str, ...] = ("mamba", "moe")  # "mamba|moe" puts two branches in parallel under one norm
    num_periods: int = 4
    suffix: tuple[str, ...] = ()
    encoder_period: tuple[str, ...] = ()  # e.g. ("attention", "mlp", "attention", "moe"); (): no encoder
    num_encoder_periods: int = 0
    norm: str = "rmsnorm"  # rmsnorm, layernorm
    norm_eps: float = 1e-5
    final_norm: bool = True  # MoE-Mamba's reference code has none
    tie_embeddings: bool = True
    scale_tied_logits: bool = False  # tie_embeddings: the head's input over sqrt(d_model) (T5 1.0)
    num_softmaxes: int = 1  # over 1: the head is a mixture of so many softmaxes (arXiv 1711.03953)
    init: str = "switch"  # switch (cut at 2 sd, section 2.4), moe_mamba (cut at +-2 init_scale, as its code)
    init_scale: float = 0.1  # s in sd = sqrt(s / fan_in)
    embedding_std: float = 0.02  # init=switch; moe_mamba has fan_in 1 instead
    rescale_out_proj: bool = True  # Mamba's out_proj over sqrt(number of residual branches)
    # in training: of embeddings, attention probabilities, hidden units of mlp, outputs of branches and of the final
    # norm (T5); hidden units of experts have moe.expert_dropout
    dropout: float = 0.0
    remat: str = "none"  # none, period: recompute a period's activations in the backward pass
    compute_dtype: str = "float32"  # float32, bfloat16; router, norms, dt, A and the scan stay float32
    mamba: MambaConfig = dataclasses.field(default_factory=MambaConfig)
    mamba2: Mamba2Config = dataclasses.field(default_factory=Mamba2Config)
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    mlp: MlpConfig = dataclasses.field(default_factory=MlpConfig)
    moe: MoeConfig = dataclasses.field(default_factory=MoeConfig)

    @property
    def sublayers(self) -> tuple[str, ...]:
        """Every residual branch in depth order; of an encoder-decoder, those of the decoder."""
        return (*self.prefix, *self.period * self.num_periods, *self.suffix)

    @property
    def has_encoder(self) -> bool:
        """Whether it is an encoder-decoder."""
        return bool(self.encoder_period)

    def encoder(self) -> "ModelConfig":
        """The encoder of an encoder-decoder, as an encoder alone."""
        return dataclasses.replace(
            self,
            causal=False,
            prefix=(),
            period=self.encoder_period,
            num_periods=self.num_encoder_periods,
            suffix=(),
            encoder_period=(),
            num_encoder_periods=0,
        )

    def uses(self, branch: str) -> bool:
        """Whether any sublayer, of the encoder too, has this branch."""
        return any(branch in sublayer.split("|") for sublayer in (*self.encoder_period, *self.sublayers))

    @property
    def has_experts(self) -> bool:
        """Whether any sublayer is or holds a mixture of experts, so that the settings of model.moe matter."""
        return self.uses("moe") or self.uses("mamba_moe")


@_config
class DataConfig:
    """Documents, tokens and rows. Batch n is a pure function of (seed, n), whatever the number of hosts or workers."""

    # wikipedia, docstrings, files:PATTERN[,PATTERN], tfds:NAME/CONFIG:VERSION, prepared:FOLDER
    source: str = "wikipedia"
    validation_source: str = ""  # held-out documents; "" = the source's own split, else a part of source
    validation_fraction: float = 0.05  # that part: a share of the documents, chosen by a hash of the text
    validation_documents: int = 4096  # held-out documents used at most, the first ones; 0 = all
    text_field: str = "text"  # the field of a record that holds the text; objective=text_to_text: the input
    target_field: str = ""  # objective=text_to_text: the field that holds the target
    label: str = ""  # a document's label: field:NAME of its record, folder (of its file); "" = the corpus's own, if any
    labels: tuple[str, ...] = ()  # the labels there are, in order; () = those of the training documents, sorted
    tfds_dir: str = ""  # where tfds: looks; "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets
    tokenizer: str = "bpe"  # bpe (trained on the training documents), bytes, gpt2[:FOLDER], sentencepiece:FILE, hf:FILE
    end_of_text: str = ""  # tokenizer=hf: the token between documents; "" = the one of the usual names that it has
    # tokenizer=bpe: entries, end-of-text included, and the NUM_SENTINELS of objective=span_corruption
    vocab_size: int = 4096
    packing: str = "best_fit"  # best_fit (whole documents), concatenate, sample (MoE-Mamba), pad (a document a row)
    isolate_documents: bool = True  # documents of a row do not see one another (convolution, state, attention)
    objective: str = "next_token"  # next_token; for encoder-decoder models span_corruption (T5), text_to_text
    noise_density: float = 0.15  # objective=span_corruption: share of the tokens that is replaced
    mean_span_length: float = 3.0  # objective=span_corruption: tokens a replaced span
    seq_length: int = 256  # L, tokens a row; of an encoder-decoder, of the encoder
    target_length: int = 0  # objective=text_to_text: M, tokens of the decoder; 0 = seq_length
    batch_size: int = 16  # rows a step, over all devices
    seed: int = 42
    num_workers: int = 0  # Grain worker processes; 0 = threads in this process


@_config
class AdafactorConfig:
    """Adafactor (arXiv 1804.04235); the defaults are T5X's. Its momentum, which T5 does not use, is left out."""

    decay_rate: float = 0.8  # step t keeps 1 - t^-decay_rate of the mean squares, t from 1
    eps: float = 1e-30  # added to squares of gradients
    clip_rms: float = 1.0  # root mean square that a matrix's update is scaled down to; 0 = no clipping
    scale_by_parameter: bool = True  # an update is times the root mean square of its matrix,
    min_scale: float = 1e-3  # but at least times this
    min_factored_dim: int = 128  # a matrix with a dim below this keeps the mean square of each of its weights


@_config
class OptimizerConfig:
    """The rule of the update, and the learning rate of each step."""

    name: str = "adamw"  # adamw, adafactor; decay, weight_decay and clip_norm mean the same for both
    learning_rate: float = 1e-3  # the peak; schedule=inverse_sqrt: what is divided by sqrt(max(step, warmup_steps))
    # cosine (to final_fraction of the peak), constant, inverse_sqrt (T5's, steps counted from 0)
    schedule: str = "cosine"
    warmup_steps: int = 100  # linear to the peak; schedule=inverse_sqrt: steps at its first rate (T5: 10,000)
    final_fraction: float = 0.1  # schedule=cosine: the learning rate ends at this share of the peak
    final_steps: int = 0  # schedule=cosine: updates at the end that keep the final learning rate
    linear_decay: float = 0.0  # schedule=inverse_sqrt, constant: share of the steps, at the end, in a line to 0
    beta1: float = 0.9  # name=adamw: this and the next two
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # a step takes so much of a weight, times the learning rate
    decay: str = "matrices"  # matrices (weights of two dims and more, not A_log or embeddings), all
    clip_norm: float = 1.0  # global norm of the gradient; 0 = no clipping (as T5X)
    adafactor: AdafactorConfig = dataclasses.field(default_factory=AdafactorConfig)


@_config
class TrainingConfig:
    """The length of a run and what it writes."""

    num_steps: int = 1000
    seed: int = 0  # of the parameters at initialisation
    init_from: str = ""  # folder of a run whose newest parameters, and tokenizer, this one starts from (fine-tuning)
    num_microbatches: int = 1  # a batch is run in this many parts, one after another
    z_weight: float = 0.0  # of the mean square of the log of the vocabulary softmax's normaliser (T5X: 1e-4)
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
    """Devices along each mesh axis; one of them may be -1 for the rest. TPU slices are parts of `data`."""

    data: int = -1  # rows are split over data, fsdp and expert
    fsdp: int = 1  # parameters are split over it and gathered where they are used
    expert: int = 1  # experts are split over it
    # the positions of a row are split over it, and gathered by MoE layers to route; must divide data.seq_length
    sequence: int = 1
    tensor: int = 1  # hidden widths are split over it
    split_physical_axes: bool = False  # TPU: whether an axis may take part of an axis of chips


@_config
class Config:
    """A whole run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
