"""Span corruption is T5's, token for token; loses nothing; fits exactly; and depends on (seed, row) alone."""

import itertools

import numpy as np
import pytest
import slow_corruption
from slow_corruption import DENSITY, FIRST, MEAN, NUM, make_mask, make_tokens, spans_of

from moejax import config as config_lib
from moejax.data import corruption, randomness

# The 99.9% points of chi-square, by degrees of freedom. The seeds are fixed, so a test passes always or never.
CHI_SQUARE = {14: 36.12, 83: 128.56, 99: 148.23, 481: 582.57}


# ---- How many tokens, how many spans ----


@pytest.mark.parametrize(
    ("length", "density", "mean", "num_noise", "num_spans"),
    [
        (568, 0.15, 3.0, 85, 28),  # 85.2, 28.3
        (100, 0.15, 3.0, 15, 5),
        (10, 0.15, 3.0, 2, 1),  # 1.5 rounds to even; 0.67
        (30, 0.15, 3.0, 4, 1),  # 4.5 rounds to even; 1.33
        (20, 0.25, 2.0, 5, 2),  # 2.5 rounds to even
        (28, 0.25, 2.0, 7, 4),  # 3.5 rounds to even
        (2, 0.15, 3.0, 1, 1),  # 0.3 and 0.33 are lifted to 1
        (3, 0.9, 3.0, 2, 1),  # 2.7 leaves no token
        (10, 0.8, 1.0, 8, 2),  # 8 spans would need 8 tokens between them; 2 are left
        (10, 0.5, 1.0, 5, 5),
        (1, 0.15, 3.0, 0, 0),
        (0, 0.15, 3.0, 0, 0),
    ],
)
def test_counts_worked_by_hand(length, density, mean, num_noise, num_spans):
    assert corruption.counts(length, density, mean) == (num_noise, num_spans)


SETTINGS = list(itertools.product([0.02, 0.15, 0.3, 0.5, 0.7, 0.95], [1.0, 1.5, 2.0, 3.0, 8.0, 64.0]))


@pytest.mark.parametrize(("density", "mean"), SETTINGS)
def test_no_count_falls_when_a_row_grows(density, mean):
    table = [(length, *corruption.counts(length, density, mean)) for length in range(700)]
    for (length, noise, spans), (_, noise_after, spans_after) in itertools.pairwise(table):
        assert noise_after - noise in (0, 1)
        assert spans_after - spans in (0, 1)
        assert spans <= min(noise, length - noise)


@pytest.mark.parametrize(
    ("inputs_length", "density", "mean", "tokens_length", "targets_length"),
    [
        (512, 0.15, 3.0, 568, 114),  # T5: 85 of 568 are noise in 28 spans; 483 + 28 + 1 and 85 + 28 + 1
        (10, 0.15, 3.0, 10, 4),  # 10: 2 in 1 span, 8 + 1 + 1; 11 has 2 too and 11 inputs
        (20, 0.15, 1.0, 19, 7),  # 19: 3 in 3 spans; each span is as long as its sentinel
        (12, 0.5, 3.0, 16, 12),  # 16: 8 in 3 spans, 8 + 3 + 1 both; 17 has 9 + 3 + 1 inputs
        (11, 0.5, 3.0, 14, 11),  # 15: 7 + 3 + 1 inputs, 8 + 3 + 1 targets: longer, so one token less
        (3, 0.15, 3.0, 2, 3),  # one token stays, one is noise
        (4, 0.15, 3.0, 3, 3),  # T5's helper says 4 and 2: no noise in 3, no span in 4, where its mask has one
    ],
)
def test_raw_length_worked_by_hand(inputs_length, density, mean, tokens_length, targets_length):
    assert corruption.raw_length(inputs_length, density, mean) == (tokens_length, targets_length)


INPUTS_LENGTHS = [*range(3, 60), 114, 256, 512]


def lengths_of(tokens_length, density, mean):
    """Inputs and targets, with a sentinel a span and EOS."""
    num_noise, num_spans = corruption.counts(tokens_length, density, mean)
    return tokens_length - num_noise + num_spans + 1, num_noise + num_spans + 1


@pytest.mark.parametrize(("density", "mean"), SETTINGS)
def test_raw_length_is_the_most_that_fits(density, mean):
    for inputs_length in INPUTS_LENGTHS:
        most = next(n for n in itertools.count(1) if lengths_of(n + 1, density, mean)[0] > inputs_length)
        inputs, targets = lengths_of(most, density, mean)
        if density == 0.5 and targets > inputs:
            most, targets = most - 1, targets - 1
            assert lengths_of(most, density, mean)[1] <= targets
        assert corruption.raw_length(inputs_length, density, mean) == (most, targets)


