"""Least squares that one bad point cannot spoil, with bootstrap intervals: for curves of few points.

Huber's loss of the residuals, minimised by SciPy. The intervals are percentiles of refits to resampled residuals
(Davison & Hinkley 1997, section 6.3), each divided by the root of one minus its leverage, which the fit took from it,
and all of them stretched by the ratio of Student's to the normal quantile. Without both, intervals of few points are
far too narrow.
"""

# B fits side by side, X points, P parameters, Q quantities that follow from the parameters

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize, stats

NUM_RESAMPLES = 1999  # so that the 2.5% quantiles fall on draws
LEVEL = 0.95  # of every interval
_HUBER = 1.345  # times the scale of the residuals: 95% as efficient as least squares if they are normal
_PILOT = 1e-3  # Huber's threshold of the first fit, from whose residuals the scale is taken; about the median's fit
_STEPS = 60
_IDLE = 1e-5  # change of all points together, as a parameter changes by one, below which it says nothing


class UndeterminedError(ValueError):
    """The points say nothing about some parameters: `indices`, in their order."""

    def __init__(self, indices: Sequence[int]):
        super().__init__(f"the points leave parameters undetermined: {indices}")
        self.indices = indices


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Curve:
    """What is fitted, for many parameter vectors at a time: at(theta_BP) -> (value_BX, value_BXP by parameter)."""

    at: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    starts: Sequence[np.ndarray]  # of the search, each (P,)


