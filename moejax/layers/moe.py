"""The mixture-of-experts sublayer.

B batch, L sequence, G groups, T tokens a group, N tokens in all, D model, E experts, K experts a token, C slots an
expert, S slots in all, F hidden.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import config as config_lib
from moejax.layers import init, mlp, router
from moejax.ops import balance, dispatch, dispatch_rules, experts, routing


class MoeAux(NamedTuple):
    """What a MoE layer returns beside its output; but for the losses, sums over the batch: its parts add up.

    losses: name -> float32, auxiliary losses without their weights, averaged over groups.
    count_E: int32, token choices each expert received, before capacity; float32 sums of weights for soft and soft_moe.
    dropped: int32, choices beyond capacity.
    entropy: float32, sum over tokens of the router's entropy in nats.
    together_EE: int32, tokens that chose both experts; None where a token has one, or a mixture of all.
    preferred_BL: int32, the expert with the largest gate of each token; E where there is none.
    """

    losses: dict[str, Array]
    count_E: Array
    dropped: Array
    entropy: Array
    together_EE: Array | None
    preferred_BL: Array | None


class Moe(nnx.Module):
    """Mixture of expert MLPs (Shazeer et al. 2017; Switch Transformers, arXiv 2101.03961), with any router.

    Tokens go to the experts that the router chooses, and come back weighted by its gates. With a capacity, it is
    counted inside groups of `group_size` consecutive tokens (0: a row), so results do not depend on how rows are spread
    over devices. A dropped choice adds nothing: the token goes on by the residual alone. Shared experts, which every
    token goes through, are one MLP as wide as all of them: the same function, initialised as one layer of that width.

    __call__(x_BLD) -> (y_BLD, MoeAux); y is d_out wide.
    """

    def __init__(
        self,
        d_model: int,
        config: config_lib.MoeConfig,
        *,
        d_out: int = 0,
        vocab_size: int = 0,
        scheme: str = "switch",
        init_scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """d_out: 0 for d_model. vocab_size: for the table of router=hash. scheme, init_scale: see `init.weight`."""
        d_out = d_out or d_model
        c = self.config = dataclasses.replace(config)  # a copy: it is part of what jit keys its programs by
        self.dtype = dtype
        columns = c.d_expert * experts.hidden_multiple(c.activation)
        # MoE-Mamba's code counts the inputs of all experts as those of the second matrix
        fan_in = c.d_expert * (c.num_experts if scheme == "moe_mamba" else 1)

        def weight(*shape: int, fan_in: int | None = None) -> Array:
            return init.weight(rngs.params(), shape, scheme=scheme, scale=init_scale, fan_in=fan_in)

        self.router = router.Router(d_model, c, vocab_size=vocab_size, scheme=scheme, init_scale=init_scale, rngs=rngs)
        self.up = nnx.Param(weight(c.num_experts, d_model, columns), axes=("expert", "embed", "ffn"))
        self.down = nnx.Param(weight(c.num_experts, c.d_expert, d_out, fan_in=fan_in), axes=("expert", "ffn", "embed"))
        self.up_bias = nnx.Param(jnp.zeros((c.num_experts, columns)), axes=("expert", "ffn")) if c.bias else None
        self.down_bias = nnx.Param(jnp.zeros((c.num_experts, d_out)), axes=("expert", "embed")) if c.bias else None
        shared = None
        if c.num_shared_experts:
            shared = mlp.Mlp(
                d_model,
                d_ff=c.num_shared_experts * c.d_expert,
                d_out=d_out,
                activation=c.activation,
                bias=c.bias,
                scheme=scheme,
                init_scale=init_scale,
                dtype=dtype,
                rngs=rngs,
            )
        self.shared = shared

    def __call__(
        self,
        x_BLD: Array,
        *,
        valid_BL: Array | None = None,
        ids_BL: Array | None = None,
        labels_BL: Array | None = None,
        keys_B: Array | None = None,
        train: bool = False,
    ) -> tuple[Array, MoeAux]:
        """valid_BL is False for padding tokens: they choose no expert, take no slot and enter no statistic.

        See `router.Tokens` for the other arguments; noise and dropout need keys_B and train.
        """
        valid_BL = jnp.ones(x_BLD.shape[:2], bool) if valid_BL is None else valid_BL
        tokens = router.Tokens(valid_BL=valid_BL, ids_BL=ids_BL, labels_BL=labels_BL, keys_B=keys_B)
        factor = self.config.capacity_factor if train else self.config.eval_capacity_factor
        return self._run(x_BLD, tokens, self.config.group_size or x_BLD.shape[1], factor, train)

    def prefill(
        self, x_BLD: Array, *, valid_BL: Array, ids_BL: Array | None = None, labels_BL: Array | None = None
    ) -> Array:
        """Rows, with nothing dropped: what `step` gives position by position.

        Raises:
          ValueError: the router looks at all tokens of a group, so a token has no output of its own.
        """
        if not config_lib.ROUTERS[self.config.router].causal:
            raise ValueError(f"router={self.config.router} needs all tokens of a group; it can't generate")
        tokens = router.Tokens(valid_BL=valid_BL, ids_BL=ids_BL, labels_BL=labels_BL)
        return self._run(x_BLD, tokens, valid_BL.size, 0.0, False)[0]

    def step(self, x_BD: Array, *, ids_B: Array | None = None, labels_B: Array | None = None) -> Array:
        """One position of each row, with nothing dropped; raises as `prefill` does."""
        ids_B1, labels_B1 = (None if x_B is None else x_B[:, None] for x_B in (ids_B, labels_B))
        valid_B1 = jnp.ones((x_BD.shape[0], 1), bool)
        return self.prefill(x_BD[:, None], valid_BL=valid_B1, ids_BL=ids_B1, labels_BL=labels_B1)[:, 0]

    def capacity(self, group_size: int, factor: float) -> int:
        """Slots an expert has in a group: ceil(factor * tokens * K / E), at most one a token (Switch eq. 3)."""
        if factor == 0:
            return group_size
        slots = factor * group_size * self.config.num_choices / self.config.num_experts
        return max(1, min(group_size, math.ceil(slots - 1e-9)))  # 1.1 * 100 / 11 is 10 slots, though not in binary

    def is_dropless(self, factor: float) -> bool:
        """Whether tokens are sorted by expert; else every expert has slots for `capacity` tokens."""
        c, rule = self.config, dispatch_rules.RULES.get(jax.default_backend(), dispatch_rules.RULES["gpu"])
        if c.dispatch != "auto" or not config_lib.ROUTERS[c.router].sparse or c.router == "expert_choice":
            return c.dispatch == "dropless"
        never_drops = factor == 0 and c.num_experts > rule.full_capacity * c.num_choices
        return config_lib.ROUTERS[c.router].dropless or never_drops

    def _run(
        self, x_BLD: Array, tokens: router.Tokens, group_size: int, factor: float, train: bool
    ) -> tuple[Array, MoeAux]:
        c, capacity = self.config, self.capacity(group_size, factor)
        if tokens.valid_BL.size % group_size:
            raise ValueError(f"group_size={group_size} does not divide the {tokens.valid_BL.size} tokens; change it")
        # padding may hold anything: a NaN times a gradient of 0 would reach the weights
        x_BLD = jnp.where(tokens.valid_BL[..., None], x_BLD, 0).astype(x_BLD.dtype)
        x_ND = x_BLD.reshape(-1, x_BLD.shape[-1]).astype(self.dtype)
        valid_GT = tokens.valid_BL.reshape(-1, group_size)
        logits_GTE, dropped = None, jnp.zeros((), jnp.int32)
        if c.router == "soft_moe":
            y_ND, assignment_GT = self._mix(x_BLD, valid_GT)
        else:
            assignment_GT, logits_GTE = self.router(
                x_BLD, tokens, group_size=group_size, capacity=capacity, train=train
            )
            if c.router == "soft":
                gate_NE = assignment_GT.gate_TK.reshape(-1, c.num_experts)
                y_ND = experts.weighted_ffn(x_ND, gate_NE, self.weights, activation=c.activation)
            else:
                drop = self._dropout(tokens, train)
                y_ND, dropped = self._send(x_ND, assignment_GT, capacity, self.is_dropless(factor), train, drop)
        if self.shared is not None:
            y_ND += self.shared(x_ND)
        aux = self._aux(assignment_GT, logits_GTE, tokens.valid_BL, valid_GT, dropped)
        return y_ND.reshape(*x_BLD.shape[:-1], -1), aux

    @property
    def weights(self) -> experts.Weights:
        """Of the routed experts."""
        biases = [None if bias is None else bias[...] for bias in (self.up_bias, self.down_bias)]
        return experts.Weights(self.up[...], self.down[...], *biases)

    def _send(
        self,
        x_ND: Array,
        assignment_GT: routing.Assignment,
        capacity: int,
        is_dropless: bool,
        train: bool,
        drop: "Dropout | None",
    ) -> tuple[Array, Array]:
        """Tokens to their experts and back: (y_ND, how many choices were dropped)."""
        c, expert_GTK = self.config, assignment_GT.expert_TK
        num_choices = expert_GTK.shape[-1]
        gate_NK = assignment_GT.gate_TK.reshape(-1, num_choices)
        expert_NK = expert_GTK.reshape(-1, num_choices)
        if not train and capacity >= len(x_ND) and expert_NK.size <= c.num_experts:  # a step of decoding
            if c.normalise_gates == "after":
                gate_NK /= gate_NK.sum(axis=-1, keepdims=True) + 1e-9
            y_ND = experts.chosen_ffn(x_ND, expert_NK, gate_NK, self.weights, activation=c.activation)
            return y_ND, jnp.zeros((), jnp.int32)
        if is_dropless:
            slots, count_E = dispatch.dropless_slots(expert_NK, num_experts=c.num_experts)
        else:
            slots = dispatch.capacity_slots(
                expert_GTK,
                num_experts=c.num_experts,
                capacity=capacity,
                order=c.slot_order(train),
                priority_GT=assignment_GT.prob_TE.max(axis=-1),
            )
        kept_NK = dispatch.kept(slots)
        if c.normalise_gates == "after":
            gate_NK = jnp.where(kept_NK, gate_NK, 0.0)
            gate_NK /= gate_NK.sum(axis=-1, keepdims=True) + 1e-9
        x_SD = dispatch.dispatch(x_ND, slots)
        hidden_drop = None if drop is None else drop.of_slots(slots)
        if is_dropless:
            rule = dispatch_rules.RULES.get(jax.default_backend(), dispatch_rules.RULES["gpu"])
            y_SD = experts.dropless_ffn(
                x_SD,
                count_E,
                self.weights,
                activation=c.activation,
                implementation=rule.grouped_matmul if c.grouped_matmul == "auto" else c.grouped_matmul,
                drop=hidden_drop,
            )
        else:
            y_SD = experts.capacity_ffn(x_SD, self.weights, activation=c.activation, drop=hidden_drop)
        num_dropped = jnp.sum((expert_NK < c.num_experts) & ~kept_NK, dtype=jnp.int32)
        return dispatch.combine(y_SD, gate_NK, slots), num_dropped

    def _mix(self, x_BLD: Array, valid_GT: Array) -> tuple[Array, routing.Assignment]:
        """Soft MoE: every slot a mixture of a group's tokens, every token a mixture of the slots' outputs."""
        c = self.config
        x_GTD = x_BLD.reshape(*valid_GT.shape, -1)
        dispatch_GTES, combine_GTES = self.router.mixtures(x_GTD, valid_GT)
        x_EGSD = jnp.einsum("gtes,gtd->egsd", dispatch_GTES.astype(self.dtype), x_GTD.astype(self.dtype))
        y_SD = experts.capacity_ffn(x_EGSD.reshape(-1, x_EGSD.shape[-1]), self.weights, activation=c.activation)
        y_GTD = jnp.einsum("gtes,egsd->gtd", combine_GTES.astype(self.dtype), y_SD.reshape(*x_EGSD.shape[:-1], -1))
        share_GTE = combine_GTES.sum(axis=-1)
        every_GTE = jnp.broadcast_to(jnp.arange(c.num_experts), share_GTE.shape)
        assignment_GT = routing.Assignment(expert_TK=every_GTE, gate_TK=share_GTE, prob_TE=share_GTE)
        return y_GTD.reshape(-1, y_GTD.shape[-1]), assignment_GT

    def _dropout(self, tokens: router.Tokens, train: bool) -> "Dropout | None":
        rate = self.config.expert_dropout
        if not (train and rate and tokens.keys_B is not None):
            return None
        return Dropout(rate, tokens.keys_B, tokens.valid_BL.shape[1])

    def _aux(
        self,
        assignment_GT: routing.Assignment,
        logits_GTE: Array | None,
        valid_BL: Array,
        valid_GT: Array,
        dropped: Array,
    ) -> MoeAux:
        c, num_choices = self.config, assignment_GT.expert_TK.shape[-1]
        by_group = {name: _loss(name, c) for name in c.loss_weights() if name != "sequence"}
        losses = {name: jax.vmap(loss)(assignment_GT, logits_GTE, valid_GT).mean() for name, loss in by_group.items()}
        if "relu" in losses:
            assert self.router.state is not None
            losses["relu"] *= jax.lax.stop_gradient(self.router.state[...])
        if "sequence" in c.loss_weights():
            assignment_BL = jax.tree.map(lambda x_GT: x_GT.reshape(*valid_BL.shape, *x_GT.shape[2:]), assignment_GT)
            if c.router == "sigmoid_bias":  # DeepSeek-V3's eq. 18 counts what affinities without the bias would choose
                unbiased_BLK = jax.lax.top_k(assignment_BL.prob_TE, c.num_choices)[1]
                assignment_BL = assignment_BL._replace(expert_TK=unbiased_BLK)
            losses["sequence"] = jax.vmap(balance.load_balance_loss)(assignment_BL, valid_BL).mean()
        expert_NK = jnp.where(valid_BL.reshape(-1, 1), assignment_GT.expert_TK.reshape(-1, num_choices), c.num_experts)
        gate_NK = assignment_GT.gate_TK.reshape(-1, num_choices)
        best_N1 = jnp.argmax(jnp.where(expert_NK < c.num_experts, gate_NK, -1.0), axis=-1, keepdims=True)
        is_sparse = config_lib.ROUTERS[c.router].sparse
        if is_sparse:
            count_E = balance.count_choices(expert_NK, c.num_experts)
        else:
            count_E = jnp.where(valid_BL.reshape(-1, 1), gate_NK, 0.0).sum(axis=0)
        return MoeAux(
            losses=losses,
            count_E=count_E,
            dropped=dropped,
            entropy=jax.vmap(balance.router_entropy)(assignment_GT.prob_TE, valid_GT).sum(),
            together_EE=balance.coactivation(expert_NK, c.num_experts) if is_sparse and num_choices > 1 else None,
            preferred_BL=jnp.take_along_axis(expert_NK, best_N1, axis=1).reshape(valid_BL.shape),
        )


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Expert dropout: a choice's hidden units are dropped by a key of their own, so in any slot the same ones."""

    rate: float
    keys_B: Array
    length: int  # L

    def of_slots(self, slots: dispatch.Slots) -> Callable[[Array], Array]:
        """hidden_SF -> hidden_SF with a share `rate` of it 0, the rest over 1 - rate."""
        per_row = self.length * slots.slot_NK.shape[1]
        row_S = slots.choice_S // per_row
        key_S = self.keys_B.at[row_S].get(mode="clip")
        key_S = jax.vmap(lambda key, place: jax.random.fold_in(key, place + 1))(key_S, slots.choice_S % per_row)

        def drop(hidden_SF: Array) -> Array:
            keep_SF = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, hidden_SF.shape[1:]))(key_S)
            return jnp.where(keep_SF, hidden_SF / (1 - self.rate), 0)

        return drop


