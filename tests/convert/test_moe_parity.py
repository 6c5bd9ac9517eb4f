"""A converted layer computes what transformers' module of one MoE layer computes: outputs, gradients, choices, losses.

The other side is transformers' plain torch path on CPU, float32, in evaluation. Seen: outputs within 2e-7 of the
largest, gradients within 8e-7 of their largest entry, and every choice the same.

transformers 5.23 differs from the papers in this, and is compared where it agrees:
  - Switch's expert_capacity is a number of tokens a row, however long the row; the paper's (eq. 3) is a factor of the
    tokens, and so is ours. They agree on rows of one length, which `config_from_hf` takes. A dropped token gets 0 on
    both sides, and passes by the residual alone (section 2.2). The first releases of transformers 5 dropped nothing,
    and gave probabilities as logits: with those, the tests of Switch fail.
  - The losses of Mixtral and OLMoE count K choices a token without dividing by K, and pool the tokens of all rows; ours
    is 1 when balanced for any K, and of one row. On one row theirs is K times ours.
  - DeepSeek-V2's norm_topk_prob is not read, though DeepSeek's code reads it: only False is converted.
  - DeepSeek-V3 fails on groups of one expert, as it adds the two best scores of a group; ours takes the one there is.
"""

import dataclasses
import functools
import importlib
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_threads

from moejax import config as config_lib
from moejax.convert import moe
from moejax.layers import moe as moe_layer
from moejax.layers import router
from moejax.ops import routing

pytestmark = pytest.mark.parity

D_MODEL, D_EXPERT = 16, 24
RELATIVE = 1e-5  # of outputs and gradients, to the largest entry

