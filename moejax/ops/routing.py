"""Routers: from logits to an Assignment of tokens to experts.

T tokens, E experts, K experts a token, C tokens an expert takes, G groups of experts, N experts a group, V vocabulary,
D model, S slots an expert.

A router sees one routing group of tokens; callers vmap over groups. Everything here is float32. Ties go to the lower
index. The choice of an expert carries no gradient, its gate does. valid_T is False for padding tokens: they choose no
expert, and whatever their logits are, NaN too, no other token feels them. A NaN in the logits of a token that is not
padding stays in its own row, and shows there.
"""

import heapq
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Assignment(NamedTuple):
    """Which experts each token chose, and how much each counts.

    expert_TK: int32; E means no expert (a padding token, a choice that was not made). In order of preference, except
      where a token has no fixed number of experts: there K = E, and column e holds e or E.
    gate_TK: float32 weight of the expert's output, differentiable in the logits; 0 where there is no expert.
    prob_TE: float32 distribution over the experts, for the balance losses and statistics. Rows sum to 1, or are 0 where
      a router says so; the row of a padding token is finite and means nothing.
    load_TE: noisy_top_k only: the probability, smooth in the logits, that the expert is among the k; 0 for padding.
    """

    expert_TK: Array
    gate_TK: Array
    prob_TE: Array
    load_TE: Array | None = None


def _masked(logits_TE: Array, valid_T: Array | None) -> Array:
    """float32 logits, 0 for padding: were only the gates masked, a NaN there would give gradients of 0 * NaN."""
    logits_TE = logits_TE.astype(jnp.float32)
    return logits_TE if valid_T is None else jnp.where(valid_T[:, None], logits_TE, 0.0)


def _assign(expert_TK: Array, gate_TK: Array, prob_TE: Array, valid_T: Array | None) -> Assignment:
    """The assignment in which tokens that are not valid have no expert."""
    if valid_T is not None:
        expert_TK = jnp.where(valid_T[:, None], expert_TK, prob_TE.shape[-1])
        gate_TK = jnp.where(valid_T[:, None], gate_TK, 0.0)
    return Assignment(expert_TK=expert_TK.astype(jnp.int32), gate_TK=gate_TK, prob_TE=prob_TE)


def _every_expert(prob_TE: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(prob_TE.shape[-1]), prob_TE.shape)


def soft(logits_TE: Array, *, valid_T: Array | None = None) -> Assignment:
    """Every token goes to all experts, K = E; a gate is the softmax probability (Jacobs et al. 1991)."""
    prob_TE = jax.nn.softmax(_masked(logits_TE, valid_T), axis=-1)
    return _assign(_every_expert(prob_TE), prob_TE, prob_TE, valid_T)


def noisy_top_k(
    logits_TE: Array,
    noise_logits_TE: Array,
    normal_TE: Array | None,
    *,
    k: int,
    noise_epsilon: float = 1e-2,
    valid_T: Array | None = None,
) -> Assignment:
    """The k largest of logits with learned noise; gates are a softmax over them (arXiv 1701.06538, eq. 3-5).

    H = logits + normal * sd, with sd = softplus(noise_logits) + noise_epsilon. prob_TE is the softmax of the logits
    without noise. load_TE is the probability that fresh noise of its own would put the expert among the k (eq. 8-9):
    Phi((logit - k-th largest H of the other experts) / sd), and 1 for k = E, where there is no such H. With k = 1
    the gate is always 1, and only the load and losses on prob_TE train the router.

    Args:
      noise_logits_TE: the noise's scale before the softplus.
      normal_TE: standard normal noise; None for evaluation, which adds none and has no load_TE.
      k: experts a token, at most E.
    """
    clean_TE = _masked(logits_TE, valid_T)
    prob_TE = jax.nn.softmax(clean_TE, axis=-1)
    if normal_TE is None:
        top_TK, expert_TK = jax.lax.top_k(clean_TE, k)
        return _assign(expert_TK, jax.nn.softmax(top_TK, axis=-1), prob_TE, valid_T)

    sd_TE = jax.nn.softplus(_masked(noise_logits_TE, valid_T)) + noise_epsilon
    noisy_TE = clean_TE + _masked(normal_TE, valid_T) * sd_TE
    num_experts = clean_TE.shape[-1]
    top_TK, expert_TK = jax.lax.top_k(noisy_TE, min(k + 1, num_experts))
    assignment = _assign(expert_TK[:, :k], jax.nn.softmax(top_TK[:, :k], axis=-1), prob_TE, valid_T)
    if k == num_experts:
        load_TE = jnp.ones_like(prob_TE)
    else:
        # without an expert of the k, the k-th of the others is the next one; at a tie the two are the same number
        chosen_TE = (expert_TK[:, :k, None] == jnp.arange(num_experts)).any(axis=1)
        kth_TE = jnp.where(chosen_TE, top_TK[:, k : k + 1], top_TK[:, k - 1 : k])
        load_TE = jax.scipy.stats.norm.cdf((clean_TE - kth_TE) / sd_TE)
    return assignment._replace(load_TE=_masked(load_TE, valid_T))


