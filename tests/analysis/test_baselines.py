"""Baselines are probabilities: they sum to one, equal slow loops, and equal values worked by hand."""

import collections
import itertools
import math
import time

import numpy as np
import pytest

from moejax.analysis import baselines
from moejax.data import packing
from moejax.data import pairs as pairs_lib


def objective(eot):
    return packing.NextToken(row_length=16, end_of_text=eot, isolate=True)


def rows_of(eot, *documents):
    """The documents packed into rows."""
    tokens = [np.array(document, np.int32) for document in documents]
    return packing.BestFit.make(tokens, np.array([len(t) for t in tokens]), np.arange(len(tokens)), objective(eot))


def random_documents(count, vocab_size, seed):
    """Documents over the lower ids, unevenly, so that pairs occur once, twice and often; the last id is EOT."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 12, size=count)
    return [np.minimum(rng.geometric(0.4, size=size) - 1, vocab_size - 2).tolist() for size in sizes]


def pairs_of(documents, eot):
    """The prediction problem by its definition: every document alone is [EOT, tokens, EOT]."""
    streams = [[eot, *document, eot] for document in documents]
    return [pair for stream in streams for pair in itertools.pairwise(stream)]


def slow_kneser_ney(pairs, vocab_size):
    """p(v | u) by loops over dicts."""
    counts = collections.Counter(pairs)
    once = sum(count == 1 for count in counts.values())
    twice = sum(count == 2 for count in counts.values())
    discount = once / (once + 2 * twice) if once else 0.5

    def probability(u, v):
        continuation = (sum(pair[1] == v for pair in counts) + 1) / (len(counts) + vocab_size)
        total = sum(count for pair, count in counts.items() if pair[0] == u)
        if not total:
            return continuation
        distinct = sum(pair[0] == u for pair in counts)
        return max(counts[u, v] - discount, 0) / total + discount * distinct / total * continuation

    return probability


def table(pairs, vocab_size):
    """p(v | u) of every u and v from the fast path, shape [V, V]."""
    inputs, targets = np.array(pairs, np.int32).T
    u, v = np.divmod(np.arange(vocab_size**2), vocab_size)
    return baselines.kneser_ney(inputs, targets, u, v, vocab_size).reshape(vocab_size, vocab_size)


def test_kneser_ney_worked_by_hand():
    # Tokens a=0 b=1 EOT=2. Documents "ab", "a": the pairs are (EOT,a) twice, (a,b), (b,EOT), (a,EOT) once each.
    # n1 = 3, n2 = 1, d = 3/5. Distinct inputs of a: 1, b: 1, EOT: 2; q = (2, 2, 3) / (4 + 3).
    p_VV = table(pairs_of([[0, 1], [0]], eot=2), 3)
    expected = [
        [0.6 * 2 / 2 * 2 / 7, 0.4 / 2 + 0.6 * 2 / 2 * 2 / 7, 0.4 / 2 + 0.6 * 2 / 2 * 3 / 7],
        [0.6 * 2 / 7, 0.6 * 2 / 7, 0.4 + 0.6 * 3 / 7],
        [1.4 / 2 + 0.6 / 2 * 2 / 7, 0.6 / 2 * 2 / 7, 0.6 / 2 * 3 / 7],
    ]
    np.testing.assert_allclose(p_VV, expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_kneser_ney_sums_to_one_and_is_positive_and_equals_the_slow_loop(seed):
    vocab_size = 9
    pairs = pairs_of(random_documents(20, vocab_size, seed), eot=8)
    p_VV = table(pairs, vocab_size)
    np.testing.assert_allclose(p_VV.sum(axis=1), 1, rtol=1e-12)
    assert p_VV.min() > 0
    slow = slow_kneser_ney(pairs, vocab_size)
    np.testing.assert_allclose(p_VV, [[slow(u, v) for v in range(9)] for u in range(9)], rtol=1e-12)


@pytest.mark.parametrize(
    "documents",
    [[[]], [[0]], [[0, 1]] * 3, [[0] * 50], [[0, 1], [2, 3]]],
    ids=["empty", "one token", "no pair once", "one pair often", "every pair once"],
)
def test_degenerate_corpora_still_give_every_token_a_probability(documents):
    p_VV = table(pairs_of(documents, eot=5), 6)
    np.testing.assert_allclose(p_VV.sum(axis=1), 1, rtol=1e-12)
    assert p_VV.min() > 0
    losses = baselines.compute(rows_of(5, *documents), rows_of(5, [4, 3], [0]), objective(5), 6)
    assert all(math.isfinite(loss) for loss in (losses.uniform, losses.unigram, losses.bigram))


def test_compute_equals_slow_loops_on_documents_one_by_one():
    vocab_size, eot = 9, 8
    train, validation = random_documents(30, vocab_size, 0), random_documents(15, vocab_size, 1)
    losses = baselines.compute(rows_of(eot, *train), rows_of(eot, *validation), objective(eot), vocab_size)

    train_pairs, validation_pairs = pairs_of(train, eot), pairs_of(validation, eot)
    counts = collections.Counter(target for _, target in train_pairs)
    unigram = [math.log((counts[v] + 1) / (len(train_pairs) + vocab_size)) for _, v in validation_pairs]
    probability = slow_kneser_ney(train_pairs, vocab_size)
    bigram = [math.log(probability(u, v)) for u, v in validation_pairs]
    assert losses.uniform == pytest.approx(math.log(9))
    assert losses.unigram == pytest.approx(-np.mean(unigram), rel=1e-12)
    assert losses.bigram == pytest.approx(-np.mean(bigram), rel=1e-12)


def test_a_bigram_process_is_learnt_and_the_baselines_fall_in_order():
    """Each token is followed by one of two: the bigram loss tends to the process's entropy."""
    rng = np.random.default_rng(0)
    vocab_size, eot = 50, 49

    def document():
        steps = rng.integers(1, 3, size=100)
        return ((rng.integers(eot) + np.cumsum(steps)) % eot).tolist()

    train, validation = (rows_of(eot, *(document() for _ in range(count))) for count in (500, 50))
    losses = baselines.compute(train, validation, objective(eot), vocab_size)
    entropy = (math.log(eot) + 100 * math.log(2)) / 101  # the first token is uniform; the known end costs nothing
    assert losses.uniform > losses.unigram > losses.bigram > entropy
    assert losses.bigram < entropy + 0.1  # it can't see the end come: (1 + ln 101) / 101 = 0.056 nats


