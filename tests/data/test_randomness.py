"""Draws depend on (seed, purpose, index) alone, are the same with every numpy, and are uniform and independent."""

import hashlib
import itertools

import numpy as np
import pytest

from moejax.data import randomness

# The 99.9% points of chi-square, by degrees of freedom. The seeds are fixed, so a test passes always or never.
CHI_SQUARE = {5: 20.52, 63: 103.44, 99: 148.23, 255: 330.52}


def chi_square(counts, expected):
    return float(((np.asarray(counts) - expected) ** 2 / expected).sum())


def philox(counter, key):
    """Philox4x64-10 on Python integers, from the paper: four words for a counter of four and a key of two."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(10):
        product0, product1 = x0 * 0xD2E7470EE14C6C93, x2 * 0xCA5A826395121157
        x0, x1, x2, x3 = (
            (product1 >> 64) ^ x1 ^ key0,
            product1 % 2**64,
            (product0 >> 64) ^ x3 ^ key1,
            product0 % 2**64,
        )
        key0, key1 = (key0 + 0x9E3779B97F4A7C15) % 2**64, (key1 + 0xBB67AE8584CAA73B) % 2**64
    return [x0, x1, x2, x3]


def slow_bits(seed, purpose, index, count):
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest(), "little"), index
    words = itertools.chain.from_iterable(philox((block, 0, 0, 0), key) for block in itertools.count(1))
    return list(itertools.islice(words, count))


def test_the_slow_philox_gives_the_known_answers_of_random123():
    assert philox((0, 0, 0, 0), (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@pytest.mark.parametrize(
    ("seed", "purpose", "index"),
    [(0, "shuffle", 0), (42, "span_corruption", 7), (-1, "", 2**64 - 1), (2**80, "π", 2**63 + 1)],
)
def test_bits_are_the_stream_of_philox_under_the_documented_key(seed, purpose, index):
    assert randomness.bits(seed, purpose, index, 11).tolist() == slow_bits(seed, purpose, index, 11)


def test_golden_values():
    """Data of earlier runs is drawn again only while these hold."""
    bits = randomness.bits(42, "span_corruption", 7, 4)
    assert bits.dtype == np.uint64
    assert bits.tolist() == [0xCB063CC045E9192A, 0x1E02A208E9CC574F, 0x004BC5FA50F89790, 0xA5D8B9BF45D8DA58]
    below = randomness.below(randomness.bits(42, "below", 0, 10), 1000)
    assert below.dtype == np.int64
    assert below.tolist() == [697, 193, 319, 815, 873, 152, 82, 681, 480, 32]
    order = randomness.permutation(42, "shuffle", 3, 10)
    assert order.dtype == np.int64
    assert order.tolist() == [3, 7, 0, 6, 8, 9, 2, 4, 5, 1]


@pytest.mark.parametrize(("seed", "index"), [(1, 2), (np.int32(1), np.int64(2))])
def test_more_words_continue_the_same_stream_and_numpy_integers_are_integers(seed, index):
    longer = randomness.bits(1, "a", 2, 1001)
    for count in (0, 1, 3, 4, 5, 1000):
        np.testing.assert_array_equal(randomness.bits(seed, "a", index, count), longer[:count])


def test_every_part_of_the_key_changes_every_word():
    words = [
        randomness.bits(seed, purpose, index, 50)
        for seed in (0, 1, 11, -1)
        for purpose in ("", "a", "b", "1:a", ":a")
        for index in (0, 1, 2**32, 2**63)
    ]
    assert len(np.unique(np.concatenate(words))) == 50 * len(words)


def test_an_index_out_of_range_is_refused():
    for index in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"index={index} must lie in \[0, 2\*\*64\)"):
            randomness.bits(0, "a", index, 1)


def test_every_byte_of_the_words_is_uniform():
    words = randomness.bits(0, "uniform", 0, 100_000).view(np.uint8).reshape(-1, 8)
    for byte in range(8):
        assert chi_square(np.bincount(words[:, byte], minlength=256), 100_000 / 256) < CHI_SQUARE[255]


@pytest.mark.parametrize(
    ("seed", "purpose", "index"), [(1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 2**32)], ids=str
)
def test_streams_of_neighbouring_keys_are_independent(seed, purpose, index):
    """Pairs of words at the same place fall uniformly on 8 x 8 cells."""
    one, other = randomness.bits(0, "a", 0, 50_000), randomness.bits(seed, purpose, index, 50_000)
    cells = randomness.below(one, 8) * 8 + randomness.below(other, 8)
    assert chi_square(np.bincount(cells, minlength=64), 50_000 / 64) < CHI_SQUARE[63]


def test_first_words_of_consecutive_indices_are_uniform_and_independent():
    """What rows draw: few words of many streams."""
    first = randomness.below(np.concatenate([randomness.bits(3, "rows", index, 1) for index in range(20_001)]), 8)
    cells = first[:-1] * 8 + first[1:]
    assert chi_square(np.bincount(cells, minlength=64), 20_000 / 64) < CHI_SQUARE[63]


def test_below_is_the_floor_of_the_scaled_upper_53_bits_and_never_the_bound():
    words = np.array([0, 2**11 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 2**11, 2**64 - 1], np.uint64)
    for bound in (1, 2, 8, 1024, 2**53):  # powers of two scale without rounding
        assert randomness.below(words, bound).tolist() == [(word >> 11) * bound >> 53 for word in words.tolist()]
    for bound in (3, 7, 1000, 2**31 - 1, 10**9 + 7, 2**52 + 1, 2**53 - 1):
        draws = randomness.below(words, bound)
        assert draws[0] == 0
        assert draws[-1] == bound - 1
    assert randomness.below(words.reshape(7, 1), 5).shape == (7, 1)


def test_below_is_uniform():
    draws = randomness.below(randomness.bits(0, "below", 0, 100_000), 100)
    assert chi_square(np.bincount(draws, minlength=100), 1000) < CHI_SQUARE[99]


@pytest.mark.parametrize("bound", [0, -3, 2**53 + 1])
def test_a_bound_out_of_range_is_refused(bound):
    with pytest.raises(ValueError, match=rf"bound={bound} must lie in \[1, 2\*\*53\]"):
        randomness.below(np.zeros(1, np.uint64), bound)


@pytest.mark.parametrize("length", [0, 1, 2, 17, 10_000])
def test_a_permutation_holds_every_position_once(length):
    assert sorted(randomness.permutation(5, "shuffle", 1, length).tolist()) == list(range(length))


def test_the_six_orders_of_three_are_equally_likely():
    orders = [tuple(randomness.permutation(0, "orders", index, 3).tolist()) for index in range(12_000)]
    counts = [orders.count(order) for order in itertools.permutations(range(3))]
    assert sum(counts) == 12_000
    assert chi_square(counts, 2000) < CHI_SQUARE[5]


def test_permutations_of_other_seeds_purposes_and_indices_differ():
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    assert len({tuple(randomness.permutation(*key, 50).tolist()) for key in keys}) == len(keys)
    assert randomness.permutation(0, "a", 0, 50).tolist() == randomness.permutation(0, "a", 0, 50).tolist()
