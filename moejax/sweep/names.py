"""What a point is called: each setting in which it may differ from others, in a word that a folder can be named by."""

import re
from typing import Any

from moejax import config as config_lib
from moejax.config import plain

GRANULARITY = "granularity"  # beside the fields of a config: see `grid.granularity`
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_=-]*")  # what a name may be, on any file system

_SHORT = {
    "model.d_model": "d",
    "model.num_periods": "l",
    "model.moe.num_experts": "e",
    "model.moe.top_k": "k",
    "model.moe.d_expert": "f",
    "model.moe.capacity_factor": "c",
    "data.batch_size": "b",
    "optimizer.learning_rate": "lr",
    GRANULARITY: "g",
    "model.moe.router": "",  # the value says what it is
    "model.period": "",
}


def word(field: str, value: Any) -> str:
    """As e32 for model.moe.num_experts=32, switch for model.moe.router=switch, mamba2.d_state64, scan-reference.

    It depends on this setting alone, so that a point keeps its name when others join the sweep.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = _number(value) if is_number else _text(value)
    name = _SHORT.get(field, _last(field))
    return f"{name}{text}" if is_number or not name else f"{name}-{text}"


def _last(field: str) -> str:
    """The end of the path that no other field has."""
    parts, fields = field.split("."), plain.flatten(config_lib.Config())
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if sum(other == end or other.endswith(f".{end}") for other in fields) == 1:
            return end
    return field


def _number(value: float) -> str:
    """As short as it can be without taking two numbers for one."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _text(value: Any) -> str:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    words = (re.sub(r"[^A-Za-z0-9.+]+", "-", str(part).replace("|", "+")).strip("-") for part in parts)
    return "-".join(filter(None, words)) or "none"
