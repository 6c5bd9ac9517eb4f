"""A training step compiled for TPUs that are not here, and what it would need and cost there.

The step is the one that `moejax train` runs, on abstract arrays; its figures come from the compiled program.
"""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moejax import config as config_lib
from moejax import partition
from moejax.analysis import chips, cost, flops, params, roofline, topology
from moejax.analysis import collectives as collectives_lib
from moejax.analysis import program as program_lib
from moejax.data import corruption
from moejax.rules import model as model_rules
from moejax.training import state as state_lib

HOURS = 3600


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device's HBM, and whether the step fits into it.

    arguments: the state and the batch. outputs: what a step returns, but for the state, which takes the place of the
    old one. temporaries: everything else that lives during a step. total: of these and the program. hbm: that a device
    has. refusal: what the compiler said where it does not fit; then temporaries, outputs and total are None.
    """

    arguments: int
    temporaries: int | None
    outputs: int | None
    total: int | None
    hbm: int
    fits: bool
    refusal: str = ""


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a step on all devices. compiled: matrix products in the program, loops with their rounds. analytic: the
    same from the config's closed form (`flops`), and their ratio. useful: the model's own, which MFU counts. kernels:
    what Pallas kernels say that they do. hbm_bytes: of one device, what instructions read and write (`cost.traffic`).
    """

    compiled: int
    analytic: float
    ratio: float
    useful: float
    kernels: int
    hbm_bytes: int


