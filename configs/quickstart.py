"""A small MoE-Mamba on Wikipedia lead sections, for a laptop.

The shape is that of MoE-Mamba (arXiv 2401.04081): Mamba and Switch layers in turn. The size is chosen so that two
CPU cores train it in under four minutes; it reproduces no figure of the paper.
"""

from moejax import config


def get_config() -> config.Config:
    """The quickstart."""
    c = config.Config()
    c.model.d_model = 192
    c.model.period = ("mamba", "moe")
    c.model.num_periods = 3
    c.model.vocab_size = 2048
    c.model.moe.num_experts = 8
    c.model.moe.d_expert = 384
    c.data.vocab_size = 2048
    c.data.seq_length = 256
    c.data.batch_size = 16
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 30
    c.training.num_steps = 300
    c.training.ema_alpha = 0.05
    c.training.eval_every = 100
    c.checkpoint.every = 100
    return c
