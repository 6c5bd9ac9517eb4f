"""The residual block: a norm, one branch or several in parallel, and the sum with the residual stream.

B batch, L sequence, M memory length, D model, H heads.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import config as config_lib
from moejax.layers import attention, mamba, mamba2, mamba_moe, mlp, moe, norm
from moejax.ops import dropout


class Block(nnx.Module):
    """x + sum of branch(norm(x)), pre-norm. The residual stream is float32.

    sublayer: one of config.BRANCHES, or several ("mamba|moe", MoE-Mamba's parallel form).

    __call__(x_BLD) -> (y_BLD, the MoeAux of each MoE: of each "moe", and of each projection with experts).
    """

    def __init__(self, sublayer: str, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.compute_dtype)
        self.norm = norm.build(config.norm, config.d_model, eps=config.norm_eps, dtype=dtype)
        self.branches = nnx.List([build_branch(kind, config, rngs=rngs) for kind in sublayer.split("|")])
        self.dropout = config.dropout

    def __call__(
        self,
        x_BLD: Array,
        *,
        segment_ids_BL: Array | None = None,
        positions_BL: Array | None = None,
        ids_BL: Array | None = None,
        labels_BL: Array | None = None,
        bias_HLM: Array | None = None,
        memory: attention.Memory | None = None,
        group_size: int = 0,
        keys_B: Array | None = None,
        train: bool = False,
    ) -> tuple[Array, tuple[moe.MoeAux, ...]]:
        """Segment ids of 0 mark padding; see `models.stack.Stack` and, for what a MoE gets, `router.Tokens`."""
        normed_BLD = self.norm(x_BLD)
        aux: list[moe.MoeAux] = []
        tokens: dict[str, Any] = {
            "ids_BL": ids_BL,
            "labels_BL": labels_BL,
            "group_size": group_size,
            "train": train,
        }
        for place, branch in enumerate(self.branches):
            keys_branch_B = fold_in(keys_B, place)
            # dropout's own: those of a branch's noise are as they were without it
            keys_hidden_B, keys_output_B = (
                fold_in(keys_B, len(self.branches) + 2 * place + which) if self.dropout and train else None
                for which in (0, 1)
            )
            match branch:
                case mamba.Mamba() | mamba2.Mamba2():
                    y_BLD = branch(normed_BLD, segment_ids_BL=segment_ids_BL)
                case attention.Attention():
                    y_BLD = branch(
                        normed_BLD,
                        segment_ids_BL=segment_ids_BL,
                        positions_BL=positions_BL,
                        bias_HLM=bias_HLM,
                        keys_B=keys_hidden_B,
                    )
                case attention.CrossAttention():
                    y_BLD = branch(normed_BLD, _given(memory), segment_ids_BL=segment_ids_BL, keys_B=keys_hidden_B)
                case mlp.Mlp():
                    y_BLD = branch(normed_BLD, keys_B=keys_hidden_B)
                case mamba_moe.MambaMoe():
                    y_BLD, branch_aux = branch(
                        normed_BLD, segment_ids_BL=segment_ids_BL, keys_B=keys_branch_B, **tokens
                    )
                    aux += branch_aux
                case moe.Moe():
                    valid_BL = None if segment_ids_BL is None else segment_ids_BL > 0
                    y_BLD, branch_aux = branch(normed_BLD, valid_BL=valid_BL, keys_B=keys_branch_B, **tokens)
                    aux.append(branch_aux)
                case _:
                    raise TypeError(f"no such branch: {type(branch)}")
            y_BLD = dropout.dropout(y_BLD, keys_output_B, self.dropout)
            x_BLD = x_BLD + y_BLD.astype(jnp.float32)
        return x_BLD, tuple(aux)

    def prefill(
        self,
        x_BLD: Array,
        *,
        max_length: int,
        segment_ids_BL: Array,
        ids_BL: Array | None = None,
        labels_BL: Array | None = None,
        bias_HLM: Array | None = None,
    ) -> tuple[Array, tuple[Any, ...]]:
        """`__call__` with nothing dropped, for `step` to go on from: (y_BLD, the caches after the last position)."""
        normed_BLD = self.norm(x_BLD)
        caches: list[Any] = []
        for branch in self.branches:
            cache = None
            match branch:
                case mamba.Mamba() | mamba2.Mamba2():
                    y_BLD, cache = branch.prefill(normed_BLD, segment_ids_BL=segment_ids_BL)
                case mamba_moe.MambaMoe():
                    y_BLD, cache = branch.prefill(
                        normed_BLD, segment_ids_BL=segment_ids_BL, ids_BL=ids_BL, labels_BL=labels_BL
                    )
                case attention.Attention():
                    y_BLD, cache = branch.prefill(
                        normed_BLD, max_length=max_length, segment_ids_BL=segment_ids_BL, bias_HLM=bias_HLM
                    )
                case moe.Moe():
                    valid_BL = segment_ids_BL > 0
                    y_BLD = branch.prefill(normed_BLD, valid_BL=valid_BL, ids_BL=ids_BL, labels_BL=labels_BL)
                case mlp.Mlp():
                    y_BLD = branch(normed_BLD)
                case _:
                    raise TypeError(f"no such branch: {type(branch)}")
            caches.append(cache)
            x_BLD = x_BLD + y_BLD.astype(jnp.float32)
        return x_BLD, tuple(caches)

    def init_cache(self, batch: int, max_length: int, memory: attention.Memory | None = None) -> tuple[Any, ...]:
        """One cache a branch; None for a branch that looks at its own position only."""
        caches: list[Any] = []
        for branch in self.branches:
            match branch:
                case mamba.Mamba() | mamba2.Mamba2() | mamba_moe.MambaMoe():
                    caches.append(branch.init_cache(batch))
                case attention.Attention():
                    caches.append(branch.init_cache(batch, max_length))
                case attention.CrossAttention():
                    caches.append(branch.read(_given(memory)))
                case _:
                    caches.append(None)
        return tuple(caches)

    def step(
        self,
        x_BD: Array,
        caches: tuple[Any, ...],
        *,
        ids_B: Array | None = None,
        labels_B: Array | None = None,
        relative: attention.RelativeBias | None = None,
    ) -> tuple[Array, tuple[Any, ...]]:
        """One position of `__call__`: (y_BD, the next caches)."""
        normed_BD = self.norm(x_BD)
        new_caches: list[Any] = []
        for branch, cache in zip(self.branches, caches, strict=True):
            match branch:
                case mamba.Mamba() | mamba2.Mamba2():
                    y_BD, cache = branch.step(normed_BD, cache)
                case attention.Attention():
                    y_BD, cache = branch.step(normed_BD, cache, relative=relative)
                case attention.CrossAttention():
                    y_BD = branch.step(normed_BD, cache)
                case mamba_moe.MambaMoe():
                    y_BD, cache = branch.step(normed_BD, cache, ids_B=ids_B, labels_B=labels_B)
                case moe.Moe():
                    y_BD = branch.step(normed_BD, ids_B=ids_B, labels_B=labels_B)
                case mlp.Mlp():
                    y_BD = branch(normed_BD)
                case _:
                    raise TypeError(f"no such branch: {type(branch)}")
            new_caches.append(cache)
            x_BD = x_BD + y_BD.astype(jnp.float32)
        return x_BD, tuple(new_caches)


def _given(memory: attention.Memory | None) -> attention.Memory:
    if memory is None:
        raise ValueError("cross_attention needs a memory; pass what an encoder has read")
    return memory


def fold_in(keys_B: Array | None, data: int | Array) -> Array | None:
    """A key a row for one part of what the keys are for; None stays None."""
    return None if keys_B is None else jax.vmap(lambda key: jax.random.fold_in(key, data))(keys_B)


def build_branch(
    kind: str, config: config_lib.ModelConfig, *, rngs: nnx.Rngs
) -> (
    mamba.Mamba
    | mamba2.Mamba2
    | mamba_moe.MambaMoe
    | attention.Attention
    | attention.CrossAttention
    | mlp.Mlp
    | moe.Moe
):
    """The branch named `kind`, with the settings that the config has for it."""
    dtype, d_model, init_scale = jnp.dtype(config.compute_dtype), config.d_model, config.init_scale
    out_scale = 1 / math.sqrt(len(config.sublayers)) if config.rescale_out_proj else 1.0  # of Mamba's out_proj
    match kind:
        case "mamba" | "mamba_moe":
            c = config.mamba
            settings: dict[str, Any] = {
                "expand": c.expand,
                "d_state": c.d_state,
                "d_conv": c.d_conv,
                "dt_rank": c.dt_rank,
                "dt_min": c.dt_min,
                "dt_max": c.dt_max,
                "scan_implementation": None if c.scan == "auto" else c.scan,
                "chunk_size": c.chunk_size,
                "out_scale": out_scale,
                "dtype": dtype,
                "rngs": rngs,
            }
            if kind == "mamba":
                return mamba.Mamba(d_model, **settings)
            return mamba_moe.MambaMoe(
                d_model,
                config.moe,
                moe_projections=c.moe_projections,
                vocab_size=config.vocab_size,
                scheme=config.init,
                init_scale=init_scale,
                **settings,
            )
        case "mamba2":
            c = config.mamba2
            return mamba2.Mamba2(
                d_model,
                expand=c.expand,
                d_state=c.d_state,
                d_head=c.d_head,
                num_groups=c.num_groups,
                d_conv=c.d_conv,
                dt_min=c.dt_min,
                dt_max=c.dt_max,
                A_min=c.A_min,
                A_max=c.A_max,
                norm_eps=config.norm_eps,
                scan_implementation=None if c.scan == "auto" else c.scan,
                chunk_size=c.chunk_size,
                out_scale=out_scale,
                dtype=dtype,
                rngs=rngs,
            )
        case "attention":
            c = config.attention
            return attention.Attention(
                d_model,
                num_heads=c.num_heads,
                d_head=c.d_head,
                position=c.position,
                rope_base=c.rope_base,
                causal=config.causal,
                dropout=config.dropout,
                scheme=config.init,
                init_scale=init_scale,
                dtype=dtype,
                rngs=rngs,
            )
        case "cross_attention":
            c = config.attention
            return attention.CrossAttention(
                d_model,
                num_heads=c.num_heads,
                d_head=c.d_head,
                dropout=config.dropout,
                scheme=config.init,
                init_scale=init_scale,
                dtype=dtype,
                rngs=rngs,
            )
        case "mlp":
            c = config.mlp
            return mlp.Mlp(
                d_model,
                d_ff=c.d_ff,
                activation=c.activation,
                bias=c.bias,
                dropout=config.dropout,
                scheme=config.init,
                init_scale=init_scale,
                dtype=dtype,
                rngs=rngs,
            )
        case "moe":
            return moe.Moe(
                d_model,
                config.moe,
                vocab_size=config.vocab_size,
                scheme=config.init,
                init_scale=init_scale,
                dtype=dtype,
                rngs=rngs,
            )
    raise ValueError(f"sublayer={kind} is not known; choose one of {', '.join(config_lib.BRANCHES)}")
