"""T5 1.0, T5 1.1 and Switch Transformers give what Hugging Face's give: logits, loss and every gradient.

Where the libraries differ in routing:
- Hugging Face routes padding, and counts it in the router's losses; we do not. Padding comes last in a row here, so
  that it takes no slot from a token.
- Its capacity is a number of tokens a row, the same for both stacks; ours a factor of the tokens a row, so that rows of
  both stacks have one length where tokens are dropped.
- Its balance loss of a stack is computed over all layers at once, and left out where every layer is sparse; ours is
  one a layer, so that the model whose losses are compared has one sparse layer a stack.
- Its jitter multiplies what experts see, too, ours what the router sees alone: there is none in evaluation.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
import torch_threads

from moejax import config as config_lib
from moejax.convert import t5
from moejax.models import encoder_decoder
from moejax.training import loss

pytestmark = pytest.mark.parity

BATCH, VOCAB, PAD = 3, 31, 0
SIZES = {"vocab_size": VOCAB, "d_model": 12, "d_kv": 5, "num_heads": 2, "d_ff": 14, "dropout_rate": 0.1}
SIZES |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9, "decoder_start_token_id": PAD}
T5 = SIZES | {"num_layers": 2, "num_decoder_layers": 3}
SWITCH = SIZES | {"num_layers": 4, "num_decoder_layers": 2, "num_sparse_encoder_layers": 2}
SWITCH |= {"num_sparse_decoder_layers": 1, "num_experts": 4, "expert_capacity": 100}
SWITCH |= {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}

# family, fields of its config, tokens a row of the encoder and of the decoder
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "t5 1.0": ("T5", T5, (17, 9)),
    "t5 1.1, untied": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, (17, 9)),
    "switch, every other layer": ("SwitchTransformers", SWITCH, (13, 7)),
    "switch, dropping": ("SwitchTransformers", SWITCH | {"expert_capacity": 2}, (11, 11)),
    "switch, every layer": (
        "SwitchTransformers",
        SWITCH | {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 2, "dense_act_fn": "gelu_new"},
        (11, 6),
    ),
    "switch with its losses": (
        "SwitchTransformers",
        SWITCH | {"num_layers": 2, "num_sparse_encoder_layers": 1, "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.001},
        (11, 6),
    ),
}  # fmt: skip


@dataclasses.dataclass
class Pair:
    """One model on both sides, and a batch."""

    hf: Any
    config: config_lib.ModelConfig
    batch: dict[str, np.ndarray]

    def model(self) -> encoder_decoder.EncoderDecoder:
        return t5.from_hf({name: tensor.detach().numpy() for name, tensor in self.hf.state_dict().items()}, self.config)

    def run_hf(self, **settings) -> Any:
        """What Hugging Face gives for the batch; -100 marks targets that do not count."""
        torch, batch = pytest.importorskip("torch"), self.batch
        targets = np.where(batch["loss_mask_BM"], batch["targets_BM"], -100)
        return self.hf(
            input_ids=torch.tensor(batch["encoder_inputs_BL"], dtype=torch.long),
            attention_mask=torch.tensor(batch["encoder_mask_BL"], dtype=torch.long),
            decoder_input_ids=torch.tensor(batch["decoder_inputs_BM"], dtype=torch.long),
            labels=torch.tensor(targets, dtype=torch.long),
            **settings,
        )


one_torch_thread = pytest.fixture(torch_threads.one, autouse=True)


@functools.cache
def make(case: str) -> Pair:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family, settings, (encoder_length, decoder_length) = CASES[case]
    untied = settings.get("tie_word_embeddings") is False
    hf_config = getattr(transformers, f"{family}Config")(**settings)
    hf = getattr(transformers, f"{family}ForConditionalGeneration")(hf_config).eval()
    if untied:  # transformers 5 ties every T5
        hf.lm_head.weight = torch.nn.Parameter(torch.zeros_like(hf.lm_head.weight))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            # norms that are not 1, logits of size one, and routers so far apart that rounding changes no choice
            scale = 1.0 if "classifier" in name or "shared" in name or "relative" in name else 0.3
            parameter.copy_(scale * torch.randn_like(parameter) + (1.0 if "norm" in name else 0.0))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(1, VOCAB, size=shape).astype(np.int32)  # noqa: E731
    whole = case == "switch with its losses"  # no padding, which is in theirs
    encoder_size_B, decoder_size_B = (
        np.array([length] * 3 if whole else [length, length // 2, length - 1])[:, None]
        for length in (encoder_length, decoder_length)
    )
    targets_BM = draw(BATCH, decoder_length)
    batch = {
        "encoder_inputs_BL": draw(BATCH, encoder_length),
        "encoder_mask_BL": np.arange(encoder_length) < encoder_size_B,
        "decoder_inputs_BM": np.concatenate([np.full((BATCH, 1), PAD, np.int32), targets_BM[:, :-1]], axis=1),
        "targets_BM": targets_BM,
        "loss_mask_BM": np.arange(decoder_length) < decoder_size_B,
    }
    plain = hf_config.to_dict() | ({"tie_word_embeddings": False} if untied else {})
    config = t5.config_from_hf(plain, seq_length=encoder_length)
    return Pair(hf=hf, config=config, batch=batch)


def assert_close(actual, expected, relative, name=""):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max(), err_msg=name)


@functools.cache
def ours(case: str):
    """(loss, sums, logits of every target, gradient) of our model; with the router's losses where the case has them."""
    pair = make(case)
    weights = pair.config.moe.loss_weights() if case == "switch with its losses" else {}

    def objective(model):
        sums = loss.sums(model, pair.batch, train=False)
        extra = sum(weight * sums["moe"].losses[name].mean() for name, weight in weights.items())
        return sums["nats"] / sums["tokens"] + extra, sums

    def both(model):
        logits, _ = model(
            pair.batch["encoder_inputs_BL"],
            pair.batch["decoder_inputs_BM"],
            encoder_segment_ids_BL=pair.batch["encoder_mask_BL"].astype(np.int32),
            decoder_segment_ids_BM=pair.batch["loss_mask_BM"].astype(np.int32),
        )
        (total, sums), gradient = jax.value_and_grad(objective, has_aux=True)(model)
        return total, sums, logits, gradient

    return jax.jit(both)(pair.model())


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient_agree(case):
    """1e-4 of the largest logit and of the loss, 1e-3 of the largest entry of a gradient."""
    pair, (total, sums, logits, gradient) = make(case), ours(case)
    theirs = pair.run_hf(**({"output_router_logits": True} if case == "switch with its losses" else {}))
    pair.hf.zero_grad()
    theirs.loss.backward()
    counted = pair.batch["loss_mask_BM"]
    assert_close(logits[counted], theirs.logits.detach().numpy()[counted], 1e-4)
    assert float(total) == pytest.approx(theirs.loss.item(), rel=1e-4)
    if case == "switch, dropping":
        assert (sums["moe"].dropped > 0).all()
    elif "switch" in case:
        assert not sums["moe"].dropped.any()
    converted = t5.to_hf(gradient)
    for name, parameter in pair.hf.named_parameters():
        # None: an expert without tokens. Queries: ours are sqrt(d_kv) times theirs, and to_hf divided by that once.
        expected = np.zeros(1) if parameter.grad is None else parameter.grad.numpy()
        found = converted[name] * (SIZES["d_kv"] if name.endswith("Attention.q.weight") else 1)
        np.testing.assert_allclose(
            found, np.broadcast_to(expected, found.shape), rtol=0, atol=1e-3 * max(np.abs(expected).max(), 1e-4),
            err_msg=name,
        )  # fmt: skip


