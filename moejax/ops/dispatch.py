"""From an assignment to slots, and tokens into slots and back.

T tokens, K experts a token, E experts, C slots an expert, D model.

Every token choice has at most one slot and every slot at most one choice, so each of the two moves is a gather, and
so is the transpose of each: no one-hot product (T*E*C values) and no scatter-add (whose order is not fixed on a GPU,
which would cost bitwise reproducibility) in either direction.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Slots(NamedTuple):
    """A one-to-one map between token choices and expert slots.

    choice_EC: int32, the choice t * K + k that fills the slot; T * K for an empty one.
    slot_TK: int32, the slot e * C + c that the choice fills; E * C for a dropped one.
    """

    choice_EC: Array
    slot_TK: Array


def assign_slots(expert_TK: Array, *, num_experts: int, capacity: int) -> Slots:
    """Fills each expert's C slots in token order; the choices that come after are dropped.

    A token's choices come one after another before the next token's: whether a choice is dropped depends on no later
    token, for any K. (GShard and flaxformer put every second choice behind all first ones, which lets the future in.)
    """
    num_tokens, num_choices = expert_TK.shape[0], expert_TK.size
    flat = expert_TK.reshape(-1)
    order = jnp.argsort(flat, stable=True)  # choices by expert, in token order within each
    sorted_expert = flat[order]
    start_E = jnp.searchsorted(sorted_expert, jnp.arange(num_experts + 1))
    rank = jnp.arange(num_choices) - start_E[sorted_expert]
    fits = (rank < capacity) & (sorted_expert < num_experts)
    slot = jnp.where(fits, sorted_expert * capacity + rank, num_experts * capacity)
    slot_TK = slot[jnp.argsort(order)].reshape(num_tokens, -1)
    index_EC = start_E[:-1, None] + jnp.arange(capacity)
    choice_EC = jnp.where(index_EC < start_E[1:, None], order.at[index_EC].get(mode="clip"), num_choices)
    return Slots(choice_EC=choice_EC.astype(jnp.int32), slot_TK=slot_TK.astype(jnp.int32))


def _take(rows_ND: Array, index: Array) -> Array:
    """rows[index], zeros where the index is past the end."""
    return rows_ND.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(x_TD: Array, slots: Slots) -> Array:
    """x_ECD: the token in each slot; zeros in an empty one."""
    return _take(x_TD, slots.choice_EC // slots.slot_TK.shape[1])


def _dispatch_fwd(x_TD, slots):
    return dispatch(x_TD, slots), slots


def _dispatch_bwd(slots, dx_ECD):
    return _take(dx_ECD.reshape(-1, dx_ECD.shape[-1]), slots.slot_TK).sum(axis=1), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def collect(y_ECD: Array, slots: Slots) -> Array:
    """y_TKD: the output in the slot of each choice; zeros for a dropped one."""
    return _take(y_ECD.reshape(-1, y_ECD.shape[-1]), slots.slot_TK)


def _collect_fwd(y_ECD, slots):
    return collect(y_ECD, slots), slots


def _collect_bwd(slots, dy_TKD):
    return _take(dy_TKD.reshape(-1, dy_TKD.shape[-1]), slots.choice_EC), None


collect.defvjp(_collect_fwd, _collect_bwd)


def combine(y_ECD: Array, gate_TK: Array, slots: Slots) -> Array:
    """y_TD = sum_k gate_k * (output of the k-th chosen expert); a dropped choice adds nothing."""
    return jnp.einsum("tk,tkd->td", gate_TK.astype(y_ECD.dtype), collect(y_ECD, slots))
