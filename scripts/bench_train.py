"""Whole training steps on this machine: tokens a second, and the memory that the compiled step needs.

    python scripts/bench_train.py     # MoE-Mamba 25M, 32 experts, a row of 1,024 tokens
    python scripts/bench_train.py --config=configs/quickstart.py --config.model.moe.num_experts=32

Random tokens, one device, no data pipeline. Arguments are the parameters, their moments and the batch; temporary is
what the compiled step reserves beside them; the peak is that of the process, compilation included.
"""

import argparse
import resource
import statistics
import time
from typing import NamedTuple

import jax
import numpy as np

from moejax import cli, partition, rules
from moejax import config as config_lib
from moejax.training import state as state_lib


class Figures(NamedTuple):
    """Of the steps after the first."""

    tokens_per_second: float
    argument_bytes: int
    temporary_bytes: int


def measure(config: config_lib.Config, num_steps: int) -> Figures:
    """Runs num_steps training steps of a config on one device."""
    rules.validate(config)
    mesh = partition.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    rng = np.random.default_rng(0)
    shape = (config.data.batch_size, config.data.seq_length)
    tokens_BL = rng.integers(0, config.model.vocab_size, shape).astype(np.int32)
    batch = {
        "inputs_BL": tokens_BL,
        "targets_BL": tokens_BL,
        "segment_ids_BL": np.ones(shape, np.int32),
        "positions_BL": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "loss_mask_BL": np.ones(shape, bool),
    }
    batch = jax.device_put(batch, partition.batch_sharding(mesh))
    state = state_lib.create(config, mesh)
    step = state_lib.make_train_step(config, mesh).lower(state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    times = []
    for _ in range(num_steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    memory = step.memory_analysis()
    return Figures(
        tokens_BL.size / statistics.median(times[1:]), memory.argument_size_in_bytes, memory.temp_size_in_bytes
    )


def moe_mamba_25m(num_experts: int = 32) -> config_lib.Config:
    """The shape of the model of arXiv 2401.04081 (its Table 5 has 42 experts); one row a batch."""
    c = config_lib.Config()
    c.model.vocab_size, c.model.d_model, c.model.num_periods = config_lib.GPT2_VOCAB_SIZE, 512, 8
    c.model.moe.num_experts, c.model.moe.d_expert = num_experts, 1536
    c.model.norm, c.model.final_norm, c.model.tie_embeddings = "layernorm", False, False
    c.data.tokenizer, c.data.seq_length, c.data.batch_size = "gpt2", 1024, 1
    return c


def main() -> None:
    """Measures one config."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", help="a config file; without it, MoE-Mamba 25M with 32 experts")
    parser.add_argument("--steps", type=int, default=3)
    arguments, overrides = parser.parse_known_args()
    config = cli.read_config(arguments.config, overrides) if arguments.config else moe_mamba_25m()
    figures = measure(config, arguments.steps)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {figures.tokens_per_second:,.0f} tokens/s; arguments "
        f"{figures.argument_bytes / 1e9:.2f} GB, temporary {figures.temporary_bytes / 1e9:.2f} GB, "
        f"peak {peak / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
