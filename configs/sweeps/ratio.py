"""MoE-Mamba's Table 2 (arXiv 2401.04081): how to divide active parameters between Mamba and experts.

m of 6 parts of a period are Mamba's and the rest a Switch layer's: Mamba expands by 2m/3, and one of its experts is
512 * (6 - m) wide, of which there are as many as keep the total about the same. 8 periods, d_model 512; 15,000 steps of
64 rows of 1,024 tokens, 0.98B tokens of C4. Without experts: 6to0, whose 8 layers of Mamba expand by 4, and Mamba as
it is, 16 layers. Parameters as counted (`--dry-run`), without embedding and head:

    point    expand    width    experts    total          active
    mamba    2         -        -           27,131,904    27,131,904
    6to0     4         -        -           27,123,712    27,123,712
    1to5     2/3       2560     19         403,067,928    25,580,568
    2to4     4/3       2048     24         411,797,552    25,921,584
    3to3     2         1536     32         416,358,400    26,288,128
    4to2     8/3       1024     48         420,938,776    26,674,200
    5to1     10/3      512      96         425,650,224    27,191,344

The paper's caption says 542M parameters in all; with the numbers of experts of its code it is what is counted here.
Its losses are in a figure alone, but for those without experts: 3.72 for mamba and 3.73 for 6to0. We have not run
these. The rows and the recipe are those of configs/moe_mamba.py: learning rate 5e-4 as in the paper's code, of 6to0,
too, and of mamba 1e-3 as in the paper's Table 6.

    moejax sweep --config=configs/sweeps/ratio.py --workdir=runs/ratio --dry-run
    moejax sweep --config=configs/sweeps/ratio.py --workdir=runs/ratio
"""

import pathlib
import runpy

from moejax import config
from moejax.sweep import grid

_ROWS = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "moe_mamba.py"))["ROWS"]


def get_config() -> config.Config:
    """Half and half, which is Table 4's model with 32 experts."""
    return _ROWS["ratio_3_3"]()


def get_sweep() -> grid.Sweep:
    """The table's five ratios, and two models without experts."""
    base = get_config()
    rows = grid.from_config("mamba", _ROWS["mamba_1b"](), base)
    for parts in (6, 1, 2, 3, 4, 5):
        rows += grid.from_config(f"{parts}to{6 - parts}", _ROWS[f"ratio_{parts}_{6 - parts}"](), base)
    return grid.Sweep(base, rows, baseline="mamba")
