"""A mesh is what the config says, or an error with the remedy; it changes where numbers lie, never what they are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moejax import config as config_lib
from moejax import partition
from moejax.models import lm


def mesh_of(**sizes):
    return partition.make_mesh(config_lib.MeshConfig(**{"data": 1, **sizes}))


def error_of(call):
    with pytest.raises(config_lib.ConfigError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": -1}, (8, 1, 1, 1, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 1, 1, 2)),
        ({"expert": -1, "data": 4}, (4, 1, 2, 1, 1)),
        ({"data": 2, "fsdp": -1, "expert": 4}, (2, 1, 4, 1, 1)),
        ({"data": 2, "fsdp": 2, "expert": 2}, (2, 2, 2, 1, 1)),
        ({"data": 2, "sequence": -1}, (2, 1, 1, 4, 1)),
    ],
)
def test_minus_one_takes_the_devices_that_the_others_leave(sizes, shape):
    mesh = mesh_of(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "expert", "sequence", "tensor")
    assert tuple(mesh.shape.values()) == shape
    assert partition.num_batch_shards(mesh) == shape[0] * shape[1] * shape[2]


def test_a_mesh_over_some_of_the_devices():
    mesh = partition.make_mesh(config_lib.MeshConfig(data=-1), jax.devices()[:2])
    assert list(mesh.devices.flat) == jax.devices()[:2]


class Chip:
    """A TPU chip as a topology describes it."""

    platform, device_kind, core_on_chip, process_index = "tpu", "TPU v5 lite", 0, 0

    def __init__(self, number, coords, slice_index=0):
        self.id, self.coords, self.slice_index = number, list(coords), slice_index


def slices(*shape, num_slices=1):
    coords = [tuple(reversed(place)) for place in np.ndindex(*reversed(shape))]
    return [Chip(n, place, part) for part in range(num_slices) for n, place in enumerate(coords, part * len(coords))]


def test_on_tpus_an_axis_lies_along_axes_of_chips():
    mesh = partition.make_mesh(config_lib.MeshConfig(data=-1, expert=4), slices(4, 4, 1))
    for ring in mesh.devices.reshape(4, 4):  # of one expert axis: chips in a line
        places = np.array([chip.coords for chip in ring])
        assert sorted(np.ptp(places, axis=0).tolist()) == [0, 0, 3]


def test_data_and_nothing_else_crosses_between_slices():
    devices = slices(2, 4, 1, num_slices=2)
    mesh = partition.make_mesh(config_lib.MeshConfig(data=4, expert=4), devices)
    part_of = np.vectorize(lambda chip: chip.slice_index)(mesh.devices.reshape(4, 4))
    np.testing.assert_array_equal(part_of, [[0] * 4] * 2 + [[1] * 4] * 2)
    assert partition.describe(mesh) == (
        "mesh: data=4 (rows) x expert=4 (rows, expert) on 16 devices (tpu) of 2 hosts in 2 slices, over "
        "which data is split"
    )
    error = error_of(lambda: partition.make_mesh(config_lib.MeshConfig(data=1, expert=16), devices))
    assert error == (
        "mesh.data=1 does not divide over 2 slices, and data is what crosses the network between them; "
        "set mesh.data to a multiple of 2"
    )


def test_axes_that_chips_cannot_make_are_refused_with_those_that_they_can():
    config = config_lib.MeshConfig(data=8, expert=8)
    error = error_of(lambda: partition.make_mesh(config, slices(4, 4, 4)))
    assert error == (
        "mesh.data=8, mesh.expert=8 in a slice of 4 x 4 x 4 devices: each axis must take whole axes of them, 1, 4, 16 "
        "or 64; change the sizes, or set mesh.split_physical_axes=True, which lays an axis over part of one"
    )
    config.split_physical_axes = True
    assert dict(partition.make_mesh(config, slices(4, 4, 4)).shape)["expert"] == 8
    two_a_chip = slices(4, 4, 1) + slices(4, 4, 1)
    for number, device in enumerate(two_a_chip):
        device.id, device.device_kind, device.core_on_chip = number, "TPU7x", number // 16
    error = error_of(lambda: partition.make_mesh(config_lib.MeshConfig(data=2, fsdp=2, tensor=8), two_a_chip))
    assert "in a slice of 4 x 4 x 2 devices: each axis must take whole axes of them, 1, 2, 4, 8, 16 or 32;" in error


def test_the_mesh_is_told_in_a_line():
    mesh = mesh_of(data=2, fsdp=2, sequence=2)
    assert partition.describe(mesh) == (
        "mesh: data=2 (rows) x fsdp=2 (rows, embed) x sequence=2 (positions) on 8 devices (cpu)"
    )
    one = partition.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    assert partition.describe(one) == "mesh: 1 device (cpu)"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 3},
            "mesh.data=3, mesh.fsdp=1, mesh.expert=1, mesh.sequence=1, mesh.tensor=1 does not multiply to the 8 "
            "devices here; set one axis to -1 for the rest and the others to divisors of 8",
        ),
        (
            {"data": -1, "fsdp": 3},
            "mesh.data=-1, mesh.fsdp=3, mesh.expert=1, mesh.sequence=1, mesh.tensor=1 does not multiply to the 8 "
            "devices here; set one axis to -1 for the rest and the others to divisors of 8",
        ),
        (
            {"data": 16},
            "mesh.data=16, mesh.fsdp=1, mesh.expert=1, mesh.sequence=1, mesh.tensor=1 does not multiply to the 8 "
            "devices here; set one axis to -1 for the rest and the others to divisors of 8",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    assert error_of(lambda: mesh_of(**sizes)) == message


def test_one_device_is_not_called_devices():
    message = error_of(lambda: partition.make_mesh(config_lib.MeshConfig(data=2), jax.devices()[:1]))
    assert "does not multiply to the 1 device here; " in message


def batch_config(batch_size=16, num_microbatches=1, group_size=0, seq_length=8):
    c = config_lib.Config()
    c.data.batch_size, c.training.num_microbatches = batch_size, num_microbatches
    c.model.moe.group_size, c.data.seq_length = group_size, seq_length
    return c


def test_every_device_gets_the_same_rows_and_whole_routing_groups():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)  # 4 parts: rows are not split over tensor
    for fitting in (
        batch_config(4),
        batch_config(8, num_microbatches=2),
        batch_config(16, group_size=32),
        batch_config(4, group_size=2),
    ):
        partition.check_batch(fitting, mesh)
    assert error_of(lambda: partition.check_batch(batch_config(6), mesh)) == (
        "data.batch_size=6 does not divide over mesh.data=2 x mesh.fsdp=2 and training.num_microbatches=1; "
        "set it to a multiple of 4"
    )
    assert error_of(lambda: partition.check_batch(batch_config(12, num_microbatches=2), mesh)) == (
        "data.batch_size=12 does not divide over mesh.data=2 x mesh.fsdp=2 and training.num_microbatches=2; "
        "set it to a multiple of 8"
    )
    assert error_of(lambda: partition.check_batch(batch_config(8, group_size=64), mesh)) == (
        "model.moe.group_size=64 does not divide the 16 tokens of a microbatch on a device, "
        "and a group never spans devices that rows are split over; set it to 0 or to a divisor"
    )
    split = mesh_of(data=2, sequence=4)
    partition.check_batch(batch_config(4, seq_length=12), split)
    assert error_of(lambda: partition.check_batch(batch_config(4, seq_length=10), split)) == (
        "mesh.sequence=4 does not divide data.seq_length=10; set mesh.sequence to a divisor of 10, "
        "or data.seq_length to 12"
    )
    dense = batch_config(8, group_size=64)
    dense.model.period = ("mamba",)
    partition.check_batch(dense, mesh)  # no MoE layer, no groups


def test_heads_of_mamba_2_that_would_be_cut_from_their_group_are_refused_where_rows_are_split():
    config = batch_config(4, seq_length=12)
    config.model.period, config.model.d_model = ("mamba2",), 12
    config.model.mamba2 = config_lib.Mamba2Config(d_head=4, num_groups=2)  # 6 heads in groups of 3
    mesh = partition.make_mesh(config_lib.MeshConfig(data=1, sequence=2, tensor=3), jax.devices()[:6])
    assert error_of(lambda: partition.check_batch(config, mesh)) == (
        "mesh.tensor=3 leaves 2 heads of mamba2 a device, which cuts groups of 3 heads where mesh.sequence=2 splits "
        "rows; set mesh.tensor to a divisor of model.mamba2.num_groups=2"
    )
    config.model.mamba2.num_groups = 1
    partition.check_batch(config, mesh)


def test_a_batch_is_split_by_rows_and_by_positions():
    mesh = mesh_of(data=2, sequence=2, tensor=2)
    batch = jax.device_put(np.arange(16).reshape(2, 8), partition.batch_sharding(mesh))
    parts = {(shard.index[0].start, *map(int, shard.data[0])) for shard in batch.addressable_shards}
    assert parts == {(0, 0, 1, 2, 3), (0, 4, 5, 6, 7), (1, 8, 9, 10, 11), (1, 12, 13, 14, 15)}


class Host:
    """A device of a machine, as far as `parts_of_batch` looks."""

    def __init__(self, process_index):
        self.process_index = process_index


class HostMesh:
    """A mesh of devices that are not there: (data, fsdp, expert, sequence, tensor), so many a machine, in order."""

    def __init__(self, *shape, a_machine):
        self.shape = dict(zip(partition.AXES, shape, strict=True))
        self.devices = np.array([Host(i // a_machine) for i in range(np.prod(shape))]).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "a_machine", "parts"),
    [
        ((8, 1, 1, 1, 1), 4, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ((2, 1, 2, 1, 2), 2, [(0,), (1,), (2,), (3,)]),
        ((2, 1, 1, 4, 1), 2, [(0,), (0,), (1,), (1,)]),  # two machines have half a row each
        ((2, 1, 1, 2, 2), 1, [(0,)] * 4 + [(1,)] * 4),
        ((1, 1, 1, 8, 1), 2, [(0,)] * 4),
        ((4, 1, 1, 3, 1), 4, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_machines_read_the_parts_of_a_batch_that_their_devices_need(shape, a_machine, parts):
    mesh = HostMesh(*shape, a_machine=a_machine)
    assert [partition.parts_of_batch(mesh, process) for process in range(len(parts))] == parts


def test_a_host_with_a_block_of_chips_needs_parts_that_are_no_neighbours():
    chips = slices(4, 4, 1)
    for chip in chips:
        chip.process_index = chip.coords[0] // 2 + 2 * (chip.coords[1] // 2)
    mesh = partition.make_mesh(config_lib.MeshConfig(data=1, fsdp=-1), chips)
    parts = [partition.parts_of_batch(mesh, process) for process in range(4)]
    assert sorted(sum(parts, ())) == list(range(16))
    assert any(part != tuple(range(part[0], part[0] + 4)) for part in parts)


@pytest.mark.parametrize("sizes", [{"data": 4, "sequence": 2}, {"data": 2, "expert": 2, "tensor": 2}])
def test_rows_lie_where_they_do_in_the_whole_batch_whatever_parts_they_come_in(sizes):
    mesh, whole = mesh_of(**sizes), np.arange(32).reshape(8, 4)
    for parts in ((0, 1, 2, 3), (2, 0, 3, 1)):
        rows = np.concatenate([whole[2 * part : 2 * part + 2] for part in parts])
        placed = partition.place_batch(mesh, parts, {"x": rows})["x"]
        np.testing.assert_array_equal(placed, whole)
        assert placed.sharding == partition.batch_sharding(mesh)


# --- parameters ----------------------------------------------------------------------------------------------------


def make_model(num_experts=4, prefix=("attention", "mlp", "mamba2")):
    config = config_lib.ModelConfig(vocab_size=12, d_model=8, period=("mamba", "moe"), num_periods=2, prefix=prefix)
    config.norm, config.tie_embeddings = "layernorm", False
    config.attention.num_heads, config.mamba.d_state, config.mamba.chunk_size = 2, 2, 4
    config.mamba2 = config_lib.Mamba2Config(d_state=2, d_head=4, chunk_size=4)
    config.mlp = config_lib.MlpConfig(d_ff=8, bias=True)
    config.moe = config_lib.MoeConfig(num_experts=num_experts, d_expert=8, top_k=2, capacity_factor=0.75)
    return lm.Lm(config, rngs=nnx.Rngs(params=0))


def test_parameters_are_split_by_their_logical_axes_and_not_over_periods():
    model, mesh = jax.eval_shape(make_model), mesh_of(fsdp=2, expert=2, tensor=2)
    places = partition.tree_shardings({"model": model, "step": jnp.zeros(())}, mesh)
    assert places["step"].spec == PartitionSpec()
    spec = lambda parameter: tuple(jax.tree.leaves(parameter)[0].spec)  # noqa: E731
    attention, mlp, mamba2 = (layer.branches[0] for layer in places["model"].prefix)
    mamba, moe = (layer.branches[0] for layer in places["model"].periods.blocks)
    expected = [
        (places["model"].embedding, "tensor", "fsdp"),
        (places["model"].head, "fsdp", "tensor"),
        (places["model"].norm.scale, None),
        (attention.qkv, None, "fsdp", "tensor", None),
        (attention.out, "tensor", None, "fsdp"),
        (mlp.up, "fsdp", "tensor"),
        (mlp.up_bias, "tensor"),
        (mlp.down, "tensor", "fsdp"),
        (mlp.down_bias, "fsdp"),
        (mamba.in_proj, None, "fsdp", "tensor"),
        (mamba.conv_kernel, None, None, "tensor"),
        (mamba.x_proj, None, "tensor", None),
        (mamba.A_log, None, "tensor", None),
        (mamba.D, None, "tensor"),
        (mamba.out_proj, None, "tensor", "fsdp"),
        (mamba2.in_proj, "fsdp", "tensor"),
        (mamba2.conv_kernel, None, "tensor"),
        (mamba2.A_log, "tensor"),
        (mamba2.dt_bias, "tensor"),
        (mamba2.norm_scale, "tensor"),
        (mamba2.out_proj, "tensor", "fsdp"),
        (moe.router.weight, None, "fsdp", None),
        (moe.up, None, "expert", "fsdp", "tensor"),
        (moe.down, None, "expert", "tensor", "fsdp"),
    ]
    for parameter, *axes in expected:
        assert spec(parameter) == tuple(axes)


@pytest.mark.parametrize(
    ("num_experts", "sizes", "message"),
    [
        (
            6,
            {"expert": 4, "data": 2},
            "mesh.expert=4 does not divide a parameter's expert dim of 6; set mesh.expert to a divisor of 6",
        ),
        (
            4,
            {"tensor": 4, "data": 2},
            "mesh.tensor=4 does not divide a parameter's heads dim of 2; set mesh.tensor to a divisor of 2",
        ),
        (
            4,
            {"tensor": 8},
            "mesh.tensor=8 does not divide a parameter's vocab dim of 12; set mesh.tensor to a divisor of 12",
        ),
    ],
)
def test_a_dim_that_does_not_divide_is_refused(num_experts, sizes, message):
    model = jax.eval_shape(lambda: make_model(num_experts))
    assert error_of(lambda: partition.tree_shardings(model, mesh_of(**sizes))) == message


# --- results -------------------------------------------------------------------------------------------------------

MESHES = [{"data": 8}, {"fsdp": 4, "data": 2}, {"expert": 4, "data": 2}, {"tensor": 2, "data": 4}]
TOKENS = np.random.default_rng(0).integers(0, 12, size=(8, 9)).astype(np.int32)
SEGMENTS = np.random.default_rng(1).integers(1, 3, size=(8, 8)).cumsum(axis=1).astype(np.int32) // 3 + 1


def loss_and_gradient(model, tokens, segments):
    """(cross-entropy + balance loss, statistics), gradient."""

    def loss(model):
        logits, aux = model(tokens[:, :-1], segment_ids_BL=segments, train=True)
        target = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - target
        return nats.mean() + 0.1 * aux.losses["balance"].mean(), aux

    return jax.value_and_grad(loss, has_aux=True)(model)


@pytest.fixture(scope="module")
def one_device(fill):
    model = fill(lambda: make_model(prefix=()))
    return model, jax.jit(loss_and_gradient)(model, TOKENS, SEGMENTS)


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: " ".join(f"{axis}={size}" for axis, size in sizes.items()))
def test_loss_drops_and_gradients_are_those_of_one_device(sizes, one_device):
    """With MoE layers that drop. 1e-5 in the loss and 1e-4 in gradients: sums in another order in float32."""
    model, ((loss, aux), gradient) = one_device
    mesh = mesh_of(**sizes)
    placed = jax.device_put(model, partition.tree_shardings(model, mesh))
    batch = jax.device_put((TOKENS, SEGMENTS), partition.batch_sharding(mesh))
    rows = len(TOKENS) // partition.num_batch_shards(mesh)
    assert {shard.data.shape[0] for shard in batch[0].addressable_shards} == {rows}
    up = placed.periods.blocks[1].branches[0].up[...]
    experts_here, rows_here, columns_here = up.addressable_shards[0].data.shape[1:]
    shares = [4 // experts_here, 8 // rows_here, 8 // columns_here]
    assert shares == [mesh.shape[axis] for axis in ("expert", "fsdp", "tensor")]
    program = jax.jit(partition.on_mesh(mesh, loss_and_gradient))
    assert "shard_map" in str(program.trace(placed, *batch).jaxpr)
    (sharded_loss, sharded_aux), sharded_gradient = program(placed, *batch)
    assert aux.dropped.sum() > 0
    np.testing.assert_array_equal(sharded_aux.dropped, aux.dropped)
    np.testing.assert_array_equal(sharded_aux.count_E, aux.count_E)
    assert float(sharded_loss) == pytest.approx(float(loss), rel=1e-5)
    for actual, expected in zip(jax.tree.leaves(sharded_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4 * max(1e-3, np.abs(expected).max()))


def test_errors_are_one_line_with_a_remedy():
    message = error_of(lambda: mesh_of(data=3))
    assert re.fullmatch(r"[^\n]+; set [^\n]+", message)
