"""The models of Switch Transformers (arXiv 2101.03961) and the T5 models beside them, a name each:
--config=configs/switch.py:NAME.

Quality is the log perplexity of span corruption on C4, in nats with the sign turned, by the paper: higher is better.
Parameters are ours (`moejax params`), with the embedding, active ones with the router. We have run none of these to the
end.

Table 9; parameters and FLOPs of a forward pass for a sequence, as printed and ours (matrix products, head included):

    name                printed    total                active            FLOPs    ours    at 250k    at 500k steps
    t5_base             0.2B             222,903,552       222,903,552    124B     142B    -1.599     -1.556
    t5_large            0.7B             737,668,096       737,668,096    425B     481B    -1.402     -1.350
    t5_xxl              11B           11,135,332,352    11,135,332,352    6.3T     7.0T    -1.147     -1.095
    switch_base_128     7B             7,415,217,408       224,083,200    124B     143B    -1.370     -1.306
    switch_large_128    26B           26,309,291,008       740,813,824    425B     483B    -1.248     -1.177
    switch_xxl          395B         394,675,073,024    11,147,915,264    6.3T     7.0T    -1.086     -1.008
    switch_c            1571B      1,571,375,798,688     1,795,152,288    890B     1.1T    -1.096     -1.043

In small (",mini", 3 seeds, validation loss after 2,000 steps): t5_base 4.636 ± 0.051, switch_base_128 4.636 ± 0.044,
0.000 apart (-0.161 to 0.160): not separated; 1.01 ± 0.14 times as fast to equal loss. After 600 steps with
--config.model.init_scale=1.0: 4.708 ± 0.018 and 4.726 ± 0.027, 0.017 behind (-0.016 to 0.050), not separated either.

Tables 6 to 8, distillation, have switch_base_N of other numbers of experts, too; the quality is that of Table 7:

    name               printed    total             active         quality
    switch_base_8      -             619,339,008    222,977,280    -
    switch_base_16     1.1B        1,072,397,568    223,051,008    -1.505
    switch_base_32     2.0B        1,978,514,688    223,198,464    -1.474
    switch_base_64     3.8B        3,790,748,928    223,493,376    -1.444
    switch_base_128    7.4B        7,415,217,408    224,083,200    -1.432
    switch_base_256    14.7B      14,664,154,368    225,262,848    -1.427

Table 1, after 100k steps (hours to -1.50 on 32 TPU v3 cores): capacity factor 2.0, 1.25 or 1.0, written 200, 125, 100.
MoE is top-2 (GShard), 7,415,217,408 parameters of which 280,706,304 are active; Mesh-TensorFlow does not multiply its
factor by the two choices, as ours is: it is half of it here. "plus" is 896 wide with 16 heads: 8,667,602,176 and
277,945,600. moe_base_top2_128 is moe_base_128_c125 for as long as t5_base.

    t5_base_100k            -1.731 (not reached)      switch_base_128_c200         -1.554 (72.8)
    t5_large_100k           -1.550 (131.1)            switch_base_128_c125         -1.553 (65.0)
    moe_base_128_c200       -1.547 (68.7)             switch_base_128_c100         -1.561 (62.8)
    moe_base_128_c125       -1.559 (80.7)             switch_base_128_plus_c100    -1.534 (67.6)
    moe_base_128_c100       -1.572 (80.1)

Table 2, precision, 32 experts, early in training: precision_float32 -1.718, precision_bfloat16 -3.780 (diverged),
precision_selective -1.716, the router alone in float32. Norms, the residual stream and the loss are in float32 here in
all of them, so that precision_bfloat16 is milder than the paper's. Table 3, the scale of the initialisers, 32 experts,
after 3,500 steps, 3 seeds: scale_small (0.1) -2.72 (deviation 0.01), scale_large (1.0) -3.60 (0.68). Table 11,
exploration, after an unstated number of steps; 32 experts and 100,000 steps are our choice: explore_argmax -1.471,
explore_sample -1.570, explore_dropout -1.480, explore_jitter -1.468.

Tables 2 and 3 in small (",mini", 3 seeds, validation loss after 300 steps, against precision_selective with a 95 %
interval): precision_selective, which is scale_small, 5.292 ± 0.038; precision_float32 5.292 ± 0.038, 0.000 (-0.001 to
0.001); precision_bfloat16 5.296 ± 0.039, 0.004 (-0.012 to 0.020), no run diverged; scale_large 4.921 ± 0.023, -0.371
(-0.514 to -0.227), where the paper has it 0.88 worse. At the first step the loss (in metrics.jsonl) is 9.7 to 10.0 with
scale_small and 7.6 to 7.7 with scale_large.

Recipe (the paper; T5X's and Mesh-TensorFlow's code for what it does not say):
- C4 in English; spans of 3 tokens on average replaced by one sentinel each, 15 % of the tokens; 512 tokens for the
  encoder, 114 for the decoder; 2^20 tokens a step, as 2,048 rows of 512. T5's 32,000 word pieces and 100 sentinels, in
  an embedding of 32,128: give the file, --config.data.tokenizer=sentencepiece:FILE. Rows are cut from the stream of
  all documents, so prepare the corpus first, as below.
- Adafactor with T5X's constants; learning rate 1 / sqrt(max(step, 10,000)). Z-loss 1e-4 of the vocabulary's softmax. No
  dropout before fine-tuning.
- RMSNorm before each layer and at the end of each stack, no biases, relative positions in 32 buckets up to 128, shared
  by the layers of a stack. Weights are normal with variance 0.1 / fan-in, cut at 2 deviations.
- One expert a token, the gate its probability; every other feed-forward layer of both stacks (Switch-C: all).
  Capacity factor 1.25 in training (C: 1.0) and 2.0 in evaluation (XXL: 4.0), in groups of 8,192 encoder tokens
  (large, XXL: 4,096; C: 2,048) and the decoder's of the same rows, rounded, at least 4 slots (XXL, C: 2). 0.01 times
  the load-balance loss of every layer; input jitter of 0.01; bfloat16 with the router in float32.

Where paper and code differ, and what gives the other reading:
- Base and Large have ReLU layers of 3,072 and 4,096 and a tied head, as released; Table 9 prints GEGLU layers of 2,048
  and 2,816: --config.model.mlp.activation=geglu --config.model.mlp.d_ff=2048, and the same of model.moe and d_expert.
- T5-Large has 739M in the paper's text, which neither of the two makes.
- XXL has 128 experts, which make the paper's 395B; its Table 9 prints 64, which make 201B.
- Switch-C has 32 heads as in Table 9; the released code has 30, and 1,571B either way.
- Losses of layers are added, as in Mesh-TensorFlow; T5X has their mean: --config.model.moe.layer_reduction=mean.
  Mesh-TensorFlow's schedule falls to 0 over the last tenth: --config.optimizer.linear_decay=0.1; its dropout is 0.1 by
  default: --config.model.dropout=0.1; and its capacity is rounded down in groups of 1,024:
  --config.model.moe.capacity_rounding=down --config.model.moe.group_size=1024. T5X has no jitter:
  --config.model.moe.jitter=0; and multiplies gradients of experts by the number of parts they are split into, which
  Adafactor's scaling takes out again. flaxformer draws routers with deviation 0.02; here it is sqrt(0.1 / width),
  0.0114 for Base.
- "plus" is said to go from 14 heads to 16, where Base has 12 in Table 9; here its 16 have 56 each, as 896 wide. With
  64, as all others have: --config.model.attention.d_head=64.
- C4 is version 2.2.0 there, 3.1.0 here.

Hardware and time by `moejax plan`, which compiles the whole row for a TPU slice: lower bounds by the chips' published
rates, nothing was timed on one; ms are a step of 2^20 tokens, chip-hours all 500,000 of them at least.

    name                slice        mesh                HBM a chip    compute    HBM    ICI ms    MFU     chip-hours
    t5_base             v5p:4x4x4    data=64             4.6 GiB       37         60     2         49 %    536
    t5_large            v5p:4x4x4    fsdp=64             5.7 GiB       125        153    16        66 %    1,361
    t5_xxl              v5p:8x8x8    fsdp=512            3.8 GiB       232        177    248       74 %    17,604
    switch_base_128     v5p:4x4x4    fsdp=4 expert=16    5.7 GiB       40         67     23        44 %    599
    switch_large_128    v5p:4x4x4    fsdp=4 expert=16    13.1 GiB      138        182    69        56 %    1,614
    switch_xxl          v5p:8x8x8    fsdp=8 expert=64    23.2 GiB      251        218    504       36 %    35,867
    switch_c            v5p:8x8x8    expert=512          40.0 GiB      69         155    29        19 %    11,039

NAME,finetune is its recipe for pairs of texts (section 4.1), JSON lines with input and target: dropout 0.1, 0.4 of the
experts' hidden units, learning rate 0.001, 16,000 steps. NAME,mini is the row in small: a third of the layers of an
eighth of the width, and an eighth of the experts, from 1 to 32, on text that needs no files: Wikipedia lead sections,
BPE of 1,024 tokens with its sentinels, 2,000 steps of 8 rows of 256; a fiftieth of the steps, as there, are at the
first rate. Both: NAME,mini,finetune.

    moejax data prepare --config=configs/switch.py --config.data.tokenizer=sentencepiece:FILE --output=c4
    moejax train --config=configs/switch.py:switch_base_128 --workdir=runs/switch_base \\
        --config.data.source=prepared:c4 --config.data.tokenizer=sentencepiece:FILE
    moejax train --config=configs/switch.py:switch_base_128,mini --workdir=runs/switch_mini
    moejax plan --config=configs/switch.py:switch_base_128 --topology=v5p:4x4x4 --config.mesh.expert=16
    moejax plan --config=configs/switch.py:switch_xxl --topology=v5p:8x8x8 --config.mesh.expert=64 \\
        --config.model.moe.group_size=2048
"""

