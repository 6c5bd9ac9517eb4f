"""Tokens to the devices that hold their experts, and back.

B batch, L sequence (of a device, inside a shard), M the whole sequence, K experts a token, E experts, C slots of an
expert, S slots in all, N tokens, P parts of the axis `expert`, D model, H halves of a gated activation, F hidden, Z
words of a random key.

Rows of a batch are split over `expert` as over `data`, and experts are split over it, too; so a token travels:

- by capacity, each device fills slots for all experts from its own routing groups; one all-to-all takes the slots of
  each expert to its device, another brings the outputs back, and each device combines those of its own tokens. Slots
  are equal parts, whatever the router chose;
- dropless, what goes where depends on the router. `ragged` sends each choice once (`jax.lax.ragged_all_to_all`, TPU and
  GPU); `gather` sends every token to all devices of the axis, each adds up what its experts make of it, and the sums
  are scattered: less than ragged where a token has as many experts as the axis has devices;
- where every token goes to every expert (router=soft), `gather` again.

Where `sequence` splits a row, slots of a group are filled by tokens of several devices: the tokens are gathered, each
device takes an equal part of the slots, and the outputs are summed and scattered. Dropless needs none of it. Matrices
are gathered over `fsdp`; over `tensor` each device has some hidden units of every expert, and the outputs are summed.

These functions run on each device of a mesh on its own part (`partition.on_shards`), and on a device alone.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, ad_checkpoint

from moejax import partition
from moejax.ops import dispatch, experts

EXCHANGES = ("ragged", "gather")
RECEIVED = "received"  # what came from other devices, for the policy of a checkpoint


class Settings(NamedTuple):
    """What the functions of this file have in common.

    activation: see `experts.activate`. normalise: divide a token's gates by the sum over its choices that have a slot.
    drop_rate: of hidden units, by the random key of their choice. grouped_matmul: of `grouped.grouped_matmul`.
    exchange: of EXCHANGES. num_chunks: parts of the slots that are sent, computed and sent back one after another, so
    that one can travel while another is computed.
    """

    activation: str
    dtype: jnp.dtype
    normalise: bool = False
    drop_rate: float = 0.0
    grouped_matmul: str = "blocked"
    exchange: str = "gather"
    num_chunks: int = 1


class Weights(NamedTuple):
    """Of a device's experts, as they are stored: up_EDHF has two halves for a gated activation, else one."""

    up_EDHF: Array
    down_EFD: Array
    up_bias_EHF: Array | None = None
    down_bias_ED: Array | None = None


# Logical axes of `Weights`, for `partition.on_shards`.
AXES = "expert,embed,half,ffn expert,ffn,embed expert,half,ffn expert,embed"


class Choices(NamedTuple):
    """Of every token: expert_BLK (E for none), gate_BLK, and seed_BLKZ, the data of a random key (None: no dropout)."""

    expert_BLK: Array
    gate_BLK: Array
    seed_BLKZ: Array | None = None


def capacity(
    x_BLD: Array,
    choices_BM: Choices,
    weights: Weights,
    settings: Settings,
    *,
    group_size: int,
    capacity: int,
    order: str,
    priority_BM: Array,
) -> tuple[Array, Array]:
    """y_BLD = sum over a token's choices that have a slot of gate * expert(x), and how many choices have none, int32.

    Args:
      choices_BM, priority_BM: of whole rows.
      group_size: tokens among which `capacity` slots an expert are counted.
      order: and priority_BM, of `dispatch.capacity_slots`.
    """
    expert_BMK, gate_BMK, seed_BMKZ = choices_BM
    num_choices, local = expert_BMK.shape[-1], _here(weights, settings)
    num_experts = len(local.up_EDF) * partition.num_parts("expert")
    x_BMD = partition.gathered(x_BLD, "sequence", 1)
    every = dispatch.capacity_slots(
        expert_BMK.reshape(-1, group_size, num_choices),
        num_experts=num_experts,
        capacity=capacity,
        order=order,
        priority_GT=priority_BM.reshape(-1, group_size),
    )
    kept_BMK = dispatch.kept(every).reshape(expert_BMK.shape)
    dropped = jnp.sum((expert_BMK < num_experts) & ~kept_BMK, dtype=jnp.int32)
    mine = _part_of(every, num_experts)
    x_SD = dispatch.dispatch(x_BMD.reshape(-1, x_BMD.shape[-1]), mine)
    seed_SZ = None if seed_BMKZ is None else _rows_of_slots(seed_BMKZ, mine)
    x_ECD = x_SD.reshape(num_experts, -1, x_SD.shape[-1])
    y_ECD = _send(x_ECD, None if seed_SZ is None else seed_SZ.reshape(*x_ECD.shape[:2], -1), local, settings)
    gate_NK = _gates(gate_BMK, kept_BMK, settings).reshape(-1, num_choices)
    y_ND = dispatch.combine(y_ECD.reshape(-1, y_ECD.shape[-1]), gate_NK, mine)
    y_BMD = partition.summed(y_ND, "tensor").reshape(*x_BMD.shape[:2], -1)
    return partition.scattered(y_BMD, "sequence", 1), dropped


