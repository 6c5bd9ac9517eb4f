"""The causal convolution is the sum of its definition, inside a document and nowhere else."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import conv


def draw(length, taps, seed=0, channels=3) -> Any:
    rng = np.random.default_rng(seed)
    shapes = ((2, length, channels), (taps, channels), (channels,))
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def convolve(x, kernel, bias, segments, dy):
    """y and the gradients of sum(dy y), by loops in float64 over every output, tap and row."""
    x, kernel, bias, dy = (np.asarray(value, np.float64) for value in (x, kernel, bias, dy))
    taps, length = kernel.shape[0], x.shape[1]
    y, dx, dkernel, dbias = np.zeros(x.shape), np.zeros(x.shape), np.zeros(kernel.shape), dy.sum(axis=(0, 1))
    for b in range(x.shape[0]):
        for t in range(length):
            y[b, t] = bias
            for w in range(taps):
                s = t - (taps - 1) + w
                if s >= 0 and segments[b, s] == segments[b, t]:
                    y[b, t] += kernel[w] * x[b, s]
                    dx[b, s] += kernel[w] * dy[b, t]
                    dkernel[w] += x[b, s] * dy[b, t]
    return y, (dx, dkernel, dbias)


@jax.jit
def run(x, kernel, bias, segments, dy):
    def outputs(x, kernel, bias):
        return conv.causal_conv(x, kernel, bias, segment_ids_BL=segments)

    y, pull_back = jax.vjp(outputs, x, kernel, bias)
    return y, pull_back(dy)


@pytest.mark.parametrize(("length", "taps"), [(7, 4), (2, 4), (4, 4), (5, 1), (1, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_equal_a_loop(length, taps, packed):
    """Also with a kernel longer than the sequence. 1e-5: sums of a dozen float32 products of size one."""
    x, kernel, bias = draw(length, taps)
    rng = np.random.default_rng(1)
    segments = np.cumsum(rng.random((2, length)) < 0.4, axis=1) if packed else np.ones((2, length), int)
    dy = rng.normal(size=x.shape).astype(np.float32)
    actual = run(x, kernel, bias, segments if packed else None, dy)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, convolve(x, kernel, bias, segments, dy)
    )


def test_a_table_worked_by_hand():
    """Taps 1, 10, 100 (the last at the current position) on 1 2 3 4, without and with a boundary after 1 2."""
    x = np.arange(1, 5, dtype=np.float32).reshape(1, 4, 1)
    kernel, bias = np.array([[1], [10], [100]], np.float32), np.array([0.5], np.float32)
    y = jax.jit(conv.causal_conv)(x, kernel, bias)
    np.testing.assert_array_equal(y[0, :, 0], [100.5, 210.5, 321.5, 432.5])
    y = jax.jit(conv.causal_conv)(x, kernel, bias, segment_ids_BL=np.array([[1, 1, 2, 2]]))
    np.testing.assert_array_equal(y[0, :, 0], [100.5, 210.5, 300.5, 430.5])


def test_no_output_depends_on_a_later_input_or_on_another_document():
    x, kernel, bias = draw(6, 3, channels=1)
    segments = jnp.array([[1, 1, 1, 2, 2, 2]])

    @jax.jit
    @jax.jacobian
    def jacobian(x):
        return conv.causal_conv(x, kernel, bias, segment_ids_BL=segments)[0, :, 0]

    reach = np.abs(np.reshape(jacobian(x[:1]), (6, 6))) > 0  # [output, input]
    inside = [[s <= t and t - s < 3 and (s < 3) == (t < 3) for s in range(6)] for t in range(6)]
    np.testing.assert_array_equal(reach, inside)


def test_steps_one_by_one_equal_the_sequence():
    """1e-6: the same products in another order."""
    x, kernel, bias = draw(6, 4)

    @jax.jit
    def both(x):
        def step(window, x):
            y, window = conv.causal_conv_step(x, window, kernel, bias)
            return window, y

        window, y = jax.lax.scan(step, jnp.zeros((2, 3, 3)), x.swapaxes(0, 1))
        return y.swapaxes(0, 1), window, conv.causal_conv(x, kernel, bias)

    stepped, window, whole = both(x)
    np.testing.assert_allclose(stepped, whole, atol=1e-6)
    np.testing.assert_array_equal(window, x[:, -3:])


def test_one_tap_steps_with_an_empty_window():
    x, kernel, bias = draw(1, 1)
    y, window = jax.jit(conv.causal_conv_step)(x[:, 0], np.zeros((2, 0, 3)), kernel, bias)
    np.testing.assert_allclose(y, x[:, 0] * kernel[0] + bias, atol=1e-6)
    assert window.shape == (2, 0, 3)


def test_the_window_after_a_row_is_its_last_inputs_of_the_same_document():
    x = draw(5, 4)[0]
    segments = np.array([[1, 1, 1, 2, 2], [0, 1, 1, 1, 1]])
    window = jax.jit(lambda x, s: conv.final_window(x, 4, segment_ids_BL=s))
    np.testing.assert_array_equal(window(x, None), x[:, 2:])
    expected = x[:, 2:].copy()
    expected[0, 0] = 0
    np.testing.assert_array_equal(window(x, segments), expected)
    np.testing.assert_array_equal(window(x[:, :2], None), np.pad(x[:, :2], ((0, 0), (1, 0), (0, 0))))
    assert conv.final_window(x, 1).shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5, 3), (4, 1), (3,), (2, 5)), "kernel_WI has shape (4, 1), I=1, and x_BLI has I=3; make them equal"),
        (((2, 5, 3), (4, 3), (1,), (2, 5)), "bias_I has shape (1,), I=1, and x_BLI has I=3; make them equal"),
        (((2, 5, 3), (3,), (3,), (2, 5)), "kernel_WI has shape (3,); give it the dims (W, I)"),
        (((2, 5, 3), (4, 3), (3,), (2, 6)), "segment_ids_BL has shape (2, 6), L=6, and x_BLI has L=5; make them equal"),
    ],
)
def test_shapes_that_do_not_agree_are_an_error_that_names_the_argument(shapes, message):
    *arrays, segments = map(np.zeros, shapes)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        conv.causal_conv(*arrays, segment_ids_BL=segments)
