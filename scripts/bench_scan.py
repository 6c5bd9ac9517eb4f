"""Time, memory and compile time of the selective scan on this machine, side by side in one run.

    python scripts/bench_scan.py                                      # B=4, N=16; I=512, 1024; L=512, 2048, 8192
    python scripts/bench_scan.py --lengths=512 --inner=512 --chunks 4 8 16 32   # what the default chunk is chosen by

Rows: ours as it is by default on this platform, ours with jax.lax.associative_scan within chunks, one
jax.lax.associative_scan over the whole sequence by autodiff (what people write first), and lax.scan over time by
autodiff. Temporary memory is what the compiled program reserves; a program that reserves more than --limit_gb is
compiled and not run. Variants run in turn, so that a slow moment of the machine hits all of them; results are written
into the memory of the call before, and times are medians. Ratios are to the first row.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from side_by_side import Program, measure, median

from moejax.ops import scan


def plain(u_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I):
    """jax.lax.associative_scan over the whole sequence."""
    decay_BLIN = jnp.exp(dt_BLI[..., None] * A_IN)
    drive_BLIN = (dt_BLI * u_BLI)[..., None] * B_BLN[:, :, None]
    compose = lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1])  # noqa: E731
    _, state_BLIN = jax.lax.associative_scan(compose, (decay_BLIN, drive_BLIN), axis=1)
    return jnp.einsum("blin,bln->bli", state_BLIN, C_BLN) + D_I * u_BLI


def draw(batch: int, length: int, inner: int, states: int) -> tuple[jax.Array, ...]:
    """Inputs as a new Mamba layer has them."""
    keys = jax.random.split(jax.random.key(0), 4)
    u_BLI = jax.random.normal(keys[0], (batch, length, inner))
    dt_BLI = jax.nn.softplus(jax.random.normal(keys[1], u_BLI.shape) - 3)
    A_IN = -jnp.broadcast_to(jnp.arange(1.0, states + 1), (inner, states))
    B_BLN, C_BLN = (jax.random.normal(key, (batch, length, states)) for key in keys[2:])
    return u_BLI, dt_BLI, A_IN, B_BLN, C_BLN, jnp.ones(inner)


def gradient(function: Callable) -> Callable:
    """Gradients of a loss that weighs every output differently, for all six inputs."""

    def loss(*inputs):
        y_BLI = function(*inputs)
        return jnp.sum(y_BLI * jnp.cos(y_BLI))

    return jax.grad(loss, argnums=tuple(range(6)))


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in (("batch", 4), ("states", 16), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--inner", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--chunks", type=int, nargs="*", default=[], help="chunk sizes beside the default")
    parser.add_argument("--limit_gb", type=float, default=12.0)
    a = parser.parse_args()

    def ours(**settings: Any) -> Callable:
        return lambda *inputs: scan.selective_scan(*inputs, **settings)[0]

    variants = {
        "ours": ours(),
        "ours, associative": ours(implementation="associative"),
        **{
            f"ours, {name[:5]} {chunk}": ours(implementation=name, chunk_size=chunk)
            for name in ("unrolled", "associative")
            for chunk in a.chunks
        },
        "associative_scan": plain,
        "lax.scan": ours(implementation="reference"),
    }
    print(
        f"B={a.batch} N={a.states}, on {jax.devices()[0].device_kind}, jax {jax.__version__}; ratios to the first row"
    )
    column = f"{'ms':>9}{'ratio':>7}{'MB':>9}{'ratio':>7}{'compile s':>11}"
    print(f"{'':<35}{'forward':^43}{'forward + backward':^43}\n{'I':>6}{'L':>7}  {'':<20}{column}{column}")
    for inner in a.inner:
        for length in a.lengths:
            inputs = draw(a.batch, length, inner, a.states)
            programs = {}
            for name, function in variants.items():
                programs[name] = [
                    Program(which, *inputs, limit_gb=a.limit_gb) for which in (function, gradient(function))
                ]
            measure([program for pair in programs.values() for program in pair], a.repeats)
            first = next(iter(programs.values()))
            for name, pair in programs.items():
                cells = "".join(_cells(program, base) for program, base in zip(pair, first, strict=True))
                print(f"{inner:>6}{length:>7}  {name:<20}{cells}", flush=True)
            del programs, first, pair  # their memory, before the next


def _cells(program: Program, base: Program) -> str:
    memory = f"{program.megabytes:>9,.0f}{program.megabytes / base.megabytes:>7.1f}{program.compile_seconds:>11.1f}"
    if not program.seconds:
        return f"{'not run':>9}{'-':>7}{memory}"
    seconds, least = median(program), median(base)
    return f"{1e3 * seconds:>9,.0f}{seconds / least:>7.1f}{memory}"


if __name__ == "__main__":
    main()
