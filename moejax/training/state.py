"""The state of training and the one step that changes it."""

import dataclasses
import functools
import math
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
from moejax.models import model as model_lib
from moejax.ops import balance
from moejax.training import loss, optimizer

Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32, updates done. model: its parameters, float32. opt_state: optax's."""

    step: Array
    model: model_lib.Model
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
    model = model_lib.build(config.model, rngs=nnx.Rngs(params=config.training.seed))
    opt_state = optimizer.build(config).init(_split(model)[1])
    return TrainState(step=jnp.zeros((), jnp.int32), model=model, opt_state=opt_state)


def _split(model: model_lib.Model) -> tuple[Any, Any, Any]:
    """(structure, parameters, router state): only parameters have gradients and moments."""
    structure, params, routers = nnx.split(model, nnx.Param, ...)  # pyright: ignore[reportAssignmentType]
    return structure, params, routers


def make_gradients(config: config_lib.Config, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[dict[str, Any], Any]]:
    """(state, batch) -> (sums, gradients) of an update's objective, to be traced by `partition.on_mesh`.

    The objective is the mean cross-entropy over the batch's counted tokens, plus training.z_weight times the mean of
    their `loss.z_loss`, plus the router's auxiliary losses, each by its weight, averaged over groups and, by
    model.moe.layer_reduction, averaged or summed over layers. Microbatches change none of them: each part's sums are
    divided by the whole batch's count. Noise is drawn row by row, by keys that depend on training.seed and the step
    alone.

    sums: of `loss.sums`, over the whole batch. gradients: of the parameters, in their structure.
    """
    moe_config, z_weight = config.model.moe, config.training.z_weight
    weights = moe_config.loss_weights()
    reduce_layers = jnp.mean if moe_config.layer_reduction == "mean" else jnp.sum

    def objective(
        params: Any, fixed: tuple[Any, Any], batch: Batch, num_tokens: Array, share: float
    ) -> tuple[Array, dict[str, Any]]:
        sums = loss.sums(nnx.merge(fixed[0], params, fixed[1]), batch, train=True, with_z=z_weight > 0)
        total = sums["nats"] / num_tokens
        if z_weight:
            total += z_weight * sums["z"] / num_tokens
        if sums["moe"] is not None:
            losses = {name: share * value_L for name, value_L in sums["moe"].losses.items()}
            sums["moe"] = sums["moe"]._replace(losses=losses)
            total += sum(weights[name] * reduce_layers(value_L) for name, value_L in losses.items())
        return total, sums

    def gradients(state: TrainState, batch: Batch) -> tuple[dict[str, Any], Any]:
        if _has_noise(config.model):
            key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)
            batch = batch | {"keys_B": jax.random.split(key, loss.mask(batch).shape[0])}
        structure, params, routers = _split(state.model)
        fixed, grad = (structure, routers), jax.grad(objective, has_aux=True)
        num_tokens = jnp.maximum(jnp.sum(loss.mask(batch), dtype=jnp.float32), 1.0)
        parts = config.training.num_microbatches
        if parts == 1:
            grads, sums = grad(params, fixed, batch, num_tokens, 1.0)
            return sums, grads

        def add_part(total, part: Batch):
            grads, sums = grad(params, fixed, part, num_tokens, 1.0 / parts)
            return jax.tree.map(jnp.add, total, (sums, grads)), None

        part_sharding = partition.batch_sharding(mesh)
        rows = _rows_of_groups(config)

        def split(x):
            """(B, ...) -> (parts, B / parts, ...), each part spread over all devices, the rows of a group together."""
            x = x.reshape(-1, parts, rows, *x.shape[1:]).swapaxes(0, 1)
            x = x.reshape(parts, -1, *x.shape[3:])
            spec = jax.sharding.PartitionSpec(None, *part_sharding.spec[: x.ndim - 1])
            return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))

        split_batch = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], split_batch)
        shapes = jax.eval_shape(lambda: grad(params, fixed, first, num_tokens, 1.0))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[0]))
        (sums, grads), _ = jax.lax.scan(add_part, zeros, split_batch)
        return sums, grads

    return gradients


