"""What a compiled program sends between devices, read from its text."""

import math
import re

_NAMES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_WIDTHS = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}  # bytes


def collectives(text: str) -> list[tuple[str, int]]:
    """(operation, bytes of its result on a device) of every collective; those of a device with itself alone are none.

    The text is that of `jax.stages.Compiled.as_text`. What stands in the body of a loop is listed once.

    Raises:
      KeyError: an array of a type that it does not know.
    """
    found = []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        operation = re.search(rf"= ([^=]*?) ({_NAMES})(?:-start)?\(", line)
        if operation is None or re.search(r"replica_groups={({\d+},?)+}", line):
            continue
        arrays = re.findall(r"(\w+)\[(.*?)\]", operation[1])
        sizes = [_WIDTHS[kind] * math.prod(map(int, dims.split(",") if dims else ())) for kind, dims in arrays]
        found.append((operation[2], sum(sizes)))
    return found
