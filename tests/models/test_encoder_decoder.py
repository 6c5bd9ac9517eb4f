"""An encoder-decoder is two stacks: the decoder sees the past and all that the encoder has read, and no padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import config as config_lib
from moejax.models import encoder_decoder, generate
from moejax.models import model as model_lib
from moejax.ops import dropout

VOCAB, D_MODEL, LENGTH, TARGETS = 13, 8, 6, 4
ENCODER_MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
DEEP = {"num_encoder_periods": 2, "num_periods": 3}
DECODER_MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])


def settings(**changes):
    """A Switch Transformer of one sparse layer of two in both stacks."""
    config = config_lib.ModelConfig(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        encoder_period=("attention", "mlp", "attention", "moe"),
        num_encoder_periods=1,
        period=("attention", "cross_attention", "mlp", "attention", "cross_attention", "moe"),
        num_periods=1,
        tie_embeddings=False,
    )
    config.attention = config_lib.AttentionConfig(
        num_heads=2, d_head=3, position="relative", num_buckets=8, max_distance=9
    )
    config.mlp.d_ff = 8
    config.moe = config_lib.MoeConfig(router="switch", num_experts=3, d_expert=8, capacity_factor=0.0)
    config.moe.eval_capacity_factor = 0.0
    return dataclasses.replace(config, **changes)


def make(config):
    return encoder_decoder.EncoderDecoder(config, rngs=nnx.Rngs(params=0))


def draw_tokens(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(0, VOCAB, size=(2, length)).astype(np.int32) for length in (LENGTH, TARGETS))


@jax.jit
def run(model, inputs, targets):
    return model(inputs, targets, encoder_segment_ids_BL=ENCODER_MASK, decoder_segment_ids_BM=DECODER_MASK)


def rms(x, scale, eps=1e-5):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def bucket(distance, causal):
    """T5's, of 8 buckets to distance 9."""
    count, first, steps = (8, 0, max(-distance, 0)) if causal else (4, 4 * (distance > 0), abs(distance))
    exact = count // 2
    far = exact + int(np.log(max(steps, 1) / exact) / np.log(9 / exact) * (count - exact))
    return first + (steps if steps < exact else min(far, count - 1))


def attend(x, memory, query, key, value, out, sees, table=None, causal=False):
    """One row, by loops over heads and positions."""
    y = np.zeros(x.shape)
    for h in range(query.shape[1]):
        q, k, v = x @ query[:, h], memory @ key[:, h], memory @ value[:, h]
        for t in range(len(x)):
            places = [s for s in range(len(memory)) if sees[t, s]]
            bias = [0.0 if table is None else table[bucket(s - t, causal), h] for s in places]
            weight = np.exp([q[t] @ k[s] / np.sqrt(query.shape[2]) + b for s, b in zip(places, bias, strict=True)])
            if places:
                y[t] += weight @ v[places] / weight.sum() @ out[h]
    return y


def by_loops(model, inputs, targets):
    """Logits of the counted targets in float64, layer after layer, from the formulas of T5 and Switch."""
    model = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model)
    logits = np.zeros((2, TARGETS, VOCAB))
    for b in range(2):
        memory = stack_by_loops(model.encoder, model.embedding[...][inputs[b]], ENCODER_MASK[b], None, None)
        x = stack_by_loops(model.decoder, model.embedding[...][targets[b]], DECODER_MASK[b], memory, ENCODER_MASK[b])
        logits[b] = x @ model.head[...]
    return logits


def stack_by_loops(stack, x, mask, memory, memory_mask):
    causal, length = memory is not None, len(x)
    sees = (mask[:, None] == mask) & (np.tri(length, dtype=bool) if causal else True)
    for period in range(stack.num_periods):
        for block in stack.periods.blocks:
            branch, normed = block.branches[0], rms(x, block.norm.scale[...][period])
            get = lambda name, branch=branch, period=period: getattr(branch, name)[...][period]  # noqa: E731
            match type(branch).__name__:
                case "Attention":
                    qkv = get("qkv")
                    y = attend(normed, normed, *qkv, get("out"), sees, stack.relative.table[...], causal)
                case "CrossAttention":
                    sees_memory = np.tile(memory_mask == 1, (length, 1))
                    y = attend(normed, memory, get("query"), *get("kv"), get("out"), sees_memory)
                case "Mlp":
                    y = np.maximum(normed @ get("up"), 0) @ get("down")
                case "Moe":
                    logits = normed @ branch.router.weight[...][period]
                    prob = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
                    y = np.zeros(x.shape)
                    for t, e in enumerate(prob.argmax(axis=1)):
                        y[t] = mask[t] * prob[t, e] * np.maximum(normed[t] @ get("up")[e], 0) @ get("down")[e]
            x = x + y
    return rms(x, stack.norm.scale[...])


