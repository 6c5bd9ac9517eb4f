"""MoE-Mamba's Table 4 (arXiv 2401.04081) in small: more experts at equal active parameters, in minutes on 2 CPU cores.

The question is the paper's: does the loss fall with the number of experts that a token may choose from, while what it
goes through stays the same? The size is ours, and this reproduces no figure of the paper: 4 layers of Mamba, and 2 of
Mamba and experts in turn with 1 to 16 of them, d_model 128. A token takes one expert, whose probability is its gate,
as in Switch. The experts' width is solved for, to a multiple of 8, so that every model has the active parameters of
Mamba, embedding left out and the router counted, within 1 % (`iso_active`). As counted (`--dry-run`), without the
embedding, which has 131,072:

    point    experts    width    total        active
    mamba    -          -          466,560    466,560
    e1       1          456        467,328    467,328
    e4       4          456      1,168,512    468,096
    e8       8          448      2,070,656    465,024
    e16      16         448      3,907,712    467,072

Data: Wikipedia lead sections, byte-level BPE of 1,024 entries, as in configs/quickstart.py; 300 steps of 8 rows of 256
tokens read 0.61M tokens a point. That is enough to see the commands work, and too little for experts to differ: a study
takes more steps and seeds.
Measured, one seed, 2 CPU cores, 11 min 10 s in all: validation loss 3.854 (mamba), 3.942, 3.939, 3.918 and 3.922 (1, 4,
8 and 16 experts) nats/token, with no uncertainty to go with them.

    moejax sweep --config=configs/sweeps/experts_mini.py --workdir=runs/experts_mini
    moejax report runs/experts_mini
"""

import pathlib
import runpy

from moejax import config
from moejax.sweep import grid

_QUICKSTART = runpy.run_path(str(pathlib.Path(__file__).parent.with_name("quickstart.py")))  # its data and recipe
MAMBA = {"model.period": ("mamba", "mamba")}  # a second Mamba layer in the place of each mixture


def get_config() -> config.Config:
    """The mixture with 8 experts, of the shape of MoE-Mamba's."""
    c = _QUICKSTART["get_config"]()
    c.model.num_periods = 2
    c.model.moe.d_expert = 448
    c.training.num_steps = 300
    return c


def get_sweep() -> grid.Sweep:
    """Mamba, and mixtures of 1 to 16 experts at its active parameters."""
    mixtures = grid.iso_active(grid.over("model.moe.num_experts", 1, 4, 8, 16), like=MAMBA, multiple_of=8)
    return grid.Sweep(get_config(), [*grid.named("mamba", MAMBA), *mixtures], baseline="mamba")
