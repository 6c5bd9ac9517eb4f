"""The selective scan's kernels for TPU; see `scan_pallas` for what they compute.

B batch, L sequence, c positions a chunk, I inner channels, N states a channel; K chunks, J blocks of channels.

The grid is (rows, blocks of channels, chunks), its last dim in order: the state goes from chunk to chunk in VMEM. In a
chunk, a loop over time holds a state of N sublanes by up to 512 lanes (eight vector registers at N=16) and takes a row
of v and dt. B and C come with time along the lanes, a whole chunk in N / 8 registers; a position's column is a masked
sum over lanes. VMEM at N=16 and 512 channels: forward 1.7 MB, backward 7 MB, of which 4 MB are the chunk's states.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax import config
from moejax.ops import scan_pallas

CHUNK = 128  # one register of lanes
MAX_STATES = config.SCAN_STATES["pallas_tpu"]
_MAX_BLOCK = 8192  # states a position: 128 positions of 4 bytes take 4 MB of VMEM's 16
_UNROLL = 8  # positions whose work the compiler may overlap; only the state is a chain
_LOG2 = math.log(2)
_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def forward(
    v_BLI: Array, dt_BLI: Array, A_NI: Array, B_BLN: Array, C_BLN: Array, state_BNI: Array, *, interpret: bool
) -> tuple[Array, Array, Array]:
    """(y_BLI, the state before each chunk before_BKNI, the state after the last position state_BNI)."""
    (batch, length, inner), states = v_BLI.shape, A_NI.shape[0]
    arrays = (*_pad(v_BLI, dt_BLI, A_NI, B_BLN, C_BLN), scan_pallas.pad(state_BNI, 128))
    grid, block = _grid(arrays[0].shape, states)
    chunk, columns, A, before, state, _ = _specs(block, states, lambda k: k)
    y_BLI, before_BKNI, state_BNI = pl.pallas_call(
        functools.partial(_forward_kernel, unroll=1 if interpret else _UNROLL),
        grid=grid,
        in_specs=[chunk, chunk, A, columns, columns, state],
        out_specs=[chunk, before, state],
        out_shape=[
            jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32),
            jax.ShapeDtypeStruct((batch, grid[2], *arrays[2].shape), jnp.float32),
            jax.ShapeDtypeStruct(arrays[-1].shape, jnp.float32),
        ],
        compiler_params=_ORDER,
        cost_estimate=_cost(v_BLI, states, flops=7, exponentials=1, arrays=3),
        name="selective_scan",
        interpret=interpret,
    )(*arrays)
    return y_BLI[:, :length, :inner], before_BKNI[..., :inner], state_BNI[..., :inner]


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
    (batch, length, inner), states = v_BLI.shape, A_NI.shape[0]
    arrays = _pad(v_BLI, dt_BLI, A_NI, B_BLN, C_BLN)
    arrays += (scan_pallas.pad(before_BKNI, 128), scan_pallas.pad(dy_BLI, CHUNK, 128), scan_pallas.pad(dstate_BNI, 128))
    grid, block = _grid(arrays[0].shape, states)
    chunk, columns, A, before, state, sums = _specs(block, states, lambda k: grid[2] - 1 - k)
    like_v = jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)
    like_state = jax.ShapeDtypeStruct(arrays[-1].shape, jnp.float32)
    like_sums = jax.ShapeDtypeStruct((batch, grid[1], states, arrays[0].shape[1]), jnp.float32)
    dv_BLI, ddt_BLI, dA_BNI, dB_BJNL, dC_BJNL, dstate_BNI = pl.pallas_call(
        functools.partial(_backward_kernel, unroll=1 if interpret else _UNROLL),
        grid=grid,
        in_specs=[chunk, chunk, A, columns, columns, before, chunk, state],
        out_specs=[chunk, chunk, state, sums, sums, state],
        out_shape=[like_v, like_v, like_state, like_sums, like_sums, like_state],
        scratch_shapes=[pltpu.VMEM((CHUNK, states, block), jnp.float32)],
        compiler_params=_ORDER,
        cost_estimate=_cost(v_BLI, states, flops=24, exponentials=2, arrays=5),
        name="selective_scan_gradient",
        interpret=interpret,
    )(*arrays)
    dB_BLN, dC_BLN = (x_BJNL.sum(axis=1).swapaxes(1, 2)[:, :length] for x_BJNL in (dB_BJNL, dC_BJNL))
    dv_BLI, ddt_BLI = dv_BLI[:, :length, :inner], ddt_BLI[:, :length, :inner]
    return dv_BLI, ddt_BLI, dA_BNI.sum(axis=0)[:, :inner], dB_BLN, dC_BLN, dstate_BNI[..., :inner]


def _pad(v_BLI, dt_BLI, A_NI, B_BLN, C_BLN):
    """Whole chunks and whole lanes; B and C with time last, A for powers of 2."""
    v_BLI, dt_BLI = (scan_pallas.pad(x, CHUNK, 128) for x in (v_BLI, dt_BLI))
    B_BNL, C_BNL = (scan_pallas.pad(x.swapaxes(1, 2), CHUNK) for x in (B_BLN, C_BLN))
    # over log 2: the hardware's exponential has base 2, and a product a state and position is saved
    return v_BLI, dt_BLI, scan_pallas.pad(A_NI, 128) / _LOG2, B_BNL, C_BNL


def _grid(shape: tuple[int, ...], states: int) -> tuple[tuple[int, int, int], int]:
    """(the grid, the channels of a block: the most lanes that divide them and whose states fit)."""
    if states > MAX_STATES:
        raise ValueError(
            f"implementation=pallas_tpu holds at most {MAX_STATES} states a channel on the chip, and A has {states}; "
            "choose associative"
        )
    batch, length, inner = shape
    most = min(512, _MAX_BLOCK // (-(-states // 8) * 8))
    block = max((lanes for lanes in range(128, most + 1, 128) if inner % lanes == 0), default=128)
    return (batch, inner // block, length // CHUNK), block


def _specs(block: int, states: int, place) -> list[pl.BlockSpec]:
    """How the grid cuts (v and the like, B and C, A, before, a state, dB and dC); place(k): which chunk comes k-th."""
    return [
        pl.BlockSpec((1, CHUNK, block), lambda b, j, k: (b, place(k), j)),
        pl.BlockSpec((1, states, CHUNK), lambda b, j, k: (b, 0, place(k))),
        pl.BlockSpec((states, block), lambda b, j, k: (0, j)),
        pl.BlockSpec((1, 1, states, block), lambda b, j, k: (b, place(k), 0, j)),
        pl.BlockSpec((1, states, block), lambda b, j, k: (b, 0, j)),
        pl.BlockSpec((1, 1, states, CHUNK), lambda b, j, k: (b, j, 0, place(k))),
    ]


def _cost(v_BLI: Array, states: int, *, flops: int, exponentials: int, arrays: int) -> pl.CostEstimate:
    """For the compiler's schedule and its cost analysis: work a state and position, and arrays like v that move."""
    return pl.CostEstimate(
        flops=flops * v_BLI.size * states,
        transcendentals=exponentials * v_BLI.size * states,
        bytes_accessed=4 * arrays * v_BLI.size + 4 * v_BLI.size // CHUNK * states,
    )


