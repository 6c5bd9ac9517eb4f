"""Every row of Switch Transformers' tables has the parameters of a closed form, and those that the paper prints."""

import pathlib
import runpy

import pytest

from moejax import config, rules
from moejax.analysis import params

FILE = runpy.run_path(str(pathlib.Path(__file__).resolve().parent.parent / "configs" / "switch.py"))
ROWS, get_config = FILE["ROWS"], FILE["get_config"]
V = 32_128


def model(D, F, layers, *, heads, E=0, every=2, Q=64, matrices=2, head=False):
    """(total, active) of two stacks; E experts in every so-and-so-manieth feed-forward layer, of so many matrices."""
    attention = 4 * D * heads * Q + D  # and the norm before it
    ff = matrices * D * F
    sparse = layers // every if E else 0
    once = (1 + head) * V * D + 2 * (32 * heads + D)  # two tables of distances, two last norms
    once += 3 * layers * attention + 2 * layers * (ff + D)
    return once + 2 * sparse * ((E - 1) * ff + D * E), once + 2 * sparse * D * E


def base(E=0):
    return model(768, 3072, 12, heads=12, E=E)


def top_2(E):
    total, active = base(E)
    return total, active + 12 * 2 * 768 * 3072


COUNTS = {
    "t5_base": base(),
    "t5_large": model(1024, 4096, 24, heads=16),
    "t5_xxl": model(4096, 10_240, 24, heads=64, matrices=3, head=True),
    "switch_large_128": model(1024, 4096, 24, heads=16, E=128),
    "switch_xxl": model(4096, 10_240, 24, heads=64, E=128, matrices=3, head=True),
    "switch_c": model(2080, 6144, 15, heads=32, E=2048, every=1, head=True),
    "switch_base_8": base(8),
    "switch_base_16": base(16),
    "switch_base_32": base(32),
    "switch_base_64": base(64),
    "switch_base_128": base(128),
    "switch_base_256": base(256),
    "t5_base_100k": base(),
    "t5_large_100k": model(1024, 4096, 24, heads=16),
    "switch_base_128_c200": base(128),
    "switch_base_128_c125": base(128),
    "switch_base_128_c100": base(128),
    "moe_base_128_c200": top_2(128),
    "moe_base_128_c125": top_2(128),
    "moe_base_128_c100": top_2(128),
    "switch_base_128_plus_c100": model(896, 3072, 12, heads=16, Q=56, E=128),
    "precision_float32": base(32),
    "precision_bfloat16": base(32),
    "precision_selective": base(32),
    "scale_small": base(32),
    "scale_large": base(32),
    "explore_jitter": base(32),
    "explore_dropout": base(32),
    "explore_sample": base(32),
    "explore_argmax": base(32),
}
PRINTED = {  # billions, in Tables 6 to 9 and in the text
    "t5_base": "0.2229", "t5_large": "0.74", "t5_xxl": "11", "switch_base_8": "0.619", "switch_base_16": "1.07",
    "switch_base_32": "1.98", "switch_base_64": "3.79", "switch_base_128": "7.415", "switch_base_256": "14.66",
    "switch_large_128": "26.3", "switch_xxl": "395", "switch_c": "1571",
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_row_has_its_parameters(name):
    c = get_config(name)
    rules.validate(c)
    counts = params.count(c.model)
    assert (counts["total"], counts["active"]) == COUNTS[name]
    if name in PRINTED:
        assert f"{COUNTS[name][0]:,}" in get_config.__globals__["__doc__"]
        digits = len(PRINTED[name].partition(".")[2])
        assert f"{COUNTS[name][0] / 1e9:.{digits}f}" == PRINTED[name]


def test_there_is_a_row_for_each_line():
    assert COUNTS.keys() == ROWS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_a_row_in_small_keeps_its_recipe(name):
    c, whole = get_config(f"{name},mini"), get_config(name)
    rules.validate(c)
    assert {*c.model.sublayers} == {*whole.model.sublayers}
    assert c.model.period == whole.model.period
    assert c.model.num_periods == c.model.num_encoder_periods == whole.model.num_periods // 3
    assert (c.model.d_model * 8, c.model.mlp.d_ff * 8) == (whole.model.d_model, whole.model.mlp.d_ff)
    assert (c.model.compute_dtype, c.model.moe.d_expert * 8) == (whole.model.compute_dtype, whole.model.moe.d_expert)
    for field in ("norm_eps", "init", "init_scale", "embedding_std", "tie_embeddings", "scale_tied_logits", "dropout"):
        assert getattr(c.model, field) == getattr(whole.model, field)
    for field in (
        "router",
        "exploration",
        "router_dtype",
        "capacity_factor",
        "eval_capacity_factor",
        "layer_reduction",
    ):
        assert getattr(c.model.moe, field) == getattr(whole.model.moe, field)
    assert (c.optimizer.name, c.optimizer.schedule) == ("adafactor", "inverse_sqrt")
    for one in (c, whole):  # the first rate of all
        assert one.optimizer.learning_rate / one.optimizer.warmup_steps**0.5 == pytest.approx(0.01)
    assert c.training.z_weight == whole.training.z_weight == 1e-4


@pytest.mark.parametrize(
    ("name", "rows", "factor", "slots"),
    [
        ("switch_base_128", 16, 1.25, 80),
        ("switch_large_128", 8, 1.0, 32),
        ("switch_xxl", 8, 1.25, 40),
        ("switch_c", 4, 1.0, 2),  # one, but for the least
        ("moe_base_128_c200", 16, 1.0, 128),  # of two choices: 8192 / 128 * 2
        ("switch_base_32", 16, 1.25, 320),
    ],
)
def test_a_row_has_the_capacity_of_its_code(name, rows, factor, slots):
    """flaxformer's switch_{base,large,xxl,c}.gin: round(factor * tokens / experts), at least 4 or 2."""
    moe = get_config(name).model.moe
    assert (moe.group_size, moe.capacity_factor) == (rows * 512, factor)
    assert moe.capacity(moe.group_size, moe.capacity_factor) == slots


def test_fine_tuning_drops_units_and_keeps_the_rate():
    for name in ("switch_base_128,finetune", "t5_base,mini,finetune"):
        c = get_config(name)
        rules.validate(c)
        assert (c.model.dropout, c.optimizer.schedule, c.optimizer.learning_rate) == (0.1, "constant", 1e-3)
        assert c.model.moe.expert_dropout == (0.4 if "switch" in name else 0.0)


def test_a_row_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(config.ConfigError, match=r"switch_base_7 is no row; write one of t5_base, .*explore_argmax"):
        get_config("switch_base_7")
    for name in ("t5_base,small", "t5_base,finetune,mini", "t5_base,mini,mini"):
        with pytest.raises(config.ConfigError, match=f"{name} is no row"):
            get_config(name)
