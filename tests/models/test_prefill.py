"""Reading a prompt in parallel equals reading it token by token, and padding reaches nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import config as config_lib
from moejax.layers import block
from moejax.models import lm

VOCAB = 11
PATTERNS = {
    "mamba, moe": {"period": ("mamba", "moe"), "num_periods": 1},
    "mamba2, mamba_moe": {"period": ("mamba2", "mamba_moe"), "num_periods": 1},
    "mixed": {"prefix": ("attention",), "period": ("mamba|moe",), "num_periods": 2, "suffix": ("mlp", "attention")},
}
LENGTHS = (2, 9, 6)  # the first is shorter than the convolution's window
WIDTH, MORE = 12, 4  # of the padded rows; tokens to go on by
# padding on the left and on the right of each prompt
SIDES = {"left": [WIDTH - n for n in LENGTHS], "right": [0, 0, 0], "both": [3, 1, 2]}


def make_config(pattern, **moe):
    config = config_lib.ModelConfig(vocab_size=VOCAB, d_model=8, **pattern)
    config.mamba.d_state, config.mamba.chunk_size, config.attention.num_heads = 2, 3, 2
    config.mlp.d_ff = 8
    config.mamba2.d_state, config.mamba2.d_head, config.mamba2.chunk_size = 3, 4, 3
    config.mamba.moe_projections = ("conv", "gate", "out")
    config.moe = config_lib.MoeConfig(**{"num_experts": 4, "d_expert": 8, "top_k": 2} | moe, dispatch="capacity")
    config.moe.eval_capacity_factor = 0.0
    return config


def make(pattern, **moe):
    return lm.Lm(make_config(pattern, **moe), rngs=nnx.Rngs(params=0))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, size=shape).astype(np.int32)


def place(rows, starts, garbage):
    """Prompts in wider rows whose padding holds any ids: (tokens_BL, valid_BL)."""
    tokens, valid = draw(len(rows), WIDTH, seed=garbage), np.zeros((len(rows), WIDTH), bool)
    for row, start, length, prompt in zip(range(len(rows)), starts, LENGTHS, rows, strict=True):
        tokens[row, start : start + length] = prompt[:length]
        valid[row, start : start + length] = True
    return tokens, valid


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_prompts_padded_on_either_side_go_on_as_if_they_were_not(pattern, fill):
    """Logits after the prompt and after each of 4 more tokens, against whole rows of the forward pass without padding
    before them. 1e-5 of the largest: float32 sums in another order. Other ids in the padding change not a bit.
    """
    model, rows = fill(lambda: make(pattern)), draw(3, max(LENGTHS) + MORE)
    ends = np.array(LENGTHS)

    @jax.jit
    def go_on(model, tokens, valid):
        logits, cache = model.prefill(tokens, max_length=WIDTH + MORE, valid_BL=valid)
        next_tokens = jnp.asarray(rows)[np.arange(3)[:, None], ends[:, None] + np.arange(MORE)]
        step = lambda cache, token_B: model.step(token_B, cache)[::-1]  # noqa: E731
        return jnp.concatenate([logits[None], jax.lax.scan(step, cache, next_tokens.T)[1]])

    whole = np.asarray(jax.jit(lambda model: model(rows)[0])(model))
    expected = np.stack([whole[np.arange(3), ends - 1 + step] for step in range(MORE + 1)])
    for starts in SIDES.values():
        logits = [np.asarray(go_on(model, *place(rows, starts, garbage))) for garbage in (1, 2)]
        np.testing.assert_allclose(logits[0], expected, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_array_equal(logits[0], logits[1])


def test_padding_goes_to_no_expert():
    """A residual block leaves it as it is, bit for bit, and nothing else."""
    config = make_config({"period": ("moe",)})
    layer = jax.jit(lambda: block.Block("moe", config, rngs=nnx.Rngs(params=0)))()
    x, segments = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32), np.array([[0, 0, 1, 1], [1] * 4])
    y, _ = jax.jit(lambda layer: layer.prefill(x, max_length=4, segment_ids_BL=segments))(layer)
    np.testing.assert_array_equal((y == x).all(axis=2), segments == 0)


def test_labels_of_rows_reach_the_experts_of_the_prompt(fill):
    model = fill(lambda: make({"period": ("mamba", "moe"), "num_periods": 1}, router="label", top_k=0))
    tokens, labels = draw(3, 5), np.array([1, 3, 0], np.int32)
    whole = jax.jit(lambda model: model(tokens, labels_BL=np.repeat(labels[:, None], 5, axis=1))[0][:, -1])(model)
    prefill = jax.jit(lambda model, labels: model.prefill(tokens, max_length=5, labels_B=labels)[0])
    np.testing.assert_allclose(prefill(model, labels), whole, atol=1e-5 * np.abs(whole).max())
    assert np.abs(prefill(model, labels[::-1].copy()) - whole).max() > 1e-2


@pytest.mark.parametrize("sublayer", ["mamba", "mamba2", "attention"])
def test_2048_steps_equal_the_row(sublayer, fill):
    """1e-4 of logits of size one."""
    model, tokens = fill(lambda: make({"period": (sublayer,), "num_periods": 1})), draw(1, 2048)

    @jax.jit
    def both(model):
        step = lambda cache, token_B: model.step(token_B, cache)[::-1]  # noqa: E731
        _, logits_LBV = jax.lax.scan(step, model.init_cache(1, 2048), tokens.T)
        return logits_LBV.swapaxes(0, 1), model(tokens)[0]

    stepped, whole = both(model)
    assert 0.5 < np.std(whole) < 10
    np.testing.assert_allclose(stepped, whole, atol=1e-4)


def test_a_prompt_longer_than_the_cache_is_one_line(fill):
    model = jax.eval_shape(lambda: make(PATTERNS["mixed"]))
    with pytest.raises(ValueError, match="a row of 6 positions is over max_length=5; raise it or cut the row"):
        jax.eval_shape(lambda model: model.prefill(draw(1, 6), max_length=5), model)


def test_a_router_that_looks_ahead_can_not_read_a_prompt():
    model = jax.eval_shape(lambda: make(PATTERNS["mamba, moe"], router="soft_moe", top_k=0))
    with pytest.raises(ValueError, match="router=soft_moe needs all tokens of a group; it can't generate"):
        jax.eval_shape(lambda model: model.prefill(draw(1, 6), max_length=5), model)
