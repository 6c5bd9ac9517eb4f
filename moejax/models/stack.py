"""A stack of residual blocks, which every model is made of: prefix + period * num_periods + suffix, and a last norm.

B batch, L sequence, M memory length, D model.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import config as config_lib
from moejax import partition
from moejax.layers import attention, block, init, mamba_moe, moe, norm
from moejax.ops import dropout, expert_parallel


class Period(nnx.Module):
    """The blocks that repeat. In a stack its parameters carry a leading dim over periods."""

    def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([block.Block(sublayer, config, rngs=rngs) for sublayer in config.period])

    def __call__(self, x_BLD: Array, **context: Any) -> tuple[Array, tuple[moe.MoeAux, ...]]:
        return _run(self.blocks, x_BLD, **context)


def _periods(config: config_lib.ModelConfig, *, rngs: nnx.Rngs) -> Period:
    """All periods in one: every parameter has a leading dim over them."""
    keys = jax.random.split(rngs.params(), config.num_periods)
    return jax.vmap(lambda key: Period(config, rngs=nnx.Rngs(params=key)))(keys)


class Stack(nnx.Module):
    """prefix + period * num_periods + suffix, and the norm after them.

    The periods are scanned, so the compiled program and its compile time do not grow with depth.
    """

    def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.compute_dtype)
        self.remat, self.num_periods, self.dropout = config.remat, config.num_periods, config.dropout
        self.prefix = nnx.List([block.Block(sublayer, config, rngs=rngs) for sublayer in config.prefix])
        self.periods = _periods(config, rngs=rngs) if config.num_periods and config.period else None
        self.suffix = nnx.List([block.Block(sublayer, config, rngs=rngs) for sublayer in config.suffix])
        self.norm = (
            norm.build(config.norm, config.d_model, eps=config.norm_eps, dtype=self.dtype)
            if config.final_norm
            else None
        )
        relative, c = None, config.attention
        if c.position == "relative" and any("attention" in sublayer.split("|") for sublayer in config.sublayers):
            relative = attention.RelativeBias(
                num_heads=c.num_heads,
                num_buckets=c.num_buckets,
                max_distance=c.max_distance,
                causal=config.causal,
                scheme=config.init,
                init_scale=config.init_scale,
                d_model=config.d_model,
                rngs=rngs,
            )
        self.relative = relative

    def run(
        self, x_BLD: Array, *, keys_B: Array | None = None, train: bool = False, **context: Any
    ) -> tuple[Array, moe.MoeAux | None]:
        """Runs whole rows: (normed y_BLD, MoeAux stacked over MoE layers in depth order, or None without any).

        Args:
          x_BLD: embedded tokens.
          keys_B: a random key a row, for the noise of routers and dropout; None for none.
          train: use the capacity factor of training rather than that of evaluation, and the noise.
          context: the other arguments of `block.Block`, the same for every block.
        """
        context |= {"train": train, "bias_HLM": None if self.relative is None else self.relative(x_BLD.shape[1])}
        drop_keys_B = keys_B if train else None
        x_BLD = dropout.dropout(x_BLD, block.fold_in(drop_keys_B, 3) if self.dropout else None, self.dropout)
        x_BLD, aux = _run(self.prefix, x_BLD, keys_B=block.fold_in(keys_B, 0), **context)
        stacks = [jax.tree.map(lambda leaf: leaf[None], layer) for layer in aux]
        if self.periods is not None:
            keys_period_B = block.fold_in(keys_B, 1)

            def run_period(x_BLD: Array, inputs: tuple[Period, Array]) -> tuple[Array, tuple[moe.MoeAux, ...]]:
                period, place = inputs
                return period(x_BLD, keys_B=block.fold_in(keys_period_B, place), **context)

            if self.remat == "period":
                keep = jax.checkpoint_policies.save_only_these_names(expert_parallel.RECEIVED)
                run_period = jax.checkpoint(run_period, policy=keep)
            x_BLD, aux = jax.lax.scan(run_period, x_BLD, (self.periods, jnp.arange(self.num_periods)))
            if aux:
                stacks.append(_interleave(aux))
        x_BLD, aux = _run(self.suffix, x_BLD, keys_B=block.fold_in(keys_B, 2), **context)
        stacks += [jax.tree.map(lambda leaf: leaf[None], layer) for layer in aux]
        y_BLD = dropout.dropout(
            self.normed(x_BLD), block.fold_in(drop_keys_B, 4) if self.dropout else None, self.dropout
        )
        return y_BLD, concatenate(stacks)

    def prefill_blocks(self, x_BLD: Array, **context: Any) -> tuple[Array, dict[str, Any]]:
        """Rows with nothing dropped: (x_BLD, not normed, and the cache after the last position).

        context: the other arguments of `block.Block.prefill`.
        """
        context["bias_HLM"] = None if self.relative is None else self.relative(x_BLD.shape[1])
        x_BLD, prefix = _prefill(self.prefix, x_BLD, **context)
        cache: dict[str, Any] = {"prefix": prefix}
        if self.periods is not None:
            x_BLD, cache["periods"] = jax.lax.scan(
                lambda x_BLD, period: _prefill(period.blocks, x_BLD, **context), x_BLD, self.periods
            )
        x_BLD, cache["suffix"] = _prefill(self.suffix, x_BLD, **context)
        return x_BLD, cache

    def init_cache(self, batch: int, max_length: int, memory: attention.Memory | None = None) -> dict[str, Any]:
        """What the blocks remember of the tokens so far, and of the memory that cross attention looks at.

        max_length bounds the caches of attention alone.
        """
        cache: dict[str, Any] = {
            "prefix": [layer.init_cache(batch, max_length, memory) for layer in self.prefix],
            "suffix": [layer.init_cache(batch, max_length, memory) for layer in self.suffix],
        }
        if self.periods is not None:
            # vmap over the stacked parameters gives every period a cache of its own
            cache["periods"] = jax.vmap(
                lambda period: [layer.init_cache(batch, max_length, memory) for layer in period.blocks],
                axis_size=self.num_periods,
            )(self.periods)
        return cache

    def step_blocks(self, x_BD: Array, cache: dict[str, Any], **context: Any) -> tuple[Array, dict[str, Any]]:
        """One position: (x_BD, not normed, and the next cache). context: the other arguments of `block.Block.step`."""
        context["relative"] = self.relative
        x_BD, prefix = _step(self.prefix, x_BD, cache["prefix"], **context)
        new_cache: dict[str, Any] = {"prefix": prefix}
        if self.periods is not None:

            def step_period(x_BD: Array, inputs: tuple[Period, Any]) -> tuple[Array, Any]:
                period, caches = inputs
                return _step(period.blocks, x_BD, caches, **context)

            x_BD, new_cache["periods"] = jax.lax.scan(step_period, x_BD, (self.periods, cache["periods"]))
        x_BD, new_cache["suffix"] = _step(self.suffix, x_BD, cache["suffix"], **context)
        return x_BD, new_cache

    def normed(self, x_D: Array) -> Array:
        """After the last norm, if there is one."""
        return x_D.astype(self.dtype) if self.norm is None else self.norm(x_D)


def unstack(stack: Stack) -> None:
    """Gives every block parameters in arrays of their own, in place: the same function. Call it under jit.

    A step that scans over periods first copies the parameters of each out of the stack, all experts among them, which
    costs far more than the step. The price: a second copy of the parameters, and a compile time that grows with depth.
    """
    layers = [*stack.prefix]
    if stack.periods is not None:
        for place in range(stack.num_periods):
            layers += jax.tree.map(lambda leaf, place=place: leaf[place], stack.periods).blocks
    stack.prefix, stack.periods, stack.suffix = nnx.List([*layers, *stack.suffix]), None, nnx.List([])


def embedding(config: config_lib.ModelConfig, *, rngs: nnx.Rngs) -> nnx.Param:
    """The vectors of the vocabulary."""
    shape = config.vocab_size, config.d_model
    if config.init == "moe_mamba":
        drawn_VD = init.weight(rngs.params(), shape, scheme=config.init, scale=config.init_scale, fan_in=1)
    else:
        drawn_VD = config.embedding_std * jax.random.normal(rngs.params(), shape)
    return nnx.Param(drawn_VD, axes=("vocab", "embed"))


def head(config: config_lib.ModelConfig, *, rngs: nnx.Rngs) -> nnx.Param | None:
    """The product with the vocabulary, (D, V); None where it is the embedding."""
    if config.tie_embeddings:
        return None
    shape = config.d_model, config.vocab_size
    drawn_DV = init.weight(rngs.params(), shape, scheme=config.init, scale=config.init_scale)
    return nnx.Param(drawn_DV, axes=("embed", "vocab"))


def logits(normed_D: Array, embedding_VD: Array, head: nnx.Param | None, *, scale: bool) -> Array:
    """The product of a stack's output with the vocabulary, float32, over any leading dims.

    scale: of a tied head: by D^-0.5, in float32 (T5 1.0; Mesh TensorFlow scales the output of the stack).
    """
    if head is not None:
        return jnp.matmul(normed_D, head[...].astype(normed_D.dtype), preferred_element_type=jnp.float32)
    logits_V = jnp.matmul(normed_D, embedding_VD.T.astype(normed_D.dtype), preferred_element_type=jnp.float32)
    return logits_V * embedding_VD.shape[1] ** -0.5 if scale else logits_V


def moe_layers(stack: Stack, first: int = 0) -> Iterator[tuple[moe.Moe, Any]]:
    """Every MoE layer of the stack, with its place in the depth order of a stacked MoeAux, counted from `first`.

    Those inside a Mamba block come in the order conv, gate, out.
    The layers of the periods are stacked: there the parameters have a leading dim, and the place is a slice over it.
    """
    depth = first
    for blocks, repeats in (
        (stack.prefix, 0),
        (stack.periods and stack.periods.blocks, stack.num_periods),
        (stack.suffix, 0),
    ):
        layers = [inner for layer in blocks or () for branch in layer.branches for inner in _moes(branch)]
        for number, layer in enumerate(layers):
            yield (
                layer,
                slice(depth + number, depth + repeats * len(layers), len(layers)) if repeats else depth + number,
            )
        depth += len(layers) * (repeats or 1)


def num_moe_layers(stack: Stack) -> int:
    """How many there are, each period's counted."""
    return sum(stack.num_periods if isinstance(place, slice) else 1 for _, place in moe_layers(stack))


