"""The moments and the cut of every drawn parameter, of a whole model, are those of the scheme's closed form."""

import math

import jax
import numpy as np
import pytest
import tiny

from moejax import config as config_lib

D, F, E, X, V, SCALE = 64, 96, 4, 48, 1000, 0.1

# Inputs of one unit of each weight; the second matrix of the experts counts those of all experts in MoE-Mamba's code.
FAN_IN = {
    "attention/qkv": D, "attention/out": D, "mlp/up": D, "mlp/down": F, "moe/weight": D, "moe/up": D, "moe/down": X,
    "head": D,
}  # fmt: skip


def moments(cut: float) -> float:
    """The sd of a standard normal that is drawn again beyond +-cut: 1 - 2 c phi(c) / (2 Phi(c) - 1), its root."""
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))


@pytest.mark.parametrize("scheme", ["switch", "moe_mamba"])
def test_every_weight_has_the_sd_and_the_cut_of_its_scheme(scheme):
    """sd = sqrt(0.1 / inputs); cut at 2 sd (Switch, section 2.4) or at +-0.2 (MoE-Mamba's code)."""
    c = config_lib.ModelConfig(vocab_size=V, d_model=D, period=("attention", "mlp", "moe"), num_periods=2, init=scheme)
    c.init_scale, c.tie_embeddings, c.embedding_std, c.mlp.d_ff = SCALE, False, 0.03, F
    c.moe.num_experts, c.moe.d_expert = E, X
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tiny.model(c)):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[:-1]
        name = f"{c.period[int(names[2])]}/{names[-1]}" if names[0] == "periods" else names[-1]
        if names[-1] == "scale":
            continue
        seen.add(name)
        values = np.float64(leaf)
        fan_in = FAN_IN.get(name, 1) * (E if name == "moe/down" and scheme == "moe_mamba" else 1)
        sd = math.sqrt(SCALE / fan_in)
        bound = 2 * sd if scheme == "switch" else 2 * SCALE
        if (name, scheme) == ("embedding", "switch"):
            sd, bound = 0.03, math.inf
        after = sd * moments(min(bound / sd, 30.0))
        assert values.std() == pytest.approx(after, rel=4 / math.sqrt(2 * values.size)), name  # 4 sd of the estimate
        assert abs(values.mean()) < 4 * after / math.sqrt(values.size), name
        assert np.abs(values).max() <= bound * (1 + 1e-6), name
        assert np.abs(values).max() > min(0.9 * bound, 2.5 * sd), name  # cut there, and not before
    assert seen == {*FAN_IN, "embedding"}
