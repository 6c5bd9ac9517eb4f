"""The matrix products of a training step, in closed form from the config alone.

Two FLOPs (a product and a sum) for each weight and token that meet; a backward pass has twice those of its forward
pass. Work of the vector units (norms, depthwise convolutions, the scan of Mamba-1) is not counted.
"""

import math
from typing import NamedTuple

from moejax import config as config_lib
from moejax.data import corruption
from moejax.ops import dispatch_rules

BACKWARD = 2  # over the forward pass: the gradients of both factors of each product


class Flops(NamedTuple):
    """Of a step over all devices.

    useful: of the model, with experts on the tokens that chose them: what MFU is counted by. executed: with the empty
    slots of experts and what `model.remat` computes twice.
    """

    useful: float
    executed: float


class _Products(NamedTuple):
    """FLOPs for each token. forward: of the forward pass. fixed: those of them with a factor that has no gradient.
    again: computed a second time in the backward pass, by a checkpoint of the branch's own. last: the product that
    makes the output, where only what follows needs it. returned: the product whose result comes back from other
    devices where experts are split over several, and is kept (`expert_parallel.RECEIVED`).
    """

    forward: float
    fixed: float = 0.0
    again: float = 0.0
    last: float = 0.0
    returned: float = 0.0


def training_step(config: config_lib.Config, *, is_split: bool = False) -> Flops:
    """The FLOPs of one step of this config. is_split: experts lie on several devices."""
    rows, length, total = config.data.batch_size, config.data.seq_length, Flops(0.0, 0.0)
    group = config.model.moe.group_size or length
    stacks = [_Stack(config.model, length, 0, group)]
    if config.model.has_encoder:
        targets_length = corruption.row_lengths(config.data)[1]
        decoder = _Stack(config.model, targets_length, length, group // length * targets_length)
        stacks = [_Stack(config.model.encoder(), length, 0, group), decoder]
    for stack in stacks:
        one, tokens = _stack_step(stack, has_head=stack is stacks[-1], is_split=is_split), rows * stack.length
        total = Flops(total.useful + tokens * one.useful, total.executed + tokens * one.executed)
    return total


class _Stack(NamedTuple):
    """What the products of a stack depend on.

    memory: positions that cross attention looks at. group: tokens among which capacity is counted.
    """

    model: config_lib.ModelConfig
    length: int
    memory: int
    group: int


def _stack_step(stack: _Stack, *, has_head: bool, is_split: bool) -> Flops:
    """For each token."""
    model = stack.model

    def parts(sublayers: tuple[str, ...], *, slots: bool) -> list[_Products]:
        branches = [branch for sublayer in sublayers for branch in sublayer.split("|")]
        return [_branch(branch, stack, slots=slots) for branch in branches]

    head = _Products(2.0 * model.d_model * model.vocab_size if has_head else 0.0)
    if model.num_softmaxes > 1:  # each has a projection and logits of its own, one after another, not kept
        head = _Products(model.num_softmaxes * (head.forward + 2.0 * model.d_model**2))
        head = head._replace(forward=head.forward + 2.0 * model.d_model * model.num_softmaxes, again=head.forward)
    executed = 0.0
    for part in (*parts(model.sublayers, slots=True), head):
        executed += (1 + BACKWARD) * part.forward - part.fixed + part.again
    if model.remat == "period" and model.period:
        again = parts(model.period, slots=True)
        executed += model.num_periods * sum(part.forward - is_split * part.returned for part in again)
        executed -= model.num_periods * sum(part.last for part in parts(model.period[-1:], slots=True))
    useful = sum(part.forward for part in (*parts(model.sublayers, slots=False), head))
    return Flops(useful=(1 + BACKWARD) * useful, executed=executed)


def _branch(branch: str, stack: _Stack, *, slots: bool) -> _Products:
    """Of a branch. slots: with experts' empty slots."""
    model, D, length = stack.model, stack.model.d_model, stack.length
    width = model.attention.num_heads * (model.attention.d_head or D // model.attention.num_heads)  # of all heads
    match branch:
        case "mamba" | "mamba_moe":
            m = model.mamba
            inner, rank = int(m.expand * D), m.dt_rank or math.ceil(D / 16)
            forward, last = 2.0 * (inner * (rank + 2 * m.d_state) + rank * inner), 2.0 * inner * D
            returned = 0.0
            for name, d_in, d_out in (("conv", D, inner), ("gate", D, inner), ("out", inner, D)):
                if branch == "mamba_moe" and name in m.moe_projections:
                    part = _experts(stack, d_in, d_out, slots=slots)
                    forward, returned = forward + part.forward, returned + part.returned
                    last = 0.0 if name == "out" else last
                else:
                    forward += 2.0 * d_in * d_out
            return _Products(forward, last=last, returned=returned)
        case "mamba2":
            m = model.mamba2
            inner = int(m.expand * D)
            heads, out = inner // m.d_head, inner * D
            projections = D * (2 * inner + 2 * m.num_groups * m.d_state + heads) + out
            if m.scan == "reference":
                return _Products(2.0 * projections, last=2.0 * out)
            chunk = length if m.scan == "quadratic" else min(m.chunk_size, length)
            padded = -(-length // chunk) * chunk / length
            # of a chunk: scores, sums of decays (a triangle of ones times them), scores times values; of a token: the
            # state read and written
            scores, sums, values = m.num_groups * m.d_state * chunk, heads * chunk * chunk, inner * chunk
            read = written = inner * m.d_state
            if m.scan == "quadratic":
                return _Products(2.0 * (projections + scores + values + read + written), last=2.0 * out)
            return _Products(
                forward=2.0 * (projections + padded * (scores + sums + values + read + written)),
                fixed=2.0 * padded * sums,
                again=2.0 * padded * (scores + sums + read),
                last=2.0 * out,
            )
        case "attention":  # all pairs, those behind the mask too
            return _Products(2.0 * (4 * D * width + 2 * length * width), last=2.0 * D * width)
        case "cross_attention":  # keys and values are those of the memory's tokens
            memory_share = stack.memory / length
            forward = 2.0 * width * (2 * D + 2 * D * memory_share + 2 * stack.memory)
            return _Products(forward, last=2.0 * D * width)
        case "mlp":
            hidden = model.mlp.d_ff
            return _Products(2.0 * _ffn(D, hidden, D, model.mlp.activation), last=2.0 * hidden * D)
        case "moe":
            return _experts(stack, D, D, slots=slots)
    raise ValueError(f"no such branch: {branch}")


def _ffn(d_in: int, hidden: int, d_out: int, activation: str) -> int:
    """Weights; a gated activation has two columns a hidden unit."""
    return hidden * (d_in * (2 if activation in ("swiglu", "geglu") else 1) + d_out)


def _experts(stack: _Stack, d_in: int, d_out: int, *, slots: bool) -> _Products:
    """Of a mixture. The gradient of a gate needs the expert's output."""
    moe = stack.model.moe
    expert = 2.0 * _ffn(d_in, moe.d_expert, d_out, moe.activation)
    shared, shared_last = moe.num_shared_experts * expert, 2.0 * moe.num_shared_experts * moe.d_expert * d_out
    group, down = stack.group, 2.0 * moe.d_expert * d_out
    if moe.router == "soft_moe":
        num_slots = moe.num_experts * moe.slots_per_expert
        mixtures = 2.0 * 3 * d_in * num_slots  # logits, in and out
        forward = mixtures + expert * num_slots / group + shared
        return _Products(forward, last=shared_last, returned=down * num_slots / group)
    router = {"hash": 0, "label": 0, "noisy_top_k": 2}.get(moe.router, 1) * 2.0 * d_in * moe.num_experts
    if moe.router == "soft":
        every = expert * moe.num_experts
        return _Products(router + every + shared, again=every, last=shared_last)
    per_token, returned = float(moe.num_choices), 0.0
    full_capacity = dispatch_rules.RULES["tpu"].full_capacity
    if slots and not moe.is_dropless(moe.capacity_factor, full_capacity):
        per_token = moe.num_experts * moe.capacity(group, moe.capacity_factor) / group
        returned = down * per_token
    return _Products(router + expert * per_token + shared, last=shared_last, returned=returned)
