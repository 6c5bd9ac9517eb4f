"""What a point of a sweep costs: parameters, tokens and FLOPs of its whole run. Nothing is allocated."""

import copy
import dataclasses
import json
from typing import Any

from moejax import config as config_lib
from moejax.analysis import flops as flops_lib
from moejax.analysis import params

_COUNTS: dict[str, dict[str, Any]] = {}  # by the model's config as JSON


def parameters(model: config_lib.ModelConfig) -> dict[str, Any]:
    """`params.count`, which takes a while, once for each model."""
    key = json.dumps(dataclasses.asdict(model))
    if key not in _COUNTS:
        _COUNTS[key] = params.count(model)
    return copy.deepcopy(_COUNTS[key])


def tokens(config: config_lib.Config) -> int:
    """That the run trains on."""
    return config.training.num_steps * config.data.batch_size * config.data.seq_length


def flops(config: config_lib.Config) -> float:
    """Useful ones (`analysis.flops`) of all training steps."""
    return config.training.num_steps * flops_lib.training_step(config).useful
