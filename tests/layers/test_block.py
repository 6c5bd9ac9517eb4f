"""A residual block is x + the sum of its branches of norm(x), and nothing in it looks ahead or over a boundary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import config as config_lib
from moejax.layers import block, mamba, mamba2

D_MODEL = 8
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0]])  # two documents and one padding token
LENGTH = SEGMENTS.shape[1]
MIXES_TIME = {"mamba": True, "attention": True, "mlp": False, "moe": False, "mamba|moe": True, "mamba2": True}


def settings(**changes):
    config = config_lib.ModelConfig(d_model=D_MODEL, **changes)
    config.mamba.d_state, config.mamba.chunk_size, config.attention.num_heads = 2, 3, 2
    config.mamba2 = config_lib.Mamba2Config(d_state=2, d_head=4, num_groups=2, chunk_size=3)
    config.mlp.d_ff, config.mlp.activation = 8, "gelu"
    config.moe = config_lib.MoeConfig(num_experts=3, d_expert=8, activation="gelu", top_k=2, capacity_factor=0.5)
    return config


def make(sublayer, **changes):
    return block.Block(sublayer, settings(**changes), rngs=nnx.Rngs(params=0))


def draw(seed=1):
    return np.random.default_rng(seed).normal(size=(1, LENGTH, D_MODEL)).astype(np.float32)


@pytest.mark.parametrize("sublayer", list(MIXES_TIME))
def test_no_output_depends_on_a_later_token_or_on_another_document(sublayer, fill):
    """By the gradient of every output with respect to every input; inside a document the past does count."""
    module, weight = fill(lambda: make(sublayer)), draw(2)

    @jax.jit
    @jax.jacrev
    def jacobian(x):
        return (module(x, segment_ids_BL=SEGMENTS, train=True)[0] * weight).sum(axis=-1)[0]

    reach = np.abs(jacobian(draw()))[:, 0].max(axis=-1)  # [output, input]
    same = SEGMENTS[0][:, None] == SEGMENTS[0]
    allowed = np.tri(LENGTH, dtype=bool) & (same if MIXES_TIME[sublayer] else np.eye(LENGTH, dtype=bool))
    np.testing.assert_array_equal(reach > 0, allowed)


@pytest.mark.parametrize("sublayer", ["moe", "mamba|moe"])
def test_later_tokens_change_no_earlier_output_not_even_by_drops(sublayer, fill):
    """A drop has no gradient, so here the later tokens change outright."""
    module, x = fill(lambda: make(sublayer)), draw()
    run = jax.jit(functools.partial(module, train=True))
    y, aux = run(x)
    assert all(layer.dropped > 0 for layer in aux)
    for seed in (3, 4):
        changed = np.concatenate([x[:, :5], draw(seed)[:, 5:]], axis=1)
        np.testing.assert_array_equal(run(changed)[0][:, :5], y[:, :5])


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_parallel_branches_add_up_over_one_norm(norm, fill):
    module, x = fill(lambda: make("attention|mlp|moe", norm=norm)), draw()

    @jax.jit
    def both(module, x):
        normed = module.norm(x)
        attention, mlp, moe = module.branches
        return module(x), x + attention(normed) + mlp(normed) + moe(normed)[0]

    (y, aux), expected = both(module, x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert len(aux) == 1  # one MoE branch


def test_the_residual_stream_is_float32_around_bfloat16_branches():
    module = jax.eval_shape(lambda: make("mamba|moe|mlp|attention|mamba2", compute_dtype="bfloat16"))
    assert [type(branch).__name__ for branch in module.branches] == ["Mamba", "Moe", "Mlp", "Attention", "Mamba2"]
    assert {branch.dtype for branch in module.branches} == {jnp.dtype("bfloat16")}
    x = jax.ShapeDtypeStruct((1, 4, D_MODEL), jnp.float32)
    assert jax.eval_shape(lambda module, x: module(x)[0], module, x).dtype == jnp.float32


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_out_proj_is_rescaled_by_the_number_of_residual_branches(kind):
    changes = {"prefix": ("mamba",), "period": ("mamba", "moe"), "num_periods": 4}  # 9 sublayers

    def out_projections():
        for rescale in (True, False):
            (branch,) = make(kind, rescale_out_proj=rescale, **changes).branches
            assert isinstance(branch, mamba.Mamba | mamba2.Mamba2)
            yield branch.out_proj[...]

    rescaled, plain = jax.jit(lambda: list(out_projections()))()
    np.testing.assert_allclose(3 * rescaled, plain, rtol=1e-6)


def test_an_unknown_branch_is_an_error_that_names_the_known_ones():
    known = "mamba, mamba2, mamba_moe, attention, cross_attention, mlp, moe"
    with pytest.raises(ValueError, match=f"sublayer=rnn is not known; choose one of {known}"):
        make("rnn")
