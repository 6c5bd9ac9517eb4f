"""Every row of MoE-Mamba's tables has the parameters of a closed form, and the paper's where it prints them."""

import math
import pathlib
import runpy

import pytest

from moejax import config as config_lib
from moejax import rules
from moejax.analysis import params
from moejax.rules import checks

FILE = runpy.run_path(str(pathlib.Path(__file__).resolve().parent.parent / "configs" / "moe_mamba.py"))
ROWS, get_config = FILE["ROWS"], FILE["get_config"]
W, N, V = 4, 16, 50_257


def mamba(D, expand=2.0, projections=(), num_experts=0, F=352):
    """(total, active) of a Mamba layer, with experts in the place of some of its projections."""
    I, R = int(expand * D), math.ceil(D / 16)
    total = active = I * W + I + I * (R + 2 * N) + R * I + I + I * N + I
    for name, d_in, d_out in (("conv", D, I), ("gate", D, I), ("out", I, D)):
        expert, router = d_in * F + F * d_out, d_in * num_experts
        total += num_experts * expert + router if name in projections else d_in * d_out
        active += expert + router if name in projections else d_in * d_out
    return total, active


def switch(D, F, E):
    """(total, active) of a Switch layer."""
    return E * 2 * D * F + D * E, 2 * D * F + D * E


def model(D, *layers):
    """(total, active) of so many of each layer, a LayerNorm before each: (count, (total, active)), ..."""
    return tuple(sum(count * (layer[place] + 2 * D) for count, layer in layers) for place in (0, 1))


def attention(D):
    return 4 * D * D, 4 * D * D


def experts(E):
    return model(512, (8, mamba(512)), (8, switch(512, 1536, E)))


def side_by_side(E):
    return tuple(count - 8 * 2 * 512 for count in experts(E))


def ratio(parts, E):
    layer = mamba(512, {1: 0.6666666, 2: 1.3333333, 3: 2.0, 4: 2.6666666, 5: 3.3333333}[parts])
    return model(512, (8, layer), (8, switch(512, 512 * (6 - parts), E)))


def inner(E, *projections, every):
    layer = mamba(512, projections=projections, num_experts=E)
    return model(512, (16, layer)) if every else model(512, (8, mamba(512)), (8, layer))


