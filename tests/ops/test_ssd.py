"""Every implementation of structured state space duality is the recurrence, in values and in gradients.

The reference here is a loop in float64, with its gradients derived by hand. float32 keeps 7 digits and the sums are
short, so 2e-5 of the largest value is a bound with room.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import ssd

BATCH, HEADS, WIDTH, GROUPS, STATES = 2, 4, 3, 2, 5
NAMES = ("x", "dt", "A", "B", "C", "D", "initial state")
CHUNK, LENGTH = 3, 8
# (chunk size, length): one token, one below, at and above a chunk, not a multiple, one token a chunk
SHAPES = [(CHUNK, 1), (CHUNK, 2), (CHUNK, 3), (CHUNK, 4), (CHUNK, LENGTH), (1, 3)]

every_implementation = pytest.mark.parametrize("implementation", list(ssd.IMPLEMENTATIONS))


def draw(length=LENGTH, seed=0) -> Any:
    """(x, dt, A, B, C, D, initial state) in float32."""
    rng = np.random.default_rng(seed)
    values = (
        rng.normal(size=(BATCH, length, HEADS, WIDTH)),
        np.exp(rng.uniform(np.log(0.01), np.log(2.0), size=(BATCH, length, HEADS))),
        -np.exp(rng.uniform(-1, 1, size=HEADS)),
        rng.normal(size=(BATCH, length, GROUPS, STATES)),
        rng.normal(size=(BATCH, length, GROUPS, STATES)),
        rng.normal(size=HEADS),
        rng.normal(size=(BATCH, HEADS, WIDTH, STATES)),
    )
    return tuple(value.astype(np.float32) for value in values)


def draw_cotangents(length=LENGTH, seed=1):
    """Weights of y and of the final state in a loss that uses both."""
    rng = np.random.default_rng(seed)
    shapes = (BATCH, length, HEADS, WIDTH), (BATCH, HEADS, WIDTH, STATES)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def draw_segments(length=LENGTH, seed=2):
    return np.cumsum(np.random.default_rng(seed).random((BATCH, length)) < 0.3, axis=1).astype(np.int32)


def by_head(B):
    """(B, L, G, N) -> (B, L, H, N): each group's rows for each of its heads."""
    return np.repeat(np.asarray(B, np.float64), HEADS // B.shape[2], axis=2)


def begins(segments, t):
    """Whether position t is the first of its document but not of its row, for each row."""
    return segments[:, t] != segments[:, max(t - 1, 0)]


def recurrence(inputs, segments):
    """h[t] = exp(dt A) h[t-1] + dt x B^T; y = h C + D x: y, the final state, and h[t-1], h[t]."""
    x, dt, A, _, _, D, state = (np.array(value, np.float64) for value in inputs)
    B, C = by_head(inputs[3]), by_head(inputs[4])
    y, before = np.zeros(x.shape), np.zeros((*x.shape, B.shape[3]))
    after = np.zeros_like(before)
    for t in range(x.shape[1]):
        state[begins(segments, t)] = 0
        before[:, t] = state
        drive = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = np.exp(dt[:, t] * A)[..., None, None] * state + drive
        y[:, t] = (state * C[:, t, :, None]).sum(axis=-1) + D[:, None] * x[:, t]
        after[:, t] = state
    return y, state, before, after


def adjoint(inputs, segments, cotangents):
    """Gradients of sum(dy y) + sum(dstate final) for every input, by the chain rule backwards in time."""
    _, _, before, after = recurrence(inputs, segments)
    x, dt, A, _, _, D, _ = (np.asarray(value, np.float64) for value in inputs)
    B, C = by_head(inputs[3]), by_head(inputs[4])
    dy, g = (np.array(value, np.float64) for value in cotangents)  # g: with respect to the state
    dx, ddt, dA, dB, dC = (np.zeros(value.shape) for value in (x, dt, A, B, C))
    for t in reversed(range(x.shape[1])):
        g = g + dy[:, t, ..., None] * C[:, t, :, None]
        decay = np.exp(dt[:, t] * A)
        into_x = (g * B[:, t, :, None]).sum(axis=-1)
        dlog = (g * before[:, t]).sum(axis=(-1, -2)) * decay
        dx[:, t] = D[:, None] * dy[:, t] + dt[:, t, :, None] * into_x
        ddt[:, t] = dlog * A + (x[:, t] * into_x).sum(axis=-1)
        dA += (dlog * dt[:, t]).sum(axis=0)
        dB[:, t] = dt[:, t, :, None] * (g * x[:, t, ..., None]).sum(axis=-2)
        dC[:, t] = (dy[:, t, ..., None] * after[:, t]).sum(axis=-2)
        g = decay[..., None, None] * g
        g[begins(segments, t)] = 0
    over_heads = lambda gradient, B: gradient.reshape(*B.shape[:3], -1, B.shape[3]).sum(axis=3)  # noqa: E731
    return dx, ddt, dA, over_heads(dB, inputs[3]), over_heads(dC, inputs[4]), (dy * x).sum(axis=(0, 1, 3)), g


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def run(inputs, segments, cotangents, *, implementation, chunk_size=CHUNK):
    """((y, final state), gradients of every input)."""

    def outputs(*inputs):
        *inputs, state = inputs
        return ssd.ssd(
            *inputs,
            segment_ids_BL=segments,
            initial_state_BHPN=state,
            implementation=implementation,
            chunk_size=chunk_size,
        )

    values, pull_back = jax.vjp(outputs, *inputs)
    return values, pull_back(cotangents)


def assert_close(actual, expected, name="", tolerance=2e-5):
    expected = np.asarray(expected, np.float64)
    atol = tolerance * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=atol, err_msg=name)


