"""Causal depthwise convolution over a sequence, with document boundaries, and its single step.

B batch, L sequence, I channels, W taps.
"""

import jax.numpy as jnp
from jax import Array

from moejax.ops import shapes


def causal_conv(x_BLI: Array, kernel_WI: Array, bias_I: Array, *, segment_ids_BL: Array | None = None) -> Array:
    """y[t] = bias + sum_w kernel[w] * x[t - (W-1) + w], the convolution of Mamba (arXiv 2312.00752, section 3.4).

    Positions before the sequence, or in another segment than t, count as zero, so nothing crosses a document boundary.

    Args:
      x_BLI: inputs.
      kernel_WI: taps, the last one at the current position.
      bias_I: bias of each channel.
      segment_ids_BL: which document a position belongs to; None for one document a row.

    Returns:
      y_BLI in the dtype of x.

    Raises:
      ValueError: shapes that do not agree.
    """
    shapes.check(x_BLI=x_BLI, kernel_WI=kernel_WI, bias_I=bias_I, segment_ids_BL=segment_ids_BL)
    num_taps, length = kernel_WI.shape[0], x_BLI.shape[1]
    y_BLI = x_BLI * kernel_WI[-1] + bias_I
    for lag in range(1, min(num_taps, length)):
        shifted_BLI = jnp.pad(x_BLI[:, :-lag], ((0, 0), (lag, 0), (0, 0)))
        if segment_ids_BL is not None:
            same_BL = jnp.pad(segment_ids_BL[:, lag:] == segment_ids_BL[:, :-lag], ((0, 0), (lag, 0)))
            shifted_BLI = jnp.where(same_BL[..., None], shifted_BLI, 0)
        y_BLI += shifted_BLI * kernel_WI[-1 - lag]
    return y_BLI.astype(x_BLI.dtype)


def final_window(x_BLI: Array, num_taps: int, *, segment_ids_BL: Array | None = None) -> Array:
    """The window_BWI that `causal_conv_step` needs to go on after the last position of a row.

    Holds zeros before the row, and where a position is of another segment than the last one.
    """
    size, length = num_taps - 1, x_BLI.shape[1]
    kept = min(size, length)
    window_BWI = x_BLI[:, length - kept :]
    if segment_ids_BL is not None:
        same_BW = segment_ids_BL[:, length - kept :] == segment_ids_BL[:, -1:]
        window_BWI = jnp.where(same_BW[..., None], window_BWI, 0)
    return jnp.pad(window_BWI, ((0, 0), (size - kept, 0), (0, 0)))


def causal_conv_step(x_BI: Array, window_BWI: Array, kernel_WI: Array, bias_I: Array) -> tuple[Array, Array]:
    """One position of `causal_conv`.

    Args:
      x_BI: the new input.
      window_BWI: the W - 1 inputs before it, oldest first (zeros at the start of a document).
      kernel_WI: taps.
      bias_I: bias.

    Returns:
      (y_BI, the window for the next position).
    """
    inputs_BWI = jnp.concatenate([window_BWI, x_BI[:, None]], axis=1)
    return (inputs_BWI * kernel_WI).sum(axis=1) + bias_I, inputs_BWI[:, 1:]
