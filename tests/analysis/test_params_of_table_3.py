"""Models with experts inside their Mamba blocks have the parameters of a closed form, and so many active."""

import importlib.util
import pathlib

import pytest

from moejax import config as config_lib
from moejax import rules
from moejax.analysis import params

PATH = pathlib.Path(__file__).resolve().parents[2] / "configs" / "moe_in_mamba.py"
D, I, W, R, N, F, V = 512, 1024, 4, 32, 16, 352, 50_257


def get_config(mode):
    spec = importlib.util.spec_from_file_location("moe_in_mamba", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(mode)


def block(num_experts):
    """(total, active) of a Mamba block whose projection `name` has num_experts[name] experts, and of its norm."""
    total = active = I * W + I + I * (R + 2 * N) + R * I + I + I * N + I + 2 * D
    for name, d_in, d_out in (("conv", D, I), ("gate", D, I), ("out", I, D)):
        expert, router = d_in * F + F * d_out, d_in * num_experts.get(name, 0)
        total += num_experts[name] * expert + router if name in num_experts else d_in * d_out
        active += expert + router if name in num_experts else d_in * d_out
    return total, active


@pytest.mark.parametrize(
    ("mode", "num_experts", "plain", "with_experts"),
    [
        ("gate", {"gate": 48}, 8, 8),
        ("conv_out", {"conv": 24, "out": 24}, 8, 8),
        ("conv_gate_out", {"conv": 16, "gate": 16, "out": 16}, 8, 8),
        ("out,all", {"out": 24}, 0, 16),
        ("conv_gate_out,all", {"conv": 8, "gate": 8, "out": 8}, 0, 16),
    ],
)
def test_table_3_has_the_parameters_of_a_closed_form(mode, num_experts, plain, with_experts):
    c = get_config(mode)
    rules.validate(c)
    counts = params.count(c.model)
    plain_total, _ = block({})
    assert plain_total == 1_694_720 + 2 * D  # MoE-Mamba's own Mamba layer, and its norm
    total, active = block(num_experts)
    assert counts["non_embedding_total"] == plain * plain_total + with_experts * total
    assert counts["non_embedding_active"] == plain * plain_total + with_experts * active
    assert counts["total"] - counts["non_embedding_total"] == 2 * V * D
    experts = sum(num * (3 * D * F) for num in num_experts.values())
    assert counts["components"]["experts"]["total"] == with_experts * experts


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("gates", "choose one of conv, gate, out"), ("gate_gate", "has gate twice")],
)
def test_projections_that_there_are_not_are_refused(mode, expected):
    with pytest.raises(config_lib.ConfigError, match=expected):
        rules.validate(get_config(mode))


def test_blocks_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="write gate for every other block, or gate,all"):
        get_config("gate,some")
