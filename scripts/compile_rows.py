"""Compiles the training step of every row of the papers' tables for eight devices, in small.

    export XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    python scripts/compile_rows.py
    python scripts/compile_rows.py --only moe_mamba switch_c

A row is its ",mini" cut further: two periods, rows of 64 tokens, a row a device, at most 8 experts, which are split
over `expert` where their number is even; parameters are split over `fsdp`, rows over all. A line for each: the mesh,
the parameters, the seconds, and what the compiler put in for collectives; rows that differ in rates and lengths alone
are one program, compiled once. `moejax plan` compiles the whole row for a TPU slice. Exit status 1 if one does not
compile.
"""

import argparse
import collections
import json
import pathlib
import runpy
import sys
import time

import jax

from moejax import config as config_lib
from moejax import partition, rules
from moejax.analysis import collectives, params, plan, program
from moejax.config import plain

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "configs"
LENGTH, DEVICES = 64, 8


def main() -> None:
    """Compiles, a line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="PREFIX", help="rows whose names begin so")
    only = tuple(parser.parse_args().only)
    if jax.device_count() != DEVICES:
        sys.exit(f"there are {jax.device_count()} devices, and it takes {DEVICES}; set XLA_FLAGS as the help says")
    failed, seen = False, dict[str, str]()
    for name in ("moe_mamba", "switch"):
        file = runpy.run_path(str(FOLDER / f"{name}.py"))
        for row in file["ROWS"]:
            if not row.startswith(only or ""):
                continue
            c = reduce(file["get_config"](f"{row},mini"))
            same = seen.setdefault(
                json.dumps([plain.to_dict(c)["model"], c.optimizer.schedule, c.training.num_microbatches]), row
            )
            if same != row:
                print(f"{name}.py:{row}: the program of {same}", flush=True)
                continue
            failed |= not compiles(f"{name}.py:{row}", c)
    sys.exit(int(failed))


def reduce(c: config_lib.Config) -> config_lib.Config:
    """Small enough to compile in seconds."""
    c.model.num_periods = min(2, c.model.num_periods)
    c.model.num_encoder_periods = min(2, c.model.num_encoder_periods)
    c.model.moe.num_experts = min(DEVICES, c.model.moe.num_experts)
    c.data.seq_length, c.model.moe.group_size = LENGTH, LENGTH
    c.data.batch_size = DEVICES * c.training.num_microbatches
    split = 2 if c.model.has_experts and c.model.moe.num_experts % 2 == 0 else 1
    c.mesh = config_lib.MeshConfig(data=2, fsdp=-1, expert=split)
    rules.validate(c)
    return c


def compiles(name: str, c: config_lib.Config) -> bool:
    """Says whether it does, in a line."""
    start = time.perf_counter()
    try:
        mesh = partition.make_mesh(c.mesh)
        partition.check_batch(c, mesh)
        compiled = plan.compile_step(c, mesh)
    except Exception as error:  # of the compiler or of tracing: the others are still to be tried
        print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
        return False
    found = collectives.collectives(program.parse(compiled.as_text() or ""), mesh)
    kinds = sum((collections.Counter({one.kind: one.count}) for one in found), collections.Counter())
    total = params.count(c.model)["total"]
    seconds = time.perf_counter() - start
    sent = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    print(f"{name}: {partition.describe(mesh)}; {total:,} parameters; {seconds:.1f} s; {sent}", flush=True)
    return True


if __name__ == "__main__":
    main()
