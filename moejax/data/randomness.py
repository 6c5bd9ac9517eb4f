"""Draws that are pure functions of (seed, purpose, index), the same with every version of numpy.

numpy promises that the raw stream of a bit generator stays as it is, but not what `Generator.integers`, `permutation`
or `shuffle` make of it (NEP 19). So everything here is made from the raw stream with arithmetic and a stable sort, and
a row of data can be drawn again, alone and in any order, years later.
"""

import hashlib

import numpy as np


def bits(seed: int, purpose: str, index: int, count: int) -> np.ndarray:
    """The first `count` words, uint64 [count], of the stream (seed, purpose, index).

    The stream is that of Philox4x64-10 (Salmon et al. 2011, Random123) as numpy runs it, under the key of two words
    (blake2b-64 of "seed:purpose", index). Streams of different keys are independent; with more words asked for, a
    stream goes on from the same beginning.

    Args:
      seed: any integer.
      purpose: what is drawn, e.g. "span_corruption"; what must not be correlated has different purposes.
      index: which draw, in [0, 2**64): a row, an epoch.
      count: words.

    Raises:
      ValueError: index is out of range.
    """
    if not 0 <= index < 2**64:
        raise ValueError(f"index={index} must lie in [0, 2**64)")
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest()
    # key=, not SeedSequence: NEP 19 does not name the latter's hash, and the key is one of 2**128 without collisions.
    key = np.array([int.from_bytes(digest, "little"), index], np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def below(bits: np.ndarray, bound: int) -> np.ndarray:
    """Integers in [0, bound) from raw words of any shape: floor(u * bound), u the upper 53 bits as a fraction.

    Each value has probability 1 / bound to within 2**-52 (each has 2**53 / bound of the fractions, but for one at
    either end), so the relative bias is less than bound / 2**52.

    Args:
      bits: uint64 of any shape, from `bits`.
      bound: from 1 to 2**53.

    Returns:
      int64 of the same shape.

    Raises:
      ValueError: bound is out of range.
    """
    if not 1 <= bound <= 2**53:
        raise ValueError(f"bound={bound} must lie in [1, 2**53]")
    # The product is less than bound even when rounded: the largest u falls short of 1 by half a unit in the last place.
    return np.floor((bits >> np.uint64(11)) * 2.0**-53 * bound).astype(np.int64)


def permutation(seed: int, purpose: str, index: int, length: int) -> np.ndarray:
    """A uniformly drawn order of 0 ... length - 1, int64 [length]: the stable argsort of `length` raw words.

    Two equal words, which would favour the lower position, come up with probability below length**2 / 2**65.
    """
    return np.argsort(bits(seed, purpose, index, length), kind="stable")