def test_logits_equal_loops_over_layers_heads_and_positions(fill):
    model, (inputs, targets) = fill(lambda: make(settings(**DEEP))), draw_tokens()
    logits, _ = run(model, inputs, targets)
    counted = DECODER_MASK == 1
    expected = by_loops(model, inputs, targets)[counted]
    np.testing.assert_allclose(logits[counted], expected, atol=2e-5 * np.abs(expected).max())


def test_a_target_depends_on_its_past_and_the_whole_encoder_and_on_no_padding(fill):
    """Bit for bit, in both directions: what it may see changes it."""
    model, (inputs, targets) = fill(lambda: make(settings(**DEEP))), draw_tokens()
    logits, _ = run(model, inputs, targets)
    counted = DECODER_MASK == 1
    for change_at, mask, of in ((4, ENCODER_MASK, 0), (2, DECODER_MASK, 1)):
        tokens = [inputs.copy(), targets.copy()]
        padding = mask == 0
        tokens[of][padding] = (tokens[of][padding] + 1) % VOCAB
        np.testing.assert_array_equal(run(model, *tokens)[0][counted], logits[counted])
        tokens = [inputs.copy(), targets.copy()]
        tokens[of][0, change_at] = (tokens[of][0, change_at] + 1) % VOCAB
        changed = (np.asarray(run(model, *tokens)[0]) != logits).any(axis=2)
        assert not changed[1].any()
        # from an encoder's token everything follows, from a decoder's what comes after it
        np.testing.assert_array_equal(changed[0][:3], [True] * 3 if of == 0 else [False, False, True])


