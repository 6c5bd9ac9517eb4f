"""Granularity (arXiv 2402.07871) of MoE-Mamba: are more and narrower experts better at equal active parameters?

Granularity G divides each of 16 experts into G, of which a token takes G: 16 G experts of about 1536 / G, top_k = G.
The router has a column for each, so that experts are a little narrower still, as is solved for: active parameters
without embedding and head, the router among them, stay within 1 % (`iso_active`). 8 periods of Mamba and experts,
d_model 512; 15,000 steps of 64 rows of 1,024 tokens, 0.98B tokens of C4. As counted (`--dry-run`):

    point    experts    top_k    width    total          active
    g1       16         1        1536     214,966,272    26,222,592
    g2       32         2        764      213,983,232    26,222,592
    g4       64         4        378      212,017,152    26,222,592
    g8       128        8        185      208,084,992    26,222,592
    g16      256        16       88       199,172,096    26,157,056

The paper's models are Transformers; this is its question asked of MoE-Mamba, and reproduces no figure of it. We have
not run these. The recipe is that of configs/sweeps/experts_25m.py, with router=top_k, gates as the router gives them.

    moejax sweep --config=configs/sweeps/granularity.py --workdir=runs/granularity --dry-run
    moejax sweep --config=configs/sweeps/granularity.py --workdir=runs/granularity

A law of granularity, parameters and tokens needs three values of each: `:law` has G of 1, 4 and 16 at d_model 256, 384
and 512, for 4,000, 8,000 and 16,000 steps, 27 points.

    moejax sweep --config=configs/sweeps/granularity.py:law --workdir=runs/granularity_law
    moejax sweep fit runs/granularity_law
"""

import pathlib
import runpy

from moejax import config
from moejax.sweep import grid

_TABLE_4 = runpy.run_path(str(pathlib.Path(__file__).with_name("experts_25m.py")))  # the same recipe
NAMES = ("one_size", "law")


def get_config(name: str = "one_size") -> config.Config:
    """Granularity 1."""
    if name not in NAMES:
        raise config.ConfigError(f"{name} is not known; write {' or '.join(NAMES)}")
    c = _TABLE_4["get_config"]()
    c.model.moe.router = "top_k"
    c.model.moe.jitter = config.MoeConfig().jitter  # router=switch alone reads it
    c.model.moe.num_experts = 16
    return c


def get_sweep(name: str = "one_size") -> grid.Sweep:
    """Five granularities of one size, or three of three sizes and three lengths."""
    base = get_config(name)
    if name == "one_size":
        return grid.Sweep(base, grid.iso_active(grid.granularity(1, 2, 4, 8, 16)))
    sizes = [grid.named(f"d{d}", {"model.d_model": d, "model.moe.d_expert": 3 * d})[0] for d in (256, 384, 512)]
    lengths = grid.over("training.num_steps", 4_000, 8_000, 16_000)
    return grid.Sweep(base, grid.product(sizes, lengths, grid.iso_active(grid.granularity(1, 4, 16))))
