"""What a sweep would run, before it is paid for: a row a point."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.sweep import cost, grid
from moejax.training import metrics

_NUMBERS = ("total", "active", "non_embedding_total", "non_embedding_active", "tokens")


def rows(points: Sequence[grid.Point], seconds: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """A row a point, ready for JSON.

    seconds: of each point's run, by its name, where known.

    Returns:
      name; total and active: parameters; non_embedding_total, non_embedding_active: without embedding and head; tokens
      and flops (useful ones) of the whole run; seconds, or None; settings: field -> value, where the base has another.
    """
    listed = []
    for point in points:
        counts = cost.parameters(point.config.model)
        listed.append(
            {
                "name": point.name,
                "total": counts["total"],
                "active": counts["active"],
                "non_embedding_total": counts["non_embedding_total"],
                "non_embedding_active": counts["non_embedding_active"],
                "tokens": cost.tokens(point.config),
                "flops": cost.flops(point.config),
                "seconds": (seconds or {}).get(point.name),
                "settings": point.settings,
            }
        )
    return listed


def table(listed: Sequence[Mapping[str, Any]]) -> str:
    """`rows` as aligned text, and their sums."""
    heads = ["point", "total", "active", "no emb. total", "no emb. active", "tokens", "FLOPs", "time", "differs by"]
    known = [row["seconds"] for row in listed if row["seconds"] is not None]
    sums = ["all", "", "", "", "", f"{sum(row['tokens'] for row in listed):,}", _flops(listed), "-", ""]
    if len(known) == len(listed):
        sums[-2] = metrics.duration(sum(known))
    cells = [heads, *(_cells(row) for row in listed), sums]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: list[str]) -> str:
        name, *numbers, settings = row
        padded = (f"{number:>{width}}" for number, width in zip(numbers, widths[1:-1], strict=True))
        return "  ".join([f"{name:<{widths[0]}}", *padded, settings]).rstrip()

    return "\n".join(map(line, cells))


def _cells(row: Mapping[str, Any]) -> list[str]:
    numbers = [f"{row[name]:,}" for name in _NUMBERS]
    time = "-" if row["seconds"] is None else metrics.duration(row["seconds"])
    settings = ", ".join(f"{field}={_value(value)}" for field, value in row["settings"].items())
    return [row["name"], *numbers, _flops([row]), time, settings or "the base"]


def _flops(listed: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(row['flops'] for row in listed):.3g}"


def _value(value: Any) -> str:
    """As an override is written."""
    return f"{tuple(value)}" if isinstance(value, list) else f"{value}"
