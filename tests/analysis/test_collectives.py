"""Who sends how much to whom: groups in all of XLA's spellings, bytes by hand, pieces of one operation counted once."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh

from moejax import partition
from moejax.analysis import collectives, program

HEADER = """
ENTRY %main (p: f32[4,6]) -> f32[4,6] {
  %p = f32[4,6]{1,0} parameter(0)
  %h = bf16[4,6]{1,0} parameter(1)
"""


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device of a slice says of itself."""

    id: int
    slice_index: int


def mesh_of(num_slices=1, **sizes):
    """Eight devices, four a slice if there are two."""
    devices = np.array([Device(i, i * num_slices // 8) for i in range(8)])
    return Mesh(devices.reshape([sizes.get(axis, 1) for axis in partition.AXES]), partition.AXES)


MESH = mesh_of(data=2, expert=2, tensor=2)  # device 4 d + 2 e + t


def read(*lines, mesh=MESH, before=""):
    text = before + HEADER + "\n".join(lines) + "\n  ROOT %end = f32[4,6]{1,0} copy(%p)\n}\n"
    return collectives.collectives(program.parse(text), mesh)


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("{{0,2},{1,3},{4,6},{5,7}}", "expert"),
        ("{{0,2,4,6},{1,3,5,7}}", "data+expert"),
        ("{}", "data+expert+tensor"),
        ("[1,8]<=[8]", "data+expert+tensor"),
        ("[4,2]<=[8]", "tensor"),
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("[4,2]<=[2,2,2]T(0,2,1)", "expert"),
        ("mesh['a'=2,'b'=4] {'a'}", "data"),
        ("mesh['a'=2,'b'=2,'c'=2] {'b','c'}", "expert+tensor"),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", "expert"),
        ("mesh['a'=8] {'a':(2)2}", "expert"),
        ("mesh['a'=8] {'a':(1)4}", "data+expert"),
    ],
)
def test_a_group_lies_along_the_mesh_axes_in_which_its_devices_differ(groups, axis):
    (one,) = read(f"  %x = f32[4,6]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add")
    assert "+".join(one.axes(MESH)) == axis
    assert sorted(one.groups.flat) == list(range(8))
    assert one.network(MESH) == "ici"


GROUPS = "replica_groups=[2,4]<=[8]"
P = 4 * 4 * 6  # bytes of the operand


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        (f"f32[16,6]{{1,0}} all-gather(%p), {GROUPS}, dimensions={{0}}", "all-gather", 3 * P),
        (f"(f32[4,6], f32[16,6]) all-gather-start(%p), {GROUPS}, dimensions={{0}}", "all-gather", 3 * P),
        (f"f32[1,6]{{1,0}} reduce-scatter(%p), {GROUPS}, dimensions={{0}}, to_apply=%add", "reduce-scatter", 0.75 * P),
        (f"(f32[4,6], bf16[4,6]) all-reduce(%p, %h), {GROUPS}, to_apply=%add", "all-reduce", 1.5 * (P + P / 2)),
        (f"f32[4,6]{{1,0}} all-reduce-start(%p), {GROUPS}, to_apply=%add", "all-reduce", 1.5 * P),
        (f"f32[4,6]{{1,0}} all-to-all(%p), {GROUPS}, dimensions={{0}}", "all-to-all", 0.75 * P),
        (f"f32[16,6]{{1,0}} ragged-all-to-all(%p, %p, %h, %h, %h, %h), {GROUPS}", "ragged-all-to-all", 0.75 * P),
        (f"f32[2,6]{{1,0}} ragged-all-to-all(%p, %p, %h, %h, %h, %h), {GROUPS}", "ragged-all-to-all", 0.75 * P / 2),
        ("f32[4,6]{1,0} collective-permute(%p), source_target_pairs={{0,4},{4,0}}", "collective-permute", P),
        ("(f32[4,6], f32[4,6], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,4},{4,4}}",
         "collective-permute", P),
    ],
)  # fmt: skip
def test_bytes_that_a_device_sends_as_worked_by_hand(line, kind, sent):
    (one,) = read(f"  %x = {line}")
    assert (one.kind, one.count, one.sent_bytes) == (kind, 1, sent)


def test_groups_of_one_and_waits_send_nothing():
    assert not read(
        "  %a = f32[4,6]{1,0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add",
        "  %b = f32[4,6]{1,0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}",
        "  %c = f32[4,6]{1,0} all-gather-done(%p)",
    )


