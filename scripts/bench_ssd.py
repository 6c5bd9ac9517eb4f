"""Time and memory of Mamba-2's scan on this machine, forward and backward, side by side in one run.

    python scripts/bench_ssd.py                         # B=4, L=512, 16 heads of 64, N=128: a layer of d_model 512
    python scripts/bench_ssd.py --length=2048 --quadratic=0

Rows: the sequential reference, the quadratic form over the whole sequence, ours with several chunk sizes, and Mamba-1's
scan of the same inner width with its 16 states. Temporary memory is what the compiled program reserves.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.ops import scan, ssd


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    sizes = {"batch": 4, "length": 512, "heads": 16, "width": 64, "groups": 1, "state": 128, "repeats": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunks", default="16,32,64,128,256", help="chunk sizes, separated by commas")
    parser.add_argument("--quadratic", type=int, default=1, help="0 leaves out the quadratic form and the reference")
    a = parser.parse_args()
    key = iter(jax.random.split(jax.random.key(0), 8))
    x_BLHP = jax.random.normal(next(key), (a.batch, a.length, a.heads, a.width))
    dt_BLH = jax.nn.softplus(jax.random.normal(next(key), x_BLHP.shape[:3]) - 3)
    B_BLGN, C_BLGN = (jax.random.normal(next(key), (a.batch, a.length, a.groups, a.state)) for _ in range(2))
    inputs = (x_BLHP, dt_BLH, -jnp.linspace(1, 16, a.heads), B_BLGN, C_BLGN, jnp.ones(a.heads))
    inner, states = a.heads * a.width, 16
    mamba_inputs = (
        x_BLHP.reshape(a.batch, a.length, inner),
        jnp.repeat(dt_BLH, a.width, axis=2),
        -jnp.broadcast_to(jnp.arange(1.0, states + 1), (inner, states)),
        *(jax.random.normal(next(key), (a.batch, a.length, states)) for _ in range(2)),
        jnp.ones(inner),
    )

    variants: dict[str, tuple[Callable, tuple]] = {"Mamba-1's scan, N=16": (scan.selective_scan, mamba_inputs)}
    if a.quadratic:
        for name in ("reference", "quadratic"):
            variants[name] = (lambda *x, n=name: ssd.ssd(*x, implementation=n), inputs)
    for size in map(int, a.chunks.split(",")):
        variants[f"chunks of {size}"] = (lambda *x, c=size: ssd.ssd(*x, chunk_size=c), inputs)

    programs = {}
    shape = f"B={a.batch} L={a.length} H={a.heads} P={a.width} G={a.groups} N={a.state}"
    print(f"{shape} on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name, (function, arguments) in variants.items():
        loss = lambda *x, f=function: jnp.sum(f(*x)[0] ** 2)  # noqa: E731
        for kind, program in (
            ("forward", jax.jit(lambda *x, f=function: f(*x)[0])),
            ("forward + backward", jax.jit(jax.grad(loss, argnums=tuple(range(6))))),
        ):
            begin = time.perf_counter()
            compiled = program.lower(*arguments).compile()
            programs[name, kind] = compiled, arguments, time.perf_counter() - begin
    times: dict[tuple[str, str], list[float]] = {which: [] for which in programs}
    for _ in range(a.repeats + 1):  # all variants in turn, so that a slow moment of the machine hits all of them
        for which, (compiled, arguments, _) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times[which].append(time.perf_counter() - begin)
    print(f"{'':<28}{'':<22}{'ms':>8}{'MB':>8}{'compile s':>11}")
    for (name, kind), (compiled, _, compile_time) in programs.items():
        memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
        milliseconds = 1e3 * statistics.median(times[name, kind][1:])
        print(f"{name:<28}{kind:<22}{milliseconds:>8.0f}{memory:>8.0f}{compile_time:>11.1f}")


if __name__ == "__main__":
    main()
