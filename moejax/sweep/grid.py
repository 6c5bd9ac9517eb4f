"""Grids of settings, what stays equal across them, and the points that they make.

A config file declares a sweep in `get_sweep()`, beside `get_config()`:

    def get_sweep():
        mixtures = grid.iso_active(grid.over("model.moe.num_experts", 1, 4, 16))
        return grid.Sweep(get_config(), [*grid.named("mamba", MAMBA), *mixtures], baseline="mamba", seeds=(0, 1, 2))

A grid is a list of rows, and a row the fields in which a point differs from the base. `over`, `granularity` and `named`
make grids, `product` and `zipped` combine them, and so does `+`. `iso_active`, `iso_total` and `iso_flops` hold a
quantity constant across a grid, at its value in the base, by solving for a field. Only what they are given varies under
them, so that at each width below, mixtures have the active parameters of the base at that width:

    product(over("model.d_model", 256, 512), iso_active(over("model.moe.num_experts", 1, 8, 64)))

Nothing is counted before `points`: a file that declares a sweep costs no import of jax.
"""

import copy
import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moejax import config as config_lib
from moejax import rules
from moejax.config import plain
from moejax.rules import checks
from moejax.sweep import names

SEEDS = ("training.seed", "data.seed")


@dataclasses.dataclass(frozen=True)
class Held:
    """What stays constant across some rows; see `iso_active`."""

    measure: str  # of solve.MEASURES
    solve: str
    varied: tuple[str, ...]  # fields of the row that vary under it
    like: dict[str, Any]
    multiple_of: int


@dataclasses.dataclass(frozen=True)
class Row:
    """Settings in which a point differs from the base config: field -> value."""

    name: str
    settings: dict[str, Any]
    held: tuple[Held, ...] = ()  # inner ones first


