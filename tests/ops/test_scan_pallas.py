"""The kernels of the selective scan, run as plain jax operations, are the recurrence of the paper.

The reference is a loop over time in float64, with its gradients derived by hand. float32 keeps 7 digits; sums run over
up to 2 x 261 positions of numbers around 1, so 5e-5 of the largest value is a bound with room.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moejax import config, partition
from moejax.ops import scan, scan_pallas_gpu, scan_pallas_tpu

NAMES = ("u", "dt", "A", "B", "C", "D", "initial state")
every_kernel = pytest.mark.parametrize("kernel", list(scan.NEEDS))
CHUNK = {"pallas_tpu": scan_pallas_tpu.CHUNK, "pallas_gpu": 4}


@pytest.fixture(autouse=True, scope="module")
def short_gpu_chunks():
    """Its chunks are written out position by position, which the interpreter compiles slowly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_pallas_gpu, "CHUNK", CHUNK["pallas_gpu"])
        yield


def draw(length, *, batch=2, inner=3, states=4, dt=None, seed=0):
    """((u, dt, A, B, C, D, initial state), segment ids, gradients of y and of the last state), numpy."""
    rng = np.random.default_rng(seed)
    inputs = (
        rng.normal(size=(batch, length, inner)),
        np.exp(rng.uniform(np.log(0.01), np.log(2.0), size=(batch, length, inner))) if dt is None
        else np.full((batch, length, inner), dt),
        -np.exp(rng.uniform(-1, 2, size=(inner, states))),
        rng.normal(size=(batch, length, states)),
        rng.normal(size=(batch, length, states)),
        rng.normal(size=inner),
        rng.normal(size=(batch, inner, states)),
    )  # fmt: skip
    segments = np.cumsum(rng.random((batch, length)) < 0.1, axis=1).astype(np.int32)
    cotangents = rng.normal(size=(batch, length, inner)), rng.normal(size=(batch, inner, states))
    to_float32 = functools.partial(jax.tree.map, lambda x: x.astype(np.float32))
    return to_float32(inputs), segments, to_float32(cotangents)


def expected(inputs, segments, cotangents):
    """(y, last state), gradients of every input, in float64."""
    u, dt, A, B, C, D, state = (np.asarray(x, np.float64) for x in inputs)
    dy, g = (np.asarray(x, np.float64) for x in cotangents)
    kept = np.concatenate([np.ones_like(segments[:, :1]), segments[:, 1:] == segments[:, :-1]], axis=1)
    decay = np.exp(dt[..., None] * A) * kept[:, :, None, None]
    before, h = [], state
    y = D * u
    for t in range(u.shape[1]):
        before.append(h)
        h = decay[:, t] * h + (dt * u)[:, t, :, None] * B[:, t, None]
        y[:, t] += (h * C[:, t, None]).sum(-1)
    after, last = [*before[1:], h], h
    du, dD = D * dy, (dy * u).sum((0, 1))
    ddt, dA, dB, dC = np.zeros_like(dt), np.zeros_like(A), np.zeros_like(B), np.zeros_like(C)
    for t in reversed(range(u.shape[1])):
        g = g + dy[:, t, :, None] * C[:, t, None]
        dC[:, t] = (after[t] * dy[:, t, :, None]).sum(1)
        dB[:, t] = (g * (dt * u)[:, t, :, None]).sum(1)
        dv = (g * B[:, t, None]).sum(-1)
        dlog = g * before[t] * decay[:, t]
        du[:, t] += dv * dt[:, t]
        ddt[:, t] = dv * u[:, t] + (dlog * A).sum(-1)
        dA += (dlog * dt[:, t, :, None]).sum(0)
        g = g * decay[:, t]
    return (y, last), (du, ddt, dA, dB, dC, dD, g)


@functools.partial(jax.jit, static_argnames="kernel")
def run(inputs, segments, cotangents, *, kernel):
    """(y, last state), gradients of every input, by a kernel in the interpreter."""

    def outputs(*inputs):
        return scan.selective_scan(
            *inputs[:-1], segment_ids_BL=segments, initial_state_BIN=inputs[-1], implementation=kernel
        )

    with scan.interpreted():
        values, pull_back = jax.vjp(outputs, *inputs)
        return values, pull_back(cotangents)


def assert_all_close(actual, wanted, tolerance=5e-5):
    for name, x, y in zip(("y", "last state", *NAMES), (*actual[0], *actual[1]), (*wanted[0], *wanted[1]), strict=True):
        atol = tolerance * max(1.0, np.abs(y).max())
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=atol, err_msg=name)


@every_kernel
@pytest.mark.parametrize("chunks_and_more", [(0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, 3)])
def test_values_and_gradients_equal_the_float64_recurrence_at_any_length(kernel, chunks_and_more):
    chunks, more = chunks_and_more
    problem = draw(chunks * CHUNK[kernel] + more)
    assert_all_close(run(*problem, kernel=kernel), expected(*problem))


@every_kernel
def test_a_thousand_positions_equal_the_float64_recurrence(kernel):
    problem = draw(1000, batch=1)
    assert_all_close(run(*problem, kernel=kernel), expected(*problem))


@every_kernel
def test_blocks_of_channels_and_states_of_any_number(kernel):
    """650 channels are 6 blocks on TPU and 21 on GPU, the last one not full; 9 states fill no register."""
    problem = draw(3, inner=650, states=9)
    assert_all_close(run(*problem, kernel=kernel), expected(*problem))


@every_kernel
@pytest.mark.parametrize("dt", [1e-4, 50.0])
def test_extreme_step_sizes_stay_finite_and_right(kernel, dt):
    """exp(50 * -7) underflows to 0, and so does its gradient; dt = 1e-4 barely moves the state."""
    problem = draw(5, dt=dt)
    assert_all_close(run(*problem, kernel=kernel), expected(*problem))


