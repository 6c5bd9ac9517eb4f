"""How the report writes numbers."""

from moejax.analysis import figures

MISSING = "–"


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
