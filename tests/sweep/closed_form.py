"""Parameters and FLOPs of a MoE-Mamba with RMSNorm and default Mamba, written out by hand."""

import math

STATES, TAPS = 16, 4


def mamba(d_model, expand=2.0):
    """Of a layer without its norm: in_proj, convolution, x_proj, dt_proj, A_log, D, out_proj."""
    inner, rank = int(expand * d_model), math.ceil(d_model / 16)
    projections = 3 * d_model * inner + inner * (rank + 2 * STATES) + rank * inner
    return projections + (TAPS + 1) * inner + inner + inner * STATES + inner


def moe(d_model, experts, width, shared=0):
    """Of a layer with ReLU experts without bias, `experts` of them counted, and shared ones; without its router."""
    return 2 * d_model * width * (experts + shared)


def parameters(d_model, periods, num_experts, width, counted=1, shared=0):
    """Without embedding and head: counted = top_k are the active ones, counted = num_experts are all."""
    router, norms = d_model * num_experts, 2 * d_model
    period = mamba(d_model) + moe(d_model, counted, width, shared) + router + norms
    return periods * period + d_model


def flops(d_model, periods, num_experts, width, vocab, tokens, top_k=1):
    """Of the products of forward and backward pass, over `tokens` tokens."""
    inner, rank = 2 * d_model, math.ceil(d_model / 16)
    ssm = 3 * d_model * inner + inner * (rank + 2 * STATES) + rank * inner
    period = ssm + moe(d_model, top_k, width) + d_model * num_experts
    return 3 * 2 * tokens * (periods * period + d_model * vocab)
