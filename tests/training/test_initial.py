"""Laws of starting from another run: all of its model, nothing of its optimizer, and no other model or tokenizer."""

import copy

import jax
import numpy as np
import pytest
import tiny

from moejax import config as config_lib
from moejax import partition
from moejax.data import pipeline
from moejax.training import checkpoint, folder, initial, state


@pytest.fixture
def config(tmp_path) -> config_lib.Config:
    c = tiny.get_config(str(tiny.write_corpus(tmp_path / "corpus", 12)))
    c.model.period, c.model.num_periods = ("moe",), 1
    c.model.moe.router = "hash"  # whose tables are no parameters
    return c


def one_device(config):
    return partition.make_mesh(config.mesh, jax.devices()[:1])


def numbers(abstract):
    """A state of numbers that no initialiser draws; ids of experts in tables."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.device_put((3 * rng.random(leaf.shape)).astype(leaf.dtype), leaf.sharding), abstract
    )


def save_run(config, workdir, *, step=7):
    workdir.mkdir()
    data = pipeline.load(config.data)
    folder.describe(config, data, workdir)
    saved = numbers(state.abstract(config, one_device(config)))
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint)
    checkpoints.save(saved, step)
    checkpoints.close()
    return saved, data


def test_a_run_starts_from_all_of_the_other_s_model_and_nothing_of_its_optimizer(config, tmp_path, capsys):
    saved, data = save_run(config, tmp_path / "a")
    tuned = copy.deepcopy(config)
    tuned.training.init_from = str(tmp_path / "a")
    tuned.model.moe.expert_dropout = tuned.model.dropout = 0.25
    tuned.optimizer = config_lib.OptimizerConfig(name="adafactor", schedule="constant", clip_norm=0.0)
    initial.check(tuned)
    created = initial.create(tuned, one_device(tuned), data)
    assert "starting from the parameters of step 7" in capsys.readouterr().err
    assert int(created.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(created.opt_state))
    ours, expected = jax.tree.leaves(created.model), jax.tree.leaves(saved.model)
    for leaf, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(leaf, other)
    assert any(leaf.dtype == np.int32 for leaf in ours)  # the table
    assert jax.tree.structure(created) == jax.tree.structure(state.abstract(tuned, one_device(tuned)))
    assert created.model.periods.blocks[0].branches[0].config.expert_dropout == 0.25


def test_ids_are_those_of_the_other_s_tokenizer_until_the_run_has_its_own(config, tmp_path):
    config.data.tokenizer, config.data.vocab_size = "bpe", 259
    _, data = save_run(config, tmp_path / "a")
    assert initial.tokenizer(config, tmp_path / "b") is None
    config.training.init_from = str(tmp_path / "a")
    assert initial.tokenizer(config, tmp_path / "b").digest == data.tokenizer.digest
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("zz zz zz yyy yyy yyy")
    config.data.source, config.data.validation_source = f"files:{tmp_path}/other", config.data.source
    config.training.init_from = ""
    own = save_run(config, tmp_path / "b")[1].tokenizer
    config.training.init_from = str(tmp_path / "a")
    assert initial.tokenizer(config, tmp_path / "b").digest == own.digest != data.tokenizer.digest


def test_another_model_or_tokenizer_is_refused_in_one_line_with_all_that_differs(config, tmp_path):
    save_run(config, tmp_path / "a")
    config.training.init_from = str(tmp_path / "a")
    config.model.moe.capacity_factor, config.data.seq_length, config.model.remat = 0.0, 64, "period"
    moe = config.model.moe
    moe.min_capacity, moe.router_dtype, moe.exploration, moe.router_dropout = 4, "bfloat16", "dropout", 0.2
    initial.check(config)
    config.model.d_model, config.model.moe.activation, config.data.tokenizer = 32, "gelu", "bpe"
    line = r"^model\.d_model=32 and model\.moe\.activation=gelu and data\.tokenizer=bpe, but training\.init_from=\S+ "
    with pytest.raises(config_lib.ConfigError, match=line + r"has model\.d_model=16 and .*=relu and .*=bytes; make"):
        initial.check(config)


def test_the_kind_of_a_tokenizer_matters_and_not_where_it_was_read(config, tmp_path):
    save_run(config, tmp_path / "a")
    path = tmp_path / "a" / folder.CONFIG_FILE
    path.write_text(path.read_text().replace('"tokenizer": "bytes"', '"tokenizer": "sentencepiece:/data/spiece.model"'))
    config.training.init_from, config.data.tokenizer = str(tmp_path / "a"), "sentencepiece:t5.model"
    initial.check(config)
    config.data.tokenizer = "hf:t5.model"
    with pytest.raises(
        config_lib.ConfigError, match=r"^data\.tokenizer=hf:t5\.model, but training\.init_from=\S+ has "
    ):
        initial.check(config)


@pytest.mark.parametrize(
    ("init_from", "line"),
    [
        ("FILE", "is a file; name the folder of a run"),
        ("~nobody_of_this_name/x", "begins with the home of a user that "),
    ],
)
def test_what_is_no_folder_is_refused_in_one_line(config, tmp_path, init_from, line):
    (tmp_path / "file").write_text("")
    config.training.init_from = init_from.replace("FILE", str(tmp_path / "file"))
    with pytest.raises(config_lib.ConfigError) as error:
        initial.check(config)
    assert str(error.value).startswith(f"training.init_from={config.training.init_from} {line}")
    assert "\n" not in str(error.value)


def test_what_is_no_run_and_what_has_no_checkpoint_is_refused(config, tmp_path):
    config.training.init_from = str(tmp_path)
    with pytest.raises(config_lib.ConfigError, match=r"^training\.init_from=\S+ holds no config\.json; name"):
        initial.check(config)
    config.training.init_from = ""
    save_run(config, tmp_path / "a")
    for path in (tmp_path / "a" / "checkpoints").iterdir():
        path.rename(tmp_path / "a" / path.name)
    config.training.init_from = str(tmp_path / "a")
    with pytest.raises(config_lib.ConfigError, match=r"^training\.init_from=\S+ holds no checkpoint"):
        initial.check(config)
