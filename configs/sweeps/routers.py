"""Every causal router at equal cost: which way of choosing experts learns most from the same tokens and FLOPs?

The model is that of configs/sweeps/experts_mini.py. A router that gives a token one expert has 8, and one that gives it
two has 16 of half the width, so that all but `soft` have about the same parameters in all; `soft` runs its 8 experts on
every token, which leaves each an eighth of the width. The width is solved for: active parameters, the router's among
them, stay within 1 % (`iso_active`), and so do the useful FLOPs of the same steps. As counted (`--dry-run`), without
the embedding:

    point            experts    a token    width    total        active
    soft             8          all        56         465,024    465,024
    noisy_top_k      16         2          220      2,044,032    467,072
    switch           8          1          452      2,087,040    467,072
    gshard           16         2          224      2,072,704    467,072
    top_k            16         2          224      2,072,704    467,072
    group_limited    16         2          224      2,072,704    467,072
    sigmoid_bias     16         2          224      2,072,704    467,072
    hash             8          1          456      2,101,376    467,072
    sinkhorn         16         2          224      2,072,704    467,072
    relu             16         about 2    224      2,072,704    467,072
    label            8          1          456      2,101,376    467,072

Weights of auxiliary losses are those of each router's paper, and drops as in it (`dispatch=auto`). On Wikipedia, whose
documents have topics for `label`. We have not run these.

    moejax sweep --config=configs/sweeps/routers.py --workdir=runs/routers
"""

import pathlib
import runpy

from moejax import config
from moejax.sweep import grid

_MINI = runpy.run_path(str(pathlib.Path(__file__).with_name("experts_mini.py")))
CAUSAL = [name for name, router in config.ROUTERS.items() if router.causal]
ONE_CHOICE = [name for name in CAUSAL if config.ROUTERS[name].fixed and config.ROUTERS[name].top_k == 1]


def get_config() -> config.Config:
    """Two of 16 experts, the most probable ones."""
    c = _MINI["get_config"]()
    c.model.moe.num_experts = 16
    c.model.moe.d_expert //= 2
    c.model.moe.top_k = 2
    return c


def get_sweep() -> grid.Sweep:
    """A point a router."""
    rows = []
    for name in CAUSAL:
        settings = {"model.moe.router": name}
        if name in ONE_CHOICE:  # among them soft, to which every expert is one
            settings |= {"model.moe.num_experts": 8, "model.moe.top_k": 0}
        rows += grid.named(name, settings)
    return grid.Sweep(get_config(), grid.iso_active(rows, multiple_of=2), baseline="top_k")
