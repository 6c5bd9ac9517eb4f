"""Time and memory of Mamba-2's scan on this machine, forward and backward, side by side in one run.

    python scripts/bench_ssd.py                         # B=4, L=512, 16 heads of 64, N=128: a layer of d_model 512
    python scripts/bench_ssd.py --length=2048 --quadratic=0

Rows: the sequential reference, the quadratic form over the whole sequence, ours with several chunk sizes, and Mamba-1's
scan of the same inner width with its 16 states. Temporary memory is what the compiled program reserves.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
from side_by_side import Program, measure, median

from moejax.ops import scan, ssd


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    sizes = {"batch": 4, "length": 512, "heads": 16, "width": 64, "groups": 1, "state": 128, "repeats": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunks", default="16,32,64,128,256", help="chunk sizes, separated by commas")
    parser.add_argument("--quadratic", type=int, default=1, help="0 leaves out the quadratic form and the reference")
    parser.add_argument("--limit_gb", type=float, default=12.0, help="what reserves more is compiled, and not run")
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
        forward = lambda *x, f=function: f(*x)[0]  # noqa: E731
        backward = jax.grad(loss, argnums=tuple(range(6)))
        for kind, which in (("forward", forward), ("forward + backward", backward)):
            programs[name, kind] = Program(which, *arguments, limit_gb=a.limit_gb)
    measure(programs.values(), a.repeats)
    print(f"{'':<28}{'':<22}{'ms':>8}{'MB':>8}{'compile s':>11}")
    for (name, kind), program in programs.items():
        figures = f"{1e3 * median(program):>8.0f}{program.megabytes:>8.0f}{program.compile_seconds:>11.1f}"
        print(f"{name:<28}{kind:<22}{figures}")


if __name__ == "__main__":
    main()
