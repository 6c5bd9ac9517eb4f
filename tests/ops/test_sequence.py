"""Splitting the sequence over devices changes no value and no gradient, wherever a document begins and ends.

What is right comes from loops in float64 over whole rows; gradients from their central differences along a direction.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from scan_loop import recurrence

from moejax import config as config_lib
from moejax import partition
from moejax.analysis import collectives, program
from moejax.layers import mamba
from moejax.ops import attention, conv, scan, sequence, ssd

BATCH, LENGTH, INNER, STATES = 2, 16, 4, 3
MESHES = [{"sequence": 4}, {"data": 2, "sequence": 2, "tensor": 2}, {"sequence": 8}]
# Documents by length, a row each. Of parts of 4: boundaries between parts, a document that ends inside the halo of the
# next part, one over three parts, one of a single token at the end of a part; padding (0) at both ends of a row.
ROWS = ([(1, 3), (2, 1), (3, 2), (4, 2), (5, 8)], [(0, 2), (1, 9), (2, 4), (0, 1)])
SEGMENTS = np.array([np.repeat(*zip(*row, strict=True)) for row in ROWS]).astype(np.int32)

every_mesh = pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: " ".join(f"{a}={n}" for a, n in sizes.items()))


def mesh_of(**sizes):
    devices = jax.devices()[: math.prod(sizes.values())]
    return partition.make_mesh(config_lib.MeshConfig(**{"data": 1, **sizes}), devices)


def on_mesh(mesh, function):
    """`function`, jitted, with the mesh at hand and its arguments on it."""
    jitted = jax.jit(partition.on_mesh(mesh, function))
    return lambda *args: jitted(*jax.device_put(args, NamedSharding(mesh, PartitionSpec())))


def values_and_gradients(op):
    """(arrays, cotangents) -> (outputs, gradients of the arrays)."""

    def run(arrays, cotangents):
        values, pull_back = jax.vjp(op, *arrays)
        return values, pull_back(cotangents)

    return run


def assert_right(mesh, op, loop, arrays, cotangents, slope):
    """Values to 2e-5, and every gradient along a direction to 1e-4 of its size: float32 sums in another order."""
    values, gradients = on_mesh(mesh, values_and_gradients(op))(arrays, cotangents)
    for actual, expected in zip(jax.tree.leaves(values), jax.tree.leaves(loop(*arrays)), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5 * max(1.0, np.abs(expected).max()))
    rng = np.random.default_rng(5)
    for place, gradient in enumerate(gradients):

        def loss(x, place=place):
            outputs = loop(*arrays[:place], x, *arrays[place + 1 :])
            pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(cotangents), strict=True)
            return sum((np.asarray(weight, np.float64) * value).sum() for value, weight in pairs)

        direction = rng.normal(size=gradient.shape)
        expected = slope(loss, arrays[place], direction)
        actual = (np.asarray(gradient, np.float64) * direction).sum()
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert actual == pytest.approx(expected, abs=1e-4 * float(size)), f"gradient {place}"


# --- selective scan --------------------------------------------------------------------------------------------------


def draw_scan(length=LENGTH, seed=0) -> Any:
    """(u, dt, A, B, C, D), and weights of y and of the final state."""
    rng = np.random.default_rng(seed)
    arrays = (
        rng.normal(size=(BATCH, length, INNER)),
        np.exp(rng.uniform(np.log(0.01), np.log(1.0), size=(BATCH, length, INNER))),
        -np.exp(rng.uniform(-2, 1, size=(INNER, STATES))),
        rng.normal(size=(BATCH, length, STATES)),
        rng.normal(size=(BATCH, length, STATES)),
        rng.normal(size=INNER),
    )
    cotangents = (rng.normal(size=(BATCH, length, INNER)), rng.normal(size=(BATCH, INNER, STATES)))
    return jax.tree.map(lambda x: x.astype(np.float32), (arrays, cotangents))


def scan_loop(segments, *arrays):
    """`scan_loop.recurrence` from a state of zero: y and the final state."""
    segments = np.zeros(arrays[0].shape[:2]) if segments is None else segments
    return recurrence((*arrays, np.zeros((BATCH, INNER, STATES))), segments)[:2]


def sharded_scan(segments, implementation=None):
    return functools.partial(
        sequence.selective_scan, segment_ids_BL=segments, implementation=implementation, chunk_size=3
    )


@every_mesh
def test_a_split_scan_equals_the_recurrence_over_whole_rows(sizes, slope):
    """Outputs, the final state, and the gradients of u, dt, A, B, C and D."""
    arrays, cotangents = draw_scan()
    loop = functools.partial(scan_loop, SEGMENTS)
    assert_right(mesh_of(**sizes), sharded_scan(SEGMENTS), loop, arrays, cotangents, slope)


@pytest.mark.parametrize("implementation", list(scan.IMPLEMENTATIONS))
def test_every_implementation_can_be_split_and_without_documents_states_reach_over_all_parts(implementation, slope):
    arrays, cotangents = draw_scan()
    loop = functools.partial(scan_loop, None)
    with scan.interpreted():
        assert_right(mesh_of(sequence=4), sharded_scan(None, implementation), loop, arrays, cotangents, slope)
    moved = (arrays[0] + np.eye(LENGTH)[0][:, None], *arrays[1:])
    difference = loop(*moved)[0] - loop(*arrays)[0]
    assert np.abs(difference[:, -4:]).max() > 1e-3  # what the first position says is heard three parts later


def test_extreme_step_sizes_stay_finite_and_right():
    drawn, cotangents = draw_scan()
    run = on_mesh(mesh_of(sequence=4), values_and_gradients(sharded_scan(SEGMENTS)))
    for dt in (1e-4, 50.0):
        arrays = (drawn[0], np.full_like(drawn[1], dt), *drawn[2:])
        values, gradients = run(arrays, cotangents)
        for actual, expected in zip(values, scan_loop(SEGMENTS, *arrays), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
        assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_is_rounded_once_and_states_travel_in_float32():
    arrays, _ = draw_scan()
    halves = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays)
    y, state = on_mesh(mesh_of(sequence=4), sharded_scan(SEGMENTS))(*halves)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    expected_y, expected_state = scan_loop(SEGMENTS, *(np.asarray(x, np.float64) for x in halves))
    np.testing.assert_allclose(np.asarray(y, np.float64), expected_y, rtol=2**-8, atol=1e-4)
    np.testing.assert_allclose(state, expected_state, atol=1e-4)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_the_state_before_a_part_is_what_those_on_its_left_make_of_zero(parts):
    """With as many messages as the docstring says: 1 + ceil(log2(n - 1)), of a sum and of a state."""
    rng = np.random.default_rng(0)
    total_PX, state_PXN = rng.uniform(0, 2, (parts, 5)), rng.normal(size=(parts, 5, 2))
    rate_N = np.array([0.5, 3.0])

    def before(total_1X, state_1XN):
        return sequence.carried_state(total_1X, state_1XN, lambda total_1X: jnp.exp(-total_1X[..., None] * rate_N))

    spec = PartitionSpec("sequence")
    split = jax.shard_map(before, mesh=mesh_of(sequence=parts), in_specs=spec, out_specs=spec)
    expected_PXN = np.zeros_like(state_PXN)
    for part in range(1, parts):
        decay_XN = np.exp(-total_PX[part - 1][:, None] * rate_N)
        expected_PXN[part] = decay_XN * expected_PXN[part - 1] + state_PXN[part - 1]
    np.testing.assert_allclose(jax.jit(split)(total_PX, state_PXN), expected_PXN, atol=1e-5)
    messages = str(jax.make_jaxpr(split)(total_PX, state_PXN)).count("ppermute")
    assert messages == 2 * (1 + math.ceil(math.log2(parts - 1)))


# --- Mamba-2 ---------------------------------------------------------------------------------------------------------


def ssd_loop(segments, x, dt, A, B, C, D):
    """Mamba-2's recurrence, position by position: a matrix a head, which decays as a whole."""
    x, dt, A, B, C, D = (np.asarray(value, np.float64) for value in (x, dt, A, B, C, D))
    B, C = (np.repeat(value, x.shape[2] // value.shape[2], axis=2) for value in (B, C))
    h, y = np.zeros((*x[:, 0].shape, B.shape[-1])), np.zeros(x.shape)
    for t in range(x.shape[1]):
        if segments is not None and t > 0:
            h = np.where((segments[:, t] == segments[:, t - 1])[:, None, None, None], h, 0)
        h = np.exp(dt[:, t] * A)[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y[:, t] = np.einsum("bhpn,bhn->bhp", h, C[:, t]) + D[:, None] * x[:, t]
    return y, h


def draw_ssd(heads, groups) -> Any:
    rng = np.random.default_rng(0)
    shapes = [(BATCH, LENGTH, heads, 2), (BATCH, LENGTH, groups, STATES), (BATCH, heads, 2, STATES)]
    arrays = (
        rng.normal(size=shapes[0]),
        np.exp(rng.uniform(np.log(0.01), np.log(1.0), size=shapes[0][:3])),
        -np.exp(rng.uniform(-2, 1, size=heads)),
        rng.normal(size=shapes[1]),
        rng.normal(size=shapes[1]),
        rng.normal(size=heads),
    )
    cotangents = (rng.normal(size=shapes[0]), rng.normal(size=shapes[2]))
    return jax.tree.map(lambda x: x.astype(np.float32), (arrays, cotangents))


@pytest.mark.parametrize(
    ("sizes", "groups", "packed"),
    [
        ({"sequence": 4}, 2, True),
        ({"sequence": 4}, 1, False),
        ({"data": 2, "sequence": 2, "tensor": 2}, 2, True),  # a group a device
        ({"sequence": 2, "tensor": 4}, 2, True),  # half a group a device
    ],
)
def test_split_mamba_2_equals_the_recurrence_over_whole_rows(sizes, groups, packed, slope):
    arrays, cotangents = draw_ssd(4, groups)
    segments = SEGMENTS if packed else None
    op = functools.partial(sequence.ssd, segment_ids_BL=segments, chunk_size=3)
    assert_right(mesh_of(**sizes), op, functools.partial(ssd_loop, segments), arrays, cotangents, slope)


def test_a_mesh_that_cuts_groups_of_heads_is_refused():
    arrays, _ = draw_ssd(6, 2)
    with pytest.raises(
        ValueError, match=r"^mesh.tensor=3 leaves 2 heads a device, which cut groups of 3 heads; set .*"
    ):
        on_mesh(mesh_of(sequence=2, tensor=3), sequence.ssd)(*arrays)


# --- convolution -----------------------------------------------------------------------------------------------------


def conv_loop(segments, x, kernel, bias):
    x, kernel, bias = (np.asarray(value, np.float64) for value in (x, kernel, bias))
    taps, y = len(kernel), np.zeros(x.shape) + bias
    for t in range(x.shape[1]):
        for s in range(max(0, t - taps + 1), t + 1):
            same = np.ones(len(x), bool) if segments is None else segments[:, s] == segments[:, t]
            y[:, t] += np.where(same[:, None], kernel[taps - 1 - (t - s)] * x[:, s], 0)
    return y


@pytest.mark.parametrize(
    ("sizes", "taps", "packed"),
    [(MESHES[0], 4, True), (MESHES[1], 4, True), (MESHES[2], 4, True), (MESHES[2], 4, False), (MESHES[0], 1, True),
     ({"sequence": 2}, 20, False)],
)  # fmt: skip
def test_a_split_convolution_equals_the_loop_over_whole_rows(sizes, taps, packed, slope):
    """Parts of 8, 4 and 2 positions: a kernel of 4 reaches two parts back from those of 2, one of 20 before the row."""
    rng = np.random.default_rng(0)
    shapes = ((BATCH, LENGTH, INNER), (taps, INNER), (INNER,))
    arrays = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    dy, segments = rng.normal(size=shapes[0]).astype(np.float32), SEGMENTS if packed else None
    op = functools.partial(sequence.causal_conv, segment_ids_BL=segments)
    assert_right(mesh_of(**sizes), op, functools.partial(conv_loop, segments), arrays, dy, slope)


# --- attention -------------------------------------------------------------------------------------------------------


def attention_loop(segments, causal, query, key, value):
    """Of every position: the mean of the values it may see, weighted by the exponential of the scores."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    y = np.zeros(query.shape)
    for b, t, h in np.ndindex(query.shape[:3]):
        seen = np.ones(len(key[b]), bool) if segments is None else segments[b] == segments[b, t]
        seen &= np.arange(len(seen)) <= t if causal else True
        weight = np.exp(key[b, seen, h] @ query[b, t, h] / np.sqrt(query.shape[-1]))
        y[b, t, h] = weight @ value[b, seen, h] / weight.sum()
    return y


@pytest.mark.parametrize(
    ("sizes", "causal", "packed"),
    [(MESHES[0], True, True), (MESHES[1], True, True), (MESHES[0], True, False), (MESHES[0], False, True)],
)
def test_split_attention_equals_the_loop_over_whole_rows(sizes, causal, packed, slope):
    rng = np.random.default_rng(0)
    query, key, value, dy = (rng.normal(size=(BATCH, LENGTH, 2, 4)).astype(np.float32) for _ in range(4))
    segments = SEGMENTS if packed else None
    op = functools.partial(sequence.attention, segment_ids_BL=segments, causal=causal)
    loop = functools.partial(attention_loop, segments, causal)
    assert_right(mesh_of(**sizes), op, loop, (query, key, value), dy, slope)


# --- programs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, {"data": 2, "tensor": 2}])
def test_where_nothing_splits_the_sequence_the_program_is_that_of_the_op_alone(sizes):
    """Without a mesh, and on one whose axis is 1, where the scan still runs on each device's rows alone; on one that
    splits it, it is another program."""
    arrays, _ = draw_scan()
    x, kernel, bias = arrays[0], np.ones((4, INNER), np.float32), np.ones(INNER, np.float32)
    heads = x[:, :, None]
    pairs = [
        (sequence.selective_scan, scan.selective_scan, arrays),
        (sequence.causal_conv, conv.causal_conv, (x, kernel, bias)),
        (sequence.attention, attention.attention, (heads, heads, heads)),
        (sequence.ssd, ssd.ssd, draw_ssd(4, 2)[0]),
    ]
    mesh = None if sizes is None else mesh_of(**sizes)
    for split, alone, inputs in pairs:

        def program(op, mesh, inputs=inputs):
            op = functools.partial(op, segment_ids_BL=SEGMENTS)
            return str(jax.make_jaxpr(op if mesh is None else partition.on_mesh(mesh, op))(*inputs))

        same = program(split, mesh) == program(alone, mesh)
        assert same == (mesh is None or alone is not scan.selective_scan)
        assert program(split, mesh_of(sequence=4)) != program(alone, mesh_of(sequence=4))


def test_a_mamba_layer_sends_halos_and_states_and_no_sequence():
    """Forward and backward, of rows of 256 positions: no array is gathered, nothing larger than a state goes to another
    device but the sums of the weights' gradients, and rows of 512 send not a byte more."""
    mesh, d_model = mesh_of(data=2, sequence=4), 8
    layer = jax.eval_shape(
        lambda: mamba.Mamba(
            d_model, expand=2, d_state=STATES, d_conv=4, dt_rank=1, dt_min=0.001, dt_max=0.1, scan_implementation=None,
            chunk_size=8, out_scale=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    params = sum(4 * leaf.size for leaf in jax.tree.leaves(layer))

    def sent(length):
        def loss(layer, u_BLD, segments):
            return jnp.sum(layer(u_BLD, segment_ids_BL=segments) ** 2)

        place = partition.batch_sharding(mesh)
        arrays = (
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=partition.replicated(mesh)), layer),
            jax.ShapeDtypeStruct((BATCH, length, d_model), jnp.float32, sharding=place),
            jax.ShapeDtypeStruct((BATCH, length), jnp.int32, sharding=place),
        )
        step = partition.on_mesh(mesh, jax.value_and_grad(loss, argnums=(0, 1)))
        text = jax.jit(step).lower(*arrays).compile().as_text()
        return [(one.kind, one.result_bytes) for one in collectives.collectives(program.parse(text), mesh)]

    found = sent(256)
    inner = 2 * d_model
    state, halo = 4 * inner * STATES, 4 * inner * 3  # bytes, of the one row of a device
    assert {name for name, _ in found} == {"collective-permute", "all-reduce"}
    assert max(size for name, size in found if name == "collective-permute") <= max(state, halo)
    assert sum(size for name, size in found if name == "all-reduce") <= 3 * params  # first over one axis, then another
    assert found == sent(512)
