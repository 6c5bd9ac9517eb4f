"""Feed-forward networks: one for all tokens, or one an expert on its slots.

D model, F hidden, E experts, C slots an expert, S slots in all, N tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.ops import grouped


class Weights(NamedTuple):
    """Of E experts. up has two columns a hidden unit for a gated activation (`hidden_multiple`)."""

    up_EDF: Array
    down_EFD: Array
    up_bias_EF: Array | None = None
    down_bias_ED: Array | None = None


def activate(hidden: Array, activation: str, *, axis: int = -1) -> Array:
    """relu, gelu (tanh form), or a gated one, which halves a dim: swiglu is silu(first half) * second half,
    geglu gelu(first half) * second half (arXiv 2002.05202)."""
    match activation:
        case "relu":
            return jax.nn.relu(hidden)
        case "gelu":
            return jax.nn.gelu(hidden)
        case "swiglu" | "geglu":
            gate, up = jnp.split(hidden, 2, axis=axis)
            return (jax.nn.silu(gate) if activation == "swiglu" else jax.nn.gelu(gate)) * up
    raise ValueError(f"activation={activation} is not known; choose one of relu, gelu, swiglu, geglu")


def hidden_multiple(activation: str) -> int:
    """Columns of the first matrix for each hidden unit: a gated activation has two."""
    return 2 if activation in ("swiglu", "geglu") else 1


def capacity_ffn(
    x_SD: Array, weights: Weights, *, activation: str, drop: Callable[[Array], Array] | None = None
) -> Array:
    """y_SD, as wide as down_EFD: each expert on the same number of slots, S = E * C, expert by expert.

    drop: applied to the hidden units, hidden_SF -> hidden_SF; None for none.
    """
    num_experts = weights.up_EDF.shape[0]
    x_ECD = x_SD.reshape(num_experts, -1, x_SD.shape[-1])
    hidden_ECF = jnp.einsum("ecd,edf->ecf", x_ECD, weights.up_EDF.astype(x_SD.dtype))
    if weights.up_bias_EF is not None:
        hidden_ECF += weights.up_bias_EF[:, None].astype(x_SD.dtype)
    hidden_ECF = activate(hidden_ECF, activation)
    if drop is not None:
        hidden_ECF = drop(hidden_ECF.reshape(x_SD.shape[0], -1)).reshape(hidden_ECF.shape)
    y_ECD = jnp.einsum("ecf,efd->ecd", hidden_ECF, weights.down_EFD.astype(x_SD.dtype))
    if weights.down_bias_ED is not None:
        y_ECD += weights.down_bias_ED[:, None].astype(x_SD.dtype)
    return y_ECD.reshape(x_SD.shape[0], -1)


def chosen_ffn(x_ND: Array, expert_NK: Array, gate_NK: Array, weights: Weights, *, activation: str) -> Array:
    """y_ND = sum_k gate_nk * expert_nk(x_n), one choice after another; E for none.

    For few tokens: it reads the matrices of the experts that were chosen, and no others.
    """
    num_experts, num_choices = weights.up_EDF.shape[0], expert_NK.shape[1]

    def add(y_ND: Array, choice: tuple[Array, Array, Array]) -> tuple[Array, None]:
        token, expert, gate = choice
        one = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, expert, 1), weights)
        y_1D = capacity_ffn(jax.lax.dynamic_slice_in_dim(x_ND, token, 1), one, activation=activation)
        y_1D = jnp.where(expert < num_experts, gate.astype(y_1D.dtype) * y_1D, 0)
        return y_ND.at[token].add(y_1D[0]), None

    token_M = jnp.arange(expert_NK.size) // num_choices
    zeros_ND = jnp.zeros((x_ND.shape[0], weights.down_EFD.shape[-1]), x_ND.dtype)
    return jax.lax.scan(add, zeros_ND, (token_M, expert_NK.reshape(-1), gate_NK.reshape(-1)))[0]


def dropless_ffn(
    x_SD: Array,
    count_E: Array,
    weights: Weights,
    *,
    activation: str,
    implementation: str,
    drop: Callable[[Array], Array] | None = None,
) -> Array:
    """y_SD: each expert on count_e slots, expert by expert; slots past the last give no output.

    implementation: of `grouped.grouped_matmul`. drop: as in `capacity_ffn`.
    """
    expert_S = jnp.searchsorted(jnp.cumsum(count_E), jnp.arange(x_SD.shape[0]), side="right")

    def bias(bias_EF: Array) -> Array:
        return bias_EF.astype(x_SD.dtype).at[expert_S].get(mode="fill", fill_value=0)

    def product(x_SD: Array, w_EDF: Array) -> Array:
        return grouped.grouped_matmul(x_SD, w_EDF.astype(x_SD.dtype), count_E, implementation=implementation)

    hidden_SF = product(x_SD, weights.up_EDF)
    if weights.up_bias_EF is not None:
        hidden_SF += bias(weights.up_bias_EF)
    hidden_SF = activate(hidden_SF, activation)
    if drop is not None:
        hidden_SF = drop(hidden_SF)
    y_SD = product(hidden_SF, weights.down_EFD)
    if weights.down_bias_ED is not None:
        y_SD += bias(weights.down_bias_ED)
    return y_SD


def weighted_ffn(
    x_ND: Array, gate_NE: Array, weights: Weights, *, activation: str, drop: Callable[[Array], Array] | None = None
) -> Array:
    """y_ND = sum_e gate_e * expert_e(x): every expert on every token, one at a time, so that memory is that of one."""

    @jax.checkpoint
    def add(y_ND: Array, expert: tuple[Array, Weights]) -> tuple[Array, None]:
        gate_N, one = expert
        out_ND = capacity_ffn(x_ND, jax.tree.map(lambda leaf: leaf[None], one), activation=activation, drop=drop)
        return y_ND + gate_N[:, None] * out_ND, None

    zeros_ND = jnp.zeros((x_ND.shape[0], weights.down_EFD.shape[-1]), jnp.float32)
    return jax.lax.scan(add, zeros_ND, (gate_NE.T, weights))[0].astype(x_ND.dtype)
