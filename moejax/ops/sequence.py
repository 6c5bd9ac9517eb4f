"""The ops that mix positions, on a mesh whose axis `sequence` splits them: each device has a part of every row.

B batch, L sequence (of a device, inside a shard), M the whole sequence, I inner channels, N states a channel, W taps,
H heads, Q head width; of Mamba-2, P channels a head, G groups of J heads.

Where nothing splits the sequence, each function is the op of the same name. Where something does:

- `causal_conv` gets the last W - 1 inputs of the part on its left;
- `selective_scan` first runs over its part from a state of zero. The state that this leaves behind and the decay over
  the part are all that the parts on its right need of it: `carried_state` makes of them the state before each part, and
  the scan runs again from there, so that what comes out is the scan's own;
- `ssd` does the same, but that the state left behind is a matrix product, which costs less than a run for it;
- `attention` gathers keys and values, and keeps its queries.

A document that begins inside a part decays what was before it to exactly 0, so boundaries need nothing else, but for
one between two parts: the segment id on its left is compared with the first one here.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moejax import partition
from moejax.ops import attention as whole_attention
from moejax.ops import conv, scan
from moejax.ops import ssd as whole_ssd

AXIS = "sequence"


def causal_conv(x_BLI: Array, kernel_WI: Array, bias_I: Array, *, segment_ids_BL: Array | None = None) -> Array:
    """`conv.causal_conv`; the parts of a row may be shorter than the kernel."""
    if partition.num_parts(AXIS) == 1:
        return conv.causal_conv(x_BLI, kernel_WI, bias_I, segment_ids_BL=segment_ids_BL)
    return partition.on_shards(_causal_conv, "BLI WI I BL", "BLI")(x_BLI, kernel_WI, bias_I, segment_ids_BL)


def selective_scan(
    u_BLI: Array,
    dt_BLI: Array,
    A_IN: Array,
    B_BLN: Array,
    C_BLN: Array,
    D_I: Array,
    *,
    segment_ids_BL: Array | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """`scan.selective_scan` from a state of zero."""
    if partition.num_parts(AXIS) == 1:
        # Still on each device alone: XLA would sum the gradients of A, B and C over devices in every chunk.
        of_part: Callable[..., Any] = functools.partial(_whole_scan, implementation, chunk_size)
    else:
        of_part = functools.partial(_selective_scan, scan.core(implementation, chunk_size, A_IN.shape[1]))
    arrays = (u_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I)
    return partition.on_shards(of_part, "BLI BLI IN BLN BLN I BL", "BLI BIN")(*arrays, segment_ids_BL)


def ssd(
    x_BLHP: Array,
    dt_BLH: Array,
    A_H: Array,
    B_BLGN: Array,
    C_BLGN: Array,
    D_H: Array,
    *,
    segment_ids_BL: Array | None = None,
    chunk_size: int = whole_ssd.DEFAULT_CHUNK_SIZE,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`ssd.ssd` from a state of zero."""
    arrays, how = (
        (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H),
        {"chunk_size": chunk_size, "implementation": implementation},
    )
    if partition.num_parts(AXIS) == 1:
        return whole_ssd.ssd(*arrays, segment_ids_BL=segment_ids_BL, **how)
    of_part = functools.partial(_ssd, x_BLHP.shape[2] // B_BLGN.shape[2], how)
    return partition.on_shards(of_part, "BLHP BLH H BLGN BLGN H BL", "BLHP BHPN")(*arrays, segment_ids_BL)


def attention(
    query_BLHQ: Array,
    key_BLHQ: Array,
    value_BLHQ: Array,
    *,
    segment_ids_BL: Array | None = None,
    causal: bool = True,
    bias_HLM: Array | None = None,
    keep_BHLM: Array | None = None,
) -> Array:
    """`attention.attention` of a row to itself."""
    arrays = (query_BLHQ, key_BLHQ, value_BLHQ)
    if partition.num_parts(AXIS) == 1:
        return whole_attention.attention(
            *arrays, segment_ids_BL=segment_ids_BL, causal=causal, bias_HLM=bias_HLM, keep_BHLM=keep_BHLM
        )
    run = partition.on_shards(functools.partial(_attention, causal=causal), "BLHQ BLHQ BLHQ BL HLM BHLM", "BLHQ")
    return run(*arrays, segment_ids_BL, bias_HLM, keep_BHLM)


def _whole_scan(implementation: str | None, chunk_size: int | None, *arrays: Any) -> tuple[Array, Array]:
    *inputs, segment_ids_BL = arrays
    return scan.selective_scan(
        *inputs, segment_ids_BL=segment_ids_BL, implementation=implementation, chunk_size=chunk_size
    )


# --- between parts; below, every function runs on one device of many ------------------------------------------------


def from_left(x: Array, hops: int = 1) -> Array:
    """x of the device so many parts to the left (to the right, if negative); zeros where there is none."""
    parts = range(jax.lax.axis_size(AXIS))
    return jax.lax.ppermute(x, AXIS, [(part, part + hops) for part in parts if part + hops in parts])


def carried_state(total: Array, state: Array, decay: Callable[[Array], Array], *, direction: int = 1) -> Array:
    """The state before each part, from what every part does to a state: h -> decay(total) h + state.

    An exclusive scan over the mesh axis in steps of 1, 1, 2, 4, ... parts: a device of n receives 1 + ceil(log2(n - 1))
    states, where gathering them all would be n - 1, and to keep n.

    Args:
      total: sums that add up over parts and say how the state decays, such as those of dt: smaller than the decay.
      state: what a part that starts from zero leaves behind.
      decay: of total, to the shape of state; 1 where total is 0.
      direction: 1, or -1 where what is carried goes from right to left.
    """
    total, state = from_left(total, direction), from_left(state, direction)
    reach = 1
    while reach < jax.lax.axis_size(AXIS) - 1:
        before, state_before = (from_left(x, direction * reach) for x in (total, state))
        total, state = before + total, decay(total) * state_before + state
        reach *= 2
    return state


def _starts(segment_ids_BL: Array) -> Array:
    """Whether the document of a position is another than that of the position before; of a row's first one False."""
    before_B1 = jnp.where(jax.lax.axis_index(AXIS) == 0, segment_ids_BL[:, :1], from_left(segment_ids_BL[:, -1:]))
    return segment_ids_BL != jnp.concatenate([before_B1, segment_ids_BL[:, :-1]], axis=1)


def _of_last_part(x: Array) -> Array:
    is_last_part = jax.lax.axis_index(AXIS) == jax.lax.axis_size(AXIS) - 1
    return jax.lax.psum(jnp.where(is_last_part, x, 0), AXIS)


# --- the ops ---------------------------------------------------------------------------------------------------------


def _causal_conv(x_BLI: Array, kernel_WI: Array, bias_I: Array, segment_ids_BL: Array | None) -> Array:
    num_taps = kernel_WI.shape[0]
    if segment_ids_BL is not None:
        segment_ids_BL = _with_halo(segment_ids_BL, num_taps - 1)
    y_BLI = conv.causal_conv(_with_halo(x_BLI, num_taps - 1), kernel_WI, bias_I, segment_ids_BL=segment_ids_BL)
    return y_BLI[:, num_taps - 1 :]


def _with_halo(x_BLX: Array, width: int) -> Array:
    """The last `width` positions on the left of the part, then the part; zeros before the row."""
    length, parts = x_BLX.shape[1], [x_BLX]
    for hops in range(1, -(-width // length) + 1):  # more than one where parts are shorter than the halo
        needed = min(length, width - (hops - 1) * length)
        reached = hops < jax.lax.axis_size(AXIS)
        last_BLX = x_BLX[:, length - needed :]
        parts.insert(0, from_left(last_BLX, hops) if reached else jnp.zeros_like(last_BLX))
    return jnp.concatenate(parts, axis=1)


def _selective_scan(
    recurrence: scan.Core,
    u_BLI: Array,
    dt_BLI: Array,
    A_IN: Array,
    B_BLN: Array,
    C_BLN: Array,
    D_I: Array,
    segment_ids_BL: Array | None,
) -> tuple[Array, Array]:
    starts_BL = None if segment_ids_BL is None else _starts(segment_ids_BL)
    zeros_BIN = jnp.zeros((u_BLI.shape[0], *A_IN.shape), jnp.float32)
    y_BLI, state_BIN = scan.with_core(
        _between_parts(recurrence), u_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I, starts_BL, zeros_BIN
    )
    return y_BLI, _of_last_part(state_BIN)


def _between_parts(recurrence: scan.Core) -> scan.Core:
    """The recurrence from the state that the parts on the left leave behind; it is given, and ignores, zeros.

    In the backward pass the gradient with respect to the state goes from right to left in the same way: by a recurrence
    over each part from zero, a scan over parts, and the gradient of the recurrence from there. Differentiating the
    forward pass as it stands would take the whole gradient of the first run as well.
    """

    def forward(v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, zeros_BIN):
        _, left_BIN = recurrence(v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, zeros_BIN)
        before_BIN = carried_state(dt_BLI.sum(axis=1), left_BIN, functools.partial(_decay, A_IN))
        outputs, pull_back = jax.vjp(recurrence, v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, before_BIN)
        return outputs, (pull_back, dt_BLI, A_IN, C_BLN)

    def backward(residuals, gradients):
        pull_back, dt_BLI, A_IN, C_BLN = residuals
        dy_BLI, dstate_BIN = gradients
        # g[t] = C[t] dy[t] + decay[t+1] g[t+1], the gradient with respect to h[t]: the recurrence in reverse
        dt_after_BLI = jnp.pad(dt_BLI[:, 1:], ((0, 0), (0, 1), (0, 0)))
        dy_flipped_BLI, dt_flipped_BLI, C_flipped_BLN = (jnp.flip(x, axis=1) for x in (dy_BLI, dt_after_BLI, C_BLN))
        _, g_BIN = recurrence(dy_flipped_BLI, dt_flipped_BLI, A_IN, C_flipped_BLN, C_flipped_BLN, dstate_BIN)
        before_BIN = _decay(A_IN, dt_BLI[:, 0]) * g_BIN
        decay = functools.partial(_decay, A_IN)
        dstate_BIN += carried_state(dt_BLI.sum(axis=1), before_BIN, decay, direction=-1)
        *dinputs, _ = pull_back((dy_BLI, dstate_BIN))
        return *dinputs, jnp.zeros_like(dstate_BIN)

    between_parts = jax.custom_vjp(lambda *inputs: forward(*inputs)[0])
    between_parts.defvjp(forward, backward)
    return between_parts


def _decay(A_IN: Array, dt_BI: Array) -> Array:
    return jnp.exp(dt_BI[..., None] * A_IN)


def _ssd(
    heads_a_group: int,
    how: dict[str, Any],
    x_BLHP: Array,
    dt_BLH: Array,
    A_H: Array,
    B_BLGN: Array,
    C_BLGN: Array,
    D_H: Array,
    segment_ids_BL: Array | None,
) -> tuple[Array, Array]:
    B_BLGN, C_BLGN = (_groups_here(x_BLGN, x_BLHP.shape[2], heads_a_group) for x_BLGN in (B_BLGN, C_BLGN))
    A32_H, dt32_BLH = A_H.astype(jnp.float32), dt_BLH.astype(jnp.float32)
    decay_dt_BLH, continues_B = dt32_BLH, None
    if segment_ids_BL is not None:
        starts_BL = _starts(segment_ids_BL)
        decay_dt_BLH = jnp.where(starts_BL[..., None], scan.FORGET_DT, dt32_BLH)
        continues_B = ~starts_BL[:, 0]
    from_here_BLH = jax.lax.cumsum(decay_dt_BLH, axis=1, reverse=True)
    after_BLH = jnp.pad(from_here_BLH[:, 1:], ((0, 0), (0, 1), (0, 0)))
    decayed_BLHP = (jnp.exp(after_BLH * A32_H) * dt32_BLH)[..., None] * x_BLHP.astype(jnp.float32)
    decayed_BLGJP = decayed_BLHP.reshape(*B_BLGN.shape[:3], -1, x_BLHP.shape[3])
    left_BGJPN = jnp.einsum("blgjp,blgn->bgjpn", decayed_BLGJP, B_BLGN.astype(jnp.float32), precision="float32")
    left_BHPN = left_BGJPN.reshape(x_BLHP.shape[0], *x_BLHP.shape[2:], -1)
    state_BHPN = carried_state(
        from_here_BLH[:, 0], left_BHPN, lambda total_BH: jnp.exp(total_BH * A32_H)[..., None, None]
    )
    if continues_B is not None:
        state_BHPN = jnp.where(continues_B[:, None, None, None], state_BHPN, 0)
    y_BLHP, state_BHPN = whole_ssd.ssd(
        x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, segment_ids_BL=segment_ids_BL, initial_state_BHPN=state_BHPN, **how
    )
    return y_BLHP, _of_last_part(state_BHPN)


def _groups_here(x_BLGN: Array, num_heads: int, heads_a_group: int) -> Array:
    """Of all groups those of the heads that this device has: whole groups, or a part of one."""
    if num_heads % heads_a_group and heads_a_group % num_heads:
        raise ValueError(
            f"mesh.tensor={jax.lax.axis_size('tensor')} leaves {num_heads} heads a device, which cut groups of "
            f"{heads_a_group} heads; set it to a divisor of the number of groups"
        )
    first = jax.lax.axis_index("tensor") * num_heads // heads_a_group
    return jax.lax.dynamic_slice_in_dim(x_BLGN, first, max(1, num_heads // heads_a_group), axis=2)


def _attention(
    query_BLHQ: Array,
    key_BLHQ: Array,
    value_BLHQ: Array,
    segment_ids_BL: Array | None,
    bias_HLM: Array | None,
    keep_BHLM: Array | None,
    causal: bool,
) -> Array:
    gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, axis=1, tiled=True)
    key_BMHQ, value_BMHQ = gather(key_BLHQ), gather(value_BLHQ)
    length = query_BLHQ.shape[1]
    mask_BLM = None
    if causal:
        place_L = jax.lax.axis_index(AXIS) * length + jnp.arange(length)
        mask_BLM = (jnp.arange(key_BMHQ.shape[1]) <= place_L[:, None])[None]
    if segment_ids_BL is not None:
        same_BLM = segment_ids_BL[:, :, None] == gather(segment_ids_BL)[:, None]
        mask_BLM = same_BLM if mask_BLM is None else mask_BLM & same_BLM
    mask_B1LM = None if mask_BLM is None else mask_BLM[:, None]
    return whole_attention.weighted(query_BLHQ, key_BMHQ, value_BMHQ, mask_B1LM, bias_HLM, keep_BHLM, causal=False)
