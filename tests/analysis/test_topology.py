"""Names of TPU slices, what a network of them takes, and what is refused."""

import importlib.util

import numpy as np
import pytest

from moejax import config as config_lib
from moejax.analysis import chips, collectives, roofline, topology


@pytest.mark.parametrize(
    ("name", "num_chips", "devices"),
    [("v5p:4x4x4", 64, 1), ("v5e:16x16", 256, 1), ("v6e:1x1", 1, 1), ("v4:4x8x12", 384, 1), ("tpu7x:2x2x1", 4, 2)],
)
def test_a_slice_that_is_offered_is_known(name, num_chips, devices):
    where = topology.parse(name, num_slices=3)
    assert (where.num_chips, where.chip.devices) == (3 * num_chips, devices)


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e-16", "v5p:", "v5e:16x16x", "TPU v5e:4x4", ""])
def test_a_chip_that_is_not_known_is_refused_with_those_that_are(name):
    with pytest.raises(config_lib.ConfigError) as error:
        topology.parse(name)
    line = str(error.value)
    assert line.startswith(f"--topology={name} is not known; write one of v4:2x2x1")
    assert all(f"{kind}:" in line for kind in chips.CHIPS)
    assert "16x16" in line
    assert "AxBxC" in line


@pytest.mark.parametrize(
    "name", ["v5e:3x3", "v5e:32x16", "v5e:4x4x4", "v5p:4x4", "v5p:8x4x4", "v5p:16x16x28", "v5p:0x0x0"]
)
def test_a_shape_that_is_not_offered_is_refused_with_those_that_are(name):
    with pytest.raises(
        config_lib.ConfigError, match=f"--topology={name} is no slice of {name[:3]}; write {name[:3]}: "
    ):
        topology.parse(name)


def test_no_slices_and_no_compiler_are_refused_with_the_remedy(monkeypatch):
    with pytest.raises(config_lib.ConfigError, match="--slices=0 must be 1 or more"):
        topology.parse("v5e:2x2", 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config_lib.ConfigError, match=r"libtpu.*is not installed; run pip install -e '.\[tpu\]'"):
        topology.prepare()


# --- the links that a group can use ----------------------------------------------------------------------------------

V5E = chips.CHIPS["v5e"].link_bandwidth
COORDINATES = np.array([(x, y, 0) for x in range(16) for y in range(16)])  # device 16 x + y


def seconds(kind, groups, num_bytes, name="v5e:16x16", coordinates=COORDINATES):
    one = collectives.Collective(
        kind=kind,
        count=1,
        operand_bytes=num_bytes,
        result_bytes=num_bytes,
        groups=np.array(groups),
        result="",
        op_name="",
    )
    return roofline.ici_seconds(one, coordinates, topology.parse(name))


def test_a_ring_has_two_links_a_line_one_and_groups_between_one_another_share_them():
    ring = [range(16)]  # y = 0 .. 15, which close to a ring
    assert seconds("all-gather", ring, 1600) == pytest.approx(1500 / (2 * V5E))
    assert seconds("all-reduce", ring, 1600) == pytest.approx(2 * 1500 / (2 * V5E))
    line = [range(4)]
    assert seconds("all-gather", line, 1600) == pytest.approx(1200 / V5E)
    every_fourth = [range(0, 16, 4)]  # a ring of four, three more on the same links
    assert seconds("all-gather", every_fourth, 1600) == pytest.approx(1200 / (2 * V5E / 4))
    both = [range(256)]  # two rings
    assert seconds("reduce-scatter", both, 2560) == pytest.approx(2550 / (4 * V5E))


def test_an_all_to_all_takes_what_the_busiest_link_carries():
    """Counted link by link: each of n devices sends 1 / n of its bytes to each, the shorter way round."""

    def busiest(n, *, closed, num_bytes):
        load = np.zeros((n, 2))  # of the link up and down from each place
        for a in range(n):
            for b in range(n):
                up = (b - a) % n if closed else b - a
                ways = [(up, 1.0)] if 0 <= up < n / 2 or (not closed and up >= 0) else [(up - n if closed else up, 1.0)]
                if closed and 2 * up == n:
                    ways = [(up, 0.5), (-up, 0.5)]
                for hops, share in ways:
                    for hop in range(abs(hops)):
                        place = (a + hop if hops > 0 else a - hop) % n
                        load[place, int(hops < 0)] += share * num_bytes / n
        return load.max() / V5E

    assert seconds("all-to-all", [range(16)], 1600) == pytest.approx(busiest(16, closed=True, num_bytes=1600))
    assert seconds("all-to-all", [range(4)], 1600) == pytest.approx(busiest(4, closed=False, num_bytes=1600))
    assert seconds("all-to-all", [range(2)], 1600) == pytest.approx(800 / V5E)


def test_a_permutation_takes_its_longest_way_the_shorter_way_round_a_ring():
    assert seconds("collective-permute", [[0, 1], [1, 2], [15, 0]], 100) == pytest.approx(100 / V5E)
    assert seconds("collective-permute", [[0, 12]], 100) == pytest.approx(4 * 100 / V5E)
    open_line = [(x, y, 0) for x in range(8) for y in range(8)]
    far = seconds("collective-permute", [[0, 7]], 100, name="v5e:8x8", coordinates=np.array(open_line))
    assert far == pytest.approx(7 * 100 / V5E)


def test_the_bound_is_the_largest_of_the_four_times():
    times = roofline.Seconds(compute=1.0, hbm=2.0, ici=4.0, dcn=3.0)
    assert (times.step, times.bound) == (4.0, "ici")