@dataclasses.dataclass(frozen=True)
class Bound:
    """The roofline of a step (`roofline`), and the run that it would be. mfu: the ceiling of model FLOPs use."""

    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    dcn_seconds: float
    bound: str
    step_seconds: float
    tokens_per_second: float
    mfu: float
    tokens: int
    days: float
    chip_hours: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config would need and cost on a topology; work, collectives and bound are None where it does not fit.

    layout: of the mesh, in words (`partition.describe`).
    """

    topology: str
    slices: int
    chips: int
    devices: int
    hosts: int
    mesh: dict[str, int]
    layout: str
    batch_size: int
    parameters: dict[str, int]
    memory: Memory
    work: Work | None
    collectives: list[dict[str, Any]] | None
    host_transfers: list[str] | None
    bound: Bound | None
    notes: list[str]
    compile_seconds: float
    largest_batch: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)


def mesh_of(config: config_lib.Config, devices: list[Any]) -> Mesh:
    """The config's mesh over these devices.

    Raises:
      ConfigError: a mesh, a batch, a scan or an objective that can't be on them.
    """
    model_rules.validate_trainable(config)
    mesh = partition.make_mesh(config.mesh, devices)
    partition.check_batch(config, mesh)
    partition.check_platform(config, mesh)
    return mesh


def make(
    config: config_lib.Config,
    where: topology.Topology,
    mesh: Mesh,
    *,
    probes: int = 0,
    say: Callable[[str], None] = print,
) -> Plan:
    """Compiles the step of this config for this mesh of the topology's devices; minutes for a large model.

    Args:
      probes: compilations to search the largest batch with (`largest_batch`); 0 leaves it None.
      say: is told how the search goes.
    """
    start = time.perf_counter()
    state, batch = abstract_arguments(config, mesh)
    try:
        compiled, refusal = compile_step(config, mesh), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, refusal = None, " ".join(str(error).split())
    seconds = time.perf_counter() - start
    plan = Plan(
        topology=where.name,
        slices=where.num_slices,
        chips=where.num_chips,
        devices=mesh.size,
        hosts=partition.count_hosts(list(mesh.devices.flat)),
        mesh=dict(mesh.shape),
        layout=partition.describe(mesh),
        batch_size=config.data.batch_size,
        parameters=_parameters(config, state),
        memory=_memory(compiled, (state, batch), where.chip, refusal),
        work=None,
        collectives=None,
        host_transfers=None,
        bound=None,
        notes=[],
        compile_seconds=seconds,
        largest_batch=largest_batch(config, mesh, probes, compiled is not None, say) if probes else None,
    )
    if compiled is None:
        return plan
    program = program_lib.parse(compiled.as_text() or "")
    found, of_device = collectives_lib.collectives(program, mesh), cost.count(program)
    expected = flops.training_step(config, is_split=mesh.shape["expert"] > 1)
    work = Work(
        compiled=of_device.matmul_flops * mesh.size,
        analytic=expected.executed,
        ratio=of_device.matmul_flops * mesh.size / expected.executed,
        useful=expected.useful,
        kernels=of_device.kernel_flops * mesh.size,
        hbm_bytes=of_device.memory_bytes,
    )
    times = roofline.seconds(of_device, found, mesh, where)
    return dataclasses.replace(
        plan,
        work=work,
        collectives=collectives_lib.summary(found, mesh),
        host_transfers=collectives_lib.host_transfers(program),
        bound=_bound(config, where, times, expected.useful),
        notes=[
            f"{count} loops whose rounds depend on data, counted once: {place}"
            for place, count in collections.Counter(program_lib.unknown_loops(program)).items()
        ],
    )


def abstract_arguments(config: config_lib.Config, mesh: Mesh) -> tuple[state_lib.TrainState, state_lib.Batch]:
    """The state and the batch of the step, as shapes with shardings."""
    shape, place = (config.data.batch_size, config.data.seq_length), partition.batch_sharding(mesh)
    if config.model.has_encoder:
        lengths = {"L": shape[1], "M": corruption.row_lengths(config.data)[1]}
        dtypes: dict[str, Any] = dict.fromkeys(("encoder_inputs_BL", "decoder_inputs_BM", "targets_BM"), jnp.int32)
        dtypes |= {"encoder_mask_BL": jnp.bool_, "loss_mask_BM": jnp.bool_}
    else:
        lengths = {"L": shape[1]}
        dtypes = dict.fromkeys(("inputs_BL", "targets_BL", "segment_ids_BL", "positions_BL"), jnp.int32)
        dtypes["loss_mask_BL"] = jnp.bool_
        if config.model.has_experts and config.model.moe.router == "label":
            dtypes["labels_BL"] = jnp.int32
    batch: Any = {
        name: jax.ShapeDtypeStruct((shape[0], lengths[name[-1]]), dtype, sharding=place)
        for name, dtype in dtypes.items()
    }
    return state_lib.abstract(config, mesh), batch


def compile_step(config: config_lib.Config, mesh: Mesh) -> jax.stages.Compiled:
    """The training step, compiled for the mesh's devices, which need not be here.

    Raises:
      JaxRuntimeError: the compiler found no way to fit it into the devices' memory (RESOURCE_EXHAUSTED).
    """
    step: Any = state_lib.make_train_step(config, mesh)
    platform = mesh.devices.flat[0].platform
    return step.trace(*abstract_arguments(config, mesh)).lower(lowering_platforms=(platform,)).compile()


def largest_batch(
    config: config_lib.Config, mesh: Mesh, probes: int, fits_now: bool, say: Callable[[str], None]
) -> int:
    """The most rows a step that compile for the mesh's memory, by bisection: a compilation a probe.

    Doubles or halves the config's batch until one fits and twice as much does not, then halves the gap, in steps of
    what the mesh, the microbatches and the routing groups allow. If the probes run out first, the largest that did fit.

    Args:
      fits_now: whether the config's own batch does.

    Returns:
      The batch size; 0 where none was found to fit.
    """
    unit = _batch_unit(config, mesh)
    own = config.data.batch_size // unit
    fits, too_large = (own, None) if fits_now else (0, own)
    for _ in range(probes):
        if too_large is not None and too_large <= fits + 1:
            break
        units = 2 * fits if too_large is None else (fits + too_large) // 2
        data = dataclasses.replace(config.data, batch_size=units * unit)
        try:
            compile_step(dataclasses.replace(config, data=data), mesh)
            fits = units
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            too_large = units
        say(f"a batch of {units * unit} rows {'fits' if fits == units else 'does not fit'}")
    return fits * unit


def _batch_unit(config: config_lib.Config, mesh: Mesh) -> int:
    """Rows that a batch must be a multiple of."""
    group = (config.model.moe.group_size if config.model.has_experts else 0) or 1
    rows = math.lcm(group, config.data.seq_length) // config.data.seq_length
    return partition.num_batch_shards(mesh) * config.training.num_microbatches * rows


def _parameters(config: config_lib.Config, state: state_lib.TrainState) -> dict[str, int]:
    counts = params.count(config.model)
    here = 0
    for node in jax.tree.leaves(state.model, is_leaf=partition.is_variable):
        if isinstance(node, nnx.Param):
            here += sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(node))
    names = ("total", "active", "non_embedding_total", "non_embedding_active")
    return {name: counts[name] for name in names} | {"per_device": here}


def _memory(compiled: jax.stages.Compiled | None, arguments: Any, chip: chips.Chip, refusal: str) -> Memory:
    hbm = chip.hbm_bytes // chip.devices
    if compiled is None:
        leaves = jax.tree.leaves(arguments)
        held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        reason = re.sub(r"^.*?RESOURCE_EXHAUSTED: ?", "", refusal)
        return Memory(held, None, None, None, hbm, fits=False, refusal=reason.partition(". ")[0][:200])
    analysis = compiled.memory_analysis()
    assert analysis is not None
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + outputs
    total += analysis.generated_code_size_in_bytes
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        outputs=outputs,
        total=total,
        hbm=hbm,
        fits=True,  # libtpu compiles nothing that does not
    )


def _bound(config: config_lib.Config, where: topology.Topology, times: roofline.Seconds, useful: float) -> Bound:
    a_step = config.data.batch_size * config.data.seq_length
    run_seconds = config.training.num_steps * times.step
    return Bound(
        compute_seconds=times.compute,
        hbm_seconds=times.hbm,
        ici_seconds=times.ici,
        dcn_seconds=times.dcn,
        bound=times.bound,
        step_seconds=times.step,
        tokens_per_second=a_step / times.step,
        mfu=useful / (where.num_chips * where.chip.peak_flops * times.step),
        tokens=config.training.num_steps * a_step,
        days=run_seconds / HOURS / 24,
        chip_hours=run_seconds / HOURS * where.num_chips,
    )
