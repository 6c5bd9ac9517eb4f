"""Every implementation of the grouped product is, with its gradients, a loop over groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import grouped

D, F = 3, 5
# (N, count_E). Blocks are multiples of 8, the largest of about twice the average group: 16, 16, 72 and 16 rows.
CASES = {
    "near the average": (23, [5, 6, 7, 5]),
    "empty groups": (23, [0, 9, 0, 14]),
    "all in the first": (23, [23, 0, 0, 0]),
    "all in the last": (23, [0, 0, 0, 23]),
    "a largest block": (23, [16, 0, 0, 7]),
    "rows to spare": (23, [2, 0, 5, 1]),
    "no rows": (23, [0, 0, 0, 0]),
    "one group": (7, [7]),
    "more groups than rows": (3, [0, 1, 0, 0, 2]),
}
case = pytest.mark.parametrize("case", list(CASES))
implementation = pytest.mark.parametrize("implementation", grouped.IMPLEMENTATIONS)


def loop(x, w, count, transpose=False):
    y, start = np.zeros((len(x), w.shape[1 if transpose else 2])), 0
    for matrix, rows in zip(w, count, strict=True):
        y[start : start + rows] = x[start : start + rows] @ (matrix.T if transpose else matrix)
        start += rows
    return y


def loop_gradients(x, w, count, dy):
    """(dx, dw) of (dy * loop(x, w, count)).sum()."""
    dx, dw, start = np.zeros(x.shape), np.zeros(w.shape), 0
    for e, rows in enumerate(count):
        here = slice(start, start + rows)
        dx[here], dw[e] = dy[here] @ w[e].T, x[here].T @ dy[here]
        start += rows
    return dx, dw


@functools.partial(jax.jit, static_argnames=("implementation", "transpose"))
def run(x, w, count, dy, *, implementation, transpose=False):
    product = functools.partial(grouped.grouped_matmul, implementation=implementation, transpose=transpose)
    y, pull_back = jax.vjp(lambda x, w: product(x, w, count), x, w)
    return y, *pull_back(dy)


def draw(num_rows, num_groups):
    rng = np.random.default_rng(0)
    shapes = (num_rows, D), (num_groups, D, F), (num_rows, F)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@implementation
@case
def test_values_and_gradients_equal_a_loop(case, implementation):
    """1e-5: float32 sums of up to fifty products of size one. Rows past the last group give 0 and have no gradient."""
    num_rows, count = CASES[case]
    x, w, dy = draw(num_rows, len(count))
    y, dx, dw = run(x, w, np.array(count, np.int32), dy, implementation=implementation)
    np.testing.assert_allclose(y, loop(x, w, count), atol=1e-5)
    expected_dx, expected_dw = loop_gradients(*(np.float64(v) for v in (x, w)), count, dy)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-5)
    np.testing.assert_allclose(dw, expected_dw, atol=3e-5)
    assert not np.any(y[sum(count) :])
    assert not np.any(dx[sum(count) :])


@implementation
def test_what_lies_past_the_last_group_is_felt_nowhere(implementation):
    """A NaN there, in x or in the gradient of y, changes no bit of any result."""
    num_rows, count = CASES["rows to spare"]
    x, w, dy = draw(num_rows, len(count))
    expected = run(x, w, np.array(count, np.int32), dy, implementation=implementation)
    x[sum(count) :] = dy[sum(count) :] = np.nan
    actual = run(x, w, np.array(count, np.int32), dy, implementation=implementation)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@implementation
def test_a_nan_in_a_row_stays_in_its_row_and_in_the_gradient_of_its_matrix(implementation):
    num_rows, count = CASES["rows to spare"]
    x, w, dy = draw(num_rows, len(count))
    x[3] = np.nan  # of group 2
    y, dx, dw = run(x, w, np.array(count, np.int32), dy, implementation=implementation)
    np.testing.assert_array_equal(np.isnan(y).any(axis=1), np.arange(num_rows) == 3)
    np.testing.assert_array_equal(np.isnan(dw).any(axis=(1, 2)), np.arange(len(count)) == 2)
    assert np.isfinite(dx).all()


@implementation
def test_a_transposed_product_is_the_product_with_transposed_matrices(implementation):
    """With the gradients of both inputs. 1e-6: the same float32 sums in another order."""
    num_rows, count = CASES["rows to spare"]
    x, w, dy = draw(num_rows, len(count))
    counts = np.array(count, np.int32)
    turned = np.ascontiguousarray(w.swapaxes(1, 2))
    y, dx, dw = run(x, turned, counts, dy, implementation=implementation, transpose=True)
    np.testing.assert_allclose(y, loop(x, turned, count, transpose=True), atol=1e-5)
    expected_y, expected_dx, expected_dw = run(x, w, counts, dy, implementation=implementation)
    np.testing.assert_allclose(y, expected_y, atol=1e-6)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-6)
    np.testing.assert_allclose(dw, np.swapaxes(expected_dw, 1, 2), atol=1e-6)


@implementation
def test_bfloat16_products_are_summed_in_float32(implementation):
    """Sums of 270 and more numbers near 1: in bfloat16 one over 256 takes up none. 2^-8: the result's rounding."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.uniform(0.5, 1.5, size=shape), jnp.bfloat16)  # noqa: E731
    count = np.array([0, 300] + [0] * 38, np.int32)  # many groups, so that blocks are small and few programs
    x, w, dy = draw(300, 270), draw(40, 270, 280), draw(300, 280)
    actual = run(x, w, count, dy, implementation=implementation)
    x, w, dy = (np.asarray(v, np.float64) for v in (x, w, dy))
    for value, expected in zip(actual, (loop(x, w, count), *loop_gradients(x, w, count, dy)), strict=True):
        assert value.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(value, np.float64), expected, rtol=2**-8)


