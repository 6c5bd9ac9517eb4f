"""Span corruption by definition, and T5's algorithm step by step as its TensorFlow code goes, the shuffle handed in.

Also the examples that both files of tests of it take.
"""

import itertools

import numpy as np

from moejax.data import corruption

FIRST, NUM, EOS, PAD = 32_099, 100, 1, 0  # T5: <extra_id_0> is the last of 32,100 ids
DENSITY, MEAN = 0.15, 3.0


def make_tokens(length, seed=0):
    return np.random.default_rng(seed).integers(2, FIRST - NUM, size=length).astype(np.int32)


def make_mask(length, share, seed):
    """Any mask: it may begin or end with noise, or have one kind only."""
    return np.random.default_rng(seed).random(length) < share


def make_row(tokens, *, inputs_length=512, targets_length=114, seed=0, row=0, **options):
    settings = {
        "noise_density": DENSITY,
        "mean_span_length": MEAN,
        "first_sentinel": FIRST,
        "num_sentinels": NUM,
        "end_of_text": EOS,
        "pad": PAD,
    }
    return corruption.row(
        np.asarray(tokens, np.int32),
        inputs_length=inputs_length,
        targets_length=targets_length,
        seed=seed,
        row=row,
        **{**settings, **options},
    )


def spans_of(mask):
    """[(is noise, length), ...]"""
    return [(bool(value), len(list(run))) for value, run in itertools.groupby(mask.tolist())]


def t5_lengths(tokens_length, noise_density, mean_span_length):
    """Inputs and targets for so many raw tokens, as random_spans_helper reckons."""
    num_noise_tokens = round(tokens_length * noise_density)
    num_noise_spans = round(num_noise_tokens / mean_span_length)
    return tokens_length - num_noise_tokens + num_noise_spans + 1, num_noise_tokens + num_noise_spans + 1


def t5_raw_length(inputs_length, noise_density, mean_span_length):
    tokens_length = inputs_length - 1
    while t5_lengths(tokens_length + 1, noise_density, mean_span_length)[0] <= inputs_length:
        tokens_length += 1
    inputs_length, targets_length = t5_lengths(tokens_length, noise_density, mean_span_length)
    if noise_density == 0.5 and targets_length > inputs_length:
        tokens_length -= 1
        targets_length -= 1
    return tokens_length, targets_length


def t5_segment_lengths(num_items, num_segments, shuffle):
    is_start = shuffle(np.arange(num_items - 1) < num_segments - 1)
    segment_id = np.cumsum(np.concatenate([[0], is_start.astype(np.int64)]))
    return np.bincount(segment_id)


def t5_noise_mask(length, noise_density, mean_span_length, shuffle_noise, shuffle_nonnoise):
    original_length, length = length, max(length, 2)
    num_noise_tokens = min(max(int(np.round(length * noise_density)), 1), length - 1)
    num_noise_spans = max(int(np.round(num_noise_tokens / mean_span_length)), 1)
    noise_lengths = t5_segment_lengths(num_noise_tokens, num_noise_spans, shuffle_noise)
    nonnoise_lengths = t5_segment_lengths(length - num_noise_tokens, num_noise_spans, shuffle_nonnoise)
    interleaved = np.reshape(np.stack([nonnoise_lengths, noise_lengths], axis=1), [num_noise_spans * 2])
    span_starts = np.cumsum(interleaved)[:-1]
    span_start_indicator = np.bincount(span_starts, minlength=length)
    return (np.cumsum(span_start_indicator) % 2 == 1)[:original_length]


def t5_noise_span_to_unique_sentinel(tokens, noise_mask, vocab_size):
    previous_is_noise = np.pad(noise_mask[:-1], [[1, 0]])
    first_noise = np.logical_and(noise_mask, np.logical_not(previous_is_noise))
    subsequent_noise = np.logical_and(noise_mask, previous_is_noise)
    sentinel = vocab_size - np.cumsum(first_noise.astype(tokens.dtype))
    return np.where(first_noise, sentinel, tokens)[np.logical_not(subsequent_noise)]


def shuffle_by(keys):
    """The shuffle that puts entry i where key i stands in order: a start belongs to each of the smallest keys."""
    return lambda entries: entries[np.argsort(np.argsort(keys))]


def slow_corrupt(tokens, mask, first_sentinel):
    """The definition, for any mask."""
    inputs, targets, sentinel = [], [], first_sentinel + 1
    for position, (token, is_noise) in enumerate(zip(tokens.tolist(), mask.tolist(), strict=True)):
        if not is_noise:
            inputs.append(token)
            continue
        if position == 0 or not mask[position - 1]:
            sentinel -= 1
            inputs.append(sentinel)
            targets.append(sentinel)
        targets.append(token)
    return inputs, targets


def restore(inputs, targets, first_sentinel, num_sentinels):
    """The raw tokens of what `corruption.corrupt` returns; of a row, what its masks select but for EOS at its end."""
    kept, spans = (
        np.split(tokens, np.flatnonzero((first_sentinel - num_sentinels < tokens) & (tokens <= first_sentinel)))
        for tokens in (inputs, targets)
    )
    assert [int(piece[0]) for piece in kept[1:]] == [int(piece[0]) for piece in spans[1:]]
    assert not len(spans[0])  # no token before the first sentinel
    pieces = [kept[0]]
    for span, rest in zip(spans[1:], kept[1:], strict=True):
        pieces += [span[1:], rest[1:]]
    return np.concatenate(pieces)
