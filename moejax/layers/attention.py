"""Multi-head attention: of a row to itself, and of a decoder to what an encoder has read.

B batch, L sequence, M memory or cache length, D model, H heads, Q head width, N buckets of distances.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.layers import init
from moejax.ops import attention, dropout, sequence


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


class RelativeBias(nnx.Module):
    """T5's relative position bias: a number for each head and bucket of distances (arXiv 1910.10683, section 2.1).

    One for all layers of a stack. __call__(length) -> bias_HLM of a row to itself.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_buckets: int,
        max_distance: int,
        causal: bool,
        scheme: str = "switch",
        init_scale: float,
        d_model: int,
        rngs: nnx.Rngs,
    ):
        self.max_distance, self.causal = max_distance, causal
        # sd = sqrt(init_scale / D), which for a scale of 1 is Hugging Face's of T5
        table_NH = init.weight(rngs.params(), (num_buckets, num_heads), scheme=scheme, scale=init_scale, fan_in=d_model)
        self.table = nnx.Param(table_NH, axes=("bucket", "heads"))

    def __call__(self, length: int) -> Array:
        table_NH = self.table[...]
        return attention.relative_bias(table_NH, length, max_distance=self.max_distance, causal=self.causal)

    def step(self, place: Array, max_length: int) -> Array:
        """bias_HM of the query at `place` of a cache, causal."""
        table_NH = self.table[...]
        bucket_M = attention.relative_bucket(
            jnp.arange(max_length) - place,
            num_buckets=table_NH.shape[0],
            max_distance=self.max_distance,
            causal=self.causal,
        )
        return table_NH[bucket_M].T


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(Q)) v, then an output projection; no biases.

    position: rotary turns q and k by their positions; relative adds a bias that the caller has (`RelativeBias`).

    __call__(x_BLD) -> y_BLD; `step` does one position with a cache.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        d_head: int = 0,
        position: str = "rotary",
        rope_base: float = 10_000.0,
        causal: bool = True,
        dropout: float = 0.0,
        scheme: str = "switch",
        init_scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """d_head: Q; 0 for d_model / num_heads. dropout: of probabilities."""
        d_head = d_head or d_model // num_heads
        self.position, self.rope_base, self.causal, self.dtype = position, rope_base, causal, dtype
        self.dropout = dropout

        def weight(*shape: int, fan_in: int) -> Array:
            return init.weight(rngs.params(), shape, scheme=scheme, scale=init_scale, fan_in=fan_in)

        # dims: query, key or value; D; H; Q
        self.qkv = nnx.Param(
            weight(3, d_model, num_heads, d_head, fan_in=d_model), axes=("qkv", "embed", "heads", "head")
        )
        self.out = nnx.Param(
            weight(num_heads, d_head, d_model, fan_in=num_heads * d_head), axes=("heads", "head", "embed")
        )

    def __call__(
        self,
        x_BLD: Array,
        *,
        segment_ids_BL: Array | None = None,
        positions_BL: Array | None = None,
        bias_HLM: Array | None = None,
        keys_B: Array | None = None,
    ) -> Array:
        """bias_HLM: of position=relative. keys_B: for dropout; None for none."""
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(x_BLD.shape[1]), x_BLD.shape[:2])
        qkv = self._project(x_BLD, positions_BL)
        keep_BHLM = _keep(keys_B, self.dropout, self.qkv.shape[2], x_BLD.shape[1])
        return self._attend(*qkv, segment_ids_BL, bias_HLM, keep_BHLM)

    def prefill(
        self, x_BLD: Array, *, max_length: int, segment_ids_BL: Array | None = None, bias_HLM: Array | None = None
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
        y_BLD = self._attend(query_BLHQ, key_BLHQ, value_BLHQ, segment_ids_BL, bias_HLM)
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

    def step(
        self, x_BD: Array, cache: AttentionCache, *, relative: RelativeBias | None = None
    ) -> tuple[Array, AttentionCache]:
        """One position: (y_BD, the next cache). The caller keeps within the cache's length."""
        positions_B1 = (cache.length - cache.start_B)[:, None]
        query_B1HQ, key_B1HQ, value_B1HQ = self._project(x_BD[:, None], positions_B1)
        key_BHMQ, value_BHMQ = (
            jax.lax.dynamic_update_slice_in_dim(past_BHMQ, x_B1HQ.swapaxes(1, 2), cache.length, axis=2)
            for past_BHMQ, x_B1HQ in ((cache.key_BHMQ, key_B1HQ), (cache.value_BHMQ, value_B1HQ))
        )
        cache = AttentionCache(key_BHMQ, value_BHMQ, cache.start_B, cache.length + 1)
        y_BHQ = attention.attention_step(
            query_B1HQ[:, 0],
            key_BHMQ,
            value_BHMQ,
            cache.start_B,
            cache.length,
            bias_HM=None if relative is None else relative.step(cache.length - 1, key_BHMQ.shape[2]),
        )
        return jnp.einsum("bhq,hqd->bd", y_BHQ, self.out[...].astype(self.dtype)), cache

    def _attend(
        self,
        query_BLHQ: Array,
        key_BLHQ: Array,
        value_BLHQ: Array,
        segment_ids_BL: Array | None,
        bias_HLM: Array | None,
        keep_BHLM: Array | None = None,
    ) -> Array:
        if (bias_HLM is not None) != (self.position == "relative"):
            raise ValueError(f"position={self.position} and a bias of distances go together; pass what belongs to it")
        y_BLHQ = sequence.attention(
            query_BLHQ,
            key_BLHQ,
            value_BLHQ,
            segment_ids_BL=segment_ids_BL,
            causal=self.causal,
            bias_HLM=bias_HLM,
            keep_BHLM=keep_BHLM,
        )
        return jnp.einsum("blhq,hqd->bld", y_BLHQ, self.out[...].astype(self.dtype))

    def _project(self, x_BLD: Array, positions_BL: Array) -> tuple[Array, Array, Array]:
        query_BLHQ, key_BLHQ, value_BLHQ = jnp.einsum("bld,sdhq->sblhq", x_BLD, self.qkv[...].astype(self.dtype))
        if self.position != "rotary":
            return query_BLHQ, key_BLHQ, value_BLHQ
        rotate = lambda x_BLHQ: attention.rotary(x_BLHQ, positions_BL, base=self.rope_base)  # noqa: E731
        return rotate(query_BLHQ), rotate(key_BLHQ), value_BLHQ


class Memory(NamedTuple):
    """What a decoder looks at. x_BMD: an encoder's output; ids_BM: which document a position belongs to, 0 for padding;
    None: all are one."""

    x_BMD: Array
    ids_BM: Array | None


class MemoryCache(NamedTuple):
    """Keys and values of a memory, and its ids_BM."""

    key_BMHQ: Array
    value_BMHQ: Array
    ids_BM: Array | None


class CrossAttention(nnx.Module):
    """softmax(q k^T / sqrt(Q)) v with the keys and values of a memory, then an output projection; no biases.

    A position sees the whole document of its own number, without positions (T5).

    __call__(x_BLD, memory) -> y_BLD; `step` does one position with what `read` makes of a memory.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        d_head: int = 0,
        dropout: float = 0.0,
        scheme: str = "switch",
        init_scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """d_head: Q; 0 for d_model / num_heads. dropout: of probabilities."""
        d_head = d_head or d_model // num_heads
        self.dtype, self.dropout = dtype, dropout

        def weight(*shape: int, fan_in: int) -> Array:
            return init.weight(rngs.params(), shape, scheme=scheme, scale=init_scale, fan_in=fan_in)

        self.query = nnx.Param(weight(d_model, num_heads, d_head, fan_in=d_model), axes=("embed", "heads", "head"))
        # dims: key or value; D; H; Q
        self.kv = nnx.Param(
            weight(2, d_model, num_heads, d_head, fan_in=d_model), axes=("kv", "embed", "heads", "head")
        )
        self.out = nnx.Param(
            weight(num_heads, d_head, d_model, fan_in=num_heads * d_head), axes=("heads", "head", "embed")
        )

    def __call__(
        self, x_BLD: Array, memory: Memory, *, segment_ids_BL: Array | None = None, keys_B: Array | None = None
    ) -> Array:
        """segment_ids_BL: which document of the memory a position looks at; None: the whole memory."""
        keep_BHLM = _keep(keys_B, self.dropout, self.kv.shape[2], x_BLD.shape[1], memory.x_BMD.shape[1])
        return self._attend(x_BLD, self.read(memory), segment_ids_BL, keep_BHLM)

    def read(self, memory: Memory) -> MemoryCache:
        """The keys and values of a memory."""
        key_BMHQ, value_BMHQ = jnp.einsum("bmd,sdhq->sbmhq", memory.x_BMD, self.kv[...].astype(self.dtype))
        return MemoryCache(key_BMHQ, value_BMHQ, memory.ids_BM)

    def step(self, x_BD: Array, cache: MemoryCache) -> Array:
        """One position, of the document 1."""
        return self._attend(x_BD[:, None], cache, jnp.ones((x_BD.shape[0], 1), jnp.int32), None)[:, 0]

    def _attend(self, x_BLD: Array, cache: MemoryCache, segment_ids_BL: Array | None, keep_BHLM: Array | None) -> Array:
        y_BLHQ = attention.attention(
            jnp.einsum("bld,dhq->blhq", x_BLD, self.query[...].astype(self.dtype)),
            cache.key_BMHQ,
            cache.value_BMHQ,
            segment_ids_BL=segment_ids_BL,
            memory_ids_BM=cache.ids_BM,
            causal=False,
            keep_BHLM=keep_BHLM,
        )
        return jnp.einsum("blhq,hqd->bld", y_BLHQ, self.out[...].astype(self.dtype))


def _keep(keys_B: Array | None, rate: float, num_heads: int, length: int, memory_length: int = 0) -> Array | None:
    """What dropout multiplies probabilities by; None without it."""
    if keys_B is None or rate == 0:
        return None
    return dropout.factors(keys_B, (len(keys_B), num_heads, length, memory_length or length), rate)
