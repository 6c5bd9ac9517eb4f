"""The papers' tables, a table a sweep: --config=configs/sweeps/tables.py:NAME, or NAME,mini.

MoE-Mamba (arXiv 2401.04081), configs/moe_mamba.py:

    table_1           Mamba, MoE-Mamba, Transformer-MoE and Transformer of 25M active parameters
    table_1_100m      the first three of 100M
    table_2           Mamba against experts, by their shares of the active parameters (configs/sweeps/ratio.py)
    table_3           experts inside the Mamba block
    table_4           1 to 32 experts (configs/sweeps/experts_25m.py)
    table_7           1 to 32 experts, in turn with Mamba and beside it

Switch Transformers (arXiv 2101.03961), configs/switch.py:

    switch_table_1    Base with 128 experts by router and capacity factor, against T5-Base and T5-Large
    switch_table_2    precision, and Table 3, the scale of the initialisers: its scale_small is precision_selective
    switch_table_7    8 to 256 experts, against T5-Base
    switch_table_9    the largest models
    switch_table_11   exploration

The rows, their counts, the paper's losses and speed-ups and what ",mini" makes of them are in those files.
table_1,mini, as counted (`--dry-run`), without the embedding and the head, of 131,072 each:

    point                  experts    width    total        active
    mamba_25m              -          -          466,944    466,944
    moe_mamba_25m          10         384      2,202,624    433,152
    transformer_moe_25m    8          512      2,231,296    396,288
    transformer_25m        -          -          395,520    395,520

    moejax sweep --config=configs/sweeps/tables.py --workdir=runs/table_1_mini --seeds=0,1,2
    moejax sweep --config=configs/sweeps/tables.py:table_7,mini --workdir=runs/table_7_mini --seeds=0,1,2
    moejax sweep --config=configs/sweeps/tables.py:switch_table_7,mini --workdir=runs/switch_mini --seeds=0,1,2
    moejax report runs/table_1_mini
"""

import pathlib
import runpy

from moejax import config
from moejax.sweep import grid

_FOLDER = pathlib.Path(__file__).parents[1]
_FILES = {name: runpy.run_path(str(_FOLDER / f"{name}.py")) for name in ("moe_mamba", "switch")}


def _select(file: str, *prefixes: str) -> tuple[str, ...]:
    return tuple(name for name in _FILES[file]["ROWS"] if name.startswith(prefixes))


TABLES = {
    "table_1": ("moe_mamba", ("mamba_25m", "moe_mamba_25m", "transformer_moe_25m", "transformer_25m")),
    "table_1_100m": ("moe_mamba", ("mamba_100m", "moe_mamba_100m", "transformer_moe_100m")),
    "table_2": ("moe_mamba", ("mamba_1b", *_select("moe_mamba", "ratio"))),
    "table_3": ("moe_mamba", ("mamba_1b", *_select("moe_mamba", "inner"))),
    "table_4": ("moe_mamba", ("mamba_1b", *_select("moe_mamba", "experts"))),
    "table_7": ("moe_mamba", ("mamba_1b", *_select("moe_mamba", "sequential", "parallel"))),
    "switch_table_1": (
        "switch",
        ("t5_base_100k", "t5_large_100k", *_select("switch", "switch_base_128_", "moe_base_128_")),
    ),
    "switch_table_2": ("switch", ("precision_selective", "precision_float32", "precision_bfloat16", "scale_large")),
    "switch_table_7": ("switch", ("t5_base", *(f"switch_base_{n}" for n in (8, 16, 32, 64, 128, 256)))),
    "switch_table_9": (
        "switch",
        ("t5_base", "t5_large", "t5_xxl", "switch_base_128", "switch_large_128", "switch_xxl", "switch_c"),
    ),
    "switch_table_11": ("switch", _select("switch", "explore")),
}


def get_config(name: str = "table_1,mini") -> config.Config:
    """The first row of the table, what the others are compared with; of MoE-Mamba's a Mamba without experts."""
    return _rows(name)[0][1]


def get_sweep(name: str = "table_1,mini") -> grid.Sweep:
    """A point for each row of the table."""
    rows = _rows(name)
    base = rows[0][1]
    return grid.Sweep(base, [point for row, c in rows for point in grid.from_config(row, c, base)], baseline=rows[0][0])


def _rows(name: str) -> list[tuple[str, config.Config]]:
    table, _, size = name.partition(",")
    if table not in TABLES or size not in ("", "mini"):
        raise config.ConfigError(
            f"{name} is no table; write one of {', '.join(TABLES)}, or one of them with ,mini after it"
        )
    file, rows = TABLES[table]
    return [(row, _FILES[file]["get_config"](row + ",mini" * bool(size))) for row in rows]
