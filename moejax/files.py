"""Files that appear whole or not at all, and how a run's JSON is read back."""

import json
import os
import pathlib
import uuid
from typing import Any

from moejax import config


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Writes the file whole or not at all, whoever else writes it and whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: pathlib.Path) -> Any:
    """The value in a JSON file; raises ConfigError if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise config.ConfigError(f"{path} is not JSON ({error}); mend or remove it") from error


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON value a line.

    A last line cut short, by a kill or because it is still being written, is left out; a damaged line before it raises
    ConfigError.
    """
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise config.ConfigError(f"{path} line {number} is not JSON ({error}); mend or remove it") from error
    return rows
