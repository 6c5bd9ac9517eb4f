"""The ways to run one batch that must give the same numbers: meshes, microbatch counts, dispatchers."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

from moejax import config as config_lib
from moejax import partition

# Names of dispatchers, and their settings of model.moe. All but the first drop nothing. exchange=ragged has no form for
# CPUs, so that it can't be among them.
CONFIGURED, PLAIN = "configured", "capacity, no drops"
_PLAIN: dict[str, Any] = {
    "capacity_factor": 0.0,
    "dispatch": "capacity",
    "grouped_matmul": "auto",
    "exchange": "auto",
    "num_chunks": 1,
}
DISPATCHERS: dict[str, dict[str, Any]] = {CONFIGURED: {}, PLAIN: _PLAIN} | {
    f"dropless {name}": _PLAIN | {"dispatch": "dropless", "grouped_matmul": name, "exchange": "gather"}
    for name in config_lib.GROUPED_MATMULS
    if name != "auto"
}
PINS = ("dispatch", "grouped_matmul")  # of model.moe: one that the user sets leaves out dispatchers with another

RULE = (
    "as configured: one device, each mesh axis alone at every divisor of {0}, and {0} devices over several axes, a "
    "prime factor each, until every two axes have met; one device and each axis alone at {0} with every microbatch "
    "count, too; with every other dispatcher: one device and all those meshes of {0} devices"
)


@dataclasses.dataclass(frozen=True)
class Combination:
    """One way to run the batch; by default that of a reference."""

    mesh: config_lib.MeshConfig = dataclasses.field(default_factory=lambda: config_lib.MeshConfig(data=1))
    num_microbatches: int = 1
    dispatcher: str = CONFIGURED

    @property
    def sizes(self) -> dict[str, int]:
        """Of every axis of the mesh."""
        return {axis: getattr(self.mesh, axis) for axis in partition.AXES}

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def mesh_name(self) -> str:
        """As "expert=4 x tensor=2"."""
        axes = [f"{axis}={size}" for axis, size in self.sizes.items() if size > 1]
        return " x ".join(axes) or "one device"

    def __str__(self) -> str:
        parts = f"{self.num_microbatches} microbatch{'es' * (self.num_microbatches != 1)}"
        return f"{self.mesh_name}, {parts}, {self.dispatcher}"

    def apply(self, config: config_lib.Config) -> config_lib.Config:
        """A copy of the config that runs this way."""
        config = copy.deepcopy(config)
        config.mesh, config.training.num_microbatches = dataclasses.replace(self.mesh), self.num_microbatches
        for name, value in DISPATCHERS[self.dispatcher].items():
            setattr(config.model.moe, name, value)
        return config


def meshes(num_devices: int, axes: Sequence[str] = partition.AXES) -> list[dict[str, int]]:
    """Sizes of axes, but for those of 1: one device; each axis alone at every divisor; all devices over several axes.

    Those several get a prime factor each: 8 devices are 2 x 2 x 2, and four such meshes make any two of five axes meet.
    """
    divisors = [size for size in range(2, num_devices + 1) if num_devices % size == 0]
    sizes: list[dict[str, int]] = [{}, *({str(axis): size} for axis in axes for size in divisors)]
    factors = _prime_factors(num_devices)
    spread = [math.prod(factors[place :: len(axes)]) for place in range(min(len(factors), len(axes)))]
    choices, met = list(itertools.combinations(axes, len(spread))), set[tuple[str, ...]]()

    def new(chosen: tuple[str, ...]) -> set[tuple[str, ...]]:
        return set(itertools.combinations(chosen, 2)) - met

    while choices and new(best := max(choices, key=lambda chosen: len(new(chosen)))):
        met |= new(best)
        sizes.append(dict(zip(best, spread, strict=True)))
    return sizes


def _prime_factors(number: int) -> list[int]:
    """Largest first."""
    for factor in range(2, number + 1):
        if number % factor == 0:
            return sorted([factor, *_prime_factors(number // factor)], reverse=True)
    return []


def cover(config: config_lib.Config, named: Collection[str], num_devices: int) -> list[Combination]:
    """What to run on up to num_devices, by `RULE`.

    named: fields that the user set, by dotted path. Mesh sizes, training.num_microbatches and those of PINS that are
    named are the only ones; the rule is for the devices and axes that are left.

    Raises:
      ConfigError: mesh sizes that are named do not divide num_devices.
    """
    pinned = {axis: getattr(config.mesh, axis) for axis in partition.AXES if f"mesh.{axis}" in named}
    pinned = {axis: size for axis, size in pinned.items() if size != -1}
    here, free = math.prod(pinned.values()), [axis for axis in partition.AXES if axis not in pinned]
    if num_devices % here != 0:
        shape = " x ".join(f"mesh.{axis}={size}" for axis, size in pinned.items())
        raise config_lib.ConfigError(f"{shape} does not divide --devices={num_devices}; change one of them")
    every = meshes(num_devices // here, free)
    full = [sizes for sizes in every if math.prod(sizes.values()) in (1, num_devices // here)]
    first, *more = sorted({1, 2, config.training.num_microbatches})
    if "training.num_microbatches" in named:
        first, more = config.training.num_microbatches, []
    last = more[-1] if more else first

    def combination(sizes: dict[str, int], count: int, dispatcher: str = CONFIGURED) -> Combination:
        axes: dict[str, Any] = {"data": 1} | pinned | sizes
        return Combination(config_lib.MeshConfig(**axes), count, dispatcher)

    found = [combination(sizes, first) for sizes in every]
    found += [combination(sizes, count) for count in more for sizes in full if len(sizes) <= 1]
    if not config.model.has_experts:
        return found
    for dispatcher, settings in DISPATCHERS.items():
        fixed = [name for name in PINS if f"model.moe.{name}" in named]
        if dispatcher != CONFIGURED and all(settings[name] == getattr(config.model.moe, name) for name in fixed):
            found += [combination(sizes, last if len(sizes) <= 1 else first, dispatcher) for sizes in full]
    return found
