"""Every router by loops over tokens and experts in float64.

(logits_TE, valid_T, ...) -> rows of experts, gates, probabilities and, for one router, loads.
"""

import math

import numpy as np


def largest(values, k):
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def softmax(values):
    powers = [math.exp(v - max(values)) for v in values]
    return [p / sum(powers) for p in powers]


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def loop(row):
    """The router whose rows are row(logits of a token, the token, ...)."""

    def router(logits_TE, valid_T, **given):
        out = []
        for t, logits in enumerate(logits_TE):
            experts, gates, *rest = row(list(logits), t, **given)
            out.append(
                (experts, gates, *rest) if valid_T[t] else ([len(logits)] * len(experts), [0] * len(gates), *rest)
            )
        return [np.array(column) for column in zip(*out, strict=True)]

    return router


@loop
def soft(s, t):
    return range(len(s)), softmax(s), softmax(s)


@loop
def noisy_top_k(s, t, *, noise_logits_TE, normal_TE, k, noise_epsilon=1e-2):
    sd = [math.log(1 + math.exp(n)) + noise_epsilon for n in noise_logits_TE[t]]
    noisy = [s[i] + normal_TE[t, i] * sd[i] for i in range(len(s))]
    chosen, load = largest(noisy, k), []
    for i in range(len(s)):
        others = sorted(noisy[:i] + noisy[i + 1 :], reverse=True)
        load.append(0.5 * (1 + math.erf((s[i] - others[k - 1]) / sd[i] / math.sqrt(2))) if k < len(s) else 1)
    return chosen, softmax([noisy[i] for i in chosen]), softmax(s), load


@loop
def gshard(s, t, *, uniform_T, threshold):
    p = softmax(s)
    if len(s) == 1:
        return [0, 1], [p[0] / (p[0] + 1e-9), 0], p
    first, second = largest(p, 2)
    g1, g2 = p[first] / (p[first] + p[second] + 1e-9), p[second] / (p[first] + p[second] + 1e-9)
    kept = threshold == 0 or uniform_T[t] < g2 / threshold
    return [first, second if kept else len(s)], [g1, g2 if kept else 0], p


@loop
def top_k(s, t, *, k, normalise=False):
    p = softmax(s)
    chosen = largest(p, k)
    return chosen, softmax([s[i] for i in chosen]) if normalise else [p[i] for i in chosen], p


def switch(logits_TE, valid_T):
    return top_k(logits_TE, valid_T, k=1)


def chosen_in_groups(score, k, num_groups, top_groups, num_best):
    size = len(score) // num_groups
    groups = [sum(sorted(score[g * size : (g + 1) * size])[-num_best:]) for g in range(num_groups)]
    kept = largest(groups, top_groups)
    return largest([v if i // size in kept else -math.inf for i, v in enumerate(score)], k)


@loop
def group_limited(s, t, *, k, num_groups, top_groups, scale=1.0):
    p = softmax(s)
    chosen = chosen_in_groups(p, k, num_groups, top_groups, 1)
    return chosen, [scale * p[i] for i in chosen], p


@loop
def sigmoid_bias(s, t, *, bias_E, k, num_groups, top_groups, scale=1.0):
    p = [sigmoid(v) for v in s]
    chosen = chosen_in_groups([v + b for v, b in zip(p, bias_E, strict=True)], k, num_groups, top_groups, 2)
    total = sum(p[i] for i in chosen) + 1e-20
    return chosen, [scale * p[i] / total for i in chosen], [v / sum(p) for v in p]


def expert_choice(logits_TE, valid_T, *, capacity):
    num_tokens, num_experts = logits_TE.shape
    p = [softmax(s) for s in logits_TE]
    experts, gates = np.full(logits_TE.shape, num_experts), np.zeros(logits_TE.shape)
    for e in range(num_experts):
        for t in sorted((t for t in range(num_tokens) if valid_T[t]), key=lambda t: (-p[t][e], t))[:capacity]:
            experts[t, e], gates[t, e] = e, p[t][e]
    return experts, gates, np.array(p)


def sinkhorn(logits_TE, valid_T, *, k, balanced, max_iterations=100):
    num_experts, d1 = logits_TE.shape[1], np.ones(logits_TE.shape[1])
    cost = np.exp(logits_TE[valid_T])  # the paper's, with no maximum taken away
    for _ in range(max_iterations):
        d0 = [1 / len(cost) / (sum(d1 * row) + 1e-8) for row in cost]
        before, d1 = d1, np.array([1 / num_experts / (sum(d0 * column) + 1e-8) for column in cost.T])
        if np.abs(before - d1).mean() < 1e-4:
            break

    @loop
    def choose(s, t):
        chosen = largest(d1 * np.exp(s) if balanced else s, k)
        return chosen, [sigmoid(s[i]) if k == 1 else softmax(s)[i] for i in chosen], softmax(s)

    return choose(logits_TE, valid_T)


@loop
def relu(s, t):
    gates = [max(v, 0) for v in s]
    return [i if g > 0 else len(s) for i, g in enumerate(gates)], gates, [g / (sum(gates) or 1) for g in gates]


def label(label_T, valid_T, *, num_experts):
    expert_T = np.where(valid_T & (label_T >= 0) & (label_T < num_experts), label_T, num_experts)
    one_hot_TE = np.eye(num_experts + 1)[expert_T, :num_experts]
    return expert_T[:, None], one_hot_TE.sum(axis=1, keepdims=True), one_hot_TE


def hash(token_T, valid_T, *, table_V, num_experts):
    return label(table_V[token_T], valid_T, num_experts=num_experts)


def soft_moe(x_TD, phi_DES, scale, valid_T):
    """(dispatch_TES, combine_TES)."""
    unit = lambda v: v / (np.linalg.norm(v) + 1e-6)  # noqa: E731
    size = (len(x_TD), *phi_DES.shape[1:])
    power, dispatch, combine = np.zeros(size), np.zeros(size), np.zeros(size)
    for t, e, s in np.ndindex(*size):
        if valid_T[t]:
            power[t, e, s] = math.exp(scale * (unit(x_TD[t]) @ unit(phi_DES[:, e, s])))
    for t, e, s in np.ndindex(*size):
        if valid_T[t]:
            dispatch[t, e, s] = power[t, e, s] / power[:, e, s].sum()
            combine[t, e, s] = power[t, e, s] / power[t].sum()
    return dispatch, combine