def switch(logits_TE: Array, gumbel_TE: Array | None = None, *, valid_T: Array | None = None) -> Assignment:
    """The most probable expert, with its probability as the gate (Switch Transformers, arXiv 2101.03961, eq. 1-2).

    gumbel_TE: noise of the standard Gumbel distribution: then an expert is drawn by its probability (appendix C).
    """
    if gumbel_TE is None:
        return top_k(logits_TE, k=1, valid_T=valid_T)
    logits_TE = _masked(logits_TE, valid_T)
    prob_TE = jax.nn.softmax(logits_TE, axis=-1)
    expert_T1 = jnp.argmax(logits_TE + _masked(gumbel_TE, valid_T), axis=-1, keepdims=True)
    return _assign(expert_T1, jnp.take_along_axis(prob_TE, expert_T1, axis=-1), prob_TE, valid_T)


def gshard(logits_TE: Array, uniform_T: Array | None, *, threshold: float, valid_T: Array | None = None) -> Assignment:
    """The two most probable experts, the second one by chance (GShard, arXiv 2006.16668, algorithm 1).

    g_i = p_i / (p_1 + p_2 + 1e-9); the second is kept iff uniform < g_2 / threshold, and otherwise is no expert. The
    first keeps its g_1 either way. With one expert there is no second.

    Args:
      uniform_T: random numbers in [0, 1); None keeps every second expert.
      threshold: the g_2 from which on the second expert is always kept: 0.5 in the paper; 0 keeps every one.
    """
    prob_TE = jax.nn.softmax(_masked(logits_TE, valid_T), axis=-1)
    num_experts = prob_TE.shape[-1]
    top_TK, expert_TK = jax.lax.top_k(prob_TE, min(2, num_experts))
    gate_TK = top_TK / (top_TK.sum(axis=-1, keepdims=True) + 1e-9)
    if num_experts == 1:
        expert_TK = jnp.pad(expert_TK, ((0, 0), (0, 1)), constant_values=num_experts)
        gate_TK = jnp.pad(gate_TK, ((0, 0), (0, 1)))
    elif uniform_T is not None and threshold > 0:
        kept_T = uniform_T < gate_TK[:, 1] / threshold
        kept_TK = jnp.stack([jnp.ones_like(kept_T), kept_T], axis=1)
        expert_TK = jnp.where(kept_TK, expert_TK, num_experts)
        gate_TK = jnp.where(kept_TK, gate_TK, 0.0)
    return _assign(expert_TK, gate_TK, prob_TE, valid_T)


def top_k(logits_TE: Array, *, k: int, normalise: bool = False, valid_T: Array | None = None) -> Assignment:
    """Each token chooses its k most probable experts; a gate is the softmax probability.

    With k=1 this is the Switch router (arXiv 2101.03961, eq. 1-2), without `normalise` that of DeepSeekMoE (2401.06066,
    eq. 3-5) and OLMoE (2409.02060), with it that of Mixtral (2401.04088, section 2.1).

    Args:
      k: experts a token, at most E.
      normalise: divide the gates by their sum, which is a softmax over the k logits. With k=1 every gate is then 1, and
        the router learns from nothing but the losses on prob_TE.
    """
    prob_TE = jax.nn.softmax(_masked(logits_TE, valid_T), axis=-1)
    gate_TK, expert_TK = jax.lax.top_k(prob_TE, k)
    if normalise:
        gate_TK /= gate_TK.sum(axis=-1, keepdims=True)
    return _assign(expert_TK, gate_TK, prob_TE, valid_T)


