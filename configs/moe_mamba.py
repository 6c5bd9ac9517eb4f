"""MoE-Mamba's main models (arXiv 2401.04081, Tables 1, 5 and 6): a Mamba layer and a Switch layer in turn, on C4.

Expected train log perplexity (ema_loss, in nats a token) at the end, by the paper's Table 1, where parameters are
counted without embedding and head, and active ones with the router; ours are the same to the last one
(`moejax params`). We have not run these to the end.

    name             total            active        tokens    log perplexity    steps saved against Mamba
    moe_mamba_25m    542,228,480      26,329,088     9.83B    3.19              1.76 times
    moe_mamba_100m   2,439,069,696    117,522,432    31.5B    2.81              2.35 times

Data: C4, GPT-2 tokens, rows that begin anywhere in a document and whose documents see one another, as in the authors'
code. Hyperparameters are those of Table 6: warmup 1 %, cosine to a tenth, weight decay 0.1 of every parameter, clipping
at 0.5; the code adds beta2 0.999, capacity factor 1, auxiliary weight 0.01 and the mean of it over layers.
Cost: 150,000 steps of 64 rows (25m) and 30,000 of 1,024 rows (100m), of 1,024 tokens.
Capacity: counted over all 64 rows of 25m, which the authors ran on one GPU: on more devices lower model.moe.group_size,
as a group never spans devices that rows are split over. Over 4 rows of 100m, of whose run they do not give the number
of devices: up to 256 devices can share its batch. Which tokens are dropped differs: theirs are arbitrary ones, ours the
last of a group.
Mesh: one device (25m), or fully sharded over all (100m). An expert axis must divide the 42 experts: of powers of two
that is 2, which is part of an axis of chips; 64 experts take a whole one.

    moejax train --config=configs/moe_mamba.py:moe_mamba_25m --workdir=runs/moe_mamba_25m
    moejax plan --config=configs/moe_mamba.py:moe_mamba_100m --topology=v5p:4x4x4 \\
        --config.mesh.expert=2 --config.mesh.split_physical_axes=True
    moejax plan --config=configs/moe_mamba.py:moe_mamba_100m --topology=v5e:16x16 \\
        --config.model.moe.num_experts=64 --config.mesh.expert=16
"""

from moejax import config

NAMES = ("moe_mamba_25m", "moe_mamba_100m")


def get_config(name: str = "moe_mamba_25m") -> config.Config:
    """One of the two models."""
    if name not in NAMES:
        raise ValueError(f"{name} is not known; write {' or '.join(NAMES)}")
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
    c.training.num_steps = 150_000
    c.training.eval_every = 1000
    c.training.eval_batches = 10
    c.checkpoint.every = 500
    if name == "moe_mamba_100m":
        c.model.d_model = 768
        c.model.num_periods = 16
        c.model.moe.d_expert = 2304
        c.model.moe.group_size = 4 * 1024
        c.data.batch_size = 1024
        c.optimizer.warmup_steps = 300
        c.training.num_steps = 30_000
        c.mesh.data, c.mesh.fsdp = 1, -1
    return c
