"""The selective scan's kernels for GPU; see `scan_pallas` for what they compute.

B batch, L sequence, I inner channels, N states a channel; K chunks, J blocks of channels.

Through Pallas's Triton back end: the scan multiplies no matrices, so Mosaic GPU's tensor cores, barriers and copies
bring it nothing, it needs Hopper or later, and its interface changes from one jax to the next; here loads, stores,
loops and sums are all there is.

One program holds the state of 32 channels in registers and walks all of the row. A chunk's positions are written out:
its loads stand before its arithmetic, and backwards the recomputed states stay in registers, for which Triton has no
other place. N is padded to a power of two.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from moejax import config
from moejax.ops import scan_pallas

CHUNK = 16  # before_BKNI is then as large as v at N=16; 32 would not fit in registers
MAX_STATES = config.SCAN_STATES["pallas_gpu"]
_BLOCK = 32  # channels: a row of them is one 128-byte load
_WARPS = pltriton.CompilerParams(num_warps=2)


def forward(
    v_BLI: Array, dt_BLI: Array, A_NI: Array, B_BLN: Array, C_BLN: Array, state_BNI: Array, *, interpret: bool
) -> tuple[Array, Array, Array]:
    """(y_BLI, the state before each chunk before_BKNI, the state after the last position state_BNI)."""
    (_, length, inner), states = v_BLI.shape, A_NI.shape[0]
    arrays = (*_pad(v_BLI, dt_BLI, A_NI, B_BLN, C_BLN), _pad_state(state_BNI))
    grid, (chunks, padded) = _grid(arrays[0].shape), (arrays[0].shape[1] // CHUNK, arrays[2].shape[0])
    channels, columns, A, before, state, _ = _specs(arrays[0].shape[1], padded)
    like_before = jax.ShapeDtypeStruct((grid[0], chunks, *arrays[2].shape), jnp.float32)
    y_BLI, before_BKNI, state_BNI = pl.pallas_call(
        _forward_kernel,
        grid=grid,
        in_specs=[channels, channels, A, columns, columns, state],
        out_specs=[channels, before, state],
        out_shape=[_like(arrays[0]), like_before, _like(arrays[-1])],
        compiler_params=_WARPS,
        name="selective_scan",
        interpret=interpret,
    )(*arrays)
    return y_BLI[:, :length, :inner], before_BKNI[:, :, :states, :inner], state_BNI[:, :states, :inner]


def backward(
    v_BLI: Array,
    dt_BLI: Array,
    A_NI: Array,
    B_BLN: Array,
    C_BLN: Array,
    before_BKNI: Array,
    dy_BLI: Array,
    dstate_BNI: Array,
    *,
    interpret: bool,
) -> tuple[Array, ...]:
    """Gradients of v_BLI, dt_BLI, A_NI, B_BLN, C_BLN and the initial state_BNI."""
    (_, length, inner), states = v_BLI.shape, A_NI.shape[0]
    arrays = _pad(v_BLI, dt_BLI, A_NI, B_BLN, C_BLN)
    arrays += (_pad_state(before_BKNI), scan_pallas.pad(dy_BLI, CHUNK, _BLOCK), _pad_state(dstate_BNI))
    grid, (_, padded_length, _), padded = _grid(arrays[0].shape), arrays[0].shape, arrays[2].shape[0]
    channels, columns, A, before, state, sums = _specs(padded_length, padded)
    like_sums = jax.ShapeDtypeStruct((*grid, padded_length, padded), jnp.float32)
    dv_BLI, ddt_BLI, dA_BNI, dB_BJLN, dC_BJLN, dstate_BNI = pl.pallas_call(
        _backward_kernel,
        grid=grid,
        in_specs=[channels, channels, A, columns, columns, before, channels, state],
        out_specs=[channels, channels, state, sums, sums, state],
        out_shape=[*map(_like, (arrays[0], arrays[0], arrays[-1])), like_sums, like_sums, _like(arrays[-1])],
        compiler_params=_WARPS,
        name="selective_scan_gradient",
        interpret=interpret,
    )(*arrays)
    dv_BLI, ddt_BLI = dv_BLI[:, :length, :inner], ddt_BLI[:, :length, :inner]
    dB_BLN, dC_BLN = (x_BJLN.sum(axis=1)[:, :length, :states] for x_BJLN in (dB_BJLN, dC_BJLN))
    return dv_BLI, ddt_BLI, dA_BNI.sum(axis=0)[:states, :inner], dB_BLN, dC_BLN, dstate_BNI[:, :states, :inner]


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _pad(v_BLI, dt_BLI, A_NI, B_BLN, C_BLN):
    states = pl.next_power_of_2(A_NI.shape[0])
    if states > MAX_STATES:
        raise ValueError(
            f"implementation=pallas_gpu holds at most {MAX_STATES} states a channel in registers, and A has "
            f"{A_NI.shape[0]}; choose associative"
        )
    v_BLI, dt_BLI = (scan_pallas.pad(x, CHUNK, _BLOCK) for x in (v_BLI, dt_BLI))
    B_BLN, C_BLN = (scan_pallas.pad(x, CHUNK, states) for x in (B_BLN, C_BLN))
    return v_BLI, dt_BLI, _pad_state(A_NI), B_BLN, C_BLN


def _pad_state(x_NI: Array) -> Array:
    return scan_pallas.pad(x_NI, pl.next_power_of_2(x_NI.shape[-2]), _BLOCK)


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[2] // _BLOCK


def _specs(length: int, states: int) -> list[pl.BlockSpec]:
    """What a program sees of (v and the like, B and C, A, before, a state, dB and dC)."""
    return [
        pl.BlockSpec((None, length, _BLOCK), lambda b, j: (b, 0, j)),
        pl.BlockSpec((None, length, states), lambda b, j: (b, 0, 0)),
        pl.BlockSpec((states, _BLOCK), lambda b, j: (0, j)),
        pl.BlockSpec((None, length // CHUNK, states, _BLOCK), lambda b, j: (b, 0, 0, j)),
        pl.BlockSpec((None, states, _BLOCK), lambda b, j: (b, 0, j)),
        pl.BlockSpec((None, None, length, states), lambda b, j: (b, j, 0, 0)),
    ]


def _load(k, rows, columns):
    """For each position of chunk k, rows of the first refs as (1, I) and of the others as (N, 1)."""
    return [
        [ref[k * CHUNK + t][None] for ref in rows] + [ref[k * CHUNK + t][:, None] for ref in columns]
        for t in range(CHUNK)
    ]


def _forward_kernel(v_ref, dt_ref, A_ref, B_ref, C_ref, first_ref, y_ref, before_ref, state_ref):
    A_NI = A_ref[...]

    def chunk(k, h_NI):
        before_ref[k] = h_NI
        outputs = []
        for v_1I, dt_1I, B_N1, C_N1 in _load(k, (v_ref, dt_ref), (B_ref, C_ref)):
            h_NI = jnp.exp(dt_1I * A_NI) * h_NI + v_1I * B_N1
            outputs.append(jnp.sum(h_NI * C_N1, axis=0))
        for t, y_I in enumerate(outputs):
            y_ref[k * CHUNK + t] = y_I
        return h_NI

    state_ref[...] = jax.lax.fori_loop(0, v_ref.shape[0] // CHUNK, chunk, first_ref[...])


def _backward_kernel(
    v_ref, dt_ref, A_ref, B_ref, C_ref, before_ref, dy_ref, dlast_ref,
    dv_ref, ddt_ref, dA_ref, dB_ref, dC_ref, dstate_ref,
):  # fmt: skip
    A_NI = A_ref[...]
    chunks = v_ref.shape[0] // CHUNK

    def chunk(steps, carry):
        g_NI, dA_NI = carry  # g: gradient with respect to the state after a position
        k = chunks - 1 - steps
        loaded = _load(k, (v_ref, dt_ref, dy_ref), (B_ref, C_ref))
        h_NI, befores = before_ref[k], []
        for v_1I, dt_1I, _, B_N1, _ in loaded:
            befores.append(h_NI)
            h_NI = jnp.exp(dt_1I * A_NI) * h_NI + v_1I * B_N1
        for t, (before_NI, (v_1I, dt_1I, dy_1I, B_N1, C_N1)) in reversed(
            list(enumerate(zip(befores, loaded, strict=True)))
        ):
            decay_NI = jnp.exp(dt_1I * A_NI)
            decayed_NI = decay_NI * before_NI
            g_NI = g_NI + dy_1I * C_N1
            dlog_NI = g_NI * decayed_NI  # exactly 0 where decay is: dt may be 1e30
            here = k * CHUNK + t
            dv_ref[here] = jnp.sum(g_NI * B_N1, axis=0)
            ddt_ref[here] = jnp.sum(dlog_NI * A_NI, axis=0)
            dB_ref[here] = jnp.sum(g_NI * v_1I, axis=1)
            dC_ref[here] = jnp.sum((decayed_NI + v_1I * B_N1) * dy_1I, axis=1)
            dA_NI = dA_NI + dlog_NI * dt_1I
            g_NI = decay_NI * g_NI
        return g_NI, dA_NI

    dstate_ref[...], dA_ref[...] = jax.lax.fori_loop(0, chunks, chunk, (dlast_ref[...], jnp.zeros_like(A_NI)))
