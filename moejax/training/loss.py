"""The training objective, and what it needs of a batch.

A batch has what `data.packing.NextToken.arrays` or `data.corruption.row` define for a row: the first for a model of one
stack, the second for an encoder-decoder.

B batch, L sequence, V vocabulary; of an encoder-decoder, L of the encoder and M of the decoder.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moejax.models import encoder_decoder, stack
from moejax.models import model as model_lib


def cross_entropy(logits_BLV: Array, targets_BL: Array) -> Array:
    """-log softmax(logits)[target] in nats, float32, for every position."""
    logits_BLV = logits_BLV.astype(jnp.float32)
    target_logit_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BLV, axis=-1) - target_logit_BL


def z_loss(logits_BLV: Array) -> Array:
    """logsumexp(logits)^2 for every position, float32: small when the softmax needs no normaliser (T5X's z-loss)."""
    return jax.nn.logsumexp(logits_BLV.astype(jnp.float32), axis=-1) ** 2


def sums(model: model_lib.Model, batch: dict[str, Array], *, train: bool, with_z: bool = False) -> dict[str, Any]:
    """Runs the model on a batch; sums over the batch, so that its parts add up, but for the balance loss: a mean.

    keys_B in the batch, a random key a row, is for the noise of routers.

    Returns:
      nats: summed cross-entropy over the positions that count (`mask`).
      tokens: how many positions count, float32.
      z: with_z, summed `z_loss` over the positions that count.
      moe: the layers' MoeAux, or None; its losses are means over groups. In training it is without preferred_BL.
    """
    if isinstance(model, encoder_decoder.EncoderDecoder):
        logits_BLV, moe_aux = model(
            batch["encoder_inputs_BL"],
            batch["decoder_inputs_BM"],
            # where, as libtpu fails on some conversions of a mask to int32
            encoder_segment_ids_BL=jnp.where(batch["encoder_mask_BL"], 1, 0),
            decoder_segment_ids_BM=jnp.where(batch["loss_mask_BM"], 1, 0),
            keys_B=batch.get("keys_B"),
            train=train,
        )
        targets_BL = batch["targets_BM"]
    else:
        logits_BLV, moe_aux = model(
            batch["inputs_BL"],
            segment_ids_BL=batch["segment_ids_BL"],
            positions_BL=batch["positions_BL"],
            labels_BL=batch.get("labels_BL"),
            keys_B=batch.get("keys_B"),
            train=train,
        )
        targets_BL = batch["targets_BL"]
    if moe_aux is not None and train:
        moe_aux = moe_aux._replace(preferred_BL=None)
    mask_BL = mask(batch).astype(jnp.float32)
    nats_BL = cross_entropy(logits_BLV, targets_BL)
    found = {"nats": jnp.sum(nats_BL * mask_BL), "tokens": jnp.sum(mask_BL), "moe": moe_aux}
    return found | ({"z": jnp.sum(z_loss(logits_BLV) * mask_BL)} if with_z else {})


def mask(batch: dict[str, Any]) -> Any:
    """Which targets count."""
    return batch["loss_mask_BM" if "loss_mask_BM" in batch else "loss_mask_BL"]


def tokens(batch: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """(ids, which are not padding) of what each stack reads, in the order of `model.stacks`."""
    if "encoder_inputs_BL" in batch:
        ids = [batch["encoder_inputs_BL"], batch["decoder_inputs_BM"]]
        return ids, [batch["encoder_mask_BL"], batch["loss_mask_BM"]]
    return [batch["inputs_BL"]], [batch["segment_ids_BL"] > 0]


def num_valid(model: model_lib.Model, batch: dict[str, Array]) -> Array:
    """How many tokens each MoE layer gets that are not padding, int32, by its place in a MoeAux."""
    counts = [jnp.sum(valid_BL, dtype=jnp.int32) for valid_BL in tokens(batch)[1]]
    layers = [stack.num_moe_layers(one) for one in model_lib.stacks(model)]
    return jnp.repeat(jnp.stack(counts), jnp.array(layers), total_repeat_length=sum(layers))
