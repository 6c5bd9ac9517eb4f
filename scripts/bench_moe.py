"""Time and memory of a MoE layer on this machine beside a dense FFN of equal active FLOPs, side by side in one run.

    python scripts/bench_moe.py                                  # T=4096, D=512, F=1536; E=1, 8, 32, 128; K=1, 2
    python scripts/bench_moe.py --experts=32 --choices=1         # one setting
    python scripts/bench_moe.py --profile                        # what the matrix products of the experts take alone
    python scripts/bench_moe.py --write_rules                    # measures what dispatch=auto goes by, and writes it

Rows: the dense FFN, our layer with capacity slots (capacity factor 1) and dropless, the same with jax.lax.ragged_dot,
the one-hot einsum of Mesh-TensorFlow, and Hugging Face's Mixtral block in torch if both are installed (its experts are
SwiGLU of the same FLOPs). Our layer is the product's, with its router, balance loss and statistics. The variants run in
turn, so that a slow moment of the machine hits all of them; times are medians. Results are written into the memory of
the previous call, as a train step writes its new state over the old: on fresh memory, page faults would be a large
part of every time, and the larger the more experts. Temporary memory is what the compiled program reserves.
"""

import argparse
import functools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from side_by_side import Program, measure, median

from moejax import config as config_lib
from moejax.layers import moe
from moejax.ops import dispatch_rules, experts, routing


def dense(weights: dict[str, jax.Array], x_TD: jax.Array) -> jax.Array:
    """Every token through one FFN."""
    return jax.nn.relu(x_TD @ weights["up"]) @ weights["down"]


def one_hot(weights: dict[str, jax.Array], x_TD: jax.Array, *, k: int) -> jax.Array:
    """Dispatch and combine as products with T x E x C arrays (GShard, arXiv 2006.16668, algorithm 2)."""
    num_experts = weights["router"].shape[1]
    capacity = x_TD.shape[0] * k // num_experts
    assignment = routing.top_k(x_TD @ weights["router"], k=k)
    chosen_TKE = jax.nn.one_hot(assignment.expert_TK, num_experts)
    place_TKE = (jnp.cumsum(chosen_TKE.reshape(-1, num_experts), axis=0) - 1).reshape(chosen_TKE.shape)
    place_TK = (place_TKE * chosen_TKE).sum(axis=-1).astype(jnp.int32)
    slot_TKC = jax.nn.one_hot(place_TK, capacity)
    mask_TEC = jnp.einsum("tke,tkc->tec", chosen_TKE, slot_TKC)
    combine_TEC = jnp.einsum("tke,tkc,tk->tec", chosen_TKE, slot_TKC, assignment.gate_TK)
    x_ECD = jnp.einsum("tec,td->ecd", mask_TEC, x_TD)
    of_experts = experts.Weights(weights["up"], weights["down"])
    y_ECD = experts.capacity_ffn(x_ECD.reshape(-1, x_ECD.shape[-1]), of_experts, activation="relu")
    return jnp.einsum("tec,ecd->td", combine_TEC, y_ECD.reshape(x_ECD.shape))


def layer(
    a: argparse.Namespace, num_experts: int, k: int, *, capacity_factor: float = 1.0, **settings: Any
) -> tuple[Any, Callable]:
    """(parameters, function) of our layer."""
    c = config_lib.MoeConfig(
        num_experts=num_experts,
        d_expert=a.hidden,
        top_k=k,
        capacity_factor=capacity_factor,
        group_size=a.tokens,
        **settings,
    )
    make = lambda: moe.Moe(a.width, c, init_scale=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(params=0))  # noqa: E731
    structure, params = nnx.split(jax.jit(make)())

    def run(params: Any, x_TD: jax.Array) -> jax.Array:
        y_1TD, aux = nnx.merge(structure, params)(x_TD[None], train=True)
        # the statistics of a train step are part of its work
        extra = sum(jnp.sum(leaf).astype(jnp.float32) for leaf in jax.tree.leaves((aux.count_E, aux.together_EE)))
        return y_1TD[0] + aux.losses["balance"] + 0.0 * extra + 0.0 * aux.entropy

    return params, run