# LLVM's optimiser took half of the time of these tests
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Where transformers defines a family, the classes of its layer and config, and how the latter calls our sizes.
MODULES = {
    "mixtral": ("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", {"intermediate_size": D_EXPERT}),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2Moe", "DeepseekV2Config", {"moe_intermediate_size": D_EXPERT}),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", {"moe_intermediate_size": D_EXPERT}),
    "olmoe": ("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig", {"intermediate_size": D_EXPERT}),
    "switch": (
        "switch_transformers",
        "SwitchTransformersSparseMLP",
        "SwitchTransformersConfig",
        {"d_ff": D_EXPERT, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
}
SMALL = {
    "hidden_size": D_MODEL,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "vocab_size": 31,
    "eos_token_id": 1,
}


def mixtral(num_experts, top_k, **settings):
    return "mixtral", {"num_local_experts": num_experts, "num_experts_per_tok": top_k, **settings}


def olmoe(num_experts, top_k, normalise, **settings):
    sizes = {"num_experts": num_experts, "num_experts_per_tok": top_k, "norm_topk_prob": normalise}
    return "olmoe", {**sizes, **settings}


def deepseek(version, num_experts, top_k, groups, shared, scale, **settings):
    sizes = {"n_routed_experts": num_experts, "num_experts_per_tok": top_k, "n_shared_experts": shared}
    if groups:
        settings |= {"n_group": groups[0], "topk_group": groups[1]}
    if version == 2:
        settings["topk_method"] = "group_limited_greedy" if groups else "greedy"
    return f"deepseek_v{version}", {**sizes, "routed_scaling_factor": scale, **settings}


def switch(num_experts, capacity, **settings):
    return "switch", {"num_experts": num_experts, "expert_capacity": capacity, **settings}


# E experts, K a token, in rows of 13 and 37 tokens; K = 1, K = E and E = 1
CASES: dict[str, tuple[tuple[str, dict[str, Any]], tuple[int, int]]] = {
    "mixtral, 2 of 8": (mixtral(8, 2), (2, 37)),
    "mixtral, 2 of 5, gelu": (mixtral(5, 2, hidden_act="gelu_pytorch_tanh"), (2, 13)),
    "mixtral, all of 4": (mixtral(4, 4), (1, 13)),
    "mixtral, one expert": (mixtral(1, 1), (2, 13)),
    "deepseek_v2 greedy, 3 of 8": (deepseek(2, 8, 3, None, 2, 1.0), (2, 37)),
    "deepseek_v2 greedy, all of 4, scaled": (deepseek(2, 4, 4, None, 1, 2.5), (2, 13)),
    "deepseek_v2 greedy, one expert": (deepseek(2, 1, 1, None, 1, 16.0), (1, 13)),
    "deepseek_v2 in 2 of 4 groups, 3 of 8": (deepseek(2, 8, 3, (4, 2), 2, 16.0), (2, 37)),
    "deepseek_v2 in 1 of 2 groups, 1 of 6": (deepseek(2, 6, 1, (2, 1), 1, 1.0), (2, 13)),
    "deepseek_v3 in 2 of 4 groups, 3 of 8": (deepseek(3, 8, 3, (4, 2), 1, 2.5), (2, 37)),
    "deepseek_v3 in 1 of 2 groups, 1 of 6": (deepseek(3, 6, 1, (2, 1), 2, 1.0), (2, 13)),
    "deepseek_v3 without groups, 2 of 5": (deepseek(3, 5, 2, (1, 1), 1, 2.5), (1, 13)),
    "deepseek_v3, all of 4": (deepseek(3, 4, 4, (2, 2), 1, 2.5), (2, 13)),
    "olmoe, 3 of 8": (olmoe(8, 3, False), (2, 37)),
    "olmoe, 3 of 8, normalised": (olmoe(8, 3, True), (2, 37)),
    "olmoe, 1 of 3": (olmoe(3, 1, False), (2, 13)),
    "switch, 8 experts": (switch(8, 37), (2, 37)),
    "switch, 8 experts, dropping": (switch(8, 3), (2, 37)),
    "switch, 3 experts, one slot, gelu": (switch(3, 1, dense_act_fn="gelu_new"), (3, 13)),
    "switch, one expert, dropping": (switch(1, 7), (2, 13)),
}
DROPPING = {"switch, 8 experts, dropping", "switch, 3 experts, one slot, gelu", "switch, one expert, dropping"}
DISPATCHES = {
    "capacity": {"dispatch": "capacity"},
    "ragged_dot": {"dispatch": "dropless", "grouped_matmul": "ragged_dot"},
    "blocked": {"dispatch": "dropless", "grouped_matmul": "blocked"},
}


def dispatches_of(case: str) -> list[str]:
    """Both, but one where that saves compiling what the other cases have; blocked is slow to compile."""
    if "switch" in case:
        return ["capacity"]
    if case == "mixtral, 2 of 8":
        return ["capacity", "blocked"]
    both = any(word in case for word in (" 8", "all", "one"))
    return ["capacity", "ragged_dot"] if both else ["ragged_dot"]


RUNS = [(case, dispatch) for case in CASES for dispatch in dispatches_of(case)]


@dataclasses.dataclass
class Pair:
    """One layer on both sides, and its input."""

    family: str
    module: Any  # where the torch module is defined
    hf: Any  # the torch module
    config: config_lib.MoeConfig
    x_BLD: np.ndarray

    def layer(self, **settings) -> moe_layer.Moe:
        return moe.from_hf(self.family, weights_of(self.hf), dataclasses.replace(self.config, **settings))

    def torch(self, array: np.ndarray):
        """The array as a torch tensor."""
        return next(self.hf.parameters()).new_tensor(array)


def weights_of(hf) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in hf.state_dict().items()}


def import_hf(family: str, settings: dict[str, Any]):
    """(where transformers defines the family, the name of its layer, a config)"""
    transformers = pytest.importorskip("transformers")
    folder, layer_class, config_class, fixed = MODULES[family]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return module, layer_class, getattr(transformers, config_class)(**(SMALL | fixed | settings))


one_torch_thread = pytest.fixture(torch_threads.one, autouse=True)


@functools.cache
def make(case: str) -> Pair:
    torch = pytest.importorskip("torch")
    (family, settings), (batch, length) = CASES[case]
    module, layer_class, config = import_hf(family, settings)
    hf = getattr(module, layer_class)(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in hf.state_dict().items():
            # logits so far apart that rounding changes no choice, and a bias that does change some
            scale = {"gate.weight": 0.4, "router.classifier.weight": 0.4, "gate.e_score_correction_bias": 0.3}
            parameter.copy_(scale.get(name, 0.2) * torch.randn_like(parameter))
    x_BLD = np.random.default_rng(0).normal(size=(batch, length, D_MODEL)).astype(np.float32)
    ours = moe.config_from_hf(family, config.to_dict(), seq_length=length)
    return Pair(family=family, module=module, hf=hf, config=ours, x_BLD=x_BLD)


def assert_close_gradient(actual, expected, name):
    # constant gates give the router a gradient of rounding, which has no largest entry to compare with
    atol = RELATIVE * max(np.abs(expected).max(), 0.05)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=name)


