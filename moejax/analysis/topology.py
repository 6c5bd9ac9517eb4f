"""TPU slices that are not here, as jax devices to compile for. libtpu, the compiler, describes them; nothing runs."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from moejax import config as config_lib
from moejax.analysis import chips

# libtpu would ask a cloud machine what it is, and refuses to be loaded twice, though it drives no chip here
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
EXAMPLE = "v5p:4x4x4"


class Topology(NamedTuple):
    """A number of equal slices. shape: chips of a slice along the dims of its links."""

    name: str
    chip: chips.Chip
    shape: tuple[int, ...]
    num_slices: int

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return self.num_slices * math.prod(self.shape)


def parse(name: str, num_slices: int = 1) -> Topology:
    """The topology of a name such as "v5p:4x4x4".

    Raises:
      ConfigError: a chip or a shape that is not known, or no slice; the message lists what is.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    chip = chips.CHIPS.get(found[1]) if found else None
    if found is None or chip is None:
        kinds = "; ".join(f"{kind}:{_shapes(chip)}" for kind, chip in chips.CHIPS.items())
        raise config_lib.ConfigError(f"--topology={name} is not known; write one of {kinds}, e.g. {EXAMPLE}")
    shape = tuple(map(int, found[2].split("x")))
    small = chips.SHAPES_2D if chip.num_dims == 2 else chips.SHAPES_3D
    cubes = chip.num_dims == len(shape) == 3 and all(size % 4 == 0 and size for size in shape)
    is_cubes = cubes and list(shape) == sorted(shape) and math.prod(shape) <= chip.max_chips
    if shape not in small and not is_cubes:
        raise config_lib.ConfigError(
            f"--topology={name} is no slice of {found[1]}; write {found[1]}: and one of {_shapes(chip)}"
        )
    if num_slices < 1:
        raise config_lib.ConfigError(f"--slices={num_slices} must be 1 or more; change it")
    return Topology(name, chip, shape, num_slices)


def _shapes(chip: chips.Chip) -> str:
    if chip.num_dims == 2:
        return ", ".join("x".join(map(str, shape)) for shape in chips.SHAPES_2D)
    small = ", ".join("x".join(map(str, shape)) for shape in chips.SHAPES_3D)
    return f"{small} or AxBxC (multiples of 4, ascending, up to {chip.max_chips} chips)"


def prepare() -> None:
    """Sets what libtpu reads from the environment; call it before jax is imported.

    Raises:
      ConfigError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise config_lib.ConfigError(
            "libtpu, which holds the TPU compiler, is not installed; run pip install -e '.[tpu]' (no TPU is needed)"
        )
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})


def devices(topology: Topology) -> list[Any]:
    """The devices of all slices, to compile for.

    Raises:
      ConfigError: libtpu does not know it.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = dict(topology.chip.options)
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # else a host has 2 x 2
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    try:
        return list(topologies.get_topology_desc(topology.name, "tpu", **options).devices)
    except Exception as error:  # jaxlib has no class of its own for what libtpu refuses
        reason = " ".join(str(error).split())
        raise config_lib.ConfigError(
            f"--topology={topology.name} is refused by libtpu ({reason}); try another, e.g. {EXAMPLE}"
        ) from None
