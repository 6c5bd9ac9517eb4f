"""Laws of `moejax verify`: a sound model passes everywhere, and a bug is named with the place where it shows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import tiny

from moejax import cli, partition
from moejax import config as config_lib
from moejax.analysis import combinations, reduction, verify
from moejax.analysis.combinations import CONFIGURED, PLAIN, Combination
from moejax.layers import router as router_lib
from moejax.ops import balance, dispatch, experts
from moejax.training import state

CLI = ("verify", f"--config={tiny.__file__}:unused", "--config.model.num_periods=1", "--config.model.period=('moe',)")


def config(**moe) -> config_lib.Config:
    c = tiny.get_config("unused")
    c.model.period, c.model.num_periods = ("moe",), 1
    c.mesh.fsdp = 1
    for name, value in moe.items():
        setattr(c.model.moe, name, value)
    return c


def run(c: config_lib.Config, *ways: Combination) -> list[verify.Outcome]:
    return list(verify.Verifier(c, reduction.reduce(c, (), 8), jax.devices()).run(ways))


def way(num_microbatches: int = 1, dispatcher: str = CONFIGURED, **axes: int) -> Combination:
    return Combination(config_lib.MeshConfig(**({"data": 1} | axes)), num_microbatches, dispatcher)


# --- bugs ------------------------------------------------------------------------------------------------------------


def test_a_sound_model_passes_with_noise_drops_and_padding():
    c = config(router="switch", jitter=0.1, expert_dropout=0.1, num_shared_experts=1, activation="swiglu")
    ways = way(expert=4, tensor=2), way(2, "dropless blocked", data=2, fsdp=2, sequence=2)
    outcomes = run(c, *ways)
    assert [outcome.failures for outcome in outcomes] == [[], []]
    assert outcomes[0].result.num_dropped > 0 == outcomes[1].result.num_dropped
    assert outcomes[0].result.num_idle == 0
    assert set(outcomes[0].differences) == {"embedding", "norm", "experts", "shared experts", "router"}
    assert 0 < max(outcomes[0].differences.values()) < verify.TOLERANCE / 5


def test_a_skipped_psum_shows_where_its_axis_is_split(monkeypatch):
    """Over `tensor` a device has some hidden units of every expert; without a sum it adds those alone."""
    summed = partition.summed

    def without_tensor(x, *axes):
        return x if axes == ("tensor",) else summed(x, *axes)

    monkeypatch.setattr(partition, "summed", without_tensor)
    sound, broken = run(config(), way(expert=4), way(expert=4, tensor=2))
    assert not sound.failures
    assert broken.failures[0].startswith("loss is ")
    assert any(failure.startswith("gradient of experts (periods.blocks.0.") for failure in broken.failures)


def test_a_gate_of_one_shows_in_the_dispatcher_that_has_it(monkeypatch):
    combine = dispatch.combine

    def ungated(y_SD, gate_NK, slots):
        is_dropless = slots.choice_S.size == gate_NK.size
        return combine(y_SD, jnp.ones_like(gate_NK) if is_dropless else gate_NK, slots)

    monkeypatch.setattr(dispatch, "combine", ungated)
    sound, broken = run(config(), way(data=8, dispatcher=PLAIN), way(data=8, dispatcher="dropless blocked"))
    assert not sound.failures
    assert any(failure.startswith("gradient of router (periods.blocks.0.") for failure in broken.failures)


def average_twice(monkeypatch):
    """The balance loss is a mean over the groups of all devices; divided by the number of devices it is too small."""
    once = balance.load_balance_loss

    def twice(*args, **kwargs):
        return once(*args, **kwargs) / partition.num_parts("data")

    monkeypatch.setattr(balance, "load_balance_loss", twice)


def test_an_auxiliary_loss_averaged_twice_shows_on_the_axis_that_it_is_averaged_over(monkeypatch):
    average_twice(monkeypatch)
    sound, broken = run(config(), way(2, expert=4), way(data=4))
    assert not sound.failures
    assert broken.failures[0].startswith("balance loss of MoE layer 0 is ")
    assert any(failure.startswith("gradient of router ") for failure in broken.failures)
    assert not any(failure.startswith(("loss", "choices")) for failure in broken.failures)


def test_a_gradient_that_is_wrong_for_one_expert_names_it(monkeypatch):
    """Nothing but the gradient is wrong: no loss tells."""
    whole = experts.capacity_ffn

    def without_gradient(x_SD, weights, **settings):
        if partition.num_parts("expert") > 1:
            first_E = jnp.arange(len(weights.down_EFD)) == 0
            is_it_E11 = (first_E & (partition.index("expert") == 1))[:, None, None]  # of two on the second device
            down_EFD = jnp.where(is_it_E11, jax.lax.stop_gradient(weights.down_EFD), weights.down_EFD)
            weights = weights._replace(down_EFD=down_EFD)
        return whole(x_SD, weights, **settings)

    monkeypatch.setattr(experts, "capacity_ffn", without_gradient)
    [broken] = run(config(), way(expert=2))
    [line] = broken.failures
    assert line.startswith(
        "gradient of experts (periods.blocks.0.branches.0.down, period 0, expert 2) is off by 1.0e+00"
    )


def test_a_router_of_ones_own_that_looks_beyond_its_group_fails(monkeypatch):
    call = router_lib.Router.__call__

    def centred(self, x_BLD, *args, **kwargs):
        return call(self, x_BLD - x_BLD.mean(axis=(0, 1)), *args, **kwargs)

    monkeypatch.setattr(router_lib.Router, "__call__", centred)
    sound, on_devices, in_parts = run(config(), way(tensor=2), way(data=8), way(2))
    assert not sound.failures
    assert on_devices.failures
    assert in_parts.failures


def test_what_raises_on_a_mesh_alone_is_a_failure_of_that_mesh(monkeypatch):
    whole = experts.capacity_ffn

    def raising(*args, **kwargs):
        if partition.num_parts("tensor") > 1:
            raise RuntimeError("not on this mesh")
        return whole(*args, **kwargs)

    monkeypatch.setattr(experts, "capacity_ffn", raising)
    [broken] = run(config(), way(tensor=2))
    assert broken.failures == ["raised RuntimeError: not on this mesh"]


def test_a_nan_in_one_parameter_of_a_group_is_not_lost_behind_the_others():
    [outcome] = run(config(), way())
    assert outcome.result is not None
    for position, leaf in enumerate(leaves := jax.tree.leaves(outcome.result.gradients)):
        if leaf.ndim == 4:  # the experts' first matrix, and more of the group come after it
            leaves[position] = leaf * jnp.nan
            break
    gradients = jax.tree.unflatten(jax.tree.structure(outcome.result.gradients), leaves)
    broken = dataclasses.replace(outcome.result, gradients=gradients)
    failures = verify.compare(broken, outcome.result)[1]
    assert len(failures) == 1
    assert "gradient of experts" in failures[0]
    assert "nan" in failures[0]


# --- what is run -----------------------------------------------------------------------------------------------------


def test_eight_devices_are_one_axis_or_three_and_every_two_axes_meet():
    sizes = combinations.meshes(8)
    assert sizes[0] == {}
    for axis in partition.AXES:
        assert all({axis: size} in sizes for size in (2, 4, 8))
        for other in set(partition.AXES) - {axis}:
            assert any(mesh.get(axis, 1) > 1 < mesh.get(other, 1) for mesh in sizes)
    assert len(sizes) == 1 + 5 * 3 + 4


def test_every_dispatcher_meets_every_axis_and_more_than_one_microbatch():
    ways = combinations.cover(config(), (), 8)
    assert len(ways) == len(set(ways))
    for dispatcher in combinations.DISPATCHERS:
        mine = [one for one in ways if one.dispatcher == dispatcher]
        assert all(any(getattr(one.mesh, axis) == 8 for one in mine) for axis in partition.AXES)
        assert {one.num_microbatches for one in mine} == {1, 2}


def test_what_the_user_names_is_not_changed():
    c = config(dispatch="dropless")
    c.mesh.expert, c.model.d_model, c.training.num_microbatches = 4, 24, 4
    named = ("mesh.expert", "model.d_model", "training.num_microbatches", "model.moe.dispatch")
    ways = combinations.cover(c, named, 8)
    assert {one.mesh.expert for one in ways} == {4}
    assert {one.num_devices for one in ways} == {4, 8}
    assert {one.num_microbatches for one in ways} == {4}
    assert {one.dispatcher for one in ways} == set(combinations.DISPATCHERS) - {PLAIN}
    small = reduction.reduce(c, named, 8)
    assert small.model.d_model == 24
    assert small.training.num_microbatches == 4
    assert small.data.batch_size % (8 * 4) == 0


@pytest.mark.parametrize(
    ("group_size", "expected"), [(0, 0), (256, 32), (64, 8), (1024, 64)], ids=["row", "as a row", "part", "rows"]
)
def test_the_reduced_model_keeps_what_routes_and_fits_every_mesh(group_size, expected):
    c = config_lib.Config()
    c.model.period, c.model.moe.num_experts, c.model.moe.top_k = ("mamba", "mamba", "mamba2|moe", "attention"), 16, 3
    c.model.mamba2.num_groups, c.model.attention.num_heads, c.model.compute_dtype = 2, 8, "bfloat16"
    c.model.moe.group_size, c.model.moe.activation = group_size, "geglu"
    small = reduction.reduce(c, (), 8)
    assert small.model.period == ("mamba", "mamba2|moe", "attention")
    assert small.model.compute_dtype == "float32"
    assert c.model.compute_dtype == "bfloat16"
    moe = small.model.moe
    assert (moe.num_experts, moe.top_k, moe.activation, moe.group_size) == (16, 3, "geglu", expected)
    batch = reduction.batch(small)
    tokens = moe.group_size or small.data.seq_length
    groups = batch["inputs_BL"].reshape(-1, tokens)
    assert all(len(set(group)) == tokens for group in groups)  # no two tie
    assert (batch["segment_ids_BL"] == 0).any()
    assert (batch["segment_ids_BL"].max(axis=1) > 1).any()
    for one in combinations.cover(small, (), 8):
        mesh = partition.make_mesh(one.mesh, jax.devices()[: one.num_devices])
        partition.check_batch(one.apply(small), mesh)
    for axis in partition.AXES:
        here = way(**{axis: 8})
        state.shardings(small, partition.make_mesh(here.mesh))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_with_what_is_skipped_and_why(capsys):
    experts_and_axes = "--config.model.moe.num_experts=6", "--config.mesh.data=1", "--config.mesh.tensor=1"
    other = "--config.mesh.fsdp=1", "--config.mesh.sequence=1", "--config.training.num_microbatches=1"
    dispatch = "--config.model.moe.dispatch=dropless", "--config.model.moe.grouped_matmul=ragged_dot"
    assert cli.run([*CLI, *experts_and_axes, *other, *dispatch, "--devices=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["mesh", "parts", "dispatch", "loss", "balance"]
    assert [line.split("  ")[0] for line in lines[1:4]] == ["one device", "expert=2", "one device"]
    assert all(line.endswith("pass") for line in lines[1:4])
    assert any(
        line.startswith("skipped expert=4 (configured; dropless ragged_dot)")
        and "mesh.expert=4 does not divide" in line
        for line in lines
    )
    assert lines[-1].startswith("passed: 3 combinations")


def test_the_command_fails_with_status_1_and_the_place_in_json(capsys, monkeypatch):
    average_twice(monkeypatch)
    axes = [f"--config.mesh.{axis}={2 if axis == 'data' else 1}" for axis in partition.AXES]
    options = "--config.training.num_microbatches=1", "--config.model.moe.dispatch=capacity", "--devices=2", "--json"
    assert cli.run([*CLI, *axes, *options]) == 1
    written = json.loads(capsys.readouterr().out)
    assert not written["passed"]
    [row] = [row for row in written["combinations"] if row["dispatcher"] == CONFIGURED]
    assert row["mesh"] == {"data": 2, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1}
    assert row["status"] == "fail"
    assert row["failures"][0].startswith("balance loss of MoE layer 0 is ")
    assert row["losses"]["balance"] < 1 < row["loss"]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--devices=0", "--devices=0 must be 1 or more"),
        ("--devices=9", "--devices=9 is more than the 8 CPU devices"),
        ("--config.mesh.expert=3", "mesh.expert=3 does not divide --devices=8"),
    ],
)
def test_what_cannot_be_run_is_one_line(capsys, option, expected):
    assert cli.run([*CLI, option, "--config.mesh.fsdp=1"]) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
