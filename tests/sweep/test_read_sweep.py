"""A sweep is read from a file as a config is; an override reaches its base, or is refused."""

import pathlib

import pytest

from moejax import config as config_lib
from moejax.cli import overrides
from moejax.sweep import grid

FILE = """\
from moejax import config
from moejax.sweep import grid

def get_config():
    c = config.Config()
    c.model.d_model, c.model.num_periods, c.model.vocab_size, c.data.vocab_size = 16, 1, 300, 300
    c.model.period, c.model.moe.num_experts, c.model.moe.d_expert = ("moe",), 4, 64
    return c

def get_sweep(which="experts"):
    rows = {
        "experts": lambda: grid.iso_active(grid.over("model.moe.num_experts", 2, 8)),
        "flops": lambda: grid.iso_flops(grid.over("model.moe.num_experts", 2, 8)),
        "like": lambda: grid.iso_active(grid.over("model.moe.num_experts", 2), like={"model.period": ("mamba",)}),
        "wrong": lambda: grid.over("model.moe.num_expert", 2),
        "none": lambda: [],
    }[which]()
    return grid.Sweep(get_config(), rows) if rows else None
"""


@pytest.fixture
def file(tmp_path) -> pathlib.Path:
    path = tmp_path / "sweep.py"
    path.write_text(FILE)
    return path


def test_overrides_reach_every_point_that_does_not_set_the_field(file):
    sweep = overrides.read_sweep(
        f"{file}:experts", ["--config.training.num_steps=7", "--config.model.period=('mamba', 'moe')"], seeds="5,0"
    )
    assert sweep.base.training.num_steps == 7
    assert sweep.seeds == (5, 0)
    points = grid.points(sweep)
    assert [point.name for point in points] == ["e2_s5", "e2_s0", "e8_s5", "e8_s0"]
    assert {point.config.training.num_steps for point in points} == {7}
    assert overrides.read_sweep(str(file), []).base.training.num_steps == config_lib.Config().training.num_steps


def test_an_override_of_a_field_that_is_solved_for_sets_what_is_held(file):
    steps = {}
    for override in (1000, 3000):
        sweep = overrides.read_sweep(f"{file}:flops", [f"--config.training.num_steps={override}"])
        steps[override] = [point.config.training.num_steps for point in grid.points(sweep)]
    assert all(abs(longer - 3 * shorter) <= 2 for shorter, longer in zip(*steps.values(), strict=True))
    wide = overrides.read_sweep(str(file), ["--config.model.moe.d_expert=128"])
    assert [point.config.model.moe.d_expert for point in grid.points(wide)] == [129, 126]


@pytest.mark.parametrize(
    ("argument", "option", "message"),
    [
        ("", "model.moe.num_experts=16", "--config.model.moe.num_experts=16 would change nothing, as every point "),
        (":like", "model.moe.d_expert=16", "--config.model.moe.d_expert=16 would change nothing, as every point "),
        ("", "data.seed=3", "--config.data.seed=3 would be overwritten by the seeds of the sweep; write --seeds=0,1,2"),
        ("", "model.moe.num_expert=16", "--config.model.moe.num_expert is not a field of the config; did you mean "),
        ("", "training.num_steps=many", "config.training.num_steps=many has the wrong type; give a whole number"),
        ("", "training.num_steps=0", "training.num_steps=0 must be 1 or more, and finite; change it"),
        (":wrong", "data.batch_size=8", "--config=FILE:wrong: model.moe.num_expert is not a field of the config; did "),
        (
            ":none",
            "data.batch_size=8",
            "--config=FILE:none: get_sweep() returned a NoneType; return a moejax.sweep.grid",
        ),
        (":other", "data.batch_size=8", "--config=FILE:other cannot be read (KeyError: 'other'); mend the file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(file, argument, option, message):
    with pytest.raises(config_lib.ConfigError) as error:
        overrides.read_sweep(f"{file}{argument}", [f"--config.{option}"])
    assert str(error.value).startswith(message.replace("FILE", str(file)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "there is no get_sweep() in it; add one beside get_config()"),
        ("def get_sweep(: pass", "cannot be read (SyntaxError"),
        ("def get_sweep(): return 1 / 0", "cannot be read (ZeroDivisionError: division by zero); mend the file"),
    ],
)
def test_a_file_without_a_sweep_is_named(tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(config_lib.ConfigError) as error:
        overrides.read_sweep(str(path), [])
    assert str(error.value).startswith(f"--config={path}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_seeds_that_cannot_be_and_a_file_that_there_is_not_are_refused(file):
    for seeds in ("1,,2", "a", "-1"):
        with pytest.raises(config_lib.ConfigError, match=f"^--seeds={seeds} must be whole numbers with commas between"):
            overrides.read_sweep(str(file), [], seeds=seeds)
    with pytest.raises(config_lib.ConfigError, match=r"there is no file nowhere\.py"):
        overrides.read_sweep("nowhere.py", [])
