"""Decoding on this machine: time a token and bytes of cache of models of equal active parameters, at growing context.

    python scripts/bench_decode.py                                     # contexts 128 to 32k, batch 1 and 8
    python scripts/bench_decode.py --contexts 128 8192 --batches 1     # some of them

The models are those of MoE-Mamba's Table 1 (arXiv 2401.04081), at 25M active parameters without embedding and head:
Mamba, MoE-Mamba with 42 experts, Transformer. Weights are random. No prompt of that length is read: the cache is filled
with numbers and said to be so long, which gives the same times. Tokens are drawn as `moejax generate`
draws them, models and contexts in turn, so that a slow moment of the machine hits all; times are medians. The caches of
the Transformer take 11 GB at batch 8.
"""

import argparse
import functools
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from moejax import config as config_lib
from moejax.analysis import params
from moejax.layers import attention
from moejax.models import generate, lm
from moejax.models import model as model_lib

NAMES = ("Mamba", "MoE-Mamba", "Transformer")


def settings(name: str, vocab_size: int) -> config_lib.ModelConfig:
    """The model of Table 1; its layers all in the prefix, so that their parameters are not stacked."""
    config = config_lib.ModelConfig(vocab_size=vocab_size, d_model=512, norm="layernorm", num_periods=0)
    match name:
        case "Mamba":
            config.prefix = ("mamba",) * 16
        case "MoE-Mamba":
            config.prefix = ("mamba", "moe") * 8
            config.moe = config_lib.MoeConfig(router="switch", num_experts=42, d_expert=1536)
        case "Transformer":
            config.prefix = ("attention", "mlp") * 8
            config.mlp = config_lib.MlpConfig(d_ff=2048, bias=True)
    return config


def fill(shapes):
    """Noise in place of shapes."""
    values = 0.02 * np.random.default_rng(0).standard_normal(1_000_003, np.float32)  # then again from the first
    return jax.tree.map(lambda leaf: jnp.asarray(np.resize(values, leaf.shape), leaf.dtype), shapes)


@functools.partial(jax.jit, donate_argnums=0)  # in place: a Transformer's cache is most of the memory
def lengthen(state, context: int):
    """Numbers of size 0.1 in every cache, and `context` as the length of those of attention."""

    def numbers(leaf):
        return leaf + 0.1 * jnp.sin(jnp.arange(leaf.shape[-1], dtype=leaf.dtype))

    def longer(node):
        if not isinstance(node, attention.AttentionCache):
            return numbers(node)
        start_B, length = jnp.zeros_like(node.start_B), jnp.full_like(node.length, context)
        return attention.AttentionCache(numbers(node.key_BHMQ), numbers(node.value_BHMQ), start_B, length)

    is_attention = lambda node: isinstance(node, attention.AttentionCache)  # noqa: E731
    return state._replace(cache=jax.tree.map(longer, state.cache, is_leaf=is_attention))


def start(model: lm.Lm, batch: int, context: int, num_tokens: int) -> generate.Writer:
    """A writer whose cache says that `context` tokens have been read."""
    writer = generate.Writer(
        model,
        [[0]] * batch,
        jax.random.split(jax.random.key(0), batch),
        num_tokens=context + num_tokens,
        settings=generate.Settings(temperature=0.8, top_k=50),
        vocab_size=model.embedding.shape[0],
        end_of_text=-1,
    )
    writer.advance()  # the token drawn after the prompt

    writer.state = lengthen(writer.state, context)
    return writer


def seconds_a_token(writer: generate.Writer, num_tokens: int) -> float:
    """Of one call of the device that draws so many tokens a row."""
    begin = time.perf_counter()
    tokens_BC = writer.advance(num_tokens)
    return (time.perf_counter() - begin) / tokens_BC.shape[1]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=(128, 1024, 8192, 32_768))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--vocab_size", type=int, default=50_257)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    models = {}
    for name in arguments.models:
        config = settings(name, arguments.vocab_size)
        counts = params.count(config)
        millions = {key: f"{counts[key] / 1e6:.1f}M" for key in ("non_embedding_active", "non_embedding_total")}
        print(
            f"{name}: {millions['non_embedding_active']} active, {millions['non_embedding_total']} in all", flush=True
        )
        models[name] = fill(model_lib.abstract(config))
    print(f"\n{'model':<12}{'batch':>6}{'context':>9}{'ms/step':>10}{'tokens/s':>10}{'cache MB a row':>16}", flush=True)
    room = generate.CHUNK * (arguments.rounds + 1)
    times = {}
    for batch in arguments.batches:
        cases = list(itertools.product(arguments.contexts, models))
        writers = {case: start(models[case[1]], batch, case[0], room) for case in cases}
        num_tokens = {case: min(generate.CHUNK, 1 + int(1 / seconds_a_token(writers[case], 1))) for case in cases}
        rounds = [
            {case: seconds_a_token(writers[case], num_tokens[case]) for case in cases} for _ in range(arguments.rounds)
        ]
        for context, name in cases:
            seconds = statistics.median(measured[context, name] for measured in rounds)
            times[name, batch, context] = seconds
            megabytes = generate.cache_size(models[name], context).num_bytes / 1e6
            print(
                f"{name:<12}{batch:>6}{context:>9,}{1000 * seconds:>10.2f}{batch / seconds:>10.1f}{megabytes:>16.2f}",
                flush=True,
            )
    shortest, longest = min(arguments.contexts), max(arguments.contexts)
    for batch, name in itertools.product(arguments.batches, arguments.models):
        growth = times[name, batch, longest] / times[name, batch, shortest]
        print(f"batch {batch}: {name} takes {growth:.2f} times as long a token at {longest:,} as at {shortest:,}")
        if name != "Transformer" and "Transformer" in models:
            faster = times["Transformer", batch, longest] / times[name, batch, longest]
            print(f"batch {batch}: {name} is {faster:.1f} times as fast as Transformer at {longest:,}")


if __name__ == "__main__":
    main()
