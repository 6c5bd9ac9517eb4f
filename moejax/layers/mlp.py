"""The dense feed-forward sublayer.

D model, F hidden, H halves of a gated activation (no dim without one).
"""

import math

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.layers import init
from moejax.ops import dropout as dropout_lib
from moejax.ops import experts


class Mlp(nnx.Module):
    """activate(x up + b) down + b'. __call__(x_D) -> y_D over any leading dims; y is d_out wide, d_model by default."""

    def __init__(
        self,
        d_model: int,
        *,
        d_ff: int,
        d_out: int = 0,
        activation: str,
        bias: bool,
        dropout: float = 0.0,
        scheme: str = "switch",
        init_scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """dropout: of hidden units."""
        self.activation, self.dropout, self.dtype = activation, dropout, dtype
        d_out = d_out or d_model
        halves = (2,) if experts.hidden_multiple(activation) == 2 else ()  # so that `tensor` splits both alike
        axes, columns = ("half",) * len(halves), math.prod(halves) * d_ff
        key = rngs.params
        up_DF = init.weight(key(), (d_model, columns), scheme=scheme, scale=init_scale)
        down_FD = init.weight(key(), (d_ff, d_out), scheme=scheme, scale=init_scale)
        self.up = nnx.Param(up_DF.reshape(d_model, *halves, d_ff), axes=("embed", *axes, "ffn"))
        self.down = nnx.Param(down_FD, axes=("ffn", "embed"))
        up_bias = down_bias = None
        if bias:  # MoE-Mamba's code keeps those of torch.nn.Linear
            drawn = scheme == "moe_mamba"
            up_F = init.uniform_fan_in(key(), (columns,), fan_in=d_model) if drawn else jnp.zeros(columns)
            down_D = init.uniform_fan_in(key(), (d_out,), fan_in=d_ff) if drawn else jnp.zeros(d_out)
            up_bias, down_bias = (
                nnx.Param(up_F.reshape(*halves, d_ff), axes=(*axes, "ffn")),
                nnx.Param(down_D, axes=("embed",)),
            )
        self.up_bias, self.down_bias = up_bias, down_bias

    def __call__(self, x_D: Array, *, keys_B: Array | None = None) -> Array:
        """keys_B: a random key for each entry of the first dim, for dropout; None for none."""
        hidden_HF = jnp.tensordot(x_D, self.up[...].astype(self.dtype), axes=1)
        if self.up_bias is not None:
            hidden_HF += self.up_bias[...].astype(self.dtype)
        hidden_F = experts.activate(hidden_HF, self.activation, axis=-2).reshape(*x_D.shape[:-1], -1)
        hidden_F = dropout_lib.dropout(hidden_F, keys_B, self.dropout)
        y_D = hidden_F @ self.down[...].astype(self.dtype)
        if self.down_bias is not None:
            y_D += self.down_bias[...].astype(self.dtype)
        return y_D
