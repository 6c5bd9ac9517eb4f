"""What of the papers' tables we have run: recorded from sweeps, and printed as the README's table.

    python scripts/receipts.py record runs/table_1 --config=configs/sweeps/tables.py --hardware="2 CPU cores"
    python scripts/receipts.py table

`record` adds the finished settings of a sweep whose names are rows of configs/moe_mamba.py or configs/switch.py (e8 and
mamba of configs/sweeps/experts_mini.py stand for experts_8 and mamba_1b) to scripts/receipts.json, in the place of what
was recorded of them by the same command. `table` makes the README's.
"""

import argparse
import json
import pathlib
import re
import runpy
import subprocess
from typing import Any

from moejax import files
from moejax.analysis import comparison, params, words

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = ROOT / "scripts" / "receipts.json"
ALIASES = {"mamba": "mamba_1b", **{f"e{n}": f"experts_{n}" for n in (1, 4, 8, 16, 32)}}

# Of a row: where it stands, its loss or quality there, and its speed-up over the first row of the table.
# MoE-Mamba (arXiv 2401.04081): log perplexity in nats/token
PAPER: dict[str, tuple[str, str, str]] = {
    "mamba_25m": ("MoE-Mamba, Table 1", "3.34", "1"),
    "moe_mamba_25m": ("MoE-Mamba, Table 1", "3.19", "1.76"),
    "transformer_moe_25m": ("MoE-Mamba, Table 1", "3.23", "1.56"),
    "transformer_25m": ("MoE-Mamba, Table 1", "3.43", ">1"),
    "mamba_100m": ("MoE-Mamba, Table 1", "2.99", "1"),
    "moe_mamba_100m": ("MoE-Mamba, Table 1", "2.81", "2.35"),
    "transformer_moe_100m": ("MoE-Mamba, Table 1", "2.88", "1.79"),
    "mamba_1b": ("MoE-Mamba, Table 4", "3.72", "1"),
    "experts_1": ("MoE-Mamba, Table 4", "3.75", "<1"),
    "experts_4": ("MoE-Mamba, Table 4", "3.72", "1.03"),
    "experts_8": ("MoE-Mamba, Table 4", "3.70", "1.10"),
    "experts_16": ("MoE-Mamba, Table 4", "3.67", "1.21"),
    "experts_32": ("MoE-Mamba, Table 4", "3.67", "1.23"),
    **{
        f"{kind}_{n}": ("MoE-Mamba, Table 7", loss, "")
        for kind, losses in (
            ("sequential", ("3.76", "3.74", "3.71", "3.69", "3.67", "3.66")),
            ("parallel", ("3.79", "3.77", "3.74", "3.72", "3.70", "3.69")),
        )
        for n, loss in zip((1, 2, 4, 8, 16, 32), losses, strict=True)
    },
    # Switch Transformers (arXiv 2101.03961): quality, log perplexity with the sign turned
    "t5_base": ("Switch, Table 9", "1.556", ""),
    "switch_base_128": ("Switch, Table 9", "1.306", ""),
    "precision_float32": ("Switch, Table 2", "1.718", ""),
    "precision_bfloat16": ("Switch, Table 2", "3.780", ""),
    "precision_selective": ("Switch, Table 2", "1.716", ""),
    "scale_small": ("Switch, Table 3", "2.72", ""),
    "scale_large": ("Switch, Table 3", "3.60", ""),
}


def record(folder: pathlib.Path, config: str, hardware: str) -> list[dict[str, Any]]:
    """An entry for each finished setting of the sweep that is a row of a paper's table."""
    numbers = comparison.numbers(folder)
    seeds = sorted({point["seed"] for point in numbers["points"]})
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    entries = []
    for group in numbers["groups"]:
        row = ALIASES.get(group["group"], group["group"])
        if row in PAPER and group["loss"]["mean"] is not None:
            steps = f" --config.training.num_steps={group['steps']}"
            entries.append(
                {
                    "row": row,
                    "command": f"moejax sweep --config={config} --seeds={','.join(map(str, seeds))}{steps}",
                    "commit": commit.stdout.strip(),
                    "hardware": hardware,
                    "seeds": len(group["seeds"]),
                    "steps": group["steps"],
                    "tokens": group["tokens"],
                    "parameters": [group["non_embedding_total"], group["non_embedding_active"]],
                    "measure": numbers["measure"],
                    "loss": group["loss"],
                    "speedup": group["speedup"],
                }
            )
    return entries


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both, a new entry in the place of an old one of its row and command."""
    again = {(entry["row"], entry["command"]) for entry in new}
    return [entry for entry in old if (entry["row"], entry["command"]) not in again] + new


def table(entries: list[dict[str, Any]]) -> str:
    """The README's: a line a row, in the order of PAPER, then of recording."""
    rows = {
        name: row
        for file in ("moe_mamba.py", "switch.py")
        for name, row in runpy.run_path(str(ROOT / "configs" / file))["ROWS"].items()
    }
    lines = [
        "| row | parameters there, total / active | loss there | speed-up there | ran at, total / active | tokens, "
        "seeds | our loss | our speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in sorted(entries, key=lambda entry: list(PAPER).index(entry["row"])):
        counts = params.count(rows[entry["row"]]().model)
        where, loss, speedup = PAPER[entry["row"]]
        whole = [_short(counts[f"non_embedding_{name}"]) for name in ("total", "active")]
        ours = "1" if entry["speedup"]["mean"] is None else words.spread(entry["speedup"], 2)
        lines.append(
            f"| `{entry['row']}` ({where}) | {' / '.join(whole)} | {loss} | {speedup or '-'} | "
            f"{' / '.join(map(_short, entry['parameters']))} | {_short(entry['tokens'])}, {entry['seeds']} | "
            f"{words.spread(entry['loss'])} | {ours} |"
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
    adding = actions.add_parser("record", help="add a sweep's finished settings")
    adding.add_argument("folder", type=pathlib.Path)
    adding.add_argument("--config", required=True, help="of the sweep, as it was given")
    adding.add_argument("--hardware", required=True)
    actions.add_parser("table", help="print the table")
    arguments = parser.parse_args()
    entries = files.read_json(FILE) if FILE.exists() else []
    if arguments.action == "table":
        print(table(entries))
        return
    new = record(arguments.folder, arguments.config, arguments.hardware)
    files.write(FILE, json.dumps(merge(entries, new), indent=1) + "\n")
    print(f"{len(new)} rows in {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
