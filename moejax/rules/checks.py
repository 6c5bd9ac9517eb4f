"""What rules are made of: a check that raises ConfigError with one line of field, value, rule and remedy."""

import dataclasses
import difflib
import math
import typing
from typing import Any

from moejax import config as config_lib
from moejax.config import plain


def require(ok: bool, message: str) -> None:
    if not ok:
        raise config_lib.ConfigError(message)


def one_of(path: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, f"{path}={value} is not known; choose one of {', '.join(allowed)}")


def at_least(config: config_lib.Config, minimum: float, *paths: str) -> None:
    for path in paths:
        value = get(config, path)
        require(
            math.isfinite(value) and value >= minimum,
            f"{path}={value} must be {minimum} or more, and finite; change it",
        )


def positive(config: config_lib.Config, *paths: str) -> None:
    for path in paths:
        require(0 < get(config, path) < math.inf, f"{path}={get(config, path)} must be positive; raise it")


def unused(config: config_lib.Config, reason: str, *paths: str) -> None:
    """Refuses fields that have no effect here, and yet have been changed."""
    for path in paths:
        value, default = get(config, path), get(config_lib.Config(), path)
        require(value == default, f"{path}={value} has no effect with {reason}; leave it at {default}")


def get(config: config_lib.Config, path: str) -> Any:
    """The value of a field by its dotted path."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def put(config: config_lib.Config, path: str, value: Any) -> None:
    """Sets a field by its dotted path."""
    group, _, name = path.rpartition(".")
    setattr(get(config, group), name, value)


def known(path: str, prefix: str = "") -> None:
    """Refuses a dotted path that is no field, naming the nearest that is. prefix: what the user writes before it."""
    fields = plain.flatten(config_lib.Config())
    if path in fields:
        return
    inside = [field.removeprefix(f"{path}.") for field in fields if field.startswith(f"{path}.")]
    if inside:
        raise config_lib.ConfigError(
            f"{prefix}{path} is a group of fields; set one of them, e.g. {prefix}{path}.{inside[0]}"
        )
    close = difflib.get_close_matches(path, fields, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{close[0]}?" if close else "moejax/config/__init__.py lists the fields"
    raise config_lib.ConfigError(f"{prefix}{path} is not a field of the config; {hint}")


def types(node: Any, path: str = "") -> None:
    for field, annotation in zip(dataclasses.fields(node), typing.get_type_hints(type(node)).values(), strict=True):
        value, name = getattr(node, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(annotation):
            require(
                isinstance(value, typing.cast(type, annotation)),
                f"{name}={value!r} must be a {field.type}; set its fields",
            )
            types(value, f"{name}.")
        elif typing.get_origin(annotation) is tuple:
            ok = isinstance(value, tuple) and all(isinstance(entry, str) for entry in value)
            require(ok, f"{name}={value!r} must be a tuple of strings; write it as \"('a', 'b')\"")
        elif annotation is float:
            ok = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(ok, f"{name}={value!r} must be a float; change it")
            setattr(node, field.name, float(value))  # 1 and 1.0 are one setting
        else:
            ok = type(value) is annotation
            require(ok, f"{name}={value!r} must be of type {getattr(annotation, '__name__', annotation)}; change it")
