"""Documents packed into rows are to a model what they are alone, on one device and with their rows split over several.

A document alone lies at the start of a row of its own. What follows it there is another matter: a causal model does not
look ahead, and nothing is dropped. So what is right does not lean on what is tested, the boundaries.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import config as config_lib
from moejax import partition
from moejax.models import lm

BATCH, LENGTH, VOCAB = 2, 16, 16
# Where documents lie: (row, first position, end). With parts of 4 positions: boundaries between parts (4, 8, 12), two
# documents in the reach of the next one's convolution, one over three parts; the rest of the second row is padding.
DOCUMENTS = [(0, 0, 3), (0, 3, 4), (0, 4, 6), (0, 6, 16), (1, 0, 4), (1, 4, 12), (1, 12, 15)]
MESHES = {
    "one device": {},
    "sequence=4": {"data": 2, "sequence": 4},
    "sequence=2 data=2 tensor=2": {"data": 2, "sequence": 2, "tensor": 2},
}
MODELS = {
    "mamba": {"period": ("mamba",)},
    "mamba2": {"period": ("mamba2",)},
    "attention": {"period": ("attention", "mlp")},
    "mixture": {"period": ("mamba|attention", "moe", "mamba2", "mamba_moe")},
}


def make_model(name):
    config = config_lib.ModelConfig(**{"vocab_size": VOCAB, "d_model": 8, "num_periods": 1, **MODELS[name]})
    config.attention.num_heads, config.mamba.d_state, config.mamba.chunk_size = 2, 3, 4
    config.mlp.d_ff = 16
    config.mamba2.d_state, config.mamba2.d_head, config.mamba2.chunk_size = 3, 4, 3
    if "mamba_moe" in config.period:
        config.mamba.moe_projections = ("conv", "out")
    # drops nothing; by capacity, which is a third of what grouped products take to compile
    config.moe = config_lib.MoeConfig(num_experts=4, d_expert=8, top_k=2, capacity_factor=0, dispatch="capacity")
    return lm.Lm(config, rngs=nnx.Rngs(params=0))


def run(model, batch):
    """logits_BLV, and the gradient of the summed cross-entropy of the positions that count."""

    def loss(model):
        logits_BLV, aux = model(
            batch["tokens"], segment_ids_BL=batch["segments"], positions_BL=batch["positions"], train=True
        )
        target_BL = jnp.take_along_axis(logits_BLV, batch["targets"][..., None], axis=-1)[..., 0]
        dropped = 0 if aux is None else aux.dropped.sum()
        nats_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - target_BL
        return jnp.sum(nats_BL * batch["counts"]), (logits_BLV, dropped)

    gradient, (logits_BLV, dropped) = jax.grad(loss, has_aux=True)(model)
    return logits_BLV, gradient, dropped


@functools.cache
def jitted(sizes):
    """The mesh, and `run` on it."""
    mesh = partition.make_mesh(config_lib.MeshConfig(**{"data": 1, **MESHES[sizes]}),
                               None if MESHES[sizes] else jax.devices()[:1])  # fmt: skip
    return mesh, jax.jit(partition.on_mesh(mesh, run))


def run_on(sizes, model, batch):
    mesh, step = jitted(sizes)
    placed = jax.device_put(model, partition.tree_shardings(model, mesh))
    logits_BLV, gradient, dropped = jax.device_get(step(placed, jax.device_put(batch, partition.batch_sharding(mesh))))
    assert dropped == 0
    return logits_BLV, jax.tree.leaves(gradient)


def packed_batch():
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32) for name in ("tokens", "targets")}
    batch |= {name: np.zeros((BATCH, LENGTH), np.int32) for name in ("segments", "positions", "counts")}
    for row, first, end in DOCUMENTS:
        batch["segments"][row, first:end] = batch["segments"][row].max() + 1
        batch["positions"][row, first:end] = np.arange(end - first)
        batch["counts"][row, first:end] = 1
    return batch


def alone(model):
    """Of each document its logits, and the sum of all their gradients: two documents at a time, on one device."""
    packed, logits, total = packed_batch(), [], None
    for pair in (DOCUMENTS[i : i + BATCH] for i in range(0, len(DOCUMENTS), BATCH)):
        batch = {name: np.zeros((BATCH, LENGTH), np.int32) for name in packed}
        batch["segments"][:] = 1  # one document a row
        batch["positions"][:] = np.arange(LENGTH)
        for place, (row, first, end) in enumerate(pair):
            for name in ("tokens", "targets", "counts"):
                batch[name][place, : end - first] = packed[name][row, first:end]
        logits_BLV, gradient = run_on("one device", model, batch)
        logits += [logits_BLV[place, : end - first] for place, (_, first, end) in enumerate(pair)]
        total = gradient if total is None else [a + b for a, b in zip(total, gradient, strict=True)]
    assert total is not None
    return logits, total


@pytest.fixture(scope="module")
def models(fill):
    """By name: a model, and what its documents are alone."""

    @functools.cache
    def of(name):
        model = fill(lambda: make_model(name))
        return model, alone(model)

    return of


def largest_difference(actual, expected):
    """(of logits, of gradients), over the size of the largest."""
    (logits_BLV, gradient), (documents, total) = actual, expected
    differences = [
        np.abs(logits_BLV[row, first:end] - document_LV).max() / np.abs(document_LV).max()
        for (row, first, end), document_LV in zip(DOCUMENTS, documents, strict=True)
    ]
    size = max(np.abs(leaf).max() for leaf in total)
    return max(differences), max(np.abs(a - b).max() / size for a, b in zip(gradient, total, strict=True))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [(name, sizes) for name in MODELS for sizes in MESHES if "tensor" not in sizes or name == "mamba2"],
)
def test_packed_documents_have_the_logits_and_gradients_that_they_have_alone(models, name, sizes):
    model, expected = models(name)
    assert max(largest_difference(run_on(sizes, model, packed_batch()), expected)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", ["one device", "sequence=4"])
def test_without_segment_ids_they_have_not(models, name, sizes):
    """The same law, of rows that are said to be one document: documents leak into those after them."""
    model, expected = models(name)
    merged = packed_batch() | {"segments": np.ones((BATCH, LENGTH), np.int32)}
    assert min(largest_difference(run_on(sizes, model, merged), expected)) > 1e-2