@pytest.mark.parametrize(("density", "mean"), SETTINGS)
def test_raw_length_equals_t5_wherever_no_count_is_lifted_or_limited(density, mean):
    num_equal = 0
    for inputs_length in INPUTS_LENGTHS:
        t5_tokens_length, t5_targets_length = slow_corruption.t5_raw_length(inputs_length, density, mean)
        if all(
            slow_corruption.t5_lengths(length, density, mean) == lengths_of(length, density, mean)
            for length in range(t5_tokens_length, t5_tokens_length + 3)  # those that decide
        ):
            num_equal += 1
            assert corruption.raw_length(inputs_length, density, mean) == (t5_tokens_length, t5_targets_length)
    if density <= 0.5 and 2 <= mean <= 3:
        assert num_equal > (45 if density > 0.02 else 2)  # at 0.02 most rows have one span at the least


# ---- Which tokens ----


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.3, 1.0), (0.5, 2.0), (0.15, 8.0)])
def test_rows_equal_t5_token_for_token(density, mean):
    lengths = [2, 3, 5, 10, 31, 64, 200, 568, *range(11, 60, 6)]
    for index, length in enumerate(lengths * 10):
        num_noise, _ = corruption.counts(length, density, mean)
        keys = randomness.bits(9, "span_corruption", index, length)
        mask = corruption.noise_mask(length, density, mean, 9, index)
        expected_mask = slow_corruption.t5_noise_mask(
            length,
            density,
            mean,
            slow_corruption.shuffle_by(keys[: num_noise - 1]),
            slow_corruption.shuffle_by(keys[num_noise - 1 : length - 2]),
        )
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected_mask)
        tokens = make_tokens(length, index)
        inputs, targets = corruption.corrupt(tokens, mask, FIRST, 200)
        assert inputs.dtype == targets.dtype == np.int32
        np.testing.assert_array_equal(
            inputs, slow_corruption.t5_noise_span_to_unique_sentinel(tokens, expected_mask, FIRST + 1)
        )
        np.testing.assert_array_equal(
            targets, slow_corruption.t5_noise_span_to_unique_sentinel(tokens, ~expected_mask, FIRST + 1)
        )


def test_a_row_too_short_to_corrupt_stays_as_in_t5():
    for length in (0, 1):
        expected = slow_corruption.t5_noise_mask(
            length, DENSITY, MEAN, lambda entries: entries, lambda entries: entries
        )
        assert corruption.noise_mask(length, DENSITY, MEAN, 0, 0).tolist() == expected.tolist() == [False] * length


def test_golden_mask():
    """Rows of earlier runs are drawn again only while this holds."""
    mask = corruption.noise_mask(40, 0.3, 2.0, seed=42, row=7)
    assert "".join(map(str, mask.astype(int))) == "0000001100000101100011100000000000011011"


@pytest.mark.parametrize("length", [2, 7, 33, 100, 568])
def test_every_mask_has_the_same_counts_and_runs_from_a_kept_token_to_noise(length):
    num_noise, num_spans = corruption.counts(length, DENSITY, MEAN)
    for row in range(300):
        mask = corruption.noise_mask(length, DENSITY, MEAN, 3, row)
        assert mask.shape == (length,)
        assert mask.sum() == num_noise
        assert [is_noise for is_noise, _ in spans_of(mask)] == [False, True] * num_spans


def test_noise_is_15_percent_in_spans_of_3_on_average():
    masks = [corruption.noise_mask(568, DENSITY, MEAN, 0, row) for row in range(2000)]
    assert {int(mask.sum()) for mask in masks} == {85}
    lengths = [length for mask in masks for is_noise, length in spans_of(mask) if is_noise]
    assert np.mean(lengths) == pytest.approx(85 / 28)
    # A part of a uniform composition of 85 into 28 is 1 with probability 27 / 84.
    assert np.mean(np.array(lengths) == 1) == pytest.approx(27 / 84, abs=0.01)


@pytest.mark.parametrize(("length", "density", "mean", "num_masks"), [(10, 0.4, 2.0, 15), (12, 0.5, 2.0, 100)])
def test_all_masks_are_equally_likely(length, density, mean, num_masks):
    """4 of 10 in 2 spans: C(3, 1) * C(5, 1) pairs of compositions; 6 of 12 in 3: C(5, 2)**2."""
    num_noise, num_spans = corruption.counts(length, density, mean)
    possible = {}
    for places in itertools.combinations(range(length), num_noise):
        mask = np.isin(np.arange(length), places)
        if [is_noise for is_noise, _ in spans_of(mask)] == [False, True] * num_spans:
            possible[mask.tobytes()] = 0
    assert len(possible) == num_masks
    for row in range(100 * num_masks):
        possible[corruption.noise_mask(length, density, mean, 1, row).tobytes()] += 1
    assert sum((count - 100) ** 2 / 100 for count in possible.values()) < CHI_SQUARE[num_masks - 1]


