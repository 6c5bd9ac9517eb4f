"""The least time that a step can take on a chip, by its published rates: the largest of four that may all overlap.

compute  matrix products over the peak of the matrix units, all as if in bfloat16. Vector units, which do norms, Mamba's
         scan and all else, have no published rate and are left out: the real time is longer.
hbm      bytes of `cost.traffic` over the bandwidth of the memory.
ici      what collectives send inside slices, one after another, over the links that they can use (`ici_seconds`).
dcn      what they send between slices, over a chip's share of its host's network.
"""

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from moejax.analysis import collectives as collectives_lib
from moejax.analysis import cost as cost_lib
from moejax.analysis import topology as topology_lib


class Seconds(NamedTuple):
    """Of a step, on every device at the same time."""

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def step(self) -> float:
        """The least time of a step."""
        return max(self)

    @property
    def bound(self) -> str:
        """What takes it: compute, hbm, ici or dcn."""
        return self._fields[self.index(self.step)]


def seconds(
    cost: cost_lib.Cost,
    found: list[collectives_lib.Collective],
    mesh: Mesh,
    topology: topology_lib.Topology,
) -> Seconds:
    """The four times of a step with this cost and these collectives on a device."""
    chip = topology.chip
    coordinates = np.array([device.coords for device in mesh.devices.flat])
    ici = dcn = 0.0
    for one in found:
        if one.network(mesh) == "dcn":
            dcn += one.count * one.sent_bytes * chip.devices / chip.dcn_bandwidth
        else:
            ici += one.count * ici_seconds(one, coordinates, topology)
    compute = cost.matmul_flops * chip.devices / chip.peak_flops
    return Seconds(compute, cost.memory_bytes * chip.devices / chip.hbm_bandwidth, ici, dcn)


def ici_seconds(one: collectives_lib.Collective, coordinates: np.ndarray, topology: topology_lib.Topology) -> float:
    """The time of one run of a collective on the links of a slice, by the bytes that the busiest link carries.

    Along a dim that closes to a ring a chip has two links, along an open one those at its ends have one. Groups that
    lie between one another share links. A device's bytes go over the links of all dims that its group spans; those of
    an all-to-all travel a quarter of a ring on average, or half a line through its middle, and those of a permutation
    as far as it says. What the two devices of a TPU7x chip send one another costs nothing here.

    Args:
      coordinates: (device, dim) of the chips, in the mesh's flat order.
    """
    chip, shape = topology.chip, (*topology.shape, 1)[: coordinates.shape[1]]
    rings = [chip.is_ring(size, topology.shape) for size in shape]
    if one.kind == "collective-permute":
        hops = np.abs(coordinates[one.groups[:, 0]] - coordinates[one.groups[:, 1]])
        hops = np.where(rings, np.minimum(hops, np.array(shape) - hops), hops)
        return chip.devices * one.operand_bytes * float(hops.max()) / chip.link_bandwidth
    places = coordinates[one.groups[0]]
    bandwidth, share = 0.0, 0.0  # share: of a device's all-to-all operand, what the busiest link carries
    for dim, size in enumerate(shape):
        along = np.unique(places[:, dim])
        if len(along) == 1:
            continue
        stride = int(np.diff(along).min())  # so many groups share a link
        closed = rings[dim] and len(along) * stride == size
        bandwidth += (2 if closed else 1) * chip.link_bandwidth / stride
        share = max(share, len(along) * stride / (8 if closed else 4))
    if bandwidth == 0:
        return 0.0
    if one.kind in ("all-to-all", "ragged-all-to-all"):
        size = min(one.operand_bytes, one.result_bytes)
        return chip.devices * size * share / chip.link_bandwidth
    return chip.devices * one.sent_bytes / bandwidth
