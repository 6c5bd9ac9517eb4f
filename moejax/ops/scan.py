"""The selective scan of Mamba (arXiv 2312.00752, eq. 2a-2b and Algorithm 2).

B batch, L sequence, I inner channels, N states a channel; c tokens a chunk.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t]        (per channel and state)
    y[t] = C[t] . h[t] + D u[t]
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import Array

from moejax import config, partition
from moejax.ops import shapes

# The step size that stands for a document boundary: exp(dt A) is then exactly 0 for every A below -1e-28, so the state
# forgets all before. It costs nothing; a mask multiplied into the decay made the scan 1.4 times slower on CPU.
FORGET_DT = 1e30

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
    chunk_size: int | None = None,
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
        the state carried between them), "unrolled" (the same chunks step by step, without a loop in them), "pallas_tpu"
        or "pallas_gpu" (kernels that keep the state on the chip), or None for the fastest that the platform supports:
        "unrolled" on CPU in chunks up to 32 (scripts/bench_scan.py), "pallas_tpu" on TPU up to 128 states a channel,
        "associative" elsewhere, on GPU too, where "pallas_gpu" has not been run yet.
      chunk_size: tokens a chunk of "associative" and "unrolled"; L need not be a multiple of it. None: N, but at least
        8. The gradient keeps the state before each chunk: in chunks of N they take as much memory as u, for any N. The
        kernels have chunks of their own.

    Returns:
      (y_BLI in the dtype of u, the state after the last position state_BIN in float32).

    Raises:
      ValueError: an implementation that does not exist, that does not run on this platform, or that cannot hold so
        many states; shapes that do not agree.
    """
    starts_BL = None
    if segment_ids_BL is not None:
        starts_BL = jnp.pad(segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1], ((0, 0), (1, 0)))
    state_BIN = jnp.zeros((u_BLI.shape[0], *A_IN.shape), jnp.float32)
    if initial_state_BIN is not None:
        state_BIN = initial_state_BIN.astype(jnp.float32)
    recurrence = core(implementation, chunk_size, A_IN.shape[1])
    return with_core(recurrence, u_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I, starts_BL, state_BIN)


def core(implementation: str | None, chunk_size: int | None, num_states: int) -> Core:
    """The recurrence alone, by the name of its implementation; arguments and errors as of `selective_scan`."""
    chunk_size = chunk_size or max(8, num_states)
    if chunk_size < 0:
        raise ValueError(f"chunk_size={chunk_size} must be 1 or more, or 0 for the default; change it")
    return functools.partial(IMPLEMENTATIONS[_choose(implementation, num_states, chunk_size)], chunk_size=chunk_size)


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
        dt_BLI = jnp.where(starts_BL[..., None], FORGET_DT, dt_BLI)
    y_BLI, state_BIN = recurrence(v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, state_BIN)
    return (y_BLI + D_I.astype(jnp.float32) * u32_BLI).astype(u_BLI.dtype), state_BIN


# Implementations that run on one platform alone.
NEEDS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
MAX_UNROLLED = 32  # tokens a chunk; the compile time of "unrolled" grows with them

_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels of any platform that are traced in this context run on this one, as plain jax operations: for tests."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def _choose(implementation: str | None, num_states: int, chunk_size: int) -> str:
    # A program may be compiled for a mesh of devices that are not here (`partition.on_mesh`).
    platform = partition.platform()
    if implementation is None:
        if platform == "tpu" and num_states <= config.SCAN_STATES["pallas_tpu"]:
            return "pallas_tpu"
        return "unrolled" if platform == "cpu" and chunk_size <= MAX_UNROLLED else "associative"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation} is not known; choose one of {', '.join(IMPLEMENTATIONS)}")
    needed = NEEDS.get(implementation, platform)
    if platform != needed and not _interpreted.get():
        *others, last = (name for name in IMPLEMENTATIONS if NEEDS.get(name, platform) == platform)
        raise ValueError(
            f"implementation={implementation} needs a {needed.upper()}, and this is {platform}; "
            f"choose {', '.join(others)} or {last}"
        )
    return implementation


