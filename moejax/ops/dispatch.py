"""From an assignment to slots, and tokens into slots and back.

N tokens of all groups, T tokens a group, G groups, K experts a token, E experts, C slots an expert in a group,
S slots in all, D model.

A slot is a row of an expert's input. With a capacity every expert has C slots in each group, and what does not fit is
dropped; dropless, there is a slot for every choice, expert by expert. Every choice has at most one slot and every slot
at most one choice, so dispatch is a gather, and combine a gather too: no one-hot product (N*E*C values) in either
direction, and for few choices a token no scatter-add, whose order is not fixed on a GPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Choices a token up to which its outputs are gathered, K rows a token; beyond, most are empty, and adding each slot to
# its token reads less.
MAX_GATHERED = 8


class Slots(NamedTuple):
    """A one-to-one map between token choices and slots.

    choice_S: int32, the choice n * K + k that fills the slot; N * K for an empty one.
    slot_NK: int32, the slot that the choice fills; S for a dropped one, and for a choice of no expert.
    """

    choice_S: Array
    slot_NK: Array


def capacity_slots(
    expert_GTK: Array, *, num_experts: int, capacity: int, order: str = "tokens", priority_GT: Array | None = None
) -> Slots:
    """Fills each expert's C slots, group by group, until they are full; S = E * G * C, expert by expert.

    Args:
      expert_GTK: the choices, E for none.
      num_experts: E.
      capacity: C.
      order: who comes first. "tokens": all choices of a token before the next token's, so that a drop depends on no
        later token. "choices": first choices of all tokens, then second ones (GShard, flaxformer): a second choice may
        be dropped for a later token's first. "priority": the same, tokens of higher priority first (V-MoE,
        arXiv 2106.05974, section 4.1).
      priority_GT: for order "priority".
    """
    num_groups, num_tokens, num_choices = expert_GTK.shape
    if priority_GT is None:
        priority_GT = jnp.zeros((num_groups, num_tokens))

    def of_group(expert_TK: Array, priority_T: Array) -> tuple[Array, Array]:
        queue_M = _queue(priority_T, order, num_choices)
        return _group_slots(expert_TK.reshape(-1), queue_M, num_experts, capacity)

    choice_GEC, slot_GM = jax.vmap(of_group)(expert_GTK, priority_GT)
    # from numbers inside a group to numbers of the batch; slots lie expert by expert, then group by group
    group_G1 = jnp.arange(num_groups)[:, None]
    per_group = num_tokens * num_choices
    choice_GEC = jnp.where(choice_GEC < per_group, choice_GEC + group_G1[..., None] * per_group, num_groups * per_group)
    expert_GM, place_GM = slot_GM // capacity, slot_GM % capacity
    slot_GM = (expert_GM * num_groups + group_G1) * capacity + place_GM
    slot_GM = jnp.where(expert_GM < num_experts, slot_GM, num_experts * num_groups * capacity)
    return Slots(
        choice_S=choice_GEC.swapaxes(0, 1).reshape(-1).astype(jnp.int32),
        slot_NK=slot_GM.reshape(-1, num_choices).astype(jnp.int32),
    )


def dropless_slots(expert_NK: Array, *, num_experts: int) -> tuple[Slots, Array]:
    """A slot for every choice: S = N * K, sorted by expert, in token order within each; choices of none come last.

    Returns:
      The slots, and count_E: int32, how many each expert has.
    """
    expert_M = expert_NK.reshape(-1)
    order_M = jnp.argsort(expert_M, stable=True)
    end_E = jnp.searchsorted(expert_M[order_M], jnp.arange(num_experts), side="right")
    used_M = jnp.arange(expert_M.size) < end_E[-1]
    slot_M = jnp.where(expert_M < num_experts, jnp.argsort(order_M), expert_M.size)
    slots = Slots(
        choice_S=jnp.where(used_M, order_M, expert_M.size).astype(jnp.int32),
        slot_NK=slot_M.reshape(expert_NK.shape).astype(jnp.int32),
    )
    return slots, jnp.diff(end_E, prepend=0).astype(jnp.int32)


def _queue(priority_T: Array, order: str, num_choices: int) -> Array:
    """The choices t * K + k of a group in the order in which they are served."""
    choice_TK = jnp.arange(priority_T.size * num_choices).reshape(-1, num_choices)
    match order:
        case "tokens":
            return choice_TK.reshape(-1)
        case "choices":
            return choice_TK.T.reshape(-1)
        case "priority":
            return choice_TK[jnp.argsort(-priority_T, stable=True)].T.reshape(-1)
    raise ValueError(f"order={order} is not known; choose one of tokens, choices, priority")


def _group_slots(expert_M: Array, queue_M: Array, num_experts: int, capacity: int) -> tuple[Array, Array]:
    """(choice_EC, slot_M) of the choices of one group, served in the order of queue_M."""
    order_M = queue_M[jnp.argsort(expert_M[queue_M], stable=True)]  # by expert, in the queue's order within each
    sorted_M = expert_M[order_M]
    start_E = jnp.searchsorted(sorted_M, jnp.arange(num_experts + 1))
    place_M = jnp.arange(expert_M.size) - start_E[sorted_M]
    fits_M = (place_M < capacity) & (sorted_M < num_experts)
    slot_M = jnp.where(fits_M, sorted_M * capacity + place_M, num_experts * capacity)[jnp.argsort(order_M)]
    index_EC = start_E[:-1, None] + jnp.arange(capacity)
    choice_EC = jnp.where(index_EC < start_E[1:, None], order_M.at[index_EC].get(mode="clip"), expert_M.size)
    return choice_EC, slot_M


# --- moving rows ---------------------------------------------------------------------------------------------------


def _take(rows: Array, index: Array) -> Array:
    """rows[index], zeros where the index is past the end."""
    return rows.at[index].get(mode="fill", fill_value=0)


def _to_slots(x_ND: Array, slots: Slots) -> Array:
    return _take(x_ND, slots.choice_S // slots.slot_NK.shape[1])


def _to_tokens(y_SD: Array, slots: Slots) -> Array:
    num_tokens, num_choices = slots.slot_NK.shape
    if num_choices <= MAX_GATHERED:
        return _take(y_SD, slots.slot_NK).sum(axis=1)
    token_S = slots.choice_S // num_choices
    return jnp.zeros((num_tokens, y_SD.shape[1]), y_SD.dtype).at[token_S].add(y_SD, mode="drop")


@jax.custom_vjp
def dispatch(x_ND: Array, slots: Slots) -> Array:
    """x_SD: the token in each slot; zeros in an empty one."""
    return _to_slots(x_ND, slots)


@jax.custom_vjp
def undispatch(y_SD: Array, slots: Slots) -> Array:
    """y_ND: the sum over each token's slots; its transpose is `dispatch`."""
    return _to_tokens(y_SD, slots)


