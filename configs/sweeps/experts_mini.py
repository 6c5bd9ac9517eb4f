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
tokens read 0.61M tokens a point. That is enough to see the commands work, and too little for experts to differ:
validation loss 3.854 (mamba), 3.942, 3.939, 3.918 and 3.922 (1, 4, 8 and 16 experts) nats/token, one seed, 2 CPU cores,
11 min 10 s in all.

    moejax sweep --config=configs/sweeps/experts_mini.py --workdir=runs/experts_mini
    moejax report runs/experts_mini

The study, 1,000 steps (2.05M tokens) and 3 seeds, 1 h 55 min on 2 CPU cores beside other work:

    moejax sweep --config=configs/sweeps/experts_mini.py --workdir=runs/study --seeds=0,1,2 --jobs=2 \
        --config.training.num_steps=1000
    moejax report runs/study

Validation loss in nats/token, mean and deviation over the seeds; the mean difference of runs of one seed with its 95 %
interval and p of Student's paired test; and tokens of Mamba over tokens of the mixture to the lowest training loss that
both reached:

|  point   loss             - mamba                     p       - 1 expert                  p       speed-up
|  mamba   3.231 +- 0.005                                       -0.061 (-0.075 to -0.046)   0.003   1
|  e1      3.291 +- 0.006   0.061 (0.046 to 0.075)      0.003                                       0.88 +- 0.04
|  e4      3.277 +- 0.004   0.046 (0.024 to 0.067)      0.012   -0.015 (-0.030 to 0.001)    0.056   0.92 +- 0.04
|  e8      3.273 +- 0.007   0.042 (0.023 to 0.060)      0.010   -0.019 (-0.048 to 0.010)    0.11    0.91 +- 0.01
|  e16     3.283 +- 0.004   0.052 (0.034 to 0.071)      0.007   -0.008 (-0.019 to 0.003)    0.087   0.89 +- 0.02

So, of this size: experts bring little, 0.01 to 0.02 nats from 1 to 4 or 8, none of it certain with 3 seeds, and less
again at 16, where 7 % of the choices are dropped (e8 2.7 %, e4 0.7 %). Every mixture is worse than Mamba of equal
active parameters, where the paper has 4 experts as good and 32 better by 0.05. `moejax sweep fit` has an exponent of
the experts of -0.001 (-0.006 to 0.004): none. The paper's models have 56 times the parameters and 480 times the tokens.
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
