"""What of the papers' tables we have run: recorded from sweeps, and printed as the README's table.

    python scripts/receipts.py record runs/table_1 --commit=HEAD --hardware="2 CPU cores" -- \\
        --config=configs/sweeps/tables.py --seeds=0,1,2
    python scripts/receipts.py table

`record` adds the finished rows of configs/moe_mamba.py and configs/switch.py in a sweep's folder to
scripts/receipts.json, in the place of what was recorded of them by the same command. What follows -- is what `moejax
sweep` was given, and refused if it does not make this folder. `table` makes the README's.
"""

import argparse
import json
import pathlib
import re
import runpy
import subprocess
from typing import Any

from moejax import config as config_lib
from moejax import files
from moejax.analysis import comparison, params, words
from moejax.cli import overrides
from moejax.sweep import folder as sweep_folder
from moejax.sweep import grid

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = ROOT / "scripts" / "receipts.json"
NON_EMBEDDING = ("non_embedding_total", "non_embedding_active")


def _table(name: str, losses: str) -> dict[str, tuple[str, str, str]]:
    """Of each `row loss` or `row loss:speed-up`: the table where it stands, its loss there, its speed-up or ""."""
    cells = [cell.split() for cell in losses.split(",")]
    return {row: (name, loss.partition(":")[0], loss.partition(":")[2]) for row, loss in cells}


PAPER = {
    # MoE-Mamba (arXiv 2401.04081): log perplexity in nats/token, speed-up over the first row of the table
    **_table(
        "MoE-Mamba, Table 1",
        "mamba_25m 3.34:1,moe_mamba_25m 3.19:1.76,transformer_moe_25m 3.23:1.56,transformer_25m 3.43:>1,"
        "mamba_100m 2.99:1,moe_mamba_100m 2.81:2.35,transformer_moe_100m 2.88:1.79",
    ),
    **_table("MoE-Mamba, Table 2", ",".join(f"ratio_{n}_{6 - n} -" for n in range(1, 6)) + ",ratio_6_0 3.73"),
    **_table(
        "MoE-Mamba, Table 3",
        "inner_conv_all 3.79,inner_gate_all 3.89,inner_out_all 4.05,inner_conv_gate_all 3.95,inner_conv_out_all 4.17,"
        "inner_gate_out_all 4.16,inner_conv_gate_out_all 4.39,inner_conv_alternate 3.71,inner_gate_alternate 3.70,"
        "inner_out_alternate 3.70,inner_conv_gate_alternate 3.72,inner_conv_out_alternate 3.76,"
        "inner_gate_out_alternate 3.88,inner_conv_gate_out_alternate 3.88",
    ),
    **_table(
        "MoE-Mamba, Table 4",
        "mamba_1b 3.72:1,experts_1 3.75:<1,experts_4 3.72:1.03,experts_8 3.70:1.10,experts_16 3.67:1.21,"
        "experts_32 3.67:1.23",
    ),
    **_table(
        "MoE-Mamba, Table 7",
        "sequential_1 3.76,sequential_2 3.74,sequential_4 3.71,sequential_8 3.69,sequential_16 3.67,sequential_32 3.66,"
        "parallel_1 3.79,parallel_2 3.77,parallel_4 3.74,parallel_8 3.72,parallel_16 3.70,parallel_32 3.69",
    ),
    # Switch Transformers (arXiv 2101.03961): quality, log perplexity with the sign turned
    **_table(
        "Switch, Table 9",
        "t5_base 1.556,t5_large 1.350,t5_xxl 1.095,switch_base_128 1.306,switch_large_128 1.177,switch_xxl 1.008,"
        "switch_c 1.043",
    ),
    **_table(
        "Switch, Table 7",
        "switch_base_8 -,switch_base_16 1.505,switch_base_32 1.474,switch_base_64 1.444,switch_base_256 1.427",
    ),
    **_table(
        "Switch, Table 1",
        "t5_base_100k 1.731,t5_large_100k 1.550,switch_base_128_c200 1.554,switch_base_128_c125 1.553,"
        "switch_base_128_c100 1.561,switch_base_128_plus_c100 1.534,moe_base_128_c200 1.547,moe_base_128_c125 1.559,"
        "moe_base_128_c100 1.572",
    ),
    "moe_base_top2_128": ("Switch, not in a table", "-", ""),
    **_table("Switch, Table 2", "precision_float32 1.718,precision_bfloat16 3.780,precision_selective 1.716"),
    **_table("Switch, Table 3", "scale_small 2.72,scale_large 3.60"),
    **_table(
        "Switch, Table 11",
        "explore_argmax 1.471,explore_sample 1.570,explore_dropout 1.480,explore_jitter 1.468",
    ),
}