@dataclasses.dataclass(kw_only=True, slots=True)
class Estimate:
    """A fitted curve and its refits to resampled residuals."""

    theta_P: np.ndarray
    residual_X: np.ndarray  # observed less fitted
    threshold: float  # of Huber's loss: residuals beyond it count linearly
    theta_BP: np.ndarray  # refits

    def interval(self, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """(estimate, low, high) of quantities that follow from the parameters, (3, Q). of(theta_BP) -> quantity_BQ."""
        tail = (1 - LEVEL) / 2
        return np.concatenate([of(self.theta_P[None]), np.quantile(of(self.theta_BP), (tail, 1 - tail), axis=0)])


def fit(curve: Curve, observed_X: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Estimate:
    """The curve through these points. The same arguments give the same result.

    Raises:
      UndeterminedError: the points say nothing about some parameters.
    """
    num_points, num_parameters = len(observed_X), len(curve.starts[0])
    assert num_points > num_parameters
    pilot_P = _best(curve, observed_X, curve.starts, _PILOT)
    threshold = _HUBER * max(_scale(curve, observed_X, pilot_P), 1e-9)
    theta_P = _best(curve, observed_X, [pilot_P], threshold)
    fitted_1X, by_1XP = curve.at(theta_P[None])
    _check_determined(by_1XP[0])
    residual_X = observed_X - fitted_1X[0]
    drawn_X = residual_X / _shrinking(by_1XP[0])
    upper = (1 + LEVEL) / 2
    stretch = stats.t.ppf(upper, num_points - num_parameters) / stats.norm.ppf(upper)
    rng = np.random.default_rng(seed)
    resampled_BX = rng.choice(stretch * (drawn_X - drawn_X.mean()), (num_resamples, num_points))
    theta_BP = refit(curve, fitted_1X + resampled_BX, theta_P, threshold)
    return Estimate(theta_P=theta_P, residual_X=residual_X, threshold=threshold, theta_BP=theta_BP)


def refit(curve: Curve, observed_BX: np.ndarray, start_P: np.ndarray, threshold: float) -> np.ndarray:
    """Fits many sets of points at a time, from one start: Levenberg-Marquardt on Huber's weights. Returns (B, P)."""
    theta_BP = np.repeat(start_P[None], len(observed_BX), axis=0)
    damping_B = np.full(len(observed_BX), 1e-4)
    value_BX, by_BXP = curve.at(theta_BP)
    residual_BX = observed_BX - value_BX
    cost_B = _huber(residual_BX, threshold)
    for _ in range(_STEPS):
        weighted_BPX = (by_BXP * _weights(residual_BX, threshold)[..., None]).swapaxes(1, 2)
        normal_BPP, slope_BP1 = weighted_BPX @ by_BXP, weighted_BPX @ residual_BX[..., None]
        diagonal_BP = np.diagonal(normal_BPP, axis1=1, axis2=2)
        normal_BPP = normal_BPP + (damping_B[:, None] * diagonal_BP + 1e-12)[:, None] * np.eye(len(start_P))
        step_BP = np.linalg.solve(normal_BPP, slope_BP1)[..., 0]
        new_BX, new_by_BXP = curve.at(theta_BP + step_BP)
        new_residual_BX = observed_BX - new_BX
        new_cost_B = _huber(new_residual_BX, threshold)
        better_B = new_cost_B <= cost_B
        theta_BP = np.where(better_B[:, None], theta_BP + step_BP, theta_BP)
        residual_BX = np.where(better_B[:, None], new_residual_BX, residual_BX)
        by_BXP = np.where(better_B[:, None, None], new_by_BXP, by_BXP)
        gained_B = np.where(better_B, cost_B - new_cost_B, 0.0)
        damping_B = np.where(better_B, damping_B / 10, np.minimum(damping_B * 10, 1e8))
        if (better_B & (gained_B <= 1e-12 * cost_B)).all():
            break
        cost_B = np.where(better_B, new_cost_B, cost_B)
    return theta_BP


def _best(curve: Curve, observed_X: np.ndarray, starts: Sequence[np.ndarray], threshold: float) -> np.ndarray:
    """The parameters of least cost over all starts."""
    found = [
        optimize.least_squares(
            lambda theta_P: curve.at(theta_P[None])[0][0] - observed_X,
            start_P,
            jac=lambda theta_P: curve.at(theta_P[None])[1][0],  # pyright: ignore[reportArgumentType]
            loss="huber",
            f_scale=threshold,
            x_scale="jac",
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
            max_nfev=500,
        )
        for start_P in starts
    ]
    return min(found, key=lambda one: one.cost).x


def _check_determined(by_XP: np.ndarray) -> None:
    size_P = np.linalg.norm(by_XP, axis=0)
    idle_P = size_P < _IDLE
    if not idle_P.any():  # those that take part in a direction along which nothing changes
        _, singular_P, direction_PP = np.linalg.svd(by_XP / size_P, full_matrices=False)
        flat_PP = direction_PP[singular_P < 1e-8 * singular_P[0]]
        idle_P = (np.abs(flat_PP) > 0.1).any(axis=0)
    if idle_P.any():
        raise UndeterminedError(np.flatnonzero(idle_P).tolist())


def _scale(curve: Curve, observed_X: np.ndarray, theta_P: np.ndarray) -> float:
    """A standard deviation: the median size of the residuals but the P smallest, which the fit made small."""
    value_1X, by_1XP = curve.at(theta_P[None])
    size_X = np.sort(np.abs(observed_X - value_1X[0]) / _shrinking(by_1XP[0]))
    return float(np.median(size_X[len(theta_P) - 1 :])) / 0.6745


def _shrinking(by_XP: np.ndarray) -> np.ndarray:
    """How much smaller than an error the residual of a point is expected to be, for its pull on the curve."""
    leverage_X = (np.linalg.qr(by_XP)[0] ** 2).sum(axis=1)
    return np.sqrt(np.maximum(1 - leverage_X, 1e-3))


def _weights(residual_BX: np.ndarray, threshold: float) -> np.ndarray:
    return threshold / np.maximum(np.abs(residual_BX), threshold)


def _huber(residual_BX: np.ndarray, threshold: float) -> np.ndarray:
    size_BX = np.abs(residual_BX)
    inside_BX = np.minimum(size_BX, threshold)
    return (inside_BX**2 / 2 + threshold * (size_BX - inside_BX)).sum(axis=1)
