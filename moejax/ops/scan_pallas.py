"""The selective scan as Pallas kernels: what their platforms share, the gradient and the way over a mesh.

B batch, L sequence, I inner channels, N states a channel; K chunks.

The forward kernel keeps the state on the chip and writes y and the state before each chunk, before_BKNI; that and the
inputs are all that is kept for the backward kernel, which recomputes a chunk's states on the chip. N stands before I:
channels lie along the vector lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from moejax import partition


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

    On a mesh (`partition.on_mesh`) each device scans its own rows and channels: no compiler can split a kernel.

    Args:
      v_BLI, dt_BLI, A_IN, B_BLN, C_BLN, state_BIN: float32, of any length and width; dt A may be -inf.
      platform: whose kernels: tpu, gpu.
      interpret: run them as plain jax operations, slowly, on any platform.

    Raises:
      ValueError: more states a channel than the kernels of the platform can hold.
    """
    run = partition.on_shards(functools.partial(_scan, platform, interpret), "BLI BLI NI BLN BLN BNI", "BLI BNI")
    y_BLI, state_BNI = run(v_BLI, dt_BLI, A_IN.T, B_BLN, C_BLN, state_BIN.swapaxes(1, 2))
    return y_BLI, state_BNI.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(platform, interpret, *arrays):
    return _forward(platform, interpret, *arrays)[0]


def _forward(platform, interpret, *arrays):
    y_BLI, before_BKNI, state_BNI = _kernels(platform).forward(*arrays, interpret=interpret)
    return (y_BLI, state_BNI), (*arrays[:-1], before_BKNI)


def _backward(platform, interpret, residuals, gradients):
    return _kernels(platform).backward(*residuals, *gradients, interpret=interpret)


_scan.defvjp(_forward, _backward)


def _kernels(platform: str):
    match platform:
        case "tpu":
            from moejax.ops import scan_pallas_tpu as kernels
        case "gpu":
            from moejax.ops import scan_pallas_gpu as kernels
        case _:
            raise AssertionError(platform)
    return kernels


def pad(x: Array, *targets: int) -> Array:
    """Zeros behind the last dims, up to multiples of `targets`. Zeros leave the state as it is: decay 1, drive 0."""
    widths = [(0, 0)] * (x.ndim - len(targets))
    widths += [(0, -size % target) for size, target in zip(x.shape[x.ndim - len(targets) :], targets, strict=True)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x
