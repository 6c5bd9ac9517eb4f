"""Every parameter is counted once, under the branch that holds it."""

import math

import jax

from moejax import config as config_lib
from moejax.analysis import params
from moejax.models import model as model_lib


def test_the_layers_of_mamba_and_mamba2_are_counted_apart_as_worked_by_hand():
    config = config_lib.ModelConfig(vocab_size=10, d_model=6, period=("mamba2", "mamba|mlp"), num_periods=3)
    config.mamba = config_lib.MambaConfig(d_state=4, dt_rank=1, d_conv=3)
    config.mamba2 = config_lib.Mamba2Config(d_state=5, d_head=3, num_groups=2, d_conv=3)
    config.mlp.d_ff = 7
    counts = params.count(config)
    # in_proj (z, x, B, C, dt), convolution over x, B, C and its bias, norm; A_log, D and dt bias a head; out_proj
    mamba2 = 6 * (12 + 12 + 10 + 10 + 4) + (3 + 1) * (12 + 10 + 10) + 12 + 3 * 4 + 12 * 6
    # in_proj (x, z), convolution and its bias, x_proj (dt, B, C), dt_proj and its bias, A_log, D, out_proj
    mamba = 6 * 24 + (3 + 1) * 12 + 12 * (1 + 2 * 4) + 12 + 12 + 12 * 4 + 12 + 12 * 6
    sizes = {"embedding": 60, "norm": 3 * 2 * 6 + 6, "mamba": 3 * mamba, "mamba2": 3 * mamba2, "mlp": 3 * 2 * 6 * 7}
    assert {name: entry["total"] for name, entry in counts["components"].items() if entry["total"]} == sizes
    assert counts["active"] == counts["total"] == sum(sizes.values())
    assert counts["total"] == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model_lib.abstract(config)))