class Ours(NamedTuple):
    """What one compiled step of our layer gives, and its gradients."""

    y_BLD: jax.Array
    aux: moe_layer.MoeAux
    assignment_GT: routing.Assignment
    logits_GTE: jax.Array
    layer_gradient: moe_layer.Moe
    dx_BLD: jax.Array


@functools.cache
def run(case: str, dispatch: str) -> Ours:
    pair = make(case)

    def objective(layer, x_BLD):
        y_BLD, aux = layer(x_BLD)
        tokens = router.Tokens(valid_BL=jnp.ones(x_BLD.shape[:2], bool))
        choice = layer.router(x_BLD, tokens, group_size=x_BLD.shape[1], capacity=1, train=False)
        return jnp.sum(y_BLD * cotangent(pair)), (y_BLD, aux, *choice)

    step = jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
    gradients, outputs = step(pair.layer(**DISPATCHES[dispatch]), pair.x_BLD)
    return Ours(*outputs, *gradients)


def cotangent(pair: Pair) -> np.ndarray:
    return np.random.default_rng(1).normal(size=pair.x_BLD.shape).astype(np.float32)


@pytest.mark.parametrize(("case", "dispatch"), RUNS)
def test_outputs_and_every_gradient_agree(case, dispatch):
    pair, ours = make(case), run(case, dispatch)
    x_BLD = pair.torch(pair.x_BLD).requires_grad_()
    theirs_BLD = pair.hf(x_BLD)
    pair.hf.zero_grad()
    theirs_BLD.backward(gradient=pair.torch(cotangent(pair)))

    assert (ours.aux.dropped > 0) == (case in DROPPING)
    expected_BLD = theirs_BLD.detach().numpy()
    np.testing.assert_allclose(ours.y_BLD, expected_BLD, rtol=0, atol=RELATIVE * np.abs(expected_BLD).max())
    assert_close_gradient(ours.dx_BLD, x_BLD.grad.numpy(), "input")
    converted = moe.to_hf(pair.family, ours.layer_gradient)
    assert not np.any(converted.pop("gate.e_score_correction_bias", 0))  # it chooses, and is not learned
    expected = {name: parameter.grad for name, parameter in pair.hf.named_parameters()}
    assert converted.keys() == expected.keys()
    for name, gradient in expected.items():  # None: an expert without tokens
        assert_close_gradient(converted[name], np.zeros(1) if gradient is None else gradient.numpy(), name)


def choices(case: str) -> list[np.ndarray]:
    """Ours: (expert_TK, gate_TK, logits_TE) of all tokens."""
    ours = run(case, dispatches_of(case)[0])
    return [flatten(x) for x in (ours.assignment_GT.expert_TK, ours.assignment_GT.gate_TK, ours.logits_GTE)]


def flatten(x_BLE) -> np.ndarray:
    return np.asarray(x_BLE).reshape(-1, x_BLE.shape[-1])


@pytest.mark.parametrize("case", [case for case in CASES if "switch" not in case])
def test_logits_gates_and_chosen_experts_agree(case):
    pair = make(case)
    expert_TK, gate_TK, logits_TE = choices(case)
    expected = [tensor.detach().numpy() for tensor in pair.hf.gate(pair.torch(pair.x_BLD))]
    np.testing.assert_allclose(logits_TE, expected[0], rtol=0, atol=1e-5)
    order_TK, expected_order_TK = np.argsort(expert_TK), np.argsort(expected[2])  # theirs are in no order
    for x_TK, expected_TK in ((expert_TK, expected[2]), (gate_TK, expected[1])):
        in_order_TK = np.take_along_axis(expected_TK, expected_order_TK, axis=1)
        np.testing.assert_allclose(np.take_along_axis(x_TK, order_TK, axis=1), in_order_TK, rtol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if "switch" in case])
