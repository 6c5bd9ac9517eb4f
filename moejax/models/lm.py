"""The language model of one stack: embedding, residual blocks, head. Decoder-only, or an encoder (model.causal).

B batch, L sequence, D model, V vocabulary.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import config as config_lib
from moejax import partition
from moejax.layers import head, moe
from moejax.models import stack


class Lm(stack.Stack):
    """prefix + period * num_periods + suffix between a token embedding and a head.

    __call__(tokens_BL) -> (logits_BLV float32, MoeAux stacked over MoE layers in depth order, or None without any).
    With a mixture of softmaxes the logits are the log-probabilities, which is as good: their logsumexp is 0.
    """

    def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = stack.embedding(config, rngs=rngs)
        super().__init__(config, rngs=rngs)
        self.scale_logits = config.scale_tied_logits
        self.head = stack.head(config, rngs=rngs)
        self.mixture = (
            head.MixtureOfSoftmaxes(
                config.d_model,
                num_softmaxes=config.num_softmaxes,
                scheme=config.init,
                init_scale=config.init_scale,
                dtype=self.dtype,
                rngs=rngs,
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
          keys_B: a random key a row, for the noise of routers and dropout; None for none.
          train: use the capacity factor of training rather than that of evaluation, and the noise.
        """
        normed_BLD, moe_aux = self.run(
            partition.constrain(self.embedding[...][tokens_BL], "BLD"),
            segment_ids_BL=segment_ids_BL,
            positions_BL=positions_BL,
            ids_BL=tokens_BL,
            labels_BL=labels_BL,
            keys_B=keys_B,
            train=train,
        )
        return self._logits(normed_BLD), moe_aux

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
        x_BLD, cache = self.prefill_blocks(
            self.embedding[...][tokens_BL],
            max_length=max_length,
            segment_ids_BL=valid_BL.astype(jnp.int32),
            ids_BL=tokens_BL,
            labels_BL=None if labels_B is None else jnp.broadcast_to(labels_B[:, None], tokens_BL.shape),
        )
        return self._logits(self.normed(x_BLD[:, -1])), cache

    def step(
        self, token_B: Array, cache: dict[str, Any], *, labels_B: Array | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """One token a row: (logits_BV of the next, the next cache). Nothing is dropped in MoE layers.

        The caller keeps within the max_length of the cache where the model has attention.

        labels_B: of each row's document, for router=label.
        """
        x_BD, cache = self.step_blocks(self.embedding[...][token_B], cache, ids_B=token_B, labels_B=labels_B)
        return self._logits(self.normed(x_BD)), cache

    def _logits(self, normed_D: Array) -> Array:
        if self.mixture is not None:
            return self.mixture(normed_D, self.embedding[...].T if self.head is None else self.head[...])
        return stack.logits(normed_D, self.embedding[...], self.head, scale=self.scale_logits)