def dropless(x_BLD: Array, choices_BL: Choices, weights: Weights, settings: Settings) -> Array:
    """y_BLD = sum over a token's choices of gate * expert(x)."""
    run = _ragged if settings.exchange == "ragged" else _gather
    return run(x_BLD, choices_BL, _here(weights, settings), settings)


def _gather(x_BLD: Array, choices_BL: Choices, local: experts.Weights, settings: Settings) -> Array:
    expert_BLK, gate_BLK, seed_BLKZ = choices_BL
    num_local, num_choices = len(local.up_EDF), expert_BLK.shape[-1]
    parts = partition.num_parts("expert")
    gate_BLK = _gates(gate_BLK, expert_BLK < num_local * parts, settings)
    x_ND = partition.gathered(x_BLD.reshape(-1, x_BLD.shape[-1]), "expert", 0)
    expert_NK, gate_NK = (partition.gathered(x.reshape(-1, num_choices), "expert", 0) for x in (expert_BLK, gate_BLK))
    seed_NKZ = None
    if seed_BLKZ is not None:
        seed_NKZ = partition.gathered(seed_BLKZ.reshape(-1, *seed_BLKZ.shape[2:]), "expert", 0)
    if parts > 1:
        expert_NK = expert_NK - partition.index("expert") * num_local
        expert_NK = jnp.where((expert_NK >= 0) & (expert_NK < num_local), expert_NK, num_local)
        if num_local < num_choices:  # a token has at most num_local experts here: they come first, and the rest goes
            order_NK = jnp.argsort(expert_NK == num_local, axis=1, stable=True)[:, :num_local]
            expert_NK, gate_NK = (jnp.take_along_axis(x, order_NK, axis=1) for x in (expert_NK, gate_NK))
            if seed_NKZ is not None:
                seed_NKZ = jnp.take_along_axis(seed_NKZ, order_NK[..., None], axis=1)
    sorted_slots, count_E = dispatch.dropless_slots(expert_NK, num_experts=num_local)
    seed_SZ = None if seed_NKZ is None else _rows_of_slots(seed_NKZ, sorted_slots)
    y_SD = _grouped(dispatch.dispatch(x_ND, sorted_slots), count_E, seed_SZ, local, settings)
    y_ND = partition.summed(dispatch.combine(y_SD, gate_NK, sorted_slots), "tensor")
    return partition.scattered(y_ND, "expert", 0).reshape(*x_BLD.shape[:2], -1)


def _ragged(x_BLD: Array, choices_BL: Choices, local: experts.Weights, settings: Settings) -> Array:
    expert_BLK, gate_BLK, seed_BLKZ = choices_BL
    num_choices = expert_BLK.shape[-1]
    num_local, parts = len(local.up_EDF), partition.num_parts("expert")
    gate_NK = _gates(gate_BLK, expert_BLK < num_local * parts, settings).reshape(-1, num_choices)
    here, count_E = dispatch.dropless_slots(expert_BLK.reshape(-1, num_choices), num_experts=num_local * parts)
    # choices that each device has for each expert of each device, and for that device as a whole
    count_PPE = partition.gathered(count_E[None], "expert", 0).reshape(parts, parts, num_local)
    size_PP = count_PPE.sum(axis=-1)
    num_slots = expert_BLK.size  # of this device; none of its tokens has more experts than another device holds:
    num_rows = parts * num_slots // num_choices * min(num_choices, num_local)
    # What comes lies by sender, and by expert in each sender's part.
    end_R = jnp.cumsum(count_PPE[:, partition.index("expert")].reshape(-1))
    place_R = jnp.searchsorted(end_R, jnp.arange(num_rows), side="right")
    expert_R = jnp.where(place_R < end_R.size, place_R % num_local, num_local)
    there, count_E = dispatch.dropless_slots(expert_R[:, None], num_experts=num_local)
    x_SD = dispatch.dispatch(x_BLD.reshape(-1, x_BLD.shape[-1]), here)
    x_SD = dispatch.dispatch(_exchange(x_SD, size_PP, num_slots, num_rows), there)
    seed_SZ = None
    if seed_BLKZ is not None:
        seed_RZ = _move(_rows_of_slots(seed_BLKZ, here), size_PP, num_rows)
        seed_SZ = _rows_of_slots(seed_RZ[:, None], there)
    y_SD = _grouped(x_SD, count_E, seed_SZ, local, settings)
    y_SD: Array = _exchange(dispatch.undispatch(y_SD, there), size_PP.T, num_rows, num_slots)
    return partition.summed(dispatch.combine(y_SD, gate_NK, here), "tensor").reshape(*x_BLD.shape[:2], -1)


