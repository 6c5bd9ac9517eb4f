"""A plan says what the compiled training step is; the command prints it, and refuses what can't be planned."""

import importlib.util
import json
import math
import re

import jax
import numpy as np
import pytest
import tiny

from moejax import cli, partition, rules
from moejax import config as config_lib
from moejax.analysis import flops, plan, plan_table, roofline, topology

CONFIG = f"--config={tiny.__file__}:somewhere"
OVERRIDES = (
    "--config.model.period=('attention','moe')", "--config.model.attention.num_heads=2", "--config.model.remat=period",
    "--config.mesh.fsdp=2", "--config.mesh.expert=4", "--config.training.num_steps=7", "--config.model.moe.top_k=2",
    "--config.model.moe.activation=swiglu", "--config.model.moe.d_expert=24", "--config.model.moe.num_experts=4",
)  # fmt: skip
TIMES = roofline.Seconds(compute=0.001, hbm=0.002, ici=0.004, dcn=0.0)


def config_of(**fields):
    """The tiny config with these fields, by their path with __ for the dots."""
    c = tiny.get_config("somewhere")
    c.mesh = config_lib.MeshConfig()
    for path, value in fields.items():
        *nodes, name = path.split("__")
        node = c
        for part in nodes:
            node = getattr(node, part)
        setattr(node, name, value)
    rules.validate(c)
    return c


@pytest.fixture
def cpu_for_tpu(monkeypatch):
    """The eight devices of this process in the place of a slice's, whose links are then not asked."""
    monkeypatch.setattr(topology, "prepare", lambda: None)
    monkeypatch.setattr(topology, "devices", lambda where: jax.devices()[:8])
    monkeypatch.setattr(roofline, "seconds", lambda cost, found, mesh, where: TIMES)


def test_the_command_prints_the_figures_of_the_compiled_step(capsys, monkeypatch, cpu_for_tpu):
    programs, compile_step = [], plan.compile_step

    def noted(config, mesh):
        compiled = compile_step(config, mesh)
        programs.append(compiled.as_text())
        return compiled

    monkeypatch.setattr(plan, "compile_step", noted)
    assert cli.run(["plan", CONFIG, "--topology=v5e:2x4", "--json", *OVERRIDES]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["devices"], planned["chips"], planned["slices"]) == (8, 8, 1)
    assert planned["mesh"] == {"data": 1, "fsdp": 2, "expert": 4, "sequence": 1, "tensor": 1}

    c = cli.read_config(CONFIG.removeprefix("--config="), list(OVERRIDES))
    mesh = partition.make_mesh(c.mesh)
    state, batch = plan.abstract_arguments(c, mesh)
    leaves = jax.tree.leaves((state, batch))
    here = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    memory = planned["memory"]
    assert memory["arguments"] == here
    assert memory["fits"]
    assert memory["hbm"] == 16 * 2**30
    assert memory["outputs"] < here / 10  # the new state takes the place of the old one
    # fsdp halves what is wide in d_model, and experts lie on one of eight devices
    assert planned["parameters"]["per_device"] < planned["parameters"]["total"] / 2

    work = planned["work"]
    assert work["compiled"] == pytest.approx(work["analytic"], rel=0.01)
    assert work["analytic"] == flops.training_step(c, is_split=True).executed > work["useful"]
    assert planned["host_transfers"] == []
    assert planned["notes"] == []
    slots = math.ceil(1.25 * 2 * 32 / 4) * 4  # of the one row of a device, for its experts and the others'
    ours = [one for one in planned["collectives"] if (one["kind"], one["axis"]) == ("all-to-all", "expert")]
    runs = 2 * 2 * 2  # directions, forward and backward, layers: remat keeps what came, so that it need not come again
    assert [one["count"] for one in ours] == [runs]
    assert [one["bytes"] for one in ours] == [pytest.approx(runs * slots * 16 * 4 * 3 / 4, rel=0.02)]
    for entry in planned["collectives"]:
        assert {"kind", "count", "bytes", "axis", "network"} <= entry.keys()
        assert entry["count"] >= 1
        assert set(entry["axis"].split("+")) <= {"fsdp", "expert"}

    # Experts' matrices (no other array has a dim of 24) are gathered over fsdp, each on the devices of its own expert.
    program = plan.program_lib.parse(programs[0])
    gathered = [one for one in plan.collectives_lib.collectives(program, mesh) if one.kind == "all-gather"]
    of_experts = [one for one in gathered if re.search(r"\b24\b", one.result)]
    assert {one.axes(mesh) for one in of_experts} == {("fsdp",)}
    buffers = [buffer.dims for e in plan.program_lib.executions(program) for buffer in e.instruction.buffers]
    assert any(24 in dims and 1 in dims for dims in buffers)
    assert not [dims for dims in buffers if 24 in dims and 4 in dims]

    bound, tokens = planned["bound"], 7 * 8 * 32
    assert (bound["bound"], bound["step_seconds"], bound["tokens"]) == ("ici", 0.004, tokens)
    assert bound["tokens_per_second"] == pytest.approx(8 * 32 / 0.004)
    assert bound["mfu"] == pytest.approx(work["useful"] / (8 * 197e12 * 0.004))
    assert bound["days"] == pytest.approx(7 * 0.004 / 86_400)
    assert bound["chip_hours"] == pytest.approx(8 * 7 * 0.004 / 3600)


