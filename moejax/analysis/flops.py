"""The matrix products of a training step, in closed form from the config alone.

Two FLOPs (a product and a sum) for each weight and token that meet; a backward pass has twice those of its forward
pass. Work of the vector units (norms, depthwise convolutions, the scan of Mamba-1) is not counted.
"""

import math
from typing import NamedTuple

from moejax import config as config_lib

BACKWARD = 2  # over the forward pass: the gradients of both factors of each product


class Flops(NamedTuple):
    """Of a step over all devices.

    useful: of the model, with experts on the tokens that chose them: what MFU is counted by. executed: with the empty
    slots of experts and what `model.remat` computes twice.
    """

    useful: float
    executed: float


def training_step(config: config_lib.Config) -> Flops:
    """The FLOPs of one step of this config."""
    model, tokens = config.model, config.data.batch_size * config.data.seq_length

    def forward(sublayers: tuple[str, ...], *, slots: bool) -> float:
        branches = [branch for sublayer in sublayers for branch in sublayer.split("|")]
        return tokens * sum(_branch(branch, config, slots=slots) for branch in branches)

    head = tokens * 2.0 * model.d_model * model.vocab_size
    if model.num_softmaxes > 1:  # each has a projection and logits of its own
        head = model.num_softmaxes * (head + tokens * 2.0 * model.d_model * (model.d_model + 1))
    periods = model.period * model.num_periods
    again = forward(periods, slots=True) if model.remat == "period" else 0.0
    if model.num_softmaxes > 1:
        again += head  # one after another, recomputed in the backward pass
    return Flops(
        useful=(1 + BACKWARD) * (forward(model.sublayers, slots=False) + head),
        executed=(1 + BACKWARD) * (forward(model.sublayers, slots=True) + head) + again,
    )


def _branch(branch: str, config: config_lib.Config, *, slots: bool) -> float:
    """FLOPs of the forward pass for each token of the batch. slots: with experts' empty slots."""
    model, D = config.model, config.model.d_model
    match branch:
        case "mamba" | "mamba_moe":
            m = model.mamba
            inner, rank = int(m.expand * D), m.dt_rank or math.ceil(D / 16)
            weights = 2.0 * (inner * (rank + 2 * m.d_state) + rank * inner)
            for name, d_in, d_out in (("conv", D, inner), ("gate", D, inner), ("out", inner, D)):
                is_moe = branch == "mamba_moe" and name in m.moe_projections
                weights += _experts(config, d_in, d_out, slots=slots) if is_moe else 2.0 * d_in * d_out
            return weights
        case "mamba2":
            m = model.mamba2
            inner = int(m.expand * D)
            heads, states, chunk = inner // m.d_head, m.d_state, min(m.chunk_size, config.data.seq_length)
            projections = D * (2 * inner + 2 * m.num_groups * states + heads) + inner * D
            # of a chunk: scores, sums of decays, scores times values; of a token: the state read and written
            products = m.num_groups * states * chunk + heads * chunk * chunk + inner * chunk + 2 * inner * states
            return 2.0 * (projections + products)
        case "attention":
            return 2.0 * (4 * D * D + 2 * config.data.seq_length * D)  # all pairs, those behind the mask too
        case "mlp":
            return 2.0 * _ffn(D, model.mlp.d_ff, D, model.mlp.activation)
        case "moe":
            return _experts(config, D, D, slots=slots)
    raise ValueError(f"no such branch: {branch}")


def _ffn(d_in: int, hidden: int, d_out: int, activation: str) -> int:
    """Weights; a gated activation has two columns a hidden unit."""
    return hidden * (d_in * (2 if activation in ("swiglu", "geglu") else 1) + d_out)


def _experts(config: config_lib.Config, d_in: int, d_out: int, *, slots: bool) -> float:
    """Of a mixture, for each token."""
    moe = config.model.moe
    expert = 2.0 * _ffn(d_in, moe.d_expert, d_out, moe.activation)
    shared = moe.num_shared_experts * expert
    group = moe.group_size or config.data.seq_length
    if moe.router == "soft_moe":
        num_slots = moe.num_experts * moe.slots_per_expert
        return 2.0 * 3 * d_in * num_slots + expert * num_slots / group + shared  # logits, mixtures in and out
    router = {"hash": 0, "label": 0, "noisy_top_k": 2}.get(moe.router, 1) * 2.0 * d_in * moe.num_experts
    if moe.router == "soft":
        return router + expert * moe.num_experts * (4 / 3 if slots else 1) + shared  # recomputed one by one
    per_token = float(moe.num_choices)
    is_dropless = moe.dispatch == "dropless" or (moe.dispatch == "auto" and config_lib.ROUTERS[moe.router].dropless)
    if slots and not is_dropless and moe.capacity_factor:
        capacity = math.ceil(moe.capacity_factor * group * moe.num_choices / moe.num_experts - 1e-9)
        per_token = moe.num_experts * max(1, min(group, capacity)) / group
    return router + expert * per_token + shared