def all_experts(x_BLD: Array, gate_BLE: Array, weights: Weights, settings: Settings) -> Array:
    """y_BLD = sum over all experts of gate * expert(x)."""
    local = _here(weights, settings)
    x_ND = partition.gathered(x_BLD.reshape(-1, x_BLD.shape[-1]), "expert", 0)
    gate_NE = partition.gathered(gate_BLE.reshape(len(x_ND) // partition.num_parts("expert"), -1), "expert", 0)
    gate_NE = partition.part(gate_NE, "expert", 1)
    y_ND = partition.summed(experts.weighted_ffn(x_ND, gate_NE, local, activation=settings.activation), "tensor")
    return partition.scattered(y_ND, "expert", 0).reshape(*x_BLD.shape[:2], -1)


def slots(x_ECD: Array, weights: Weights, settings: Settings) -> Array:
    """y_ECD: each expert on the slots that this device's groups have for it."""
    return partition.summed(_send(x_ECD, None, _here(weights, settings), settings), "tensor")


def few(x_BLD: Array, choices: Choices, weights: Weights, settings: Settings) -> Array:
    """`dropless` for fewer choices than experts, on one device: it reads the experts that were chosen alone."""
    num_choices, num_experts = choices.expert_BLK.shape[-1], len(weights.down_EFD)
    gate_BLK = _gates(choices.gate_BLK, choices.expert_BLK < num_experts, settings)
    expert_NK, gate_NK = (x.reshape(-1, num_choices) for x in (choices.expert_BLK, gate_BLK))
    x_ND = x_BLD.reshape(-1, x_BLD.shape[-1])
    y_ND = experts.chosen_ffn(x_ND, expert_NK, gate_NK, _flat(weights), activation=settings.activation)
    return y_ND.reshape(*x_BLD.shape[:2], -1)


def _here(weights: Weights, settings: Settings) -> experts.Weights:
    """The matrices of a device's experts, whole but for their hidden units over `tensor`, in the compute dtype."""
    weights = jax.tree.map(lambda x: x.astype(settings.dtype), weights)  # before they travel
    down_bias_ED = weights.down_bias_ED
    if down_bias_ED is not None:
        down_bias_ED = partition.gathered(down_bias_ED, "fsdp", 1)
        if partition.num_parts("tensor") > 1:  # outputs are summed over it, and this is to be in the sum once
            down_bias_ED = jnp.where(partition.index("tensor") == 0, down_bias_ED, 0)
    up_EDHF, down_EFD = partition.gathered(weights.up_EDHF, "fsdp", 1), partition.gathered(weights.down_EFD, "fsdp", 2)
    return _flat(Weights(up_EDHF, down_EFD, weights.up_bias_EHF, down_bias_ED))


def _flat(weights: Weights) -> experts.Weights:
    """The halves of a gated activation in one dim."""
    up_EDHF, down_EFD, up_bias_EHF, down_bias_ED = weights
    up_bias_EF = None if up_bias_EHF is None else up_bias_EHF.reshape(len(up_bias_EHF), -1)
    return experts.Weights(up_EDHF.reshape(*up_EDHF.shape[:2], -1), down_EFD, up_bias_EF, down_bias_ED)


def _send(x_ECD: Array, seed_ECZ: Array | None, local: experts.Weights, settings: Settings) -> Array:
    """y_ECD of this device's slots: to their experts' devices, through the experts, and back."""
    num_slots, outputs = x_ECD.shape[1], []
    bounds = np.linspace(0, num_slots, min(settings.num_chunks, num_slots) + 1).astype(int)
    for start, end in itertools.pairwise(bounds.tolist()):
        part_ECD = _to_experts(x_ECD[:, start:end])
        drop = None
        if seed_ECZ is not None:
            part_ECZ = _to_experts(seed_ECZ[:, start:end])
            drop = _dropout(part_ECZ.reshape(-1, part_ECZ.shape[-1]), settings)
        part_SD = part_ECD.reshape(-1, part_ECD.shape[-1])
        y_SD = experts.capacity_ffn(part_SD, local, activation=settings.activation, drop=drop)
        outputs.append(_from_experts(y_SD.reshape(*part_ECD.shape[:2], -1)))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _grouped(x_SD: Array, count_E: Array, seed_SZ: Array | None, local: experts.Weights, settings: Settings) -> Array:
    return experts.dropless_ffn(
        x_SD,
        count_E,
        local,
        activation=settings.activation,
        implementation=settings.grouped_matmul,
        drop=None if seed_SZ is None else _dropout(seed_SZ, settings),
    )


def _gates(gate_BLK: Array, kept_BLK: Array, settings: Settings) -> Array:
    if not settings.normalise:
        return gate_BLK
    gate_BLK = jnp.where(kept_BLK, gate_BLK, 0.0)
    return gate_BLK / (gate_BLK.sum(axis=-1, keepdims=True) + 1e-9)


def _dropout(seed_SZ: Array, settings: Settings) -> Callable[[Array], Array]:
    """hidden_SF -> hidden_SF with a share drop_rate of it 0, the rest over 1 - drop_rate; the same on any mesh."""
    keep, parts = 1 - settings.drop_rate, partition.num_parts("tensor")

    def drop(hidden_SF: Array) -> Array:
        shape = (hidden_SF.shape[1] * parts,)
        keep_SF = jax.vmap(lambda key: jax.random.bernoulli(key, keep, shape))(jax.random.wrap_key_data(seed_SZ))
        return jnp.where(partition.part(keep_SF, "tensor", 1), hidden_SF / keep, 0)

    return drop


def _rows_of_slots(value_NKZ: Array, places: dispatch.Slots) -> Array:
    """value_SZ: what belongs to the choice in each slot; that of some choice in an empty one."""
    return value_NKZ.reshape(-1, value_NKZ.shape[-1]).at[places.choice_S].get(mode="clip")


def _part_of(every: dispatch.Slots, num_experts: int) -> dispatch.Slots:
    """Of each expert's slots, the part that is this device's, of those that `sequence` splits the row over."""
    parts = partition.num_parts("sequence")
    if parts == 1:
        return every
    per_expert = every.choice_S.size // num_experts
    size, me = -(-per_expert // parts), partition.index("sequence")
    choice_EC = every.choice_S.reshape(num_experts, -1)
    choice_EC = jnp.pad(choice_EC, ((0, 0), (0, size * parts - per_expert)), constant_values=every.slot_NK.size)
    choice_EC = jax.lax.dynamic_slice_in_dim(choice_EC, me * size, size, axis=1)
    expert_NK, place_NK = every.slot_NK // per_expert, every.slot_NK % per_expert
    is_mine_NK = dispatch.kept(every) & (place_NK // size == me)
    slot_NK = jnp.where(is_mine_NK, expert_NK * size + place_NK % size, num_experts * size)
    return dispatch.Slots(choice_EC.reshape(-1), slot_NK)


# --- between devices, where there are several ----------------------------------------------------------------------


def _to_experts(x_ECD: Array) -> Array:
    """Slots of all experts for this device's tokens -> of this device's experts for all tokens, P times as many."""
    if partition.num_parts("expert") == 1:
        return x_ECD
    return _received(jax.lax.all_to_all(x_ECD, "expert", split_axis=0, concat_axis=1, tiled=True))


def _from_experts(x_ECD: Array) -> Array:
    """The inverse, and the transpose, of `_to_experts`."""
    if partition.num_parts("expert") == 1:
        return x_ECD
    return _received(jax.lax.all_to_all(x_ECD, "expert", split_axis=1, concat_axis=0, tiled=True))


def _received(x_ECD: Array) -> Array:
    """Kept where a checkpoint recomputes the rest (`RECEIVED`): memory for a few slots, not the network once more.

    What is exchanged dropless is sent again: buffers for its worst case are too large to keep.
    """
    return ad_checkpoint.checkpoint_name(x_ECD, RECEIVED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exchange(x_SD: Array, size_PP: Array, num_slots: int, num_rows: int) -> Array:
    """`_move` of S rows to R, with its transpose, the same on the way back, as its gradient."""
    return _move(x_SD, size_PP, num_rows)


_exchange.defvjp(
    lambda x_SD, size_PP, num_slots, num_rows: (_move(x_SD, size_PP, num_rows), size_PP),
    lambda num_slots, num_rows, size_PP, dy_RD: (_move(dy_RD, size_PP.T, num_slots), None),
)


def _move(x_SD: Array, size_PP: Array, num_rows: int) -> Array:
    """x_RD, R = num_rows: the rows that are for this device, by sender; zeros past the last.

    x_SD: rows sorted by the device that they are for. size_PP: [i, j] is how many i has for j.
    """
    me = partition.index("expert")
    if partition.num_parts("expert") == 1:
        return jnp.where(jnp.arange(num_rows)[:, None] < size_PP[0, 0], x_SD[:num_rows], 0)
    before_PP = jnp.cumsum(size_PP, axis=0) - size_PP  # [i, j]: where the rows of i begin at j
    return jax.lax.ragged_all_to_all(
        x_SD,
        jnp.zeros((num_rows, x_SD.shape[1]), x_SD.dtype),
        jnp.cumsum(size_PP[me]) - size_PP[me],
        size_PP[me],
        before_PP[me],
        size_PP[:, me],
        axis_name="expert",
    )
