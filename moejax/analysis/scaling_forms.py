"""The forms of the scaling law of sparse models, each as far as a grid of points can identify it.

N is the active parameters without embedding and head, E the expansion rate (how many experts of full size there are:
experts divided by granularity), G the granularity (how many experts make one of full size), D the training tokens.
"""

# B parameter vectors side by side, X cells of the grid, P parameters, A axes

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from scipy import optimize

from moejax import config
from moejax.analysis import figures

_VARIES = 1.1  # ratio from which on two values of an axis differ: a solved grid strays by 1%, a router adds a few
_SEPARATE = 0.02  # share of an axis's variance that the other axes must leave for its effect to be its own
_SPARE = 2  # cells beyond the coefficients, for their error to be known
NAMES = {"expansion": "experts", "granularity": "granularity", "active": "active parameters", "tokens": "tokens"}


class Cell(NamedTuple):
    """A setting of the grid: points that differ in the seed alone."""

    expansion: float  # E
    granularity: float  # G
    active: float  # N
    tokens: float  # D

    @property
    def experts(self) -> float:
        """E G, as a config counts them."""
        return self.expansion * self.granularity


class Form(Protocol):
    """A law. Its parameters are what a search moves, its coefficients what the paper writes."""

    formula: str
    source: str
    meanings: dict[str, str]  # coefficient -> what it is, in the order of the parameters
    absent: list[str]  # what the grid cannot identify, a sentence each
    axes: list[str]  # of Cell, those that vary

    def at(self, cells: Sequence[Cell], theta_BP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln(loss), (B, X), and its derivatives by the parameters, (B, X, P)."""
        ...

    def starts(self, cells: Sequence[Cell], log_loss_X: np.ndarray) -> list[np.ndarray]:
        """Where to begin the search."""
        ...

    def coefficients(self, theta_BP: np.ndarray) -> np.ndarray:
        """The coefficients as the paper writes them, (B, P)."""
        ...


def choose(cells: Sequence[Cell]) -> Form:
    """The form that these cells ask for, with the terms that they identify.

    Raises:
      ConfigError: they cannot identify it; the line names the axis that is missing.
    """
    experts = sorted({cell.experts for cell in cells})
    if experts[-1] < _VARIES * experts[0]:
        raise config.ConfigError(
            f"experts={experts[0]:g} is the only number of experts of the finished points, and the law is about its "
            "effect; add points with others"
        )
    axes = [axis for axis in NAMES if len(_distinct(cells, axis)) > 1]
    _check_separate(cells, axes)
    return FineGrained(cells, axes) if "granularity" in axes else Bilinear(cells, axes)


class Bilinear:
    """log L = a log N + b log E + c log N log E + d, arXiv 2202.01169 eq. 1, with e log D for the tokens.

    Logarithms are decimal, as in the paper. Its saturation with very many experts (E_start, E_max) is left out.
    """

    source = "the form of arXiv 2202.01169 with a term for the tokens; decimal logarithms"

    def __init__(self, cells: Sequence[Cell], axes: list[str]):
        self.axes, self.absent = axes, []
        terms = {"d": "constant"}
        if "active" in axes:
            terms["a"] = "log N: exponent of the active parameters"
        else:
            self.absent.append(
                f"a: active parameters have one value ({_shown(cells, 'active')}), so a log N is part of d"
            )
        terms["b"] = "log E: exponent of the experts"
        if "active" in axes and len(cells) < len(terms) + 1 + ("tokens" in axes) + _SPARE:
            self.absent.append(
                f"c: {len(cells)} settings are too few for it, so b is that of the sizes here on average"
            )
        elif "active" in axes and _interaction(cells) < _SEPARATE:
            self.absent.append("c: experts vary at one size only, so b is that of this size; vary them at another too")
        elif "active" in axes:
            terms["c"] = "log N log E: how b changes with the size"
        else:
            self.absent.append(f"c: with one size it is part of b, which is that of N = {_shown(cells, 'active')}")
        if "tokens" in axes:
            terms["e"] = "log D: exponent of the tokens"
        else:
            self.absent.append(f"e: tokens have one value ({_shown(cells, 'tokens')}), so e log D is part of d")
        self.meanings = terms
        factors = {"d": "d", "a": "a log N", "b": "b log E", "c": "c log N log E", "e": "e log D"}
        self.formula = f"log L = {' + '.join(factors[term] for term in terms)}"
        _check_count(cells, len(terms), axes)

    def at(self, cells: Sequence[Cell], theta_BP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        columns_XP = math.log(10) * self._columns(cells)
        return theta_BP @ columns_XP.T, np.broadcast_to(columns_XP, (len(theta_BP), *columns_XP.shape))

    def starts(self, cells: Sequence[Cell], log_loss_X: np.ndarray) -> list[np.ndarray]:
        # The problem is convex, so one start does: that of least squares.
        return [np.linalg.lstsq(math.log(10) * self._columns(cells), log_loss_X)[0]]

    def coefficients(self, theta_BP: np.ndarray) -> np.ndarray:
        return theta_BP

    def _columns(self, cells: Sequence[Cell]) -> np.ndarray:
        expansion, _, active, tokens = np.log10(np.array(cells, float)).T
        columns = {"d": np.ones(len(cells)), "a": active, "b": expansion, "c": active * expansion, "e": tokens}
        return np.stack([columns[term] for term in self.meanings], axis=1)


class FineGrained:
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta, arXiv 2402.07871.

    The paper holds the expansion rate; where it varies, the middle term has a factor E^delta. All but c and delta
    are positive and searched by their logarithms; a, b and g as they are at the middle of the grid, for there they
    hardly depend on the exponents.
    """

    source = "the form of arXiv 2402.07871"
    _REAL = ("c", "delta")

    def __init__(self, cells: Sequence[Cell], axes: list[str]):
        for axis in axes:
            values = _distinct(cells, axis)
            if len(values) < 3:
                both = " and ".join(map(figures.short, values))
                raise config.ConfigError(
                    f"{NAMES[axis]}={both} are two values, and a power law with a floor needs three; add points "
                    "with another"
                )
        self._middle = np.log(np.array(cells, float)).mean(axis=0)
        self.axes, self.absent = axes, []
        terms = {"c": "floor"}
        scales = "active" in axes or "expansion" in axes
        if scales:
            terms["a"] = "scale of the model's term as G grows"
        if "active" in axes:
            terms["alpha"] = "exponent of the active parameters"
        else:
            self.absent.append(
                f"alpha: active parameters have one value ({_shown(cells, 'active')}), so g has 1 / N^alpha in it"
            )
        if not scales:
            self.absent.append("a: with one size and one expansion rate, it is part of c")
        if "expansion" in axes:
            terms["delta"] = "exponent of the expansion rate"
        terms["g"] = "scale of the granularity's part"
        terms["gamma"] = "exponent of the granularity"
        if "tokens" in axes:
            terms["b"] = "scale of the tokens' term"
            terms["beta"] = "exponent of the tokens"
        else:
            self.absent.append(
                f"b, beta: tokens have one value ({_shown(cells, 'tokens')}), so b / D^beta is part of c"
            )
        self.meanings = terms
        middle = "(g / G^gamma + a)" if scales else "g / G^gamma"
        middle += " E^delta" * ("expansion" in axes) + " / N^alpha" * ("active" in axes)
        self.formula = f"L = c + {middle}" + " + b / D^beta" * ("tokens" in axes)
        _check_count(cells, len(terms), axes)

    def at(self, cells: Sequence[Cell], theta_BP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        expansion_X, granularity_X, active_X, tokens_X = (np.log(np.array(cells, float)) - self._middle).T
        value = self._values(theta_BP)
        size_BX = _exp(value["delta"] * expansion_X - value["alpha"] * active_X)
        fine_BX = value["g"] * _exp(-value["gamma"] * granularity_X) * size_BX
        coarse_BX = value["a"] * size_BX
        tokens_BX = value["b"] * _exp(-value["beta"] * tokens_X)
        loss_BX = np.maximum(value["c"] + fine_BX + coarse_BX + tokens_BX, 1e-6)
        by = {
            "c": np.ones_like(loss_BX),
            "a": coarse_BX,
            "alpha": -value["alpha"] * active_X * (fine_BX + coarse_BX),
            "delta": expansion_X * (fine_BX + coarse_BX),
            "g": fine_BX,
            "gamma": -value["gamma"] * granularity_X * fine_BX,
            "b": tokens_BX,
            "beta": -value["beta"] * tokens_X * tokens_BX,
        }
        return np.log(loss_BX), np.stack([by[name] for name in self.meanings], axis=2) / loss_BX[..., None]

    def starts(self, cells: Sequence[Cell], log_loss_X: np.ndarray) -> list[np.ndarray]:
        # With the exponents given, the scales are those of least squares; they start at 1% of the loss or more, for a
        # search over their logarithms goes nowhere from zero.
        expansion_X, granularity_X, active_X, tokens_X = (np.log(np.array(cells, float)) - self._middle).T
        loss_X, found = np.exp(log_loss_X), []
        for alpha, beta, gamma in itertools.product((0.1, 0.3), (0.1, 0.3), (0.3, 1.0)):
            size_X = np.exp(-0.1 * expansion_X - alpha * active_X)
            columns = {"c": np.ones(len(cells)), "a": size_X, "g": size_X * np.exp(-gamma * granularity_X)}
            columns = {name: column_X for name, column_X in columns.items() if name in self.meanings}
            if "b" in self.meanings:
                columns["b"] = np.exp(-beta * tokens_X)
            scale_P = optimize.nnls(np.stack(list(columns.values()), axis=1) / loss_X[:, None], np.ones(len(cells)))[0]
            values = dict(zip(columns, np.maximum(scale_P, 0.01 * loss_X.mean()), strict=True))
            values |= {"alpha": alpha, "beta": beta, "gamma": gamma, "delta": -0.1}
            found.append(
                np.array([math.log(values[name]) if name not in self._REAL else values[name] for name in self.meanings])
            )
        return found

    def coefficients(self, theta_BP: np.ndarray) -> np.ndarray:
        # g' (N / N_middle)^-alpha = g N^-alpha has g = g' N_middle^alpha.
        expansion, granularity, active, tokens = self._middle
        value = self._values(theta_BP)
        size_B1 = _exp(value["alpha"] * active - value["delta"] * expansion)
        value["a"] = value["a"] * size_B1
        value["g"] = value["g"] * size_B1 * _exp(value["gamma"] * granularity)
        value["b"] = value["b"] * _exp(value["beta"] * tokens)
        return np.concatenate([value[name] for name in self.meanings], axis=1)

    def _values(self, theta_BP: np.ndarray) -> dict[str, np.ndarray]:
        """Coefficients, (B, 1), the scales at the middle of the grid; 0 for one that the grid does not identify."""
        names = ("c", "a", "alpha", "delta", "g", "gamma", "b", "beta")
        found: dict[str, np.ndarray] = {name: np.zeros((len(theta_BP), 1)) for name in names}
        for name, theta_B in zip(self.meanings, theta_BP.T, strict=True):
            found[name] = (_exp(theta_B) if name not in self._REAL else theta_B)[:, None]
        return found


def _exp(power: np.ndarray) -> np.ndarray:
    """Finite, for a search may try what it then rejects."""
    return np.exp(np.clip(power, -60, 60))


# --- what the grid identifies ----------------------------------------------------------------------------------------


def _distinct(cells: Sequence[Cell], axis: str) -> list[float]:
    """The values of an axis, ascending; those that hardly differ count as one."""
    found: list[float] = []
    for value in sorted(getattr(cell, axis) for cell in cells):
        if not found or value >= _VARIES * found[-1]:
            found.append(value)
    return found


def _shown(cells: Sequence[Cell], axis: str) -> str:
    middle = math.exp(statistics.fmean(math.log(getattr(cell, axis)) for cell in cells))
    return figures.short(float(f"{middle:.6g}"))


def _check_separate(cells: Sequence[Cell], axes: list[str]) -> None:
    """Raises ConfigError if an axis follows from others."""
    logs_XA = np.log([[getattr(cell, axis) for axis in axes] for cell in cells])
    logs_XA = logs_XA - logs_XA.mean(axis=0)
    for index, axis in enumerate(axes):
        others_XA = np.delete(logs_XA, index, axis=1)
        if _left(logs_XA[:, index], others_XA) < _SEPARATE:
            beside = max(
                (other for other in axes if other != axis),
                key=lambda other: abs(np.corrcoef(logs_XA[:, index], logs_XA[:, axes.index(other)])[0, 1]),
            )
            raise config.ConfigError(
                f"{NAMES[axis]} and {NAMES[beside]} move together over the grid, so their effects cannot be told "
                f"apart; add points where {NAMES[beside]} stay and {NAMES[axis]} vary"
            )


def _interaction(cells: Sequence[Cell]) -> float:
    """How much of a crossing of sizes and experts the grid has: 1 is a full one, 0 none."""
    active_X, expansion_X = (
        np.array([math.log(getattr(cell, axis)) for cell in cells]) for axis in ("active", "expansion")
    )
    active_X, expansion_X = ((log_X - log_X.mean()) / log_X.std() for log_X in (active_X, expansion_X))
    others_XA = np.stack([active_X, expansion_X], axis=1)
    product_X = active_X * expansion_X
    return _left(product_X - product_X.mean(), others_XA) * float(product_X.var())


def _left(column_X: np.ndarray, others_XA: np.ndarray) -> float:
    """The share of a column's variance that the others leave unexplained."""
    if not others_XA.shape[1]:
        return 1.0
    rest_X = column_X - others_XA @ np.linalg.lstsq(others_XA, column_X)[0]
    return float(rest_X @ rest_X / (column_X @ column_X))


def _check_count(cells: Sequence[Cell], num_coefficients: int, axes: list[str]) -> None:
    if len(cells) < num_coefficients + _SPARE:
        missing = num_coefficients + _SPARE - len(cells)
        raise config.ConfigError(
            f"points={len(cells)} settings have finished, and {num_coefficients} coefficients with their error need "
            f"{num_coefficients + _SPARE}; add {missing} with other {' or '.join(NAMES[axis] for axis in axes)}"
        )
