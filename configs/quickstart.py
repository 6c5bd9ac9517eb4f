"""Quickstart: a small MoE-Mamba on Wikipedia lead sections, for two CPU cores and a few minutes.

The shape is MoE-Mamba's (arXiv 2401.04081, Figure 1): a Mamba layer and a Switch layer in turn. The size is ours, and
it reproduces no figure of the paper.

Model: 3 periods of mamba + moe, d_model 128, 8 experts of width 256; 2.06M parameters, 0.68M of them active.
Data: 10,033 lead sections (5.0 MB), byte-level BPE of 1,024 entries, 1.87M training tokens; 400 steps read 0.78M.
Expect: validation loss 3.68 nats/token (2.07 bits/byte), 0.32 below the bigram baseline of the same documents (4.00).

    moejax train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from moejax import config


def get_config() -> config.Config:
    """The quickstart."""
    c = config.Config()
    c.model.d_model = 128
    c.model.period = ("mamba", "moe")
    c.model.num_periods = 3
    c.model.vocab_size = 1024
    c.model.moe.num_experts = 8
    c.model.moe.d_expert = 256
    c.data.source = "wikipedia"
    c.data.vocab_size = 1024
    c.data.seq_length = 256
    c.data.batch_size = 8
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 30
    c.training.num_steps = 400
    c.training.ema_alpha = 0.05  # MoE-Mamba's 0.001 needs thousands of steps
    c.training.eval_every = 100
    c.training.log_every = 20
    c.checkpoint.every = 100
    return c
