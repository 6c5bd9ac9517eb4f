"""Loss on the held-out split."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax import partition
from moejax.models import model as model_lib
from moejax.training import loss

EvalStep = Callable[[model_lib.Model, dict[str, jax.Array]], dict[str, Any]]


def make_eval_step(mesh: Mesh) -> EvalStep:
    """The jitted forward pass: (model, batch) -> sums of `loss.sums` with the capacity factor of evaluation."""

    def eval_step(model: model_lib.Model, batch: dict[str, jax.Array]) -> dict[str, Any]:
        return loss.sums(model, batch, train=False)

    return jax.jit(partition.on_mesh(mesh, eval_step), out_shardings=partition.replicated(mesh))


def evaluate(model: model_lib.Model, step: EvalStep, batches: Iterator[dict[str, Any]], mesh: Mesh) -> dict[str, Any]:
    """Mean loss over all counted tokens of the batches.

    Returns:
      loss: nats a token. tokens: how many count. For MoE models dropped, the share of the choices beyond capacity, and
      preferred_ML: of the first batch, for each MoE layer, the expert with the largest gate of every token that is not
      padding, int16; -1 where the token is of the other stack of an encoder-decoder.
    """
    sharding = partition.batch_sharding(mesh)

    def place(rows: np.ndarray) -> jax.Array:
        """Every process has the whole batch, and gives its devices their parts."""
        return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)

    nats = tokens = dropped = choices = 0.0
    preferred_ML = None
    for batch in batches:
        sums = jax.device_get(step(model, jax.tree.map(place, batch)))
        nats += float(sums["nats"])
        tokens += float(sums["tokens"])
        if sums["moe"] is not None:
            dropped += float(sums["moe"].dropped.sum())
            choices += float(sums["moe"].count_E.sum())
            if preferred_ML is None:
                valid_BL = np.concatenate(loss.tokens(batch)[1], axis=1)
                preferred_ML = sums["moe"].preferred_BL[:, valid_BL].astype(np.int16)
    result: dict[str, Any] = {"loss": nats / max(tokens, 1.0), "tokens": tokens}
    if preferred_ML is not None:
        result |= {"dropped": dropped / max(choices, 1.0), "preferred_ML": preferred_ML}
    return result
