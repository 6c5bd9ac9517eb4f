"""The training objective.

B batch, L sequence, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moejax.models import lm


def cross_entropy(logits_BLV: Array, targets_BL: Array) -> Array:
    """-log softmax(logits)[target] in nats, float32, for every position."""
    logits_BLV = logits_BLV.astype(jnp.float32)
    target_logit_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BLV, axis=-1) - target_logit_BL


def z_loss(logits_BLV: Array) -> Array:
    """logsumexp(logits)^2 for every position, float32: small when the softmax needs no normaliser (T5X's z-loss)."""
    return jax.nn.logsumexp(logits_BLV.astype(jnp.float32), axis=-1) ** 2


def sums(model: lm.Lm, batch: dict[str, Array], *, train: bool, with_z: bool = False) -> dict[str, Any]:
    """Runs the model on a batch; sums over the batch, so that its parts add up, but for the balance loss: a mean.

    keys_B in the batch, a random key a row, is for the noise of routers.

    Returns:
      nats: summed cross-entropy over the positions that count (loss_mask_BL).
      tokens: how many positions count, float32.
      z: with_z, summed `z_loss` over the positions that count.
      moe: the layers' MoeAux, or None; its losses are means over groups. In training it is without preferred_BL.
    """
    logits_BLV, moe_aux = model(
        batch["inputs_BL"],
        segment_ids_BL=batch["segment_ids_BL"],
        positions_BL=batch["positions_BL"],
        labels_BL=batch.get("labels_BL"),
        keys_B=batch.get("keys_B"),
        train=train,
    )
    if moe_aux is not None and train:
        moe_aux = moe_aux._replace(preferred_BL=None)
    mask_BL = batch["loss_mask_BL"].astype(jnp.float32)
    nats_BL = cross_entropy(logits_BLV, batch["targets_BL"])
    found = {"nats": jnp.sum(nats_BL * mask_BL), "tokens": jnp.sum(mask_BL), "moe": moe_aux}
    return found | ({"z": jnp.sum(z_loss(logits_BLV) * mask_BL)} if with_z else {})