import functools
from collections.abc import Callable

from moejax import config

DENSE = ("attention", "mlp")
SPARSE = ("attention", "moe")
MINI = 8  # a mini model is so many times narrower and has so many times fewer experts
MINI_STEPS, MINI_EXPERTS = 2000, 32


def t5_base() -> config.Config:
    """T5 1.0's Base: 12 layers a stack of width 768."""
    c = config.Config()
    c.model.d_model = 768
    c.model.attention.num_heads = 12
    c.model.attention.position = "relative"
    c.model.mlp.d_ff = c.model.moe.d_expert = 3072
    c.model.mlp.activation = c.model.moe.activation = "relu"
    _layers(c, DENSE, 12)
    c.model.vocab_size = 32_128
    c.model.norm_eps = 1e-6
    c.model.embedding_std = 1.0
    c.model.scale_tied_logits = True
    c.model.remat = "period"
    c.model.compute_dtype = "bfloat16"
    c.data.source = "tfds:c4/en:3.1.0"
    c.data.tokenizer = "sentencepiece:t5.model"
    c.data.objective = "span_corruption"
    c.data.packing = "concatenate"
    c.data.seq_length, c.data.batch_size = 512, 2048
    c.optimizer.name = "adafactor"
    c.optimizer.schedule = "inverse_sqrt"
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1.0, 10_000
    c.optimizer.weight_decay = c.optimizer.clip_norm = 0.0
    c.training.z_weight = 1e-4
    c.training.num_steps = 500_000
    c.training.eval_every, c.training.eval_batches = 1000, 20
    c.checkpoint.every = 1000
    return c


