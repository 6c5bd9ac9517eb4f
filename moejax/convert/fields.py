"""Reading the fields of a transformers config, given as a dict."""

import math
from collections.abc import Mapping
from typing import Any

from moejax import config as config_lib


def field(hf: Mapping[str, Any], name: str) -> Any:
    """The value of a field; raises ConfigError if it is missing."""
    if name not in hf:
        raise config_lib.ConfigError(f"{name} is missing; pass the whole dict of a transformers config")
    return hf[name]


def size(hf: Mapping[str, Any], name: str) -> int:
    """The value of a field that must be an integer of 1 or more; raises ConfigError otherwise."""
    value = field(hf, name)
    if type(value) is not int or value < 1:
        raise config_lib.ConfigError(f"{name}={value!r} must be an integer of 1 or more; change it")
    return value


def positive(hf: Mapping[str, Any], name: str) -> float:
    """The value of a field that must be a positive number; raises ConfigError otherwise."""
    value = field(hf, name)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise config_lib.ConfigError(f"{name}={value!r} must be a positive number; change it")
    return float(value)


def number(hf: Mapping[str, Any], name: str) -> float:
    """The value of a field that must be a number of 0 or more; raises ConfigError otherwise."""
    value = field(hf, name)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise config_lib.ConfigError(f"{name}={value!r} must be a number of 0 or more; change it")
    return float(value)


def share(hf: Mapping[str, Any], name: str) -> float:
    """The value of a field that must lie in [0, 1); raises ConfigError otherwise."""
    value = number(hf, name)
    if value >= 1:
        raise config_lib.ConfigError(f"{name}={value!r} must lie in [0, 1); change it")
    return value
