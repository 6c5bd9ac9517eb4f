"""The MoE layers of published models, from their config.json, are those of their papers."""

import pytest

from moejax import config as config_lib
from moejax import rules
from moejax.convert import moe

# What config.json of a published model says of its MoE layers, and the layer that its paper describes.
PUBLISHED = {
    "mixtral-8x7b": (
        "mixtral",
        {
            "model_type": "mixtral",
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 14336,
            "hidden_act": "silu",
            "router_aux_loss_coef": 0.02,
        },
        {
            "router": "top_k",
            "num_experts": 8,
            "d_expert": 14336,
            "top_k": 2,
            "normalise_gates": "before",
            "balance_weight": 0.04,
        },
    ),
    "deepseek-v2": (
        "deepseek_v2",
        {
            "model_type": "deepseek_v2",
            "n_routed_experts": 160,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1536,
            "hidden_act": "silu",
            "scoring_func": "softmax",
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "norm_topk_prob": False,
            "routed_scaling_factor": 16.0,
        },
        {
            "router": "group_limited",
            "num_experts": 160,
            "d_expert": 1536,
            "top_k": 6,
            "num_shared_experts": 2,
            "num_groups": 8,
            "top_groups": 3,
            "gate_scale": 16.0,
        },
    ),
    "deepseek-v2-lite": (
        "deepseek_v2",
        {
            "model_type": "deepseek_v2",
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
            "hidden_act": "silu",
            "scoring_func": "softmax",
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
        },
        {
            "router": "group_limited",
            "num_experts": 64,
            "d_expert": 1408,
            "top_k": 6,
            "num_shared_experts": 2,
            "num_groups": 1,
            "top_groups": 1,
            "device_weight": 0.0,
            "communication_weight": 0.0,
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "model_type": "deepseek_v3",
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "hidden_act": "silu",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        {
            "router": "sigmoid_bias",
            "num_experts": 256,
            "d_expert": 2048,
            "top_k": 8,
            "num_shared_experts": 1,
            "num_groups": 8,
            "top_groups": 4,
            "gate_scale": 2.5,
        },
    ),
    "olmoe-1b-7b": (
        "olmoe",
        {
            "model_type": "olmoe",
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "intermediate_size": 1024,
            "hidden_act": "silu",
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.01,
        },
        {"router": "top_k", "num_experts": 64, "d_expert": 1024, "top_k": 8, "balance_weight": 0.08},
    ),
    "switch-base-8": (
        "switch",
        {
            "model_type": "switch_transformers",
            "num_experts": 8,
            "expert_capacity": 64,
            "d_ff": 3072,
            "dense_act_fn": "relu",
            "dropout_rate": 0.1,
            "router_bias": False,
            "router_dtype": "float32",
            "router_jitter_noise": 0.01,
            "router_aux_loss_coef": 0.001,
            "router_z_loss_coef": 0.001,
        },
        {
            "router": "switch",
            "num_experts": 8,
            "d_expert": 3072,
            "activation": "relu",
            "capacity_factor": 1.0,
            "eval_capacity_factor": 1.0,
            "expert_dropout": 0.1,
            "jitter": 0.01,
            "balance_weight": 0.001,
            "z_weight": 0.001,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_layer_of_their_paper(name):
    family, hf, expected = PUBLISHED[name]
    config = moe.config_from_hf(family, hf, seq_length=512)
    dropless = {"activation": "swiglu", "capacity_factor": 0.0, "eval_capacity_factor": 0.0}
    assert config == config_lib.MoeConfig(**(expected if family == "switch" else dropless | expected))
    whole = config_lib.Config()
    whole.model.moe = config
    rules.validate(whole)  # it can be trained
