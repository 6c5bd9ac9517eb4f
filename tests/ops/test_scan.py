"""Every implementation of the selective scan is the recurrence of the paper, in values and in gradients.

The reference is a loop in float64 (`scan_loop`). float32 keeps 7 digits and the sums are short, so 2e-5 of the largest
value is a bound with room. Kernels of platforms that are not here run in Pallas's interpreter.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scan_loop import (
    BATCH,
    LENGTH,
    NAMES,
    adjoint,
    assert_close,
    assert_right,
    draw,
    draw_cotangents,
    draw_segments,
    recurrence,
)  # fmt: skip

from moejax.ops import scan, scan_pallas_gpu, scan_pallas_tpu

# tokens a chunk; the TPU kernel's are a register's lanes, and the interpreter compiles long chunks of GPU's slowly
CHUNK = dict.fromkeys(scan.IMPLEMENTATIONS, 3) | {"pallas_tpu": scan_pallas_tpu.CHUNK}
# lengths as (chunks, more tokens): one token, two, one below, at and above a chunk, not a multiple of it
LENGTHS = [(0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, 2)]

EVERYWHERE = [name for name in scan.IMPLEMENTATIONS if name not in scan.NEEDS]
every_implementation = pytest.mark.parametrize("implementation", list(scan.IMPLEMENTATIONS))


@pytest.fixture(autouse=True, scope="module")
def short_gpu_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_pallas_gpu, "CHUNK", CHUNK["pallas_gpu"])
        yield


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def run(inputs, segments, cotangents, *, implementation, chunk_size=None):
    """((y, final state), gradients of every input)."""

    def outputs(*inputs):
        *inputs, state = inputs
        return scan.selective_scan(
            *inputs,
            segment_ids_BL=segments,
            initial_state_BIN=state,
            implementation=implementation,
            chunk_size=chunk_size or CHUNK[implementation],
        )

    with scan.interpreted():
        values, pull_back = jax.vjp(outputs, *inputs)
        return values, pull_back(cotangents)


def test_the_adjoint_derived_by_hand_is_the_derivative_of_the_recurrence(slope):
    inputs, segments, (dy, dstate) = draw(), draw_segments(), draw_cotangents()
    gradients = adjoint(inputs, segments, (dy, dstate))
    rng = np.random.default_rng(3)
    for position, name in enumerate(NAMES):

        def loss(x, position=position):
            y, final, *_ = recurrence([*inputs[:position], x, *inputs[position + 1 :]], segments)
            return (dy * y).sum() + (dstate * final).sum()

        direction = rng.normal(size=inputs[position].shape)
        expected = slope(loss, inputs[position], direction)
        assert (gradients[position] * direction).sum() == pytest.approx(expected, rel=1e-6), name


@every_implementation
@pytest.mark.parametrize(("chunks", "more"), LENGTHS)
def test_values_and_gradients_equal_the_float64_recurrence(implementation, chunks, more):
    length = chunks * CHUNK[implementation] + more
    problem = draw(length), draw_segments(length), draw_cotangents(length)
    assert_right(run(*problem, implementation=implementation), problem)


@pytest.mark.parametrize("implementation", ["associative", "unrolled"])
def test_chunks_of_one_token(implementation):
    problem = draw(3), draw_segments(3), draw_cotangents(3)
    assert_right(run(*problem, implementation=implementation, chunk_size=1), problem)


@every_implementation
def test_a_thousand_positions_equal_the_float64_recurrence(implementation):
    problem = draw(1000), draw_segments(1000) // 40, draw_cotangents(1000)  # some 8 documents
    assert_right(run(*problem, implementation=implementation), problem)


@every_implementation
def test_a_packed_row_equals_its_documents_one_by_one(implementation):
    """Values, gradients and final state; the first document goes on from the initial state, the others from zero."""
    lengths, (*inputs, state), (dy, dstate) = (3, 1, 2, 2), draw(), draw_cotangents()
    segments = np.broadcast_to(np.repeat([7, 1, 2, 0], lengths), (BATCH, LENGTH))  # any ids: only a change counts
    (y, final), packed = run((*inputs, state), segments, (dy, dstate), implementation=implementation)
    over_documents = {"A": 0.0, "D": 0.0}
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        first, last = start == 0, end == LENGTH
        cut = lambda x, start=start, end=end: x[:, start:end] if x.ndim == 3 else x  # noqa: E731
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
    inputs[2] = -np.broadcast_to(np.array([1.0, 2.0, 8.0, 16.0], np.float32), inputs[2].shape)
    actual = run(tuple(inputs), segments, cotangents, implementation=implementation)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))
    assert_right(actual, (inputs, segments, cotangents))


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
    expected = adjoint([*exact, state], segments, cotangents)
    for name, actual, gradient in zip(NAMES, gradients, expected, strict=True):
        assert actual.dtype == (jnp.float32 if name == "initial state" else jnp.bfloat16)
        assert_close(actual, gradient, name, tolerance=2**-7)


def test_by_default_a_row_is_one_document_from_a_zero_state_in_the_fastest_implementation():
    *inputs, state = draw()
    y, final = jax.jit(scan.selective_scan)(*inputs)
    expected_y, expected_state, *_ = recurrence([*inputs, 0 * state], np.zeros((BATCH, LENGTH)))
    assert_close(y, expected_y)
    assert_close(final, expected_state)


@pytest.mark.parametrize("implementation", ["associative", "unrolled"])
def test_memory_grows_linearly_with_the_length_and_without_the_states_of_every_position(implementation):
    """Forward and backward: what a token adds is copies of its inputs and gradients, and a share of a state."""
    inner, states = 32, 16

    def temporary(length):
        shapes = [(1, length, inner)] * 2 + [(inner, states)] + [(1, length, states)] * 2 + [(inner,)]
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        loss = lambda *x: jnp.square(scan.selective_scan(*x, implementation=implementation)[0]).sum()  # noqa: E731
        program = jax.jit(jax.grad(loss, argnums=range(6))).lower(*inputs).compile()
        return program.memory_analysis().temp_size_in_bytes / 4

    first, second, fourth = (temporary(length) for length in (512, 1024, 2048))
    assert fourth - second == pytest.approx(2 * (second - first), rel=0.05)
    token = (second - first) / 512
    assert token < 4 * (2 * inner + 2 * states) + inner < inner * states


def test_no_product_rounds_its_factors_on_any_hardware():
    """GPUs and TPUs do by default, in a matrix product."""
    *inputs, state = draw()
    for implementation in EVERYWHERE:
        loss = lambda *x, i=implementation: scan.selective_scan(*x, implementation=i)[0].sum()  # noqa: E731
        program = str(jax.make_jaxpr(jax.grad(loss, argnums=range(6)))(*inputs))
        assert program.count("dot_general") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
    one = [x[:, 0] if x.ndim == 3 else x for x in inputs]
    assert "dot_general" not in str(jax.make_jaxpr(scan.selective_step)(*one, state))


def test_a_negative_chunk_size_is_an_error():
    *inputs, _ = draw(2)
    with pytest.raises(ValueError, match="chunk_size=-1 must be 1 or more, or 0 for the default; change it"):
        scan.selective_scan(*inputs, chunk_size=-1)


def test_an_unknown_implementation_is_an_error_that_names_the_known_ones():
    *inputs, _ = draw(2)
    with pytest.raises(ValueError, match=r"implementation=cuda is not known; choose one of .*reference"):
        scan.selective_scan(*inputs, implementation="cuda")


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (1, (2, 8, 4), "dt_BLI has shape (2, 8, 4), I=4, and u_BLI has I=3; make them equal"),
        (2, (2, 4), "A_IN has shape (2, 4), I=2, and u_BLI has I=3; make them equal"),
        (3, (2, 8, 5), "B_BLN has shape (2, 8, 5), N=5, and A_IN has N=4; make them equal"),
        (4, (2, 8, 1), "C_BLN has shape (2, 8, 1), N=1, and A_IN has N=4; make them equal"),
        (4, (2, 7, 4), "C_BLN has shape (2, 7, 4), L=7, and u_BLI has L=8; make them equal"),
        (4, (2, 4), "C_BLN has shape (2, 4); give it the dims (B, L, N)"),
        (5, (1,), "D_I has shape (1,), I=1, and u_BLI has I=3; make them equal"),
        (6, (2, 4, 3), "initial_state_BIN has shape (2, 4, 3), I=4, and u_BLI has I=3; make them equal"),
        (7, (1, 8), "segment_ids_BL has shape (1, 8), B=1, and u_BLI has B=2; make them equal"),
    ],
)
def test_shapes_that_do_not_agree_are_an_error_that_names_the_argument(place, shape, message):
    """Also those that numpy's rules would broadcast."""
    inputs = [*draw(), draw_segments()]
    inputs[place] = np.zeros(shape, inputs[place].dtype)
    *arrays, state, segments = inputs
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        scan.selective_scan(*arrays, initial_state_BIN=state, segment_ids_BL=segments)


