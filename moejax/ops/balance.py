"""Auxiliary losses that keep experts in use, and routing statistics.

T tokens, E experts, K experts a token. Counts are int32, means float32.
"""

import jax.numpy as jnp
from jax import Array

from moejax.ops import routing


def count_choices(expert_TK: Array, num_experts: int) -> Array:
    """count_E, int32: how many tokens chose each expert, before any capacity."""
    return (expert_TK[..., None] == jnp.arange(num_experts)).sum(axis=(0, 1), dtype=jnp.int32)


def load_balance_loss(assignment: routing.Assignment) -> Array:
    """E * sum_e f_e P_e (Switch Transformers, arXiv 2101.03961, eq. 4-6), without its weight; 1 when balanced.

    f_e is the share of the choices that fell on e before capacity, P_e the mean probability of e; both over the tokens
    that are not padding. Only P carries a gradient.
    """
    prob_TE = assignment.prob_TE
    num_experts = prob_TE.shape[-1]
    count_E = count_choices(assignment.expert_TK, num_experts)
    valid_T = assignment.expert_TK[:, 0] < num_experts
    share_E = count_E / jnp.maximum(count_E.sum(), 1)
    mean_prob_E = jnp.where(valid_T[:, None], prob_TE, 0.0).sum(axis=0) / jnp.maximum(valid_T.sum(), 1)
    return num_experts * jnp.sum(share_E * mean_prob_E)


def router_entropy(assignment: routing.Assignment) -> Array:
    """Sum over the tokens that are not padding of the entropy of the router's distribution, in nats."""
    prob_TE = assignment.prob_TE
    valid_T = assignment.expert_TK[:, 0] < prob_TE.shape[-1]
    entropy_T = -jnp.sum(prob_TE * jnp.log(jnp.maximum(prob_TE, 1e-30)), axis=-1)
    return jnp.where(valid_T, entropy_T, 0.0).sum()
