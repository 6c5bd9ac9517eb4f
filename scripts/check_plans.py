"""Plans MoE-Mamba 100M for four TPU slices, with 42 and with 64 experts, and holds each plan against arithmetic.

    pip install -e .[tpu]                     # libtpu; no TPU is needed
    python scripts/check_plans.py             # eight compilations, one after another, minutes each
    python scripts/check_plans.py --topology v5p:4x4x4 --experts 64

A Markdown table, a line for each plan as soon as it is made: the figures of `moejax plan --json`, the processor time
and memory that it took, and "ok", or which law it breaks. They are
  - all-to-alls send 2 (directions) x 2 (forward, backward) x slots x d_model x bytes x (e-1)/e a layer, within 2 %;
  - all-gathers over `expert` bring less than the experts of one layer;
  - nothing goes through a host, and matrix products are those of the closed form, within 2 %;
  - under 4 minutes and 20 GiB.
Exit status 1 if one is broken.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time

from moejax import cli

TOPOLOGIES = {"v5e:16x16": 1, "v6e:16x16": 1, "v5p:4x4x4": 1, "v5e:8x16": 2}  # and how many slices
MESHES = {42: {"data": -1, "fsdp": 16, "expert": 2, "split_physical_axes": True}, 64: {"fsdp": -1, "expert": 16}}
CONFIG = "configs/moe_mamba.py:moe_mamba_100m"
HEADS = ("topology", "experts", "mesh", "HBM GiB", "compute ms", "HBM ms", "ICI ms", "DCN ms", "bound", "MFU at most",
         "all-to-all MB", "minutes", "CPU minutes", "GB", "")  # fmt: skip
BYTES = 2  # of a bfloat16


def main() -> None:
    """Plans, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--experts", nargs="+", type=int, choices=MESHES, default=list(MESHES))
    arguments = parser.parse_args()
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
    failed = False
    for topology in arguments.topology:
        for experts in arguments.experts:
            cells, broken = row(topology, experts)
            failed |= bool(broken)
            print(f"| {' | '.join([*cells, '; '.join(broken) or 'ok'])} |", flush=True)
    sys.exit(int(failed))


def row(topology: str, experts: int) -> tuple[list[str], list[str]]:
    """The cells of a line, and the laws that its plan breaks."""
    mesh = {"data": TOPOLOGIES[topology], **MESHES[experts]}
    overrides = [f"--config.model.moe.num_experts={experts}"]
    overrides += [f"--config.mesh.{field}={value}" for field, value in mesh.items()]
    options = [f"--config={CONFIG}", f"--topology={topology}", f"--slices={TOPOLOGIES[topology]}", "--json"]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "moejax.cli", "plan", *options, *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    minutes, after = (time.perf_counter() - start) / 60, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
    gigabytes = after.ru_maxrss * 1024 / 1e9  # of the largest so far
    plan = json.loads(done.stdout)
    bound, sent = plan["bound"], sum(one["bytes"] for one in plan["collectives"] if one["kind"] == "all-to-all")
    cells = [
        f"{TOPOLOGIES[topology]} x {topology}",
        str(experts),
        " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1),
        f"{plan['memory']['total'] / 2**30:.1f}",
        *(f"{1000 * bound[f'{name}_seconds']:.0f}" for name in ("compute", "hbm", "ici", "dcn")),
        bound["bound"],
        f"{bound['mfu']:.0%}",
        f"{sent / 1e6:,.0f}",
        f"{minutes:.1f}",
        f"{processor:.1f}",
        f"{gigabytes:.1f}",
    ]
    return cells, broken_laws(plan, cli.read_config(CONFIG, overrides), sent, minutes, gigabytes)


def broken_laws(plan, config, sent: int, minutes: float, gigabytes: float) -> list[str]:
    """In words."""
    model, moe, axis = config.model, config.model.moe, plan["mesh"]["expert"]
    groups = config.data.batch_size * config.data.seq_length // moe.group_size
    slots = groups * moe.num_experts * math.ceil(moe.group_size * moe.capacity_factor / moe.num_experts)
    layers = model.sublayers.count("moe")
    expected = 2 * 2 * layers * slots / plan["devices"] * model.d_model * BYTES * (axis - 1) / axis
    experts = BYTES * moe.num_experts * 2 * model.d_model * moe.d_expert
    gathers = [one for one in plan["collectives"] if one["kind"] == "all-gather"]
    gathered = sum(one["bytes"] for one in gathers if "expert" in one["axis"].split("+"))
    laws = {
        f"all-to-all sends {sent / expected:.3f} of the closed form": abs(sent / expected - 1) < 0.02,
        f"all-gathers over expert bring {gathered:,} bytes": gathered < experts,
        f"through hosts go {plan['host_transfers']}": not plan["host_transfers"],
        f"FLOPs are {plan['work']['ratio']:.3f} of the closed form": abs(plan["work"]["ratio"] - 1) < 0.02,
        f"took {minutes:.1f} minutes and {gigabytes:.0f} GB": minutes < 4 and gigabytes * 1e9 < 20 * 2**30,
    }
    return [law for law, holds in laws.items() if not holds]


if __name__ == "__main__":
    main()
