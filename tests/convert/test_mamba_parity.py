"""A converted model computes what transformers' MambaForCausalLM computes: logits, loss, gradients and greedy text.

The other side is transformers' plain torch path on CPU, float32. Seen: logits (up to 7) within 9e-6, where each side
is within 8e-6 of the same in float64; the loss within 2e-7 of its value; gradients within 3e-6 of their largest entry.
"""

import dataclasses
import functools
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax.convert import mamba
from moejax.models import generate, lm
from moejax.ops import scan
from moejax.training import loss

pytestmark = pytest.mark.parity

CASES: dict[str, dict[str, Any]] = {
    "tied": {"num_hidden_layers": 2, "hidden_size": 16, "state_size": 4, "time_step_rank": 3, "vocab_size": 61},
    "untied": {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "state_size": 16,
        "time_step_rank": 5,
        "vocab_size": 97,
        "tie_word_embeddings": False,
    },
    "wide": {
        "num_hidden_layers": 2,
        "hidden_size": 24,
        "state_size": 7,
        "time_step_rank": "auto",
        "vocab_size": 53,
        "expand": 3,
        "conv_kernel": 3,
        "layer_norm_epsilon": 0.05,
    },
}
BATCH = 3
ATOL = 5e-5  # of logits

# LLVM's optimiser took half of the time of these tests
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

every_implementation = pytest.mark.parametrize(
    "implementation", [name for name in scan.IMPLEMENTATIONS if name not in scan.NEEDS]
)


@dataclasses.dataclass
class Pair:
    """One model on both sides."""

    torch: Any  # the module
    hf: Any  # MambaForCausalLM
    config: config_lib.ModelConfig
    model: lm.Lm

    def with_scan(self, implementation: str) -> lm.Lm:
        """The model with this scan; chunks of 5, so that no length below is a multiple."""
        settings = dataclasses.replace(self.config.mamba, scan=implementation, chunk_size=5)
        return mamba.from_hf(weights_of(self.hf), dataclasses.replace(self.config, mamba=settings))


def weights_of(hf) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in hf.state_dict().items()}


@pytest.fixture(scope="module", params=CASES)
def pair(request) -> Pair:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    hf = transformers.MambaForCausalLM(transformers.MambaConfig(**CASES[request.param], eos_token_id=None))
    noise = 0.25 if hf.config.tie_word_embeddings else 0.15  # with less, a tied model repeats one token for ever
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            # away from ones and zeros, which would hide a parameter; dt from about 1e-4 to 1, so the state matters
            parameter += (2.0 if "dt_proj.bias" in name else noise) * torch.randn_like(parameter)
    config = mamba.config_from_hf(hf.config.to_dict())
    return Pair(torch=torch, hf=hf, config=config, model=mamba.from_hf(weights_of(hf), config))


def draw_tokens(pair: Pair, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, pair.config.vocab_size, size=(BATCH, length), dtype=np.int32)


def gradients_of(hf) -> dict[str, np.ndarray]:
    gradients = {name: parameter.grad.numpy().copy() for name, parameter in hf.named_parameters()}
    hf.zero_grad()
    return gradients


def assert_same_gradients(pair: Pair, ours: lm.Lm, theirs: dict[str, np.ndarray]) -> None:
    converted = mamba.to_hf(ours)
    if pair.config.tie_embeddings:
        del converted["lm_head.weight"]  # one parameter; its gradient is that of the embedding
    assert converted.keys() == theirs.keys()
    for name, expected in theirs.items():
        atol = 5e-5 * np.abs(expected).max()
        np.testing.assert_allclose(converted[name], expected, rtol=0, atol=atol, err_msg=name)


@every_implementation
@pytest.mark.parametrize("length", [1, 7, 64])
def test_logits_loss_and_every_gradient_agree(pair, implementation, length):
    tokens_BL, targets_BL = draw_tokens(pair, length), draw_tokens(pair, length, seed=1)

    def objective(model):
        logits_BLV, _ = model(tokens_BL)
        return jnp.mean(loss.cross_entropy(logits_BLV, jnp.asarray(targets_BL))), logits_BLV

    step = jit(jax.value_and_grad(objective, has_aux=True))
    (value, ours_BLV), gradients = step(pair.with_scan(implementation))

    theirs_BLV = pair.hf(pair.torch.from_numpy(tokens_BL).long()).logits
    targets = pair.torch.from_numpy(targets_BL).long()
    nats = pair.torch.nn.functional.cross_entropy(theirs_BLV.flatten(0, 1), targets.flatten())
    nats.backward()

    np.testing.assert_allclose(ours_BLV, theirs_BLV.detach().numpy(), rtol=0, atol=ATOL)
    np.testing.assert_allclose(value, nats.item(), rtol=2e-6)
    assert_same_gradients(pair, gradients, gradients_of(pair.hf))