Grid = list[Row]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What get_sweep() returns: every row of the grid with every seed."""

    base: config_lib.Config
    grid: Sequence[Row]
    seeds: tuple[int, ...] = (0,)  # each is training.seed and data.seed of a point
    baseline: str = ""  # the group that others are compared with; "" = none


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str  # as e32_k1_s0, unique in the sweep; a folder's name
    group: str  # the name without the seed: points of a group are repetitions
    seed: int
    settings: dict[str, Any]  # field -> value, where it differs from the base: solved fields too, seeds not
    config: config_lib.Config  # validated
    granularity: int = 1  # see `granularity`


# --- grids -----------------------------------------------------------------------------------------------------------


def over(field: str, *values: Any) -> Grid:
    """A row for each value of a field, given by its path in a config: over("model.moe.num_experts", 4, 8, 16)."""
    _check_field(field)
    return _over(field, values)


def granularity(*values: int) -> Grid:
    """A row for each granularity G (arXiv 2402.07871): every expert divided into G, of which a token takes G.

    That is, of what the point has otherwise: num_experts * G, d_expert / G, top_k * G, num_shared_experts * G.
    """
    for value in values:
        checks.require(
            type(value) is int and value >= 1, f"granularity={value} must be a whole number from 1; change it"
        )
    return _over(names.GRANULARITY, values)


def named(name: str, settings: Mapping[str, Any]) -> Grid:
    """One row, of a name of its own: named("mamba", {"model.period": ("mamba",), "model.num_periods": 16})."""
    checks.require(
        names.NAME.fullmatch(name) is not None,
        f"named({name!r}) can't name a folder; write letters, digits and . + _ = - and begin with a letter or digit",
    )
    for field in settings:
        _check_field(field)
    return [Row(name, dict(settings))]


def from_config(name: str, config: config_lib.Config, base: config_lib.Config) -> Grid:
    """One row, of a name of its own: every field in which a config differs from the base of the sweep."""
    return named(name, {field: checks.get(config, field) for field, _, _ in plain.differences(base, config)})


def product(*grids: Sequence[Row]) -> Grid:
    """Every combination of a row of each grid, the last one varying fastest."""
    return [_joined(rows) for rows in itertools.product(*grids)]


def zipped(*grids: Sequence[Row]) -> Grid:
    """The first rows of all grids joined, the second ones, and so on."""
    lengths = sorted({len(rows) for rows in grids})
    checks.require(
        len(lengths) <= 1, f"zipped() was given grids of {' and '.join(map(str, lengths))} rows; give equally many"
    )
    return [_joined(rows) for rows in zip(*grids, strict=True)]


def iso_active(
    grid: Sequence[Row],
    solve: str = "model.moe.d_expert",
    *,
    like: Mapping[str, Any] | None = None,
    multiple_of: int = 1,
) -> Grid:
    """The grid at equal active parameters, to 1 %: those that meet a token, embedding and head left out.

    Args:
      solve: the field that is solved for, a whole number: model.moe.d_expert, model.moe.top_k,
        model.moe.num_shared_experts, or any other on which the number depends. A grid around this one may set it: for
        the number to hold.
      like: settings of the base that has the number to hold, in place of the base as it is.
      multiple_of: the field shall be a multiple of it, as where a mesh or a chip's tiles divide it.
    """
    return _hold("active", grid, solve, like, multiple_of)


def iso_total(
    grid: Sequence[Row],
    solve: str = "model.moe.d_expert",
    *,
    like: Mapping[str, Any] | None = None,
    multiple_of: int = 1,
) -> Grid:
    """The grid at equal parameters in all, to 1 %, embedding and head left out; see `iso_active`."""
    return _hold("total", grid, solve, like, multiple_of)


def iso_flops(
    grid: Sequence[Row],
    solve: str = "training.num_steps",
    *,
    like: Mapping[str, Any] | None = None,
    multiple_of: int = 1,
) -> Grid:
    """The grid at equal useful FLOPs of the whole run, to 1 %; see `iso_active`. Dearer models get fewer tokens."""
    return _hold("flops", grid, solve, like, multiple_of)


# --- points ----------------------------------------------------------------------------------------------------------


def points(sweep: Sweep) -> list[Point]:
    """Every point, row by row, seeds together.

    Raises:
      ConfigError: a base or a point that breaks a rule, a quantity that can't be held to 1 %, two points of one name,
        or a baseline that there is not.
    """
    checks.require(
        isinstance(sweep.grid, Sequence) and all(isinstance(row, Row) for row in sweep.grid),
        "the grid of get_sweep() holds what is no row; join grids with +, as in over(...) + named(...)",
    )
    checks.require(len(sweep.grid) > 0, "the grid of get_sweep() has no rows; give it some")
    checks.require(
        isinstance(sweep.seeds, tuple) and all(type(seed) is int for seed in sweep.seeds),
        f"seeds={sweep.seeds} must be a tuple of whole numbers; write seeds=(0, 1, 2)",
    )
    checks.require(len(set(sweep.seeds)) == len(sweep.seeds) > 0, f"seeds={sweep.seeds} must differ; change them")
    base = copy.deepcopy(sweep.base)
    rules.validate(base)
    found: dict[str, Row] = {}
    for row in sweep.grid:
        other = found.setdefault(row.name.lower(), row)  # not every file system tells e8 from E8
        checks.require(
            other is row,
            f"two points are named {row.name}: {_written(other)} and {_written(row)}; leave one out, or use named()",
        )
    groups = [row.name for row in sweep.grid]
    checks.require(
        not sweep.baseline or sweep.baseline in groups,
        f"baseline={sweep.baseline} is no point of the sweep; choose one of {', '.join(groups)}",
    )
    made = []
    for row in sweep.grid:
        try:
            config = _make(base, row)
            settings = {field: new for field, _, new in plain.differences(base, config)}
            made += [_point(row, seed, settings, config) for seed in sweep.seeds]
        except config_lib.ConfigError as error:
            raise config_lib.ConfigError(f"point {row.name}: {error}") from None
    return made


def axes(point: Point) -> dict[str, float]:
    """Of plots and fits: experts, granularity and top_k (experts a token), all 0 where no layer has experts."""
    moe = point.config.model.moe
    if not point.config.model.has_experts:
        return {"experts": 0, names.GRANULARITY: 0, "top_k": 0}
    top_k = moe.num_choices if config_lib.ROUTERS[moe.router].sparse else moe.num_experts
    return {"experts": moe.num_experts, names.GRANULARITY: point.granularity, "top_k": top_k}


def check_override(sweep: Sweep, field: str) -> None:
    """Refuses an override of the base that would reach no point.

    One of a field that is solved for is good where it changes what is held: with iso_flops, training.num_steps of the
    base says how many FLOPs every point has.
    """
    option = f"--config.{field}={checks.get(sweep.base, field)}"
    checks.require(
        field not in SEEDS, f"{option} would be overwritten by the seeds of the sweep; write --seeds=0,1,2 instead"
    )
    if all(field in _set_fields(row) for row in sweep.grid):
        checks.require(
            any(_moves_goal(sweep.base, row, field) for row in sweep.grid),
            f"{option} would change nothing, as every point of the sweep sets it; change get_sweep() in the file",
        )


# --- from rows to configs --------------------------------------------------------------------------------------------


def _check_field(field: str) -> None:
    checks.known(field)
    checks.require(field not in SEEDS, f"{field} is what the seeds of a sweep set; write Sweep(seeds=(0, 1, 2))")


def _over(field: str, values: Sequence[Any]) -> Grid:
    checks.require(len(values) > 0, f"over({field!r}) has no values; give some")
    return [Row(names.word(field, value), {field: value}) for value in values]


def _joined(rows: Sequence[Row]) -> Row:
    settings: dict[str, Any] = {}
    for row in rows:
        for field, value in row.settings.items():
            checks.require(field not in settings, f"{field} is in two grids of a product or zip; leave one out")
            settings[field] = value
    held = tuple(held for row in rows for held in row.held)
    solved = [one.solve for one in held]
    for field in solved:
        alone = solved.count(field) == 1
        checks.require(alone, f"{field} is solved for by two grids of a product or zip; leave one out")
    return Row("_".join(row.name for row in rows), settings, held)


def _hold(measure: str, grid: Sequence[Row], solve: str, like: Mapping[str, Any] | None, multiple_of: int) -> Grid:
    for field in (solve, *(like or {})):
        _check_field(field)
    default = plain.flatten(config_lib.Config())[solve]
    checks.require(
        type(default) is int, f"iso_{measure}(solve={solve}) must name a whole number, as model.moe.d_expert; change it"
    )
    checks.require(multiple_of >= 1, f"iso_{measure}(multiple_of={multiple_of}) must be 1 or more; change it")
    rows = []
    for row in grid:
        taken = solve in row.settings or any(held.solve == solve for held in row.held)
        checks.require(
            not taken, f"iso_{measure}(solve={solve}) of {row.name}, which sets it already; solve for another field"
        )
        held = Held(measure, solve, tuple(row.settings), dict(like or {}), multiple_of)
        rows.append(dataclasses.replace(row, held=(*row.held, held)))
    return rows


def _make(base: config_lib.Config, row: Row) -> config_lib.Config:
    """The validated config of a row, but for its seed."""
    from moejax.sweep import solve

    config = _applied(base, row.settings, free={held.solve for held in row.held})
    if row.held:
        for held in row.held:
            rules.validate(_reference(base, row, held))
        goals = [
            solve.Goal(held.measure, _target(base, row, held), held.solve, held.multiple_of, held.varied)
            for held in row.held
        ]
        try:
            solve.settle(config, goals)
        except config_lib.ConfigError:
            raise
        except Exception:  # a model that can't be built breaks a rule
            rules.validate(config)
            raise
    rules.validate(config)
    return config


def _applied(base: config_lib.Config, settings: Mapping[str, Any], free: Collection[str] = ()) -> config_lib.Config:
    """The base with these settings. free: fields that are solved for, whose value here is only a start."""
    config = copy.deepcopy(base)
    for field, value in settings.items():
        if field != names.GRANULARITY:
            checks.put(config, field, value)
    finer, moe = settings.get(names.GRANULARITY, 1), config.model.moe
    if finer > 1:
        checks.require(
            moe.d_expert % finer == 0 or "model.moe.d_expert" in free,
            f"granularity={finer} does not divide model.moe.d_expert={moe.d_expert}; change one of them, or solve for "
            "model.moe.d_expert",
        )
        moe.top_k, moe.d_expert = finer * moe.num_choices, max(1, moe.d_expert // finer)
        moe.num_experts, moe.num_shared_experts = finer * moe.num_experts, finer * moe.num_shared_experts
    return config


def _reference(base: config_lib.Config, row: Row, held: Held) -> config_lib.Config:
    """Whose quantity is held: the base, with the settings of the row that do not vary under `held`."""
    outer = {field: value for field, value in row.settings.items() if field not in held.varied}
    return _applied(base, outer | held.like)


def _target(base: config_lib.Config, row: Row, held: Held) -> float:
    from moejax.sweep import solve

    return solve.measure(held.measure, _reference(base, row, held))


def _moves_goal(base: config_lib.Config, row: Row, field: str) -> bool:
    """Whether the base's value of a field matters to what the row holds constant, where it solves for that field."""
    larger = copy.deepcopy(base)
    for held in row.held:
        if held.solve == field:
            checks.put(larger, field, 2 * checks.get(base, field) + 2)
            return _target(base, row, held) != _target(larger, row, held)
    return False


def _set_fields(row: Row) -> set[str]:
    """That do not come from the base."""
    return {*row.settings, *(held.solve for held in row.held)}


def _point(row: Row, seed: int, settings: dict[str, Any], config: config_lib.Config) -> Point:
    config = copy.deepcopy(config)
    for field in SEEDS:
        checks.put(config, field, seed)
    rules.validate(config)
    return Point(f"{row.name}_s{seed}", row.name, seed, settings, config, row.settings.get(names.GRANULARITY, 1))


def _written(row: Row) -> str:
    return ", ".join(f"{field}={value}" for field, value in row.settings.items()) or "the base"
