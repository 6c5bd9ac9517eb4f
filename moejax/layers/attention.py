"""Multi-head self-attention with rotary positions.

B batch, L sequence, M cache length, D model, H heads, Q head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.layers import init
from moejax.ops import attention, sequence


class AttentionCache(NamedTuple):
    """Keys and values of the past, up to a fixed length.

    key_BHMQ, value_BHMQ: rotated keys, and values; what lies before a row's start or past the length means nothing.
      Heads come before positions, so that a step reads them as they lie.
    start_B: int32, where each row begins: rows of unequal length end together.
    length: int32, where all rows end.
    """

    key_BHMQ: Array
    value_BHMQ: Array
    start_B: Array
    length: Array


class Attention(nnx.Module):
    """softmax(rope(q) rope(k)^T / sqrt(Q)) v, then an output projection; no biases.

    __call__(x_BLD) -> y_BLD; `step` does one position with a cache.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        rope_base: float,
        causal: bool = True,
        scheme: str = "switch",
        init_scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        head_width = d_model // num_heads
        self.rope_base, self.causal, self.dtype = rope_base, causal, dtype

        def weight(*shape: int, fan_in: int) -> Array:
            return init.weight(rngs.params(), shape, scheme=scheme, scale=init_scale, fan_in=fan_in)

        # dims: query, key or value; D; H; Q
        self.qkv = nnx.Param(
            weight(3, d_model, num_heads, head_width, fan_in=d_model), axes=("qkv", "embed", "heads", "head")
        )
        self.out = nnx.Param(weight(num_heads, head_width, d_model, fan_in=d_model), axes=("heads", "head", "embed"))

    def __call__(
        self, x_BLD: Array, *, segment_ids_BL: Array | None = None, positions_BL: Array | None = None
    ) -> Array:
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(x_BLD.shape[1]), x_BLD.shape[:2])
        return self._attend(*self._project(x_BLD, positions_BL), segment_ids_BL)

    def prefill(
        self, x_BLD: Array, *, max_length: int, segment_ids_BL: Array | None = None
    ) -> tuple[Array, AttentionCache]:
        """A row, and a cache of max_length that holds its last document: (y_BLD, cache).

        Raises:
          ValueError: the row is longer than the cache.
        """
        batch, length = x_BLD.shape[:2]
        if length > max_length:
            raise ValueError(f"a row of {length} positions is over max_length={max_length}; raise it or cut the row")
        start_B = jnp.zeros(batch, jnp.int32)
        if segment_ids_BL is not None:
            start_B = jnp.sum(segment_ids_BL != segment_ids_BL[:, -1:], axis=1, dtype=jnp.int32)
        # only differences of positions matter, so those before the start may be negative
        query_BLHQ, key_BLHQ, value_BLHQ = self._project(x_BLD, jnp.arange(length) - start_B[:, None])
        y_BLD = self._attend(query_BLHQ, key_BLHQ, value_BLHQ, segment_ids_BL)
        key_BHMQ, value_BHMQ = (
            jnp.pad(x_BLHQ.swapaxes(1, 2), ((0, 0), (0, 0), (0, max_length - length), (0, 0)))
            for x_BLHQ in (key_BLHQ, value_BLHQ)
        )
        return y_BLD, AttentionCache(key_BHMQ, value_BHMQ, start_B, jnp.asarray(length, jnp.int32))

    def init_cache(self, batch: int, max_length: int) -> AttentionCache:
        """An empty cache for at most max_length tokens."""
        _, _, num_heads, head_width = self.qkv.shape
        zeros_BHMQ = jnp.zeros((batch, num_heads, max_length, head_width), self.dtype)
        return AttentionCache(zeros_BHMQ, zeros_BHMQ, jnp.zeros(batch, jnp.int32), jnp.zeros((), jnp.int32))

    def step(self, x_BD: Array, cache: AttentionCache) -> tuple[Array, AttentionCache]:
        """One position: (y_BD, the next cache). The caller keeps within the cache's length."""
        positions_B1 = (cache.length - cache.start_B)[:, None]
        query_B1HQ, key_B1HQ, value_B1HQ = self._project(x_BD[:, None], positions_B1)
        key_BHMQ, value_BHMQ = (
            jax.lax.dynamic_update_slice_in_dim(past_BHMQ, x_B1HQ.swapaxes(1, 2), cache.length, axis=2)
            for past_BHMQ, x_B1HQ in ((cache.key_BHMQ, key_B1HQ), (cache.value_BHMQ, value_B1HQ))
        )
        cache = AttentionCache(key_BHMQ, value_BHMQ, cache.start_B, cache.length + 1)
        y_BHQ = attention.attention_step(query_B1HQ[:, 0], key_BHMQ, value_BHMQ, cache.start_B, cache.length)
        return jnp.einsum("bhq,hqd->bd", y_BHQ, self.out[...].astype(self.dtype)), cache

    def _attend(self, query_BLHQ: Array, key_BLHQ: Array, value_BLHQ: Array, segment_ids_BL: Array | None) -> Array:
        y_BLHQ = sequence.attention(query_BLHQ, key_BLHQ, value_BLHQ, segment_ids_BL=segment_ids_BL, causal=self.causal)
        return jnp.einsum("blhq,hqd->bld", y_BLHQ, self.out[...].astype(self.dtype))

    def _project(self, x_BLD: Array, positions_BL: Array) -> tuple[Array, Array, Array]:
        query_BLHQ, key_BLHQ, value_BLHQ = jnp.einsum("bld,sdhq->sblhq", x_BLD, self.qkv[...].astype(self.dtype))
        rotate = lambda x_BLHQ: attention.rotary(x_BLHQ, positions_BL, base=self.rope_base)  # noqa: E731
        return rotate(query_BLHQ), rotate(key_BLHQ), value_BLHQ
