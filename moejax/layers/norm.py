"""RMSNorm and LayerNorm over the last dim, in float32.

D model.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class RmsNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467). Returns `dtype`."""

    def __init__(self, d_model: int, *, eps: float, dtype: jnp.dtype):
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.ones(d_model), axes=("norm",))

    def __call__(self, x_D: Array) -> Array:
        x_D = x_D.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x_D), axis=-1, keepdims=True)
        return (x_D * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]).astype(self.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias (arXiv 1607.06450). Returns `dtype`."""

    def __init__(self, d_model: int, *, eps: float, dtype: jnp.dtype):
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.ones(d_model), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros(d_model), axes=("norm",))

    def __call__(self, x_D: Array) -> Array:
        x_D = x_D.astype(jnp.float32)
        x_D = x_D - jnp.mean(x_D, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x_D), axis=-1, keepdims=True)
        return (x_D * jax.lax.rsqrt(variance + self.eps) * self.scale[...] + self.bias[...]).astype(self.dtype)


def build(kind: str, d_model: int, *, eps: float, dtype: jnp.dtype) -> RmsNorm | LayerNorm:
    """The norm named `kind`: rmsnorm or layernorm."""
    match kind:
        case "rmsnorm":
            return RmsNorm(d_model, eps=eps, dtype=dtype)
        case "layernorm":
            return LayerNorm(d_model, eps=eps, dtype=dtype)
    raise ValueError(f"norm={kind} is not known; choose one of rmsnorm, layernorm")
