"""The selective scan as a loop over time in float64, with its gradients derived by hand, and problems for it."""

from typing import Any

import numpy as np

BATCH, LENGTH, INNER, STATES = 2, 8, 3, 4
NAMES = ("u", "dt", "A", "B", "C", "D", "initial state")


def draw(length=LENGTH, seed=0, batch=BATCH, inner=INNER, states=STATES) -> Any:
    """(u, dt, A, B, C, D, initial state) in float32."""
    rng = np.random.default_rng(seed)
    values = (
        rng.normal(size=(batch, length, inner)),
        np.exp(rng.uniform(np.log(0.01), np.log(2.0), size=(batch, length, inner))),
        -np.exp(rng.uniform(-1, 1, size=(inner, states))),
        rng.normal(size=(batch, length, states)),
        rng.normal(size=(batch, length, states)),
        rng.normal(size=inner),
        rng.normal(size=(batch, inner, states)),
    )
    return tuple(value.astype(np.float32) for value in values)


def draw_cotangents(length=LENGTH, seed=1, batch=BATCH, inner=INNER, states=STATES):
    """Weights of y and of the final state in a loss that uses both."""
    rng = np.random.default_rng(seed)
    shapes = (batch, length, inner), (batch, inner, states)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def draw_segments(length=LENGTH, seed=2, batch=BATCH):
    return np.cumsum(np.random.default_rng(seed).random((batch, length)) < 0.3, axis=1).astype(np.int32)


def begins(segments, t):
    """Whether position t is the first of its document but not of its row, for each row."""
    return segments[:, t] != segments[:, max(t - 1, 0)]


def recurrence(inputs, segments):
    """The paper's equations 2a and 2b with Algorithm 2's discretisation: y, the final state, and h[t-1], h[t]."""
    u, dt, A, B, C, D, h = (np.array(x, np.float64) for x in inputs)
    y, before = np.zeros(u.shape), np.zeros((*u.shape, A.shape[1]))
    after = np.zeros_like(before)
    for t in range(u.shape[1]):
        h[begins(segments, t)] = 0
        before[:, t] = h
        h = np.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * B[:, t, None]
        y[:, t] = (h * C[:, t, None]).sum(axis=-1) + D * u[:, t]
        after[:, t] = h
    return y, h, before, after


def adjoint(inputs, segments, cotangents):
    """Gradients of sum(dy y) + sum(dstate final) for every input, by the chain rule backwards in time."""
    _, _, before, after = recurrence(inputs, segments)
    u, dt, A, B, C, D, _ = (np.asarray(x, np.float64) for x in inputs)
    dy, g = (np.array(x, np.float64) for x in cotangents)  # g: with respect to the state
    du, ddt, dA, dB, dC = (np.zeros(x.shape) for x in (u, dt, A, B, C))
    for t in reversed(range(u.shape[1])):
        g = g + dy[:, t, :, None] * C[:, t, None]
        decay = np.exp(dt[:, t, :, None] * A)
        into_v = (g * B[:, t, None]).sum(axis=-1)
        dlog = g * before[:, t] * decay
        du[:, t] = D * dy[:, t] + dt[:, t] * into_v
        ddt[:, t] = (dlog * A).sum(axis=-1) + u[:, t] * into_v
        dA += (dlog * dt[:, t, :, None]).sum(axis=0)
        dB[:, t] = (g * (dt * u)[:, t, :, None]).sum(axis=1)
        dC[:, t] = (after[:, t] * dy[:, t, :, None]).sum(axis=1)
        g = decay * g
        g[begins(segments, t)] = 0
    return du, ddt, dA, dB, dC, (dy * u).sum(axis=(0, 1)), g


def assert_close(actual, expected, name="", tolerance=2e-5):
    """Within the tolerance of the largest value, or of 1."""
    expected = np.asarray(expected, np.float64)
    atol = tolerance * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=atol, err_msg=name)


def assert_right(actual, problem, tolerance=2e-5):
    """((y, final state), gradients) of a problem (inputs, segments, cotangents)."""
    (y, state), gradients = actual
    inputs, segments, cotangents = problem
    expected_y, expected_state, *_ = recurrence(inputs, segments)
    assert_close(y, expected_y, "y", tolerance)
    assert_close(state, expected_state, "final state", tolerance)
    for name, gradient, expected in zip(NAMES, gradients, adjoint(inputs, segments, cotangents), strict=True):
        assert_close(gradient, expected, f"gradient of {name}", tolerance)