def _loss(name: str, c: config_lib.MoeConfig) -> Callable[[routing.Assignment, Array | None, Array], Array]:
    """The auxiliary loss of one group of tokens: (assignment, logits_TE, valid_T) -> float32."""
    match name:
        case "balance":  # GShard counts first choices alone
            num_counted = 1 if c.router == "gshard" else None
            return lambda a, _, valid_T: balance.load_balance_loss(a, valid_T, num_counted=num_counted)
        case "importance":
            return lambda a, _, valid_T: balance.importance_loss(a, valid_T)
        case "load":  # without noise, in evaluation, there is none
            return lambda a, _, valid_T: jnp.zeros(()) if a.load_TE is None else balance.load_loss(a, valid_T)
        case "z":
            return lambda _, logits_TE, valid_T: balance.z_loss(cast(Array, logits_TE), valid_T)
        case "device":
            return lambda a, _, valid_T: balance.device_loss(a, valid_T, num_groups=c.num_groups)
        case "communication":
            return lambda a, _, valid_T: balance.communication_loss(
                a, valid_T, num_groups=c.num_groups, top_groups=c.top_groups
            )
        case "relu":
            return lambda a, _, valid_T: balance.relu_loss(a, valid_T, k=c.num_choices)
    raise ValueError(f"no such loss: {name}")
