"""A language model is its blocks in order: isolated documents, one meaning for every way to run it, known sizes."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import config as config_lib
from moejax.models import lm

VOCAB, D_MODEL = 11, 8
MIXED = {"prefix": ("attention",), "period": ("mamba|moe", "mamba2"), "num_periods": 2, "suffix": ("mlp",)}


def settings(**changes):
    config = config_lib.ModelConfig(vocab_size=VOCAB, d_model=D_MODEL, num_periods=1)
    config.mamba.d_state, config.mamba.chunk_size, config.attention.num_heads = 2, 3, 2
    config.mamba2 = config_lib.Mamba2Config(d_state=2, d_head=4, num_groups=2, chunk_size=3)
    config.mlp.d_ff = 8
    config.moe = config_lib.MoeConfig(num_experts=3, d_expert=8, activation="gelu", top_k=2)
    config.moe.capacity_factor = config.moe.eval_capacity_factor = 0
    return dataclasses.replace(config, **changes)


def make(config):
    return lm.Lm(config, rngs=nnx.Rngs(params=0))


def draw_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, size=shape).astype(np.int32)


def count(config):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(lambda: make(config))))


def unstack(model):
    """Every block of the model in depth order, as a Python list."""
    periods = [] if model.periods is None else range(model.num_periods)
    periods = [jax.tree.map(lambda x, i=i: x[i], model.periods) for i in periods]
    return [*model.prefix, *(layer for period in periods for layer in period.blocks), *model.suffix]


apply = jax.jit(lambda layer, x: layer(x))  # compiled once a kind of layer


def run_unstacked(model, tokens):
    """The model as a Python loop over its blocks: logits, and the statistics of each MoE layer."""
    x, aux = model.embedding[...][tokens], []
    for layer in unstack(model):
        x, layer_aux = apply(layer, x)
        aux += layer_aux
    return model.norm(x) @ model.head[...], jax.tree.map(lambda *leaves: jnp.stack(leaves), *aux)


def test_scanned_periods_equal_a_loop_over_their_blocks():
    """Logits, and the statistics of every MoE layer in depth order, of a model at its own initial weights."""
    pattern = {"prefix": ("moe",), "period": ("moe", "mlp|moe"), "num_periods": 2, "suffix": ("mlp", "moe")}
    config = settings(**pattern, tie_embeddings=False, init_scale=4.0, embedding_std=1.0)
    model, tokens = jax.jit(lambda: make(config))(), draw_tokens(2, 6)
    logits, aux = jax.jit(lambda model: model(tokens))(model)
    expected_logits, expected_aux = run_unstacked(model, tokens)
    assert len(np.unique(expected_aux.entropy)) == 6  # six MoE layers, no two alike
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4)
    for actual, expected in zip(jax.tree.leaves(aux), jax.tree.leaves(expected_aux), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_gradients_through_scanned_periods_equal_those_through_a_loop(fill):
    config = settings(period=("mlp", "moe"), num_periods=3, tie_embeddings=False)
    model, tokens = jax.tree.map(jnp.asarray, fill(lambda: make(config))), draw_tokens(2, 6)
    weight = np.random.default_rng(1).normal(size=(2, 6, VOCAB)).astype(np.float32)

    def gradient(forward):
        def loss(model):
            logits, aux = forward(model, tokens)
            return (weight * logits).sum() + aux.losses["balance"] @ jnp.arange(1.0, 4.0)

        return jax.grad(loss)

    expected = jax.jit(gradient(run_unstacked))(model)
    actual = jax.jit(gradient(lambda model, tokens: model(tokens)))(model)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()))


def test_remat_changes_the_program_and_no_number(fill):
    tokens, results = draw_tokens(1, 6), []
    for remat in ("none", "period"):
        model = fill(lambda remat=remat: make(settings(period=("mamba",), num_periods=2, remat=remat)))
        gradient = jax.grad(lambda model: jnp.square(model(tokens)[0]).mean())
        program = str(jax.make_jaxpr(gradient)(model))
        assert bool(re.search(r"\b(remat2?|checkpoint)\[", program)) == (remat == "period")
        results.append(jax.jit(gradient)(model))
    for plain, recomputed in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(recomputed, plain, atol=1e-5 * max(1e-3, np.abs(plain).max()))


def test_the_program_does_not_grow_with_depth():
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)

    def num_lines(num_periods):
        model = jax.eval_shape(lambda: make(settings(period=("mamba", "moe"), num_periods=num_periods)))
        return jax.jit(lambda model, tokens: model(tokens)).lower(model, tokens).as_text().count("\n")

    assert num_lines(2) == num_lines(7) > 100


def test_step_after_step_equals_the_row(fill):
    """Mixed patterns, attention caches longer than the row, no drops in either."""
    model, tokens = fill(lambda: make(settings(**MIXED))), draw_tokens(2, 6)

    @jax.jit
    def both(model):
        step = lambda cache, token_B: model.step(token_B, cache)[::-1]  # noqa: E731
        _, logits_LBV = jax.lax.scan(step, model.init_cache(2, 8), tokens.T)
        return logits_LBV.swapaxes(0, 1), model(tokens)[0]

    stepped, whole = both(model)
    np.testing.assert_allclose(stepped, whole, atol=1e-5 * np.abs(whole).max())


def test_logits_depend_on_no_later_token_not_even_by_drops(fill):
    """Bit for bit; the blocks have their laws by gradient."""
    config = settings(**MIXED)
    config.moe.capacity_factor = 0.5
    model, tokens = fill(lambda: make(config)), draw_tokens(2, 8)
    run = jax.jit(lambda model, tokens: model(tokens, train=True))
    logits, aux = run(model, tokens)
    assert (aux.dropped > 0).all()
    for seed in (1, 2, 3):
        changed = np.concatenate([tokens[:, :5], draw_tokens(2, 3, seed=seed)], axis=1)
        np.testing.assert_array_equal(run(model, changed)[0][:, :5], logits[:, :5])


def test_tied_embeddings_are_the_head_and_an_untied_head_is_its_own(fill):
    tied, untied = (settings(period=("mlp",), tie_embeddings=tie) for tie in (True, False))
    assert count(untied) - count(tied) == VOCAB * D_MODEL
    model = fill(lambda: make(tied))
    assert model.head is None
    x = model.embedding[...][draw_tokens(1, 3)]

    @jax.jit
    def logits(model):
        (layer,) = unstack(model)
        return model(draw_tokens(1, 3))[0], model.norm(layer(x)[0]) @ model.embedding[...].T

    actual, expected = logits(model)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_without_a_final_norm_the_head_reads_the_residual_stream(fill):
    config = settings(period=("mlp",), final_norm=False, tie_embeddings=False)
    model = fill(lambda: make(config))
    assert model.norm is None

    @jax.jit
    def both(model):
        (layer,) = unstack(model)
        return model(draw_tokens(1, 3))[0], layer(model.embedding[...][draw_tokens(1, 3)])[0] @ model.head[...]

    actual, expected = both(model)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_without_moe_layers_there_are_no_statistics():
    model, tokens = jax.eval_shape(lambda: make(settings(period=("mlp",)))), jax.ShapeDtypeStruct((1, 3), jnp.int32)
    assert jax.eval_shape(lambda model, tokens: model(tokens)[1], model, tokens) is None


def test_parameter_counts_are_those_of_the_papers():
    """A Mamba layer of width 512; Mamba-25M and MoE-Mamba-25M of arXiv 2401.04081 without embedding and head."""
    base = {"d_model": 512, "norm": "layernorm", "final_norm": False, "vocab_size": 1}
    layer_norm, embedding = 2 * 512, 512
    one = config_lib.ModelConfig(period=("mamba",), num_periods=1, **base)
    assert count(one) - embedding - layer_norm == 1_694_720
    mamba_25m = dataclasses.replace(one, num_periods=16)
    assert count(mamba_25m) - embedding == 27_131_904
    moe = config_lib.MoeConfig(num_experts=42, d_expert=1536)
    moe_mamba_25m = config_lib.ModelConfig(period=("mamba", "moe"), num_periods=8, moe=moe, **base)
    assert count(moe_mamba_25m) - embedding == 542_228_480


def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_router_and_logits_in_float32(fill):
    """The gradient is float32 and finite, from the first step."""
    config = settings(period=("mamba|moe",), compute_dtype="bfloat16")
    config.moe.num_experts = 7  # no other dim is 7, so a product that ends in 7 is the router's
    model, tokens = fill(lambda: make(config)), draw_tokens(2, 6)

    def run(model):
        def loss(model):
            logits, aux = model(tokens, train=True)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0]) + aux.losses["balance"].mean(), logits

        return jax.grad(loss, has_aux=True)(model)

    gradient, logits = jax.jit(run)(model)
    assert logits.dtype == jnp.float32
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(lambda: make(config)))} == {jnp.dtype("float32")}
    program = str(jax.make_jaxpr(lambda model: model(tokens))(model))
    products = re.findall(r":(\w+)\[([\d,]*)\] = dot_general", program)
    assert {dtype for dtype, shape in products if shape.endswith(",7")} == {"f32"}
    assert "bf16" in {dtype for dtype, _ in products}