def test_spans_are_cut_at_every_gap_equally_often():
    """Of n gaps k are drawn without replacement: sum (count - rk/n)**2 / (rk/n (1 - k/n)) * (n - 1) / n, chi-square."""
    num_rows, num_cuts = 2000, 27
    for kind, num_tokens in ((True, 85), (False, 483)):
        counts = np.zeros(num_tokens + 1)
        for row in range(num_rows):
            mask = corruption.noise_mask(568, DENSITY, MEAN, 2, row)
            counts[np.cumsum([length for is_noise, length in spans_of(mask) if is_noise == kind])] += 1
        assert counts[-1] == num_rows
        num_gaps = num_tokens - 1
        share = num_cuts / num_gaps
        squares = (counts[1:-1] - num_rows * share) ** 2 / (num_rows * share * (1 - share))
        assert squares.sum() * (num_gaps - 1) / num_gaps < CHI_SQUARE[num_gaps - 1]


def test_a_mask_depends_on_seed_and_row_alone():
    def mask(seed, row):
        return corruption.noise_mask(568, DENSITY, MEAN, seed, row).tobytes()

    keys = [(seed, row) for seed in range(3) for row in range(100)]
    forwards = {key: mask(*key) for key in keys}
    np.random.seed(1)  # the global stream is not used
    assert {key: mask(*key) for key in reversed(keys)} == forwards
    assert len(set(forwards.values())) == len(keys)


# ---- Inputs and targets ----


def test_the_example_of_the_paper():
    """Thank you [for inviting] me to your party [last] week."""
    tokens = np.array([11, 12, 13, 14, 15, 16, 17, 18, 19, 20], np.int32)
    mask = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 0], bool)
    inputs, targets = corruption.corrupt(tokens, mask, 99, 10)
    assert inputs.tolist() == [11, 12, 99, 15, 16, 17, 18, 98, 20]
    assert targets.tolist() == [99, 13, 14, 98, 19]
    assert inputs.dtype == targets.dtype == np.int32
    assert mask.tolist() == [False] * 2 + [True] * 2 + [False] * 4 + [True, False]


@pytest.mark.parametrize(
    ("mask", "inputs", "targets"),
    [
        ([1, 0, 0, 1], [99, 6, 7, 98], [99, 5, 98, 8]),
        ([1, 1, 1, 1], [99], [99, 5, 6, 7, 8]),
        ([0, 0, 0, 0], [5, 6, 7, 8], []),
        ([1, 0, 1, 0], [99, 6, 98, 8], [99, 5, 98, 7]),
        ([], [], []),
    ],
)
def test_masks_at_the_edges_worked_by_hand(mask, inputs, targets):
    tokens = np.array([5, 6, 7, 8][: len(mask)], np.int32)
    results = corruption.corrupt(tokens, np.array(mask, bool), 99, 2)
    assert [result.tolist() for result in results] == [inputs, targets]
    assert [result.dtype for result in results] == [np.int32] * 2
    assert slow_corruption.restore(*results, 99, 2).tolist() == tokens.tolist()


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_any_mask_equals_the_slow_definition_and_is_restored(share, dtype):
    for seed in range(60):
        length = seed % 40 + 1
        tokens = make_tokens(length, seed).astype(dtype)
        mask = make_mask(length, share, seed)
        inputs, targets = corruption.corrupt(tokens, mask, FIRST, NUM)
        assert (inputs.tolist(), targets.tolist()) == slow_corruption.slow_corrupt(tokens, mask, FIRST)
        assert (inputs.dtype, targets.dtype) == (np.int32, np.int32)
        np.testing.assert_array_equal(slow_corruption.restore(inputs, targets, FIRST, NUM), tokens)


def test_more_spans_than_sentinels_are_refused_and_as_many_are_not():
    tokens, mask = make_tokens(6), np.array([0, 1, 0, 1, 0, 1], bool)
    inputs, _ = corruption.corrupt(tokens, mask, 99, 3)
    assert inputs[5] == 97
    message = "a row of 6 tokens has 3 noise spans, but there are 2 sentinels; raise data.mean_span_length, or lower"
    with pytest.raises(config_lib.ConfigError, match=message):
        corruption.corrupt(tokens, mask, 99, 2)