class TorchMixtral:
    """transformers' block, forward or forward and backward."""

    def __init__(self, a: argparse.Namespace, num_experts: int, k: int, *, backward: bool):
        import torch
        from transformers.models.mixtral import configuration_mixtral, modeling_mixtral

        torch.manual_seed(0)
        c = configuration_mixtral.MixtralConfig(
            hidden_size=a.width,
            intermediate_size=2 * a.hidden // 3,  # three matrices an expert in place of two
            num_local_experts=num_experts,
            num_experts_per_tok=k,
        )
        self._block = modeling_mixtral.MixtralSparseMoeBlock(c)
        for parameter in self._block.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        self._x = torch.randn(1, a.tokens, a.width, requires_grad=True)
        self._backward = backward
        self.megabytes, self.seconds = float("nan"), []

    def run(self) -> None:
        """Once, and notes the time."""
        begin = time.perf_counter()
        y = self._block(self._x)
        y = y[0] if isinstance(y, tuple) else y
        if self._backward:
            (y**2).sum().backward()
        self.seconds.append(time.perf_counter() - begin)


def gradient(function: Callable) -> Callable:
    """Forward and backward, of parameters and input."""
    return jax.grad(lambda params, x: jnp.sum(function(params, x) ** 2), argnums=(0, 1))


def variants(a: argparse.Namespace, num_experts: int, k: int) -> dict[str, tuple[Any, Callable]]:
    """name -> (parameters, function)."""
    keys = jax.random.split(jax.random.key(1), 3)
    shared = {
        "up": 0.02 * jax.random.normal(keys[0], (a.width, k * a.hidden)),
        "down": 0.02 * jax.random.normal(keys[1], (k * a.hidden, a.width)),
    }
    found: dict[str, tuple[Any, Callable]] = {
        "dense FFN": (shared, dense),
        "capacity": layer(a, num_experts, k, dispatch="capacity"),
        "dropless": layer(a, num_experts, k, dispatch="dropless"),
        "ragged_dot": layer(a, num_experts, k, dispatch="dropless", grouped_matmul="ragged_dot"),
    }
    params, _ = found["capacity"]
    weights = {
        "router": params["router"]["weight"][...], "up": params["up"][...], "down": params["down"][...],
    }  # fmt: skip
    found["one-hot einsum"] = (weights, functools.partial(one_hot, k=k))
    return {name: variant for name, variant in found.items() if name not in a.without}


def table(a: argparse.Namespace) -> None:
    """Measures and prints the table."""
    try:
        import torch
        import transformers  # noqa: F401

        has_torch = not a.no_torch
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    except ImportError:
        has_torch = False
    x_TD = jax.random.normal(jax.random.key(0), (a.tokens, a.width))
    print(f"T={a.tokens} D={a.width} F={a.hidden} on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'':>4}{'':>4}  {'':<16}{'forward':>18}{'':>9}  {'forward + backward':>20}{'':>9}")
    print(f"{'E':>4}{'K':>4}  {'':<16}{'ms':>9}{'x dense':>9}{'MB':>9}{'ms':>13}{'x dense':>9}{'MB':>9}")
    for k in a.choices:
        for num_experts in a.experts:
            if k > num_experts:
                continue
            programs: dict[tuple[str, bool], Any] = {}
            for name, (params, function) in variants(a, num_experts, k).items():
                programs[name, False] = Program(function, params, x_TD, limit_gb=a.limit_gb)
                programs[name, True] = Program(gradient(function), params, x_TD, limit_gb=a.limit_gb)
            if has_torch:
                for backward in (False, True):
                    programs["torch Mixtral", backward] = TorchMixtral(a, num_experts, k, backward=backward)
            measure(programs.values(), a.repeats)
            for name in dict.fromkeys(name for name, _ in programs):
                cells = ""
                for backward in (False, True):
                    program = programs[name, backward]
                    seconds = median(program)
                    ratio = seconds / median(programs["dense FFN", backward])
                    megabytes = f"{program.megabytes:,.0f}" if program.megabytes == program.megabytes else "-"
                    cells += f"{1e3 * seconds:>{13 if backward else 9}.0f}{ratio:>9.2f}{megabytes:>9}"
                print(f"{num_experts:>4}{k:>4}  {name:<16}{cells}", flush=True)


