"""What counting alone achieves: the losses a language model must beat on the same held-out documents.

The prediction problem is the model's: the pairs of the same rows (`packing`); of an encoder-decoder, those of the
decoder's inputs and targets, without what its encoder reads.
"""

import dataclasses
import itertools
import math

import numpy as np

from moejax.data import packing

MAX_PAIRS = 2**22  # counted in: seconds, and tens of megabytes


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Mean loss on the held-out documents in nats a token, of estimates from the training documents."""

    uniform: float  # ln(vocab_size)
    unigram: float  # the frequency of the target, add-one smoothed
    bigram: float  # the target given the input, see `kneser_ney`


def compute(
    train: packing.Packer, validation: packing.Packer, objective: packing.Objective, vocab_size: int
) -> Baselines:
    """The baselines of a corpus.

    Args:
      train: rows to count in: the first of an epoch, 2**22 pairs at most.
      validation: rows to predict, all of them.
      objective: what a row is made into.
      vocab_size: V, tokens with a probability.
    """
    inputs_T, targets_T = _pairs(train, objective, MAX_PAIRS)
    held_out_inputs_T, held_out_targets_T = _pairs(validation, objective)
    count_V = np.bincount(targets_T, minlength=vocab_size)
    unigram_V = (count_V + 1) / (len(targets_T) + vocab_size)
    bigram_T = kneser_ney(inputs_T, targets_T, held_out_inputs_T, held_out_targets_T, vocab_size)
    return Baselines(
        uniform=math.log(vocab_size),
        unigram=float(-np.log(unigram_V[held_out_targets_T]).mean()),
        bigram=float(-np.log(bigram_T).mean()),
    )


def kneser_ney(
    inputs_T: np.ndarray,
    targets_T: np.ndarray,
    query_inputs_Q: np.ndarray,
    query_targets_Q: np.ndarray,
    vocab_size: int,
) -> np.ndarray:
    """Interpolated Kneser-Ney bigram probabilities (Kneser & Ney 1995; Chen & Goodman 1998, Harvard TR-10-98).

    With c(u, v) the count of a pair, c(u) of its input, N(u, .) and N(., v) the numbers of distinct targets of u and of
    distinct inputs of v, and N(., .) of distinct pairs,

        p(v | u) = max(c(u, v) - d, 0) / c(u)  +  d N(u, .) / c(u) * q(v),     q(v) = (N(., v) + 1) / (N(., .) + V)
        d        = n1 / (n1 + 2 n2),                                            n_k = number of pairs that occur k times

    so p(. | u) sums to 1. q is add-one smoothed, hence positive: every token has a probability. An input never seen has
    p = q. Where no pair occurs once d would be 0, and unseen pairs impossible; then it is 1/2.

    Args:
      inputs_T, targets_T: the pairs to count.
      query_inputs_Q, query_targets_Q: the pairs to judge.
      vocab_size: V.

    Returns:
      p(target | input) of each queried pair, float64 of shape [Q].
    """
    pair_P, count_P = np.unique(inputs_T.astype(np.int64) * vocab_size + targets_T, return_counts=True)
    once, twice = np.count_nonzero(count_P == 1), np.count_nonzero(count_P == 2)
    discount = once / (once + 2 * twice) if once else 0.5
    total_V = np.bincount(inputs_T, minlength=vocab_size)
    num_targets_V = np.bincount(pair_P // vocab_size, minlength=vocab_size)
    num_inputs_V = np.bincount(pair_P % vocab_size, minlength=vocab_size)
    continuation_V = (num_inputs_V + 1) / (len(pair_P) + vocab_size)

    query_Q = query_inputs_Q.astype(np.int64) * vocab_size + query_targets_Q
    at_Q = np.minimum(np.searchsorted(pair_P, query_Q), len(pair_P) - 1)
    count_Q = np.where(pair_P[at_Q] == query_Q, count_P[at_Q], 0)
    total_Q = total_V[query_inputs_Q]
    continuation_Q = continuation_V[query_targets_Q]
    discounted_Q = np.maximum(count_Q - discount, 0) + discount * num_targets_V[query_inputs_Q] * continuation_Q
    return np.where(total_Q > 0, discounted_Q / np.maximum(total_Q, 1), continuation_Q)


def _pairs(
    packer: packing.Packer, objective: packing.Objective, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) of the rows from row 0 on, until `limit` pairs are found or an epoch ends."""
    inputs, targets, count = [], [], 0
    for row in itertools.count() if packer.num_rows is None else range(packer.num_rows):
        streams = packer.read([row])[0]
        if not isinstance(objective, packing.NextToken):
            arrays = objective.arrays(streams, row)
            mask_M = arrays["loss_mask_M"]
            pairs = [(arrays["decoder_inputs_M"][mask_M], arrays["targets_M"][mask_M])]
        else:
            pairs = [(stream[:-1], stream[1:]) for stream in streams]
        for before, after in pairs:
            inputs.append(before)
            targets.append(after)
            count += len(after)
        if limit is not None and count >= limit:
            break
    return np.concatenate(inputs), np.concatenate(targets)
