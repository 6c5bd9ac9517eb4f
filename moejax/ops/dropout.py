"""Dropout (Srivastava et al. 2014), row by row.

B batch.
"""

import jax
import jax.numpy as jnp
from jax import Array


def factors(keys_B: Array, shape: tuple[int, ...], rate: float) -> Array:
    """What to multiply by, of this shape: 0 with probability `rate`, else 1 / (1 - rate).

    keys_B: a random key a row, so that a row's factors depend neither on the mesh nor on the batch it is in.
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape[1:]))(keys_B)
    return keep.astype(jnp.float32) / (1 - rate)


def dropout(x_B: Array, keys_B: Array | None, rate: float) -> Array:
    """x_B times `factors`, over any dims after B; x_B itself without keys or at rate 0."""
    if keys_B is None or rate == 0:
        return x_B
    return (x_B * factors(keys_B, x_B.shape, rate)).astype(x_B.dtype)
