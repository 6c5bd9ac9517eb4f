"""Hash tables from a file and by frequency: refused where they do not fit, and the same in every layer."""

import pathlib

import jax
import numpy as np
import pytest
import tiny

from moejax import config as config_lib
from moejax import partition
from moejax.data import pipeline
from moejax.models import model as model_lib
from moejax.training import state, tables


@pytest.fixture
def config(tmp_path) -> config_lib.Config:
    c = tiny.get_config(str(tiny.write_corpus(tmp_path / "corpus")))
    c.model.moe.router, c.model.period = "hash", ("moe",)
    return c


def save(path: pathlib.Path, table) -> str:
    np.save(path, table)
    return str(path)


def test_a_table_from_a_file_reaches_every_layer(config, tmp_path):
    table = np.arange(260) % 3
    config.model.moe.hash_table = save(tmp_path / "table.npy", table)
    model = state.create(config, partition.make_mesh(config.mesh, jax.devices()[:1])).model
    layers = [layer.router.state for layer, _ in model_lib.moe_layers(model)]
    assert not (np.asarray(layers[0][...]) == table).all()
    tables.fill(model, tables.read(config))
    np.testing.assert_array_equal(layers[0][...], np.broadcast_to(table, (2, 260)))


def test_without_a_file_layers_have_tables_of_their_own(config):
    assert tables.read(config) is None
    assert tables.balanced(config, None) is None
    model = state.create(config, partition.make_mesh(config.mesh, jax.devices()[:1])).model
    first, second = next(model_lib.moe_layers(model))[0].router.state[...]
    assert first.dtype == np.int32
    assert set(np.asarray(first)) == {0, 1, 2, 3}
    assert (first != second).mean() > 0.5


def test_a_balanced_table_gives_every_expert_a_like_share_of_the_tokens(config):
    config.model.moe.hash_table = "balanced"
    table = tables.balanced(config, pipeline.load(config.data))
    batch = pipeline.TrainBatches(pipeline.load(config.data), config.data)[0]
    ids = batch["inputs_BL"][batch["segment_ids_BL"] > 0]
    share = np.bincount(table[ids], minlength=4) / len(ids)
    even = np.bincount(np.arange(260)[ids] % 4, minlength=4) / len(ids)
    assert share.max() < 0.32  # a space is every sixth byte
    assert share.max() < even.max()


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (np.zeros(259, np.int32), "model.vocab_size=260"),
        (np.zeros(260, np.float32), "float32"),
        (np.full(260, 4), "names expert 4"),
        (np.full(260, -1), "names expert -1"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(config, tmp_path, table, told):
    config.model.moe.hash_table = save(tmp_path / "table.npy", table)
    with pytest.raises(config_lib.ConfigError, match=told):
        tables.read(config)


def test_a_file_that_is_none_is_refused(config, tmp_path):
    config.model.moe.hash_table = str(tmp_path / "missing.npy")
    with pytest.raises(config_lib.ConfigError, match="no such file"):
        tables.read(config)
    (tmp_path / "text.npy").write_text("text")
    config.model.moe.hash_table = str(tmp_path / "text.npy")
    with pytest.raises(config_lib.ConfigError, match="no array of numpy"):
        tables.read(config)
