"""The Mamba-1 block.

B batch, L sequence, D model, I inner, N state, R dt rank, W conv width.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import partition
from moejax.layers import init
from moejax.ops import conv, scan, sequence


class MambaCache(NamedTuple):
    """What a Mamba block remembers of the past: of constant size.

    window_BWI: the last W - 1 inputs of the convolution, oldest first.
    state_BIN: the state of the scan, float32.
    """

    window_BWI: Array
    state_BIN: Array


class Ssm(nnx.Module):
    """What a Mamba block does between its projections: convolution, choice of dt, B and C, and scan.

    x = silu(conv(x)); [dt, B, C] = x_proj(x); dt = softplus(dt_proj(dt) + dt_bias);
    y = selective_scan(x, dt, -exp(A_log), B, C, D).
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: float,
        d_state: int,
        d_conv: int,
        dt_rank: int,
        dt_min: float,
        dt_max: float,
        scan_implementation: str | None,
        chunk_size: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """dt_rank=0 means ceil(d_model / 16)."""
        inner, rank = inner_width(d_model, expand), dt_rank or math.ceil(d_model / 16)
        self.rank, self.d_state, self.dtype = rank, d_state, dtype
        self.scan_implementation, self.chunk_size = scan_implementation, chunk_size
        key = rngs.params
        self.conv_kernel = nnx.Param(init.uniform_fan_in(key(), (d_conv, inner), fan_in=d_conv), axes=("conv", "inner"))
        self.conv_bias = nnx.Param(init.uniform_fan_in(key(), (inner,), fan_in=d_conv), axes=("inner",))
        self.x_proj = nnx.Param(init.uniform_fan_in(key(), (inner, rank + 2 * d_state)), axes=("inner", "dt_b_c"))
        self.dt_proj = nnx.Param(init.uniform_fan_in(key(), (rank, inner)), axes=("dt_rank", "inner"))
        self.dt_bias = nnx.Param(init.dt_bias(key(), (inner,), dt_min=dt_min, dt_max=dt_max), axes=("inner",))
        A_IN = jnp.broadcast_to(jnp.arange(1.0, d_state + 1), (inner, d_state))  # S4D-real
        self.A_log = nnx.Param(jnp.log(A_IN), axes=("inner", "state"))
        self.D = nnx.Param(jnp.ones(inner), axes=("inner",))

    def init_cache(self, batch: int) -> MambaCache:
        """The cache before the first token of a document."""
        taps, inner = self.conv_kernel.shape
        window_BWI = jnp.zeros((batch, taps - 1, inner), self.dtype)
        return MambaCache(window_BWI, jnp.zeros((batch, inner, self.d_state), jnp.float32))

    def _mix(self, inputs_BLI: Array, segment_ids_BL: Array | None) -> tuple[Array, MambaCache]:
        """(y_BLI, the cache after the last position, of its document)."""
        kernel_WI, bias_I = self.conv_kernel[...].astype(self.dtype), self.conv_bias[...].astype(self.dtype)
        x_BLI = jax.nn.silu(sequence.causal_conv(inputs_BLI, kernel_WI, bias_I, segment_ids_BL=segment_ids_BL))
        dt_BLI, B_BLN, C_BLN = self._select(x_BLI)
        y_BLI, state_BIN = sequence.selective_scan(
            x_BLI,
            dt_BLI,
            -jnp.exp(self.A_log[...]),
            B_BLN,
            C_BLN,
            self.D[...],
            segment_ids_BL=segment_ids_BL,
            implementation=self.scan_implementation,
            chunk_size=self.chunk_size,
        )
        window_BWI = conv.final_window(inputs_BLI, len(kernel_WI), segment_ids_BL=segment_ids_BL)
        return y_BLI, MambaCache(window_BWI, state_BIN)

    def _mix_step(self, x_BI: Array, cache: MambaCache) -> tuple[Array, MambaCache]:
        """One position of `_mix`: (y_BI, the next cache)."""
        kernel_WI, bias_I = self.conv_kernel[...].astype(self.dtype), self.conv_bias[...].astype(self.dtype)
        x_BI, window_BWI = conv.causal_conv_step(x_BI, cache.window_BWI, kernel_WI, bias_I)
        x_BI = jax.nn.silu(x_BI)
        dt_BI, B_BN, C_BN = self._select(x_BI)
        A_IN = -jnp.exp(self.A_log[...])
        y_BI, state_BIN = scan.selective_step(x_BI, dt_BI, A_IN, B_BN, C_BN, self.D[...], cache.state_BIN)
        return y_BI, MambaCache(window_BWI, state_BIN)

    def _select(self, x_I: Array) -> tuple[Array, Array, Array]:
        """The input-dependent dt, B and C; dt in float32, where softplus and exp(dt A) keep their digits."""
        dt_R, B_N, C_N = jnp.split(
            x_I @ self.x_proj[...].astype(self.dtype), [self.rank, self.rank + self.d_state], axis=-1
        )
        dt_I = (dt_R @ self.dt_proj[...].astype(self.dtype)).astype(jnp.float32) + self.dt_bias[...]
        return jax.nn.softplus(dt_I), B_N, C_N


