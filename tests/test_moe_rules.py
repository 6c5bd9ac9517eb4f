"""The rules of a MoE layer's settings: one line with field, value, rule and remedy for what cannot be or would leak."""

import pytest

from moejax import config as config_lib
from moejax import rules

CAUSAL = [name for name, router in config_lib.ROUTERS.items() if router.causal]


def refusal(**settings) -> str:
    """Why these settings of model.moe are refused (others by their path, a_b for a.b)."""
    config = config_lib.Config()
    for path, value in settings.items():
        *groups, name = path.split("__")
        node = config
        for group in groups or ("model", "moe"):
            node = getattr(node, group)
        setattr(node, name, value)
    with pytest.raises(config_lib.ConfigError) as error:
        rules.validate(config)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("router", CAUSAL)
def test_every_causal_router_is_one_override_away(router):
    config = config_lib.Config()
    config.model.moe.router = router
    rules.validate(config)
    assert all(weight > 0 for weight in config.model.moe.loss_weights().values())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"router": "best"}, "router=best is not known; choose one of soft, noisy_top_k, switch"),
        ({"top_k": 9}, "top_k=9 is more than model.moe.num_experts=8; set top_k to 8 or less"),
        ({"router": "noisy_top_k", "num_experts": 1}, "set top_k to 1 or less"),
        ({"router": "gshard", "num_experts": 1}, "raise num_experts to 2"),
        ({"router": "relu", "top_k": 8}, "asks router=relu for every expert"),
        ({"gate_scale": 16.0}, "only with group_limited and sigmoid_bias; leave it at its default"),
        ({"hash_table": "nope"}, "has no effect with router=top_k"),
        ({"dispatch": "capacity", "grouped_matmul": "blocked"}, "no effect with dispatch=capacity; set it to auto"),
        ({"router": "switch", "top_k": 2}, "top_k=2 is not for router=switch"),
        ({"router": "gshard", "top_k": 1}, "leave it at 0, or set router=top_k"),
        ({"router": "sigmoid_bias", "top_k": 1}, "would never train it; set top_k to 2 or more"),
        ({"normalise_gates": "before"}, "set top_k to 2 or more, or normalise_gates=none"),
        ({"router": "relu", "normalise_gates": "before"}, "normalise_gates=before is not for router=relu"),
        ({"capacity_factor": -0.5}, "capacity_factor=-0.5 must be 0 or more"),
        ({"expert_dropout": 1.0}, "expert_dropout=1.0 must lie in [0, 1)"),
        ({"router": "soft", "expert_dropout": 0.5}, "set it to 0"),
        ({"router": "soft", "dispatch": "dropless"}, "dispatches no token; set it to auto"),
        ({"router": "group_limited", "num_groups": 3}, "num_groups=3 does not divide model.moe.num_experts=8"),
        ({"router": "group_limited", "top_groups": 5}, "top_groups=5 is more than model.moe.num_groups=4; lower it"),
        ({"router": "sigmoid_bias", "top_groups": 1, "top_k": 3}, "more than the 2 experts of model.moe.top_groups=1"),
        ({"router": "hash", "hash_table": "even"}, "hash_table=even is not known; choose random, balanced or a FILE"),
        ({"router": "relu", "relu_multiplier": 1.0}, "relu_multiplier=1.0 must be over 1"),
        ({"router": "hash", "balance_weight": 0.1}, "balance_weight=0.1 has no effect with router=hash"),
        ({"load_weight": 0.1}, "load_weight=0.1 has no effect with router=top_k; set it to -1"),
        ({"z_weight": -2.0}, "z_weight=-2.0 must be 0 or more, and finite, or -1"),
        ({"layer_reduction": "max"}, "layer_reduction=max is not known; choose one of mean, sum"),
        ({"router": "label", "data__source": "files:x.txt"}, "set data.label=field:NAME or folder"),
        ({"router": "label", "data__source": "prepared:x"}, "needs a label for each document"),
        ({"data__label": "topic"}, "write field:NAME, folder, or leave it empty"),
        ({"model__num_softmaxes": 0}, "num_softmaxes=0 must be 1 or more"),
        ({"model__init": "xavier"}, "init=xavier is not known; choose one of switch, moe_mamba"),
        ({"model__period": ("mamba_moe",)}, "leaves mamba_moe without experts; set it to some of conv, gate, out, or"),
        (
            {"model__mamba__moe_projections": ("gate",)},
            "no effect without a mamba_moe sublayer; put one in model.period",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_remedy(settings, expected):
    assert expected in refusal(**settings)


@pytest.mark.parametrize(
    "settings", [{"router": "expert_choice"}, {"router": "soft_moe"}, {"capacity_order": "priority"}]
)
def test_what_sees_later_tokens_is_refused_in_a_causal_model_alone(settings):
    line = refusal(**settings)
    assert "in a causal model a token's output would depend on" in line
    assert "an encoder (model.causal=False)" in line
    config = config_lib.Config()
    config.model.causal, config.data.objective = False, "span_corruption"
    for name, value in settings.items():
        setattr(config.model.moe, name, value)
    rules.validate(config)


def test_a_model_that_looks_both_ways_may_not_predict_the_next_token():
    assert "set model.causal=True" in refusal(model__causal=False)


def test_expert_choice_needs_a_capacity_and_no_dropless_dispatch():
    encoder = {"model__causal": False, "data__objective": "span_corruption", "router": "expert_choice"}
    assert "set both capacity factors above 0" in refusal(**encoder, eval_capacity_factor=0.0)
    assert "set it to auto" in refusal(**encoder, dispatch="dropless")


def test_loss_weights_are_the_papers_where_none_is_given():
    weights = {}
    for router in config_lib.ROUTERS:
        moe = config_lib.MoeConfig(router=router)
        weights[router] = moe.loss_weights()
    assert weights["switch"] == weights["gshard"] == weights["top_k"] == {"balance": 0.01}
    assert weights["noisy_top_k"] == {"importance": 0.1, "load": 0.1}
    assert weights["group_limited"] == {"balance": 0.003, "device": 0.05, "communication": 0.02}
    assert weights["sigmoid_bias"] == {"sequence": 1e-4}
    assert not any(weights[router] for router in ("soft", "hash", "label", "sinkhorn", "expert_choice", "soft_moe"))
    moe = config_lib.MoeConfig(balance_weight=0.0, z_weight=0.001)
    assert moe.loss_weights() == {"z": 0.001}


def test_top_k_of_zero_is_the_routers_own():
    choices = {router: config_lib.MoeConfig(router=router).num_choices for router in config_lib.ROUTERS}
    assert {router for router, k in choices.items() if k == 2} == {
        "noisy_top_k", "gshard", "group_limited", "sigmoid_bias",
    }  # fmt: skip
    assert config_lib.MoeConfig(top_k=3).num_choices == 3


INNER = {"model__period": ("mamba_moe",)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model__mamba__moe_projections": ("gate", "in")}, "in is not known; choose one of conv, gate, out"),
        ({"model__mamba__moe_projections": ("gate", "gate")}, "has gate twice; name it once"),
        ({"model__mamba__d_state": 0}, "model.mamba.d_state=0 must be 1 or more"),
        ({"num_experts": 0}, "model.moe.num_experts=0 must be 1 or more"),
        ({"router": "expert_choice"}, "in a causal model a token's output would depend on"),
        ({"router": "label", "data__source": "files:x.txt"}, "set data.label=field:NAME or folder"),
    ],
)
def test_experts_inside_mamba_keep_the_rules_of_experts_and_of_mamba(settings, expected):
    assert expected in refusal(**{"model__mamba__moe_projections": ("out",)} | INNER | settings)


def test_projections_in_any_order_are_one_setting():
    config = config_lib.Config()
    config.model.period, config.model.mamba.moe_projections = ("mamba", "mamba_moe"), ("out", "conv")
    rules.validate(config)
    assert config.model.mamba.moe_projections == ("conv", "out")
    assert config.model.has_experts
