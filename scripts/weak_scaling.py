"""Weak scaling on paper: the same rows a chip on more and more TPU v5e, by the plans of the compiled training steps.

    pip install -e .[tpu]                     # libtpu; no TPU is needed
    python scripts/weak_scaling.py --config=configs/moe_mamba.py:moe_mamba_100m --config.mesh.expert=2
    python scripts/weak_scaling.py --config=configs/moe_mamba.py:moe_mamba_100m --chips 256 512 --rows=8

A Markdown table, a line for each number of chips as soon as it is compiled, minutes each; times are those of `moejax
plan`. The rest of the mesh is fsdp inside a slice of up to 256 chips, and data between slices.
"""

import argparse
import sys

from moejax import cli
from moejax import config as config_lib
from moejax.analysis import chips as chips_lib
from moejax.analysis import topology

SLICES = {rows * columns: f"{rows}x{columns}" for rows, columns in chips_lib.SHAPES_2D if rows * columns >= 8}
HEADS = ("chips", "mesh", "HBM GiB", "compute ms", "HBM ms", "ICI ms", "DCN ms", "bound", "tokens/s", "MFU at most")


def main() -> None:
    """Compiles, and prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--chips", type=int, nargs="+", default=[*SLICES, 512])
    parser.add_argument("--rows", type=int, default=4, help="rows a chip (default 4)")
    arguments, overrides = parser.parse_known_args()
    try:
        configs = {chips: scaled(cli.read_config(arguments.config, overrides), chips, arguments.rows)
                   for chips in arguments.chips}  # fmt: skip
        topology.prepare()
        print(f"| {' | '.join(HEADS)} |\n|{'---:|' * len(HEADS)}", flush=True)
        for chips, config in configs.items():
            print(f"| {' | '.join(row(config, chips))} |", flush=True)
    except config_lib.ConfigError as error:
        sys.exit(f"weak_scaling: {error}")


def scaled(config: config_lib.Config, chips: int, rows: int) -> config_lib.Config:
    """The config on so many chips."""
    config.data.batch_size = rows * chips
    config.mesh.data, config.mesh.fsdp = max(1, chips // 256), -1
    return config


def row(config: config_lib.Config, chips: int) -> list[str]:
    """The cells of a line."""
    from moejax.analysis import plan as plan_lib

    num_slices = config.mesh.data
    shape = SLICES.get(chips // num_slices)
    if shape is None or chips % num_slices:
        raise config_lib.ConfigError(
            f"--chips={chips} is no size of v5e; write some of {[*SLICES]} or a multiple of 256"
        )
    where = topology.parse(f"v5e:{shape}", num_slices)
    plan = plan_lib.make(config, where, plan_lib.mesh_of(config, topology.devices(where)))
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
    if plan.bound is None or plan.memory.total is None:
        return [str(chips), mesh, "does not fit", *[""] * (len(HEADS) - 3)]
    bound = plan.bound
    times = (bound.compute_seconds, bound.hbm_seconds, bound.ici_seconds, bound.dcn_seconds)
    return [
        str(chips),
        mesh,
        f"{plan.memory.total / 2**30:.1f}",
        *(f"{1000 * seconds:.1f}" for seconds in times),
        bound.bound,
        f"{bound.tokens_per_second:,.0f}",
        f"{bound.mfu:.0%}",
    ]


if __name__ == "__main__":
    main()
