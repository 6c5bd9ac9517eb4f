"""Every config in configs/ is valid, says what it is, and describes a model that can be built and run."""

import importlib.util
import inspect
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moejax import config as config_lib
from moejax import rules
from moejax.config import plain
from moejax.data import corruption
from moejax.models import model as model_lib
from moejax.training import loss

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "configs"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_configs(pattern):
    """(file:function, function) of every public function that needs no argument and returns a Config, one of each kind
    of model in a file: sizes are for the tests of parameters."""
    for path in sorted(FOLDER.glob(pattern)):
        seen = []
        for name, function in inspect.getmembers(load(path), inspect.isfunction):
            parameters = inspect.signature(function).parameters.values()
            needs_none = all(parameter.default is not parameter.empty for parameter in parameters)
            if not name.startswith("_") and needs_none and function.__module__ == path.stem:
                value = function()
                if isinstance(value, config_lib.Config) and kind_of(value.model) not in seen:
                    seen.append(kind_of(value.model))
                    yield pytest.param(function, id=f"{path.relative_to(FOLDER)}:{name}")


def kind_of(model):
    branches = (model.prefix, model.period, model.suffix, model.encoder_period)
    return branches, model.moe.router, model.mamba.moe_projections, model.tie_embeddings, model.mlp.activation


@pytest.mark.parametrize("function", list(find_configs("*.py")))
def test_a_config_is_valid_and_its_model_runs_on_its_rows(function):
    """By shapes alone: nothing is allocated or compiled. Training needs a gradient of the same shapes."""
    c = function()
    assert function.__doc__
    rules.validate(c)
    assert plain.from_dict(plain.to_dict(c)) == c

    def run(batch):
        model = model_lib.build(c.model, rngs=nnx.Rngs(params=0))
        nats = lambda model: loss.sums(model, batch, train=True)["nats"]  # noqa: E731
        return loss.sums(model, batch, train=False)["nats"], model, jax.grad(nats)(model)

    nats, model, gradient = jax.eval_shape(run, batch_of(c))
    assert nats.shape == ()
    assert jax.tree.structure(gradient) == jax.tree.structure(model)


def batch_of(c):
    """The shapes of a microbatch."""
    rows = c.data.batch_size // c.training.num_microbatches
    shape = lambda length, dtype=jnp.int32: jax.ShapeDtypeStruct((rows, length), dtype)  # noqa: E731
    length = c.data.seq_length
    if not c.model.has_encoder:
        names = ("inputs_BL", "targets_BL", "segment_ids_BL", "positions_BL")
        return {**{name: shape(length) for name in names}, "loss_mask_BL": shape(length, bool)}
    _, targets = corruption.raw_length(length, c.data.noise_density, c.data.mean_span_length)
    return {
        "encoder_inputs_BL": shape(length),
        "encoder_mask_BL": shape(length, bool),
        "decoder_inputs_BM": shape(targets),
        "targets_BM": shape(targets),
        "loss_mask_BM": shape(targets, bool),
    }


def test_every_file_has_a_config_and_a_lab_book():
    found = {str(parameter.id).partition(":")[0] for parameter in find_configs("**/*.py")}
    for path in FOLDER.rglob("*.py"):
        assert str(path.relative_to(FOLDER)) in found
        assert load(path).__doc__
