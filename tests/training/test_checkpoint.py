"""Laws of checkpoints: exact, checked, kept as asked, and free of the mesh they were made on."""

import logging
import pathlib

import jax
import numpy as np
import pytest
import tiny

from moejax import config as config_lib
from moejax import partition
from moejax.training import checkpoint, state


@pytest.fixture
def config() -> config_lib.Config:
    c = tiny.get_config("unused")
    c.model.num_periods = 1
    return c


def one_device(config):
    return partition.make_mesh(config.mesh, jax.devices()[:1])


def steps_state(config, step):
    """A state whose every leaf depends on the step; drawn by numpy, so that nothing is compiled."""
    rng = np.random.default_rng(step)
    abstract = state.abstract(config, one_device(config))
    return jax.tree.map(
        lambda leaf: jax.device_put((100 * rng.normal(size=leaf.shape)).astype(leaf.dtype), leaf.sharding), abstract
    )


def save(folder: pathlib.Path, config, *steps):
    checkpoints = checkpoint.Checkpoints(folder, config.checkpoint)
    for step in steps:
        checkpoints.save(steps_state(config, step), step)
    checkpoints.close()


def restore(folder: pathlib.Path, config, mesh=None, **options):
    damaged = []
    checkpoints = checkpoint.Checkpoints(folder, config.checkpoint, **options)
    try:
        abstract = state.abstract(config, mesh or one_device(config))
        return checkpoints.restore(abstract, on_corrupt=lambda step, reason: damaged.append((step, reason))), damaged
    finally:
        checkpoints.close()


def assert_equal(restored, expected):
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_the_newest_checkpoint_comes_back_bit_for_bit(tmp_path, config):
    save(tmp_path / "c", config, 3, 7)
    (restored, step), damaged = restore(tmp_path / "c", config)
    assert (step, damaged) == (7, [])
    assert_equal(restored, steps_state(config, 7))


def test_our_warnings_are_heard_once_a_checkpoint_was_open_and_those_of_orbax_are_not(tmp_path, config, caplog):
    checkpoint.Checkpoints(tmp_path / "c", config.checkpoint).close()
    logger = logging.getLogger("absl")
    for level, folder in (("WARNING", "moejax"), ("WARNING", "orbax"), ("ERROR", "orbax")):
        number = getattr(logging, level)
        logger.handle(logger.makeRecord("absl", number, f"/python/{folder}/a.py", 1, f"{level} of {folder}", (), None))
    assert caplog.messages == ["WARNING of moejax", "ERROR of orbax"]


def test_an_empty_folder_has_none(tmp_path, config):
    assert restore(tmp_path / "c", config) == (None, [])


def test_keep_last_and_keep_every_say_which_stay(tmp_path, config):
    config.checkpoint.keep_last, config.checkpoint.keep_every = 2, 4
    save(tmp_path / "c", config, 2, 4, 6, 8, 9, 10)
    checkpoints = checkpoint.Checkpoints(tmp_path / "c", config.checkpoint)
    assert checkpoints.steps() == [4, 8, 9, 10]
    checkpoints.close()


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut, flip, pathlib.Path.unlink])
def test_a_damaged_newest_checkpoint_is_named_set_aside_and_the_one_before_is_used(tmp_path, config, damage, capfd):
    folder = tmp_path / "c"
    save(folder, config, 3, 7)
    damage(largest_file(folder / "7"))
    (restored, step), damaged = restore(folder, config)
    assert step == 3
    assert [at for at, _ in damaged] == [7]
    assert damaged[0][1]
    assert_equal(restored, steps_state(config, 3))
    assert sorted(path.name for path in folder.iterdir()) == ["3", "7.corrupt"]
    assert "Traceback" not in capfd.readouterr().err
    save(folder, config, 7)  # the step can be saved again
    assert restore(folder, config)[0][1] == 7


def test_a_reader_moves_nothing(tmp_path, config):
    folder = tmp_path / "c"
    save(folder, config, 3, 7)
    flip(largest_file(folder / "7"))
    (_, step), _ = restore(folder, config, read_only=True)
    assert step == 3
    assert sorted(path.name for path in folder.iterdir()) == ["3", "7"]


def test_when_every_checkpoint_is_damaged_it_refuses_and_moves_nothing(tmp_path, config):
    folder = tmp_path / "c"
    save(folder, config, 3, 7)
    for step in (3, 7):
        flip(largest_file(folder / str(step)))
    with pytest.raises(config_lib.ConfigError, match=r"none of the 2 checkpoints .* choose another --workdir"):
        restore(folder, config)
    assert sorted(path.name for path in folder.iterdir()) == ["3", "7"]


def test_a_checkpoint_moves_to_another_mesh(tmp_path, config):
    save(tmp_path / "c", config, 3)
    mesh = partition.make_mesh(config_lib.MeshConfig(data=2, fsdp=2, expert=2))
    (restored, _), damaged = restore(tmp_path / "c", config, mesh)
    assert not damaged
    assert_equal(restored, steps_state(config, 3))
    up = restored.model.periods.blocks[1].branches[0].up[...]
    assert len(up.sharding.device_set) == 8
    assert up.addressable_shards[0].data.size == up.size // 4


def test_an_unfinished_save_is_not_seen_and_is_cleared(tmp_path, config):
    folder = tmp_path / "c"
    save(folder, config, 3)
    unfinished = folder / "7.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "half").write_text("x")
    (_, step), damaged = restore(folder, config)
    assert (step, damaged) == (3, [])