def t5_large() -> config.Config:
    """T5 1.0's Large: 24 layers a stack of width 1024."""
    c = t5_base()
    c.model.d_model = 1024
    c.model.attention.num_heads = 16
    c.model.mlp.d_ff = c.model.moe.d_expert = 4096
    _layers(c, DENSE, 24)
    return _sharded(c)


def short(row: Callable[[], config.Config] = t5_base) -> config.Config:
    """As far as Table 1 goes."""
    c = row()
    c.training.num_steps = 100_000
    return c


def t5_xxl() -> config.Config:
    """T5 1.1's XXL: 24 layers a stack of width 4096, GEGLU, the head not tied."""
    c = t5_large()
    c.model.d_model = 4096
    c.model.attention.num_heads, c.model.attention.d_head = 64, 64
    c.model.mlp.d_ff = c.model.moe.d_expert = 10_240
    c.model.mlp.activation = c.model.moe.activation = "geglu"
    c.model.tie_embeddings = c.model.scale_tied_logits = False
    return c


def switch_base(num_experts: int = 128) -> config.Config:
    """Experts in every other feed-forward layer of T5-Base."""
    return _switch(t5_base(), num_experts)


def switch_large_128() -> config.Config:
    """Experts in every other feed-forward layer of T5-Large."""
    c = _switch(t5_large(), 128)
    c.model.moe.group_size = 4096
    return c