def profile(a: argparse.Namespace) -> None:
    """Times of the products of the experts alone, on slots that are there already, and of everything around them.

    The products of E experts with T / E tokens each have the FLOPs of the dense FFN's, but read E matrices, and write
    as many gradients.
    """
    products = {
        "x up": "ecd,edf->ecf", "hidden down": "ecf,efd->ecd", "dhidden up^T": "ecf,edf->ecd",
        "dy down^T": "ecd,efd->ecf", "dup": "ecd,ecf->edf", "ddown": "ecf,ecd->efd",
    }  # fmt: skip
    x_TD = jax.random.normal(jax.random.key(0), (a.tokens, a.width))
    print(f"K=1, ms; T={a.tokens} D={a.width} F={a.hidden} on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("".join(f"{head:>14}" for head in ("E", "MB of weights", *products, "their sum", "layer f+b", "the rest")))
    for num_experts in a.experts:
        size = {"e": num_experts, "c": a.tokens // num_experts, "d": a.width, "f": a.hidden}
        programs: dict[Any, Any] = {}
        for name, product in products.items():
            operands = [jnp.ones([size[dim] for dim in operand]) for operand in product.partition("->")[0].split(",")]
            programs[name] = Program(functools.partial(jnp.einsum, product), *operands, limit_gb=a.limit_gb)
        params, function = layer(a, num_experts, 1, dispatch="capacity")
        programs["layer"] = Program(gradient(function), params, x_TD, limit_gb=a.limit_gb)
        for program in programs.values():  # fresh memory makes a first run slow, whatever the product
            program.run()
            program.seconds.clear()
        measure(programs.values(), a.repeats)
        times = {name: 1e3 * median(program) for name, program in programs.items()}
        whole = times.pop("layer")
        megabytes = 8e-6 * num_experts * a.width * a.hidden
        cells = (num_experts, megabytes, *times.values(), sum(times.values()), whole, whole - sum(times.values()))
        print("".join(f"{cell:>14,.0f}" for cell in cells), flush=True)


def write_rules(a: argparse.Namespace) -> None:
    """Measures both choices of dispatch=auto, forward and backward, and writes them down for this platform."""
    x_TD = jax.random.normal(jax.random.key(0), (a.tokens, a.width))
    platform = jax.default_backend()

    def seconds(**settings: dict[str, Any]) -> dict[str, float]:
        programs = {}
        for name, setting in settings.items():
            params, function = layer(a, **setting)
            programs[name] = Program(gradient(function), params, x_TD, limit_gb=a.limit_gb)
        measure(programs.values(), a.repeats)
        return {name: median(program) for name, program in programs.items()}

    of = {"num_experts": 32, "k": 1, "dispatch": "dropless"}
    grouped = seconds(blocked=of | {"grouped_matmul": "blocked"}, ragged_dot=of | {"grouped_matmul": "ragged_dot"})
    fastest = min(grouped, key=lambda name: grouped[name])
    print(f"{platform}: E=32, K=1, dropless: " + ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in grouped.items()))
    limit = 0.0
    for num_experts, k in ((2, 2), (4, 3), (3, 2), (2, 1), (3, 1), (4, 1)):
        of = {"num_experts": num_experts, "k": k}
        both = seconds(
            full=of | {"dispatch": "capacity", "capacity_factor": 0.0},
            dropless=of | {"dispatch": "dropless", "grouped_matmul": fastest},
        )
        print(f"E={num_experts} K={k}: " + ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in both.items()))
        if both["full"] > both["dropless"]:
            break
        limit = num_experts / k
    rules = dict(dispatch_rules.RULES)
    rules[platform] = dispatch_rules.Rule(limit, fastest, f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    path = pathlib.Path(dispatch_rules.__file__)
    head = path.read_text().partition("RULES = {")[0]
    lines = [
        f'    "{name}": Rule(full_capacity={r.full_capacity:.2f}, grouped_matmul="{r.grouped_matmul}", '
        f'measured="{r.measured}"),\n'
        for name, r in rules.items()
    ]
    path.write_text(f"{head}RULES = {{\n{''.join(lines)}}}\n")
    print(f"{path}: up to {limit:.2f} experts a choice every expert gets a slot for every token; {fastest}")


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in (("tokens", 4096), ("width", 512), ("hidden", 1536), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--choices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--limit_gb", type=float, default=12.0, help="what reserves more is compiled, and not run")
    parser.add_argument("--without", nargs="*", default=[], help="rows to leave out, e.g. ragged_dot")
    parser.add_argument("--no_torch", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--write_rules", action="store_true")
    a = parser.parse_args()
    (write_rules if a.write_rules else profile if a.profile else table)(a)


if __name__ == "__main__":
    main()
