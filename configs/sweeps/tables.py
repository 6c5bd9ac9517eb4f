"""MoE-Mamba's tables (arXiv 2401.04081), a table a sweep: --config=configs/sweeps/tables.py:NAME, or NAME,mini.

    table_1         Mamba, MoE-Mamba, Transformer-MoE and Transformer of 25M active parameters
    table_1_100m    the first three of 100M
    table_2         Mamba against experts, by their shares of the active parameters (configs/sweeps/ratio.py)
    table_3         experts inside the Mamba block
    table_4         1 to 32 experts (configs/sweeps/experts_25m.py)
    table_7         1 to 32 experts, in turn with Mamba and beside it

The rows, their counts, the paper's losses and what ",mini" makes of them are in configs/moe_mamba.py, the paper's
speed-ups too. table_1,mini, as counted (`--dry-run`), without the embedding and the head, of 131,072 each:

    point                  experts    width    total        active
    mamba_25m              -          -          466,944    466,944
    moe_mamba_25m          10         384      2,202,624    433,152
    transformer_moe_25m    8          512      2,231,296    396,288
    transformer_25m        -          -          395,520    395,520

    moejax sweep --config=configs/sweeps/tables.py --workdir=runs/table_1_mini --seeds=0,1,2
    moejax sweep --config=configs/sweeps/tables.py:table_7,mini --workdir=runs/table_7_mini --seeds=0,1,2
    moejax report runs/table_1_mini
"""

import pathlib
import runpy

from moejax import config
from moejax.sweep import grid

_FILE = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "moe_mamba.py"))
TABLES = {
    "table_1": ("mamba_25m", "moe_mamba_25m", "transformer_moe_25m", "transformer_25m"),
    "table_1_100m": ("mamba_100m", "moe_mamba_100m", "transformer_moe_100m"),
    **{
        table: ("mamba_1b", *(name for name in _FILE["ROWS"] if name.startswith(prefixes)))
        for table, prefixes in (
            ("table_2", "ratio"),
            ("table_3", "inner"),
            ("table_4", "experts"),
            ("table_7", ("sequential", "parallel")),
        )
    },
}


def get_config(name: str = "table_1,mini") -> config.Config:
    """The first row of the table, a Mamba without experts: what the others are compared with."""
    return _row(_names(name)[0], name)


def get_sweep(name: str = "table_1,mini") -> grid.Sweep:
    """A point for each row of the table."""
    base, names = get_config(name), _names(name)
    rows = [row for point in names for row in grid.from_config(point, _row(point, name), base)]
    return grid.Sweep(base, rows, baseline=names[0])


def _names(name: str) -> tuple[str, ...]:
    table, _, size = name.partition(",")
    if table not in TABLES or size not in ("", "mini"):
        raise ValueError(f"{name} is no table; write one of {', '.join(TABLES)}, or one of them with ,mini after it")
    return TABLES[table]


def _row(point: str, name: str) -> config.Config:
    return _FILE["get_config"](point + ",mini" * name.endswith(",mini"))
