"""Structured state space duality, the scan of Mamba-2 (arXiv 2405.21060, sections 5 to 7).

B batch, L sequence, H heads, P channels a head, N states, G groups of heads that share B and C, J heads a group;
c, s positions of a chunk, k chunks.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T      (a P x N matrix a head, and one decay for all of it)
    y[t] = h[t] C[t] + D x[t]
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

DEFAULT_CHUNK_SIZE = 64  # measured on CPU; scripts/bench_ssd.py


def ssd(
    x_BLHP: Array,
    dt_BLH: Array,
    A_H: Array,
    B_BLGN: Array,
    C_BLGN: Array,
    D_H: Array,
    *,
    segment_ids_BL: Array | None = None,
    initial_state_BHPN: Array | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Runs Mamba-2's state space model along L.

    Computes in float32 whatever the dtype of the inputs. Where x is narrower, the factors of matrix products are
    rounded as the hardware does by default (bfloat16 on a TPU, TF32 on a GPU, not at all on a CPU); sums, decays and
    the state carried along are float32 everywhere.

    Args:
      x_BLHP: inputs.
      dt_BLH: step sizes, positive (after the softplus).
      A_H: the state matrix, a negative multiple of the identity for each head (Mamba-2's -exp(A_log)).
      B_BLGN: input projections; heads h of a row of H share those of group h // (H / G).
      C_BLGN: output projections.
      D_H: skip weights.
      segment_ids_BL: which document a position belongs to; the state is reset at the first position of each
        document. The first position of the row continues from the initial state. None for one document a row.
      initial_state_BHPN: state before the first position; None for zeros.
      chunk_size: tokens a chunk of the chunked implementation; L need not be a multiple of it.
      implementation: "chunked" (matrix products within chunks, the state carried between them), "quadratic" (the
        dual form: one matrix over the whole sequence, as in attention), "reference" (a sequential `lax.scan`), or None
        for the fastest supported one.

    Returns:
      (y_BLHP in the dtype of x, the state after the last position state_BHPN in float32).

    Raises:
      ValueError: an implementation that does not exist, a chunk below one token, or shapes that do not fit.
    """
    implementation = implementation or "chunked"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation} is not known; choose one of {', '.join(IMPLEMENTATIONS)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be 1 or more; raise it")
    _check_shapes(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, segment_ids_BL, initial_state_BHPN)
    (batch, length, heads, width), (groups, states) = x_BLHP.shape, B_BLGN.shape[2:]
    x32_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H = (
        x.astype(jnp.float32) for x in (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H)
    )
    v_BLGJP = (dt_BLH[..., None] * x32_BLHP).reshape(batch, length, groups, heads // groups, width)
    log_decay_BLGJ = (dt_BLH * A_H).reshape(batch, length, groups, heads // groups)
    state_BGJPN = jnp.zeros((batch, groups, heads // groups, width, states), jnp.float32)
    if initial_state_BHPN is not None:
        state_BGJPN = initial_state_BHPN.astype(jnp.float32).reshape(state_BGJPN.shape)
    document_BL = jnp.zeros((batch, length), jnp.int32)
    if segment_ids_BL is not None:  # the number of boundaries so far: ids may come again, documents do not
        first_BL = jnp.pad(segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1], ((0, 0), (1, 0)))
        document_BL = jnp.cumsum(first_BL, axis=1, dtype=jnp.int32)
    scan = functools.partial(IMPLEMENTATIONS[implementation], chunk_size=chunk_size)
    with jax.default_matmul_precision("float32" if x_BLHP.dtype == jnp.float32 else "default"):
        y_BLGJP, state_BGJPN = scan(v_BLGJP, log_decay_BLGJ, B_BLGN, C_BLGN, document_BL, state_BGJPN)
    y_BLHP = y_BLGJP.reshape(x_BLHP.shape) + D_H[:, None] * x32_BLHP
    return y_BLHP.astype(x_BLHP.dtype), state_BGJPN.reshape(batch, heads, width, states)


def ssd_step(
    x_BHP: Array, dt_BH: Array, A_H: Array, B_BGN: Array, C_BGN: Array, D_H: Array, state_BHPN: Array
) -> tuple[Array, Array]:
    """One position of `ssd`: (y_BHP in the dtype of x, the next state)."""
    x32_BHP, dt_BH = x_BHP.astype(jnp.float32), dt_BH.astype(jnp.float32)
    repeats = x_BHP.shape[1] // B_BGN.shape[1]
    B_BHN, C_BHN = (jnp.repeat(x.astype(jnp.float32), repeats, axis=1) for x in (B_BGN, C_BGN))
    drive_BHPN = (dt_BH[..., None] * x32_BHP)[..., None] * B_BHN[:, :, None]
    state_BHPN = jnp.exp(dt_BH * A_H)[..., None, None] * state_BHPN + drive_BHPN
    y_BHP = (state_BHPN * C_BHN[:, :, None]).sum(axis=-1) + D_H[:, None] * x32_BHP
    return y_BHP.astype(x_BHP.dtype), state_BHPN


def _check_shapes(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, segment_ids_BL, state_BHPN) -> None:
    (batch, length, heads, width), (groups, states) = x_BLHP.shape, B_BLGN.shape[2:]
    wanted = {
        "dt": (dt_BLH, (batch, length, heads)),
        "A": (A_H, (heads,)),
        "B": (B_BLGN, (batch, length, groups, states)),
        "C": (C_BLGN, (batch, length, groups, states)),
        "D": (D_H, (heads,)),
        "segment_ids": (segment_ids_BL, (batch, length)),
        "initial_state": (state_BHPN, (batch, heads, width, states)),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}, but x of shape {x_BLHP.shape} and B of shape {B_BLGN.shape} make it "
                f"{shape}; mend one of them"
            )
    if heads % groups:
        raise ValueError(f"B has {groups} groups, which do not divide the {heads} heads of x; mend one of them")


# Below, v = dt * x is the input of the recurrence and log_decay = dt * A. The state before the first position belongs
# to document 0.


def _reference(v_BLGJP, log_decay_BLGJ, B_BLGN, C_BLGN, document_BL, state_BGJPN, *, chunk_size):
    del chunk_size
    same_BL = document_BL == _shift(document_BL)

    def step(state_BGJPN, inputs):
        v_BGJP, log_decay_BGJ, B_BGN, C_BGN, same_B = inputs
        decay_BGJ = jnp.where(same_B[:, None, None], jnp.exp(log_decay_BGJ), 0)
        state_BGJPN = decay_BGJ[..., None, None] * state_BGJPN + v_BGJP[..., None] * B_BGN[:, :, None, None]
        return state_BGJPN, (state_BGJPN * C_BGN[:, :, None, None]).sum(axis=-1)

    over_time = [jnp.moveaxis(x, 1, 0) for x in (v_BLGJP, log_decay_BLGJ, B_BLGN, C_BLGN, same_BL)]
    state_BGJPN, y_LBGJP = jax.lax.scan(step, state_BGJPN, over_time)
    return jnp.moveaxis(y_LBGJP, 0, 1), state_BGJPN


def _shift(document_BL):
    """The document of the position before; 0 before the first."""
    return jnp.pad(document_BL[:, :-1], ((0, 0), (1, 0)))


def _quadratic(v_BLGJP, log_decay_BLGJ, B_BLGN, C_BLGN, document_BL, state_BGJPN, *, chunk_size):
    """y = (decay o C B^T) v over the whole sequence, where decay[t, s] = exp(sum of log_decay over s+1..t)."""
    del chunk_size
    length = v_BLGJP.shape[1]
    log_BGJL = jnp.moveaxis(log_decay_BLGJ, 1, -1)
    after_LL = jnp.tri(length, k=-1, dtype=bool)  # [t, s]: t comes after s
    # each sum from its own terms: differences of cumulative sums would cost digits
    log_BGJLL = jnp.cumsum(jnp.where(after_LL, log_BGJL[..., None], 0), axis=-2)
    same_BLL = (document_BL[:, :, None] == document_BL[:, None]) & jnp.tri(length, dtype=bool)
    decay_BGJLL = jnp.where(same_BLL[:, None, None], jnp.exp(log_BGJLL), 0)
    start_BGJL = jnp.where((document_BL == 0)[:, None, None], jnp.exp(jnp.cumsum(log_BGJL, axis=-1)), 0)
    score_BGLL = jnp.einsum("btgn,bsgn->bgts", C_BLGN, B_BLGN)
    y_BLGJP = jnp.einsum("bgjts,bsgjp->btgjp", decay_BGJLL * score_BGLL[:, :, None], v_BLGJP)
    y_BLGJP += jnp.moveaxis(start_BGJL, -1, 1)[..., None] * jnp.einsum("btgn,bgjpn->btgjp", C_BLGN, state_BGJPN)
    decayed_BLGJP = jnp.moveaxis(decay_BGJLL[..., -1, :], -1, 1)[..., None] * v_BLGJP
    end_BGJPN = jnp.einsum("bsgjp,bsgn->bgjpn", decayed_BLGJP, B_BLGN)
    return y_BLGJP, end_BGJPN + start_BGJL[..., -1, None, None] * state_BGJPN


def _segment_sum(log_Xc):
    """[c, s]: the sum of log_X over s+1..c, which is 0 on and above the diagonal.

    Each from its own terms, by a matrix product. As differences of cumulative sums they would have lost their digits
    after a few large steps (dt A is -800 at dt = 50, A = -16), and gradients that should cancel would leave their
    rounding. It is a small share of the work as long as c is about the width of a head.
    """
    length = log_Xc.shape[-1]
    terms_Xcs = jnp.where(jnp.tri(length, k=-1, dtype=bool), log_Xc[..., None], 0)
    upto_cc = jnp.tri(length, dtype=log_Xc.dtype)
    return jnp.einsum("cu,...us->...cs", upto_cc, terms_Xcs, precision=jax.lax.Precision.HIGHEST)


def _chunk(state_BGJPN, inputs):
    """The quadratic form inside a chunk, and what the state before it adds: (state after it, y_BGJcP).

    before_B is the document of the state before.
    """
    v_BGJcP, log_decay_BGJc, B_BGcN, C_BGcN, document_Bc, before_B = inputs
    same_Bcs = (document_Bc[:, :, None] == document_Bc[:, None]) & jnp.tri(document_Bc.shape[1], dtype=bool)
    decay_BGJcs = jnp.where(same_Bcs[:, None, None], jnp.exp(_segment_sum(log_decay_BGJc)), 0)
    goes_on_Bc = document_Bc == before_B[:, None]
    start_BGJc = jnp.where(goes_on_Bc[:, None, None], jnp.exp(jnp.cumsum(log_decay_BGJc, axis=-1)), 0)
    score_BGcs = jnp.einsum("bgcn,bgsn->bgcs", C_BGcN, B_BGcN)
    y_BGJcP = jnp.einsum("bgjcs,bgjsp->bgjcp", decay_BGJcs * score_BGcs[:, :, None], v_BGJcP)
    y_BGJcP += start_BGJc[..., None] * jnp.einsum("bgcn,bgjpn->bgjcp", C_BGcN, state_BGJPN)
    end_BGJPN = jnp.einsum("bgjsp,bgsn->bgjpn", decay_BGJcs[..., -1, :, None] * v_BGJcP, B_BGcN)
    return end_BGJPN + start_BGJc[..., -1, None, None] * state_BGJPN, y_BGJcP


def _chunked(v_BLGJP, log_decay_BLGJ, B_BLGN, C_BLGN, document_BL, state_BGJPN, *, chunk_size):
    batch, length = document_BL.shape
    chunk_size = min(chunk_size, length)
    num_chunks = -(-length // chunk_size)

    def chunked(x_BLX, axis, mode="constant"):
        """(B, L, ...) -> (chunks, B, ..., c at `axis` of a chunk, ...). Zeros fill the last: no input, and decay 1."""
        rest = ((0, 0),) * (x_BLX.ndim - 2)
        x_BLX = jnp.pad(x_BLX, ((0, 0), (0, num_chunks * chunk_size - length), *rest), mode=mode)
        x_BkcX = x_BLX.reshape(batch, num_chunks, chunk_size, *x_BLX.shape[2:])
        return jnp.moveaxis(x_BkcX, (1, 2), (0, axis + 1))

    chunks = (
        chunked(v_BLGJP, 3),
        chunked(log_decay_BLGJ, 3),
        chunked(B_BLGN, 2),
        chunked(C_BLGN, 2),
        chunked(document_BL, 1, "edge"),
        chunked(_shift(document_BL), 1)[:, :, 0],
    )
    # checkpoint: autodiff would keep the c x c blocks of every chunk; now it keeps the state before each
    state_BGJPN, y_kBGJcP = jax.lax.scan(jax.checkpoint(_chunk, prevent_cse=False), state_BGJPN, chunks)
    y_BkcGJP = jnp.moveaxis(y_kBGJcP, (0, 4), (1, 2))
    return y_BkcGJP.reshape(batch, -1, *v_BLGJP.shape[2:])[:, :length], state_BGJPN


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "reference": _reference,
    "quadratic": _quadratic,
    "chunked": _chunked,
}
