"""The encoder-decoder of T5 (Raffel et al. 2020, arXiv 1910.10683) and, with experts, Switch Transformers (2101.03961).

B batch, L encoder length, M decoder length, D model, V vocabulary.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import config as config_lib
from moejax import partition
from moejax.layers import attention, block, moe
from moejax.models import stack


class EncoderDecoder(nnx.Module):
    """Two stacks that share an embedding; the decoder's cross attention looks at what the encoder has read.

    __call__(encoder_inputs_BL, decoder_inputs_BM) -> (logits_BMV float32, MoeAux stacked over MoE layers in depth
    order, those of the encoder first, or None without any).
    """

    def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
        self.scale_logits = config.scale_tied_logits
        self.group_size = config.moe.group_size
        self.embedding = stack.embedding(config, rngs=rngs)
        self.encoder = stack.Stack(config.encoder(), rngs=rngs)
        self.decoder = stack.Stack(config, rngs=rngs)
        self.head = stack.head(config, rngs=rngs)

    def __call__(
        self,
        encoder_inputs_BL: Array,
        decoder_inputs_BM: Array,
        *,
        encoder_segment_ids_BL: Array | None = None,
        decoder_segment_ids_BM: Array | None = None,
        keys_B: Array | None = None,
        train: bool = False,
    ) -> tuple[Array, moe.MoeAux | None]:
        """Runs whole rows.

        Args:
          encoder_inputs_BL: int32 token ids.
          decoder_inputs_BM: int32 token ids, the targets one place later.
          encoder_segment_ids_BL: which example of its row a token belongs to, from 1; 0 for padding. None: one a row.
          decoder_segment_ids_BM: the same; a token sees its own example in both stacks.
          keys_B: a random key a row, for the noise of routers and dropout; None for none.
          train: use the capacity factor of training rather than that of evaluation, and the noise.

        Returns:
          logits_BMV, and MoeAux; its preferred_BL has the positions of the encoder and then those of the decoder, and
          -1 where they are of the other stack than the layer.

        Raises:
          ValueError: a routing group is not whole rows.
        """
        encoder_length, decoder_length = encoder_inputs_BL.shape[1], decoder_inputs_BM.shape[1]
        rows, rest = divmod(self.group_size or encoder_length, encoder_length)
        if rest:
            raise ValueError(f"group_size={self.group_size} is not whole rows of {encoder_length} tokens; change it")
        keys_encoder_B, keys_decoder_B = (block.fold_in(keys_B, which) for which in (0, 1))
        memory_BLD, encoder_aux = self.encoder.run(
            self._embed(encoder_inputs_BL),
            segment_ids_BL=encoder_segment_ids_BL,
            ids_BL=encoder_inputs_BL,
            group_size=rows * encoder_length,
            keys_B=keys_encoder_B,
            train=train,
        )
        normed_BMD, decoder_aux = self.decoder.run(
            self._embed(decoder_inputs_BM),
            memory=attention.Memory(memory_BLD, encoder_segment_ids_BL),
            segment_ids_BL=decoder_segment_ids_BM,
            ids_BL=decoder_inputs_BM,
            group_size=rows * decoder_length,
            keys_B=keys_decoder_B,
            train=train,
        )
        return self._logits(normed_BMD), _join(encoder_aux, decoder_aux, encoder_length, decoder_length)

    def prefill(
        self, tokens_BL: Array, *, start_B: Array, max_length: int, valid_BL: Array | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Reads inputs of any lengths and starts their targets: (logits_BV of the first target, the cache).

        Nothing is dropped in MoE layers, here as in `step`.

        Args:
          tokens_BL: the inputs, padded on the right.
          start_B: the token before the first target.
          max_length: targets that attention caches have room for.
          valid_BL: False for padding. None: no padding.

        Raises:
          ValueError: a router that looks at all tokens of a group.
        """
        segment_ids_BL = jnp.ones(tokens_BL.shape, jnp.int32) if valid_BL is None else valid_BL.astype(jnp.int32)
        x_BLD, _ = self.encoder.prefill_blocks(
            self._embed(tokens_BL), max_length=tokens_BL.shape[1], segment_ids_BL=segment_ids_BL, ids_BL=tokens_BL
        )
        memory = attention.Memory(self.encoder.normed(x_BLD), segment_ids_BL)
        return self.step(start_B, self.decoder.init_cache(len(tokens_BL), max_length, memory))

    def init_cache(self, batch: int, max_length: int) -> dict[str, Any]:
        """Of inputs of max_length tokens that are all zeros, before the first target; for its shapes."""
        width = self.embedding.shape[1]
        memory = attention.Memory(
            jnp.zeros((batch, max_length, width), self.encoder.dtype), jnp.ones((batch, max_length), jnp.int32)
        )
        return self.decoder.init_cache(batch, max_length, memory)

    def step(self, token_B: Array, cache: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        """One target a row: (logits_BV of the next, the next cache).

        The caller keeps within the max_length of the cache.
        """
        x_BD, cache = self.decoder.step_blocks(self.embedding[...][token_B], cache, ids_B=token_B)
        return self._logits(self.decoder.normed(x_BD)), cache

    def _logits(self, normed_D: Array) -> Array:
        return stack.logits(normed_D, self.embedding[...], self.head, scale=self.scale_logits)

    def _embed(self, tokens_BL: Array) -> Array:
        return partition.constrain(self.embedding[...][tokens_BL], "BLD")


def _join(
    encoder: moe.MoeAux | None, decoder: moe.MoeAux | None, encoder_length: int, decoder_length: int
) -> moe.MoeAux | None:
    """The layers of both stacks one after another."""

    def widen(aux: moe.MoeAux, before: int, after: int) -> moe.MoeAux:
        assert aux.preferred_BL is not None
        preferred_BL = jnp.pad(aux.preferred_BL, ((0, 0), (0, 0), (before, after)), constant_values=-1)
        return aux._replace(preferred_BL=preferred_BL)

    parts = [] if encoder is None else [widen(encoder, 0, decoder_length)]
    parts += [] if decoder is None else [widen(decoder, encoder_length, 0)]
    return stack.concatenate(parts)