def test_groups_of_every_size_around_every_block_equal_a_loop():
    """Of 0 to 98 rows, in blocks of 8 to 72 rows and several of 72, with three rows to spare. 3e-5: longer sums."""
    sizes = grouped._block_sizes(101, 3)
    assert len(sizes) > 5
    assert sizes[-1] < 98
    x, w, dy = draw(101, 3)
    for first in range(0, 99, 7):
        count = np.array([first, (98 - first) // 3, 98 - first - (98 - first) // 3], np.int32)
        y, dx, dw = run(x, w, count, dy, implementation="blocked")
        np.testing.assert_allclose(y, loop(x, w, count), atol=1e-5)
        expected_dx, expected_dw = loop_gradients(*(np.float64(v) for v in (x, w)), count, dy)
        np.testing.assert_allclose(dx, expected_dx, atol=1e-5)
        np.testing.assert_allclose(dw, expected_dw, atol=3e-5)


def test_a_group_of_several_of_the_largest_block_equals_a_loop():
    """Five blocks of 16 rows without a rest, and six with one."""
    assert grouped._block_sizes(101, 13)[-1] == 16
    x, w, dy = draw(101, 13)
    for rows in 80, 97:
        count = np.array([1, 0, rows] + [0] * 9 + [3], np.int32)
        y, dx, dw = run(x, w, count, dy, implementation="blocked")
        np.testing.assert_allclose(y, loop(x, w, count), atol=1e-5)
        expected_dx, expected_dw = loop_gradients(*(np.float64(v) for v in (x, w)), count, dy)
        np.testing.assert_allclose(dx, expected_dx, atol=1e-5)
        np.testing.assert_allclose(dw, expected_dw, atol=3e-5)


def test_an_unknown_implementation_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="implementation=dense is not known; choose one of reference, blocked, ragged"):
        grouped.grouped_matmul(jnp.ones((1, 1)), jnp.ones((1, 1, 1)), jnp.ones(1, int), implementation="dense")