def _in_top_groups(score_TE: Array, *, k: int, num_groups: int, top_groups: int, num_best: int) -> Array:
    """Whether each expert is in one of the top groups; a group's score is the sum of its num_best best experts'."""
    num_experts = score_TE.shape[-1]
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide the {num_experts} experts; set it to a divisor")
    size = num_experts // num_groups
    if not 1 <= top_groups <= num_groups or k > top_groups * size:
        raise ValueError(
            f"top_groups={top_groups} of {num_groups} groups of {size} cannot give each token k={k} experts; "
            f"set it to {-(-k // size)} to {num_groups}, or k to at most {num_experts}"
        )
    score_TGN = score_TE.reshape(-1, num_groups, size)
    score_TG = jax.lax.top_k(score_TGN, min(num_best, size))[0].sum(axis=-1)
    group_TK = jax.lax.top_k(score_TG, top_groups)[1]
    kept_TG = (group_TK[..., None] == jnp.arange(num_groups)).any(axis=1)
    return jnp.repeat(kept_TG, size, axis=1)


def group_limited(
    logits_TE: Array, *, k: int, num_groups: int, top_groups: int, scale: float = 1.0, valid_T: Array | None = None
) -> Assignment:
    """The k most probable experts of the groups with the most probable experts (DeepSeek-V2, arXiv 2405.04434, 2.2.2).

    A gate is scale * softmax probability, not renormalised. Group g has the experts g * E / G and on.

    Args:
      k: experts a token, at most top_groups * E / num_groups.
      num_groups: groups of experts, such as one a device; a divisor of E.
      top_groups: groups a token chooses from.
      scale: the released model has 16.

    Raises:
      ValueError: the groups are not equal, or too few for k experts.
    """
    prob_TE = jax.nn.softmax(_masked(logits_TE, valid_T), axis=-1)
    kept_TE = _in_top_groups(prob_TE, k=k, num_groups=num_groups, top_groups=top_groups, num_best=1)
    # -1, not 0: a probability of the top groups that underflowed to 0 comes before those of the other groups
    gate_TK, expert_TK = jax.lax.top_k(jnp.where(kept_TE, prob_TE, -1.0), k)
    return _assign(expert_TK, scale * gate_TK, prob_TE, valid_T)


def sigmoid_bias(
    logits_TE: Array,
    bias_E: Array,
    *,
    k: int,
    num_groups: int,
    top_groups: int,
    scale: float = 1.0,
    valid_T: Array | None = None,
) -> Assignment:
    """The k experts with the largest s + bias, s = sigmoid(logits) (DeepSeek-V3, arXiv 2412.19437, eq. 13-16).

    A gate is scale * s / (sum of s over the chosen + 1e-20): the bias chooses and does not weigh, and has no gradient.
    A group's score is the sum of its two largest s + bias. prob_TE is s / (sum of s over all experts). With k = 1 the
    gate is always `scale`, and the router learns from nothing but the losses on prob_TE.

    Args:
      bias_E: what keeps the experts in balance.
      k: experts a token, at most top_groups * E / num_groups.
      num_groups: groups of experts; a divisor of E. 1 for no limit.
      top_groups: groups a token chooses from.
      scale: the paper has 2.5.

    Raises:
      ValueError: the groups are not equal, or too few for k experts.
    """
    logits_TE = _masked(logits_TE, valid_T)
    biased_TE = jax.lax.stop_gradient(jax.nn.sigmoid(logits_TE) + bias_E.astype(jnp.float32))
    kept_TE = _in_top_groups(biased_TE, k=k, num_groups=num_groups, top_groups=top_groups, num_best=2)
    expert_TK = jax.lax.top_k(jnp.where(kept_TE, biased_TE, -jnp.inf), k)[1]
    # in logs: the gradient of the division squares 1e-20, which is 0 in float32, and is NaN once the s underflow
    log_TE = jax.nn.log_sigmoid(logits_TE)
    log_TK = jnp.take_along_axis(log_TE, expert_TK, axis=1)
    log_sum_T1 = jnp.logaddexp(jax.nn.logsumexp(log_TK, axis=-1, keepdims=True), math.log(1e-20))
    return _assign(expert_TK, scale * jnp.exp(log_TK - log_sum_T1), jax.nn.softmax(log_TE, axis=-1), valid_T)


