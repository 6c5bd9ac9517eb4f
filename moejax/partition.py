"""The device mesh, and the one table from logical axes to mesh axes.

Layers name the logical axes of their parameters (`nnx.Param(value, axes=("embed", "ffn"))`), and ops the dims of their
arrays ("BLI"); only this file knows the mesh axes behind those names.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax import config as config_lib

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # the rows of a batch are split over these

# Logical axis of a parameter -> mesh axis. An axis that is not here is not split.
RULES = {"vocab": "tensor", "embed": "fsdp", "ffn": "tensor", "inner": "tensor", "heads": "tensor", "expert": "expert"}

# Dim of an activation, by its letter -> mesh axes. A dim that is not here is not split.
DIMS = {"B": BATCH_AXES, "L": "sequence", "I": "tensor", "H": "tensor"}


def make_mesh(config: config_lib.MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh over the devices (None: all); an axis of -1 takes the devices that the others leave.

    On TPUs the axes are laid along the links between chips, and `data` crosses the network between slices.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, do not divide over the slices, or are no products
        of the chips along the axes of a slice.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    devices = devices or jax.devices()
    num_devices = len(devices)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1 and num_devices % fixed == 0:
            sizes[axis] = num_devices // fixed
    if math.prod(sizes.values()) != num_devices:
        shape = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in AXES)
        raise config_lib.ConfigError(
            f"{shape} does not multiply to the {num_devices} device{'s' * (num_devices != 1)} here; "
            f"set one axis to -1 for the rest and the others to divisors of {num_devices}"
        )
    return Mesh(_lay(sizes, devices, config.split_physical_axes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _lay(sizes: dict[str, int], devices: list[Any], split: bool) -> np.ndarray:
    """The devices in an array of these sizes, neighbours along the last axes near to one another."""
    num_slices = count_slices(devices)
    if sizes["data"] % num_slices:
        raise config_lib.ConfigError(
            f"mesh.data={sizes['data']} does not divide over {num_slices} slices, and data is what crosses the network "
            f"between them; set mesh.data to a multiple of {num_slices}"
        )
    within = sizes | {"data": sizes["data"] // num_slices}
    shape, how = tuple(within.values()), {"allow_split_physical_axes": split}
    try:
        if num_slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, **how)
        return mesh_utils.create_hybrid_device_mesh(shape, (num_slices, 1, 1, 1, 1), devices, **how)
    except NotImplementedError:
        bounds = np.max([(*device.coords, device.core_on_chip) for device in devices], axis=0) + 1
        grid = [int(size) for size in bounds if size > 1]
        fitting = sorted({math.prod(some) for n in range(len(grid) + 1) for some in itertools.combinations(grid, n)})
        wanted = ", ".join(f"mesh.{axis}={size}" for axis, size in within.items() if size > 1)
        raise config_lib.ConfigError(
            f"{wanted} in a slice of {' x '.join(map(str, grid))} devices: each axis must take whole axes of them, "
            f"{', '.join(map(str, fitting[:-1]))} or {fitting[-1]}; change the sizes, or set "
            "mesh.split_physical_axes=True, which lays an axis over part of one"
        ) from None


def count_slices(devices: list[Any]) -> int:
    """TPU slices, between which there is only the data-centre network; 1 on other platforms."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", None) or 0 for device in devices})


def count_hosts(devices: list[Any]) -> int:
    """Hosts, whose numbers begin anew in every TPU slice that is only described."""
    return len({(device.process_index, getattr(device, "slice_index", None)) for device in devices})


def describe(mesh: Mesh) -> str:
    """One line: the axes with several devices, and what each of them splits."""
    devices = list(mesh.devices.flat)
    splits = {axis: [name for name, rule in RULES.items() if rule == axis] for axis in AXES}
    parts = []
    for axis, size in mesh.shape.items():
        if size > 1:
            what = ["rows"] * (axis in BATCH_AXES) + ["positions"] * (axis == DIMS["L"])
            parts.append(f"{axis}={size} ({', '.join(what + splits[axis])})")
    hosts, slices = count_hosts(devices), count_slices(devices)
    where = f"{len(devices)} device{'s' * (len(devices) > 1)} ({devices[0].platform})"
    where += f" of {hosts} hosts" * (hosts > 1) + f" in {slices} slices, over which data is split" * (slices > 1)
    return f"mesh: {' x '.join(parts)} on {where}" if parts else f"mesh: {where}"


