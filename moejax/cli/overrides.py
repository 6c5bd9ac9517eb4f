"""The config of a command line: a file, and overrides of its fields."""

import difflib
import itertools
import pathlib
import re
import typing
from typing import Any

from moejax import config as config_lib
from moejax import rules


def read_config(file: str, overrides: list[str]) -> config_lib.Config:
    """The config of FILE[:ARG] with `--config.a.b=value` overrides, validated.

    Raises:
      ConfigError: no such file, a file without a usable get_config, an unknown field, a value of the wrong type, or a
        broken rule.
    """
    from absl import flags
    from ml_collections import config_flags

    path = pathlib.Path(file.split(":")[0])
    if not path.is_file():
        raise config_lib.ConfigError(f"--config={file}: there is no file {path}; name one, e.g. configs/quickstart.py")
    _check_overrides(overrides)
    arguments = ["moejax", f"--config={file}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        rest = values(arguments)[1:]
        config = values["config"].value
    except flags.IllegalFlagValueError as error:
        raise config_lib.ConfigError(_wrong_value(file, overrides, error)) from None
    except flags.Error as error:
        raise config_lib.ConfigError(f"{' '.join(str(error).split())}; write overrides as --config.a.b=value") from None
    except Exception as error:  # the file is the user's program: anything may come out of it
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise config_lib.ConfigError(f"--config={file} cannot be read ({what}); mend the file") from None
    if rest:
        raise config_lib.ConfigError(f"{rest[0]} is not an option; write overrides as --config.a.b=value")
    if not isinstance(config, config_lib.Config):
        raise config_lib.ConfigError(
            f"--config={file}: get_config() returned a {type(config).__name__}; return a moejax.config.Config"
        )
    rules.validate(config)
    return config


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


def _check_overrides(overrides: list[str]) -> None:
    """Refuses an override whose path is not a field, naming the nearest that is."""
    for override in overrides:
        if not override.startswith("--"):
            continue  # the value of the option before it
        path = override.split("=")[0]
        if not path.startswith("--config."):
            raise config_lib.ConfigError(f"{path} is not an option; overrides are written --config.a.b=value")
        name = path.removeprefix("--config.")
        known = config_lib.flatten(config_lib.Config())
        if name not in known:
            groups = {prefix for field in known for prefix in (field.rpartition(".")[0], field.split(".")[0])}
            if name in groups:
                raise config_lib.ConfigError(
                    f"{path} is a group of fields; set one of them, e.g. {path}.{_first(known, name)}"
                )
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean --config.{close[0]}?" if close else "moejax/config.py lists the fields"
            raise config_lib.ConfigError(f"{path} is not a field of the config; {hint}")


def _first(known: dict[str, Any], group: str) -> str:
    return next(field for field in known if field.startswith(f"{group}.")).removeprefix(f"{group}.")


def _wrong_value(file: str, overrides: list[str], error: Exception) -> str:
    """The line for a value that does not fit its field's type, or an ARG that the config file does not take."""
    for override in reversed(overrides):
        option, _, value = override.partition("=")
        if f"flag {option}=" in str(error):
            node: Any = config_lib.Config
            for name in option.removeprefix("--config.").split("."):
                node = typing.get_type_hints(node)[name]
            kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(node, f"{node}")
            return f"{option.removeprefix('--')}={value} has the wrong type; give {kind}"
    last = str(error).strip().splitlines()[-1].strip()
    return f"--config={file} cannot be read ({last}); leave out what follows the colon or name what get_config() takes"
