"""What a compiled program sends between devices, read from its text.

`sent_bytes` is what one device sends over the network in one run of the operation, by the algorithms that need the
fewest bytes. For a group of n devices:

    all-gather           result x (n - 1) / n
    reduce-scatter       operand x (n - 1) / n
    all-reduce           2 x operand x (n - 1) / n     a reduce-scatter and an all-gather
    all-to-all           operand x (n - 1) / n         a device keeps its own part
    ragged-all-to-all    the same of the smaller of operand and result: one has room for the worst case, and what is
                         sent depends on data; this is for equal parts
    collective-permute   operand                       nothing from a device to itself
    collective-broadcast operand

Between slices XLA writes them out: a part inside each slice, and a send and a recv that the hosts carry to the other
slices, with the operation named beside them. Those are collectives, too, of the devices with the same place in each.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np
from jax.sharding import Mesh

from moejax.analysis import program as program_lib

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# What moves data between a device and its host while a step runs
_HOST = ("infeed", "outfeed", "send", "recv")
_HOST_CALLS = ("MoveToHost", "MoveToDevice", "callback", "xla_ffi_python", "xla_python")
_HOST_SPACE = 5  # S(5) in a layout
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="[^"]*"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation of the program that several devices take part in.

    kind: as XLA spells it. count: runs a step. operand_bytes, result_bytes: of one run, on a device. groups: places in
    the mesh's flat order, a row for the devices that exchange data; pairs (from, to) of a collective-permute. result:
    its arrays. op_name: where it comes from.
    """

    kind: str
    count: int
    operand_bytes: int
    result_bytes: int
    groups: np.ndarray
    result: str
    op_name: str

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in one run; see the module's docstring."""
        size = self.groups.shape[1]
        share = (size - 1) / size
        match self.kind:
            case "all-gather":
                return self.result_bytes * share
            case "all-reduce":
                return 2 * self.operand_bytes * share
            case "collective-permute" | "collective-broadcast":
                return self.operand_bytes
            case "ragged-all-to-all":
                return min(self.operand_bytes, self.result_bytes) * share
        return self.operand_bytes * share

    def axes(self, mesh: Mesh) -> tuple[str, ...]:
        """The mesh axes along which the devices of a group lie."""
        place = np.stack(np.unravel_index(self.groups, mesh.devices.shape), axis=-1)  # (group, member, axis)
        varies = (place != place[:, :1]).any(axis=(0, 1))
        return tuple(axis for axis, differs in zip(mesh.axis_names, varies, strict=True) if differs)

    def network(self, mesh: Mesh) -> str:
        """dcn where a group spans slices, else ici."""
        slices = slices_of(mesh)[self.groups]
        return "dcn" if (slices != slices[:, :1]).any() else "ici"


def collectives(program: program_lib.Program, mesh: Mesh) -> list[Collective]:
    """Every collective; those of a device with itself alone are none.

    What XLA splits over several fusions, to run beside them, is one. The wait (`-done`) belongs to its start.

    mesh: on whose devices the program runs.

    Raises:
      ValueError: devices written in a way that this does not read.
    """
    found, parts = [], set()
    for execution in program_lib.executions(program):
        instruction = execution.instruction
        between_slices = _BETWEEN_SLICES.search(instruction.rest) if instruction.opcode == "send" else None
        if between_slices:
            found.append(_between_slices(execution, between_slices[1], mesh))
            continue
        kind = instruction.opcode.removesuffix("-start")
        results = instruction.buffers
        if kind == "all-reduce" and execution.computation.name.startswith("all-reduce-scatter"):
            kind, results = "reduce-scatter", execution.computation.root.buffers  # TPU: with the slices in one fusion
        if kind not in KINDS:
            continue
        groups = _groups(instruction, mesh.size)
        if groups.shape[1] < 2 or not len(groups):
            continue
        chain = re.search(r'chain_id="(\d+)"', instruction.rest)
        if chain:  # TPU: steps of one operation, a fusion each
            part = (execution.region.name, chain[1], instruction.attribute("channel_id"))
            if part in parts:
                continue
            parts.add(part)
        operands = execution.operands()
        if kind == "ragged-all-to-all":  # the rest are offsets, sizes and where to write
            operands = operands[:1]
        if instruction.opcode in ("all-gather-start", "collective-permute-start"):  # (operands, results, ...)
            results = results[len(operands) : 2 * len(operands)]
        found.append(
            Collective(
                kind=kind,
                count=execution.times,
                operand_bytes=sum(buffer.num_bytes for buffer in operands),
                result_bytes=sum(buffer.num_bytes for buffer in results),
                groups=groups,
                result=", ".join(map(str, results)),
                op_name=instruction.op_name,
            )
        )
    return found


def _between_slices(execution: program_lib.Execution, operation: str, mesh: Mesh) -> Collective:
    """The collective that a send begins; its recv is the one of the same rendezvous."""
    instruction = execution.instruction
    rendezvous = _RENDEZVOUS.search(instruction.rest)
    assert rendezvous is not None, instruction.rest[:200]
    recv = next(
        other
        for other in execution.computation.instructions.values()
        if other.opcode == "recv" and rendezvous[0] in other.rest
    )
    slices = slices_of(mesh)
    groups = np.stack([np.flatnonzero(slices == place) for place in np.unique(slices)], axis=1)
    return Collective(
        kind=operation.lower().replace("_", "-"),
        count=execution.times,
        operand_bytes=instruction.buffers[0].num_bytes,
        result_bytes=recv.buffers[0].num_bytes,
        groups=groups,
        result=str(recv.buffers[0]),
        op_name=instruction.op_name,
    )