class Mamba(Ssm):
    """Selective state space block (arXiv 2312.00752, section 3.4), as in state-spaces/mamba's mamba_simple.

    [x, z] = in_proj(u); y = ssm(x) * silu(z); out_proj(y).

    __call__(u_BLD) -> y_BLD; `prefill` also returns the cache after the row; `step` does one position with a cache.
    """

    def __init__(
        self, d_model: int, *, expand: float, out_scale: float, dtype: jnp.dtype, rngs: nnx.Rngs, **settings: Any
    ):
        """settings: the others of `Ssm`; out_scale multiplies out_proj at initialisation."""
        inner, key = inner_width(d_model, expand), rngs.params
        self.in_proj = nnx.Param(init.uniform_fan_in(key(), (d_model, 2 * inner)), axes=("embed", "inner"))
        super().__init__(d_model, expand=expand, dtype=dtype, rngs=rngs, **settings)
        self.out_proj = nnx.Param(out_scale * init.uniform_fan_in(key(), (inner, d_model)), axes=("inner", "embed"))

    def __call__(self, u_BLD: Array, *, segment_ids_BL: Array | None = None) -> Array:
        return self.prefill(u_BLD, segment_ids_BL=segment_ids_BL)[0]

    def prefill(self, u_BLD: Array, *, segment_ids_BL: Array | None = None) -> tuple[Array, MambaCache]:
        """A row, and the cache after its last position: (y_BLD, cache of the last position's document)."""
        x_BLI, z_BLI = self._in(u_BLD)
        y_BLI, cache = self._mix(x_BLI, segment_ids_BL)
        return self._out(y_BLI, z_BLI), cache

    def step(self, u_BD: Array, cache: MambaCache) -> tuple[Array, MambaCache]:
        """One position: (y_BD, the next cache)."""
        x_BI, z_BI = self._in(u_BD)
        y_BI, cache = self._mix_step(x_BI, cache)
        return self._out(y_BI, z_BI), cache

    def _in(self, u_D: Array) -> tuple[Array, Array]:
        # The halves apart, so that `tensor` splits both alike: moving the matrix costs less than moving activations.
        in_D2I = self.in_proj[...].astype(self.dtype).reshape(u_D.shape[-1], 2, -1)
        xz_2I = jnp.tensordot(u_D, partition.constrain(in_D2I, "D2I"), axes=1)
        return xz_2I[..., 0, :], xz_2I[..., 1, :]

    def _out(self, y_I: Array, z_I: Array) -> Array:
        return (y_I * jax.nn.silu(z_I)) @ self.out_proj[...].astype(self.dtype)


def inner_width(d_model: int, expand: float) -> int:
    """I; a fraction of a channel is cut."""
    return int(expand * d_model)