def _moes(branch: nnx.Module) -> list[moe.Moe]:
    match branch:
        case moe.Moe():
            return [branch]
        case mamba_moe.MambaMoe():
            return branch.moes
    return []


def _run(
    blocks: nnx.List, x_BLD: Array, *, keys_B: Array | None = None, **context: Any
) -> tuple[Array, tuple[moe.MoeAux, ...]]:
    collected: list[moe.MoeAux] = []
    for place, layer in enumerate(blocks):
        x_BLD, aux = layer(x_BLD, keys_B=block.fold_in(keys_B, place), **context)
        x_BLD = partition.constrain(x_BLD, "BLD")
        collected += aux
    return x_BLD, tuple(collected)


def _prefill(blocks: nnx.List, x_BLD: Array, **context: Any) -> tuple[Array, list[Any]]:
    caches = []
    for layer in blocks:
        x_BLD, layer_caches = layer.prefill(x_BLD, **context)
        caches.append(layer_caches)
    return x_BLD, caches


def _step(blocks: nnx.List, x_BD: Array, caches: list[Any], **context: Any) -> tuple[Array, list[Any]]:
    new_caches = []
    for layer, layer_caches in zip(blocks, caches, strict=True):
        x_BD, layer_caches = layer.step(x_BD, layer_caches, **context)
        new_caches.append(layer_caches)
    return x_BD, new_caches


def concatenate(stacks: list[moe.MoeAux]) -> moe.MoeAux | None:
    """The layers of each one after another; None without any."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks) if stacks else None


def _interleave(aux: tuple[moe.MoeAux, ...]) -> moe.MoeAux:
    """The MoE layers of a period, each stacked over periods -> one stack in depth order."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]), *aux)