def switch_xxl() -> config.Config:
    """Experts in every other feed-forward layer of T5-XXL."""
    c = _switch(t5_xxl(), 128)
    c.model.moe.eval_capacity_factor, c.model.moe.group_size, c.model.moe.min_capacity = 4.0, 4096, 2
    return c


def switch_c() -> config.Config:
    """2,048 experts in every feed-forward layer of 15 layers a stack."""
    c = _switch(t5_large(), 2048)
    c.model.d_model = 2080
    c.model.attention.num_heads, c.model.attention.d_head = 32, 64
    c.model.moe.d_expert = c.model.mlp.d_ff = 6144
    c.model.tie_embeddings = c.model.scale_tied_logits = False
    c.model.moe.capacity_factor, c.model.moe.group_size, c.model.moe.min_capacity = 1.0, 2048, 2
    _layers(c, SPARSE, 15)
    return c


def moe_base_top2_128() -> config.Config:
    """Switch-Base with two experts a token, as GShard has them."""
    c = switch_base()
    c.model.moe.router = "gshard"
    c.model.moe.capacity_factor /= 2
    c.model.moe.eval_capacity_factor /= 2
    return c


def table_1(factor: int = 125, *, row: Callable[[], config.Config] = switch_base, wide: bool = False) -> config.Config:
    """Base with 128 experts by its capacity factor in hundredths; wide: with 896 and 16 heads of 56."""
    c = short(row)
    c.model.moe.capacity_factor *= factor / 125
    if wide:
        c.model.d_model, c.model.attention.num_heads = 896, 16
    return c


def precision(compute: str = "bfloat16", router: str = "float32") -> config.Config:
    """Table 2: Base with 32 experts."""
    c = switch_base(32)
    c.model.compute_dtype, c.model.moe.router_dtype = compute, router
    c.training.num_steps = 3500
    return c


def scale(init_scale: float = 0.1) -> config.Config:
    """Table 3: Base with 32 experts."""
    c = precision()
    c.model.init_scale = init_scale
    return c


def explore(exploration: str = "jitter") -> config.Config:
    """Table 11: Base with 32 experts."""
    c = short(functools.partial(switch_base, 32))
    c.model.moe.exploration = exploration
    return c


def _layers(c: config.Config, encoder: tuple[str, ...], layers: int) -> None:
    """So many layers a stack, each of these branches, with cross attention in the decoder."""
    decoder = tuple(
        branch for one in encoder for branch in ((one, "cross_attention") if one == "attention" else (one,))
    )
    c.model.encoder_period, c.model.num_encoder_periods = encoder, layers * 2 // len(encoder)
    c.model.period, c.model.num_periods = decoder, c.model.num_encoder_periods


