"""Time and memory of the selective scan on this machine, forward and backward, side by side in one run.

    python scripts/bench_scan.py                       # B=4, L=512, I=512, N=16
    python scripts/bench_scan.py --length=2048

Rows: the sequential reference, one associative scan over the whole sequence by autodiff (what people write first), and
ours with several chunk sizes. Temporary memory is what the compiled program reserves.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.ops import scan


def plain(u_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I):
    """jax.lax.associative_scan over the whole sequence."""
    decay_BLIN = jnp.exp(dt_BLI[..., None] * A_IN)
    drive_BLIN = (dt_BLI * u_BLI)[..., None] * B_BLN[:, :, None]
    compose = lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1])  # noqa: E731
    _, state_BLIN = jax.lax.associative_scan(compose, (decay_BLIN, drive_BLIN), axis=1)
    return jnp.einsum("blin,bln->bli", state_BLIN, C_BLN) + D_I * u_BLI


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in (("batch", 4), ("length", 512), ("inner", 512), ("state", 16), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    key = iter(jax.random.split(jax.random.key(0), 6))
    u_BLI = jax.random.normal(next(key), (a.batch, a.length, a.inner))
    dt_BLI = jax.nn.softplus(jax.random.normal(next(key), u_BLI.shape) - 3)
    A_IN = -jnp.broadcast_to(jnp.arange(1.0, a.state + 1), (a.inner, a.state))
    B_BLN = jax.random.normal(next(key), (a.batch, a.length, a.state))
    C_BLN = jax.random.normal(next(key), (a.batch, a.length, a.state))
    inputs = (u_BLI, dt_BLI, A_IN, B_BLN, C_BLN, jnp.ones(a.inner))

    variants: dict[str, Callable] = {
        "reference (lax.scan)": lambda *x: scan.selective_scan(*x, implementation="reference")[0],
        "plain associative_scan": plain,
    }
    for chunk_size in (4, 8, 16, 32):
        variants[f"associative, chunk {chunk_size}"] = lambda *x, c=chunk_size: scan.selective_scan(
            *x, implementation="associative", chunk_size=c
        )[0]

    programs = {}
    print(f"B={a.batch} L={a.length} I={a.inner} N={a.state} on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name, function in variants.items():
        forward = jax.jit(function)
        backward = jax.jit(jax.grad(lambda *x, f=function: jnp.sum(f(*x) ** 2), argnums=tuple(range(6))))
        for kind, program in (("forward", forward), ("forward + backward", backward)):
            begin = time.perf_counter()
            compiled = program.lower(*inputs).compile()
            programs[name, kind] = compiled, time.perf_counter() - begin
    times: dict[tuple[str, str], list[float]] = {which: [] for which in programs}
    for _ in range(a.repeats + 1):  # all variants in turn, so that a slow moment of the machine hits all of them
        for which, (compiled, _) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*inputs))
            times[which].append(time.perf_counter() - begin)
    print(f"{'':<28}{'':<22}{'ms':>8}{'MB':>8}{'compile s':>11}")
    for (name, kind), (compiled, compile_time) in programs.items():
        memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
        milliseconds = 1e3 * statistics.median(times[name, kind][1:])
        print(f"{name:<28}{kind:<22}{milliseconds:>8.0f}{memory:>8.0f}{compile_time:>11.1f}")


if __name__ == "__main__":
    main()
