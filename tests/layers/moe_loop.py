"""The mixture of experts in float64, by loops over groups, tokens, choices and experts; and layers to compare."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import router_loops
from flax import nnx

from moejax import config as config_lib
from moejax.layers import moe

ROUTERS = tuple(config_lib.ROUTERS)
ACTIVATIONS = config_lib.ACTIVATIONS
BATCH, LENGTH, D_MODEL, EXPERTS, VOCABULARY = 2, 8, 4, 6, 7
NOISY = ("noisy_top_k", "switch", "gshard")
# whose last expert gets no token, as no token chooses it
COLD = tuple(name for name in ROUTERS if name not in ("soft", "soft_moe", "expert_choice", "sinkhorn"))
STATES = {
    "sigmoid_bias": np.array([0.3, -0.2, 0.1, 0.0, 0.2, -1.0], np.float32),
    "hash": np.array([3, 0, 1, 1, 2, 4, 0], np.int32),
    "relu": np.float32(0.7),
}


def activate(hidden, activation):
    """gelu in its tanh form (arXiv 1606.08415); the gated ones of arXiv 2002.05202, the gate first."""
    gelu = lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))  # noqa: E731
    half = hidden.shape[-1] // 2
    gate, up = hidden[..., :half], hidden[..., half:]
    match activation:
        case "relu":
            return np.maximum(hidden, 0)
        case "gelu":
            return gelu(hidden)
        case "swiglu":
            return gate / (1 + np.exp(-gate)) * up
        case "geglu":
            return gelu(gate) * up


def mlp(x, w, activation, expert=...):
    hidden = np.tensordot(x, w["up"][expert], axes=1) + (w["up_bias"][expert] if "up_bias" in w else 0)
    hidden = hidden.reshape(*x.shape[:-1], -1)  # a gated activation's halves stand in a dim of their own
    return activate(hidden, activation) @ w["down"][expert] + (w["down_bias"][expert] if "down_bias" in w else 0)


class Result(NamedTuple):
    """received_E: choices that each expert had a slot for. The others are as in the layer's output and aux."""

    y: np.ndarray
    losses: dict[str, float]
    count_E: np.ndarray
    received_E: np.ndarray
    dropped: int
    entropy: float
    together_EE: np.ndarray
    preferred_BL: np.ndarray


class Inputs(NamedTuple):
    """What a layer is called with, beside x. draws: the random numbers of `Router`, by the name of the router."""

    valid_BL: np.ndarray
    ids_BL: np.ndarray
    labels_BL: np.ndarray
    train: bool
    draws: Any = None


def capacity_of(c, size, train):
    factor = c.capacity_factor if train else c.eval_capacity_factor
    if factor == 0 or c.dispatch == "dropless":
        return size
    return max(1, min(size, math.ceil(factor * size * (c.top_k or config_lib.ROUTERS[c.router].top_k) / c.num_experts)))


