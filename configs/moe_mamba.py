"""The models of MoE-Mamba's tables (arXiv 2401.04081), a name each, on C4: --config=configs/moe_mamba.py:NAME.

Parameters are counted without embedding and head, active ones with the router, as the paper does; ours (`moejax
params`) are the paper's to the last one where it or its code says them. Loss is the train log perplexity at the end
(ema_loss, in nats a token) by the paper. We have run none of these to the end.

Table 1 (with Tables 5 and 6); 150,000 steps of 64 rows, 9.83B tokens (25m), and 30,000 of 1,024, 31.5B (100m); FLOPs of
matrix products, embedding and head included; speed-up: steps of Mamba over its own to the same loss:

    name                    total            active         FLOPs      loss    speed-up
    mamba_25m                  27,131,904     27,131,904    3.1e18    3.34    1
    moe_mamba_25m             542,228,480     26,329,088    3.1e18    3.19    1.76
    transformer_moe_25m       545,406,976     25,313,280    3.5e18    3.23    1.56
    transformer_25m            25,202,688     25,202,688    3.5e18    3.43    "above 1" in print, at a worse loss
    mamba_100m                120,717,312    120,717,312    3.0e19    2.99    1
    moe_mamba_100m          2,439,069,696    117,522,432    2.9e19    2.81    2.35
    transformer_moe_100m    2,454,110,208    113,688,576    3.3e19    2.88    1.79

In small (",mini", 3 seeds, validation loss), with --config.training.num_steps=1001 and warmup_steps=10: mamba_25m 3.204
± 0.008, moe_mamba_25m 3.393 ± 0.000, transformer_25m 3.663 ± 0.003, transformer_moe_25m 3.784 ± 0.027. Each of
the three differs from mamba_25m (p < 0.001); the order is not the paper's, which is that after 4,800 times the tokens.
With Mamba's learning rate, --config.optimizer.learning_rate=0.004, moe_mamba_25m has 3.264 ± 0.005.

All others have 15,000 steps of 64 rows, 0.98B tokens, 3.0e17 to 3.2e17 FLOPs, as has Mamba without experts (mamba_1b),
whose loss is 3.72.

Table 2, experts_32 with active parameters divided otherwise between Mamba and experts, ratio_MAMBA_EXPERTS, and Mamba
alone, twice as wide and half as deep. The caption says 542M in all, which is the model of 42 experts; these are the
numbers of experts of the code. The losses are in a figure, but for ratio_6_0.

    ratio_1_5    403,067,928    25,580,568        ratio_4_2    420,938,776    26,674,200
    ratio_2_4    411,797,552    25,921,584        ratio_5_1    425,650,224    27,191,344
    ratio_3_3    416,358,400    26,288,128        ratio_6_0     27,123,712    27,123,712    3.73

Table 3, experts in the place of projections inside the Mamba block, in all 16 blocks, inner_PROJECTIONS_all, or in
every other one, inner_PROJECTIONS_alternate. A projection is a Switch layer of two-layer ReLU experts of width 352; all
of a block have 24 experts together, in every other block 48. The code has the settings of every other block alone; all
blocks have the same here, which the paper does not say.

    name                   all: total     active        loss    alternate: total    active        loss
    inner_conv             226,557,952    27,590,656    3.79    230,752,256         27,459,584    3.71
    inner_gate             226,557,952    27,590,656    3.89    230,752,256         27,459,584    3.70
    inner_out              226,754,560    27,787,264    4.05    230,948,864         27,656,192    3.70
    inner_conv_gate        218,169,344    27,852,800    3.95    226,557,952         27,590,656    3.72
    inner_conv_out         218,267,648    27,951,104    4.17    226,656,256         27,688,960    3.76
    inner_gate_out         218,267,648    27,951,104    4.16    226,656,256         27,688,960    3.88
    inner_conv_gate_out    209,846,272    28,180,480    4.39    222,429,184         27,787,264    3.88

Table 4, experts_N; Table 7, sequential_N and parallel_N (Mamba and experts side by side under one norm), which differ
from Table 4 by the capacity, see below, and by 0.01 in the paper's loss for 1, 4, 8 and 32 experts:

    experts      1             2             4             8              16             32
    total        26,161,152    38,748,160    63,922,176    114,270,208    214,966,272    416,358,400
    active       26,161,152    26,165,248    26,173,440     26,189,824     26,222,592     26,288,128
    Table 4      3.75          -             3.72          3.70           3.67           3.67
    speed-up     below 1       -             1.03          1.10           1.21           1.23
    sequential   3.76          3.74          3.71          3.69           3.67           3.66
    parallel     3.79          3.77          3.74          3.72           3.70           3.69

parallel_N has a norm less in each of 8 blocks: 8,192 parameters less. In small, 401 steps, 3 seeds: sequential_8 3.845
± 0.004, parallel_8 3.826 ± 0.003, better by 0.019 (0.012 to 0.025).

Recipe (Table 6, and the authors' code for what the paper does not say):
- C4 in English, GPT-2 tokens; documents drawn with replacement until all but the longest are more than a row, which
  begins anywhere in them and wraps around; documents of a row see one another; the loss counts every position.
- AdamW (0.9, 0.999, 1e-8) with weight decay 0.1 of every parameter, norms and biases too; clipping at 0.5; linear
  warmup over 1 %, (step + 1) / warmup of the peak, then cosine to a tenth, and one more step there, as in the code.
- Weights are normal with variance 0.1 / fan-in, cut at +-0.2, whatever the variance; the embedding's fan-in is 1; that
  of an expert's second matrix is that of all experts together. Mamba as in its package, without rescaling. LayerNorm
  before each layer, none before the head; embedding and head untied.
- Experts without biases, a dense layer with them, both ReLU. The gate is the probability; router in float32; capacity
  factor 1, rounded down; 0.01 times the load-balance loss, a mean over layers. bfloat16 otherwise, with the
  parameters, norms, the residual stream, Mamba's dt_bias, A_log and D and the scan in float32. No dropout, no jitter.
- Capacity is counted over the rows of one of their devices: 64 (25m, Table 2 and 4) or 32 (Tables 3 and 7, on two GPUs;
  here two microbatches on one device; on two, --config.training.num_microbatches=1). On more devices lower
  model.moe.group_size: a group never spans devices that rows are split over. The number of devices of 100m is not
  known: 4 rows are a group, so that 256 devices can share the batch.

Where paper and code differ, and what gives the other reading:
- Appendix A says that all learning rates of 100m were halved; Table 6, as here, that Transformer-MoE's was:
  --config.optimizer.learning_rate=2.5e-4 for moe_mamba_100m.
- The code has 37,500 steps of 256 rows for 100m, on 4 devices, with half the learning rates; Table 6, as here, 30,000
  of 1,024: --config.training.num_steps=37501 --config.optimizer.warmup_steps=375 --config.data.batch_size=256
  --config.model.moe.group_size=65536 (64 rows) --config.optimizer.learning_rate=2.5e-4 (Mamba: 5e-4).
- Tables 2 to 4 and 7 have no learning rate in the paper: 5e-4 as in the code, and 1e-3 without experts (mamba_1b) as in
  Table 6.
- Which tokens are dropped: in the code arbitrary ones, here the last of a group. Gradients are summed over devices in
  bfloat16 there, in float32 here; so is the residual stream, and attention is in float32 there, in bfloat16 here.
  --config.model.compute_dtype=float32 has all in float32.

NAME,mini is the same row a quarter as wide and as deep, with a quarter of the experts where their number is not what
the table varies (Tables 4 and 7), on text that needs no files: Wikipedia lead sections, BPE of 1,024 tokens, 2,000
steps of 8 rows of 256, in float32. The learning rate is 4 times the row's, as the width is a quarter of it. Its 8 rows
are as many groups as the row's 64 are (of 100m, a group each): on several devices lower
--config.model.moe.group_size, as above.

    moejax train --config=configs/moe_mamba.py:moe_mamba_25m --workdir=runs/moe_mamba_25m
    moejax train --config=configs/moe_mamba.py:moe_mamba_25m,mini --workdir=runs/moe_mamba_mini
    moejax plan --config=configs/moe_mamba.py:moe_mamba_100m --topology=v5p:4x4x4 \\
        --config.mesh.expert=2 --config.mesh.split_physical_axes=True
    moejax plan --config=configs/moe_mamba.py:moe_mamba_100m --topology=v5e:16x16 \\
        --config.model.moe.num_experts=64 --config.mesh.expert=16

An expert axis must divide the 42 experts: of powers of two that is 2, which is part of an axis of chips; 64 experts
take a whole one. What `moejax plan` says of them on v5p:4x4x4, 64 chips, and of 25m on v5p:2x2x1, 4 chips, with
--config.model.moe.group_size=16384 (16 rows): lower bounds by the chips' published rates, nothing was timed on one; ms
are a step of 2^20 tokens, of 25m 2^16, chip-hours all steps at least.

    name                    mesh                HBM a chip    compute    HBM    ICI ms    MFU     chip-hours
    mamba_25m               data=4              5.2 GiB       13         29     2         39 %    5
    moe_mamba_25m           data=4              11.5 GiB      13         38     18        29 %    6
    transformer_moe_25m     data=4              12.8 GiB      15         54     18        24 %    9
    transformer_25m         data=4              4.7 GiB       15         36     2         35 %    6
    mamba_100m              fsdp=64             6.7 GiB       40         84     4         40 %    45
    moe_mamba_100m          fsdp=32 expert=2    7.1 GiB       40         71     30        47 %    38
    transformer_moe_100m    fsdp=16 expert=4    7.2 GiB       45         110    19        34 %    59
"""

