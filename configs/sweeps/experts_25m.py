"""MoE-Mamba's Table 4 (arXiv 2401.04081): does the loss fall with the number of experts at equal active parameters?

Mamba of 16 layers, and 8 layers of Mamba and Switch in turn with 1 to 32 experts of width 1536, d_model 512; 15,000
steps of 64 rows of 1,024 tokens each, 0.98B tokens of C4. Parameters as counted (`--dry-run`), without embedding and
head, the router among the active ones; the mixtures' active parameters lie within 0.5 % of one another, as the router
grows, and 3 % below Mamba's. The last two columns are the paper's: log perplexity (ema_loss, in nats a token), and
tokens of Mamba over tokens of the mixture to the same loss. We have not run these.

    point    total          active        log perplexity    speed-up
    mamba     27,131,904    27,131,904    3.72              1
    e1        26,161,152    26,161,152    3.75              below 1
    e4        63,922,176    26,173,440    3.72              1.03
    e8       114,270,208    26,189,824    3.70              1.10
    e16      214,966,272    26,222,592    3.67              1.21
    e32      416,358,400    26,288,128    3.67              1.23

The rows and the recipe are those of configs/moe_mamba.py. The learning rates are those of the paper's Table 6, 1e-3 for
Mamba and 5e-4 for mixtures; it gives none for Table 4.

    moejax sweep --config=configs/sweeps/experts_25m.py --workdir=runs/experts_25m --dry-run
    moejax sweep --config=configs/sweeps/experts_25m.py --workdir=runs/experts_25m
"""

import pathlib
import runpy

from moejax import config
from moejax.sweep import grid

_ROWS = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "moe_mamba.py"))["ROWS"]


def get_config() -> config.Config:
    """The mixture with 32 experts."""
    return _ROWS["experts_32"]()


def get_sweep() -> grid.Sweep:
    """The six rows of the table."""
    base = get_config()
    mamba = grid.from_config("mamba", _ROWS["mamba_1b"](), base)
    return grid.Sweep(base, [*mamba, *grid.over("model.moe.num_experts", 1, 4, 8, 16, 32)], baseline="mamba")