def selective_step(
    u_BI: Array, dt_BI: Array, A_IN: Array, B_BN: Array, C_BN: Array, D_I: Array, state_BIN: Array
) -> tuple[Array, Array]:
    """One position of `selective_scan`: (y_BI in the dtype of u, the next state)."""
    u32_BI, dt_BI = u_BI.astype(jnp.float32), dt_BI.astype(jnp.float32)
    decay_BIN = jnp.exp(dt_BI[..., None] * A_IN)
    state_BIN = decay_BIN * state_BIN + (dt_BI * u32_BI)[..., None] * B_BN[:, None].astype(jnp.float32)
    y_BI = (state_BIN * C_BN[:, None].astype(jnp.float32)).sum(axis=2) + D_I * u32_BI
    return y_BI.astype(u_BI.dtype), state_BIN


# Below, v = dt * u is the input of the recurrence; dt sets the decay alone, and is FORGET_DT at a boundary.


def _reference(v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, state_BIN, *, chunk_size):
    del chunk_size

    def step(state_BIN, inputs):
        v_BI, dt_BI, B_BN, C_BN = inputs
        state_BIN = jnp.exp(dt_BI[..., None] * A_IN) * state_BIN + v_BI[..., None] * B_BN[:, None]
        return state_BIN, (state_BIN * C_BN[:, None]).sum(axis=2)

    over_time = [jnp.moveaxis(x, 1, 0) for x in (v_BLI, dt_BLI, B_BLN, C_BLN)]
    state_BIN, y_LBI = jax.lax.scan(step, state_BIN, over_time)
    return jnp.moveaxis(y_LBI, 0, 1), state_BIN


