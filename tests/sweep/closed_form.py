"""Parameters and FLOPs of models with RMSNorm, default Mamba and ReLU experts without bias, written out by hand."""

import math

STATES, TAPS = 16, 4


def mamba(d_model):
    """Of a layer without its norm: in_proj and out_proj, x_proj, dt_proj; convolution, dt's bias, A_log, D."""
    inner = 2 * d_model
    return mamba_products(d_model) + (TAPS + 1) * inner + inner + inner * STATES + inner


def mamba_products(d_model):
    """Those that are matrices, but for A_log."""
    inner, rank = 2 * d_model, math.ceil(d_model / 16)
    return 3 * d_model * inner + inner * (rank + 2 * STATES) + rank * inner


def moe(d_model, num_experts, width, counted):
    """Of a layer without its norm: so many of the experts, and the router."""
    return counted * 2 * d_model * width + d_model * num_experts


def parameters(d_model, num_experts, width, *, period=("moe",), counted=1):
    """Of one period without embedding and head: counted = top_k are the active ones, counted = num_experts are all."""
    layers = {"mamba": mamba(d_model), "moe": moe(d_model, num_experts, width, counted)}
    return sum(layers[sublayer] + d_model for sublayer in period) + d_model


def flops(d_model, num_experts, width, *, vocab, tokens, period=("moe",)):
    """Of the products of forward and backward pass with one expert a token, over `tokens` tokens."""
    layers = {"mamba": mamba_products(d_model), "moe": moe(d_model, num_experts, width, 1)}
    return 3 * 2 * tokens * (sum(layers[sublayer] for sublayer in period) + d_model * vocab)
