"""Attention with rotary or relative positions and boundaries of documents, to itself or to a memory; its single step.

B batch, L sequence of queries, M of keys (the same, a memory's or a cache's), S a block of it, H heads, Q head width,
N buckets of distances.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
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


def relative_bucket(distance: Array, *, num_buckets: int, max_distance: int, causal: bool) -> Array:
    """The bucket of a distance, in [0, num_buckets) (T5, arXiv 1910.10683, section 2.1).

    Half of the buckets of a direction have one distance each; the others are equal in the logarithm of the distance, up
    to max_distance, and the last one takes what is farther.

    Args:
      distance: int32 of any shape, the key's position minus the query's.
      num_buckets: of both directions, half of them for keys after the query; if causal, of keys before it alone.
      max_distance: see above.
      causal: keys after the query, which it does not see, share the bucket of distance 0.
    """
    first, steps = 0, jnp.maximum(-distance, 0)
    if not causal:
        num_buckets //= 2
        first, steps = jnp.where(distance > 0, num_buckets, 0), jnp.abs(distance)
    # From a table made in float64: the logarithm of an accelerator may put a power of two into the bucket below.
    num_exact, step_S = num_buckets // 2, np.arange(max_distance + 1)
    log_S = np.log(np.maximum(step_S, 1) / num_exact) / math.log(max_distance / num_exact)
    far_S = np.minimum(num_exact + (log_S * (num_buckets - num_exact)).astype(np.int32), num_buckets - 1)
    bucket_S = jnp.asarray(np.where(step_S < num_exact, step_S, far_S), jnp.int32)
    return first + bucket_S[jnp.minimum(steps, max_distance)]


def relative_bias(table_NH: Array, length: int, *, max_distance: int, causal: bool) -> Array:
    """bias_HLM of every query and key of a row: what T5 adds to their product; see `relative_bucket`."""
    distance_LM = jnp.arange(length) - jnp.arange(length)[:, None]
    how = {"num_buckets": table_NH.shape[0], "max_distance": max_distance, "causal": causal}
    return jnp.moveaxis(table_NH[relative_bucket(distance_LM, **how)], -1, 0)


def attention(
    query_BLHQ: Array,
    key_BMHQ: Array,
    value_BMHQ: Array,
    *,
    segment_ids_BL: Array | None = None,
    memory_ids_BM: Array | None = None,
    causal: bool = True,
    bias_HLM: Array | None = None,
    keep_BHLM: Array | None = None,
) -> Array:
    """softmax(q k^T / sqrt(Q) + bias) v over the positions of the same document; softmax in float32.

    A query without any such position gets a mean of all values: the caller does not use it.

    Args:
      query_BLHQ, key_BMHQ, value_BMHQ: M is L unless they look at a memory.
      segment_ids_BL: of the queries' documents; None: all are one, and see all keys that are not padding.
      memory_ids_BM: of the keys', if they are a memory's, 0 for padding; None: those of the queries.
      causal: only positions up to the current one.
      bias_HLM: added to the products, after their division.
      keep_BHLM: what dropout multiplies the probabilities by.
    """
    mask_B1LM = None
    if segment_ids_BL is not None:
        memory_ids_BM = segment_ids_BL if memory_ids_BM is None else memory_ids_BM
        mask_B1LM = (segment_ids_BL[:, :, None] == memory_ids_BM[:, None])[:, None]
    elif memory_ids_BM is not None:
        mask_B1LM = (memory_ids_BM > 0)[:, None, None]
    return weighted(query_BLHQ, key_BMHQ, value_BMHQ, mask_B1LM, bias_HLM, keep_BHLM, causal=causal)


def weighted(
    query_BLHQ: Array,
    key_BMHQ: Array,
    value_BMHQ: Array,
    mask_B1LM: Array | None,
    bias_HLM: Array | None,
    keep_BHLM: Array | None,
    *,
    causal: bool,
) -> Array:
    """`attention` by a mask of what is seen."""
    bias_1HLM = None if bias_HLM is None else bias_HLM[None]
    if keep_BHLM is None:
        return jax.nn.dot_product_attention(
            query_BLHQ, key_BMHQ, value_BMHQ, bias_1HLM, mask=mask_B1LM, is_causal=causal
        )
    score_BHLM = jnp.einsum("blhq,bmhq->bhlm", query_BLHQ, key_BMHQ, preferred_element_type=jnp.float32)
    score_BHLM /= math.sqrt(query_BLHQ.shape[-1])
    if bias_1HLM is not None:
        score_BHLM += bias_1HLM
    lowest = jnp.finfo(jnp.float32).min  # not -inf: a query that sees nothing would be NaN
    if mask_B1LM is not None:
        score_BHLM = jnp.where(mask_B1LM, score_BHLM, lowest)
    if causal:
        score_BHLM = jnp.where(jnp.tri(*score_BHLM.shape[-2:], dtype=bool), score_BHLM, lowest)
    weight_BHLM = (jax.nn.softmax(score_BHLM, axis=-1) * keep_BHLM).astype(value_BMHQ.dtype)
    return jnp.einsum("bhlm,bmhq->blhq", weight_BHLM, value_BMHQ)


def attention_step(
    query_BHQ: Array,
    key_BHMQ: Array,
    value_BHMQ: Array,
    start_B: Array,
    end: Array,
    *,
    bias_HM: Array | None = None,
    block_size: int = 256,
) -> Array:
    """One position of causal `attention`, over the entries from start_B up to `end` of a cache of M.

    bias_HM: added to the products, after their division.

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
        score_BHS /= math.sqrt(head_width)
        if bias_HM is not None:
            score_BHS += jax.lax.dynamic_slice_in_dim(bias_HM, first, block_size, axis=1)
        score_BHS = jnp.where(seen_BS[:, None], score_BHS, -jnp.inf)
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
