"""The router of a mixture of experts: its weights, its state, and its choice for every routing group.

B batch, L sequence, G groups, T tokens a group, D model, E experts, K experts a token, S slots an expert, V vocabulary.
"""

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import config as config_lib
from moejax import partition
from moejax.layers import init
from moejax.ops import dropout, routing


class RouterState(nnx.Variable):
    """What a router keeps beside its weights: no gradient reaches it, and only the train step changes it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a router may know of the tokens beside their activations.

    valid_BL: False for padding. ids_BL: token ids (hash). labels_BL: of their documents (label). keys_B: a random key a
    row, so that noise does not depend on how rows are spread over devices or microbatches; None for no noise.
    """

    valid_BL: Array
    ids_BL: Array | None = None
    labels_BL: Array | None = None
    keys_B: Array | None = None


class Router(nnx.Module):
    """One of config.ROUTERS; see the function of its name in `ops.routing`.

    __call__(x_BLD, tokens, group_size=..., train=...) -> (Assignment with leading dims G and T, logits_GTE or None).
    """

    def __init__(
        self,
        d_model: int,
        config: config_lib.MoeConfig,
        *,
        vocab_size: int,
        scheme: str,
        init_scale: float,
        rngs: nnx.Rngs,
    ):
        self.config = dataclasses.replace(config)  # a copy: it is part of what jit keys its programs by
        num_experts = config.num_experts
        weight = noise = scale = state = None
        match config.router:
            case "label":
                pass
            case "hash":
                if not vocab_size:
                    raise ValueError("router=hash needs vocab_size, the size of its table; give it")
                table_V = jax.random.randint(rngs.params(), (vocab_size,), 0, num_experts)
                state = RouterState(table_V, axes=("table",))
            case "soft_moe":
                shape = (d_model, num_experts, config.slots_per_expert)
                weight_DES = math.sqrt(1 / d_model) * jax.random.normal(rngs.params(), shape)
                weight = nnx.Param(weight_DES, axes=("embed", "router", "slot"))
                scale = nnx.Param(jnp.ones(()), axes=())
            case "noisy_top_k":  # zeros, so that at first only the noise chooses (Shazeer 2017, appendix A)
                weight = nnx.Param(jnp.zeros((d_model, num_experts)), axes=("embed", "router"))
                noise = nnx.Param(jnp.zeros((d_model, num_experts)), axes=("embed", "router"))
            case _:
                weight_DE = init.weight(rngs.params(), (d_model, num_experts), scheme=scheme, scale=init_scale)
                weight = nnx.Param(weight_DE, axes=("embed", "router"))
        if config.router == "sigmoid_bias":
            state = RouterState(jnp.zeros(num_experts), axes=("router",))
        elif config.router == "relu":
            state = RouterState(jnp.asarray(config.relu_coefficient, jnp.float32), axes=())
        self.weight, self.noise, self.scale, self.state = weight, noise, scale, state

    def __call__(
        self, x_BLD: Array, tokens: Tokens, *, group_size: int, capacity: int, train: bool
    ) -> tuple[routing.Assignment, Array | None]:
        """Chooses experts for every group of `group_size` consecutive tokens.

        x_BLD: on a mesh, a device's part; where `sequence` splits rows, a part of those that `tokens` has whole.
        capacity: tokens that an expert of expert_choice takes from a group.
        """
        c, keys_B = self.config, tokens.keys_B if train else None
        rows, dtype = tokens.valid_BL.shape, jnp.dtype(c.router_dtype)
        gumbel_BLE = normal_BLE = uniform_BL = logits_BLE = noise_logits_BLE = None
        if self.weight is not None:
            if c.router == "switch" and keys_B is not None:
                x_BLD = self._explore(x_BLD, keys_B, (*rows, x_BLD.shape[-1]))
            logits_BLE = partition.gathered(_product(x_BLD, self.weight[...], dtype), "sequence", 1)
        if self.noise is not None:
            noise_logits_BLE = partition.gathered(_product(x_BLD, self.noise[...], dtype), "sequence", 1)
        if keys_B is not None and logits_BLE is not None:
            if c.router == "noisy_top_k":
                normal_BLE = _draw(jax.random.normal, keys_B, logits_BLE.shape)
            elif c.router == "gshard":
                uniform_BL = _draw(jax.random.uniform, keys_B, rows)
            elif c.router == "switch" and c.exploration == "sample":
                gumbel_BLE = _draw(jax.random.gumbel, keys_B, logits_BLE.shape)
        inputs_GT = jax.tree.map(
            lambda x_BL: x_BL.reshape(-1, group_size, *x_BL.shape[2:]),
            {
                "logits": logits_BLE,
                "noise_logits": noise_logits_BLE,
                "gumbel": gumbel_BLE,
                "normal": normal_BLE,
                "uniform": uniform_BL,
                "valid": tokens.valid_BL,
                "id": tokens.ids_BL,
                "label": tokens.labels_BL,
            },
        )
        assignment = jax.vmap(lambda inputs_T: self._choose(inputs_T, capacity, train))(inputs_GT)
        gate_GTK, prob_GTE = (
            x_GT.astype(dtype).astype(jnp.float32) for x_GT in (assignment.gate_TK, assignment.prob_TE)
        )
        return assignment._replace(gate_TK=gate_GTK, prob_TE=prob_GTE), inputs_GT["logits"]

    def _explore(self, x_BLD: Array, keys_B: Array, shape: tuple[int, ...]) -> Array:
        """The input of router=switch in training; shape: of whole rows."""
        c = self.config
        if c.exploration == "jitter" and c.jitter:
            factor_BLD = _draw(jax.random.uniform, keys_B, shape, minval=1 - c.jitter, maxval=1 + c.jitter)
        elif c.exploration == "dropout" and c.router_dropout:
            factor_BLD = dropout.factors(keys_B, shape, c.router_dropout)
        else:
            return x_BLD
        return x_BLD.astype(jnp.float32) * partition.part(factor_BLD, "sequence", 1)

    def mixtures(self, x_GTD: Array, valid_GT: Array) -> tuple[Array, Array]:
        """(dispatch_GTES, combine_GTES) of soft_moe."""
        assert self.weight is not None
        assert self.scale is not None
        phi_DES, scale = self.weight[...], self.scale[...]
        return jax.vmap(lambda x_TD, valid_T: routing.soft_moe(x_TD, phi_DES, scale, valid_T=valid_T))(x_GTD, valid_GT)

    def _choose(self, inputs_T: dict[str, Array | None], capacity: int, train: bool) -> routing.Assignment:
        """The choice in one group; `inputs_T` holds what routers need, each with a leading dim T, or None."""
        c, k = self.config, self.config.num_choices
        logits_TE, valid_T = cast(Array, inputs_T["logits"]), inputs_T["valid"]
        match c.router:
            case "soft":
                return routing.soft(logits_TE, valid_T=valid_T)
            case "noisy_top_k":
                noise_logits_TE = cast(Array, inputs_T["noise_logits"])
                return routing.noisy_top_k(
                    logits_TE, noise_logits_TE, inputs_T["normal"], k=k, noise_epsilon=c.noise_epsilon, valid_T=valid_T
                )
            case "switch":
                return routing.switch(logits_TE, inputs_T["gumbel"], valid_T=valid_T)
            case "gshard":
                return routing.gshard(logits_TE, inputs_T["uniform"], threshold=c.second_threshold, valid_T=valid_T)
            case "top_k":
                return routing.top_k(logits_TE, k=k, normalise=c.normalise_gates == "before", valid_T=valid_T)
            case "group_limited":
                return routing.group_limited(
                    logits_TE,
                    k=k,
                    num_groups=c.num_groups,
                    top_groups=c.top_groups,
                    scale=c.gate_scale,
                    valid_T=valid_T,
                )
            case "sigmoid_bias":
                assert self.state is not None
                return routing.sigmoid_bias(
                    logits_TE,
                    self.state[...],
                    k=k,
                    num_groups=c.num_groups,
                    top_groups=c.top_groups,
                    scale=c.gate_scale,
                    valid_T=valid_T,
                )
            case "expert_choice":
                return routing.expert_choice(logits_TE, capacity=capacity, valid_T=valid_T)
            case "sinkhorn":
                return routing.sinkhorn(logits_TE, k=k, balanced=train, valid_T=valid_T)
            case "relu":
                return routing.relu(logits_TE, valid_T=valid_T)
            case "hash":
                assert self.state is not None
                token_T = _given(inputs_T["id"], "hash", "token ids (ids_BL)")
                return routing.hash(token_T, self.state[...], num_experts=c.num_experts, valid_T=valid_T)
            case "label":
                label_T = _given(inputs_T["label"], "label", "labels (labels_BL)")
                # more labels than experts: label i shares an expert with label i + E
                expert_T = jnp.where(label_T >= 0, label_T % c.num_experts, c.num_experts)
                return routing.label(expert_T, num_experts=c.num_experts, valid_T=valid_T)
        raise ValueError(f"router={c.router} is not known; choose one of {', '.join(config_lib.ROUTERS)}")


def _given(x_T: Array | None, router: str, what: str) -> Array:
    if x_T is None:
        raise ValueError(f"router={router} needs the {what}; pass them to the model")
    return x_T


def _product(x_BLD: Array, weight_DE: Array, dtype: jnp.dtype) -> Array:
    """float32: throughout (selective precision, Switch section 2.4), where TPUs and GPUs by default round inputs."""
    product = jnp.matmul(x_BLD.astype(dtype), weight_DE.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return product.astype(jnp.float32)


def _draw(distribution: Any, keys_B: Array, shape: tuple[int, ...], **bounds: float) -> Array:
    """Random numbers of this shape, those of a row by its own key."""
    return jax.vmap(lambda key: distribution(key, shape[1:], **bounds))(keys_B)
