"""Losses and updates that keep experts in use, and routing statistics.

Every function sees one routing group of tokens (a sequence, a batch: callers vmap) and averages over its valid tokens
alone; a group of padding gives 0. Losses come without their weight.

T tokens, E experts, K experts a token, D groups of experts. Counts are int32, means float32.
"""

import jax
import jax.numpy as jnp
from jax import Array

from moejax.ops import routing


def count_choices(expert_TK: Array, num_experts: int) -> Array:
    """count_E, int32: how many tokens chose each expert, before any capacity. A choice of E is none."""
    # scatter, not one-hot: XLA does not fuse the comparison on CPU, where T*K*E bytes cost 100 times the time
    return jnp.zeros(num_experts, jnp.int32).at[expert_TK].add(1, mode="drop")


def coactivation(expert_TK: Array, num_experts: int) -> Array:
    """count_EE, int32: [i, j] is how many tokens chose both i and j; the diagonal, how many chose i at all."""
    chosen_TE = _spread(jnp.ones(expert_TK.shape, jnp.float32), expert_TK, num_experts).clip(max=1.0)
    # exact in float32: 0 and 1 are, even rounded to bfloat16 by a matrix unit, and so is every sum below 2^24 tokens
    return jnp.matmul(chosen_TE.T, chosen_TE, preferred_element_type=jnp.float32).astype(jnp.int32)


def load_balance_loss(assignment: routing.Assignment, valid_T: Array, *, num_counted: int | None = None) -> Array:
    """E * sum_e f_e P_e (Switch Transformers, arXiv 2101.03961, eq. 4-6); 1 when balanced, E at collapse.

    f_e is the share of the choices that fell on e before capacity, P_e the mean probability of e. Only P carries a
    gradient. The shares sum to 1 for any K, as in Megatron; flaxformer does not divide by K: its loss is K times ours.

    On the tokens of one sequence this is also the expert-level loss of DeepSeekMoE (arXiv 2401.06066, eq. 12-14) and
    the sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437, eq. 17-20), whose prob_TE are normalised sigmoids and whose
    choices are those without the bias (eq. 18).

    Args:
      assignment: the router's choices.
      valid_T: False for padding tokens.
      num_counted: how many choices of a token f counts, the first ones; None: all. 1 is the loss of GShard
        (arXiv 2006.16668, algorithm 1), which counts the first choice alone.
    """
    share_E = _share(assignment, valid_T, num_counted)
    return share_E.size * jnp.sum(share_E * _mean(assignment.prob_TE, valid_T))


def device_loss(assignment: routing.Assignment, valid_T: Array, *, num_groups: int) -> Array:
    """sum_d f'_d P'_d over groups of E/D experts (DeepSeek-V2, arXiv 2405.04434, eq. 26-28); 1 when balanced.

    f'_d is the mean over the group of f_i = E / (K T) * (choices of i), P'_d the sum of its P_i. As f_i is E times the
    share of the choices that fell on i, f'_d is D times that of the group. DeepSeekMoE (arXiv 2401.06066), eq. 15-17.
    """
    share_D = _share(assignment, valid_T).reshape(num_groups, -1).sum(axis=1)
    prob_D = _mean(assignment.prob_TE, valid_T).reshape(num_groups, -1).sum(axis=1)
    return num_groups * jnp.sum(share_D * prob_D)


def communication_loss(assignment: routing.Assignment, valid_T: Array, *, num_groups: int, top_groups: int) -> Array:
    """sum_d f''_d P'_d (DeepSeek-V2, arXiv 2405.04434, eq. 29-31); 1 when balanced and all of top_groups are used.

    f''_d = D / (M T) * (tokens that chose an expert of group d), with M = top_groups, the most that a token may send
    to; P'_d is the group's probability. Expert e belongs to group e // (E / D). Only P carries a gradient.
    """
    prob_D = _mean(assignment.prob_TE, valid_T).reshape(num_groups, -1).sum(axis=1)
    group_TK = assignment.expert_TK // (assignment.prob_TE.shape[-1] // num_groups)  # no expert, no group: E -> D
    sent_TD = (group_TK[..., None] == jnp.arange(num_groups)).any(axis=1)
    return num_groups / top_groups * jnp.sum(_mean(sent_TD.astype(jnp.float32), valid_T) * prob_D)


def relu_loss(assignment: routing.Assignment, valid_T: Array, *, k: int) -> Array:
    """(E / k) * sum_e f_e mean_t(gate_te): L1 weighted by load, one layer (ReMoE, arXiv 2412.14711, section 3.4).

    f_e is the share of tokens that use e (gate > 0), a constant of the gradient; k is how many experts a token should
    use on average. gate_TK has all E columns in the order of the experts.
    """
    gate_TE = assignment.gate_TK
    share_E = _mean((gate_TE > 0).astype(jnp.float32), valid_T)
    return share_E.size / k * jnp.sum(share_E * _mean(gate_TE, valid_T))


def cv_squared(values_E: Array, eps: float = 1e-10) -> Array:
    """variance / (mean^2 + eps): the squared coefficient of variation, 0 when all are equal.

    Shazeer et al. 2017 (arXiv 1701.06538), section 4; the biased variance and eps are Tensor2Tensor's.
    """
    mean = jnp.mean(values_E)
    return jnp.mean(jnp.square(values_E - mean)) / (jnp.square(mean) + eps)