COUNTS = {
    "mamba_25m": (27_131_904, 27_131_904),
    "moe_mamba_25m": (542_228_480, 26_329_088),
    "transformer_moe_25m": (545_406_976, 25_313_280),
    "transformer_25m": (25_202_688, 25_202_688),
    "mamba_100m": (120_717_312, 120_717_312),
    "moe_mamba_100m": (2_439_069_696, 117_522_432),
    "transformer_moe_100m": (2_454_110_208, 113_688_576),
    "mamba_1b": (27_131_904, 27_131_904),
    "experts_1": experts(1),
    "experts_4": experts(4),
    "experts_8": experts(8),
    "experts_16": experts(16),
    "experts_32": experts(32),
    "ratio_1_5": ratio(1, 19),
    "ratio_2_4": ratio(2, 24),
    "ratio_3_3": ratio(3, 32),
    "ratio_4_2": ratio(4, 48),
    "ratio_5_1": ratio(5, 96),
    "ratio_6_0": model(512, (8, mamba(512, 4.0))),
    "inner_conv_all": inner(24, "conv", every=True),
    "inner_gate_all": inner(24, "gate", every=True),
    "inner_out_all": inner(24, "out", every=True),
    "inner_conv_gate_all": inner(12, "conv", "gate", every=True),
    "inner_conv_out_all": inner(12, "conv", "out", every=True),
    "inner_gate_out_all": inner(12, "gate", "out", every=True),
    "inner_conv_gate_out_all": inner(8, "conv", "gate", "out", every=True),
    "inner_conv_alternate": inner(48, "conv", every=False),
    "inner_gate_alternate": inner(48, "gate", every=False),
    "inner_out_alternate": inner(48, "out", every=False),
    "inner_conv_gate_alternate": inner(24, "conv", "gate", every=False),
    "inner_conv_out_alternate": inner(24, "conv", "out", every=False),
    "inner_gate_out_alternate": inner(24, "gate", "out", every=False),
    "inner_conv_gate_out_alternate": inner(16, "conv", "gate", "out", every=False),
    "sequential_1": experts(1),
    "sequential_2": experts(2),
    "sequential_4": experts(4),
    "sequential_8": experts(8),
    "sequential_16": experts(16),
    "sequential_32": experts(32),
    "parallel_1": side_by_side(1),
    "parallel_2": side_by_side(2),
    "parallel_4": side_by_side(4),
    "parallel_8": side_by_side(8),
    "parallel_16": side_by_side(16),
    "parallel_32": side_by_side(32),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_row_has_its_parameters(name):
    c = get_config(name)
    rules.validate(c)
    counts = params.count(c.model)
    assert (counts["non_embedding_total"], counts["non_embedding_active"]) == COUNTS[name]
    assert counts["total"] - counts["non_embedding_total"] == 2 * V * c.model.d_model
    if not name.startswith("parallel"):
        assert f"{COUNTS[name][0]:,}" in get_config.__globals__["__doc__"]
    if not name.startswith(("parallel", "sequential")):
        assert f"{COUNTS[name][1]:,}" in get_config.__globals__["__doc__"]


def test_there_is_a_row_for_each_line():
    assert COUNTS.keys() == ROWS.keys()


def test_the_closed_forms_are_the_papers_where_it_prints_them():
    """Of one layer at D=512 and 768; Table 1; Tables 2 and 4 in millions (arXiv 2401.04081)."""
    assert mamba(512) == (1_694_720, 1_694_720)
    assert mamba(768) == (3_770_880, 3_770_880)
    assert model(512, (16, mamba(512))) == COUNTS["mamba_25m"]
    assert model(768, (16, mamba(768)), (16, switch(768, 2304, 42))) == COUNTS["moe_mamba_100m"]
    assert model(768, (16, attention(768)), (16, switch(768, 3072, 32))) == COUNTS["transformer_moe_100m"]
    dense = (2 * 512 * 2048 + 2048 + 512,) * 2
    assert model(512, (8, attention(512)), (8, dense)) == COUNTS["transformer_25m"]
    assert [round(experts(E)[0] / 1e6) for E in (1, 4, 8, 16, 32)] == [26, 64, 114, 215, 416]
    pairs = [ratio(parts, E) for parts, E in ((1, 19), (2, 24), (3, 32), (4, 48), (5, 96))]
    assert [(round(total / 1e6), round(active / 1e6, 1)) for total, active in pairs] == [
        (403, 25.6), (412, 25.9), (416, 26.3), (421, 26.7), (426, 27.2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tokens", "learning_rate", "warmup", "rows_of_a_group"),
    [
        ("moe_mamba_25m", 150_001 * 64 * 1024, 5e-4, 1500, 64),
        ("mamba_25m", 150_001 * 64 * 1024, 1e-3, 1500, 64),
        ("mamba_100m", 30_001 * 1024 * 1024, 1e-3, 300, 4),
        ("moe_mamba_100m", 30_001 * 1024 * 1024, 5e-4, 300, 4),
        ("transformer_moe_100m", 30_001 * 1024 * 1024, 2.5e-4, 300, 4),
        ("experts_8", 15_001 * 64 * 1024, 5e-4, 150, 64),
        ("parallel_8", 15_001 * 64 * 1024, 5e-4, 150, 32),
        ("inner_gate_all", 15_001 * 64 * 1024, 5e-4, 150, 32),
        ("ratio_6_0", 15_001 * 64 * 1024, 5e-4, 150, 64),
    ],
)
def test_a_row_has_the_tokens_and_rates_of_table_6(name, tokens, learning_rate, warmup, rows_of_a_group):
    c = get_config(name)
    assert c.training.num_steps * c.data.batch_size * c.data.seq_length == tokens
    assert (c.optimizer.learning_rate, c.optimizer.warmup_steps) == (learning_rate, warmup)
    assert c.model.moe.group_size == rows_of_a_group * 1024


RECIPE = {  # of every row, by the paper's Table 6 and its code
    "model.norm": "layernorm", "model.norm_eps": 1e-5, "model.final_norm": False, "model.tie_embeddings": False,
    "model.init": "moe_mamba", "model.init_scale": 0.1, "model.rescale_out_proj": False, "model.dropout": 0.0,
    "model.compute_dtype": "bfloat16", "model.vocab_size": V,
    "model.mamba.d_state": N, "model.mamba.d_conv": W, "model.mamba.dt_rank": 0,
    "model.attention.position": "rotary", "model.attention.rope_base": 10_000.0,
    "model.mlp.activation": "relu", "model.moe.activation": "relu", "model.moe.bias": False,
    "model.moe.router": "switch", "model.moe.jitter": 0.0, "model.moe.router_dtype": "float32",
    "model.moe.capacity_factor": 1.0, "model.moe.eval_capacity_factor": 1.0, "model.moe.capacity_rounding": "down",
    "model.moe.min_capacity": 1, "model.moe.layer_reduction": "mean", "model.moe.expert_dropout": 0.0,
    "data.source": "tfds:c4/en:3.1.0", "data.tokenizer": "gpt2", "data.packing": "sample",
    "data.isolate_documents": False, "data.objective": "next_token", "data.seq_length": 1024,
    "optimizer.name": "adamw", "optimizer.schedule": "cosine", "optimizer.final_fraction": 0.1,
    "optimizer.final_steps": 1, "optimizer.beta1": 0.9, "optimizer.beta2": 0.999, "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.1, "optimizer.decay": "all", "optimizer.clip_norm": 0.5,
    "training.z_weight": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_row_has_the_recipe(name):
    c = get_config(name)
    assert {path: checks.get(c, path) for path in RECIPE} == RECIPE
    assert c.model.moe.loss_weights() == {"balance": 0.01}
    if c.model.uses("mlp"):
        assert c.model.mlp.bias


@pytest.mark.parametrize(
    ("name", "slots"), [("moe_mamba_25m", 1560), ("transformer_moe_25m", 2048), ("parallel_8", 4096)]
)
def test_a_row_has_the_slots_of_its_code(name, slots):
    """int(tokens on a device / experts)."""
    moe = get_config(name).model.moe
    assert moe.capacity(moe.group_size, moe.capacity_factor) == slots


@pytest.mark.parametrize("name", COUNTS)
def test_a_mini_row_is_the_row_in_small(name):
    c, whole = get_config(f"{name},mini"), get_config(name)
    rules.validate(c)
    assert c.model.sublayers == whole.model.sublayers[: len(whole.model.sublayers) // 4]
    assert c.model.d_model * 4 == whole.model.d_model
    assert c.data.source == "wikipedia"
    assert c.optimizer.learning_rate == pytest.approx(4 * whole.optimizer.learning_rate)
    assert c.model.compute_dtype == "float32"
    # all else of the recipe is the row's
    for field in ("norm", "final_norm", "tie_embeddings", "init", "init_scale", "mlp", "mamba", "causal"):
        small, large = getattr(c.model, field), getattr(whole.model, field)
        assert small == large or field == "mlp"
    assert (c.model.mlp.bias, c.model.mlp.activation) == (whole.model.mlp.bias, whole.model.mlp.activation)
    for field in ("final_fraction", "beta1", "beta2", "eps", "weight_decay", "decay", "clip_norm"):
        assert getattr(c.optimizer, field) == getattr(whole.optimizer, field)
    assert c.optimizer.final_steps == whole.optimizer.final_steps == 1
    warmups = [config.optimizer.warmup_steps / (config.training.num_steps - 1) for config in (c, whole)]
    assert warmups == [0.01, 0.01]
    groups, whole_groups = (
        config.data.batch_size * config.data.seq_length / config.model.moe.group_size for config in (c, whole)
    )
    assert groups == whole_groups or "100m" in name


def test_a_row_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(
        config_lib.ConfigError, match=r"1b is no row; write one of mamba_25m, moe_mamba_25m, .*parallel_32"
    ):
        get_config("moe_mamba_1b")
    with pytest.raises(config_lib.ConfigError, match="moe_mamba_25m,small is no row"):
        get_config("moe_mamba_25m,small")
