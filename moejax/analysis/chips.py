"""The chips that a step is planned for: their published rates, one table, with sources.

Rates are of one chip. A chip of TPU7x is two devices to jax, which share its links; those of the others are one.

Sources, all of them peak values:
  v4     docs.cloud.google.com/tpu/docs/v4 for compute and HBM; six links of 50 GB/s a direction, Jouppi et al. 2023
         (arXiv 2304.01433). Google gives no figure for its data center network: that of v5p is taken.
  v5e    docs.cloud.google.com/tpu/docs/v5e: 400 GB/s in both directions of four links; 6.4 Tb/s for the 256 chips of a
         pod, two cards of 100 Gb/s for a host of 8.
  v5p, v6e, TPU7x
         docs.cloud.google.com/tpu/docs/tpu7x, its table of the three: 1200, 800 and 1200 GB/s in both directions of
         six, four and six links; 50, 100 and 100 Gb/s a chip between hosts.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """peak_flops: bfloat16 products and sums a second, of the matrix units. hbm_bytes, hbm_bandwidth: memory, bytes a
    second. link_bandwidth: bytes a second of one link in one direction. dcn_bandwidth: bytes a second to other slices,
    in one direction. num_dims: of the grid in which the links lie, two a dim. devices: to jax. max_chips: of a slice.
    options: with which libtpu describes it.
    """

    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    num_dims: int
    max_chips: int
    devices: int = 1
    options: tuple[tuple[str, str], ...] = ()

    def is_ring(self, size: int, shape: tuple[int, ...]) -> bool:
        """Whether the links along a dim of this size close to a ring in a slice of this shape.

        Two dims: where it is as long as the pod, 16. Three: in slices of whole cubes of 4 x 4 x 4.
        """
        if self.num_dims == 2:
            return size == 16
        return all(length % 4 == 0 for length in shape)


CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1200e9, 50e9, 50e9 / 8, 3, 4096, options=(("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 50e9, 25e9 / 8, 2, 256),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 100e9, 50e9 / 8, 3, 6144),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 100e9, 100e9 / 8, 2, 256),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 100e9, 100e9 / 8, 3, 9216, devices=2),
}

# Slices that Google offers of chips in two dims; of those in three, the ones smaller than a cube
SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SHAPES_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
