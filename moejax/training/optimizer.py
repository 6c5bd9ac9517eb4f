"""AdamW, its schedule, and which parameters it decays."""

import jax
import optax
from flax import nnx

from moejax import config as config_lib

# Matrices in shape that are not weights of a linear map: Mamba's reference code does not decay A_log, and the
# convolution is depthwise. An embedding row is a vector a token, a row of a bias one an expert, and one of the table of
# relative positions a bias a head.
_NOT_WEIGHTS = ("A_log", "conv_kernel", "embedding", "up_bias", "down_bias", "table")


def schedule(config: config_lib.Config) -> optax.Schedule:
    """Learning rate of update n (from 0): linear warmup to the peak, then cosine to final_fraction of it.

    Update n of the warmup has (n + 1) / warmup_steps of the peak, so no update is wasted at zero.
    """
    c, num_steps = config.optimizer, config.training.num_steps
    decay_steps = max(1, num_steps - c.warmup_steps)
    cosine = optax.cosine_decay_schedule(c.learning_rate, decay_steps, alpha=c.final_fraction)

    def learning_rate(step):
        warmup = c.learning_rate * (step + 1) / max(1, c.warmup_steps)
        return jax.numpy.where(step < c.warmup_steps, warmup, cosine(step - c.warmup_steps))

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

    return jax.tree_util.tree_map_with_path(of, model, is_leaf=lambda node: isinstance(node, nnx.Variable))


def build(config: config_lib.Config) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (arXiv 1711.05101) with the schedule and the decay mask."""
    c = config.optimizer
    adamw = optax.adamw(
        schedule(config),
        b1=c.beta1,
        b2=c.beta2,
        eps=c.eps,
        weight_decay=c.weight_decay,
        mask=lambda params: decay_mask(params, c.decay),
    )
    return optax.chain(optax.clip_by_global_norm(c.clip_norm), adamw) if c.clip_norm else adamw
