"""The optimizer, its schedule, and which parameters it decays."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moejax import config as config_lib
from moejax import partition
from moejax.training import adafactor

# Matrices in shape that are not weights of a linear map: Mamba's reference code does not decay A_log, and the
# convolution is depthwise. An embedding row is a vector a token, a row of a bias one an expert, and one of the table of
# relative positions a bias a head.
_NOT_WEIGHTS = ("A_log", "conv_kernel", "embedding", "up_bias", "down_bias", "table")


def schedule(config: config_lib.Config) -> optax.Schedule:
    """Learning rate of update n, counted from 0, of N = training.num_steps.

    - cosine: linear warmup to the peak, then cosine to final_fraction of it, which update N - final_steps is the first
      to have. llm-random's code (MoE-Mamba) makes one update more than its cosine has steps.
    - constant: the same warmup, then the peak.
    - inverse_sqrt: learning_rate / sqrt(max(n, warmup_steps)), T5's: with 1.0 and 10,000 it is 0.01 for 10,000 updates.
      T5X's create_learning_rate_scheduler counts from 0 too.

    Update n of a linear warmup has (n + 1) / warmup_steps of the peak, so no update is wasted at zero. With
    linear_decay a rate other than the cosine is times min(1, (N - n) / (N linear_decay)), as Mesh-TensorFlow's
    learning_rate_schedule_noam.
    """
    c, num_steps = config.optimizer, config.training.num_steps
    decay_steps = max(1, num_steps - c.final_steps - c.warmup_steps)
    cosine = optax.cosine_decay_schedule(c.learning_rate, decay_steps, alpha=c.final_fraction)

    def learning_rate(step):
        if c.schedule == "inverse_sqrt":
            rate = c.learning_rate / jnp.sqrt(jnp.maximum(step, c.warmup_steps))
        else:
            warmup = c.learning_rate * (step + 1) / max(1, c.warmup_steps)
            after = cosine(step - c.warmup_steps) if c.schedule == "cosine" else c.learning_rate
            rate = jnp.where(step < c.warmup_steps, warmup, after)
        if c.linear_decay:
            rate *= jnp.clip((num_steps - step) / (num_steps * c.linear_decay), 0.0, 1.0)
        return rate

    return learning_rate


def decay_mask(model: optax.Params, kind: str) -> optax.Params:
    """True for the parameters that weight decay touches.

    kind "all": every one (MoE-Mamba's single parameter group). kind "matrices": the weights of linear maps: at least
    two logical dims, and not embeddings, A_log or the depthwise convolution.
    """

    def decays(path, variable: nnx.Variable) -> bool:
        name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else path[-1].name
        return kind == "all" or (len(variable.get_metadata()["axes"]) >= 2 and name not in _NOT_WEIGHTS)

    def of(path, node):
        return jax.tree.map(lambda _: decays(path, node), node)

    return jax.tree_util.tree_map_with_path(of, model, is_leaf=partition.is_variable)


def build(config: config_lib.Config) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (arXiv 1711.05101) or Adafactor, with the schedule and the decay mask.

    Weight decay is times the learning rate in both. T5X's and optax's Adafactor decay without it, and T5 not at all.
    """
    c = config.optimizer
    mask = functools.partial(decay_mask, kind=c.decay)
    if c.name == "adafactor":
        update = optax.chain(
            adafactor.scale_by_adafactor(c.adafactor),
            optax.add_decayed_weights(c.weight_decay, mask),
            optax.scale_by_learning_rate(schedule(config)),
        )
    else:
        update = optax.adamw(
            schedule(config), b1=c.beta1, b2=c.beta2, eps=c.eps, weight_decay=c.weight_decay, mask=mask
        )
    # without clipping too, so that a run may begin or end it: the state stays of one structure
    return optax.chain(optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(), update)