def expert_choice(logits_TE: Array, *, capacity: int, valid_T: Array | None = None) -> Assignment:
    """Each expert takes the `capacity` tokens most probable for it (Zhou et al. 2022, arXiv 2202.09368, section 3.2).

    K = E; a gate is the softmax probability over the experts, 0 where the expert did not take the token. A token may
    have any number of experts, and fewer tokens than the capacity are all taken. Tokens with a NaN are never taken.

    Not causal: whether an expert takes a token depends on all other tokens of the group, the later ones too.
    """
    prob_TE = jax.nn.softmax(_masked(logits_TE, valid_T), axis=-1)
    num_tokens, num_experts = prob_TE.shape
    active_T = ~jnp.isnan(prob_TE).any(axis=1)
    if valid_T is not None:
        active_T &= valid_T
    score_ET = jax.lax.stop_gradient(jnp.where(active_T, prob_TE.T, -1.0))
    token_EC = jax.lax.top_k(score_ET, min(capacity, num_tokens))[1]
    row_E1 = jnp.arange(num_experts)[:, None]
    taken_TE = jnp.zeros(score_ET.shape, bool).at[row_E1, token_EC].set(True).T
    expert_TE = jnp.where(taken_TE, _every_expert(prob_TE), num_experts)
    return _assign(expert_TE, jnp.where(taken_TE, prob_TE, 0.0), prob_TE, active_T)


# The router's name in the field; nothing in this file needs the builtin.
def hash(token_T: Array, table_V: Array | np.ndarray, *, num_experts: int, valid_T: Array | None = None) -> Assignment:
    """The expert that a fixed table has for the token's id; every gate is 1 (Roller et al. 2021, arXiv 2106.04426).

    Ids outside [0, V) and entries outside [0, E) are no expert. prob_TE is one-hot, 0 where there is no expert.
    """
    table_V = jnp.asarray(table_V, jnp.int32)
    label_T = table_V.at[token_T].get(mode="fill", fill_value=num_experts, wrap_negative_indices=False)
    return label(label_T, num_experts=num_experts, valid_T=valid_T)


def _sinkhorn_column(logits_TE: Array, active_T: Array, tolerance: float, max_iterations: int) -> Array:
    """d1_E of the scaling d0_T * exp(logits) * d1_E with equal row sums and equal column sums, of the active tokens."""
    # Less each row's own max: d0 takes up any factor of a row, so that d1 is the same. The max of all would leave rows
    # far below it to underflow as a whole.
    peak_T1 = logits_TE.max(axis=-1, keepdims=True)
    cost_TE = jnp.where(active_T[:, None], jnp.exp(logits_TE - peak_T1), 0.0)
    num_experts = logits_TE.shape[-1]
    num_active = jnp.maximum(active_T.sum(), 1)

    def improve(state):
        iteration, column_E, _ = state
        # sums, not matmuls, which would round to bfloat16 on a TPU
        row_T = 1 / num_active / ((column_E * cost_TE).sum(axis=1) + 1e-8)
        new_E = 1 / num_experts / ((row_T[:, None] * cost_TE).sum(axis=0) + 1e-8)
        return iteration + 1, new_E, jnp.abs(new_E - column_E).mean()

    def unfinished(state):
        iteration, _, change = state
        return (iteration < max_iterations) & (change >= tolerance)

    start = (jnp.int32(0), jnp.ones(num_experts, jnp.float32), jnp.float32(jnp.inf))
    return jax.lax.while_loop(unfinished, improve, start)[1]


def sinkhorn(
    logits_TE: Array,
    *,
    k: int,
    balanced: bool,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    valid_T: Array | None = None,
) -> Assignment:
    """The k largest of the logits scaled until experts share the tokens equally (S-BASE, arXiv 2202.01169; Megatron).

    From d1 = 1: d0_t = (1/T) / (sum_e d1_e c_te + 1e-8), d1_e = (1/E) / (sum_t d0_t c_te + 1e-8), until the change of
    d1 is below the tolerance on average, for c = exp(logits) and T tokens that take part; those with a logit that is
    not finite take none and choose no expert. The choice is the top k of d0 c d1. The gate is sigmoid(logit) for k = 1,
    and for k > 1 the softmax over all experts, as is prob_TE.

    Args:
      k: experts a token, at most E.
      balanced: True in training; not causal, as d1 depends on all tokens of the group. False chooses by the logits.
    """
    logits_TE = _masked(logits_TE, valid_T)
    active_T = jnp.isfinite(logits_TE).all(axis=1)
    if valid_T is not None:
        active_T &= valid_T
    score_TE = jax.lax.stop_gradient(jnp.where(active_T[:, None], logits_TE, 0.0))
    if balanced:
        # in logs, and without d0, which changes no order within a row: no product underflows
        score_TE += jnp.log(_sinkhorn_column(score_TE, active_T, tolerance, max_iterations))
    expert_TK = jax.lax.top_k(score_TE, k)[1]
    prob_TE = jax.nn.softmax(logits_TE, axis=-1)
    weight_TE = jax.nn.sigmoid(logits_TE) if k == 1 else prob_TE
    return _assign(expert_TK, jnp.take_along_axis(weight_TE, expert_TK, axis=1), prob_TE, active_T)


