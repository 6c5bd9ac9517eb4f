"""Attention with rotary positions and document boundaries, and its single step.

B batch, L sequence, M cache length, S a block of it, H heads, Q head width.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array


def rotary(x_BLHQ: Array, positions_BL: Array, *, base: float) -> Array:
    """Rotary position embedding (arXiv 2104.09864) over the whole head; pairs are (i, i + Q/2).

    Pair i is turned by the angle position * base^(-2i/Q). Computes in float32, returns the dtype of x.
    """
    half = x_BLHQ.shape[-1] // 2
    frequency_i = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BL1i = positions_BL[:, :, None, None].astype(jnp.float32) * frequency_i
    cos, sin = jnp.cos(angle_BL1i), jnp.sin(angle_BL1i)
    first, second = jnp.split(x_BLHQ.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHQ.dtype)


def attention(
    query_BLHQ: Array,
    key_BLHQ: Array,
    value_BLHQ: Array,
    *,
    segment_ids_BL: Array | None = None,
    causal: bool = True,
) -> Array:
    """softmax(q k^T / sqrt(Q)) v over the positions of the same document; softmax in float32.

    causal: only those up to the current one.
    """
    mask_B1LL = None
    if segment_ids_BL is not None:
        mask_B1LL = (segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :])[:, None]
    return jax.nn.dot_product_attention(query_BLHQ, key_BLHQ, value_BLHQ, mask=mask_B1LL, is_causal=causal)


def attention_step(
    query_BHQ: Array, key_BHMQ: Array, value_BHMQ: Array, start_B: Array, end: Array, *, block_size: int = 256
) -> Array:
    """One position of causal `attention`, over the entries from start_B up to `end` of a cache of M.

    Reads the cache a block of S entries at a time, no block beyond `end`: a step costs what there is to read, however
    long the cache may become. The softmax is summed up as blocks come (Milakov and Gimelshein 2018, arXiv 1805.02867).
    """
    batch, num_heads, head_width = query_BHQ.shape
    max_length = key_BHMQ.shape[2]
    block_size = min(block_size, max_length)

    def add(block: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top_BH, weight_BH, y_BHQ = sums
        first = jnp.minimum(block * block_size, max_length - block_size)  # the last block may reach back
        key_BHSQ, value_BHSQ = (
            jax.lax.dynamic_slice_in_dim(past_BHMQ, first, block_size, axis=2) for past_BHMQ in (key_BHMQ, value_BHMQ)
        )
        place_S = first + jnp.arange(block_size)
        seen_BS = (place_S >= start_B[:, None]) & (place_S < end) & (place_S >= block * block_size)
        score_BHS = jnp.einsum("bhq,bhsq->bhs", query_BHQ, key_BHSQ, preferred_element_type=jnp.float32)
        score_BHS = jnp.where(seen_BS[:, None], score_BHS / math.sqrt(head_width), -jnp.inf)
        new_top_BH = jnp.maximum(top_BH, score_BHS.max(axis=2))
        weight_BHS, rest_BH = jnp.exp(score_BHS - new_top_BH[..., None]), jnp.exp(top_BH - new_top_BH)
        more_BHQ = jnp.einsum(
            "bhs,bhsq->bhq", weight_BHS.astype(value_BHSQ.dtype), value_BHSQ, preferred_element_type=jnp.float32
        )
        return new_top_BH, rest_BH * weight_BH + weight_BHS.sum(axis=2), rest_BH[..., None] * y_BHQ + more_BHQ

    lowest_BH = jnp.full((batch, num_heads), jnp.finfo(jnp.float32).min)  # not -inf, whose differences are NaN
    empty = (lowest_BH, jnp.zeros_like(lowest_BH), jnp.zeros(query_BHQ.shape, jnp.float32))
    blocks = start_B.min() // block_size, (end + block_size - 1) // block_size
    _, weight_BH, y_BHQ = jax.lax.fori_loop(*blocks, add, empty)
    return (y_BHQ / weight_BH[..., None]).astype(query_BHQ.dtype)
