"""How the compile time of the train step grows with depth: periods are scanned, so it should not.

    python scripts/bench_compile.py            # 4 and 32 periods of the quickstart's model, three times each

Prints a line a measurement and the ratio of the medians. Alternates between the depths, so that a machine that slows
down slows both.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs import quickstart
from moejax import partition
from moejax.training import state


def measure(num_periods: int) -> tuple[float, float]:
    """(seconds to trace and lower, seconds to compile) of the train step."""
    config = quickstart.get_config()
    config.model.num_periods = num_periods
    mesh = partition.make_mesh(config.mesh, jax.devices()[:1])
    shape = (config.data.batch_size, config.data.seq_length)
    place = partition.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, bool if name == "loss_mask_BL" else "int32", sharding=place)
        for name in ("inputs_BL", "targets_BL", "segment_ids_BL", "positions_BL", "loss_mask_BL")
    }
    begin = time.perf_counter()
    lowered = state.make_train_step(config, mesh).lower(state.abstract(config, mesh), batch)
    middle = time.perf_counter()
    lowered.compile()
    return middle - begin, time.perf_counter() - middle


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--periods", type=int, nargs=2, default=(4, 32))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    totals: dict[int, list[float]] = {periods: [] for periods in arguments.periods}
    measure(1)  # what only the first compilation of a process pays
    for _ in range(arguments.repeats):
        for periods in arguments.periods:
            lower, compile_time = measure(periods)
            totals[periods].append(lower + compile_time)
            print(f"{periods:>3} periods: lower {lower:.2f} s, compile {compile_time:.2f} s", flush=True)
    shallow, deep = (statistics.median(totals[periods]) for periods in arguments.periods)
    print(f"{arguments.periods[1]} periods take {deep / shallow:.2f} times as long as {arguments.periods[0]}")


if __name__ == "__main__":
    main()