def _chunked(scan_chunks, v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, state_BIN, *, chunk_size):
    """The core over arrays of (chunks, c, B, ...)."""
    length = v_BLI.shape[1]
    chunk_size = min(chunk_size, length)
    num_chunks = -(-length // chunk_size)

    def chunked(x_BLX):
        """(B, L, X) -> (chunks, c, B, X). The zeros that fill the last chunk leave the state as it is: decay 1."""
        x_LBX = jnp.moveaxis(jnp.pad(x_BLX, ((0, 0), (0, num_chunks * chunk_size - length), (0, 0))), 1, 0)
        return x_LBX.reshape(num_chunks, chunk_size, *x_LBX.shape[1:])

    inputs = (chunked(v_BLI), chunked(dt_BLI), chunked(B_BLN), chunked(C_BLN))
    # N before I: the many channels fill the vector lanes, and a sum over the few states is a sum of vectors.
    y_cBI, state_BNI = scan_chunks(A_IN.T, inputs, state_BIN.swapaxes(1, 2))
    y_LBI = y_cBI.reshape(-1, *y_cBI.shape[2:])[:length]
    return jnp.moveaxis(y_LBI, 0, 1), state_BNI.swapaxes(1, 2)


# Autodiff through a chunk would keep its states, for the whole sequence. The rules below keep the state before each
# chunk, recompute the chunk's states, and run the adjoint recurrence
#     g[t] = C[t] dy[t] + decay[t+1] g[t+1]        (the gradient of the loss with respect to h[t])
# backwards. A decay is exp(dt A), so d(decay) = decay d(dt A).


def _scan_with_gradient(forward_chunk, backward_chunk):
    """(A_NI, inputs, state_BNI) -> (y, state) over chunks, with a gradient that keeps only the states between them.

    forward_chunk(A_NI, before_BNI, inputs) -> (after_BNI, y_cBI).
    backward_chunk(A_NI, before_BNI, inputs, dy_cBI, g_BNI) -> (g_BNI before the chunk, (dv, ddt, dB, dC), dA_NI).
    """

    def forward(A_NI, inputs, state_BNI):
        def step(before_BNI, inputs):
            after_BNI, y_cBI = forward_chunk(A_NI, before_BNI, inputs)
            return after_BNI, (y_cBI, before_BNI)

        state_BNI, (y_cBI, before_BNI) = jax.lax.scan(step, state_BNI, inputs)
        return (y_cBI, state_BNI), (A_NI, inputs, before_BNI)

    def backward(residuals, gradients):
        A_NI, inputs, before_BNI = residuals
        dy_cBI, dstate_BNI = gradients

        def step(carry, chunk):
            g_BNI, dA_NI = carry  # g: of the state after this chunk
            g_BNI, dinputs, dA_chunk_NI = backward_chunk(A_NI, *chunk, g_BNI)
            return (g_BNI, dA_NI + dA_chunk_NI), dinputs

        carry = (dstate_BNI, jnp.zeros_like(A_NI))
        (dstate_BNI, dA_NI), dinputs = jax.lax.scan(step, carry, (before_BNI, inputs, dy_cBI), reverse=True)
        return dA_NI, dinputs, dstate_BNI

    scan_chunks = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    scan_chunks.defvjp(forward, backward)
    return functools.partial(_chunked, scan_chunks)


def _affine(A_NI, state_BNI, inputs):
    """A chunk's recurrence as (decay, drive), with the state before the chunk folded into its first drive."""
    v_cBI, dt_cBI, B_cBN, _ = inputs
    decay_cBNI = jnp.exp(dt_cBI[:, :, None] * A_NI)
    drive_cBNI = v_cBI[:, :, None] * B_cBN[..., None]
    return decay_cBNI, drive_cBNI.at[0].add(decay_cBNI[0] * state_BNI)


def _compose(first, second):
    """Two affine maps h -> a h + b, one after the other."""
    (a1, b1), (a2, b2) = first, second
    return a1 * a2, a2 * b1 + b2


def _prefix(decay_cBNI, drive_cBNI):
    """h[t] = decay[t] h[t-1] + drive[t] for every t of a chunk, from h[-1] = 0."""
    return jax.lax.associative_scan(_compose, (decay_cBNI, drive_cBNI))[1]


def _forward_associative(A_NI, before_BNI, inputs):
    state_cBNI = _prefix(*_affine(A_NI, before_BNI, inputs))
    return state_cBNI[-1], (state_cBNI * inputs[3][..., None]).sum(axis=2)


def _backward_associative(A_NI, before_BNI, inputs, dy_cBI, g_BNI):
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
    # GPUs and TPUs would round the factors of a matrix product
    dB_cBN = jnp.einsum("cbni,cbi->cbn", g_cBNI, v_cBI, precision="float32")
    dC_cBN = jnp.einsum("cbni,cbi->cbn", state_cBNI, dy_cBI, precision="float32")
    dA_NI = (dlog_cBNI * dt_cBI[:, :, None]).sum(axis=(0, 1))
    return decay_cBNI[0] * g_cBNI[0], (dv_cBI, ddt_cBI, dB_cBN, dC_cBN), dA_NI


def _forward_unrolled(A_NI, state_BNI, inputs):
    y = []
    for v_BI, dt_BI, B_BN, C_BN in zip(*inputs, strict=True):
        state_BNI = jnp.exp(dt_BI[:, None] * A_NI) * state_BNI + v_BI[:, None] * B_BN[..., None]
        y.append((state_BNI * C_BN[..., None]).sum(axis=1))
    return state_BNI, jnp.stack(y)


def _backward_unrolled(A_NI, before_BNI, inputs, dy_cBI, g_BNI):
    decays, states = [], [before_BNI]
    for v_BI, dt_BI, B_BN, _ in zip(*inputs, strict=True):
        decays.append(jnp.exp(dt_BI[:, None] * A_NI))
        states.append(decays[-1] * states[-1] + v_BI[:, None] * B_BN[..., None])
    gradients, dA_BNI = [], jnp.zeros_like(before_BNI)
    for t in reversed(range(len(decays))):
        v_BI, dt_BI, B_BN, C_BN = (x_cB[t] for x_cB in inputs)
        g_BNI += dy_cBI[t][:, None] * C_BN[..., None]
        dv_BI = (g_BNI * B_BN[..., None]).sum(axis=1)
        dB_BN = (g_BNI * v_BI[:, None]).sum(axis=2)
        dC_BN = (states[t + 1] * dy_cBI[t][:, None]).sum(axis=2)
        g_BNI *= decays[t]
        dlog_BNI = g_BNI * states[t]
        dA_BNI += dlog_BNI * dt_BI[:, None]
        gradients.append((dv_BI, (dlog_BNI * A_NI).sum(axis=1), dB_BN, dC_BN))
    dinputs = tuple(jnp.stack(dx[::-1]) for dx in zip(*gradients, strict=True))
    return g_BNI, dinputs, dA_BNI.sum(axis=0)


def _pallas(v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, state_BIN, *, chunk_size, platform):
    from moejax.ops import scan_pallas  # Pallas takes a second to import

    del chunk_size
    how = {"platform": platform, "interpret": _interpreted.get()}
    return scan_pallas.scan(v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, state_BIN, **how)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "reference": _reference,
    "associative": _scan_with_gradient(_forward_associative, _backward_associative),
    "unrolled": _scan_with_gradient(_forward_unrolled, _backward_unrolled),
    "pallas_tpu": functools.partial(_pallas, platform="tpu"),
    "pallas_gpu": functools.partial(_pallas, platform="gpu"),
}
