"""Feed-forward networks: one for all tokens, or one an expert on its slots.

D model, F hidden, E experts, G groups, C slots an expert.
"""

import jax
import jax.numpy as jnp
from jax import Array


def activate(hidden: Array, activation: str) -> Array:
    """relu, gelu (tanh form), or swiglu, which halves the last dim: silu(first half) * second half."""
    match activation:
        case "relu":
            return jax.nn.relu(hidden)
        case "gelu":
            return jax.nn.gelu(hidden)
        case "swiglu":
            gate, up = jnp.split(hidden, 2, axis=-1)
            return jax.nn.silu(gate) * up
    raise ValueError(f"activation={activation} is not known; choose one of relu, gelu, swiglu")


def hidden_multiple(activation: str) -> int:
    """Columns of the first matrix for each hidden unit: a gated activation has two."""
    return 2 if activation == "swiglu" else 1


def expert_ffn(x_GECD: Array, up_EDF: Array, down_EFD: Array, *, activation: str) -> Array:
    """activate(x up_e) down_e for each expert e on its own slots; y_GECD in the dtype of x."""
    hidden_GECF = activate(jnp.einsum("gecd,edf->gecf", x_GECD, up_EDF.astype(x_GECD.dtype)), activation)
    return jnp.einsum("gecf,efd->gecd", hidden_GECF, down_EFD.astype(x_GECD.dtype))
