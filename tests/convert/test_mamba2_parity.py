"""A converted model computes what transformers' Mamba2ForCausalLM computes: logits, loss, gradients and greedy text.

The other side is transformers' plain torch path on CPU, float32.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax.convert import mamba2
from moejax.models import generate, lm
from moejax.ops import ssd
from moejax.training import loss

pytestmark = pytest.mark.parity

CASES: dict[str, dict[str, Any]] = {
    "tied": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "state_size": 4,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 1,
        "vocab_size": 61,
        "chunk_size": 16,
        "tie_word_embeddings": True,
    },
    "groups": {
        "num_hidden_layers": 3,
        "hidden_size": 24,
        "state_size": 16,
        "num_heads": 6,
        "head_dim": 8,
        "n_groups": 3,
        "vocab_size": 97,
        "chunk_size": 8,
    },
    "wide": {
        "num_hidden_layers": 2,
        "hidden_size": 20,
        "state_size": 7,
        "num_heads": 12,
        "head_dim": 5,
        "n_groups": 4,
        "vocab_size": 53,
        "expand": 3,
        "conv_kernel": 3,
        "layer_norm_epsilon": 0.05,
        "chunk_size": 256,
    },
}
BATCH = 3
ATOL = 1e-4  # of logits
RTOL = 1e-4  # of gradients, of their largest entry

# LLVM's optimiser took half of the time of these tests
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

every_implementation = pytest.mark.parametrize("implementation", list(ssd.IMPLEMENTATIONS))


@dataclasses.dataclass
class Pair:
    """One model on both sides."""

    torch: Any  # the module
    hf: Any  # Mamba2ForCausalLM
    config: config_lib.ModelConfig
    model: lm.Lm

    def with_scan(self, implementation: str) -> lm.Lm:
        """The model with this scan; chunks of 5, so that no length below is a multiple."""
        settings = dataclasses.replace(self.config.mamba2, scan=implementation, chunk_size=5)
        return mamba2.from_hf(weights_of(self.hf), dataclasses.replace(self.config, mamba2=settings))


def weights_of(hf) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in hf.state_dict().items()}


@pytest.fixture(scope="module", params=CASES)
def pair(request) -> Pair:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    hf = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**CASES[request.param], eos_token_id=None))
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            # away from ones and zeros, which would hide a parameter; dt from about 1e-4 to 1, so the state matters
            parameter += (2.0 if "dt_bias" in name else 0.25) * torch.randn_like(parameter)
    config = mamba2.config_from_hf(hf.config.to_dict())
    return Pair(torch=torch, hf=hf, config=config, model=mamba2.from_hf(weights_of(hf), config))


def draw_tokens(pair: Pair, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, pair.config.vocab_size, size=(BATCH, length), dtype=np.int32)


def gradients_of(hf) -> dict[str, np.ndarray]:
    gradients = {name: parameter.grad.numpy().copy() for name, parameter in hf.named_parameters()}
    hf.zero_grad()
    return gradients


def assert_same_gradients(pair: Pair, ours: lm.Lm, theirs: dict[str, np.ndarray]) -> None:
    converted = mamba2.to_hf(ours)
    if pair.config.tie_embeddings:
        del converted["lm_head.weight"]  # one parameter; its gradient is that of the embedding
    assert converted.keys() == theirs.keys()
    for name, expected in theirs.items():
        atol = RTOL * np.abs(expected).max()
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
    """64 tokens, both sides from a prompt that was read in chunks."""
    prompt_BL = draw_tokens(pair, 11)
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
    prompt = pair.torch.from_numpy(prompt_BL).long()
    theirs_BN = pair.hf.generate(
        prompt, attention_mask=pair.torch.ones_like(prompt), max_new_tokens=64, do_sample=False
    )[:, prompt_BL.shape[1] :].numpy()
    assert theirs_BN.shape == (BATCH, 64)
    assert all(len(set(row)) > 3 for row in theirs_BN.tolist())  # a constant would agree too easily
    np.testing.assert_array_equal(ours_BN, theirs_BN)
