"""The selective scan of Mamba (arXiv 2312.00752, eq. 2a-2b and Algorithm 2).

B batch, L sequence, I inner channels, N states a channel; c tokens a chunk.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t]        (per channel and state)
    y[t] = C[t] . h[t] + D u[t]
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.ops import shapes

DEFAULT_CHUNK_SIZE = 8  # measured on CPU; scripts/bench_scan.py

# The step size that stands for a document boundary: exp(dt A) is then exactly 0 for every A below -1e-28, so the state
# forgets all before. It costs nothing; a mask multiplied into the decay made the scan 1.4 times slower on CPU.
_FORGET_DT = 1e30

# (v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, state before the first position) -> (y_BLI without the skip, last state), float32
Core = Callable[[Array, Array, Array, Array, Array, Array], tuple[Array, Array]]


def selective_scan(
    u_BLI: Array,
    dt_BLI: Array,
    A_IN: Array,
    B_BLN: Array,
    C_BLN: Array,
    D_I: Array,
    *,
    segment_ids_BL: Array | None = None,
    initial_state_BIN: Array | None = None,
    implementation: str | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> tuple[Array, Array]:
    """Runs the selective state space model along L. Computes in float32 whatever the dtype of the inputs.

    Args:
      u_BLI: inputs.
      dt_BLI: step sizes, positive (after the softplus).
      A_IN: diagonal of the state matrix, negative (Mamba's -exp(A_log)).
      B_BLN: input projections.
      C_BLN: output projections.
      D_I: skip weights.
      segment_ids_BL: which document a position belongs to; the state is reset at the first position of each
        document. The first position of the row continues from `initial_state_BIN`. None for one document a row.
      initial_state_BIN: state before the first position; None for zeros.
      implementation: "reference" (a sequential `lax.scan`), "associative" (`jax.lax.associative_scan` within chunks,
        the state carried between them), or None for the fastest supported one.
      chunk_size: tokens a chunk of the associative implementation; L need not be a multiple of it.

    Returns:
      (y_BLI in the dtype of u, the state after the last position state_BIN in float32).

    Raises:
      ValueError: an implementation that does not exist, or shapes that do not agree.
    """
    starts_BL = None
    if segment_ids_BL is not None:
        starts_BL = jnp.pad(segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1], ((0, 0), (1, 0)))
    state_BIN = jnp.zeros((u_BLI.shape[0], *A_IN.shape), jnp.float32)
    if initial_state_BIN is not None:
        state_BIN = initial_state_BIN.astype(jnp.float32)
    recurrence = core(implementation, chunk_size)
    return with_core(recurrence, u_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I, starts_BL, state_BIN)


def core(implementation: str | None, chunk_size: int) -> Core:
    """The recurrence alone, by the name of its implementation; arguments and errors as of `selective_scan`."""
    if implementation is None:
        implementation = "associative"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation} is not known; choose one of {', '.join(IMPLEMENTATIONS)}")
    return functools.partial(IMPLEMENTATIONS[implementation], chunk_size=chunk_size)


def with_core(
    recurrence: Core,
    u_BLI: Array,
    dt_BLI: Array,
    A_IN: Array,
    B_BLN: Array,
    C_BLN: Array,
    D_I: Array,
    starts_BL: Array | None,
    state_BIN: Array,
) -> tuple[Array, Array]:
    """`selective_scan` by a given recurrence; the state is reset before the positions of starts_BL."""
    shapes.check(
        u_BLI=u_BLI,
        dt_BLI=dt_BLI,
        A_IN=A_IN,
        B_BLN=B_BLN,
        C_BLN=C_BLN,
        D_I=D_I,
        segment_ids_BL=starts_BL,
        initial_state_BIN=state_BIN,
    )
    u32_BLI, dt_BLI, A_IN, B_BLN, C_BLN = (x.astype(jnp.float32) for x in (u_BLI, dt_BLI, A_IN, B_BLN, C_BLN))
    v_BLI = dt_BLI * u32_BLI
    if starts_BL is not None:
        dt_BLI = jnp.where(starts_BL[..., None], _FORGET_DT, dt_BLI)
    y_BLI, state_BIN = recurrence(v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, state_BIN)
    return (y_BLI + D_I.astype(jnp.float32) * u32_BLI).astype(u_BLI.dtype), state_BIN


def selective_step(
    u_BI: Array, dt_BI: Array, A_IN: Array, B_BN: Array, C_BN: Array, D_I: Array, state_BIN: Array
) -> tuple[Array, Array]:
    """One position of `selective_scan`: (y_BI in the dtype of u, the next state)."""
    u32_BI, dt_BI = u_BI.astype(jnp.float32), dt_BI.astype(jnp.float32)
    decay_BIN = jnp.exp(dt_BI[..., None] * A_IN)
    state_BIN = decay_BIN * state_BIN + (dt_BI * u32_BI)[..., None] * B_BN[:, None].astype(jnp.float32)
    y_BI = jnp.einsum("bin,bn->bi", state_BIN, C_BN.astype(jnp.float32)) + D_I * u32_BI
    return y_BI.astype(u_BI.dtype), state_BIN


# Below, v = dt * u is the input of the recurrence; dt sets the decay alone, and is _FORGET_DT at a boundary.


def _reference(v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, state_BIN, *, chunk_size):
    del chunk_size

    def step(state_BIN, inputs):
        v_BI, dt_BI, B_BN, C_BN = inputs
        state_BIN = jnp.exp(dt_BI[..., None] * A_IN) * state_BIN + v_BI[..., None] * B_BN[:, None]
        return state_BIN, jnp.einsum("bin,bn->bi", state_BIN, C_BN)

    over_time = [jnp.moveaxis(x, 1, 0) for x in (v_BLI, dt_BLI, B_BLN, C_BLN)]
    state_BIN, y_LBI = jax.lax.scan(step, state_BIN, over_time)
    return jnp.moveaxis(y_LBI, 0, 1), state_BIN


def _compose(first, second):
    """Two affine maps h -> a h + b, one after the other."""
    (a1, b1), (a2, b2) = first, second
    return a1 * a2, a2 * b1 + b2


def _prefix(decay_cBNI, drive_cBNI):
    """h[t] = decay[t] h[t-1] + drive[t] for every t of a chunk, from h[-1] = 0."""
    return jax.lax.associative_scan(_compose, (decay_cBNI, drive_cBNI))[1]


def _associative(v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, state_BIN, *, chunk_size):
    length = v_BLI.shape[1]
    chunk_size = min(chunk_size, length)
    num_chunks = -(-length // chunk_size)

    def chunked(x_BLX):
        """(B, L, X) -> (chunks, c, B, X). The zeros that fill the last chunk leave the state as it is: decay 1."""
        x_LBX = jnp.moveaxis(jnp.pad(x_BLX, ((0, 0), (0, num_chunks * chunk_size - length), (0, 0))), 1, 0)
        return x_LBX.reshape(num_chunks, chunk_size, *x_LBX.shape[1:])

    inputs = (chunked(v_BLI), chunked(dt_BLI), chunked(B_BLN), chunked(C_BLN))
    # N before I: the many channels fill the vector lanes, and a sum over the few states is a sum of vectors.
    y_cBI, state_BNI = _scan_chunks(A_IN.T, inputs, state_BIN.swapaxes(1, 2))
    y_LBI = y_cBI.reshape(-1, *y_cBI.shape[2:])[:length]
    return jnp.moveaxis(y_LBI, 0, 1), state_BNI.swapaxes(1, 2)


# Autodiff through associative_scan would keep every level of its tree, for the whole sequence. The rule below keeps
# the state before each chunk, recomputes the chunk's states, and runs the adjoint recurrence
#     g[t] = C[t] dy[t] + decay[t+1] g[t+1]        (the gradient of the loss with respect to h[t])
# as an associative scan backwards. A decay is exp(dt A), so d(decay) = decay d(dt A).


def _affine(A_NI, state_BNI, inputs):
    """A chunk's recurrence as (decay, drive), with the state before the chunk folded into its first drive."""
    v_cBI, dt_cBI, B_cBN, _ = inputs
    decay_cBNI = jnp.exp(dt_cBI[:, :, None] * A_NI)
    drive_cBNI = v_cBI[:, :, None] * B_cBN[..., None]
    return decay_cBNI, drive_cBNI.at[0].add(decay_cBNI[0] * state_BNI)


def _forward(A_NI, inputs, state_BNI):
    def scan_chunk(before_BNI, inputs):
        state_cBNI = _prefix(*_affine(A_NI, before_BNI, inputs))
        y_cBI = (state_cBNI * inputs[3][..., None]).sum(axis=2)
        return state_cBNI[-1], (y_cBI, before_BNI)

    state_BNI, (y_cBI, before_BNI) = jax.lax.scan(scan_chunk, state_BNI, inputs)
    return (y_cBI, state_BNI), (A_NI, inputs, before_BNI)


@jax.custom_vjp
def _scan_chunks(A_NI, inputs, state_BNI):
    return _forward(A_NI, inputs, state_BNI)[0]


def _backward(residuals, gradients):
    A_NI, inputs, before_BNI = residuals
    dy_cBI, dstate_BNI = gradients

    def scan_chunk(carry, chunk):
        g_BNI, dA_NI = carry  # gradient with respect to the state after this chunk
        before_BNI, inputs, dy_cBI = chunk
        v_cBI, dt_cBI, B_cBN, C_cBN = inputs
        decay_cBNI, drive_cBNI = _affine(A_NI, before_BNI, inputs)
        state_cBNI = _prefix(decay_cBNI, drive_cBNI)
        previous_cBNI = jnp.concatenate([before_BNI[None], state_cBNI[:-1]])
        dh_cBNI = (dy_cBI[:, :, None] * C_cBN[..., None]).at[-1].add(g_BNI)
        next_decay_cBNI = jnp.concatenate([decay_cBNI[1:], jnp.ones_like(decay_cBNI[:1])])
        g_cBNI = _prefix(next_decay_cBNI[::-1], dh_cBNI[::-1])[::-1]
        dlog_cBNI = g_cBNI * previous_cBNI * decay_cBNI
        dv_cBI = (g_cBNI * B_cBN[..., None]).sum(axis=2)
        ddt_cBI = (dlog_cBNI * A_NI).sum(axis=2)
        dB_cBN = jnp.einsum("cbni,cbi->cbn", g_cBNI, v_cBI)
        dC_cBN = jnp.einsum("cbni,cbi->cbn", state_cBNI, dy_cBI)
        dA_NI += (dlog_cBNI * dt_cBI[:, :, None]).sum(axis=(0, 1))
        return (decay_cBNI[0] * g_cBNI[0], dA_NI), (dv_cBI, ddt_cBI, dB_cBN, dC_cBN)

    carry = (dstate_BNI, jnp.zeros_like(A_NI))
    (dstate_BNI, dA_NI), dinputs = jax.lax.scan(scan_chunk, carry, (before_BNI, inputs, dy_cBI), reverse=True)
    return dA_NI, dinputs, dstate_BNI


_scan_chunks.defvjp(_forward, _backward)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {"reference": _reference, "associative": _associative}
