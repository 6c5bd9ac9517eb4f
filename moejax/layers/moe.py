"""The mixture-of-experts sublayer.

B batch, L sequence, G groups, T tokens a group, N tokens in all, D model, E experts, K experts a token, C slots an
expert, S slots in all, F hidden.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import config as config_lib
from moejax import partition
from moejax.layers import init, mlp, router
from moejax.ops import balance, dispatch_rules, expert_parallel, experts, routing


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
        halves = (2,) if experts.hidden_multiple(c.activation) == 2 else ()  # so that `tensor` splits both alike
        half_axes = ("half",) * len(halves)
        # MoE-Mamba's code counts the inputs of all experts as those of the second matrix
        fan_in = c.d_expert * (c.num_experts if scheme == "moe_mamba" else 1)

        def weight(*shape: int, fan_in: int | None = None) -> Array:
            return init.weight(rngs.params(), shape, scheme=scheme, scale=init_scale, fan_in=fan_in)

        self.router = router.Router(d_model, c, vocab_size=vocab_size, scheme=scheme, init_scale=init_scale, rngs=rngs)
        up_EDF = weight(c.num_experts, d_model, math.prod(halves) * c.d_expert)
        up_EDHF = up_EDF.reshape(c.num_experts, d_model, *halves, c.d_expert)
        self.up = nnx.Param(up_EDHF, axes=("expert", "embed", *half_axes, "ffn"))
        self.down = nnx.Param(weight(c.num_experts, c.d_expert, d_out, fan_in=fan_in), axes=("expert", "ffn", "embed"))
        up_bias = down_bias = None
        if c.bias:
            zeros_EHF = jnp.zeros((c.num_experts, *halves, c.d_expert))
            up_bias = nnx.Param(zeros_EHF, axes=("expert", *half_axes, "ffn"))
            down_bias = nnx.Param(jnp.zeros((c.num_experts, d_out)), axes=("expert", "embed"))
        self.up_bias, self.down_bias = up_bias, down_bias
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
        group_size: int = 0,
        train: bool = False,
    ) -> tuple[Array, MoeAux]:
        """valid_BL is False for padding tokens: they choose no expert, take no slot and enter no statistic.

        group_size: instead of the config's, if not 0.

        See `router.Tokens` for the other arguments; noise and dropout need keys_B and train.
        """
        valid_BL = jnp.ones(x_BLD.shape[:2], bool) if valid_BL is None else valid_BL
        tokens = router.Tokens(valid_BL=valid_BL, ids_BL=ids_BL, labels_BL=labels_BL, keys_B=keys_B)
        factor = self.config.capacity_factor if train else self.config.eval_capacity_factor
        return self._run(x_BLD, tokens, group_size or self.config.group_size or x_BLD.shape[1], factor, train)

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

    def is_dropless(self, factor: float) -> bool:
        """Whether tokens are sorted by expert; else every expert has slots for `capacity` tokens."""
        return self.config.is_dropless(factor, _rule().full_capacity)

    def _run(
        self, x_BLD: Array, tokens: router.Tokens, group_size: int, factor: float, train: bool
    ) -> tuple[Array, MoeAux]:
        if tokens.valid_BL.size % group_size:
            raise ValueError(f"group_size={group_size} does not divide the {tokens.valid_BL.size} tokens; change it")
        # padding may hold anything: a NaN times a gradient of 0 would reach the weights
        x_BLD = jnp.where(tokens.valid_BL[..., None], x_BLD, 0).astype(x_BLD.dtype)
        # On a mesh from here to the end of `_on_part` by hand: XLA would gather all tokens to choose and count.
        run = partition.on_shards(
            functools.partial(self._on_part, group_size, factor, train),
            f"BLD BM BM BM B . {expert_parallel.AXES}",
            "BLD . . . . . BM",
        )
        given = (tokens.valid_BL, tokens.ids_BL, tokens.labels_BL, tokens.keys_B)
        y_BLD, *aux = run(x_BLD, *given, self.router, *self.weights)
        if self.shared is not None:  # depends on nothing that travels, so that it can be computed meanwhile
            y_BLD += self.shared(x_BLD.astype(self.dtype))
        return y_BLD, MoeAux(*aux)

    def _on_part(
        self,
        group_size: int,
        factor: float,
        train: bool,
        x_BLD: Array,
        valid_BM: Array,
        ids_BM: Array | None,
        labels_BM: Array | None,
        keys_B: Array | None,
        choose: router.Router,
        *matrices: Any,
    ) -> tuple[Any, ...]:
        """y_BLD and the fields of MoeAux, from the rows of one device; M is L where `sequence` does not split them."""
        c, weights, rows = self.config, expert_parallel.Weights(*matrices), valid_BM.shape
        tokens = router.Tokens(valid_BL=valid_BM, ids_BL=ids_BM, labels_BL=labels_BM, keys_B=keys_B)
        settings, valid_GT = self._settings(train and keys_B is not None), valid_BM.reshape(-1, group_size)
        logits_GTE, dropped = None, jnp.zeros((), jnp.int32)
        if c.router == "soft_moe":
            y_BLD, assignment_GT = self._mix(choose, x_BLD, valid_GT, weights, settings)
        else:
            capacity = self.config.capacity(group_size, factor)
            assignment_GT, logits_GTE = choose(x_BLD, tokens, group_size=group_size, capacity=capacity, train=train)
            x_BLD = x_BLD.astype(self.dtype)
            if c.router == "soft":
                gate_BLE = partition.part(assignment_GT.gate_TK.reshape(*rows, c.num_experts), "sequence", 1)
                y_BLD = expert_parallel.all_experts(x_BLD, gate_BLE, weights, settings)
            else:
                y_BLD, dropped = self._send(x_BLD, tokens, assignment_GT, group_size, factor, train, weights, settings)
        return y_BLD, *self._aux(choose, assignment_GT, logits_GTE, valid_BM, valid_GT, dropped)

    @property
    def weights(self) -> expert_parallel.Weights:
        """Of the routed experts."""
        biases = [None if bias is None else bias[...] for bias in (self.up_bias, self.down_bias)]
        up_EDHF, up_bias_EHF = self.up[...], biases[0]
        if experts.hidden_multiple(self.config.activation) == 1:
            up_EDHF = up_EDHF[:, :, None]
            up_bias_EHF = None if up_bias_EHF is None else up_bias_EHF[:, None]
        return expert_parallel.Weights(up_EDHF, self.down[...], up_bias_EHF, biases[1])

    def _settings(self, has_noise: bool) -> expert_parallel.Settings:
        c, parts = self.config, partition.num_parts("expert")
        can_be_ragged = partition.platform() != "cpu" and c.num_choices < parts <= config_lib.MAX_RAGGED
        return expert_parallel.Settings(
            activation=c.activation,
            dtype=self.dtype,
            normalise=c.normalise_gates == "after",
            drop_rate=c.expert_dropout if has_noise else 0.0,
            grouped_matmul=_rule().grouped_matmul if c.grouped_matmul == "auto" else c.grouped_matmul,
            exchange=("ragged" if can_be_ragged else "gather") if c.exchange == "auto" else c.exchange,
            num_chunks=c.num_chunks,
        )

    def _send(
        self,
        x_BLD: Array,
        tokens: router.Tokens,
        assignment_GT: routing.Assignment,
        group_size: int,
        factor: float,
        train: bool,
        weights: expert_parallel.Weights,
        settings: expert_parallel.Settings,
    ) -> tuple[Array, Array]:
        """Tokens to their experts and back: (y_BLD, how many choices were dropped)."""
        c, none, rows = self.config, jnp.zeros((), jnp.int32), tokens.valid_BL.shape
        expert_BMK, gate_BMK, prob_BME = (
            x_GT.reshape(*rows, -1) for x_GT in (assignment_GT.expert_TK, assignment_GT.gate_TK, assignment_GT.prob_TE)
        )
        seed_BMKZ = _seeds(tokens.keys_B, expert_BMK.shape) if settings.drop_rate else None
        choices_BM = expert_parallel.Choices(expert_BMK, gate_BMK, seed_BMKZ)
        choices_BL = jax.tree.map(lambda x_BM: partition.part(x_BM, "sequence", 1), choices_BM)
        capacity = self.config.capacity(group_size, factor)
        never_drops = not train and capacity >= tokens.valid_BL.size
        is_alone = math.prod(map(partition.num_parts, partition.AXES)) == 1
        if never_drops and expert_BMK.size <= c.num_experts and is_alone:  # a step of decoding
            return expert_parallel.few(x_BLD, choices_BL, weights, settings), none
        if self.is_dropless(factor):
            return expert_parallel.dropless(x_BLD, choices_BL, weights, settings), none
        return expert_parallel.capacity(
            x_BLD,
            choices_BM,
            weights,
            settings,
            group_size=group_size,
            capacity=capacity,
            order=c.slot_order(train),
            priority_BM=prob_BME.max(axis=-1),
        )

    def _mix(
        self,
        choose: router.Router,
        x_BLD: Array,
        valid_GT: Array,
        weights: expert_parallel.Weights,
        settings: expert_parallel.Settings,
    ) -> tuple[Array, routing.Assignment]:
        """Soft MoE: every slot a mixture of a group's tokens, every token a mixture of the slots' outputs."""
        c, x_BMD = self.config, partition.gathered(x_BLD, "sequence", 1)
        x_GTD = x_BMD.reshape(*valid_GT.shape, -1)
        dispatch_GTES, combine_GTES = choose.mixtures(x_GTD, valid_GT)
        x_EGSD = jnp.einsum("gtes,gtd->egsd", dispatch_GTES.astype(self.dtype), x_GTD.astype(self.dtype))
        y_ECD = expert_parallel.slots(x_EGSD.reshape(c.num_experts, -1, x_GTD.shape[-1]), weights, settings)
        y_EGSD = y_ECD.reshape(*x_EGSD.shape[:-1], -1)
        y_GTD = jnp.einsum("gtes,egsd->gtd", combine_GTES.astype(self.dtype), y_EGSD)
        share_GTE = combine_GTES.sum(axis=-1)
        every_GTE = jnp.broadcast_to(jnp.arange(c.num_experts), share_GTE.shape)
        assignment_GT = routing.Assignment(expert_TK=every_GTE, gate_TK=share_GTE, prob_TE=share_GTE)
        return partition.part(y_GTD.reshape(*x_BMD.shape[:2], -1), "sequence", 1), assignment_GT

    def _aux(
        self,
        choose: router.Router,
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
            assert choose.state is not None
            losses["relu"] *= jax.lax.stop_gradient(choose.state[...])
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
        entropy = jax.vmap(balance.router_entropy)(assignment_GT.prob_TE, valid_GT).sum()
        together_EE = balance.coactivation(expert_NK, c.num_experts) if is_sparse and num_choices > 1 else None
        shards = math.prod(map(partition.num_parts, partition.BATCH_AXES))  # each with as many groups and rows
        losses, count_E, dropped, entropy, together_EE = partition.summed(
            (jax.tree.map(lambda loss: loss / shards, losses), count_E, dropped, entropy, together_EE),
            *partition.BATCH_AXES,
        )
        return MoeAux(
            losses=losses,
            count_E=count_E,
            dropped=dropped,
            entropy=entropy,
            together_EE=together_EE,
            preferred_BL=jnp.take_along_axis(expert_NK, best_N1, axis=1).reshape(valid_BL.shape),
        )


def _rule() -> dispatch_rules.Rule:
    return dispatch_rules.RULES.get(partition.platform(), dispatch_rules.RULES["gpu"])


def _seeds(keys_B: Array | None, shape: tuple[int, ...]) -> Array:
    """seed_BLKZ: the data of a random key of its own for each choice, so that it has the same noise in any slot."""
    assert keys_B is not None
    place_M = jnp.arange(math.prod(shape[1:])) + 1
    keys_BM = jax.vmap(lambda key: jax.vmap(lambda place: jax.random.fold_in(key, place))(place_M))(keys_B)
    return jax.random.key_data(keys_BM).reshape(*shape, -1)


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