def num_batch_shards(mesh: Mesh) -> int:
    """Parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(config: config_lib.Config, mesh: Mesh) -> None:
    """Raises ConfigError unless every device gets as many rows and positions as every other, and rows whole groups."""
    shards, microbatches = num_batch_shards(mesh), config.training.num_microbatches
    batch, moe = config.data.batch_size, config.model.moe
    if batch % (shards * microbatches) != 0:
        shape = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in BATCH_AXES if mesh.shape[axis] > 1)
        raise config_lib.ConfigError(
            f"data.batch_size={batch} does not divide over {shape or 'one device'} and "
            f"training.num_microbatches={microbatches}; set it to a multiple of {shards * microbatches}"
        )
    parts, length = mesh.shape["sequence"], config.data.seq_length
    if parts > 1 and config.model.has_encoder:
        raise config_lib.ConfigError(
            f"mesh.sequence={parts} is for models without an encoder, whose rows have one length; set it to 1"
        )
    if length % parts != 0:
        raise config_lib.ConfigError(
            f"mesh.sequence={parts} does not divide data.seq_length={length}; set mesh.sequence to a divisor of "
            f"{length}, or data.seq_length to {length + -length % parts}"
        )
    tokens = batch // (shards * microbatches) * length
    if config.model.has_experts and moe.group_size and tokens % moe.group_size != 0:
        raise config_lib.ConfigError(
            f"model.moe.group_size={moe.group_size} does not divide the {tokens} tokens of a microbatch on a device, "
            "and a group never spans devices that rows are split over; set it to 0 or to a divisor"
        )
    mamba2, tensor = config.model.mamba2, mesh.shape["tensor"]
    heads = int(mamba2.expand * config.model.d_model) // mamba2.d_head
    if config.model.uses("mamba2") and parts > 1 and heads % tensor == 0:
        here, together = heads // tensor, heads // mamba2.num_groups
        if here % together and together % here:
            raise config_lib.ConfigError(
                f"mesh.tensor={tensor} leaves {here} heads of mamba2 a device, which cuts groups of {together} heads "
                f"where mesh.sequence={parts} splits rows; set mesh.tensor to a divisor of "
                f"model.mamba2.num_groups={mamba2.num_groups}"
            )


def check_platform(config: config_lib.Config, mesh: Mesh) -> None:
    """Raises ConfigError if the config names an implementation for another platform than the mesh's."""
    here = mesh.devices.flat[0].platform
    if (
        config.model.has_experts
        and config.model.moe.exchange == "ragged"
        and here == "cpu"
        and mesh.shape["expert"] > 1
    ):
        raise config_lib.ConfigError(
            "model.moe.exchange=ragged needs a TPU or GPU, and this is cpu; set it to gather or auto"
        )
    name = config.model.mamba.scan
    needed = config_lib.SCANS[name]
    uses = config.model.uses("mamba") or config.model.uses("mamba_moe")
    if uses and needed not in ("", here):
        *others, last = (scan for scan, platform in config_lib.SCANS.items() if platform in ("", here))
        raise config_lib.ConfigError(
            f"model.mamba.scan={name} needs a {needed.upper()}, and this is {here}; "
            f"set it to {', '.join(others)} or {last}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, L]: rows over the batch axes, positions over `sequence`."""
    return NamedSharding(mesh, _spec("BL"))


def _spec(dims: str) -> PartitionSpec:
    """Of an array by the letters of its dims, of a parameter by its logical axes, commas between; "." splits none."""
    if "," in dims:
        return PartitionSpec(*map(RULES.get, dims.split(",")))
    return PartitionSpec() if dims == "." else PartitionSpec(*map(DIMS.get, dims))


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced so that the ops in it know the mesh and its platform, which need not be here.

    See `num_parts` and `on_shards`.
    """

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def num_parts(axis: str) -> int:
    """Devices along an axis of the mesh that the code at hand is traced on; 1 where there is none."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def constrain(x: Array, dims: str) -> Array:
    """The array, laid out by its dims ("BLD", see `DIMS`) on the mesh that the code at hand is traced on, if any.

    Without it XLA lays activations out as it sees fit, for one like the parameters that they come from, and whole
    batches travel between devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(dims))


def platform() -> str:
    """Of the mesh that the code at hand is traced on, which need not be here; without one, the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_shards(function: Callable[..., Any], inputs: str, outputs: str) -> Callable[..., Any]:
    """`function` run by every device of the mesh on its own parts, with collectives of its own: a `jax.shard_map`.

    On one device, on no mesh, and inside another such function, it is the function itself.

    Args:
      function: of arrays; it sees those parts of them that `DIMS` gives to a device.
      inputs: the first dims of each argument, as "BLI IN", or the logical axes of a parameter, as "expert,embed,ffn";
        "." for all of it. An argument may be a tree of arrays with these dims, or None.
      outputs: those of each result. A result whose dims leave out an axis must be the same along it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or mesh.empty or AxisType.Manual in mesh.axis_types:
        return function
    in_specs, out_specs = tuple(map(_spec, inputs.split())), tuple(map(_spec, outputs.split()))
    # With check_vma every zero that starts a loop inside would have to be declared as different on every device.
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs[0] if len(out_specs) == 1 else out_specs, check_vma=False
    )


def index(axis: str) -> Array | int:
    """Of the device along an axis; this and the next are for functions that run `on_shards`."""
    return jax.lax.axis_index(axis) if num_parts(axis) > 1 else 0


def gathered(x: Array, axis: str, dim: int) -> Array:
    """The parts of all devices along the axis one after another. Its transpose is `scattered`."""
    return x if num_parts(axis) == 1 else jax.lax.all_gather(x, axis, axis=dim, tiled=True)


def scattered(x: Array, axis: str, dim: int) -> Array:
    """This device's part of the sum over the devices along the axis."""
    return x if num_parts(axis) == 1 else jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


def summed(x: Any, *axes: str) -> Any:
    """The sum over the devices along the axes."""
    axes = tuple(axis for axis in axes if num_parts(axis) > 1)
    return jax.lax.psum(x, axes) if axes else x


def part(x: Array, axis: str, dim: int) -> Array:
    """This device's part of an array that all devices along the axis have whole."""
    size = x.shape[dim] // num_parts(axis)
    return x if size == x.shape[dim] else jax.lax.dynamic_slice_in_dim(x, index(axis) * size, size, dim)


def parts_of_batch(mesh: Mesh, process: int) -> tuple[int, ...]:
    """Which of the `num_batch_shards` equal parts of a batch's rows the devices of a process need.

    They need not be neighbours: a host of a TPU pod has a block of chips. Processes between which rows are split, over
    `sequence`, or copied, over `tensor`, need the same.
    """
    owners = np.array([device.process_index for device in mesh.devices.flat]).reshape(num_batch_shards(mesh), -1)
    return tuple(np.flatnonzero((owners == process).any(axis=1)).tolist())


def place_batch(mesh: Mesh, parts: Sequence[int], rows: Any) -> Any:
    """The batch on the mesh, of which this process has these parts, one after another: a tree of arrays [B, L]."""
    places = batch_sharding(mesh)

    def place(rows_BL: np.ndarray) -> Array:
        size = len(rows_BL) // len(parts)

        def of_device(index: Any) -> np.ndarray:
            first = parts.index((index[0].start or 0) // size) * size
            return rows_BL[first : first + size, index[1]]

        return jax.make_array_from_callback((size * num_batch_shards(mesh), rows_BL.shape[1]), places, of_device)

    return jax.tree.map(place, rows)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_sharding(variable: nnx.Variable, mesh: Mesh) -> NamedSharding:
    """The sharding of a parameter from its logical axes; dims in front of those (stacked periods) are not split.

    Raises:
      ConfigError: a dim that does not divide over its mesh axis.
    """
    axes = variable.get_metadata()["axes"]
    shape = variable.shape
    spec: list[str | None] = [None] * (len(shape) - len(axes))
    for logical, size in zip(axes, shape[len(spec) :], strict=True):
        axis = RULES.get(logical)
        if axis is not None and size % mesh.shape[axis] != 0:
            raise config_lib.ConfigError(
                f"mesh.{axis}={mesh.shape[axis]} does not divide a parameter's {logical} dim of {size}; "
                f"set mesh.{axis} to a divisor of {size}"
            )
        spec.append(axis)
    return NamedSharding(mesh, PartitionSpec(*spec))


def is_variable(node: Any) -> bool:
    """Whether it is a parameter, or what a router keeps beside them; is_leaf of trees whose leaves have metadata."""
    return isinstance(node, nnx.Variable)


def tree_shardings(tree, mesh: Mesh):
    """Shardings for a pytree that holds modules: parameters by their logical axes, all other leaves replicated."""

    def of(node):
        if isinstance(node, nnx.Variable):
            return jax.tree.map(lambda _: param_sharding(node, mesh), node)
        return replicated(mesh)

    return jax.tree.map(of, tree, is_leaf=is_variable)
