"""The dense feed-forward sublayer.

D model, F hidden.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.layers import init
from moejax.ops import experts


class Mlp(nnx.Module):
    """activate(x up + b) down + b'. __call__(x_D) -> y_D over any leading dims."""

    def __init__(
        self,
        d_model: int,
        *,
        d_ff: int,
        activation: str,
        bias: bool,
        init_scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.activation, self.dtype = activation, dtype
        columns = d_ff * experts.hidden_multiple(activation)
        key = rngs.params
        self.up = nnx.Param(init.scaled_normal(key(), (d_model, columns), scale=init_scale), axes=("embed", "ffn"))
        self.down = nnx.Param(init.scaled_normal(key(), (d_ff, d_model), scale=init_scale), axes=("ffn", "embed"))
        self.up_bias = nnx.Param(jnp.zeros(columns), axes=("ffn",)) if bias else None
        self.down_bias = nnx.Param(jnp.zeros(d_model), axes=("embed",)) if bias else None

    def __call__(self, x_D: Array) -> Array:
        hidden_F = x_D @ self.up[...].astype(self.dtype)
        if self.up_bias is not None:
            hidden_F += self.up_bias[...].astype(self.dtype)
        y_D = experts.activate(hidden_F, self.activation) @ self.down[...].astype(self.dtype)
        if self.down_bias is not None:
            y_D += self.down_bias[...].astype(self.dtype)
        return y_D
