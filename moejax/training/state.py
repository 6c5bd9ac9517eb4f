"""The state of training and the one step that changes it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from moejax import config as config_lib
from moejax import partition
from moejax.layers import moe
from moejax.models import lm
from moejax.training import loss, optimizer

Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32, updates done. model: its parameters, float32. opt_state: optax's."""

    step: Array
    model: lm.Lm
    opt_state: Any


def create(config: config_lib.Config, mesh: Mesh) -> TrainState:
    """A new state, each parameter made on the devices that keep it."""
    # Drawing runs once: on CPU, LLVM's optimiser takes ten times as long over it as everything else together.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    init = functools.partial(_init, config)
    return jax.jit(init, out_shardings=shardings(config, mesh), compiler_options=options)()


def abstract(config: config_lib.Config, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of `create`, with nothing allocated."""
    shapes = jax.eval_shape(functools.partial(_init, config))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(config, mesh),
    )


def shardings(config: config_lib.Config, mesh: Mesh) -> TrainState:
    """The sharding of every leaf; the optimizer's moments lie where their parameter lies."""
    return partition.tree_shardings(jax.eval_shape(functools.partial(_init, config)), mesh)


def _init(config: config_lib.Config) -> TrainState:
    model = lm.Lm(config.model, rngs=nnx.Rngs(params=config.training.seed))
    opt_state = optimizer.build(config).init(model)  # pyright: ignore[reportArgumentType]
    return TrainState(step=jnp.zeros((), jnp.int32), model=model, opt_state=opt_state)


def make_train_step(
    config: config_lib.Config, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The jitted update: (state, batch) -> (state, metrics). The state that goes in is consumed.

    The objective is the mean cross-entropy over the batch's counted tokens plus balance_weight times the load-balance
    loss, averaged over layers and groups. Microbatches change neither: each part's sums are divided by the whole
    batch's count.

    Metrics (device arrays): loss, grad_norm, learning_rate, tokens, and for MoE models those of `routing_metrics`.
    """
    tx, learning_rate = optimizer.build(config), optimizer.schedule(config)
    balance_weight = config.model.moe.balance_weight

    def objective(model: lm.Lm, batch: Batch, num_tokens: Array, share: float) -> tuple[Array, dict[str, Any]]:
        sums = loss.sums(model, batch, train=True)
        total = sums["nats"] / num_tokens
        if sums["moe"] is not None:
            sums["moe"] = sums["moe"]._replace(balance_loss=share * sums["moe"].balance_loss)
            total += balance_weight * jnp.mean(sums["moe"].balance_loss)
        return total, sums

    def gradients(model: lm.Lm, batch: Batch) -> tuple[dict[str, Any], lm.Lm]:
        grad = jax.grad(objective, has_aux=True)
        num_tokens = jnp.maximum(jnp.sum(batch["loss_mask_BL"], dtype=jnp.float32), 1.0)
        parts = config.training.num_microbatches
        if parts == 1:
            grads, sums = grad(model, batch, num_tokens, 1.0)
            return sums, grads

        def add_part(total, part: Batch):
            grads, sums = grad(model, part, num_tokens, 1.0 / parts)
            return jax.tree.map(jnp.add, total, (sums, grads)), None

        part_sharding = partition.batch_sharding(mesh)

        def split(x):
            """(B, ...) -> (parts, B / parts, ...), each part spread over all devices."""
            x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
            spec = jax.sharding.PartitionSpec(None, *part_sharding.spec)
            return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))

        split_batch = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], split_batch)
        shapes = jax.eval_shape(lambda: grad(model, first, num_tokens, 1.0))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[0]))
        (sums, grads), _ = jax.lax.scan(add_part, zeros, split_batch)
        return sums, grads

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        sums, grads = gradients(state.model, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.model)  # pyright: ignore[reportArgumentType]
        model = optax.apply_updates(state.model, updates)  # pyright: ignore[reportArgumentType]
        metrics = {
            "loss": sums["nats"] / jnp.maximum(sums["tokens"], 1.0),
            "tokens": sums["tokens"],
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
        }
        if sums["moe"] is not None:
            metrics |= routing_metrics(sums["moe"], sums["tokens"])
        return TrainState(step=state.step + 1, model=model, opt_state=opt_state), metrics  # pyright: ignore

    places, batch_place = shardings(config, mesh), partition.batch_sharding(mesh)
    return jax.jit(
        train_step,
        in_shardings=(places, batch_place),
        out_shardings=(places, partition.replicated(mesh)),
        donate_argnums=0,
    )


def routing_metrics(moe_aux: moe.MoeAux, num_tokens: Array) -> dict[str, Array]:
    """balance_loss (mean over layers) and, a row a layer, load (shares of the experts), dropped and router_entropy."""
    choices_L = jnp.maximum(moe_aux.count_E.sum(axis=-1), 1)
    return {
        "balance_loss": moe_aux.balance_loss.mean(),
        "load": moe_aux.count_E / choices_L[:, None],
        "dropped": moe_aux.dropped / choices_L,
        "router_entropy": moe_aux.entropy / jnp.maximum(num_tokens, 1.0),
    }