def relu(logits_TE: Array, *, valid_T: Array | None = None) -> Assignment:
    """A gate is the logit where that is above 0; the others are no expert (ReMoE, arXiv 2412.14711, section 3).

    K = E. prob_TE is the gates divided by their sum: 0 in a row without experts, which adds to no expert's share.
    """
    gate_TE = jax.nn.relu(_masked(logits_TE, valid_T))
    # at least 1e-9: the gradient of the division squares the sum, which must not underflow
    prob_TE = gate_TE / jnp.maximum(gate_TE.sum(axis=-1, keepdims=True), 1e-9)
    expert_TE = jnp.where(gate_TE == 0, gate_TE.shape[-1], _every_expert(gate_TE))  # not > 0: a NaN is to show
    return _assign(expert_TE, gate_TE, prob_TE, valid_T)


def label(label_T: Array, *, num_experts: int, valid_T: Array | None = None) -> Assignment:
    """The given expert, with gate 1, such as one a task, language or domain.

    Labels outside [0, E) are no expert. prob_TE is one-hot, 0 where there is no expert.
    """
    chosen_TE = label_T[:, None] == jnp.arange(num_experts)
    if valid_T is not None:
        chosen_TE &= valid_T[:, None]
    known_TK = chosen_TE.any(axis=1, keepdims=True)
    expert_TK = jnp.where(known_TK, label_T[:, None], num_experts)
    return _assign(expert_TK, known_TK.astype(jnp.float32), chosen_TE.astype(jnp.float32), None)


def _unit(x: Array, axis: int) -> Array:
    """x / (|x| + 1e-6), with a gradient at 0, where that of the square root is infinite."""
    square = jnp.sum(x * x, axis=axis, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (norm + 1e-6)


def soft_moe(x_TD: Array, phi_DES: Array, scale: Array, *, valid_T: Array | None = None) -> tuple[Array, Array]:
    """(dispatch_TES, combine_TES): a slot is a mixture of tokens, an output of slots (Soft MoE, arXiv 2308.00951).

    logits_TES = scale * x . phi, with x and phi divided by their norm over D + 1e-6 and a learned scalar (section 2.3).
    dispatch is the softmax over the tokens, combine the softmax over all E * S slots (eq. 1-3): the input of a slot is
    sum_t dispatch x, the output of a token sum_es combine y_es. Padding tokens have 0 in both.

    Not causal: a slot holds some of every token. So does a NaN in one of them that is not padding.
    """
    x_TD = _unit(_masked(x_TD, valid_T), axis=1)
    phi_DES = _unit(phi_DES.astype(jnp.float32), axis=0)
    logits_TES = scale * jnp.einsum("td,des->tes", x_TD, phi_DES, precision=jax.lax.Precision.HIGHEST)
    valid_T11 = None if valid_T is None else valid_T[:, None, None]
    dispatch_TES = jax.nn.softmax(logits_TES, axis=0, where=valid_T11)
    combine_TES = jax.nn.softmax(logits_TES, axis=(1, 2), where=valid_T11)
    return dispatch_TES, combine_TES


def balanced_table(frequency_V: np.ndarray, num_experts: int) -> np.ndarray:
    """table_V, int32: from the most frequent token id on, each to the expert with the least load so far.

    The load is the sum of frequencies (arXiv 2106.04426, section 3). Ties go to the lower id and the lower expert: ids
    of frequency 0 add no load, so that all go to one expert; add 1 to the counts to spread them.
    """
    frequencies = np.asarray(frequency_V).tolist()  # Python's numbers do not overflow
    loads = [(0, expert) for expert in range(num_experts)]
    table_V = np.empty(len(frequencies), np.int32)
    for token in sorted(range(len(frequencies)), key=lambda v: -frequencies[v]):
        load, expert = loads[0]
        table_V[token] = expert
        heapq.heapreplace(loads, (load + frequencies[token], expert))
    return table_V