def test_steps_one_by_one_equal_the_sequence():
    u, dt, A, B, C, D, state = draw()

    @jax.jit
    def steps(state):
        def step(state, inputs):
            y, state = scan.selective_step(inputs[0], inputs[1], A, inputs[2], inputs[3], D, state)
            return state, y

        state, y = jax.lax.scan(step, state, [x.swapaxes(0, 1) for x in (u, dt, B, C)])
        return y.swapaxes(0, 1), state

    y, final = steps(jnp.asarray(state))
    expected_y, expected_state, *_ = recurrence((u, dt, A, B, C, D, state), np.zeros((BATCH, LENGTH)))
    assert_close(y, expected_y)
    assert_close(final, expected_state)


@every_implementation
def test_vmap_inside_a_scan_over_microbatches_adds_up_to_each_problem_alone(implementation):
    """Two problems with weights of their own under vmap, each batch in two parts under lax.scan, all under jit."""
    problems = [draw(seed=seed) for seed in (4, 5)]
    segments, cotangents = draw_segments(), draw_cotangents()
    gradients = functools.partial(run, implementation=implementation)

    def accumulate(u, dt, A, B, C, D, state):
        def add_part(totals, part):
            (u, dt, B, C, state), segments, cotangents = part
            _, (_, _, dA, _, _, dD, _) = gradients((u, dt, A, B, C, D, state), segments, cotangents)
            return (totals[0] + dA, totals[1] + dD), None

        parts = jax.tree.map(lambda x: x[:, None], ((u, dt, B, C, state), segments, cotangents))
        return jax.lax.scan(add_part, (jnp.zeros_like(A), jnp.zeros_like(D)), parts)[0]

    together = jax.jit(jax.vmap(accumulate))(*(np.stack(values) for values in zip(*problems, strict=True)))
    for index, problem in enumerate(problems):
        alone = adjoint(problem, segments, cotangents)
        assert_close(together[0][index], alone[2], "A")
        assert_close(together[1][index], alone[5], "D")