def _here(t, states):
    """Whether a lane of (N, c) is position t."""
    return jax.lax.broadcasted_iota(jnp.int32, (states, CHUNK), 1) == t


def _column(x_Nc, here_Nc):
    return jnp.sum(jnp.where(here_Nc, x_Nc, 0.0), axis=1, keepdims=True)


def _forward_kernel(v_ref, dt_ref, A_ref, B_ref, C_ref, first_ref, y_ref, before_ref, state_ref, *, unroll):
    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = first_ref[...]

    before_ref[0, 0] = state_ref[0]
    A_NI, B_Nc, C_Nc = A_ref[...], B_ref[0], C_ref[0]

    def step(t, h_NI):
        row, here_Nc = pl.ds(t, 1), _here(t, A_NI.shape[0])
        decay_NI = jnp.exp2(dt_ref[0, row] * A_NI)
        h_NI = decay_NI * h_NI + v_ref[0, row] * _column(B_Nc, here_Nc)
        y_ref[0, row] = jnp.sum(h_NI * _column(C_Nc, here_Nc), axis=0, keepdims=True)
        return h_NI

    state_ref[0] = jax.lax.fori_loop(0, CHUNK, step, state_ref[0], unroll=unroll)


def _backward_kernel(
    v_ref, dt_ref, A_ref, B_ref, C_ref, before_ref, dy_ref, dlast_ref,
    dv_ref, ddt_ref, dA_ref, dB_ref, dC_ref, dstate_ref, states_ref, *, unroll,
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dlast_ref[...]
        dA_ref[...] = jnp.zeros_like(dA_ref)

    A_NI, B_Nc, C_Nc = A_ref[...], B_ref[0], C_ref[0]

    def again(t, h_NI):
        states_ref[t] = h_NI
        row = pl.ds(t, 1)
        return jnp.exp2(dt_ref[0, row] * A_NI) * h_NI + v_ref[0, row] * _column(B_Nc, _here(t, A_NI.shape[0]))

    def step(steps, carry):
        g_NI, dA_NI, dB_Nc, dC_Nc = carry  # g: gradient with respect to the state after position t
        t = CHUNK - 1 - steps
        row, here_Nc = pl.ds(t, 1), _here(t, A_NI.shape[0])
        v_1I, dt_1I, dy_1I = v_ref[0, row], dt_ref[0, row], dy_ref[0, row]
        B_N1, C_N1 = _column(B_Nc, here_Nc), _column(C_Nc, here_Nc)
        before_NI = states_ref[t]
        decay_NI = jnp.exp2(dt_1I * A_NI)
        decayed_NI = decay_NI * before_NI
        g_NI += dy_1I * C_N1
        dlog_NI = g_NI * decayed_NI  # exactly 0 where decay is: dt may be 1e30
        dv_ref[0, row] = jnp.sum(g_NI * B_N1, axis=0, keepdims=True)
        ddt_ref[0, row] = _LOG2 * jnp.sum(dlog_NI * A_NI, axis=0, keepdims=True)
        dB_N1 = jnp.sum(g_NI * v_1I, axis=1, keepdims=True)
        dC_N1 = jnp.sum((decayed_NI + v_1I * B_N1) * dy_1I, axis=1, keepdims=True)
        dB_Nc, dC_Nc = jnp.where(here_Nc, dB_N1, dB_Nc), jnp.where(here_Nc, dC_N1, dC_Nc)
        return decay_NI * g_NI, dA_NI + dlog_NI * dt_1I, dB_Nc, dC_Nc

    jax.lax.fori_loop(0, CHUNK, again, before_ref[0, 0], unroll=unroll)
    zeros_Nc = jnp.zeros_like(B_Nc)
    carry = (dstate_ref[0], dA_ref[0], zeros_Nc, zeros_Nc)
    dstate_ref[0], dA_ref[0], dB_ref[0, 0], dC_ref[0, 0] = jax.lax.fori_loop(0, CHUNK, step, carry, unroll=unroll)
