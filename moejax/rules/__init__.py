"""The rules that every config keeps: types, ranges, and what fields mean to one another. Imports no jax."""

from moejax import config as config_lib
from moejax.rules import checks, model, run


def validate(config: config_lib.Config) -> None:
    """Checks every rule that a field or a pair of fields must keep; raises ConfigError at the first that is broken.

    The error is one line: field, value, rule, remedy.
    """
    checks.types(config)
    model.validate(config.model)
    run.validate_data(config)
    run.validate_pairs(config)
    model.validate_objective(config)
    model.validate_causal(config)
    run.validate_labels(config)
    run.validate_training(config)
    run.validate_optimizer(config)
    run.validate_mesh(config)
