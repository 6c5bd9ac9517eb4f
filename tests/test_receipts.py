"""The README's table of receipts is what the record makes."""

import json
import pathlib
import runpy

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "receipts.py"))


def test_the_readme_has_the_table_that_the_record_makes():
    entries = json.loads((ROOT / "scripts" / "receipts.json").read_text())
    assert SCRIPT["table"](entries) in (ROOT / "README.md").read_text()


def test_a_run_recorded_again_takes_the_place_of_its_first_record():
    old = [{"row": row, "command": command, "loss": 1} for row, command in (("a", "x"), ("a", "y"), ("b", "x"))]
    again = [{"row": "a", "command": "x", "loss": 2}]
    assert SCRIPT["merge"](old, again) == [*old[1:], *again]


def test_every_row_of_the_papers_has_its_line():
    rows = [
        name
        for file in ("moe_mamba", "switch")
        for name in runpy.run_path(str(ROOT / "configs" / f"{file}.py"))["ROWS"]
    ]
    assert {*rows} == {*SCRIPT["PAPER"]}
