"""The language model: embedding, a pattern of residual blocks, head. Decoder-only, or an encoder (model.causal).

B batch, L sequence, D model, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import config as config_lib
from moejax import partition
from moejax.layers import block, head, init, mamba_moe, moe, norm
from moejax.ops import expert_parallel


class Period(nnx.Module):
    """The blocks that repeat. In a model its parameters carry a leading dim over periods."""

    def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([block.Block(sublayer, config, rngs=rngs) for sublayer in config.period])

    def __call__(self, x_BLD: Array, **context: Any) -> tuple[Array, tuple[moe.MoeAux, ...]]:
        return _run(self.blocks, x_BLD, **context)


def _stack(config: config_lib.ModelConfig, *, rngs: nnx.Rngs) -> Period:
    """All periods in one: every parameter has a leading dim over them."""
    keys = jax.random.split(rngs.params(), config.num_periods)
    return jax.vmap(lambda key: Period(config, rngs=nnx.Rngs(params=key)))(keys)


class Lm(nnx.Module):
    """prefix + period * num_periods + suffix between a token embedding and a head.

    The periods are scanned, so the compiled program and its compile time do not grow with depth.

    __call__(tokens_BL) -> (logits_BLV float32, MoeAux stacked over MoE layers in depth order, or None without any).
    With a mixture of softmaxes the logits are the log-probabilities, which is as good: their logsumexp is 0.
    """

    def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.compute_dtype)
        self.dtype, self.remat, self.num_periods = dtype, config.remat, config.num_periods
        vocab, width = config.vocab_size, config.d_model
        scheme, scale = config.init, config.init_scale
        if scheme == "moe_mamba":
            embedding_VD = init.weight(rngs.params(), (vocab, width), scheme=scheme, scale=scale, fan_in=1)
        else:
            embedding_VD = config.embedding_std * jax.random.normal(rngs.params(), (vocab, width))
        self.embedding = nnx.Param(embedding_VD, axes=("vocab", "embed"))
        self.prefix = nnx.List([block.Block(sublayer, config, rngs=rngs) for sublayer in config.prefix])
        self.periods = _stack(config, rngs=rngs) if config.num_periods and config.period else None
        self.suffix = nnx.List([block.Block(sublayer, config, rngs=rngs) for sublayer in config.suffix])
        self.norm = norm.build(config.norm, width, eps=config.norm_eps, dtype=dtype) if config.final_norm else None
        self.head = (
            None
            if config.tie_embeddings
            else nnx.Param(
                init.weight(rngs.params(), (width, vocab), scheme=scheme, scale=scale), axes=("embed", "vocab")
            )
        )
        self.mixture = (
            head.MixtureOfSoftmaxes(
                width, num_softmaxes=config.num_softmaxes, scheme=scheme, init_scale=scale, dtype=dtype, rngs=rngs
            )
            if config.num_softmaxes > 1
            else None
        )

    def __call__(
        self,
        tokens_BL: Array,
        *,
        segment_ids_BL: Array | None = None,
        positions_BL: Array | None = None,
        labels_BL: Array | None = None,
        keys_B: Array | None = None,
        train: bool = False,
    ) -> tuple[Array, moe.MoeAux | None]:
        """Runs whole rows.

        Args:
          tokens_BL: int32 token ids.
          segment_ids_BL: which document of its row a token belongs to, from 1, in ascending order; 0 for padding.
            None: one a row.
          positions_BL: position inside the document, for rotary attention. None: 0, 1, ... L-1.
          labels_BL: label of the token's document, for router=label; -1 for none.
          keys_B: a random key a row, for the noise of routers and expert dropout; None for none.
          train: use the capacity factor of training rather than that of evaluation, and the noise.
        """
        context: dict[str, Any] = {
            "segment_ids_BL": segment_ids_BL,
            "positions_BL": positions_BL,
            "ids_BL": tokens_BL,
            "labels_BL": labels_BL,
            "train": train,
        }
        x_BLD = partition.constrain(self.embedding[...][tokens_BL], "BLD")
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
        moe_aux = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks) if stacks else None
        return self._logits(x_BLD), moe_aux

    def prefill(
        self, tokens_BL: Array, *, max_length: int, valid_BL: Array | None = None, labels_B: Array | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Reads prompts of any lengths: (logits_BV of the next token, the cache after the prompt).

        Args:
          tokens_BL: the prompts, padded on the left, on the right or both.
          max_length: positions that attention caches have room for: L and the tokens to come.
          valid_BL: False for padding, which nothing of a row feels; at least one token of a row is True. None: no
            padding.
          labels_B: of each row's document, for router=label.

        Raises:
          ValueError: L is over max_length in a model with attention; a router that looks ahead.
        """
        valid_BL = jnp.ones(tokens_BL.shape, bool) if valid_BL is None else valid_BL
        # Padding goes to the front: rows end together, and a row begins at a boundary between segments, where the
        # convolution, the scan and attention start afresh.
        order_BL = jnp.argsort(valid_BL, axis=1, stable=True)
        tokens_BL, valid_BL = (jnp.take_along_axis(x_BL, order_BL, axis=1) for x_BL in (tokens_BL, valid_BL))
        context: dict[str, Any] = {
            "max_length": max_length,
            "segment_ids_BL": valid_BL.astype(jnp.int32),
            "ids_BL": tokens_BL,
            "labels_BL": None if labels_B is None else jnp.broadcast_to(labels_B[:, None], tokens_BL.shape),
        }
        x_BLD = self.embedding[...][tokens_BL]
        x_BLD, prefix = _prefill(self.prefix, x_BLD, **context)
        cache: dict[str, Any] = {"prefix": prefix}
        if self.periods is not None:
            x_BLD, cache["periods"] = jax.lax.scan(
                lambda x_BLD, period: _prefill(period.blocks, x_BLD, **context), x_BLD, self.periods
            )
        x_BLD, cache["suffix"] = _prefill(self.suffix, x_BLD, **context)
        return self._logits(x_BLD[:, -1]), cache

    def init_cache(self, batch: int, max_length: int) -> dict[str, Any]:
        """What the model remembers of the tokens so far; max_length bounds the attention caches alone."""
        cache: dict[str, Any] = {
            "prefix": [layer.init_cache(batch, max_length) for layer in self.prefix],
            "suffix": [layer.init_cache(batch, max_length) for layer in self.suffix],
        }
        if self.periods is not None:
            # vmap over the stacked parameters gives every period a cache of its own
            cache["periods"] = jax.vmap(
                lambda period: [layer.init_cache(batch, max_length) for layer in period.blocks],
                axis_size=self.num_periods,
            )(self.periods)
        return cache

    def step(
        self, token_B: Array, cache: dict[str, Any], *, labels_B: Array | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """One token a row: (logits_BV of the next, the next cache). Nothing is dropped in MoE layers.

        The caller keeps within the max_length of the cache where the model has attention.

        labels_B: of each row's document, for router=label.
        """
        context = {"ids_B": token_B, "labels_B": labels_B}
        x_BD = self.embedding[...][token_B]
        x_BD, prefix = _step(self.prefix, x_BD, cache["prefix"], **context)
        new_cache: dict[str, Any] = {"prefix": prefix}
        if self.periods is not None:

            def step_period(x_BD: Array, inputs: tuple[Period, Any]) -> tuple[Array, Any]:
                period, caches = inputs
                return _step(period.blocks, x_BD, caches, **context)

            x_BD, new_cache["periods"] = jax.lax.scan(step_period, x_BD, (self.periods, cache["periods"]))
        x_BD, new_cache["suffix"] = _step(self.suffix, x_BD, cache["suffix"], **context)
        return self._logits(x_BD), new_cache

    def _logits(self, x_D: Array) -> Array:
        x_D = x_D.astype(self.dtype) if self.norm is None else self.norm(x_D)
        head_DV = self.embedding[...].T if self.head is None else self.head[...]
        if self.mixture is not None:
            return self.mixture(x_D, head_DV)
        return jnp.matmul(x_D, head_DV.astype(self.dtype), preferred_element_type=jnp.float32)


def abstract(config: config_lib.ModelConfig) -> Lm:
    """The model with shapes in place of arrays; nothing is allocated."""
    return jax.eval_shape(lambda: Lm(config, rngs=nnx.Rngs(params=0)))


def unstack(model: Lm) -> Lm:
    """The same function with every block's parameters in arrays of their own; call it under jit.

    A step that scans over periods first copies the parameters of each out of the stack, all experts among them, which
    costs far more than the step. The price: a second copy of the parameters, and a compile time that grows with depth.
    """
    flat, layers = jax.tree.map(lambda leaf: leaf, model), [*model.prefix]
    if model.periods is not None:
        for place in range(model.num_periods):
            layers += jax.tree.map(lambda leaf, place=place: leaf[place], model.periods).blocks
    flat.prefix, flat.periods, flat.suffix = nnx.List([*layers, *model.suffix]), None, nnx.List([])
    return flat


def moe_layers(model: Lm) -> Iterator[tuple[moe.Moe, Any]]:
    """Every MoE layer of the model, with its place in the depth order of a stacked MoeAux.

    Those inside a Mamba block come in the order conv, gate, out.
    The layers of the periods are stacked: there the parameters have a leading dim, and the place is a slice over it.
    """
    depth = 0
    for blocks, repeats in (
        (model.prefix, 0),
        (model.periods and model.periods.blocks, model.num_periods),
        (model.suffix, 0),
    ):
        layers = [inner for layer in blocks or () for branch in layer.branches for inner in _moes(branch)]
        for number, layer in enumerate(layers):
            yield (
                layer,
                slice(depth + number, depth + repeats * len(layers), len(layers)) if repeats else depth + number,
            )
        depth += len(layers) * (repeats or 1)


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


def _interleave(aux: tuple[moe.MoeAux, ...]) -> moe.MoeAux:
    """The MoE layers of a period, each stacked over periods -> one stack in depth order."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]), *aux)