def run(c, w, state, x, inputs):
    """The layer of config c with weights w (nested, by attribute) and router state on x_BLD."""
    num_experts, size = c.num_experts, c.group_size or x.shape[1]
    valid = inputs.valid_BL.reshape(-1)
    tokens = np.where(valid[:, None], x.reshape(-1, x.shape[-1]), 0)  # padding is cleared, for shared experts too
    y, parts, dropped = np.zeros(tokens.shape), [], 0
    received = np.zeros(num_experts, int)
    for start in range(0, len(tokens), size):
        here = slice(start, start + size)
        if c.router == "soft_moe":
            y[here], share = mix(c, w, tokens[here], valid[here])
            every = np.where(valid[here, None], np.arange(num_experts), num_experts)
            parts.append((every, share, share, None, None))
            received += size
            continue
        capacity = capacity_of(c, size, inputs.train)
        expert_TK, gate_TK, prob_TE, load_TE, logits_TE = route(c, w, state, tokens, inputs, here, capacity)
        kept_TK, used_E = serve(c, expert_TK, prob_TE, capacity)
        dropped += ((expert_TK < num_experts) & ~kept_TK).sum()
        received += used_E
        weight_TK = gate_TK * kept_TK
        if c.normalise_gates == "after":
            weight_TK = weight_TK / (weight_TK.sum(axis=1, keepdims=True) + 1e-9)
        for t, k in zip(*np.nonzero(kept_TK), strict=True):
            y[start + t] += weight_TK[t, k] * mlp(tokens[start + t], w, c.activation, expert_TK[t, k])
        parts.append((expert_TK, gate_TK, prob_TE, load_TE, logits_TE))
    if c.num_shared_experts:
        y += mlp(tokens, w["shared"], c.activation)
    columns = [None if column[0] is None else np.concatenate(column) for column in zip(*parts, strict=True)]
    expert_NK, gate_NK, prob_NE = columns[:3]
    chosen = [{e for e in row if e < num_experts} for row in expert_NK]
    best = [
        max(range(len(row)), key=lambda k: (row[k] < num_experts, gate_NK[n, k])) for n, row in enumerate(expert_NK)
    ]
    counted = expert_NK if config_lib.ROUTERS[c.router].sparse else None
    return Result(
        y=y.reshape(x.shape),
        losses=losses_of(c, columns, valid, size, x.shape[1], inputs, state),
        count_E=np.array(
            [(counted == e).sum() if counted is not None else gate_NK[:, e].sum() for e in range(num_experts)]
        ),
        received_E=received,
        dropped=dropped,
        entropy=-sum(p * math.log(p) for p in prob_NE[valid].reshape(-1) if p > 0),
        together_EE=np.array(
            [[sum({i, j} <= row for row in chosen) for j in range(num_experts)] for i in range(num_experts)]
        ),
        preferred_BL=np.array([row[k] for row, k in zip(expert_NK, best, strict=True)]).reshape(inputs.valid_BL.shape),
    )


def route(c, w, state, tokens, inputs, here, capacity):
    """(expert_TK, gate_TK, prob_TE, load_TE, logits_TE) of the tokens `here`."""
    k, valid, logits = c.top_k or config_lib.ROUTERS[c.router].top_k, inputs.valid_BL.reshape(-1)[here], None
    drawn = None if inputs.draws is None else inputs.draws.reshape(len(tokens), -1)[here]
    if "weight" in w.get("router", {}):
        routed = tokens[here] * (drawn if c.router == "switch" and drawn is not None else 1)
        logits = routed @ w["router"]["weight"]
    groups = {"num_groups": c.num_groups, "top_groups": c.top_groups, "scale": c.gate_scale}
    match c.router:
        case "noisy_top_k":
            noise = {"noise_logits_TE": tokens[here] @ w["router"]["noise"]}
            normal = np.zeros(logits.shape) if drawn is None else drawn
            arguments = noise | {"normal_TE": normal, "k": k, "noise_epsilon": c.noise_epsilon}
        case "gshard":
            uniform = np.full(len(logits), -1) if drawn is None else drawn[:, 0]
            arguments = {"uniform_T": uniform, "threshold": c.second_threshold}
        case "top_k":
            arguments = {"k": k, "normalise": c.normalise_gates == "before"}
        case "group_limited":
            arguments = groups | {"k": k}
        case "sigmoid_bias":
            arguments = groups | {"k": k, "bias_E": np.asarray(state)}
        case "expert_choice":
            arguments = {"capacity": capacity}
        case "sinkhorn":
            arguments = {"k": k, "balanced": inputs.train}
        case "hash":
            logits, arguments = inputs.ids_BL.reshape(-1)[here], {"table_V": state, "num_experts": c.num_experts}
        case "label":  # more labels than experts: they go around
            logits, arguments = inputs.labels_BL.reshape(-1)[here], {"num_experts": c.num_experts}
            logits = np.where(logits < 0, -1, logits % c.num_experts)
        case _:
            arguments = {}
    expert, gate, prob, *load = getattr(router_loops, c.router)(logits, valid, **arguments)
    load = load[0] if load and drawn is not None else None
    return np.asarray(expert, int), gate, np.where(valid[:, None], prob, 0), load, logits


