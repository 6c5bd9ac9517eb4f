"""Attention with rotary positions and document boundaries, and its single step.

B batch, L sequence, M cache length, H heads, Q head width.
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


def attention_step(query_BHQ: Array, key_BHMQ: Array, value_BHMQ: Array, start_B: Array, end: Array) -> Array:
    """One position of causal `attention`, over the entries from start_B up to `end` of a cache of M."""
    place_M = jnp.arange(key_BHMQ.shape[2])
    seen_B1M = ((place_M >= start_B[:, None]) & (place_M < end))[:, None]
    score_BHM = jnp.einsum("bhq,bhmq->bhm", query_BHQ, key_BHMQ, preferred_element_type=jnp.float32)
    score_BHM = jnp.where(seen_B1M, score_BHM / math.sqrt(query_BHQ.shape[-1]), -jnp.inf)
    weight_BHM = jax.nn.softmax(score_BHM, axis=-1).astype(value_BHMQ.dtype)
    return jnp.einsum("bhm,bhmq->bhq", weight_BHM, value_BHMQ)
