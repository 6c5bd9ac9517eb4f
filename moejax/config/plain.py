"""A config as plain values: its way to JSON and back, its fields by their paths, and what differs between two."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from moejax import config as config_lib


def to_dict(config: config_lib.Config) -> dict[str, Any]:
    """The config as nested plain values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> config_lib.Config:
    """The inverse of `to_dict`. An unknown field is a ConfigError; a missing one keeps its default."""
    config = config_lib.Config()
    _fill(config, values, "")
    return config


def _fill(node: Any, values: dict[str, Any], path: str) -> None:
    known = {field.name for field in dataclasses.fields(node)}
    for name, value in values.items():
        if name not in known:
            raise config_lib.ConfigError(f"{path}{name} is not a field of this version's config; remove it")
        if isinstance(value, dict):
            _fill(getattr(node, name), value, f"{path}{name}.")
        else:
            setattr(node, name, tuple(value) if isinstance(value, list) else value)


def flatten(config: config_lib.Config) -> dict[str, Any]:
    """Every leaf field by its dotted path, in order of declaration."""

    def leaves(values: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{path}{name}.")
            else:
                yield f"{path}{name}", value

    return dict(leaves(to_dict(config), ""))


def differences(old: config_lib.Config, new: config_lib.Config) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of every field that differs."""
    before, after = flatten(old), flatten(new)
    return [(path, before[path], after[path]) for path in before if before[path] != after[path]]
