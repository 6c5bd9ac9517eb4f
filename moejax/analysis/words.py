"""How the report writes numbers."""

from collections.abc import Mapping
from typing import Any

from moejax.analysis import figures

MISSING = "–"
FILTERS = ("number", "signed", "short", "duration", "load", "percent", "flops", "spread", "probability")  # of templates
_PREFIXES = {1e21: "Z", 1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M"}


def number(value: float | None, places: int = 3) -> str:
    """3912.0 is 3,912.000; None a dash."""
    return MISSING if value is None else f"{value:,.{places}f}"


def short(value: float | None) -> str:
    """2,440,185 is 2.44M; None a dash."""
    return MISSING if value is None else figures.short(value)


def signed(value: float | None) -> str:
    """With its sign."""
    return MISSING if value is None else f"{value:+,.3f}".replace("-", "−")


def percent(value: float | None) -> str:
    """0.1234 is 12%, 0.0123 is 1.2%, 0.00001 is <0.1%; None a dash."""
    if value is None:
        return MISSING
    if 0 < value < 0.0005:
        return "<0.1%"
    return f"{100 * value:.0f}%" if value >= 0.0995 or value == 0 else f"{100 * value:.1f}%"


def load(value: float | None) -> str:
    """An expert's load, where little is not none."""
    return "under 0.01" if value is not None and 0 < value < 0.01 else number(value, 2)


def duration(seconds: float) -> str:
    """90.0 is 1 min 30 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    minutes, hours = whole // 60, whole // 3600
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {whole % 60} s"


def flops(value: float | None) -> str:
    """1.2e15 is 1.2 PFLOP."""
    if value is None:
        return MISSING
    size, unit = flops_unit(value)
    return f"{value / size:.3g} {unit}"


def flops_unit(largest: float) -> tuple[float, str]:
    """(size, name) of the unit that suits values up to this."""
    found = next(((size, prefix) for size, prefix in _PREFIXES.items() if largest >= size), (1.0, ""))
    return found[0], f"{found[1]}FLOP"


def spread(value: Mapping[str, float | None], places: int = 3) -> str:
    """{"mean": 3.7, "deviation": 0.01} is 3.700 ± 0.010; without a deviation the mean alone, without a mean a dash."""
    deviation = value["deviation"]
    return number(value["mean"], places) + ("" if deviation is None else f" ± {number(deviation, places)}")


def probability(value: float | None) -> str:
    """0.0123 is 0.012, 0.0001 is <0.001; None a dash."""
    return "<0.001" if value is not None and value < 0.001 else number(value)


def setting(value: Any) -> str:
    """A config's value: ("mamba", "moe") is mamba, moe."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