@jax.custom_vjp
def to_slots(value_NK: Array, slots: Slots) -> Array:
    """value_S: what belongs to the choice in each slot, such as its gate; 0 in an empty one."""
    return _take(value_NK.reshape(-1), slots.choice_S)


# Each of these is the other's transpose, or its own inverse where it is defined.
dispatch.defvjp(
    lambda x_ND, slots: (_to_slots(x_ND, slots), slots), lambda slots, dx_SD: (_to_tokens(dx_SD, slots), None)
)
undispatch.defvjp(
    lambda y_SD, slots: (_to_tokens(y_SD, slots), slots), lambda slots, dy_ND: (_to_slots(dy_ND, slots), None)
)
to_slots.defvjp(
    lambda value_NK, slots: (_take(value_NK.reshape(-1), slots.choice_S), slots),
    lambda slots, d_S: (_take(d_S, slots.slot_NK), None),
)


def combine(y_SD: Array, gate_NK: Array, slots: Slots) -> Array:
    """y_ND = sum_k gate_k * (output of the k-th chosen expert); a dropped choice adds nothing."""
    return undispatch(to_slots(gate_NK, slots)[:, None].astype(y_SD.dtype) * y_SD, slots)


def kept(slots: Slots) -> Array:
    """kept_NK: whether each choice has a slot."""
    return slots.slot_NK < slots.choice_S.size
