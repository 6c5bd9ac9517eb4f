"""The Mamba-2 block.

B batch, L sequence, D model, I inner, H heads, P channels a head, G groups, N state, W conv width;
Y = I + 2 G N: what goes through the convolution (x, B and C).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.layers import init
from moejax.ops import conv, sequence, ssd


class Mamba2Cache(NamedTuple):
    """What a Mamba-2 block remembers of the past: of constant size.

    window_BWY: the last W - 1 inputs of the convolution, oldest first.
    state_BHPN: the state of each head, float32.
    """

    window_BWY: Array
    state_BHPN: Array


class Mamba2(nnx.Module):
    """The block of Mamba-2 (arXiv 2405.21060, section 7), as in state-spaces/mamba's mamba2.

    [z, x, B, C, dt] = in_proj(u); [x, B, C] = silu(conv([x, B, C])); dt = softplus(dt + dt_bias);
    y = ssd(x, dt, -exp(A_log), B, C, D); out_proj(rms_norm(y * silu(z)) * norm_scale), the norm within each group.

    __call__(u_BLD) -> y_BLD; `prefill` also returns the cache after the row, and `step` does one position with it.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: float,
        d_state: int,
        d_head: int,
        num_groups: int,
        d_conv: int,
        dt_min: float,
        dt_max: float,
        A_min: float,
        A_max: float,
        norm_eps: float,
        scan_implementation: str | None,
        chunk_size: int,
        out_scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """out_scale multiplies out_proj at initialisation."""
        inner = int(expand * d_model)
        self.inner, self.num_heads, self.num_groups, self.d_state = inner, inner // d_head, num_groups, d_state
        self.norm_eps, self.dtype = norm_eps, dtype
        self.scan_implementation, self.chunk_size = scan_implementation, chunk_size
        convolved, heads, key = inner + 2 * num_groups * d_state, (self.num_heads,), rngs.params
        self.in_proj = nnx.Param(
            init.uniform_fan_in(key(), (d_model, inner + convolved + self.num_heads)), axes=("embed", "inner")
        )
        self.conv_kernel = nnx.Param(
            init.uniform_fan_in(key(), (d_conv, convolved), fan_in=d_conv), axes=("conv", "inner")
        )
        self.conv_bias = nnx.Param(init.uniform_fan_in(key(), (convolved,), fan_in=d_conv), axes=("inner",))
        self.dt_bias = nnx.Param(init.dt_bias(key(), heads, dt_min=dt_min, dt_max=dt_max), axes=("heads",))
        A_H = jax.random.uniform(key(), heads, minval=A_min, maxval=A_max)
        self.A_log = nnx.Param(jnp.log(A_H), axes=("heads",))
        self.D = nnx.Param(jnp.ones(heads), axes=("heads",))
        self.norm_scale = nnx.Param(jnp.ones(inner), axes=("inner",))
        self.out_proj = nnx.Param(out_scale * init.uniform_fan_in(key(), (inner, d_model)), axes=("inner", "embed"))

    def __call__(self, u_BLD: Array, *, segment_ids_BL: Array | None = None) -> Array:
        return self._mix(u_BLD, segment_ids_BL)[0]

    def prefill(self, u_BLD: Array, *, segment_ids_BL: Array | None = None) -> tuple[Array, Mamba2Cache]:
        """(y_BLD, the cache after the last position of the row)."""
        y_BLD, xBC_BLY, state_BHPN = self._mix(u_BLD, segment_ids_BL)
        window_BWY = conv.final_window(xBC_BLY, self.conv_kernel.shape[0], segment_ids_BL=segment_ids_BL)
        return y_BLD, Mamba2Cache(window_BWY, state_BHPN)

    def init_cache(self, batch: int) -> Mamba2Cache:
        """The cache before the first token of a document."""
        taps, convolved = self.conv_kernel.shape
        state_shape = (batch, self.num_heads, self.inner // self.num_heads, self.d_state)
        window_BWY = jnp.zeros((batch, taps - 1, convolved), self.dtype)
        return Mamba2Cache(window_BWY, jnp.zeros(state_shape, jnp.float32))

    def step(self, u_BD: Array, cache: Mamba2Cache) -> tuple[Array, Mamba2Cache]:
        """One position: (y_BD, the next cache)."""
        z_BI, xBC_BY, dt_BH = self._in(u_BD)
        kernel_WY, bias_Y = self.conv_kernel[...].astype(self.dtype), self.conv_bias[...].astype(self.dtype)
        xBC_BY, window_BWY = conv.causal_conv_step(xBC_BY, cache.window_BWY, kernel_WY, bias_Y)
        x_BHP, B_BGN, C_BGN = self._split(jax.nn.silu(xBC_BY))
        A_H = -jnp.exp(self.A_log[...])
        y_BHP, state_BHPN = ssd.ssd_step(x_BHP, dt_BH, A_H, B_BGN, C_BGN, self.D[...], cache.state_BHPN)
        return self._out(y_BHP, z_BI), Mamba2Cache(window_BWY, state_BHPN)

    def _mix(self, u_BLD: Array, segment_ids_BL: Array | None) -> tuple[Array, Array, Array]:
        """y_BLD, the inputs of the convolution, and the state after the last position."""
        z_BLI, xBC_BLY, dt_BLH = self._in(u_BLD)
        kernel_WY, bias_Y = self.conv_kernel[...].astype(self.dtype), self.conv_bias[...].astype(self.dtype)
        convolved_BLY = jax.nn.silu(sequence.causal_conv(xBC_BLY, kernel_WY, bias_Y, segment_ids_BL=segment_ids_BL))
        x_BLHP, B_BLGN, C_BLGN = self._split(convolved_BLY)
        y_BLHP, state_BHPN = sequence.ssd(
            x_BLHP,
            dt_BLH,
            -jnp.exp(self.A_log[...]),
            B_BLGN,
            C_BLGN,
            self.D[...],
            segment_ids_BL=segment_ids_BL,
            chunk_size=self.chunk_size,
            implementation=self.scan_implementation,
        )
        return self._out(y_BLHP, z_BLI), xBC_BLY, state_BHPN

    def _in(self, u_D: Array) -> tuple[Array, Array, Array]:
        """z, what goes through the convolution, and dt in float32, where softplus and exp(dt A) keep their digits."""
        ends = [self.inner, self.inner + self.conv_kernel.shape[1]]
        z_I, xBC_Y, dt_H = jnp.split(u_D @ self.in_proj[...].astype(self.dtype), ends, axis=-1)
        return z_I, xBC_Y, jax.nn.softplus(dt_H.astype(jnp.float32) + self.dt_bias[...])

    def _split(self, xBC_Y: Array) -> tuple[Array, Array, Array]:
        x_I, B_GN, C_GN = jnp.split(xBC_Y, [self.inner, self.inner + self.num_groups * self.d_state], axis=-1)
        rest = xBC_Y.shape[:-1]
        groups = (*rest, self.num_groups, self.d_state)
        return x_I.reshape(*rest, self.num_heads, -1), B_GN.reshape(groups), C_GN.reshape(groups)

    def _out(self, y_HP: Array, z_I: Array) -> Array:
        gated_I = y_HP.astype(jnp.float32).reshape(z_I.shape) * jax.nn.silu(z_I.astype(jnp.float32))
        grouped_I = gated_I.reshape(*z_I.shape[:-1], self.num_groups, -1)
        mean_square = jnp.mean(jnp.square(grouped_I), axis=-1, keepdims=True)
        normed_I = (grouped_I * jax.lax.rsqrt(mean_square + self.norm_eps)).reshape(z_I.shape) * self.norm_scale[...]
        return normed_I.astype(self.dtype) @ self.out_proj[...].astype(self.dtype)