def assert_right(inputs, segments, cotangents, **options):
    (y, state), gradients = run(inputs, segments, cotangents, **options)
    expected_y, expected_state, *_ = recurrence(inputs, segments)
    assert_close(y, expected_y, "y")
    assert_close(state, expected_state, "final state")
    for name, actual, expected in zip(NAMES, gradients, adjoint(inputs, segments, cotangents), strict=True):
        assert_close(actual, expected, f"gradient of {name}")


def test_the_adjoint_derived_by_hand_is_the_derivative_of_the_recurrence(slope):
    inputs, segments, (dy, dstate) = draw(), draw_segments(), draw_cotangents()
    gradients = adjoint(inputs, segments, (dy, dstate))
    rng = np.random.default_rng(3)
    for position, name in enumerate(NAMES):

        def loss(value, position=position):
            y, final, *_ = recurrence([*inputs[:position], value, *inputs[position + 1 :]], segments)
            return (dy * y).sum() + (dstate * final).sum()

        direction = rng.normal(size=inputs[position].shape)
        expected = slope(loss, inputs[position], direction)
        assert (gradients[position] * direction).sum() == pytest.approx(expected, rel=1e-6), name


@every_implementation
@pytest.mark.parametrize(("chunk_size", "length"), SHAPES)
def test_values_and_gradients_equal_the_float64_recurrence(implementation, chunk_size, length):
    inputs, segments, cotangents = draw(length), draw_segments(length), draw_cotangents(length)
    assert_right(inputs, segments, cotangents, implementation=implementation, chunk_size=chunk_size)


def test_a_thousand_positions_in_chunks_of_the_default_size_equal_the_float64_recurrence():
    inputs, segments, cotangents = draw(1000), draw_segments(1000) // 40, draw_cotangents(1000)
    assert_right(inputs, segments, cotangents, implementation="chunked", chunk_size=ssd.DEFAULT_CHUNK_SIZE)


@every_implementation
def test_a_packed_row_equals_its_documents_one_by_one(implementation):
    """Values, gradients and final state; the first document goes on from the initial state, the others from zero."""
    lengths, (*inputs, state), (dy, dstate) = (3, 1, 2, 2), draw(), draw_cotangents()
    segments = np.broadcast_to(np.repeat([7, 1, 7, 0], lengths), (BATCH, LENGTH))  # any ids: only a change counts
    (y, final), packed = run((*inputs, state), segments, (dy, dstate), implementation=implementation)
    over_documents = {"A": 0.0, "D": 0.0}
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        first, last = start == 0, end == LENGTH
        cut = lambda x, start=start, end=end: x[:, start:end] if x.ndim >= 3 else x  # noqa: E731
        document = (*map(cut, inputs), state if first else 0 * state)
        ids = np.zeros((BATCH, end - start))
        alone_y, alone_final, *_ = recurrence(document, ids)
        alone = adjoint(document, ids, (cut(dy), dstate if last else 0 * dstate))
        assert_close(cut(y), alone_y, f"y from {start}")
        for position in (0, 1, 3, 4):
            assert_close(cut(packed[position]), alone[position], f"gradient of {NAMES[position]} from {start}")
        over_documents = {name: total + alone[NAMES.index(name)] for name, total in over_documents.items()}
        if first:
            assert_close(packed[6], alone[6], "gradient of the initial state")
        if last:
            assert_close(final, alone_final, "final state")
    for name, total in over_documents.items():
        assert_close(packed[NAMES.index(name)], total, f"gradient of {name}")


