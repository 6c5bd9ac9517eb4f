"""The model that a config describes, whichever it is."""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from moejax import config as config_lib
from moejax.layers import moe
from moejax.models import encoder_decoder, lm, stack

Model = lm.Lm | encoder_decoder.EncoderDecoder


def build(config: config_lib.ModelConfig, *, rngs: nnx.Rngs) -> Model:
    """A new model."""
    return (encoder_decoder.EncoderDecoder if config.has_encoder else lm.Lm)(config, rngs=rngs)


def abstract(config: config_lib.ModelConfig) -> Model:
    """The model with shapes in place of arrays; nothing is allocated."""
    return jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(params=0)))


def stacks(model: Model) -> tuple[stack.Stack, ...]:
    """In the order of a MoeAux: of an encoder-decoder, the encoder first."""
    return (model.encoder, model.decoder) if isinstance(model, encoder_decoder.EncoderDecoder) else (model,)


def unstack(model: Model) -> Model:
    """The same function, quicker to step; see `stack.unstack`. Call it under jit."""
    flat = jax.tree.map(lambda leaf: leaf, model)
    stack.unstack(stacks(flat)[-1])
    return flat


def moe_layers(model: Model) -> Iterator[tuple[moe.Moe, Any]]:
    """Every MoE layer of the model, with its place in a stacked MoeAux; see `stack.moe_layers`."""
    first = 0
    for one in stacks(model):
        yield from stack.moe_layers(one, first)
        first += stack.num_moe_layers(one)