def _switch(c: config.Config, num_experts: int) -> config.Config:
    _layers(c, (*DENSE, *SPARSE), c.model.num_encoder_periods)
    moe = c.model.moe
    moe.router = "switch"
    moe.num_experts, moe.capacity_factor, moe.eval_capacity_factor = num_experts, 1.25, 2.0
    moe.group_size, moe.capacity_rounding, moe.min_capacity = 8192, "nearest", 4
    moe.layer_reduction = "sum"
    return _sharded(c)


def _sharded(c: config.Config) -> config.Config:
    c.mesh.data, c.mesh.fsdp = 1, -1
    return c


def _finetune(c: config.Config) -> config.Config:
    c.model.dropout = 0.1
    if c.model.has_experts:
        c.model.moe.expert_dropout = 0.4
    c.data.source, c.data.objective, c.data.packing = "files:pairs.jsonl", "text_to_text", "pad"
    c.data.text_field, c.data.target_field = "input", "target"
    c.optimizer.schedule, c.optimizer.learning_rate, c.optimizer.warmup_steps = "constant", 1e-3, 0
    c.training.num_steps, c.training.eval_every = 16_000, 200
    return c


def _mini(c: config.Config) -> config.Config:
    model = c.model
    model.d_model //= MINI
    model.attention.num_heads //= 4
    model.attention.d_head = 32 if model.attention.d_head else 0
    model.mlp.d_ff //= MINI
    model.moe.d_expert //= MINI
    model.moe.num_experts = min(MINI_EXPERTS, max(1, model.moe.num_experts // MINI))
    model.num_periods = model.num_encoder_periods = model.num_encoder_periods // 3
    model.remat = "none"
    model.vocab_size = c.data.vocab_size = 1024
    c.data.source, c.data.tokenizer = "wikipedia", "bpe"
    c.data.seq_length, c.data.batch_size = 256, 8
    model.moe.group_size = 256 * min(8, model.moe.group_size // 512)
    c.optimizer.warmup_steps = MINI_STEPS // 50  # 10,000 of 500,000
    c.optimizer.learning_rate = 0.01 * c.optimizer.warmup_steps**0.5  # 0.01 at first, as theirs
    c.training.num_steps = MINI_STEPS
    c.training.eval_every, c.training.eval_batches = 500, 0
    c.mesh = config.MeshConfig()
    return c


ROWS: dict[str, Callable[[], config.Config]] = {
    **{
        row.__name__: row
        for row in (t5_base, t5_large, t5_xxl, switch_large_128, switch_xxl, switch_c, moe_base_top2_128)
    },
    **{f"switch_base_{n}": functools.partial(switch_base, n) for n in (8, 16, 32, 64, 128, 256)},
    "t5_base_100k": short,
    "t5_large_100k": functools.partial(short, t5_large),
    **{f"switch_base_128_c{factor}": functools.partial(table_1, factor) for factor in (200, 125, 100)},
    **{
        f"moe_base_128_c{factor}": functools.partial(table_1, factor, row=moe_base_top2_128)
        for factor in (200, 125, 100)
    },
    "switch_base_128_plus_c100": functools.partial(table_1, 100, wide=True),
    "precision_float32": functools.partial(precision, "float32"),
    "precision_bfloat16": functools.partial(precision, "bfloat16", "bfloat16"),
    "precision_selective": precision,
    "scale_small": scale,
    "scale_large": functools.partial(scale, 1.0),
    **{f"explore_{how}": functools.partial(explore, how) for how in config.EXPLORATIONS},
}


def get_config(name: str = "switch_base_128") -> config.Config:
    """A row of a table by its name; with ",mini" after it, ",finetune", or ",mini,finetune"."""
    row, _, sizes = name.partition(",")
    if row not in ROWS or sizes not in ("", "mini", "finetune", "mini,finetune"):
        raise config.ConfigError(
            f"{name} is no row; write one of {', '.join(ROWS)}, with ,mini or ,finetune or ,mini,finetune after it or "
            "nothing"
        )
    c = ROWS[row]()
    if sizes.startswith("mini"):
        c = _mini(c)
    return _finetune(c) if sizes.endswith("finetune") else c
