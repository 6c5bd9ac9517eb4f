"""The dense feed-forward sublayer.

D model, F hidden.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.layers import init
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
        scheme: str = "switch",
        init_scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.activation, self.dtype = activation, dtype
        d_out = d_out or d_model
        columns = d_ff * experts.hidden_multiple(activation)
        key = rngs.params
        up_DF = init.weight(key(), (d_model, columns), scheme=scheme, scale=init_scale)
        down_FD = init.weight(key(), (d_ff, d_out), scheme=scheme, scale=init_scale)
        self.up = nnx.Param(up_DF, axes=("embed", "ffn"))
        self.down = nnx.Param(down_FD, axes=("ffn", "embed"))
        up_bias = down_bias = None
        if bias:  # MoE-Mamba's code keeps those of torch.nn.Linear
            drawn = scheme == "moe_mamba"
            up_F = init.uniform_fan_in(key(), (columns,), fan_in=d_model) if drawn else jnp.zeros(columns)
            down_D = init.uniform_fan_in(key(), (d_out,), fan_in=d_ff) if drawn else jnp.zeros(d_out)
            up_bias, down_bias = nnx.Param(up_F, axes=("ffn",)), nnx.Param(down_D, axes=("embed",))
        self.up_bias, self.down_bias = up_bias, down_bias

    def __call__(self, x_D: Array) -> Array:
        hidden_F = x_D @ self.up[...].astype(self.dtype)
        if self.up_bias is not None:
            hidden_F += self.up_bias[...].astype(self.dtype)
        y_D = experts.activate(hidden_F, self.activation) @ self.down[...].astype(self.dtype)
        if self.down_bias is not None:
            y_D += self.down_bias[...].astype(self.dtype)
        return y_D
