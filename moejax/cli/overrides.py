"""The config or the sweep of a command line: a file, and overrides of its fields."""

import dataclasses
import itertools
import pathlib
import re
import runpy
import typing
from collections.abc import Callable
from typing import Any

from moejax import config as config_lib
from moejax import rules
from moejax.rules import checks

if typing.TYPE_CHECKING:
    from moejax.sweep import grid


def read_config(file: str, overrides: list[str]) -> config_lib.Config:
    """The config of FILE[:ARG] with `--config.a.b=value` overrides, validated.

    Raises:
      ConfigError: no such file, a file without a usable get_config, what get_config itself refuses, an unknown field,
        a value of the wrong type, or a broken rule.
    """
    from ml_collections import config_flags

    _existing(file)
    _check_overrides(overrides)
    arguments = ["moejax", f"--config={file}", *overrides]
    config = _parse(file, arguments, config_flags.DEFINE_config_file, "config")
    if not isinstance(config, config_lib.Config):
        raise config_lib.ConfigError(
            f"--config={file}: get_config() returned a {type(config).__name__}; return a moejax.config.Config"
        )
    rules.validate(config)
    return config


def read_sweep(file: str, overrides: list[str], seeds: str = "") -> "grid.Sweep":
    """The sweep of FILE[:ARG], what its get_sweep(ARG) returns, with `--config.a.b=value` overrides of its base.

    seeds: in place of the sweep's own, as in "0,1,2".

    Raises:
      ConfigError: no such file, a file without a usable get_sweep, an unknown field, a value of the wrong type, a base
        that breaks a rule, or an override that would reach no point.
    """
    from ml_collections import config_flags

    from moejax.sweep import grid

    path = _existing(file)
    _check_overrides(overrides)
    try:
        module = runpy.run_path(str(path))
        if "get_sweep" not in module:
            raise config_lib.ConfigError("there is no get_sweep() in it; add one beside get_config()")
        sweep = module["get_sweep"](*file.split(":", 1)[1:])
        if not isinstance(sweep, grid.Sweep):
            raise config_lib.ConfigError(
                f"get_sweep() returned a {type(sweep).__name__}; return a moejax.sweep.grid.Sweep"
            )
    except config_lib.ConfigError as error:
        raise config_lib.ConfigError(f"--config={file}: {error}") from None
    except Exception as error:  # the file is the user's program
        raise _unreadable(file, error) from None
    base = _parse(file, ["moejax", *overrides], config_flags.DEFINE_config_dataclass, "config", sweep.base)
    rules.validate(base)
    sweep = dataclasses.replace(sweep, base=base)
    for field in sorted(overridden(overrides)):
        grid.check_override(sweep, field)
    return dataclasses.replace(sweep, seeds=_seeds(seeds)) if seeds else sweep


def overridden(overrides: list[str]) -> frozenset[str]:
    """The fields that the overrides set, by dotted path."""
    options = (override.split("=")[0] for override in overrides if override.startswith("--config."))
    return frozenset(option.removeprefix("--config.") for option in options)


def variations(options: list[str]) -> list[dict[str, str]]:
    """All combinations of the values of `FIELD=VALUE,VALUE` options, as field -> value; one empty one of no options.

    Commas inside brackets belong to a value: model.period=('mamba','moe'),('mamba|moe',).

    Raises:
      ConfigError: an option without a field or a value, or two for a field.
    """
    values: dict[str, list[str]] = {}
    for option in options:
        field, _, text = option.partition("=")
        parts = re.split(r",(?![^(]*\))", text)
        if not field or not all(parts):
            raise config_lib.ConfigError(f"--vary={option} lacks a value; write --vary=FIELD=VALUE,VALUE")
        if field in values:
            raise config_lib.ConfigError(f"--vary={option} comes after another of {field}; write one --vary a field")
        values[field] = parts
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


def _existing(file: str) -> pathlib.Path:
    path = pathlib.Path(file.split(":")[0])
    if not path.is_file():
        raise config_lib.ConfigError(f"--config={file}: there is no file {path}; name one, e.g. configs/quickstart.py")
    return path


def _check_overrides(overrides: list[str]) -> None:
    """Refuses an override whose path is not a field, naming the nearest that is."""
    for override in overrides:
        if not override.startswith("--"):
            continue  # the value of the option before it
        path = override.split("=")[0]
        if not path.startswith("--config."):
            raise config_lib.ConfigError(f"{path} is not an option; overrides are written --config.a.b=value")
        checks.known(path.removeprefix("--config."), prefix="--config.")


def _parse(file: str, arguments: list[str], define: Callable[..., Any], *defined: Any) -> Any:
    """The value of the flag --config that `define(*defined)` declares, with the overrides among the arguments."""
    from absl import flags

    values = flags.FlagValues()
    try:
        define(*defined, flag_values=values, sys_argv=arguments)
        rest = values(arguments)[1:]
        config = values["config"].value
    except flags.IllegalFlagValueError as error:
        own = _own_line(error)
        line = f"--config={file}: {own}" if own else _wrong_value(file, arguments, error)
        raise config_lib.ConfigError(line) from None
    except flags.Error as error:
        raise config_lib.ConfigError(f"{' '.join(str(error).split())}; write overrides as --config.a.b=value") from None
    except Exception as error:  # the file is the user's program: anything may come out of it
        raise _unreadable(file, error) from None
    if rest:
        raise config_lib.ConfigError(f"{rest[0]} is not an option; write overrides as --config.a.b=value")
    return config


def _own_line(error: BaseException | None) -> str:
    """The line of the ConfigError that get_config() raised, if any: around it are copies with a whole traceback."""
    while error is not None:
        if isinstance(error, config_lib.ConfigError) and "\n" not in str(error):
            return str(error)
        error = error.__context__
    return ""


def _unreadable(file: str, error: Exception) -> config_lib.ConfigError:
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return config_lib.ConfigError(f"--config={file} cannot be read ({what}); mend the file")


def _wrong_value(file: str, arguments: list[str], error: Exception) -> str:
    """The line for a value that does not fit its field's type, or an ARG that the config file does not take."""
    for argument in reversed(arguments):
        option, _, value = argument.partition("=")
        if option.startswith("--config.") and f"flag {option}=" in str(error):
            node: Any = config_lib.Config
            for name in option.removeprefix("--config.").split("."):
                node = typing.get_type_hints(node)[name]
            kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(node, f"{node}")
            return f"{option.removeprefix('--')}={value} has the wrong type; give {kind}"
    last = str(error).strip().splitlines()[-1].strip()
    return f"--config={file} cannot be read ({last}); leave out what follows the colon or name what get_config() takes"


def _seeds(text: str) -> tuple[int, ...]:
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        raise config_lib.ConfigError(f"--seeds={text} must be whole numbers with commas between, e.g. 0,1,2; change it")
    return tuple(map(int, seeds))