@pytest.mark.parametrize("case", ["t5 1.0", "t5 1.1, untied", "switch, every other layer"])
def test_weights_go_there_and_back_bit_for_bit_but_for_a_rounding_of_queries(case):
    pair = make(case)
    back = t5.to_hf(pair.model())
    theirs = {name: tensor.detach().numpy() for name, tensor in pair.hf.state_dict().items()}
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.endswith("Attention.q.weight"):
            np.testing.assert_allclose(back[name], tensor, rtol=3e-7)
        else:
            np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.parametrize("name", ["router_aux_loss_coef", "router_z_loss_coef"])
def test_losses_of_stacks_with_unlike_numbers_of_sparse_layers_are_refused(name):
    """Theirs weighs a stack as a whole, ours each layer."""
    transformers = pytest.importorskip("transformers")
    hf = transformers.SwitchTransformersConfig(**SWITCH | {name: 0.01}).to_dict()
    with pytest.raises(
        config_lib.ConfigError, match=rf"^{name}=0\.01 weighs .* 2 sparse .* and 1 of the decoder .* to 0"
    ):
        t5.config_from_hf(hf, seq_length=8)
    config = t5.config_from_hf(hf | {"num_sparse_encoder_layers": 1, "num_layers": 2}, seq_length=8)
    assert {config.moe.balance_weight, config.moe.z_weight} == {0.0, 0.02}


@pytest.mark.parametrize("rate", [None, "x", 1.5, -0.1])
def test_a_rate_of_dropout_that_is_none_is_refused(rate):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(config_lib.ConfigError, match=rf"^dropout_rate={rate!r} must "):
        t5.config_from_hf(transformers.T5Config(**SIZES).to_dict() | {"dropout_rate": rate})
