"""The sparse mixture-of-experts sublayer.

B batch, L sequence, G groups, T tokens a group, D model, E experts, K experts a token, C slots an expert, F hidden.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.layers import init
from moejax.ops import balance, dispatch, experts, routing


class MoeAux(NamedTuple):
    """What a MoE layer returns beside its output; but for the balance loss, sums over the batch: its parts add up.

    balance_loss: float32, load-balance loss without its weight, averaged over groups.
    count_E: int32, token choices each expert received, before capacity.
    dropped: int32, choices beyond capacity.
    entropy: float32, sum over tokens of the router's entropy in nats.
    """

    balance_loss: Array
    count_E: Array
    dropped: Array
    entropy: Array


class Moe(nnx.Module):
    """Sparse mixture of expert MLPs (Shazeer et al. 2017; Switch Transformers, arXiv 2101.03961).

    Each token goes to its top_k experts, weighted by the router's probability. Capacity is counted inside groups of
    `group_size` consecutive tokens (0: a row), so results do not depend on how rows are spread over devices.
    A dropped choice adds nothing: the token goes on by the residual alone.

    __call__(x_BLD) -> (y_BLD, MoeAux).
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        d_expert: int,
        activation: str,
        top_k: int,
        capacity_factor: float,
        eval_capacity_factor: float,
        group_size: int,
        init_scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """A capacity factor of 0 gives every expert a slot for every token: nothing is dropped."""
        self.top_k, self.activation, self.group_size, self.dtype = top_k, activation, group_size, dtype
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        columns = d_expert * experts.hidden_multiple(activation)

        def weight(*shape: int) -> Array:
            return init.scaled_normal(rngs.params(), shape, scale=init_scale)

        self.router = nnx.Param(weight(d_model, num_experts), axes=("embed", "router"))
        self.up = nnx.Param(weight(num_experts, d_model, columns), axes=("expert", "embed", "ffn"))
        self.down = nnx.Param(weight(num_experts, d_expert, d_model), axes=("expert", "ffn", "embed"))

    def __call__(self, x_BLD: Array, *, valid_BL: Array | None = None, train: bool = False) -> tuple[Array, MoeAux]:
        """valid_BL is False for padding tokens: they choose no expert, take no slot and enter no statistic."""
        batch, length, _ = x_BLD.shape
        group_size = self.group_size or length
        x_GTD = x_BLD.reshape(-1, group_size, x_BLD.shape[-1])
        valid_GT = jnp.ones((batch, length), bool) if valid_BL is None else valid_BL
        factor = self.capacity_factor if train else self.eval_capacity_factor
        y_GTD, aux = self._route(x_GTD, valid_GT.reshape(-1, group_size), self.capacity(group_size, factor))
        return y_GTD.reshape(x_BLD.shape), aux

    def step(self, x_BD: Array) -> Array:
        """One position of each row, with nothing dropped."""
        y_1BD, _ = self._route(x_BD[None], jnp.ones((1, x_BD.shape[0]), bool), x_BD.shape[0])
        return y_1BD[0]

    def capacity(self, group_size: int, factor: float) -> int:
        """Slots an expert has in a group: ceil(factor * tokens * K / E), at most one a token (Switch eq. 3)."""
        if factor == 0:
            return group_size
        slots = factor * group_size * self.top_k / self.router.shape[-1]
        return max(1, min(group_size, math.ceil(slots - 1e-9)))  # 1.1 * 100 / 11 is 10 slots, though not in binary

    def _route(self, x_GTD: Array, valid_GT: Array, capacity: int) -> tuple[Array, MoeAux]:
        num_experts = self.router.shape[-1]
        # float32 throughout (selective precision, Switch section 2.4): by default TPUs and GPUs would round the inputs
        logits_GTE = jnp.matmul(x_GTD.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST)
        assignment = jax.vmap(lambda logits_TE, valid_T: routing.top_k(logits_TE, k=self.top_k, valid_T=valid_T))(
            logits_GTE, valid_GT
        )
        slots = jax.vmap(
            lambda expert_TK: dispatch.assign_slots(expert_TK, num_experts=num_experts, capacity=capacity)
        )(assignment.expert_TK)
        x_GECD = jax.vmap(dispatch.dispatch)(x_GTD, slots)
        y_GECD = experts.expert_ffn(x_GECD, self.up[...], self.down[...], activation=self.activation)
        y_GTD = jax.vmap(dispatch.combine)(y_GECD, assignment.gate_TK, slots)

        count_E = balance.count_choices(assignment.expert_TK.reshape(-1, self.top_k), num_experts)
        num_slots = num_experts * capacity
        aux = MoeAux(
            balance_loss=jax.vmap(balance.load_balance_loss)(assignment).mean(),
            count_E=count_E,
            dropped=count_E.sum() - (slots.slot_TK < num_slots).sum(dtype=jnp.int32),
            entropy=jax.vmap(balance.router_entropy)(assignment).sum(),
        )
        return y_GTD, aux