def serve(c, expert_TK, prob_TE, capacity):
    """(kept_TK, how many choices each expert kept), in the order of the config."""
    order = {"auto": "choices" if c.router == "gshard" else "tokens"}.get(c.capacity_order, c.capacity_order)
    dropless = c.dispatch == "dropless" or c.router == "soft" or (c.router == "relu" and c.dispatch == "auto")
    tokens, choices = range(expert_TK.shape[0]), range(expert_TK.shape[1])
    if order == "priority":
        tokens = sorted(tokens, key=lambda t: (-max(prob_TE[t]), t))
    queue = (
        [(t, k) for t in tokens for k in choices] if order == "tokens" else [(t, k) for k in choices for t in tokens]
    )
    kept_TK, used = np.zeros(expert_TK.shape, bool), np.zeros(c.num_experts, int)
    for t, k in queue:
        e = expert_TK[t, k]
        if e < c.num_experts and (dropless or used[e] < capacity):
            kept_TK[t, k] = True
            used[e] += 1
    return kept_TK, used


def mix(c, w, x, valid):
    dispatch_TES, combine_TES = router_loops.soft_moe(x, w["router"]["weight"], w["router"]["scale"], valid)
    y = np.zeros(x.shape)
    for e, s in np.ndindex(*dispatch_TES.shape[1:]):
        y += np.outer(
            combine_TES[:, e, s], mlp(dispatch_TES[:, e, s] @ np.where(valid[:, None], x, 0), w, c.activation, e)
        )
    return y, combine_TES.sum(axis=2)


# --- losses --------------------------------------------------------------------------------------------------------


def losses_of(c, columns, valid, size, length, inputs, state):
    """name -> the mean over groups (for sequence, over rows) of each loss."""
    out = {}
    for name in c.loss_weights():
        span = length if name == "sequence" else size
        starts = range(0, len(valid), span)
        parts = [[None if x is None else x[s : s + span][valid[s : s + span]] for x in columns] for s in starts]
        out[name] = float(np.mean([loss_of(name, c, *part) for part in parts]))
    if "relu" in out:
        out["relu"] *= float(state)
    return out