import functools
import itertools
from collections.abc import Callable

from moejax import config

EXPAND = {1: 0.6666666, 2: 1.3333333, 3: 2.0, 4: 2.6666666, 5: 3.3333333}  # Table 2, by Mamba's parts of 6, as in code
RATIO_EXPERTS = {1: 19, 2: 24, 3: 32, 4: 48, 5: 96}
MINI = 4  # a mini model is so many times narrower and shallower, and has so many times fewer experts
MINI_STEPS = 2000


def moe_mamba_25m() -> config.Config:
    """8 blocks of a Mamba layer and a Switch layer of 42 experts."""
    c = config.Config()
    c.model.d_model = 512
    c.model.period = ("mamba", "moe")
    c.model.num_periods = 8
    c.model.vocab_size = config.GPT2_VOCAB_SIZE
    c.model.norm = "layernorm"
    c.model.final_norm = False
    c.model.tie_embeddings = False
    c.model.init = "moe_mamba"
    c.model.rescale_out_proj = False
    c.model.remat = "period"
    c.model.compute_dtype = "bfloat16"
    c.model.moe.router = "switch"
    c.model.moe.jitter = 0.0
    c.model.moe.num_experts = 42
    c.model.moe.d_expert = 1536
    c.model.moe.capacity_factor = c.model.moe.eval_capacity_factor = 1.0
    c.model.moe.capacity_rounding = "down"
    c.model.moe.group_size = 64 * 1024
    c.data.source = "tfds:c4/en:3.1.0"
    c.data.tokenizer = "gpt2"
    c.data.packing = "sample"
    c.data.isolate_documents = False
    c.data.seq_length = 1024
    c.data.batch_size = 64
    c.optimizer.learning_rate = 5e-4
    c.optimizer.warmup_steps = 1500
    c.optimizer.beta2 = 0.999
    c.optimizer.weight_decay = 0.1
    c.optimizer.decay = "all"
    c.optimizer.clip_norm = 0.5
    c.optimizer.final_steps = 1
    c.training.num_steps = 150_000 + 1
    c.training.eval_every = 1000
    c.training.eval_batches = 10
    c.checkpoint.every = 500
    return c