def test_the_closed_form_is_what_the_compiler_makes_of_a_step():
    """Loops over periods and chunks, recomputation, empty slots. XLA leaves out what no gradient needs."""
    c = config_of(
        model__prefix=("mamba_moe",),
        model__mamba__moe_projections=("gate",),
        model__mamba__scan="reference",
        model__moe__num_shared_experts=1,
        model__period=("mamba2", "mlp"),
        model__remat="period",
        model__mamba2__d_state=8,
        model__mamba2__d_head=8,
        model__mamba2__chunk_size=8,
        model__mlp__d_ff=16,
        model__num_softmaxes=2,
    )
    mesh = partition.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    program = plan.program_lib.parse(plan.compile_step(c, mesh).as_text())
    assert plan.cost.count(program).matmul_flops == pytest.approx(flops.training_step(c).executed, rel=0.01)


def test_sharded_parameters_come_to_the_rows_and_no_batch_goes_to_the_parameters():
    """In a model without experts, too, whose activations no `shard_map` lays out."""
    c = config_of(model__period=("mlp",), model__mlp__d_ff=24, mesh=config_lib.MeshConfig(data=1, fsdp=8))
    mesh = partition.make_mesh(c.mesh)
    program = plan.program_lib.parse(plan.compile_step(c, mesh).as_text())
    found = plan.collectives_lib.collectives(program, mesh)
    assert [one for one in found if "[16,24]" in one.result]
    assert not [one for one in found if "f32[8,32," in one.result]  # token ids may


def test_the_largest_batch_is_found_by_bisection_and_what_does_not_fit_is_said(monkeypatch):
    c = config_of(model__moe__group_size=64, data__batch_size=32)  # two rows a group, eight devices: steps of 16 rows
    mesh = partition.make_mesh(c.mesh)
    limit, tried = 70, []

    monkeypatch.setattr(plan, "compile_step", lambda config, mesh: tried.append(config.data.batch_size))
    assert plan.largest_batch(c, mesh, 2, True, print) == 128
    assert tried == [64, 128]

    def limited(config, mesh):
        tried.append(config.data.batch_size)
        if config.data.batch_size > limit:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 20G of 15.75G.\nMore")

    monkeypatch.setattr(plan, "compile_step", limited)
    said = []
    for start, fits, probes in (
        (32, True, [64, 128, 96, 80]),
        (256, False, [128, 64, 96, 80]),
        (96, False, [48, 64, 80]),
    ):
        tried.clear()
        c.data.batch_size = start
        assert plan.largest_batch(c, mesh, 9, fits, said.append) == 64
        assert tried == probes
    assert said[:2] == ["a batch of 64 rows fits", "a batch of 128 rows does not fit"]
    limit = 8
    assert plan.largest_batch(c, mesh, 9, False, said.append) == 0

    where = topology.parse("v5e:2x4")
    planned = plan.make(c, where, mesh)
    assert not planned.memory.fits
    assert planned.work is planned.collectives is planned.bound is None
    assert "Ran out of memory in hbm" in plan_table.page(planned)
    assert plan_table.grid([planned], [{"a.b": "1"}]).splitlines()[1].split()[-10:] == ["no", *"---------"]
    json.dumps(planned.to_json())