def test_pieces_that_tpu_runs_inside_fusions_are_one_operation_and_a_sliced_sum_is_a_reduce_scatter():
    piece = (
        "%{name} (q: f32[4,6]) -> f32[16,6] {{\n  %q = f32[4,6]{{1,0}} parameter(0)\n  ROOT %g = f32[16,6]{{1,0}} "
        'all-gather(%q), channel_id={channel}, replica_groups=[2,4]<=[8], frontend_attributes={{chain_id="{chain}"}}\n'
        "}}\n"
    )
    pieces = ("one", 5, 0), ("two", 5, 0), ("other", 6, 1)
    before = "".join(piece.format(name=name, channel=channel, chain=chain) for name, channel, chain in pieces)
    before += (
        "%all-reduce-scatter.1 (q: f32[4,6]) -> f32[1,6] {\n  %q = f32[4,6]{1,0} parameter(0)\n  %r = f32[4,6]{1,0} "
        "all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%add\n  ROOT %s = f32[1,6]{1,0} slice(%r), "
        "slice={[0:1], [0:6]}\n}\n"
    )
    calls = [
        f"  %f{i} = f32[16,6]{{1,0}} fusion(%p), kind=kCustom, calls=%{name}" for i, (name, *_) in enumerate(pieces)
    ]
    calls += ["  %f = f32[1,6]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"]
    found = read(*calls, before=before)
    assert [(one.kind, one.sent_bytes) for one in found] == [
        ("all-gather", 3 * P),
        ("all-gather", 3 * P),
        ("reduce-scatter", 0.75 * P),
    ]


def test_between_slices_a_send_and_its_recv_are_the_collective_that_is_named_beside_them():
    mesh = mesh_of(num_slices=2, data=2, expert=4)
    note = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="NAME",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="KIND"}'
    )
    sum_of = note.replace("NAME", "a").replace("KIND", "ALL_REDUCE")
    gather = note.replace("NAME", "b").replace("KIND", "ALL_GATHER")
    lines = [
        "  %t = token[] after-all()",
        f"  %s.0 = (f32[4,6], u32[], token[]) send(%p, %t), channel_id=1, {sum_of}",
        f"  %s.1 = (f32[4,6], u32[], token[]) send(%p, %t), channel_id=3, {gather}",
        f"  %r.1 = (f32[8,6], u32[], token[]) recv(%t), channel_id=4, {gather}",
        f"  %r.0 = (f32[4,6], u32[], token[]) recv(%t), channel_id=2, {sum_of}",
        "  %x = f32[4,6]{1,0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add",
    ]
    found = read(*lines, mesh=mesh)
    assert [(one.kind, one.network(mesh), one.sent_bytes) for one in found] == [
        ("all-reduce", "dcn", P),
        ("all-gather", "dcn", P),
        ("all-reduce", "dcn", 2 * P * 7 / 8),
    ]
    assert found[0].axes(mesh) == ("data",)
    text = HEADER + "\n".join(lines) + "\n  %o = token[] outfeed(%p, %t)\n"
    text += '  %c = f32[4,6]{1,0} custom-call(%p), custom_call_target="xla_python_cpu_callback"\n'
    text += "  %m = f32[4,6]{1,0:S(5)} copy(%p)\n  ROOT %end = f32[4,6]{1,0} copy(%p)\n}\n"
    assert collectives.host_transfers(program.parse(text)) == ["outfeed o", "custom-call c", "copy m"]


def test_a_summary_adds_up_what_goes_along_one_axis_and_names_the_largest():
    found = read(
        '  %a = f32[4,6]{1,0} all-to-all(%p), replica_groups=[4,2]<=[8], metadata={op_name="jit(f)/there"}',
        "  %b = bf16[4,6]{1,0} all-to-all(%h), replica_groups=[4,2]<=[8]",
        "  %c = bf16[4,6]{1,0} all-to-all(%h), replica_groups=[4,2]<=[2,4]T(1,0)",
    )
    first, second = collectives.summary(found, MESH)
    assert first == {
        "kind": "all-to-all", "axis": "tensor", "network": "ici", "count": 2, "bytes": P // 2 + P // 4,
        "largest": "f32[4,6]", "largest_at": "jit(f)/there",
    }  # fmt: skip
    assert (second["axis"], second["bytes"]) == ("data", P // 4)


def test_devices_that_are_written_in_no_known_way_are_refused():
    with pytest.raises(ValueError, match="the devices of x can't be read"):
        read("  %x = f32[4,6]{1,0} all-reduce(%p), replica_groups=everyone, to_apply=%add")
