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

    key_BMHQ, value_BMHQ: rotated keys, and values; zeros where no token has been.
    length: int32, how many tokens have been.
    """

    key_BMHQ: Array
    value_BMHQ: Array
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
        query_BLHQ, key_BLHQ, value_BLHQ = self._project(x_BLD, positions_BL)
        y_BLHQ = sequence.attention(query_BLHQ, key_BLHQ, value_BLHQ, segment_ids_BL=segment_ids_BL, causal=self.causal)
        return jnp.einsum("blhq,hqd->bld", y_BLHQ, self.out[...].astype(self.dtype))

    def init_cache(self, batch: int, max_length: int) -> AttentionCache:
        """An empty cache for at most max_length tokens."""
        _, _, num_heads, head_width = self.qkv.shape
        zeros_BMHQ = jnp.zeros((batch, max_length, num_heads, head_width), self.dtype)
        return AttentionCache(zeros_BMHQ, zeros_BMHQ, jnp.zeros((), jnp.int32))

    def step(self, x_BD: Array, cache: AttentionCache) -> tuple[Array, AttentionCache]:
        """One position: (y_BD, the next cache). The caller keeps within the cache's length."""
        positions_B1 = jnp.broadcast_to(cache.length, (x_BD.shape[0], 1))
        query_B1HQ, key_B1HQ, value_B1HQ = self._project(x_BD[:, None], positions_B1)
        key_BMHQ = jax.lax.dynamic_update_slice_in_dim(cache.key_BMHQ, key_B1HQ, cache.length, axis=1)
        value_BMHQ = jax.lax.dynamic_update_slice_in_dim(cache.value_BMHQ, value_B1HQ, cache.length, axis=1)
        cache = AttentionCache(key_BMHQ, value_BMHQ, cache.length + 1)
        y_BHQ = attention.attention_step(query_B1HQ[:, 0], key_BMHQ, value_BMHQ, cache.length)
        return jnp.einsum("bhq,hqd->bd", y_BHQ, self.out[...].astype(self.dtype)), cache

    def _project(self, x_BLD: Array, positions_BL: Array) -> tuple[Array, Array, Array]:
        query_BLHQ, key_BLHQ, value_BLHQ = jnp.einsum("bld,sdhq->sblhq", x_BLD, self.qkv[...].astype(self.dtype))
        rotate = lambda x_BLHQ: attention.rotary(x_BLHQ, positions_BL, base=self.rope_base)  # noqa: E731
        return rotate(query_BLHQ), rotate(key_BLHQ), value_BLHQ