def slices_of(mesh: Mesh) -> np.ndarray:
    """Of each device, in the mesh's flat order, the slice in which it lies."""
    return np.array([getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat])


def host_transfers(program: program_lib.Program) -> list[str]:
    """Instructions that move data to or from the host: infeed, outfeed, send, recv, callbacks, arrays kept there.

    Collectives between slices are none (see above), though hosts carry them.
    """
    found = []
    for execution in program_lib.executions(program):
        instruction = execution.instruction
        target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
        calls_host = target is not None and any(name.lower() in target[1].lower() for name in _HOST_CALLS)
        on_host = any(buffer.space == _HOST_SPACE for buffer in instruction.buffers)
        is_host = instruction.opcode in _HOST and "xla_megascale_runtime" not in instruction.rest
        if is_host or calls_host or on_host:
            found.append(f"{instruction.opcode} {instruction.name}")
    return found


# --- who exchanges with whom ---------------------------------------------------------------------------------------


def _groups(instruction: program_lib.Instruction, num_devices: int) -> np.ndarray:
    """(groups, members), of devices by their place."""
    if instruction.opcode.startswith("collective-permute"):
        text = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.rest)
        if text is None:
            raise ValueError(f"the pairs of {instruction.name} can't be read: {instruction.rest[:200]}")
        pairs = np.array([[int(x) for x in pair] for pair in re.findall(r"\{(\d+),(\d+)\}", text[1])]).reshape(-1, 2)
        return pairs[pairs[:, 0] != pairs[:, 1]]
    text = instruction.rest.partition("replica_groups=")[2]
    if listed := re.match(r"\{((?:\{[\d,]*\},?)*)\}", text):
        rows = [[int(x) for x in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", listed[1])]
        return np.array(rows) if rows else np.arange(num_devices)[None]
    if iota := re.match(r"(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[1])
    if text.startswith("mesh["):
        return _named_groups(text, instruction.name)
    raise ValueError(f"the devices of {instruction.name} can't be read: {text[:200]}")


def _iota(text: str) -> np.ndarray:
    """Of `[2,4]<=[4,2]T(1,0)`: 0, 1, ... in the shape behind the arrow, transposed, in the shape before it."""
    found = re.match(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found is not None, text
    shape, source, order = (tuple(map(int, part.split(","))) if part else None for part in found.groups())
    assert source is not None
    devices = np.arange(math.prod(source)).reshape(source)
    if order:
        devices = devices.transpose(order)
    return devices.reshape(shape) if shape else devices


def _named_groups(text: str, name: str) -> np.ndarray:
    """Of `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`: the devices that differ along these axes alone.

    An axis may be cut: `'a':(2)4` are the 4 places of it that lie 2 parts in.
    """
    found = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?|[\d,]+)\))?,? *\{([^}]*)\}", text)
    if found is None:
        raise ValueError(f"the devices of {name} can't be read: {text[:200]}")
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    total = math.prod(sizes.values())
    if found[2] is None:
        devices = np.arange(total)
    else:
        devices = _iota(found[2]) if found[2].startswith("[") else np.array(found[2].split(","), int)
    cuts: dict[str, list[tuple[int, int]]] = {axis: [] for axis in sizes}
    for axis, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3]):
        cuts[axis].append((int(before or 1), int(size or sizes[axis])))
    shape: list[int] = []
    inside: list[int] = []
    for axis, size in sizes.items():
        done = 1
        for before, part in sorted(cuts[axis]):
            shape.append(before // done)
            inside.append(len(shape))
            shape.append(part)
            done = before * part
        shape.append(size // done)
    devices = devices.reshape(shape)
    outside = [dim for dim in range(len(shape)) if dim not in inside]
    return devices.transpose(*outside, *inside).reshape(-1, math.prod(shape[dim] for dim in inside))


# --- summed ----------------------------------------------------------------------------------------------------------


def summary(found: list[Collective], mesh: Mesh) -> list[dict[str, Any]]:
    """One entry for each kind, mesh axis and network, the largest first.

    Returns:
      kind: as XLA spells it. count: runs a step. bytes: what a device sends over the network a step, in all runs. axis:
      of the mesh; several, joined by "+", where a group spans them. network: ici, dcn. largest: the arrays of the one
      that sends most, largest_at: where it comes from.
    """
    entries: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in sorted(found, key=lambda one: -one.count * one.sent_bytes):
        key = (one.kind, "+".join(one.axes(mesh)), one.network(mesh))
        entry = entries.setdefault(
            key,
            dict(zip(("kind", "axis", "network"), key, strict=True))
            | {"count": 0, "bytes": 0, "largest": one.result, "largest_at": one.op_name},
        )
        entry["count"] += one.count
        entry["bytes"] += round(one.count * one.sent_bytes)
    return sorted(entries.values(), key=lambda entry: -entry["bytes"])
