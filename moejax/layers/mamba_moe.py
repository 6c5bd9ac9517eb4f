"""The Mamba-1 block with experts in the place of its projections.

B batch, L sequence, D model, I inner.
"""

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

    __call__(u_BLD) -> (y_BLD, the MoeAux of each mixture: conv, gate, out); `step` does one position with a cache.
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
        train: bool = False,
    ) -> tuple[Array, tuple[moe.MoeAux, ...]]:
        """Segment ids of 0 mark padding, which takes no slot of an expert; the others are those of `moe.Moe`."""
        valid_BL = None if segment_ids_BL is None else segment_ids_BL > 0
        tokens: dict[str, Any] = {"valid_BL": valid_BL, "ids_BL": ids_BL, "labels_BL": labels_BL, "train": train}
        keys_3B: Any = (None,) * 3
        if keys_B is not None:
            keys_3B = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys_B)

        def project(part: moe.Moe | nnx.Param, x_BLD: Array, keys_B: Array | None) -> tuple[Array, list[moe.MoeAux]]:
            if not isinstance(part, moe.Moe):
                return x_BLD @ part[...].astype(self.dtype), []
            y_BLD, aux = part(x_BLD, keys_B=keys_B, **tokens)
            return y_BLD, [aux]

        x_BLI, conv_aux = project(self.conv_proj, u_BLD, keys_3B[0])
        z_BLI, gate_aux = project(self.gate_proj, u_BLD, keys_3B[1])
        y_BLI, _ = self._mix(x_BLI, segment_ids_BL)
        y_BLD, out_aux = project(self.out_proj, y_BLI * jax.nn.silu(z_BLI), keys_3B[2])
        return y_BLD, (*conv_aux, *gate_aux, *out_aux)

    def step(
        self, u_BD: Array, cache: mamba.MambaCache, *, ids_B: Array | None = None, labels_B: Array | None = None
    ) -> tuple[Array, mamba.MambaCache]:
        """One position, with nothing dropped: (y_BD, the next cache)."""

        def project(part: moe.Moe | nnx.Param, x_BD: Array) -> Array:
            if not isinstance(part, moe.Moe):
                return x_BD @ part[...].astype(self.dtype)
            return part.step(x_BD, ids_B=ids_B, labels_B=labels_B)

        z_BI = project(self.gate_proj, u_BD)
        y_BI, cache = self._mix_step(project(self.conv_proj, u_BD), cache)
        return project(self.out_proj, y_BI * jax.nn.silu(z_BI)), cache
