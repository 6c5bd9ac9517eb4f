"""The Mamba-1 block with experts in the place of its projections.

B batch, L sequence, D model, I inner.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import config as config_lib
from moejax.layers import init, mamba, moe


class MambaMoe(mamba.Ssm):
    """Mamba with any of its three projections as a mixture of experts (MoE-Mamba, arXiv 2401.04081, Table 3).

    x = conv_proj(u); z = gate_proj(u); y = ssm(x) * silu(z); out_proj(y). Each projection is a matrix without bias, or
    a `moe.Moe` from the width of its input to that of its output, which routes by its input. What a mixture drops is 0:
    where conv drops a token, the convolution sees none there; where gate or out drops it, the block adds nothing to it.
    A token that gate dropped reaches out as zeros, and with experts there takes a slot as any other does.

    __call__(u_BLD) -> (y_BLD, the MoeAux of each mixture: conv, gate, out); `prefill` and `step` as in `Mamba`.
    """

    def __init__(
        self,
        d_model: int,
        moe_config: config_lib.MoeConfig,
        *,
        moe_projections: tuple[str, ...],
        expand: float,
        out_scale: float,
        vocab_size: int = 0,
        scheme: str = "switch",
        init_scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        """moe_projections: of config.MAMBA_PROJECTIONS, those with experts. settings: the others of `mamba.Ssm`.

        vocab_size, scheme, init_scale: see `moe.Moe`. out_scale multiplies an out_proj without experts.
        """
        super().__init__(d_model, expand=expand, dtype=dtype, rngs=rngs, **settings)
        inner = mamba.inner_width(d_model, expand)

        def project(name: str, d_in: int, d_out: int, axes: tuple[str, str]) -> moe.Moe | nnx.Param:
            if name not in moe_projections:
                scale = out_scale if name == "out" else 1.0
                return nnx.Param(scale * init.uniform_fan_in(rngs.params(), (d_in, d_out)), axes=axes)
            return moe.Moe(
                d_in,
                moe_config,
                d_out=d_out,
                vocab_size=vocab_size,
                scheme=scheme,
                init_scale=init_scale,
                dtype=dtype,
                rngs=rngs,
            )

        self.conv_proj = project("conv", d_model, inner, ("embed", "inner"))
        self.gate_proj = project("gate", d_model, inner, ("embed", "inner"))
        self.out_proj = project("out", inner, d_model, ("inner", "embed"))

    @property
    def moes(self) -> list[moe.Moe]:
        """The projections with experts, in the order of their MoeAux."""
        return [part for part in (self.conv_proj, self.gate_proj, self.out_proj) if isinstance(part, moe.Moe)]

    def __call__(
        self,
        u_BLD: Array,
        *,
        segment_ids_BL: Array | None = None,
        ids_BL: Array | None = None,
        labels_BL: Array | None = None,
        keys_B: Array | None = None,
        group_size: int = 0,
        train: bool = False,
    ) -> tuple[Array, tuple[moe.MoeAux, ...]]:
        """Segment ids of 0 mark padding, which takes no slot of an expert; the others are those of `moe.Moe`."""
        valid_BL = None if segment_ids_BL is None else segment_ids_BL > 0
        tokens: dict[str, Any] = {"valid_BL": valid_BL, "ids_BL": ids_BL, "labels_BL": labels_BL}
        tokens |= {"group_size": group_size, "train": train}
        keys_3B: Any = (None,) * 3
        if keys_B is not None:
            keys_3B = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys_B)
        collected = []

        def experts(place: int, part: moe.Moe, x_BLD: Array) -> Array:
            y_BLD, aux = part(x_BLD, keys_B=keys_3B[place], **tokens)
            collected.append(aux)
            return y_BLD

        y_BLD, _ = self._run(u_BLD, experts, lambda x_BLI: self._mix(x_BLI, segment_ids_BL))
        return y_BLD, tuple(collected)

    def prefill(
        self,
        u_BLD: Array,
        *,
        segment_ids_BL: Array,
        ids_BL: Array | None = None,
        labels_BL: Array | None = None,
    ) -> tuple[Array, mamba.MambaCache]:
        """Rows, with nothing dropped: (y_BLD, the cache after the last position, of its document)."""
        tokens: dict[str, Any] = {"valid_BL": segment_ids_BL > 0, "ids_BL": ids_BL, "labels_BL": labels_BL}
        experts = lambda _, part, x_BLD: part.prefill(x_BLD, **tokens)  # noqa: E731
        return self._run(u_BLD, experts, lambda x_BLI: self._mix(x_BLI, segment_ids_BL))

    def step(
        self, u_BD: Array, cache: mamba.MambaCache, *, ids_B: Array | None = None, labels_B: Array | None = None
    ) -> tuple[Array, mamba.MambaCache]:
        """One position, with nothing dropped: (y_BD, the next cache)."""
        experts = lambda _, part, x_BD: part.step(x_BD, ids_B=ids_B, labels_B=labels_B)  # noqa: E731
        return self._run(u_BD, experts, lambda x_BI: self._mix_step(x_BI, cache))

    def _run(
        self,
        u_D: Array,
        experts: Callable[[int, moe.Moe, Array], Array],
        mix: Callable[[Array], tuple[Array, mamba.MambaCache]],
    ) -> tuple[Array, mamba.MambaCache]:
        """experts(place of conv, gate or out, mixture, its input) -> its output; mix(x) -> (y, cache)."""

        def project(place: int, part: moe.Moe | nnx.Param, x_D: Array) -> Array:
            return experts(place, part, x_D) if isinstance(part, moe.Moe) else x_D @ part[...].astype(self.dtype)

        x_I, z_I = project(0, self.conv_proj, u_D), project(1, self.gate_proj, u_D)
        y_I, cache = mix(x_I)
        return project(2, self.out_proj, y_I * jax.nn.silu(z_I)), cache