def test_varied_fields_give_a_row_for_each_combination(capsys, monkeypatch, cpu_for_tpu):
    made = []

    def make(config, where, mesh, *, probes, say):
        made.append((config.model.moe.num_experts, config.model.period))
        say("…")
        bound = plan.Bound(0.001, 0.002, 0.003, 0.0, "ici", 0.003, 1e6, 0.25, 10**9, 1.5, 288.0)
        memory = plan.Memory(2**30, 2**31, 0, 3 * 2**30, 2**34, fits=True)
        parameters = {"total": 10**9, "active": 10**8}
        return plan.Plan(where.name, 1, 8, 8, 2, {}, "", 8, parameters, memory, None, None, None, bound, [], 1.0)

    monkeypatch.setattr(plan, "make", make)
    vary = ["--vary=model.moe.num_experts=4,8", "--vary=model.period=('moe',),('mamba','moe')"]
    assert cli.run(["plan", CONFIG, "--topology=v5e:2x4", *vary]) == 0
    assert made == [(4, ("moe",)), (4, ("mamba", "moe")), (8, ("moe",)), (8, ("mamba", "moe"))]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["num_experts", "period", "params", "active"]
    row = "4 ('moe',) 1G 100M 3.0 16 yes 1.0 2.0 3.0 0.0 ici 1,000,000 25.0% 1.50 288"
    assert lines[1].split() == row.split()
    assert cli.run(["plan", CONFIG, "--topology=v5e:2x4", "--json", vary[0]]) == 0
    assert [row["varied"] for row in json.loads(capsys.readouterr().out)] == [
        {"model.moe.num_experts": "4"},
        {"model.moe.num_experts": "8"},
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--topology=v9:2x2",), "--topology=v9:2x2 is not known; write one of v4:"),
        (("--topology=v5e:3x3",), "--topology=v5e:3x3 is no slice of v5e; write v5e: and one of 1x1, 2x2, 2x4"),
        (("--topology=v5e:2x4", "--slices=0"), "--slices=0 must be 1 or more"),
        (("--topology=v5e:2x4", "--search_batch=-1"), "--search_batch=-1 must be 0 or more"),
        (("--topology=v5e:2x4", "--vary=model.moe.num_experts"), "--vary=model.moe.num_experts lacks a value; write"),
        (("--topology=v5e:2x4", "--vary=model.moe.num_experts=4,"), "lacks a value"),
        (("--topology=v5e:2x4", "--vary=model.moe.num_expert=4"), "did you mean --config.model.moe.num_experts?"),
        (("--topology=v5e:2x4", "--vary=data.seed=1", "--vary=data.seed=2"), "write one --vary a field"),
        (("--topology=v5e:2x4", "--config.mesh.fsdp=3"), "does not multiply to the 8 devices"),
        (("--topology=v5e:2x4", "--config.data.batch_size=12"), "data.batch_size=12 does not divide over mesh.fsdp=8"),
    ],
)  # fmt: skip
def test_what_can_not_be_planned_is_one_line_before_anything_is_compiled(capsys, cpu_for_tpu, arguments, expected):
    assert cli.run(["plan", CONFIG, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert expected in captured.err


def test_without_the_compiler_the_command_names_the_extra(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else found(name, *rest)
    )
    assert cli.run(["plan", CONFIG, "--topology=v5e:2x4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("is not installed; run pip install -e '.[tpu]' (no TPU is needed)")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the extra tpu)")
def test_a_step_compiles_for_two_slices_that_are_not_here(capsys):
    sizes = ("--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.expert=4")
    assert cli.run(["plan", CONFIG, "--topology=v5e:2x2", "--slices=2", "--json", *sizes]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["devices"], planned["hosts"]) == (8, 2)
    assert planned["work"]["ratio"] == pytest.approx(1, rel=0.01)
    networks = {entry["axis"]: entry["network"] for entry in planned["collectives"]}
    assert networks["data"] == "dcn"
    assert networks["expert"] == "ici"
    assert planned["host_transfers"] == []
    bound = planned["bound"]
    assert min(bound[f"{name}_seconds"] for name in ("compute", "hbm", "ici", "dcn")) > 0
