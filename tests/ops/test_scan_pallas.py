"""The kernels of the selective scan: blocks, meshes, platforms. That they are the recurrence, test_scan has.

They run in Pallas's interpreter, as plain jax operations.
"""

import functools
import re
import types

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scan_loop import assert_right, draw, draw_cotangents, draw_segments

from moejax import config, partition
from moejax.ops import scan, scan_pallas_gpu, scan_pallas_tpu

every_kernel = pytest.mark.parametrize("kernel", list(scan.NEEDS))


@pytest.fixture(autouse=True, scope="module")
def short_gpu_chunks():
    """Its chunks are written out position by position, which the interpreter compiles slowly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_pallas_gpu, "CHUNK", 4)
        yield


def draw_problem(length, **sizes):
    return draw(length, **sizes), draw_segments(length), draw_cotangents(length, **sizes)


@functools.partial(jax.jit, static_argnames="kernel")
def run(inputs, segments, cotangents, *, kernel):
    """(y, final state), gradients of every input, by a kernel in the interpreter."""

    def outputs(*inputs):
        return scan.selective_scan(
            *inputs[:-1], segment_ids_BL=segments, initial_state_BIN=inputs[-1], implementation=kernel
        )

    with scan.interpreted():
        values, pull_back = jax.vjp(outputs, *inputs)
        return values, pull_back(cotangents)


@every_kernel
def test_blocks_of_channels_and_states_of_any_number(kernel):
    """650 channels are 6 blocks on TPU and 21 on GPU, the last one not full; 9 states fill no register."""
    problem = draw_problem(3, inner=650, states=9)
    assert_right(run(*problem, kernel=kernel), problem)


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
    problem = draw_problem(5, inner=4)
    program = jax.jit(
        partition.on_mesh(mesh, functools.partial(run, kernel=kernel)),
        in_shardings=(tuple(places), rows, grads),
        out_shardings=((places[0], places[-1]), tuple(places)),
    )
    compiled = program.lower(*problem).compile()
    assert "all-gather" not in compiled.as_text()
    assert "all-reduce" in compiled.as_text()  # dA over rows, dB and dC over channels
    assert_right(compiled(*problem), problem)


def on(platform, function):
    """`function`, traced for four devices of a platform that is not here."""
    return partition.on_mesh(mesh_of(jax.devices()[:4], platform), function)


@pytest.mark.parametrize(("kernel", "platform", "call"), [
    ("pallas_tpu", "tpu", "tpu_custom_call"), ("pallas_gpu", "cuda", "triton"),
])  # fmt: skip
def test_kernels_lower_for_a_platform_that_is_not_here(kernel, platform, call):
    """Forward and backward, as far as jax goes without the platform's compiler."""
    inputs = draw(6, inner=4, states=9)

    def gradients(*inputs):
        y, pull_back = jax.vjp(lambda *x: scan.selective_scan(*x, implementation=kernel)[0], *inputs)
        return pull_back(y)

    text = (
        jax.jit(on(scan.NEEDS[kernel], gradients)).trace(*inputs[:-1]).lower(lowering_platforms=(platform,)).as_text()
    )
    assert len(re.findall(rf"custom_call @\S*{call}", text)) == 2


def test_the_fastest_is_the_kernel_on_tpu():
    def is_kernel(platform, states=4):
        *inputs, _ = draw(5, inner=4, states=states)
        return "pallas_call" in str(jax.make_jaxpr(on(platform, lambda *x: scan.selective_scan(*x)[0]))(*inputs))

    assert {name: is_kernel(name) for name in ("tpu", "gpu", "cpu")} == {"tpu": True, "gpu": False, "cpu": False}
    assert is_kernel("tpu", scan_pallas_tpu.MAX_STATES)
    assert not is_kernel("tpu", scan_pallas_tpu.MAX_STATES + 1)


@every_kernel
def test_a_kernel_of_another_platform_is_refused_with_the_reason_and_what_can_run(kernel):
    *inputs, _ = draw(2)
    message = rf"^implementation={kernel} needs a {kernel[-3:].upper()}, and this is cpu; choose .* or unrolled$"
    with pytest.raises(ValueError, match=message):
        scan.selective_scan(*inputs, implementation=kernel)


def test_a_choice_that_the_platform_has_is_named():
    *inputs, _ = draw(2)
    message = r"^implementation=pallas_gpu needs a GPU, and this is tpu; choose .*, unrolled or pallas_tpu"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(on("tpu", functools.partial(scan.selective_scan, implementation="pallas_gpu")), *inputs)


@every_kernel
def test_more_states_than_the_chip_holds_are_refused(kernel):
    *inputs, _ = draw(2, states=129)
    with scan.interpreted(), pytest.raises(ValueError, match=rf"{kernel} holds at most .* has 129; choose"):
        scan.selective_scan(*inputs, implementation=kernel)


def test_the_config_knows_every_implementation_and_its_platform():
    assert {"auto": ""} | {name: scan.NEEDS.get(name, "") for name in scan.IMPLEMENTATIONS} == config.SCANS
