"""The value of a field at which a run has as many parameters or FLOPs as it should have."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moejax import config as config_lib
from moejax.rules import checks
from moejax.sweep import cost

TOLERANCE = 0.01  # of what is held constant
# Fields of which the number of parameters is a straight line, as no parameter has two dims that grow with one of them
LINEAR = ("model.moe.d_expert", "model.moe.num_experts", "model.moe.top_k", "model.moe.num_shared_experts")
_MOST_ROUNDS = 20  # over several goals, until none moves another's field


class Goal(NamedTuple):
    """What a run should have, and the whole-number field of its config that is solved for."""

    measure: str  # a key of MEASURES
    target: float
    field: str
    multiple_of: int  # of which the field shall be one
    varied: tuple[str, ...]  # the fields that vary while this is held, for messages


# What can be held constant, and its name in messages; parameters without embedding and head, as in MoE-Mamba's tables
MEASURES = {"active": "active parameters", "total": "parameters", "flops": "FLOPs"}


def measure(name: str, config: config_lib.Config) -> float:
    """One of MEASURES, of a run with this config."""
    return cost.flops(config) if name == "flops" else cost.parameters(config.model)[f"non_embedding_{name}"]


def settle(config: config_lib.Config, goals: Sequence[Goal]) -> None:
    """Sets every goal's field to where the config meets the goals.

    Raises:
      ConfigError: a goal's field does not matter to what it holds, or the nearest possible is further off than
        TOLERANCE; the message gives it.
    """
    for _ in range(_MOST_ROUNDS):
        before = [checks.get(config, goal.field) for goal in goals]
        for goal in goals:
            _solve(config, goal)
        if len(goals) == 1 or before == [checks.get(config, goal.field) for goal in goals]:
            break
    for goal in goals:
        _check(config, goal)


def nearest(
    function: Callable[[int], float],
    target: float,
    *,
    start: int,
    least: int,
    most: int | None = None,
    multiple_of: int = 1,
) -> int | None:
    """The multiple in [least, most] at which an increasing function comes nearest to the target.

    It asks for few values, at most five of a straight line, which most functions here are: it follows the line through
    two values around the target, and halves what is between them after two steps that did not.

    Args:
      start: a value to begin with, as near as is known.

    Returns:
      None if the function does not grow.
    """
    low = math.ceil(least / multiple_of) * multiple_of
    high = max(start - start % multiple_of, low + multiple_of)
    if most is not None:
        most -= most % multiple_of
        high = min(high, most)
    if high <= low:
        return low
    at_low, at_high = function(low), function(high)
    while at_low < target > at_high > at_low and high != most:
        ahead = math.ceil((high + (target - at_high) * (high - low) / (at_high - at_low)) / multiple_of) * multiple_of
        low, at_low, high = high, at_high, max(ahead, high + multiple_of)
        high = high if most is None else min(high, most)
        at_high = function(high)
    if at_high <= at_low:
        return None
    idle = 0  # steps in turn that have not halved what is between low and high
    while high - low > multiple_of and at_low < target < at_high:
        width = high - low
        share = 0.5 if idle == 2 else (target - at_low) / (at_high - at_low)
        middle = low + int(share * width)
        middle = min(max(middle - middle % multiple_of, low + multiple_of), high - multiple_of)
        at_middle = function(middle)
        if at_middle <= target:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
        idle = 0 if idle == 2 or high - low <= width / 2 else idle + 1
    return low if abs(at_low - target) <= abs(at_high - target) else high


def _solve(config: config_lib.Config, goal: Goal) -> None:
    def at(value: int) -> float:
        checks.put(config, goal.field, value)
        return measure(goal.measure, config)

    start = checks.get(config, goal.field)
    is_line = goal.measure != "flops" and goal.field in LINEAR
    value = nearest(
        _line(at) if is_line else at,  # counting parameters takes a while
        goal.target,
        start=start,
        least=0 if goal.field == "model.moe.num_shared_experts" else 1,
        most=config.model.moe.num_experts if goal.field == "model.moe.top_k" else None,
        multiple_of=goal.multiple_of,
    )
    if value is None:
        raise config_lib.ConfigError(
            f"{goal.field} does not change the number of {MEASURES[goal.measure]}; take the point out of "
            f"iso_{goal.measure}(), or solve for another field"
        )
    checks.put(config, goal.field, value)


def _line(function: Callable[[int], float]) -> Callable[[int], float]:
    """The straight line through the values at 1 and 2."""
    at_1, at_2 = function(1), function(2)
    return lambda value: at_1 + (value - 1) * (at_2 - at_1)


def _check(config: config_lib.Config, goal: Goal) -> None:
    got, value = measure(goal.measure, config), checks.get(config, goal.field)
    if abs(got - goal.target) <= TOLERANCE * goal.target:
        return
    coarse = f" multiple of {goal.multiple_of}" if goal.multiple_of > 1 else ""
    raise config_lib.ConfigError(
        f"{goal.field}={value} gives {_large(got)} {MEASURES[goal.measure]}, {abs(got / goal.target - 1):.1%} "
        f"{'more' if got > goal.target else 'fewer'} than the {_large(goal.target)} to hold, and no other{coarse} "
        f"comes nearer ({TOLERANCE:.0%} is allowed); vary {' and '.join(goal.varied)} less, or solve for another field"
    )


def _large(number: float) -> str:
    return f"{number:,.0f}" if number < 1e12 else f"{number:.4g}"
