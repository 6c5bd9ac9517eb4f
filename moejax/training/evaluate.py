"""Loss on the held-out split."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from moejax import partition
from moejax.models import lm
from moejax.training import loss

EvalStep = Callable[[lm.Lm, dict[str, jax.Array]], dict[str, Any]]


def make_eval_step(mesh: Mesh) -> EvalStep:
    """The jitted forward pass: (model, batch) -> sums of `loss.sums` with the capacity factor of evaluation."""

    def eval_step(model: lm.Lm, batch: dict[str, jax.Array]) -> dict[str, Any]:
        return loss.sums(model, batch, train=False)

    return jax.jit(eval_step, out_shardings=partition.replicated(mesh))


def evaluate(model: lm.Lm, step: EvalStep, batches: Iterator[dict[str, Any]], mesh: Mesh) -> dict[str, float]:
    """Mean loss over all counted tokens of the batches: {"loss" nats/token, "tokens", and "dropped" for MoE models}."""
    nats = tokens = dropped = choices = 0.0
    for batch in batches:
        sums = jax.device_get(step(model, jax.device_put(batch, partition.batch_sharding(mesh))))
        nats += float(sums["nats"])
        tokens += float(sums["tokens"])
        if sums["moe"] is not None:
            dropped += float(sums["moe"].dropped.sum())
            choices += float(sums["moe"].count_E.sum())
    result = {"loss": nats / max(tokens, 1.0), "tokens": tokens}
    if choices:
        result["dropped"] = dropped / choices
    return result
