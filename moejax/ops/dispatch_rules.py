"""Which dispatch is the fastest where nothing may be dropped; written by scripts/bench_moe.py --write_rules.

full_capacity: up to how many experts for each choice of a token (E / K) it is faster to give every expert a slot for
every token than to sort tokens by expert. grouped_matmul: the faster implementation of `ops.grouped`.
"""

from typing import NamedTuple


class Rule(NamedTuple):
    """See the module's docstring. measured: on what, or why not."""

    full_capacity: float
    grouped_matmul: str
    measured: str


RULES = {
    "cpu": Rule(full_capacity=1.00, grouped_matmul="blocked", measured="cpu, jax 0.10.2"),
    "gpu": Rule(full_capacity=1.00, grouped_matmul="ragged_dot", measured="not measured"),
    "tpu": Rule(full_capacity=1.00, grouped_matmul="ragged_dot", measured="not measured"),
}
