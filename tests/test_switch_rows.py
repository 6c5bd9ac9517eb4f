"""Every row of Switch Transformers' tables has the parameters of a closed form, and those that the paper prints."""

import pathlib
import runpy

import pytest

from moejax import config, rules
from moejax.analysis import params
from moejax.data import corruption
from moejax.rules import checks

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
    "moe_base_top2_128": top_2(128),
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
PRINTED = {  # billions, in Tables 6 to 9
    "t5_base": "0.2", "t5_large": "0.7", "t5_xxl": "11", "switch_base_16": "1.1", "switch_base_32": "2.0",
    "switch_base_64": "3.8", "switch_base_128": "7.4", "switch_base_256": "14.7", "switch_large_128": "26",
    "switch_xxl": "395", "switch_c": "1571",
}  # fmt: skip
OF_THE_CODE = {  # billions, of the configs of flaxformer, whose C has 30 heads
    "t5_base": "0.2229", "t5_large": "0.74", "switch_base_8": "0.619", "switch_base_16": "1.07",
    "switch_base_32": "1.98", "switch_base_64": "3.79", "switch_base_128": "7.415", "switch_base_256": "14.66",
    "switch_large_128": "26.3", "switch_xxl": "394.7", "switch_c": "1571",
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_row_has_its_parameters(name):
    c = get_config(name)
    rules.validate(c)
    counts = params.count(c.model)
    assert (counts["total"], counts["active"]) == COUNTS[name]
    for there in (PRINTED, OF_THE_CODE):
        if name in there:
            digits = len(there[name].partition(".")[2])
            assert f"{COUNTS[name][0] / 1e9:.{digits}f}" == there[name]
    for count in COUNTS[name]:
        assert f"{count:,}" in get_config.__globals__["__doc__"]


def test_there_is_a_row_for_each_line():
    assert COUNTS.keys() == ROWS.keys()


RECIPE = {  # of every row, by the paper (sections 2 and 4, Table 9) and T5X's code
    "model.norm": "rmsnorm", "model.norm_eps": 1e-6, "model.final_norm": True, "model.init": "switch",
    "model.embedding_std": 1.0, "model.dropout": 0.0, "model.attention.position": "relative",
    "model.attention.num_buckets": 32, "model.attention.max_distance": 128, "model.mlp.bias": False,
    "data.source": "tfds:c4/en:3.1.0", "data.objective": "span_corruption", "data.noise_density": 0.15,
    "data.mean_span_length": 3.0, "data.packing": "concatenate", "data.seq_length": 512, "data.batch_size": 2048,
    "optimizer.name": "adafactor", "optimizer.schedule": "inverse_sqrt", "optimizer.learning_rate": 1.0,
    "optimizer.warmup_steps": 10_000, "optimizer.linear_decay": 0.0, "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 0.0, "optimizer.adafactor.decay_rate": 0.8, "optimizer.adafactor.eps": 1e-30,
    "optimizer.adafactor.clip_rms": 1.0, "optimizer.adafactor.min_scale": 1e-3,
    "optimizer.adafactor.scale_by_parameter": True, "optimizer.adafactor.min_factored_dim": 128,
    "training.z_weight": 1e-4,
}  # fmt: skip
OF_EXPERTS = {
    "model.moe.bias": False, "model.moe.jitter": 0.01, "model.moe.layer_reduction": "sum",
    "model.moe.capacity_rounding": "nearest", "model.moe.expert_dropout": 0.0,
}  # fmt: skip


FACTORS = {  # of capacity in training and evaluation, of two experts a token half of them; all others 1.25 and 2.0
    "switch_xxl": (1.25, 4.0), "switch_c": (1.0, 2.0), "moe_base_top2_128": (0.625, 1.0),
    "switch_base_128_c200": (2.0, 2.0), "switch_base_128_c100": (1.0, 2.0), "switch_base_128_plus_c100": (1.0, 2.0),
    "moe_base_128_c200": (1.0, 1.0), "moe_base_128_c125": (0.625, 1.0), "moe_base_128_c100": (0.5, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_row_has_the_recipe(name):
    c = get_config(name)
    assert {path: checks.get(c, path) for path in RECIPE} == RECIPE
    assert corruption.row_lengths(c.data) == (512, 114)
    assert c.model.vocab_size == V
    assert c.model.compute_dtype == ("float32" if name == "precision_float32" else "bfloat16")
    assert c.model.init_scale == (1.0 if name == "scale_large" else 0.1)
    untied = name in ("t5_xxl", "switch_xxl", "switch_c")
    assert c.model.tie_embeddings == c.model.scale_tied_logits == (not untied)
    steps = 500_000
    if name.startswith(("switch_base_128_", "moe_base_128_", "explore")) or name.endswith("_100k"):
        steps = 100_000
    if name.startswith(("precision", "scale")):
        steps = 3500
    assert c.training.num_steps == steps
    activation = "geglu" if "xxl" in name else "relu"
    assert c.model.mlp.activation == c.model.moe.activation == activation
    if not name.startswith("t5"):
        moe = c.model.moe
        assert {path: checks.get(c, path) for path in OF_EXPERTS} == OF_EXPERTS
        assert moe.loss_weights() == {"balance": 0.01}
        assert moe.router == ("gshard" if name.startswith("moe") else "switch")
        factors = FACTORS.get(name, (1.25, 2.0))
        assert (moe.capacity_factor, moe.eval_capacity_factor) == pytest.approx(factors)
        rows = {"switch_large_128": 8, "switch_xxl": 8, "switch_c": 4}
        assert moe.group_size == rows.get(name, 16) * 512
        assert moe.min_capacity == (2 if name in ("switch_xxl", "switch_c") else 4)
        assert moe.router_dtype == ("bfloat16" if name == "precision_bfloat16" else "float32")
        assert moe.exploration == (name.partition("_")[2] if name.startswith("explore") else "jitter")


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


def test_rows_in_small_differ_in_experts_as_the_rows_do():
    experts = [get_config(f"switch_base_{n},mini").model.moe.num_experts for n in (8, 16, 32, 64, 128, 256)]
    assert experts == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("name", "rows", "factor", "slots"),
    [
        ("switch_base_128", 16, 1.25, 80),
        ("switch_large_128", 8, 1.25, 40),
        ("switch_xxl", 8, 1.25, 40),
        ("switch_c", 4, 1.0, 2),  # one, but for the least
        ("moe_base_128_c200", 16, 1.0, 128),  # of two choices: 8192 / 128 * 2
        ("moe_base_top2_128", 16, 0.625, 80),
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
