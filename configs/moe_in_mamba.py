"""MoE-Mamba's Table 3: experts inside the Mamba block (arXiv 2401.04081), in the place of its projections.

Any of the projections to the convolution (conv), to the gate (gate) and to the output (out) is a Switch layer of
two-layer ReLU experts of width 352. A block has 24 experts, divided among its projections, where every block has some,
and 48 where every other one has.

Expected log perplexity (ema_loss, in nats a token) after 1B tokens, by the paper:

    experts in       every block   every other block
    conv             3.79          3.71
    gate             3.89          3.70
    out              4.05          3.70
    conv_gate        3.95          3.72
    conv_out         4.17          3.76
    gate_out         4.16          3.88
    conv_gate_out    4.39          3.88

and 3.72 for a Mamba without experts, 3.67 for MoE-Mamba with 16 experts. The authors' repository has the settings of
every other block alone; we take the same for every block, which the paper does not say. We have not run these to the
end.

Model: 16 Mamba blocks, d_model 512. Without embedding and head, of 25.7M each: 27.5M to 28.2M active parameters of 210M
to 231M (gate in every other block: 230,752,256 and 27,459,584; `moejax params --config=configs/moe_in_mamba.py:gate`).
Data: C4, GPT-2 tokens, rows that begin anywhere in a document and whose documents see one another, as theirs.
Cost: 15,000 steps of 64 rows of 1,024 tokens: 0.98B tokens.
Capacity: counted over 32 rows, the share of one of the authors' two GPUs: two microbatches on one device; on two,
--config.training.num_microbatches=1. On more, lower model.moe.group_size: a group never spans devices that rows are
split over. Which tokens are dropped differs: theirs are arbitrary ones, ours the last of a group.

    moejax train --config=configs/moe_in_mamba.py:gate --workdir=runs/gate
    moejax train --config=configs/moe_in_mamba.py:conv_gate,all --workdir=runs/conv_gate_all
"""

import pathlib
import runpy

from moejax import config

_MAIN = runpy.run_path(str(pathlib.Path(__file__).with_name("moe_mamba.py")))  # the same recipe


def get_config(mode: str = "gate") -> config.Config:
    """Experts in these projections, joined by "_", of every other block; with ",all" after them, of every block."""
    names, _, blocks = mode.partition(",")
    if blocks not in ("", "all"):
        raise ValueError(f"{mode} is not known; write {names} for every other block, or {names},all")
    c = _MAIN["get_config"]("moe_mamba_25m")
    c.model.mamba.moe_projections = tuple(names.split("_"))
    c.model.period, num_experts = (("mamba_moe",), 24) if blocks else (("mamba", "mamba_moe"), 48)
    c.model.num_periods = 16 // len(c.model.period)
    c.model.moe.num_experts = num_experts // len(c.model.mamba.moe_projections)
    c.model.moe.d_expert = 352
    c.model.moe.group_size = 32 * 1024
    c.optimizer.warmup_steps = 150
    c.training.num_steps = 15_000
    c.training.num_microbatches = 2
    return c