def importance_loss(assignment: routing.Assignment, valid_T: Array) -> Array:
    """CV^2 over experts of the sum of their gates (Shazeer et al. 2017, arXiv 1701.06538, eq. 6-7)."""
    gate_TE = _spread(assignment.gate_TK, assignment.expert_TK, assignment.prob_TE.shape[-1])
    return cv_squared(jnp.where(valid_T[:, None], gate_TE, 0.0).sum(axis=0))


def load_loss(assignment: routing.Assignment, valid_T: Array) -> Array:
    """CV^2 over experts of their expected load, sum_t load_te (Shazeer et al. 2017, arXiv 1701.06538, eq. 8-11).

    load_TE, the probability that fresh noise keeps e among the top k, makes the number of choices differentiable.
    """
    assert assignment.load_TE is not None, "only a noisy router has a load"
    return cv_squared(jnp.where(valid_T[:, None], assignment.load_TE, 0.0).sum(axis=0))


def z_loss(logits_TE: Array, valid_T: Array) -> Array:
    """mean_t logsumexp(logits_t)^2: keeps the router's logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    logits_TE = jnp.where(valid_T[:, None], logits_TE.astype(jnp.float32), 0.0)  # before the logsumexp: no NaN comes in
    return _mean(jnp.square(jax.nn.logsumexp(logits_TE, axis=-1)), valid_T)


def bias_update(bias_E: Array, count_E: Array, rate: float | Array) -> Array:
    """bias + rate * sign(mean load - load): balance without a loss (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    count_E: int32 choices before capacity, of the whole batch: over its microbatches, groups and devices. The sign is
    exact, so an expert at the mean keeps its bias.
    """
    assert jnp.issubdtype(count_E.dtype, jnp.integer), f"counts in {count_E.dtype} round, and can flip a sign"
    num_experts = count_E.size
    # the mean is whole + rest / E with 0 <= rest < E. Neither the sum nor E * count occurs: both pass 2^31 too early
    remainder = jnp.sum(count_E % num_experts)
    whole, rest = jnp.sum(count_E // num_experts) + remainder // num_experts, remainder % num_experts
    sign_E = jnp.where(count_E == whole, jnp.sign(rest), jnp.sign(whole - count_E))
    return bias_E + rate * sign_E.astype(bias_E.dtype)


def coefficient_update(
    coefficient: Array, num_active: Array, num_tokens: Array | int, *, k: int, multiplier: float
) -> Array:
    """The weight of relu_loss for the next step (ReMoE, arXiv 2412.14711, section 3.3), at least 1e-30: from 0 it could
    never grow again.

    The coefficient is multiplied while the sparsity 1 - num_active / (num_tokens * E) is below its target 1 - k/E, and
    divided otherwise. Below means num_active > k * num_tokens, whatever E is.

    Args:
      coefficient: the weight of this step.
      num_active: how many gates were above 0 in this step, over all its layers.
      num_tokens: how many valid tokens they were counted over; a token counts once in every layer.
      k: experts that a token should use on average.
      multiplier: above 1.
    """
    too_dense = jnp.asarray(num_active, jnp.float32) > k * jnp.asarray(num_tokens, jnp.float32)  # float: k * T may wrap
    return jnp.maximum(jnp.where(too_dense, coefficient * multiplier, coefficient / multiplier), 1e-30)


def router_entropy(prob_TE: Array, valid_T: Array) -> Array:
    """Sum over the valid tokens of the entropy of the router's distribution, in nats; 0 log 0 is 0."""
    used_TE = valid_T[:, None] & (prob_TE > 0)
    # the inner where keeps the infinite slope at 0 out of the gradient, which the outer one alone would make NaN
    return jnp.sum(jnp.where(used_TE, -prob_TE * jnp.log(jnp.where(used_TE, prob_TE, 1.0)), 0.0))


def _share(assignment: routing.Assignment, valid_T: Array, num_counted: int | None = None) -> Array:
    """share_E of the first num_counted choices of the valid tokens; they sum to 1, or to 0 without any choice."""
    num_experts = assignment.prob_TE.shape[-1]
    expert_TK = jnp.where(valid_T[:, None], assignment.expert_TK[:, :num_counted], num_experts)
    count_E = count_choices(expert_TK, num_experts)
    return count_E / jnp.maximum(count_E.sum(), 1)


def _mean(values_T: Array, valid_T: Array) -> Array:
    """Mean over the valid tokens, the first dim; 0 without any."""
    mask_T = valid_T.reshape(-1, *[1] * (values_T.ndim - 1))
    return jnp.where(mask_T, values_T, 0.0).sum(axis=0) / jnp.maximum(valid_T.sum(), 1)


def _spread(values_TK: Array, expert_TK: Array, num_experts: int) -> Array:
    """values_TE with a token's values in the columns of its experts, and 0 elsewhere."""
    # rows of their own, not straight into E sums: no two tokens meet, so a GPU adds floats in the same order every run
    row_T1 = jnp.arange(len(values_TK))[:, None]
    return jnp.zeros((len(values_TK), num_experts), values_TK.dtype).at[row_T1, expert_TK].add(values_TK, mode="drop")
