"""Relative positions have T5's buckets; attention with a bias, a memory or dropout is the softmax of its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import attention, dropout

BATCH, LENGTH, MEMORY, HEADS, WIDTH = 2, 4, 6, 2, 3


def bucket(distance, num_buckets=32, max_distance=128, causal=False):
    return np.asarray(
        attention.relative_bucket(
            jnp.asarray(distance), num_buckets=num_buckets, max_distance=max_distance, causal=causal
        )
    )


def test_buckets_of_a_table_worked_by_hand():
    """8 buckets to distance 16. Both ways: 4 a direction, of them 0 and 1 exact, then 2 to 5 (sqrt(2 * 16) = 5.7) and
    the rest. Causal: 0 to 3 exact, then equal ratios of 16 / 4, by sqrt(2): from 4, 5.7, 8 and 11.3 on."""
    past = np.array([0, -1, -2, -5, -6, -15, -16, -100])
    np.testing.assert_array_equal(bucket(past, 8, 16), [0, 1, 2, 2, 3, 3, 3, 3])
    np.testing.assert_array_equal(bucket(-past, 8, 16), [0, 5, 6, 6, 7, 7, 7, 7])
    past = np.array([0, -1, -3, -4, -5, -6, -7, -8, -11, -12, -16, -100])
    np.testing.assert_array_equal(bucket(past, 8, 16, causal=True), [0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7])
    np.testing.assert_array_equal(bucket(-past, 8, 16, causal=True), 0)


@pytest.mark.parity
@pytest.mark.parametrize("sizes", [(32, 128), (16, 64), (64, 512), (8, 20)])
@pytest.mark.parametrize("causal", [False, True])
def test_buckets_equal_t5s_for_all_distances_up_to_512(sizes, causal):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = np.arange(-512, 513)
    theirs = modeling.T5Attention._relative_position_bucket(
        torch.tensor(distance), bidirectional=not causal, num_buckets=sizes[0], max_distance=sizes[1]
    )
    np.testing.assert_array_equal(bucket(distance, *sizes, causal), theirs.numpy())


def test_a_bias_depends_on_head_and_distance_alone():
    table = np.arange(8 * HEADS, dtype=np.float32).reshape(8, HEADS)
    for causal in (False, True):
        bias = np.asarray(attention.relative_bias(jnp.asarray(table), 9, max_distance=16, causal=causal))
        for head, query, key in np.ndindex(HEADS, 9, 9):
            assert bias[head, query, key] == table[bucket(key - query, 8, 16, causal), head]


def attend(query, key, value, bias, keep, seen):
    """By loops in float64; seen[b][l] are the keys of a query."""
    y = np.zeros(query.shape)
    for b, t, h in np.ndindex(query.shape[:3]):
        places = seen[b][t]
        score = [query[b, t, h] @ key[b, s, h] / np.sqrt(query.shape[3]) + bias[h, t, s] for s in places]
        weight = np.exp(score) / np.exp(score).sum() * keep[b, h, t, places]
        y[b, t, h] = weight @ value[b, places, h]
    return y


@pytest.mark.parametrize("case", ["causal", "both ways", "memory"])
def test_values_and_gradients_with_a_bias_and_dropout_equal_a_loop(case, slope):
    """Also of the bias. 1e-5: float32 softmax over a few terms of size one."""
    rng, length = np.random.default_rng(0), MEMORY if case == "memory" else LENGTH
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    query, dy = (draw(BATCH, LENGTH, HEADS, WIDTH) for _ in range(2))
    key, value = (draw(BATCH, length, HEADS, WIDTH) for _ in range(2))
    bias = draw(HEADS, LENGTH, length)
    keep = rng.integers(0, 2, size=(BATCH, HEADS, LENGTH, length)) / np.float32(0.5)
    ids = np.array([[1, 1, 2, 2], [1, 1, 1, 0]])
    memory_ids = np.array([[1, 2, 2, 2, 1, 0], [1, 1, 1, 0, 0, 0]]) if case == "memory" else ids
    causal = case == "causal"
    seen = [
        [[s for s in range(t + 1 if causal else length) if memory_ids[b, s] == ids[b, t]] for t in range(LENGTH)]
        for b in range(BATCH)
    ]
    for factors in (np.ones_like(keep), keep):

        @jax.jit
        def run(query, key, value, bias, factors=factors):
            outputs = functools.partial(
                attention.attention,
                segment_ids_BL=ids,
                memory_ids_BM=memory_ids if case == "memory" else None,
                causal=causal,
                keep_BHLM=None if factors.min() == 1 else factors,
            )
            y, pull = jax.vjp(lambda q, k, v, bias: outputs(q, k, v, bias_HLM=bias), query, key, value, bias)
            return y, pull(dy)

        inputs = [query, key, value, bias]
        y, gradients = run(*inputs)
        np.testing.assert_allclose(y, attend(*inputs, factors, seen), atol=1e-5)
        for place, gradient in enumerate(gradients):

            def loss(x, place=place, factors=factors, inputs=inputs):
                return (dy * attend(*inputs[:place], x, *inputs[place + 1 :], factors, seen)).sum()

            direction = rng.normal(size=inputs[place].shape)
            assert (gradient * direction).sum() == pytest.approx(slope(loss, inputs[place], direction), rel=1e-3)


def test_without_documents_of_their_own_queries_see_all_of_a_memory_but_its_padding():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 3, 1, WIDTH)).astype(np.float32) for _ in range(3))
    memory_ids = np.array([[1, 1, 0]])
    seen = attention.attention(query, key[:, :2], value[:, :2], causal=False)
    padded = attention.attention(query, key, value, memory_ids_BM=memory_ids, causal=False)
    np.testing.assert_allclose(padded, seen, atol=1e-6)


def test_a_query_that_sees_nothing_is_finite_with_and_without_dropout():
    x = np.ones((1, 2, 1, WIDTH), np.float32)
    for keep in (None, np.ones((1, 1, 2, 2), np.float32)):
        y = attention.attention(
            x, x, x, segment_ids_BL=np.array([[1, 2]]), memory_ids_BM=np.array([[1, 1]]), causal=False, keep_BHLM=keep
        )
        assert np.isfinite(y).all()


def test_dropout_keeps_the_mean_and_draws_a_row_by_its_key_alone():
    """Of 10,000 draws at rate 0.2: the share kept within 4 standard deviations, 0.016."""
    keys = jax.random.split(jax.random.key(0), 3)
    factors = np.asarray(dropout.factors(keys, (3, 100, 100), 0.2))
    assert set(np.unique(factors)) == {0.0, np.float32(1.25)}
    assert np.abs((factors > 0).mean(axis=(1, 2)) - 0.8).max() < 0.016
    np.testing.assert_array_equal(dropout.factors(keys[1:2], (1, 100, 100), 0.2)[0], factors[1])
    assert (factors[0] != factors[1]).mean() > 0.2
    x = np.ones((3, 4), np.float32)
    assert dropout.dropout(x, None, 0.5) is x
    assert dropout.dropout(x, keys, 0.0) is x