def loss_of(name, c, expert_TK, gate_TK, prob_TE, load_TE, logits_TE):
    """Of the valid tokens of a group; the formulas of the papers, which config.MoeConfig names."""
    num_experts, num_tokens = prob_TE.shape[1], len(prob_TE)
    if num_tokens == 0:
        return 0
    counted = expert_TK[:, :1] if name == "balance" and c.router == "gshard" else expert_TK
    count = np.array([(counted == e).sum() for e in range(num_experts)])
    share, mean = count / max(count.sum(), 1), prob_TE.mean(axis=0)
    per_group = num_experts // c.num_groups
    in_groups = lambda v: v.reshape(c.num_groups, per_group).sum(axis=1)  # noqa: E731
    match name:
        case "sequence" if c.router == "sigmoid_bias":  # DeepSeek-V3 eq. 18: the choice by affinity, without the bias
            k = c.num_choices
            best = [sorted(range(num_experts), key=lambda e: -p[e])[:k] for p in prob_TE]
            used = np.array([sum(e in chosen for chosen in best) for e in range(num_experts)])
            return (num_experts / (k * num_tokens) * used * mean).sum()
        case "balance" | "sequence":
            return num_experts * (share * mean).sum()
        case "importance":
            return cv_squared([gate_TK[expert_TK == e].sum() for e in range(num_experts)])
        case "load":
            return 0 if load_TE is None else cv_squared(load_TE.sum(axis=0))
        case "z":
            return np.mean([math.log(np.exp(s).sum()) ** 2 for s in logits_TE])
        case "device":
            return c.num_groups * (in_groups(share) * in_groups(mean)).sum()
        case "communication":
            sent = [
                sum(any(e // per_group == g for e in row if e < num_experts) for row in expert_TK)
                for g in range(c.num_groups)
            ]
            return c.num_groups / c.top_groups * (np.array(sent) / num_tokens * in_groups(mean)).sum()
        case "relu":
            used = [(gate_TK[:, e] > 0).mean() * gate_TK[:, e].mean() for e in range(num_experts)]
            return num_experts / (c.top_k or 1) * sum(used)


def cv_squared(values):
    return np.var(values) / (np.mean(values) ** 2 + 1e-10)


# --- layers and what they are called with ----------------------------------------------------------------------------


def create(config, d_model=D_MODEL, **arguments):
    return moe.Moe(
        d_model,
        config,
        **{"vocab_size": VOCABULARY, "init_scale": 1.0, "dtype": jnp.dtype("float32")} | arguments,
        rngs=nnx.Rngs(params=0),
    )


def zeros(config, d_model=D_MODEL):
    """A layer of zeros, to be filled by hand."""
    shapes = jax.eval_shape(lambda: create(config, d_model))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def make(fill, **settings):
    """A layer with weights of size one; the last expert of a router in COLD is one that no token chooses."""
    defaults = {
        "num_experts": EXPERTS,
        "d_expert": 6,  # enough that no ReLU expert is dead
        "capacity_factor": 0.6,
        "eval_capacity_factor": 0.0,
        "top_k": 2 if settings["router"] in ("relu", "sinkhorn") else 0,
        "jitter": 0.3,
        "second_threshold": 0.5,
        "num_groups": 3,
        "top_groups": 2,
        "gate_scale": 2.5,
    }
    config = config_lib.MoeConfig(**{**defaults, **settings})
    module = fill(lambda: create(config), scale=1.0)
    if config.router in COLD and module.router.weight is not None:
        module.router.weight[...][0, -1] = -20
    if config.router in STATES:
        module.router.state.set_value(STATES[config.router])
    return module


def draw_inputs(router="", train=True, padded=True):
    """(x_BLD, what the layer is called with, keys_B): the first channel of x is 1."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(BATCH, LENGTH, D_MODEL)).astype(np.float32)
    x[..., 0] = 1
    valid = np.arange(LENGTH) < np.array([[LENGTH - 2], [LENGTH]]) if padded else np.ones((BATCH, LENGTH), bool)
    ids = rng.integers(VOCABULARY, size=(BATCH, LENGTH)).astype(np.int32)
    labels = rng.choice([0, 1, 2, 3, 4, 6, 7, -1], size=(BATCH, LENGTH)).astype(np.int32)
    keys, draws = jax.random.split(jax.random.key(5), BATCH), None
    if train and router in NOISY:  # of a row by its own key, as the router's docstring says
        draw = {
            "noisy_top_k": lambda key: jax.random.normal(key, (LENGTH, EXPERTS)),
            "switch": lambda key: jax.random.uniform(key, (LENGTH, D_MODEL), minval=0.7, maxval=1.3),
            "gshard": lambda key: jax.random.uniform(key, (LENGTH,)),
        }[router]
        draws = np.stack([np.asarray(draw(key), np.float64) for key in keys])
    return x, Inputs(valid, ids, labels, train, draws), keys


def split(module):
    """(its parameters by path, nested; the router's state; a function from the parameters to the module)."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    state = None if module.router.state is None else np.asarray(module.router.state[...])
    return nnx.to_pure_dict(params), state, lambda pure: nnx.merge(graph, _replaced(params, pure), rest)


def _replaced(params, pure):
    params = jax.tree.map(lambda x: x, params)
    nnx.replace_by_pure_dict(params, pure)
    return params


def call(module, x, inputs, keys=None):
    return module(
        x,
        valid_BL=inputs.valid_BL,
        ids_BL=inputs.ids_BL,
        labels_BL=inputs.labels_BL,
        keys_B=keys,
        train=inputs.train,
    )
