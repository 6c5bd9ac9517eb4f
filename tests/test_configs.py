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
from moejax.analysis import params
from moejax.config import plain
from moejax.models import lm

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "configs"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_configs(pattern):
    """(file:function, function) of every public function that needs no argument and returns a Config."""
    for path in sorted(FOLDER.glob(pattern)):
        for name, function in inspect.getmembers(load(path), inspect.isfunction):
            parameters = inspect.signature(function).parameters.values()
            needs_none = all(parameter.default is not parameter.empty for parameter in parameters)
            if not name.startswith("_") and needs_none and function.__module__ == path.stem:
                value = function()
                if isinstance(value, config_lib.Config):
                    yield pytest.param(function, id=f"{path.relative_to(FOLDER)}:{name}")


@pytest.mark.parametrize("function", list(find_configs("*.py")))
def test_a_config_is_valid_and_its_model_runs_on_its_rows(function):
    """By shapes alone: nothing is allocated or compiled. Training needs a gradient of the same shapes."""
    c = function()
    assert function.__doc__
    rules.validate(c)
    assert plain.from_dict(plain.to_dict(c)) == c
    tokens = jax.ShapeDtypeStruct((c.data.batch_size // c.training.num_microbatches, c.data.seq_length), jnp.int32)

    def train(tokens):
        model = lm.Lm(c.model, rngs=nnx.Rngs(params=0))
        loss = lambda model: model(tokens, segment_ids_BL=tokens, positions_BL=tokens, train=True)[0].sum()  # noqa: E731
        return model(tokens)[0], model, jax.grad(loss)(model)

    logits, model, gradient = jax.eval_shape(train, tokens)
    assert logits.shape == (*tokens.shape, c.model.vocab_size)
    assert jax.tree.structure(gradient) == jax.tree.structure(model)


def test_every_file_has_a_config_and_a_lab_book():
    found = {str(parameter.id).partition(":")[0] for parameter in find_configs("**/*.py")}
    for path in FOLDER.rglob("*.py"):
        assert str(path.relative_to(FOLDER)) in found
        assert load(path).__doc__


@pytest.mark.parametrize(
    ("name", "total", "active", "tokens"),
    [
        ("moe_mamba_25m", 542_228_480, 26_329_088, 150_000 * 64 * 1024),
        ("moe_mamba_100m", 2_439_069_696, 117_522_432, 30_000 * 1024 * 1024),
    ],
)
def test_moe_mambas_main_models_have_the_parameters_and_tokens_of_its_tables(name, total, active, tokens):
    """arXiv 2401.04081, Tables 1 and 6: without embedding and head, the router among the active ones."""
    c = load(FOLDER / "moe_mamba.py").get_config(name)
    rules.validate(c)
    counts = params.count(c.model)
    assert (counts["non_embedding_total"], counts["non_embedding_active"]) == (total, active)
    assert c.training.num_steps * c.data.batch_size * c.data.seq_length == tokens


def test_a_main_model_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="write moe_mamba_25m or moe_mamba_100m"):
        load(FOLDER / "moe_mamba.py").get_config("moe_mamba_1b")
