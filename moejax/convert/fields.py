"""Reading the fields of a transformers config, given as a dict."""

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