def test_rows_of_unequal_length_padded_on_the_left_agree(pair):
    """Segment 0 here is attention_mask=0 there; the loss is theirs, over the tokens that follow a token."""
    tokens_BL = draw_tokens(pair, 20)
    valid_BL = np.arange(20) >= np.array([0, 3, 15])[:, None]
    follows_BL = valid_BL & np.roll(valid_BL, 1, axis=1) & (np.arange(20) > 0)
    batch = {
        "inputs_BL": tokens_BL,
        "targets_BL": np.roll(tokens_BL, -1, axis=1),
        "segment_ids_BL": valid_BL.astype(np.int32),
        "positions_BL": None,
        "loss_mask_BL": np.roll(follows_BL, -1, axis=1),
    }

    def objective(model):
        sums = loss.sums(model, batch, train=True)
        return sums["nats"] / sums["tokens"]

    value, gradients = jit(jax.value_and_grad(objective))(pair.model)
    logits_BLV, _ = jit(pair.model)(tokens_BL, segment_ids_BL=batch["segment_ids_BL"])

    tokens = pair.torch.from_numpy(tokens_BL).long()
    output = pair.hf(
        tokens,
        attention_mask=pair.torch.from_numpy(valid_BL).long(),
        labels=tokens.masked_fill(pair.torch.from_numpy(~follows_BL), -100),
    )
    output.loss.backward()

    expected = output.logits.detach().numpy()
    np.testing.assert_allclose(np.asarray(logits_BLV)[valid_BL], expected[valid_BL], rtol=0, atol=ATOL)
    np.testing.assert_allclose(value, output.loss.item(), rtol=2e-6)
    assert_same_gradients(pair, gradients, gradients_of(pair.hf))


@every_implementation
def test_documents_packed_in_one_row_are_read_as_if_alone(pair, implementation):
    tokens_BL = draw_tokens(pair, 23)
    cuts = [0, 2, 11, 23]
    segment_ids_BL = np.broadcast_to(np.searchsorted(cuts, np.arange(23), side="right"), tokens_BL.shape)
    logits_BLV, _ = jit(pair.with_scan(implementation))(tokens_BL, segment_ids_BL=segment_ids_BL)
    for start, stop in itertools.pairwise(cuts):
        alone = pair.hf(pair.torch.from_numpy(tokens_BL[:, start:stop]).long()).logits.detach().numpy()
        np.testing.assert_allclose(logits_BLV[:, start:stop], alone, rtol=0, atol=ATOL)


def test_greedy_text_is_the_same(pair):
    prompt_BL = draw_tokens(pair, 5)
    writer = generate.Writer(
        pair.model,
        prompt_BL.tolist(),
        jax.random.split(jax.random.key(0), BATCH),
        num_tokens=64,
        settings=generate.Settings(temperature=0.0),
        vocab_size=pair.config.vocab_size,
        end_of_text=-1,
    )
    ours_BN = np.concatenate([writer.advance() for _ in range(5)], axis=1)
    assert writer.done().all()
    prompt = pair.torch.from_numpy(prompt_BL).long()
    theirs_BN = pair.hf.generate(
        prompt, attention_mask=pair.torch.ones_like(prompt), max_new_tokens=64, do_sample=False
    )[:, 5:].numpy()
    assert theirs_BN.shape == (BATCH, 64)
    assert all(len(set(row)) > 3 for row in theirs_BN.tolist())  # a constant would agree too easily
    np.testing.assert_array_equal(ours_BN, theirs_BN)


def test_their_checkpoint_files_can_be_read(pair, tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    pair.hf.save_pretrained(tmp_path)
    config = mamba.config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert config == pair.config
    converted = mamba.to_hf(mamba.from_hf(numpy_files.load_file(tmp_path / "model.safetensors"), config))
    expected = weights_of(pair.hf)
    assert converted.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(converted[name], expected[name], err_msg=name)


def test_our_weights_can_be_loaded_there(pair):
    transformers = pytest.importorskip("transformers")
    other = transformers.MambaForCausalLM(pair.hf.config)
    ours = {name: pair.torch.from_numpy(tensor) for name, tensor in mamba.to_hf(pair.model).items()}
    other.load_state_dict(ours, strict=True)
    tokens = pair.torch.from_numpy(draw_tokens(pair, 9)).long()
    assert pair.torch.equal(other(tokens).logits, pair.hf(tokens).logits)