@every_implementation
@pytest.mark.parametrize("dt", [1e-4, 50.0])
def test_extreme_step_sizes_stay_finite_and_right(implementation, dt):
    """exp(50 * -16) underflows to 0, and so does its gradient; dt = 1e-4 barely moves the state."""
    inputs, segments, cotangents = list(draw()), draw_segments(), draw_cotangents()
    inputs[1] = np.full_like(inputs[1], dt)
    inputs[2] = -np.array([1.0, 2.0, 8.0, 16.0], np.float32)
    (y, state), gradients = run(tuple(inputs), segments, cotangents, implementation=implementation)
    for value in (y, state, *gradients):
        assert np.isfinite(value).all()
    assert_right(tuple(inputs), segments, cotangents, implementation=implementation)


@every_implementation
def test_small_steps_keep_their_digits_after_large_ones_in_a_long_chunk(implementation):
    """Steps of dt = 50, A = -16 bring cumulative sums of dt A to -12,000, where neighbours in float32 are 1e-3 apart.

    A decay between two small steps that were the difference of such sums would keep three digits.
    """
    length = 40
    inputs, segments, cotangents = list(draw(length)), np.zeros((BATCH, length), np.int32), draw_cotangents(length)
    inputs[1] = np.where(np.arange(length)[:, None] % 5 < 2, 50.0, inputs[1] / 10).astype(np.float32)
    inputs[2] = np.full(HEADS, -16.0, np.float32)
    inputs[4] = inputs[4] / 50  # the inputs come in times dt
    options = {"implementation": implementation, "chunk_size": length}
    y = np.asarray(run(tuple(inputs), segments, cotangents, **options)[0][0], np.float64)
    expected = recurrence(inputs, segments)[0]
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    assert_right(tuple(inputs), segments, cotangents, **options)


@every_implementation
def test_bfloat16_inputs_cost_only_their_own_rounding(implementation):
    """Computed in float32: y is the float32 result rounded once, within 2^-8 of it; the state is not rounded at all."""
    *inputs, state = draw()
    halves = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
    (dy, dstate), segments = draw_cotangents(), draw_segments()
    cotangents = (jnp.asarray(dy, jnp.bfloat16), dstate)
    (y, final), gradients = run((*halves, state), segments, cotangents, implementation=implementation)
    assert (y.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    exact = [np.asarray(x, np.float64) for x in halves]
    expected_y, expected_state, *_ = recurrence([*exact, state], segments)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected_y, rtol=2**-8, atol=1e-5)
    assert_close(final, expected_state)
    expected = adjoint([*exact, state], segments, [np.asarray(x, np.float64) for x in cotangents])
    for name, actual, gradient in zip(NAMES, gradients, expected, strict=True):
        assert actual.dtype == (jnp.float32 if name == "initial state" else jnp.bfloat16)
        assert_close(actual, gradient, name, tolerance=2**-7)


def test_float32_inputs_are_multiplied_in_float32_on_any_hardware():
    """GPUs and TPUs round the factors of a matrix product by default; that is allowed to bfloat16 inputs only."""
    *inputs, _ = draw()
    program = str(jax.make_jaxpr(ssd.ssd)(*inputs))
    assert program.count("dot_general") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 5
    narrow = str(jax.make_jaxpr(ssd.ssd)(*(jnp.asarray(x, jnp.bfloat16) for x in inputs)))
    assert narrow.count("HIGHEST, ") == 1  # sums of log decays


def test_by_default_a_row_is_one_document_from_a_zero_state_in_chunks():
    *inputs, state = draw()
    y, final = jax.jit(ssd.ssd)(*inputs)
    expected_y, expected_state, *_ = recurrence([*inputs, 0 * state], np.zeros((BATCH, LENGTH)))
    assert_close(y, expected_y)
    assert_close(final, expected_state)