def mamba_25m() -> config.Config:
    """16 Mamba layers."""
    return _mamba(moe_mamba_25m())


def transformer_moe_25m() -> config.Config:
    """8 blocks of attention with 8 heads and a Switch layer of 32 experts."""
    c = moe_mamba_25m()
    c.model.period = ("attention", "moe")
    c.model.attention.num_heads = 8
    c.model.moe.num_experts = 32
    c.model.moe.d_expert = 2048
    return c


def transformer_25m() -> config.Config:
    """8 blocks of attention with 8 heads and a dense layer with biases."""
    c = moe_mamba_25m()
    c.model.period = ("attention", "mlp")
    c.model.attention.num_heads = 8
    c.model.mlp.d_ff = 2048
    c.model.mlp.activation, c.model.mlp.bias = "relu", True
    return c


def moe_mamba_100m() -> config.Config:
    """16 blocks of a Mamba layer and a Switch layer of 42 experts."""
    return _100m(moe_mamba_25m())


def mamba_100m() -> config.Config:
    """32 Mamba layers."""
    return _100m(mamba_25m())


def transformer_moe_100m() -> config.Config:
    """16 blocks of attention with 12 heads and a Switch layer of 32 experts."""
    c = _100m(transformer_moe_25m())
    c.optimizer.learning_rate = 2.5e-4
    return c


def mamba_1b() -> config.Config:
    """Mamba without experts after 1B tokens, the first row of Tables 3 and 4."""
    return _1b(mamba_25m())


def experts(num_experts: int = 32) -> config.Config:
    """Table 4."""
    c = _1b(moe_mamba_25m())
    c.model.moe.num_experts = num_experts
    return c


def ratio(mamba: int = 3) -> config.Config:
    """Table 2; so many parts of 6 are Mamba's."""
    if mamba == 6:
        c = mamba_1b()
        c.optimizer.learning_rate = 5e-4
        c.model.num_periods = 8
        c.model.mamba.expand = 4.0
        return c
    c = experts(RATIO_EXPERTS[mamba])
    c.model.mamba.expand = EXPAND[mamba]
    c.model.moe.d_expert = 512 * (6 - mamba)
    return c


