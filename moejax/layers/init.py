"""Initialisers, as functions of a key and a shape.

D model, F any other dim.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

_LARGEST_NORMAL = 5.5  # sd: a float32 normal is drawn within 5.42, the quantile of 1 - 2^-24


def scaled_normal(key: Array, shape: tuple[int, ...], *, scale: float, fan_in: int | None = None) -> Array:
    """Truncated normal with sd = sqrt(scale / fan_in) before the cut at 2 sd (Switch Transformers, section 2.4).

    fan_in: inputs of one unit; by default the second dim from the end.
    """
    sd = math.sqrt(scale / (fan_in or shape[-2]))
    return sd * jax.random.truncated_normal(key, -2.0, 2.0, shape)


def weight(key: Array, shape: tuple[int, ...], *, scheme: str, scale: float, fan_in: int | None = None) -> Array:
    """A truncated normal with sd = sqrt(scale / fan_in) before the cut; draws beyond it are drawn again, not clipped.

    "switch": cut at 2 sd (scaled_normal). "moe_mamba": cut at the absolute values +-2 * scale, whatever the sd, as the
    code of MoE-Mamba (arXiv 2401.04081) does: at fan_in 1, an embedding's, that is 0.63 sd for scale 0.1; at a layer's
    hundreds of inputs it is so many sd that nothing is cut.

    Args:
      key: a jax random key.
      shape: of the weight.
      scheme: switch or moe_mamba.
      scale: s in the formulas.
      fan_in: inputs of one unit; by default the second dim from the end.
    """
    match scheme:
        case "switch":
            return scaled_normal(key, shape, scale=scale, fan_in=fan_in)
        case "moe_mamba":
            sd = math.sqrt(scale / (fan_in or shape[-2]))
            cut = 2 * scale / sd
            if cut > _LARGEST_NORMAL:  # truncated_normal would return the cut itself, once in 2^23 draws
                return sd * jax.random.normal(key, shape)
            return sd * jax.random.truncated_normal(key, -cut, cut, shape)
    raise ValueError(f"model.init={scheme} is not known; choose one of switch, moe_mamba")


def uniform_fan_in(key: Array, shape: tuple[int, ...], *, fan_in: int | None = None) -> Array:
    """Uniform in +-1/sqrt(fan_in): the default of torch.nn.Linear and Conv1d, which Mamba's reference code keeps."""
    bound = 1.0 / math.sqrt(fan_in or shape[-2])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def dt_bias(key: Array, shape: tuple[int, ...], *, dt_min: float, dt_max: float, floor: float = 1e-4) -> Array:
    """The inverse softplus of a dt that is log-uniform in [dt_min, dt_max] (Mamba, section 3.6)."""
    log_dt = jax.random.uniform(key, shape, minval=math.log(dt_min), maxval=math.log(dt_max))
    dt = jnp.maximum(jnp.exp(log_dt), floor)
    return dt + jnp.log(-jnp.expm1(-dt))