def test_switch_logits_gates_and_kept_experts_agree(case):
    pair, ours = make(case), run(case, "capacity")
    expert_T1, gate_T1, logits_TE = choices(case)
    expected = [flatten(tensor.detach().numpy()) for tensor in pair.hf.router(pair.torch(pair.x_BLD))]
    kept_T = flatten(ours.y_BLD).any(axis=1)  # a dropped token gets 0
    kept_TE = np.eye(logits_TE.shape[1], dtype=int)[expert_T1[:, 0]] * kept_T[:, None]
    np.testing.assert_array_equal(kept_TE, expected[0])
    np.testing.assert_allclose(gate_T1, expected[1], rtol=1e-5)
    np.testing.assert_allclose(logits_TE, expected[2], rtol=0, atol=1e-5)
    assert ours.aux.dropped == (~kept_T).sum()


@pytest.mark.parametrize("case", ["mixtral, 2 of 8", "olmoe, 3 of 8", "switch, 8 experts, dropping"])
def test_losses_with_their_weights_agree(case):
    """The mean over the rows of transformers' loss of a row."""
    pair, ours = make(case), run(case, "capacity")
    settings = import_hf(pair.family, CASES[case][0][1])[2]
    if pair.family == "switch":
        logits_BLE = pair.hf.router(pair.torch(pair.x_BLD))[2]
        balance = pair.module.load_balancing_loss_func(logits_BLE.softmax(dim=-1), logits_BLE.argmax(dim=-1)).item()
        theirs = {"z": settings.router_z_loss_coef * pair.module.router_z_loss_func(logits_BLE).item()}
    else:
        rows = [(pair.hf.gate(row_LD)[0],) for row_LD in pair.torch(pair.x_BLD)]
        function, sizes = pair.module.load_balancing_loss_func, (pair.config.num_experts, pair.config.top_k)
        balance = np.mean([function(row, *sizes).item() for row in rows])
        theirs = {}
    theirs["balance"] = settings.router_aux_loss_coef * balance
    weights = pair.config.loss_weights()
    assert weights.keys() == theirs.keys()
    for name, loss in theirs.items():
        np.testing.assert_allclose(weights[name] * ours.aux.losses[name], loss, rtol=1e-5, err_msg=name)


# The class of a whole model, where a layer of ours lies in its files, and a case.
WHOLE_MODELS = {
    "mixtral": ("MixtralForCausalLM", "model.layers.1.block_sparse_moe.", "mixtral, 2 of 8"),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "model.layers.1.mlp.", "deepseek_v2 in 2 of 4 groups, 3 of 8"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "model.layers.1.mlp.", "deepseek_v3 in 2 of 4 groups, 3 of 8"),
    "olmoe": ("OlmoeForCausalLM", "model.layers.1.mlp.", "olmoe, 3 of 8"),
    "switch": ("SwitchTransformersForConditionalGeneration", "encoder.block.1.layer.1.mlp.", "switch, 8 experts"),
}


@pytest.mark.parametrize("family", WHOLE_MODELS)
def test_their_checkpoint_files_can_be_read_and_written(family, tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    transformers = pytest.importorskip("transformers")
    model_class, prefix, case = WHOLE_MODELS[family]
    hf = getattr(transformers, model_class)(import_hf(family, CASES[case][0][1])[2])
    hf.save_pretrained(tmp_path)
    file = numpy_files.load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in file.items() if name.startswith(prefix)}

    ours = moe.config_from_hf(family, json.loads((tmp_path / "config.json").read_text()), seq_length=37)
    assert ours == make(case).config
    layer = moe.from_hf(family, tensors, ours)
    written = moe.to_hf(family, layer, per_expert=True)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    in_memory = weights_of(hf.get_submodule(prefix.replace("block_sparse_moe", "mlp").rstrip(".")))
    for name, tensor in moe.to_hf(family, layer).items():
        np.testing.assert_array_equal(tensor, in_memory[name], err_msg=name)


@pytest.mark.parametrize("family", WHOLE_MODELS)
def test_our_weights_can_be_loaded_there(family):
    case = WHOLE_MODELS[family][-1]
    pair = make(case)
    other = type(pair.hf)(import_hf(family, CASES[case][0][1])[2]).eval()
    ours = moe.to_hf(family, pair.layer())
    other.load_state_dict({name: pair.torch(tensor) for name, tensor in ours.items()}, strict=True)
    x_BLD = pair.torch(pair.x_BLD)
    np.testing.assert_array_equal(other(x_BLD).detach().numpy(), pair.hf(x_BLD).detach().numpy())
