"""The selective scan as Pallas kernels: what their platforms share, the gradient and the way over a mesh.

B batch, L sequence, I inner channels, N states a channel; K chunks.

The forward kernel keeps the state on the chip and writes y and the state before each chunk, before_BKNI; that and the
inputs are all that is kept for the backward kernel, which recomputes a chunk's states on the chip. N stands before I:
channels lie along the vector lanes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

# The dims of what goes into and comes out of a kernel. Rows and channels are independent of one another, so either may
# be split over a mesh; a result without b or i is a sum over it.
_FORWARD = "b l i, b l i, n i, b l n, b l n, b n i -> b l i, b k n i, b n i"
_BACKWARD = "b l i, b l i, n i, b l n, b l n, b k n i, b l i, b n i -> b l i, b l i, n i, b l n, b l n, b n i"


def scan(
    v_BLI: Array,
    dt_BLI: Array,
    A_IN: Array,
    B_BLN: Array,
    C_BLN: Array,
    state_BIN: Array,
    *,
    platform: str,
    interpret: bool,
) -> tuple[Array, Array]:
    """h[t] = exp(dt[t] A) h[t-1] + v[t] B[t]; y[t] = C[t] . h[t]: (y_BLI, the state after the last position state_BIN).

    Args:
      v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, state_BIN: float32, of any length and width; dt A may be -inf.
      platform: whose kernels: tpu, gpu.
      interpret: run them as plain jax operations, slowly, on any platform.

    Raises:
      ValueError: more states a channel than the kernels of the platform can hold.
    """
    arrays = (v_BLI, dt_BLI, A_IN.T, B_BLN, C_BLN, state_BIN.swapaxes(1, 2))
    y_BLI, state_BNI = _scan(platform, interpret, *arrays)
    return y_BLI, state_BNI.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(platform, interpret, *arrays):
    return _forward(platform, interpret, *arrays)[0]


def _forward(platform, interpret, *arrays):
    y_BLI, before_BKNI, state_BNI = _kernels(platform, interpret)[0](*arrays)
    return (y_BLI, state_BNI), (*arrays[:-1], before_BKNI)


def _backward(platform, interpret, residuals, gradients):
    return _kernels(platform, interpret)[1](*residuals, *gradients)


_scan.defvjp(_forward, _backward)


@functools.cache
def _kernels(platform: str, interpret: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward, backward) of a platform, on arrays that may be split over a mesh."""
    match platform:
        case "tpu":
            from moejax.ops import scan_pallas_tpu as kernels
        case "gpu":
            from moejax.ops import scan_pallas_gpu as kernels
        case _:
            raise AssertionError(platform)
    forward = functools.partial(kernels.forward, interpret=interpret)
    backward = functools.partial(kernels.backward, interpret=interpret)
    return _partitioned(forward, _FORWARD), _partitioned(backward, _BACKWARD)


def _partitioned(local: Callable[..., tuple[Array, ...]], dims: str) -> Callable[..., Any]:
    """`local` on each device's rows and channels. Left to itself, XLA would gather everything or refuse the kernel."""
    operands, results = ([term.split() for term in side.split(",")] for side in dims.split("->"))

    def partition(mesh, shapes, _):
        rows, _, channels = shapes[0].sharding.spec  # v_BLI
        axes = {"b": rows, "i": channels}

        def place(terms: list[list[str]]) -> tuple[NamedSharding, ...]:
            return tuple(NamedSharding(mesh, PartitionSpec(*(axes.get(dim) for dim in term))) for term in terms)

        def on_shards(*arrays):
            sums = [[axis for dim, axis in axes.items() if axis and dim not in term] for term in results]
            values = zip(local(*arrays), sums, strict=True)
            return tuple(functools.reduce(jax.lax.psum, over, value) for value, over in values)

        return mesh, on_shards, place(results), place(operands)

    # a lambda: the decorator looks at the function's name and signature
    function = custom_partitioning.custom_partitioning(lambda *arrays: local(*arrays))
    function.def_partition(partition, sharding_rule=dims, need_replication_factors=("l", "n", "k"))
    return jax.custom_batching.sequential_vmap(function)


def pad(x: Array, *targets: int) -> Array:
    """Zeros behind the last dims, up to multiples of `targets`. Zeros leave the state as it is: decay 1, drive 0."""
    widths = [(0, 0)] * (x.ndim - len(targets))
    widths += [(0, -size % target) for size, target in zip(x.shape[x.ndim - len(targets) :], targets, strict=True)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x
