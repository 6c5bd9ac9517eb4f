"""Generation is the model's own forward pass; draws follow their definition; rows do not feel one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import config as config_lib
from moejax.models import generate, lm
from moejax.models import model as model_lib

VOCAB, ALLOWED = 16, 12  # the last four ids are beyond the tokenizer
PROMPTS = [[0, 3, 1], [0, 7], [0, 2, 2, 9, 4]]
NUM_TOKENS = 20  # more than one call of the device draws


def make():
    config = config_lib.ModelConfig(vocab_size=VOCAB, d_model=8, prefix=("attention",), period=("mamba|moe",))
    config.num_periods, config.attention.num_heads, config.mamba.d_state = 2, 2, 2
    config.moe = config_lib.MoeConfig(num_experts=5, d_expert=8, eval_capacity_factor=0.0, dispatch="capacity")
    return lm.Lm(config, rngs=nnx.Rngs(params=0))


@pytest.fixture(scope="module")
def model(fill):
    model = fill(make)
    model.embedding[...][ALLOWED:] *= 3  # an unmasked argmax would often fall here
    return model


def start(model, prompts=PROMPTS, keys=(0, 1, 2), temperature=0.0, end_of_text=-1):
    return generate.Writer(
        model,
        prompts,
        jax.vmap(jax.random.key)(np.array(keys)),
        num_tokens=NUM_TOKENS,
        settings=generate.Settings(temperature=temperature),
        vocab_size=ALLOWED,
        end_of_text=end_of_text,
    )


def finish(writer, chunk=generate.CHUNK):
    tokens = [writer.advance(chunk)]
    while not writer.done().all():
        tokens.append(writer.advance(chunk))
    return np.concatenate(tokens, axis=1)


@pytest.fixture(scope="module")
def greedy(model):
    return finish(start(model))


def test_greedy_equals_the_argmax_of_a_full_forward_pass_at_every_token(model, greedy):
    """Over the tokenizer's ids alone. Rows are padded on the right, which a causal model ignores."""
    forward = jax.jit(lambda model, tokens: model(tokens)[0])
    rows, ends = np.zeros((3, 5 + NUM_TOKENS), np.int32), np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in zip(rows, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    masked = False
    for step in range(NUM_TOKENS):
        logits = np.asarray(forward(model, rows))[np.arange(3), ends + step - 1]
        rows[np.arange(3), ends + step] = logits[:, :ALLOWED].argmax(axis=1)
        masked |= bool((logits.argmax(axis=1) >= ALLOWED).any())
    assert masked  # the limit on ids did count
    assert len(np.unique(greedy)) > 2  # a constant would agree too easily
    for row, end, tokens in zip(rows, ends, greedy, strict=True):
        np.testing.assert_array_equal(tokens, row[end : end + NUM_TOKENS])


def test_a_row_is_continued_alike_alone_and_in_any_batch_token_by_token_and_in_chunks(model):
    """Drawn at a temperature: the same keys give the same tokens, others give others."""
    batch = finish(start(model, temperature=1.0))
    assert batch.max() < ALLOWED
    reordered = finish(start(model, [PROMPTS[2], PROMPTS[0], PROMPTS[1]], (2, 0, 1), temperature=1.0), chunk=1)
    np.testing.assert_array_equal(reordered, batch[[2, 0, 1]])
    alone = finish(start(model, PROMPTS[:1], (0,), temperature=1.0))
    np.testing.assert_array_equal(alone, batch[:1])
    other = finish(start(model, keys=(0, 1, 5), temperature=1.0))
    np.testing.assert_array_equal(other[:2], batch[:2])
    assert (other[2] != batch[2]).any()


def test_end_of_text_ends_a_row_and_the_last_row_to_end_ends_the_loop(model, greedy):
    """A row repeats end_of_text from there on; rows that go on are as before. `stop` ends a row from outside."""
    token = next(token for token in greedy[0].tolist() if any(token not in row for row in greedy[1:]))
    ended = finish(start(model, end_of_text=token))
    assert ended.shape[1] == NUM_TOKENS
    for before, after in zip(greedy.tolist(), ended.tolist(), strict=True):
        end = before.index(token) if token in before else NUM_TOKENS
        assert after == before[:end] + [token] * (NUM_TOKENS - end)
    writer = start(model, end_of_text=token)
    writer.advance()
    writer.stop(np.array([True, True, True]))
    assert writer.done().all()
    assert writer.advance().shape == (3, 0)
    at_once = int(greedy[0, 0])
    np.testing.assert_array_equal(finish(start(model, PROMPTS[:1], (0,), end_of_text=at_once)), [[at_once]])
    assert not start(model, PROMPTS[:1], (0,), end_of_text=at_once).done().any()  # its first token is still to come


def test_the_cache_is_written_where_it_lies(model):
    """No allocation a token: every buffer of the cache is the one from before, and what was there is gone."""
    writer = start(model)
    writer.advance()
    before = jax.tree.leaves(writer.state.cache)
    places = [leaf.unsafe_buffer_pointer() for leaf in before if leaf.ndim]
    writer.advance()
    assert all(leaf.is_deleted() for leaf in before)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(writer.state.cache) if leaf.ndim] == places