def test_statistics_are_those_of_the_encoder_and_then_of_the_decoder(fill):
    """By depth; each layer has the tokens of its stack, and -1 for the preference of those of the other."""
    config = settings(**DEEP)
    model, (inputs, targets) = fill(lambda: make(config)), draw_tokens()
    _, aux = run(model, inputs, targets)
    np.testing.assert_array_equal(aux.count_E.sum(axis=1), [ENCODER_MASK.sum()] * 2 + [DECODER_MASK.sum()] * 3)
    of_encoder = np.arange(LENGTH + TARGETS) < LENGTH
    for layer, preferred in enumerate(aux.preferred_BL):
        mine = of_encoder if layer < 2 else ~of_encoder
        assert (preferred[:, ~mine] == -1).all()
        mask = ENCODER_MASK if layer < 2 else DECODER_MASK
        np.testing.assert_array_equal(preferred[:, mine] == config.moe.num_experts, mask == 0)
    places = [np.arange(5)[place].tolist() for _, place in model_lib.moe_layers(model)]
    assert places == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_routing_group_is_the_same_rows_in_both_stacks(rows, fill):
    """At one slot an expert and group: what is dropped is what overflows it, among the tokens of so many rows."""
    config = settings(encoder_period=("moe",), period=("cross_attention", "moe"))
    config.moe.eval_capacity_factor, config.moe.group_size = 1e-3, 0 if rows == 1 else rows * LENGTH
    _, aux = run(fill(lambda: make(config)), *draw_tokens())
    for layer, tokens in enumerate((slice(0, LENGTH), slice(LENGTH, None))):
        dropped = 0
        for group in np.split(np.asarray(aux.preferred_BL[layer])[:, tokens], 2 // rows):
            count_E = np.bincount(group.ravel(), minlength=4)[:3]
            dropped += np.maximum(count_E - 1, 0).sum()
        assert aux.dropped[layer] == dropped > 0


def test_a_group_that_is_no_whole_rows_is_refused():
    config = settings()
    config.moe.group_size = 3
    model = jax.eval_shape(lambda: make(config))
    with pytest.raises(ValueError, match="group_size=3 is not whole rows of 6 tokens"):
        jax.eval_shape(model, *draw_tokens())


SMALL = {"encoder_period": ("attention",), "period": ("cross_attention", "mlp")}


def test_a_tied_head_is_the_embedding_scaled_as_in_t5_1_0_if_asked(fill):
    tokens, results = draw_tokens(), []
    for scaled in (False, True):
        model = fill(lambda scaled=scaled: make(settings(**SMALL, tie_embeddings=True, scale_tied_logits=scaled)))
        assert model.head is None
        results.append(np.asarray(run(model, *tokens)[0]))
    np.testing.assert_allclose(results[1], results[0] / np.sqrt(D_MODEL), rtol=1e-5)


def test_dropout_is_for_training_and_a_rows_own(fill):
    """Another key is another result; without keys or in evaluation there is none; a row does not feel the others."""
    tokens, keys = draw_tokens(), jax.random.split(jax.random.key(0), 2)
    model, plain = (fill(lambda rate=rate: make(settings(**SMALL, dropout=rate))) for rate in (0.3, 0.0))

    @functools.partial(jax.jit, static_argnames="train")
    def logits(model, keys, inputs, targets, train=True):
        return model(inputs, targets, keys_B=keys, train=train)[0]

    drawn, expected = logits(model, keys, *tokens), logits(plain, None, *tokens)
    np.testing.assert_allclose(logits(model, None, *tokens), expected, atol=1e-6)
    np.testing.assert_allclose(logits(model, keys, *tokens, train=False), expected, atol=1e-6)
    assert (drawn != logits(model, keys[::-1], *tokens)).any(axis=2).all()
    flipped = logits(model, keys[::-1], *(x[::-1] for x in tokens))
    np.testing.assert_allclose(flipped[::-1], drawn, atol=1e-5)


def test_dropout_is_in_every_place_of_t5(monkeypatch):
    """Embedding and end of both stacks; of a branch its output, and of all but experts what is inside."""
    drawn, factors = [], dropout.factors
    monkeypatch.setattr(dropout, "factors", lambda keys, shape, rate: drawn.append(shape) or factors(keys, shape, rate))
    tokens, keys = draw_tokens(), jax.random.split(jax.random.key(0), 2)

    def places(**changes):
        drawn.clear()
        model = jax.eval_shape(lambda: make(settings(**changes)))
        jax.eval_shape(lambda model: model(*tokens, keys_B=keys, train=True), model)
        return sorted(drawn)

    assert places(**SMALL) == []
    ends = [(2, LENGTH, D_MODEL), (2, TARGETS, D_MODEL)] * 2
    of_attention = [(2, 2, LENGTH, LENGTH), (2, LENGTH, D_MODEL)]
    of_cross_attention = [(2, 2, TARGETS, LENGTH), (2, TARGETS, D_MODEL)]
    of_mlp = [(2, TARGETS, 8), (2, TARGETS, D_MODEL)]
    expected = sorted([*ends, *of_attention, *of_cross_attention, *of_mlp])
    assert places(**SMALL, dropout=0.1) == expected
    with_experts = SMALL | {"period": ("cross_attention", "mlp", "moe")}
    assert places(**with_experts, dropout=0.1) == sorted([*expected, (2, TARGETS, D_MODEL)])


def test_steps_after_prompts_of_unequal_length_equal_the_row_and_the_greedy_writer_takes_their_best(fill):
    """Also where the blocks are unstacked, as the writer has them."""
    layers = {"encoder_period": ("attention", "moe"), "period": ("attention", "cross_attention", "moe")}
    model = jax.tree.map(jnp.asarray, fill(lambda: make(settings(**layers, num_periods=2))))
    inputs, _ = draw_tokens()
    prompts = [row[mask == 1].tolist() for row, mask in zip(inputs, ENCODER_MASK, strict=True)]
    writer = generate.Writer(
        model,
        prompts,
        jax.random.split(jax.random.key(0), 2),
        num_tokens=TARGETS,
        settings=generate.Settings(temperature=0.0),
        vocab_size=VOCAB,
        end_of_text=-1,
        start=5,
    )
    drawn = np.concatenate([writer.advance(), writer.advance()], axis=1)
    targets = np.concatenate([np.full((2, 1), 5, np.int32), drawn[:, :-1].astype(np.int32)], axis=1)

    @jax.jit
    def both(model):
        whole, _ = model(inputs, targets, encoder_segment_ids_BL=ENCODER_MASK)
        first, cache = model.prefill(inputs, start_B=targets[:, 0], max_length=8, valid_BL=ENCODER_MASK == 1)
        step = lambda cache, token_B: model.step(token_B, cache)[::-1]  # noqa: E731
        _, rest = jax.lax.scan(step, cache, targets[:, 1:].T)
        return whole, jnp.concatenate([first[None], rest]).swapaxes(0, 1)

    whole, stepped = both(model)
    np.testing.assert_allclose(stepped, whole, atol=1e-5 * np.abs(whole).max())
    np.testing.assert_array_equal(drawn, whole.argmax(axis=2))
    assert generate.cache_size(model, 8).grows
