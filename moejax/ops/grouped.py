"""Matrix products of groups of rows, a matrix a group: what experts do when no token is dropped.

N rows, E groups, D columns in, F columns out. The rows of a group lie one after another, group by group.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

IMPLEMENTATIONS = ("reference", "blocked", "ragged_dot")


def grouped_matmul(x_ND: Array, w_EDF: Array, count_E: Array, *, implementation: str, transpose: bool = False) -> Array:
    """y_n = x_n w_e for each row n of group e; rows past the last group give zeros and have no gradient.

    Args:
      x_ND: rows, sorted by group.
      w_EDF: a matrix a group; with `transpose`, w_EFD, of which each is used transposed.
      count_E: int32 rows of each group; their sum is at most N.
      implementation: "reference" computes every row with every matrix and keeps one; "ragged_dot" is
        jax.lax.ragged_dot, which XLA turns into one kernel on TPU and GPU but into the reference's work on CPU;
        "blocked" walks over the groups, a few blocks of rows each, and does only the work that there is.

    Returns:
      y_NF in the dtype of x; sums are float32.
    """
    match implementation:
        case "reference":
            return _reference(x_ND, w_EDF, count_E, transpose)
        case "ragged_dot":
            w_EDF = w_EDF.swapaxes(1, 2) if transpose else w_EDF
            y_NF = jax.lax.ragged_dot(_used(x_ND, count_E), w_EDF, count_E, preferred_element_type=jnp.float32)
            return _used(y_NF.astype(x_ND.dtype), count_E)
        case "blocked":
            return _blocked(x_ND, w_EDF, count_E, transpose)
    raise ValueError(f"implementation={implementation} is not known; choose one of {', '.join(IMPLEMENTATIONS)}")


def _used(x_ND: Array, count_E: Array) -> Array:
    """Zeros past the last group: back ends leave those rows of a ragged product uninitialised, gradients included."""
    used_N = jnp.arange(x_ND.shape[0]) < count_E.sum()
    return jnp.where(used_N[:, None], x_ND, 0)


def _reference(x_ND: Array, w_EDF: Array, count_E: Array, transpose: bool) -> Array:
    end_E = jnp.cumsum(count_E)
    row_N = jnp.arange(x_ND.shape[0])
    mine_NE = (row_N[:, None] >= end_E - count_E) & (row_N[:, None] < end_E)
    x_NED = jnp.where(mine_NE[..., None], x_ND[:, None], 0)  # before the product: a NaN stays in its own group
    return _used(jnp.einsum("ned,efd->nf" if transpose else "ned,edf->nf", x_NED, w_EDF), count_E)


# --- blocked -------------------------------------------------------------------------------------------------------
#
# A group's rows are taken in one block, or in several if it is far over the average. The last block may reach into the
# rows of the next group: those are written again, and rightly, when their turn comes. So nothing is padded, and the
# work is that of the rows there are, whatever their distribution. The trip counts depend on the data, which reverse
# differentiation of a loop can't follow: the derivatives, which are two products of the same kind, are given by hand.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(x_ND: Array, w_EDF: Array, count_E: Array, transpose: bool) -> Array:
    num_rows, num_groups = x_ND.shape[0], w_EDF.shape[0]
    sizes = _block_sizes(num_rows, num_groups)
    num_columns = w_EDF.shape[1] if transpose else w_EDF.shape[2]
    x_PD = jnp.pad(x_ND, ((0, sizes[-1]), (0, 0)))  # a block may reach past the end

    def one_group(y_PF, group):
        w_DF, start, count = group

        def product(size, at, y_PF):
            x_SD = jax.lax.dynamic_slice_in_dim(x_PD, at, size)
            y_SF = _dot(x_SD, w_DF, ((1,), (1 if transpose else 0,)))
            return jax.lax.dynamic_update_slice_in_dim(y_PF, y_SF.astype(y_PF.dtype), at, 0)

        return _over_blocks(product, start, count, sizes, y_PF), None

    start_E = jnp.cumsum(count_E) - count_E
    empty_PF = jnp.zeros((x_PD.shape[0], num_columns), x_ND.dtype)
    y_PF, _ = jax.lax.scan(one_group, empty_PF, (w_EDF, start_E, count_E))
    return _used(y_PF[:num_rows], count_E)


def _blocked_fwd(x_ND, w_EDF, count_E, transpose):
    return _blocked(x_ND, w_EDF, count_E, transpose), (x_ND, w_EDF, count_E)


def _blocked_bwd(transpose, residuals, dy_NF):
    x_ND, w_EDF, count_E = residuals
    dx_ND = _blocked(dy_NF, w_EDF, count_E, not transpose)
    dw_EDF = _outer(dy_NF, x_ND, count_E) if transpose else _outer(x_ND, dy_NF, count_E)
    return dx_ND, dw_EDF.astype(w_EDF.dtype), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _outer(x_ND: Array, y_NF: Array, count_E: Array) -> Array:
    """w_EDF, float32: sum over the rows of each group of x_n outer y_n."""
    num_rows, num_groups = x_ND.shape[0], count_E.shape[0]
    sizes = _block_sizes(num_rows, num_groups)
    x_PD = jnp.pad(x_ND, ((0, sizes[-1]), (0, 0)))
    y_PF = jnp.pad(y_NF, ((0, sizes[-1]), (0, 0)))

    def one_group(_, group):
        start, count = group

        def add(size, at, w_DF):
            mine_S = at + jnp.arange(size) < start + count
            x_SD = jnp.where(mine_S[:, None], jax.lax.dynamic_slice_in_dim(x_PD, at, size), 0)
            y_SF = jnp.where(mine_S[:, None], jax.lax.dynamic_slice_in_dim(y_PF, at, size), 0)
            return w_DF + _dot(x_SD, y_SF, ((0,), (0,)))

        zero_DF = jnp.zeros((x_ND.shape[1], y_NF.shape[1]), jnp.float32)
        return None, _over_blocks(add, start, count, sizes, zero_DF)

    start_E = jnp.cumsum(count_E) - count_E
    return jax.lax.scan(one_group, None, (start_E, count_E))[1]


def _dot(x: Array, y: Array, contracting) -> Array:
    return jax.lax.dot_general(x, y, (contracting, ((), ())), preferred_element_type=jnp.float32)


def _block_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """Sizes of blocks, ascending, multiples of 8; dense around the average group, which most groups are near to."""
    average = num_rows / num_groups
    ratios = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1, 9 / 8, 5 / 4, 3 / 2, 2)
    return tuple(sorted({8 * max(1, math.ceil(min(average, 512) * ratio / 8)) for ratio in ratios}))


def _over_blocks(body, start: Array, count: Array, sizes: tuple[int, ...], carry):
    """carry = body(size, row, carry) over blocks that cover `count` rows from `start`: the largest, then one that fits
    what is left best. A product of few rows reads a whole matrix, so one block costs less than several small ones."""
    largest = sizes[-1]
    num_largest = count // largest
    carry = jax.lax.fori_loop(0, num_largest, lambda i, c: body(largest, start + i * largest, c), carry)
    rest = start + num_largest * largest
    fitting = jnp.searchsorted(jnp.array(sizes), count - num_largest * largest)
    for index, size in enumerate(sizes):
        # loops of one turn or none: XLA updates a loop's buffer in place, but copies that of a conditional
        turns = ((fitting == index) & (rest < start + count)).astype(jnp.int32)
        # (the row depends on the turn, or XLA would take the product out of the loop and always compute it)
        carry = jax.lax.fori_loop(0, turns, lambda i, c, size=size: body(size, rest + i * size, c), carry)
    return carry
