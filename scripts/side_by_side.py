"""Programs timed in turn, so that a slow moment of the machine hits all of them."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

SLOW = 5.0  # seconds: what takes longer is run once, and that run counts


class Program:
    """A compiled function and its times; what it reserves beside inputs and results.

    Its result goes into the memory of its last result: on fresh memory, page faults would be a large part of a time.
    """

    def __init__(self, function: Callable, *inputs: Any, limit_gb: float):
        """A program that reserves more than limit_gb is compiled, and never run."""
        shapes = jax.eval_shape(function, *inputs)
        into = jax.jit(lambda old, *inputs: function(*inputs), donate_argnums=0, keep_unused=True)
        begin = time.perf_counter()
        self._compiled = into.lower(shapes, *inputs).compile()
        self.compile_seconds = time.perf_counter() - begin
        memory: Any = self._compiled.memory_analysis()
        self.megabytes = memory.temp_size_in_bytes / 1e6
        self.seconds: list[float] = []
        self._inputs, self._old = inputs, None
        if self.megabytes < 1e3 * limit_gb:
            self._old = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def run(self) -> None:
        """Once, and notes the time."""
        if self._old is not None:
            begin = time.perf_counter()
            self._old = jax.block_until_ready(self._compiled(self._old, *self._inputs))
            self.seconds.append(time.perf_counter() - begin)


def measure(programs: Iterable[Any], repeats: int) -> None:
    """Runs all of them in turn, the first time unmeasured but for the slow ones."""
    programs = list(programs)
    for _ in range(repeats + 1):
        for program in programs:
            if not program.seconds or program.seconds[0] < SLOW:
                program.run()
    for program in programs:
        if len(program.seconds) > 1:
            del program.seconds[0]


def median(program: Any) -> float:
    """Seconds; NaN for what was not run."""
    return statistics.median(program.seconds or [float("nan")])