def test_memory_grows_linearly_with_the_length_and_without_the_states_of_every_position():
    """Forward and backward: what a token adds is its inputs and gradients, and a share of a state.

    Its row in the blocks of its chunk, 256 numbers each, is not kept.
    """
    heads, width, states, chunk_size = 4, 8, 16, 64

    def temporary(length):
        shapes = ((1, length, heads, width), (1, length, heads), (heads,), *[(1, length, 1, states)] * 2, (heads,))
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        loss = lambda *x: jnp.square(ssd.ssd(*x, chunk_size=chunk_size)[0]).sum()  # noqa: E731
        program = jax.jit(jax.grad(loss, argnums=range(6))).lower(*inputs).compile()
        return program.memory_analysis().temp_size_in_bytes / 4

    first, second, fourth = (temporary(length) for length in (512, 1024, 2048))
    assert fourth - second == pytest.approx(2 * (second - first), rel=0.05)
    token = (second - first) / 512
    inputs, state = heads * width + heads + 2 * states, heads * width * states
    assert token < 3 * inputs + 2 * state / chunk_size < min(state, heads * chunk_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "cuda"}, "implementation=cuda is not known; choose one of reference, quadratic, chunked"),
        ({"chunk_size": 0}, "chunk_size=0 must be 1 or more; raise it"),
        ({"segment_ids_BL": np.zeros((2, 3), np.int32)}, r"segment_ids has shape \(2, 3\), but x of shape .* \(2, 2\)"),
        ({"initial_state_BHPN": np.zeros((2, 4, 5, 3))}, r"initial_state has shape .* make it \(2, 4, 3, 5\); mend"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, message):
    *inputs, _ = draw(2)
    with pytest.raises(ValueError, match=message):
        ssd.ssd(*inputs, **options)


@pytest.mark.parametrize(("position", "name"), [(1, "dt"), (2, "A"), (4, "C"), (5, "D")])
def test_inputs_of_shapes_that_do_not_fit_are_refused_by_name(position, name):
    *inputs, _ = draw(2)
    inputs[position] = np.concatenate([inputs[position]] * 2, axis=-1)
    with pytest.raises(ValueError, match=rf"^{name} has shape .*; mend one of them$"):
        ssd.ssd(*inputs)


def test_groups_that_do_not_divide_the_heads_are_refused():
    x, dt, A, B, C, D, _ = draw(2)
    with pytest.raises(ValueError, match="B has 3 groups, which do not divide the 4 heads of x"):
        ssd.ssd(x, dt, A, B[:, :, [0, 1, 1]], C[:, :, [0, 1, 1]], D)


def test_steps_one_by_one_equal_the_sequence():
    x, dt, A, B, C, D, state = draw()

    @jax.jit
    def steps(state):
        def step(state, inputs):
            y, state = ssd.ssd_step(inputs[0], inputs[1], A, inputs[2], inputs[3], D, state)
            return state, y

        state, y = jax.lax.scan(step, state, [value.swapaxes(0, 1) for value in (x, dt, B, C)])
        return y.swapaxes(0, 1), state

    y, final = steps(jnp.asarray(state))
    expected_y, expected_state, *_ = recurrence((x, dt, A, B, C, D, state), np.zeros((BATCH, LENGTH)))
    assert_close(y, expected_y)
    assert_close(final, expected_state)


def test_a_row_cut_in_two_goes_on_from_the_state_between():
    """The state after a chunk that is not full is the state after its last position."""
    *inputs, state = draw(7)
    parts = [[x[:, part] if x.ndim >= 3 else x for x in inputs] for part in (slice(0, 4), slice(4, 7))]
    scan = jax.jit(functools.partial(ssd.ssd, chunk_size=CHUNK))
    y_first, between = scan(*parts[0], initial_state_BHPN=state)
    y_second, final = scan(*parts[1], initial_state_BHPN=between)
    expected_y, expected_state, *_ = recurrence((*inputs, state), np.zeros((BATCH, 7)))
    assert_close(np.concatenate([y_first, y_second], axis=1), expected_y)
    assert_close(final, expected_state)


def test_vmap_inside_a_scan_over_microbatches_adds_up_to_each_problem_alone():
    """Two problems with weights of their own under vmap, each batch in two parts under lax.scan, all under jit."""
    problems = [draw(seed=seed) for seed in (4, 5)]
    segments, cotangents = draw_segments(), draw_cotangents()

    def accumulate(x, dt, A, B, C, D, state):
        def add_part(totals, part):
            (x, dt, B, C, state), segments, cotangents = part
            _, (_, _, dA, _, _, dD, _) = run((x, dt, A, B, C, D, state), segments, cotangents, implementation="chunked")
            return (totals[0] + dA, totals[1] + dD), None

        parts = jax.tree.map(lambda x: x[:, None], ((x, dt, B, C, state), segments, cotangents))
        return jax.lax.scan(add_part, (jnp.zeros_like(A), jnp.zeros_like(D)), parts)[0]

    together = jax.jit(jax.vmap(accumulate))(*(np.stack(values) for values in zip(*problems, strict=True)))
    for index, problem in enumerate(problems):
        alone = adjoint(problem, segments, cotangents)
        assert_close(together[0][index], alone[2], "A")
        assert_close(together[1][index], alone[5], "D")