def inner(*projections: str, every: bool = False) -> config.Config:
    """Table 3; experts in these projections, in every block or in every other one."""
    projections = projections or ("gate",)
    c = _two_devices(experts(24 if every else 48))
    c.model.mamba.moe_projections = projections
    c.model.period = ("mamba_moe",) if every else ("mamba", "mamba_moe")
    c.model.num_periods = 16 // len(c.model.period)
    c.model.moe.num_experts //= len(projections)
    c.model.moe.d_expert = 352
    return c


def sequential(num_experts: int = 32) -> config.Config:
    """Table 7, Mamba and experts in turn."""
    return _two_devices(experts(num_experts))


def parallel(num_experts: int = 32) -> config.Config:
    """Table 7, Mamba and experts side by side."""
    c = sequential(num_experts)
    c.model.period = ("mamba|moe",)
    return c


def _mamba(c: config.Config) -> config.Config:
    """Mamba in the place of experts."""
    c.model.period, c.model.num_periods = ("mamba",), 2 * c.model.num_periods
    c.optimizer.learning_rate = 1e-3
    return c


def _100m(c: config.Config) -> config.Config:
    c.model.d_model = 768
    c.model.num_periods *= 2
    c.model.attention.num_heads = 12
    c.model.moe.d_expert = c.model.moe.d_expert * 3 // 2
    c.model.moe.group_size = 4 * 1024
    c.data.batch_size = 1024
    c.optimizer.warmup_steps = 300
    c.training.num_steps = 30_000 + 1
    c.mesh.data, c.mesh.fsdp = 1, -1
    return c


def _1b(c: config.Config) -> config.Config:
    c.optimizer.warmup_steps = 150
    c.training.num_steps = 15_000 + 1
    return c


def _two_devices(c: config.Config) -> config.Config:
    """Capacity as counted on two devices."""
    c.model.moe.group_size = c.data.batch_size // 2 * c.data.seq_length
    c.training.num_microbatches = 2
    return c


def _mini(c: config.Config, *, fewer_experts: bool) -> config.Config:
    rows = c.model.moe.group_size // c.data.seq_length * 8 // c.data.batch_size
    c.model.d_model //= MINI
    c.model.num_periods //= MINI
    c.model.attention.num_heads = max(1, c.model.attention.num_heads // MINI)
    c.model.mlp.d_ff //= MINI
    c.model.moe.d_expert //= MINI
    c.model.moe.num_experts = max(1, c.model.moe.num_experts // (MINI if fewer_experts else 1))
    c.model.remat, c.model.compute_dtype = "none", "float32"
    c.model.vocab_size = c.data.vocab_size = 1024
    c.data.source, c.data.tokenizer = "wikipedia", "bpe"
    c.data.seq_length, c.data.batch_size = 256, 8
    c.model.moe.group_size = max(1, rows) * 256
    c.optimizer.learning_rate *= MINI
    c.optimizer.warmup_steps = MINI_STEPS // 100
    c.training.num_steps = MINI_STEPS + 1
    c.training.eval_every, c.training.eval_batches = 500, 0
    return c


_INNER = [names for size in (1, 2, 3) for names in itertools.combinations(config.MAMBA_PROJECTIONS, size)]
_NAMED = (mamba_25m, moe_mamba_25m, transformer_moe_25m, transformer_25m, mamba_100m, moe_mamba_100m)
ROWS: dict[str, Callable[[], config.Config]] = {
    **{row.__name__: row for row in (*_NAMED, transformer_moe_100m, mamba_1b)},
    **{f"experts_{n}": functools.partial(experts, n) for n in (1, 4, 8, 16, 32)},
    **{f"ratio_{parts}_{6 - parts}": functools.partial(ratio, parts) for parts in (*EXPAND, 6)},
    **{f"inner_{'_'.join(names)}_all": functools.partial(inner, *names, every=True) for names in _INNER},
    **{f"inner_{'_'.join(names)}_alternate": functools.partial(inner, *names) for names in _INNER},
    **{f"sequential_{n}": functools.partial(sequential, n) for n in (1, 2, 4, 8, 16, 32)},
    **{f"parallel_{n}": functools.partial(parallel, n) for n in (1, 2, 4, 8, 16, 32)},
}


def get_config(name: str = "moe_mamba_25m") -> config.Config:
    """A row of a table by its name; with ",mini" after it, in small."""
    row, _, size = name.partition(",")
    if row not in ROWS or size not in ("", "mini"):
        raise config.ConfigError(
            f"{name} is no row; write one of {', '.join(ROWS)}, or one of them with ,mini after it"
        )
    varied = row.startswith(("experts", "sequential", "parallel"))
    return _mini(ROWS[row](), fewer_experts=not varied) if size else ROWS[row]()