def make_train_step(
    config: config_lib.Config, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The jitted update by `make_gradients`: (state, batch) -> (state, metrics). The state that goes in is consumed.

    Metrics (device arrays): loss, the cross-entropy alone; grad_norm, learning_rate, tokens; with training.z_weight
    vocabulary_z_loss, without that weight; and for MoE models routing (`routing_metrics`).
    """
    tx, learning_rate = optimizer.build(config), optimizer.schedule(config)
    gradients = make_gradients(config, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        sums, grads = gradients(state, batch)
        structure, params, routers = _split(state.model)
        updates, opt_state = tx.update(grads, state.opt_state, params)
        model = nnx.merge(structure, optax.apply_updates(params, updates), routers)
        metrics = {
            "loss": sums["nats"] / jnp.maximum(sums["tokens"], 1.0),
            "tokens": sums["tokens"],
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
        }
        if "z" in sums:
            metrics["vocabulary_z_loss"] = sums["z"] / jnp.maximum(sums["tokens"], 1.0)
        if sums["moe"] is not None:
            num_valid_L = loss.num_valid(model, batch)
            metrics["routing"] = routing_metrics(sums["moe"], num_valid_L)
            _update_routers(model, sums["moe"], num_valid_L, config.model.moe)
        return TrainState(step=state.step + 1, model=model, opt_state=opt_state), metrics

    places, batch_place = shardings(config, mesh), partition.batch_sharding(mesh)
    return jax.jit(
        partition.on_mesh(mesh, train_step),
        in_shardings=(places, batch_place),
        out_shardings=(places, partition.replicated(mesh)),
        donate_argnums=0,
    )


def _rows_of_groups(config: config_lib.Config) -> int:
    """The least number of rows that hold whole routing groups."""
    length = config.data.seq_length
    return math.lcm(config.model.moe.group_size or length, length) // length if config.model.has_experts else 1


def _has_noise(model: config_lib.ModelConfig) -> bool:
    moe_config = model.moe
    explores = {"jitter": moe_config.jitter > 0, "dropout": moe_config.router_dropout > 0, "sample": True}
    noisy = {
        "switch": explores.get(moe_config.exploration, False),
        "gshard": moe_config.second_threshold > 0,
        "noisy_top_k": True,
    }
    of_experts = noisy.get(moe_config.router, False) or moe_config.expert_dropout > 0
    return model.dropout > 0 or (model.has_experts and of_experts)


def _update_routers(
    model: model_lib.Model, moe_aux: moe.MoeAux, num_valid_L: Array, moe_config: config_lib.MoeConfig
) -> None:
    """What routers keep beside their weights moves on by the counts of the whole batch, in place: `model` is new."""
    for layer, place in model_lib.moe_layers(model):
        state = layer.router.state
        match moe_config.router:
            case "sigmoid_bias":
                assert state is not None
                update = functools.partial(balance.bias_update, rate=moe_config.bias_rate)
                state[...] = (jax.vmap(update) if state[...].ndim == 2 else update)(state[...], moe_aux.count_E[place])
            case "relu":  # one coefficient for all layers
                assert state is not None
                state[...] = balance.coefficient_update(
                    state[...],
                    moe_aux.count_E.sum(),
                    num_valid_L.sum(),
                    k=moe_config.num_choices,
                    multiplier=moe_config.relu_multiplier,
                )


def routing_metrics(moe_aux: moe.MoeAux, num_valid_L: Array) -> dict[str, Array]:
    """Statistics of a step, a row a MoE layer (of `model.moe_layers`); of the losses, means over layers, unweighted.

    {name}_loss for each auxiliary loss of the router (relu_loss with its coefficient). load: shares of the experts in
    the choices. max_load: the largest load over the mean. unused_experts: share of the experts without a token.
    dropped: share of the choices. router_entropy: mean over tokens, in nats. experts_per_token: choices a token (with
    soft, the sum of its weights, 1). coactivation, where a token has several choices: the share of the tokens that
    chose the pair of experts which is chosen most often.

    num_valid_L: tokens of each layer that are not padding.
    """
    num_experts = moe_aux.count_E.shape[-1]
    choices_L = moe_aux.count_E.sum(axis=-1)
    load_LE = moe_aux.count_E / jnp.maximum(choices_L, 1)[:, None]
    tokens_L = jnp.maximum(num_valid_L, 1)
    metrics = {f"{name}_loss": value_L.mean() for name, value_L in moe_aux.losses.items()}
    metrics |= {
        "load": load_LE,
        "max_load": load_LE.max(axis=-1) * num_experts,
        "unused_experts": jnp.mean(moe_aux.count_E == 0, axis=-1),
        "dropped": moe_aux.dropped / jnp.maximum(choices_L, 1),
        "router_entropy": moe_aux.entropy / tokens_L,
        "experts_per_token": choices_L / tokens_L,
    }
    if moe_aux.together_EE is not None:
        pairs_LEE = jnp.where(jnp.eye(num_experts, dtype=bool), 0, moe_aux.together_EE)
        metrics["coactivation"] = pairs_LEE.max(axis=(1, 2)) / tokens_L
    return metrics