@every_kernel
def test_bfloat16_inputs_cost_only_their_own_rounding(kernel):
    """y is the float32 result rounded once, within 2^-8 of it; gradients likewise; the state is not rounded at all."""
    inputs, segments, (dy, dlast) = draw(5)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (*inputs[:-1], dy)]
    *halves, half_dy = halves
    (y, last), gradients = run((*halves, inputs[-1]), segments, (half_dy, dlast), kernel=kernel)
    assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    wanted = expected((*halves, inputs[-1]), segments, (half_dy, dlast))
    assert_all_close(((y, last), gradients), wanted, tolerance=2**-8)
    np.testing.assert_allclose(last, wanted[0][1], atol=5e-5)


@every_kernel
def test_problems_under_vmap_are_each_problem_alone(kernel):
    problems = [draw(5, seed=seed) for seed in (1, 2)]
    together = jax.vmap(functools.partial(run, kernel=kernel))(*jax.tree.map(lambda *x: np.stack(x), *problems))
    for index, problem in enumerate(problems):
        assert_all_close(jax.tree.map(lambda x, i=index: x[i], together), expected(*problem))


def mesh_of(devices, platform=None):
    """Rows over two and channels over two; of another platform, as a mesh of devices that are not here would say."""
    mesh = partition.make_mesh(config.MeshConfig(data=2, tensor=-1), devices)
    if platform is None:
        return mesh
    there = jax.sharding.AbstractDevice(device_kind="", num_cores=None, platform=platform)
    return types.SimpleNamespace(abstract_mesh=mesh.abstract_mesh.update(abstract_device=there))


@every_kernel
def test_over_a_mesh_of_rows_and_channels_nothing_is_gathered(kernel):
    """Rows over two devices and channels over two: values and gradients are those of one device."""
    mesh = mesh_of(jax.devices()[:4])
    specs = ("data", None, "tensor"), ("data", None, "tensor"), ("tensor",), ("data",), ("data",), ("tensor",)
    places = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in (*specs, ("data", "tensor"))]
    rows, grads = NamedSharding(mesh, PartitionSpec("data")), (places[0], places[-1])
    problem = draw(5, inner=4)
    program = jax.jit(
        partition.on_mesh(mesh, functools.partial(run, kernel=kernel)),
        in_shardings=(tuple(places), rows, grads),
        out_shardings=((places[0], places[-1]), tuple(places)),
    )
    compiled = program.lower(*problem).compile()
    assert "all-gather" not in compiled.as_text()
    assert "all-reduce" in compiled.as_text()  # dA over rows, dB and dC over channels
    assert_all_close(compiled(*problem), expected(*problem))


def on(platform, function):
    """`function`, traced for four devices of a platform that is not here."""
    return partition.on_mesh(mesh_of(jax.devices()[:4], platform), function)


@pytest.mark.parametrize(("kernel", "platform", "call"), [
    ("pallas_tpu", "tpu", "tpu_custom_call"), ("pallas_gpu", "cuda", "triton"),
])  # fmt: skip
def test_kernels_lower_for_a_platform_that_is_not_here(kernel, platform, call):
    """Forward and backward, as far as jax goes without the platform's compiler."""
    inputs, _, _ = draw(6, inner=4, states=9)

    def gradients(*inputs):
        y, pull_back = jax.vjp(lambda *x: scan.selective_scan(*x, implementation=kernel)[0], *inputs)
        return pull_back(y)

    text = (
        jax.jit(on(scan.NEEDS[kernel], gradients)).trace(*inputs[:-1]).lower(lowering_platforms=(platform,)).as_text()
    )
    assert len(re.findall(rf"custom_call @\S*{call}", text)) == 2


def test_the_fastest_is_the_kernel_on_tpu():
    def is_kernel(platform, states=4):
        *inputs, _ = draw(5, inner=4, states=states)[0]
        return "pallas_call" in str(jax.make_jaxpr(on(platform, lambda *x: scan.selective_scan(*x)[0]))(*inputs))

    assert {name: is_kernel(name) for name in ("tpu", "gpu", "cpu")} == {"tpu": True, "gpu": False, "cpu": False}
    assert is_kernel("tpu", scan_pallas_tpu.MAX_STATES)
    assert not is_kernel("tpu", scan_pallas_tpu.MAX_STATES + 1)


@every_kernel
def test_a_kernel_of_another_platform_is_refused_with_the_reason_and_what_can_run(kernel):
    *inputs, _ = draw(2)[0]
    message = rf"^implementation={kernel} needs a {kernel[-3:].upper()}, and this is cpu; choose .* or unrolled$"
    with pytest.raises(ValueError, match=message):
        scan.selective_scan(*inputs, implementation=kernel)


def test_a_choice_that_the_platform_has_is_named():
    *inputs, _ = draw(2)[0]
    message = r"^implementation=pallas_gpu needs a GPU, and this is tpu; choose .*, unrolled or pallas_tpu"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(on("tpu", functools.partial(scan.selective_scan, implementation="pallas_gpu")), *inputs)


@every_kernel
def test_more_states_than_the_chip_holds_are_refused(kernel):
    *inputs, _ = draw(2, states=129)[0]
    with scan.interpreted(), pytest.raises(ValueError, match=rf"{kernel} holds at most .* has 129; choose"):
        scan.selective_scan(*inputs, implementation=kernel)


def test_the_config_knows_every_implementation_and_its_platform():
    assert {"auto": ""} | {name: scan.NEEDS.get(name, "") for name in scan.IMPLEMENTATIONS} == config.SCANS