def record(folder: pathlib.Path, arguments: list[str], commit: str, hardware: str) -> list[dict[str, Any]]:
    """An entry for each finished group of the sweep.

    Raises:
      ConfigError: the arguments make another sweep than the folder's, a group is no row of a paper's table, or there is
        no such commit.
    """
    parser = argparse.ArgumentParser(prog="what follows --")
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", default="")
    parser.add_argument("--only")
    known, fields = parser.parse_known_args(arguments)
    sweep = overrides.read_sweep(known.config, fields, seeds=known.seeds)
    sweep_folder.check(folder, sweep_folder.describe(grid.points(sweep), sweep.baseline))
    numbers = comparison.numbers(folder)
    unknown = sorted({group["group"] for group in numbers["groups"]} - {*PAPER})
    if unknown:
        raise config_lib.ConfigError(f"{folder} has {', '.join(unknown)}, which no paper's table has; record another")
    named = ["git", "rev-parse", "--verify", "--quiet", "--short", f"{commit}^{{commit}}"]
    rev = subprocess.run(named, cwd=ROOT, capture_output=True, text=True)
    if rev.returncode:
        raise config_lib.ConfigError(f"--commit={commit} is no commit of this repository; name one")
    return [
        {
            "row": group["group"],
            "command": " ".join(["moejax sweep", *arguments, f"--workdir=runs/{folder.name}"]),
            "commit": rev.stdout.strip(),
            "hardware": hardware,
            "seeds": len(group["seeds"]),
            "steps": group["steps"],
            "tokens": group["tokens"],
            "parameters": {name: group[name] for name in ("total", "active", *NON_EMBEDDING)},
            "measure": numbers["measure"],
            "loss": group["loss"],
            "speedup": group["speedup"],
            "baseline": sweep.baseline,
        }
        for group in numbers["groups"]
        if group["loss"]["mean"] is not None
    ]


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both, a new entry in the place of an old one of its row and command."""
    again = {(entry["row"], entry["command"]) for entry in new}
    return [entry for entry in old if (entry["row"], entry["command"]) not in again] + new


def table(entries: list[dict[str, Any]]) -> str:
    """The README's: a line a row, in the order of PAPER, then of recording. MoE-Mamba's parameters are counted without
    embedding and head, Switch's with them, as each paper does."""
    rows = {
        name: row
        for file in ("moe_mamba.py", "switch.py")
        for name, row in runpy.run_path(str(ROOT / "configs" / file))["ROWS"].items()
    }
    lines = [
        "| row | parameters, total / active | loss there | speed-up there | ran at, total / active | tokens, seeds | "
        "our loss | our speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in sorted(entries, key=lambda entry: list(PAPER).index(entry["row"])):
        where, loss, speedup = PAPER[entry["row"]]
        counted = NON_EMBEDDING if where.startswith("MoE-Mamba") else ("total", "active")
        counts = params.count(rows[entry["row"]]().model)
        whole, here = (
            " / ".join(_short(numbers[name]) for name in counted) for numbers in (counts, entry["parameters"])
        )
        ours = "1" if entry["row"] == entry["baseline"] else "-"
        if entry["speedup"]["mean"] is not None:
            ours = words.spread(entry["speedup"], 2)
        lines.append(
            f"| `{entry['row']}` ({where}) | {whole} | {loss} | {speedup or '-'} | {here} | "
            f"{_short(entry['tokens'])}, {entry['seeds']} | {words.spread(entry['loss'])} | {ours} |"
        )
    commands = dict.fromkeys(entry["command"] for entry in entries)
    return "\n".join(lines) + "\n\n```\n" + "\n".join(commands) + "\n```"


def _short(number: float) -> str:
    size, unit = next((size, unit) for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")) if number >= size)
    return re.sub(r"\.0+$", "", f"{number / size:.4g}") + unit


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    adding = actions.add_parser("record", help="add a sweep's finished rows")
    adding.add_argument("folder", type=pathlib.Path)
    adding.add_argument("--commit", required=True, help="of the code that ran")
    adding.add_argument("--hardware", required=True)
    adding.add_argument("sweep", nargs="+", help="what moejax sweep was given, after --")
    actions.add_parser("table", help="print the table")
    arguments = parser.parse_args()
    entries = files.read_json(FILE) if FILE.exists() else []
    if arguments.action == "table":
        print(table(entries))
        return
    try:
        new = record(arguments.folder, arguments.sweep, arguments.commit, arguments.hardware)
    except config_lib.ConfigError as error:
        parser.error(str(error))
    files.write(FILE, json.dumps(merge(entries, new), indent=1) + "\n")
    print(f"{len(new)} rows in {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