def test_a_million_and_a_half_tokens_are_counted_in_seconds():
    rng = np.random.default_rng(0)
    inputs_T, targets_T = rng.integers(0, 4096, size=(2, 1_500_000), dtype=np.int32)
    start = time.perf_counter()
    baselines.kneser_ney(inputs_T, targets_T, inputs_T[:75_000], targets_T[:75_000], 4096)
    assert time.perf_counter() - start < 3


def test_no_more_pairs_are_counted_than_the_limit_and_a_row(monkeypatch):
    train = rows_of(8, *random_documents(30, 9, 0))
    monkeypatch.setattr(baselines, "MAX_PAIRS", 40)
    rows = list(itertools.islice(range(train.num_rows), 3))
    few = rows_of(8, *random_documents(30, 9, 0))
    few.rows[:] = [few.rows[row] for row in rows]
    assert sum(len(stream) - 1 for row in few.read([0, 1]) for stream in row) < 40
    assert baselines.compute(train, train, objective(8), 9) == baselines.compute(few, train, objective(8), 9)


def test_of_a_corrupted_corpus_the_pairs_are_the_decoders():
    """As slow loops find them: each target after the one before it, without padding."""
    corrupted = packing.SpanCorruption(
        inputs_length=12, noise_density=0.3, mean_span_length=2.0, first_sentinel=29, num_sentinels=10, end_of_text=9,
        pad=9, seed=0,
    )  # fmt: skip
    tokens = [np.array(document, np.int32) for document in random_documents(20, 9, 0)]
    rows = packing.Concatenate.make(tokens, np.array([len(t) for t in tokens]), np.arange(len(tokens)), corrupted)
    losses = baselines.compute(rows, rows, corrupted, 30)
    pairs = []
    for row in range(rows.num_rows):
        arrays = corrupted.arrays(rows.read([row])[0], row)
        pairs += itertools.pairwise([9, *arrays["targets_M"][arrays["loss_mask_M"]].tolist()])
    counts, probability = collections.Counter(target for _, target in pairs), slow_kneser_ney(pairs, 30)
    unigram = [math.log((counts[v] + 1) / (len(pairs) + 30)) for _, v in pairs]
    assert losses.unigram == pytest.approx(-np.mean(unigram), rel=1e-12)
    assert losses.bigram == pytest.approx(-np.mean([math.log(probability(u, v)) for u, v in pairs]), rel=1e-12)


def test_of_pairs_of_texts_what_is_predicted_is_the_targets():
    """Of [7, 8, EOT, 1, 2] that is 1 after padding, 2 after 1 and EOT after 2, whatever the input is."""
    objective = pairs_lib.TextToText(inputs_length=4, targets_length=4, end_of_text=9, pad=0)
    texts = (([7, 8], [1, 2]), ([8], [1]), ([7], [2, 2, 1]))
    documents = [np.array(pairs_lib.join(*pair, 9), np.int32) for pair in texts]
    rows = packing.Pad(documents, objective, np.arange(3))
    found = baselines.compute(rows, rows, objective, 10)
    predicted = [(0, 1), (1, 2), (2, 9), (0, 1), (1, 9), (0, 2), (2, 2), (2, 1), (1, 9)]
    counts, probability = collections.Counter(target for _, target in predicted), slow_kneser_ney(predicted, 10)
    unigram = [math.log((counts[v] + 1) / (len(predicted) + 10)) for _, v in predicted]
    assert found.unigram == pytest.approx(-np.mean(unigram), rel=1e-12)
    assert found.bigram == pytest.approx(-np.mean([math.log(probability(u, v)) for u, v in predicted]), rel=1e-12)