def test_a_prompt_without_a_token_is_refused(model):
    with pytest.raises(ValueError, match="a prompt has no token"):
        start(model, [[0], []], (0, 1))


def draws(logits, num, *, top_k=0, temperature=1.0, top_p=1.0, seed=0):
    """How often each token came."""
    run = jax.jit(generate.sample, static_argnames="top_k")
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (num, len(logits)))
    tokens = run(rows, jax.random.split(jax.random.key(seed), num), temperature=temperature, top_k=top_k, top_p=top_p)
    assert tokens.dtype == jnp.int32
    return np.bincount(tokens, minlength=len(logits))


def nucleus(prob, top_k, top_p):
    """The distribution over the candidates, float64, by adding one token after another."""
    order = sorted(range(len(prob)), key=lambda token: (-prob[token], token))[: top_k or None]
    total, kept, mass = sum(prob[token] for token in order), [], 0.0
    for token in order:
        if mass < top_p:
            kept.append(token)
            mass += prob[token] / total
    weight = np.zeros(len(prob))
    weight[kept] = prob[kept]
    return weight / weight.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 2, 1.0), (1.0, 99, 1.0), (1.0, 0, 0.75), (2.0, 0, 0.9), (1.0, 99, 0.5)],
)
def test_samples_follow_the_softmax_over_the_candidates(temperature, top_k, top_p):
    """20,000 draws: a share is within 0.015 (4 sigma) of its probability, and none is beyond the candidates."""
    prob = np.array([0.35, 0.1, 0.25, 0.2, 0.1])
    tempered = prob ** (1 / temperature) / (prob ** (1 / temperature)).sum()
    expected = nucleus(tempered, top_k, top_p)
    share = draws(np.log(prob), 20_000, temperature=temperature, top_k=top_k, top_p=top_p) / 20_000
    np.testing.assert_allclose(share, expected, atol=0.015)
    np.testing.assert_array_equal(share > 0, expected > 0)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 0.01, [0]),
        (0, 0.39, [0]),
        (0, 0.41, [0, 2]),
        (0, 0.69, [0, 2]),
        (0, 0.71, [0, 2, 1]),  # 1 and 3 are equally probable: the lower id
        (0, 0.86, [0, 1, 2, 3]),
        (0, 1.0, [0, 1, 2, 3]),
        (2, 0.55, [0]),  # of the two, 4/7 = 0.571
        (2, 0.58, [0, 2]),
        (3, 1.0, [0, 1, 2]),
    ],
)
def test_candidates_of_a_table_worked_by_hand(top_k, top_p, kept):
    counts = draws(np.log([0.4, 0.15, 0.3, 0.15]), 500, top_k=top_k, top_p=top_p)
    np.testing.assert_array_equal(np.flatnonzero(counts), sorted(kept))


def test_one_candidate_no_temperature_and_next_to_none_are_greedy():
    logits = np.random.default_rng(0).normal(size=7)
    for settings in ({"temperature": 0.7, "top_k": 1}, {"temperature": 0.0}, {"temperature": 1e-30}, {"top_p": 1e-6}):
        np.testing.assert_array_equal(np.flatnonzero(draws(logits, 50, **settings)), [logits.argmax()])


def test_prompts_are_padded_to_few_lengths_and_by_at_most_a_fourth():
    padded = [generate.padded_length(length) for length in range(1, 5000)]
    assert all(length <= to <= max(length + 15, 1.25 * length) for length, to in enumerate(padded, start=1))
    assert len(set(padded)) < 40
    assert len({to for to in padded if 1024 < to <= 2048}) == 4


def test_a_mamba_models_cache_has_one_size_and_attention_adds_keys_and_values(fill):
    """Mamba: d_conv - 1 inputs and d_state states a channel, float32; attention: two vectors of d_model a position."""
    config = config_lib.ModelConfig(vocab_size=VOCAB, d_model=8, period=("mamba", "moe"), num_periods=2)
    config.mamba.d_state, config.attention.num_heads = 2, 2
    for length in (128, 32_768):
        assert generate.cache_size(model_lib.abstract(config), length) == (2 * 16 * (3 + 2) * 4, False)
    config.suffix = ("attention",)
    sizes = [generate.cache_size(model_lib.abstract(config), length) for length in (128, 32_768)]
    assert all(size.grows for size in sizes)
    assert sizes[1].num_bytes - sizes[0].num_bytes == (32_768 - 128) * 2 * 8 * 4
