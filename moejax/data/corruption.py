"""Span corruption, the objective of T5 (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4), as pure functions.

    raw       Thank you [for inviting] me to your party [last] week
    inputs    Thank you <X> me to your party <Y> week EOS
    targets   <X> for inviting <Y> last EOS

Which tokens are noise follows T5's code (google-research/text-to-text-transfer-transformer, t5/data/preprocessors.py:
random_spans_helper, random_spans_noise_mask, noise_span_to_unique_sentinel, nonnoise_span_to_unique_sentinel). A mask
drawn here begins with tokens that stay and ends with noise; so T5's targets have no last sentinel, which the paper's
figure shows. The sentinels <X>, <Y>, ... are ids of the vocabulary that no text uses, in descending order:
<extra_id_0> is the highest.
"""

# N raw tokens  L encoder length  M decoder length

import numpy as np

from moejax import config as config_lib
from moejax.data import randomness


def counts(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """How many of `length` raw tokens are noise, and in how many spans; both depend on nothing else.

    Noise is round(length * noise_density), but at least 1 and at most length - 1; spans are
    round(noise / mean_span_length), but at least 1 and no more than the tokens that stay, since a span of those comes
    before each. Halves round to even. Fewer than 2 raw tokens have no noise, as in T5.
    Products are in double precision; T5's mask has float32, where some halves come out as more or less than a half:
    then it has one noise token more or less (at a density of 0.15 in 1% of the lengths, 190 the first).

    Args:
      length: raw tokens.
      noise_density: share of them that is noise, in (0, 1).
      mean_span_length: noise tokens a span, 1 or more.

    Returns:
      num_noise, num_spans. Neither they nor length - num_noise fall when length grows, so what fits the longest row
      fits every row.

    Raises:
      config.ConfigError: noise_density or mean_span_length is out of range.
    """
    if not 0 < noise_density < 1:
        raise config_lib.ConfigError(f"data.noise_density={noise_density} must lie between 0 and 1; T5 has 0.15")
    if not 1 <= mean_span_length < np.inf:
        raise config_lib.ConfigError(
            f"data.mean_span_length={mean_span_length} must be 1 or more, and finite; T5 has 3.0"
        )
    if length < 2:
        return 0, 0
    num_noise = min(max(round(length * noise_density), 1), length - 1)
    num_spans = max(round(num_noise / mean_span_length), 1)
    return num_noise, min(num_spans, length - num_noise)


def raw_length(inputs_length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """How many raw tokens fill an encoder, and how long the decoder is then.

    T5's random_spans_helper, which gives 568 and 114 for 512, 0.15 and 3.0. It differs only where `counts` lifts noise
    or spans to 1, or limits the spans: T5's helper leaves that out, and its rows would not fit or its mask fail.

    Args:
      inputs_length: L, with one sentinel a span and EOS.
      noise_density: see `counts`.
      mean_span_length: see `counts`.

    Returns:
      tokens_length: the most raw tokens whose corrupted inputs have at most `inputs_length` tokens; every shorter row
        fits too. At a density of 0.5 it is one less if the targets would be longer than the inputs (T5's rule, by
        which encoder and decoder get equal lengths).
      targets_length: M, for the targets of that many, with one sentinel a span and EOS (after T5's rule perhaps a slot
        more than they need).

    Raises:
      config.ConfigError: inputs_length is less than 3, or see `counts`.
    """
    if inputs_length < 3:
        raise config_lib.ConfigError(
            f"data.seq_length={inputs_length} is too short for a token, a sentinel and EOS; set it to 3 or more"
        )

    def lengths(tokens_length: int) -> tuple[int, int]:
        num_noise, num_spans = counts(tokens_length, noise_density, mean_span_length)
        return tokens_length - num_noise + num_spans + 1, num_noise + num_spans + 1

    tokens_length = inputs_length - 1  # fits: no span is shorter than its sentinel
    while lengths(tokens_length + 1)[0] <= inputs_length:
        tokens_length += 1
    filled_length, targets_length = lengths(tokens_length)
    if noise_density == 0.5 and targets_length > filled_length:
        return tokens_length - 1, targets_length - 1
    return tokens_length, targets_length


def row_lengths(config: config_lib.DataConfig) -> tuple[int, int]:
    """(L, M): slots of the encoder and of the decoder, for either objective that has both."""
    if config.objective == "text_to_text":
        return config.seq_length, config.target_length or config.seq_length
    return config.seq_length, raw_length(config.seq_length, config.noise_density, config.mean_span_length)[1]


def noise_mask(length: int, noise_density: float, mean_span_length: float, seed: int, row: int) -> np.ndarray:
    """Which raw tokens are noise, bool [length]: a pure function of the arguments.

    Noise and the tokens that stay are each cut into num_spans spans, none of them empty, and the spans alternate,
    beginning with one that stays. All such masks are equally likely.

    Args:
      length: raw tokens; fewer than 2 are left as they are.
      noise_density: see `counts`.
      mean_span_length: see `counts`.
      seed: of the data.
      row: number of the example, 0 or more; text that comes again under another number is corrupted anew.

    Raises:
      config.ConfigError: see `counts`.
    """
    num_noise, num_spans = counts(length, noise_density, mean_span_length)
    if not num_spans:
        return np.zeros(length, bool)
    keys = randomness.bits(seed, "span_corruption", row, length - 2)  # a key for each gap of either kind
    noise_cuts = _cuts(keys[: num_noise - 1], num_spans)
    kept_cuts = _cuts(keys[num_noise - 1 :], num_spans)
    flips_N = np.zeros(length + 1, bool)
    flips_N[kept_cuts[1:] + noise_cuts[:-1]] = True  # where a noise span begins
    flips_N[kept_cuts[1:] + noise_cuts[1:]] = True  # where it ends, the last one with the row
    return np.logical_xor.accumulate(flips_N)[:-1]


def _cuts(keys: np.ndarray, num_parts: int) -> np.ndarray:
    """Where the parts of len(keys) + 1 items begin and end, int64 [num_parts + 1]: at the gaps of smallest keys."""
    gaps = np.argsort(keys, kind="stable")[: num_parts - 1]
    return np.concatenate([[0], np.sort(gaps) + 1, [len(keys) + 1]])


def corrupt(
    tokens_N: np.ndarray, mask_N: np.ndarray, first_sentinel: int, num_sentinels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces each run of noise by a sentinel, and lists what the sentinels stand for.

    Args:
      tokens_N: raw tokens; none may be a sentinel.
      mask_N: True for noise. Any mask will do, also one that begins with noise or ends without.
      first_sentinel: id of the first span's sentinel; the next ones have the ids below it.
      num_sentinels: how many there are.

    Returns:
      inputs: int32, the tokens with one sentinel in place of each span.
      targets: int32, for each span its sentinel and its tokens. Neither has EOS.

    Raises:
      config.ConfigError: there are more spans than sentinels.
    """
    starts_N = mask_N.copy()
    starts_N[1:] &= ~mask_N[:-1]
    num_spans = np.count_nonzero(starts_N)
    if num_spans > num_sentinels:
        raise config_lib.ConfigError(
            f"a row of {len(tokens_N)} tokens has {num_spans} noise spans, but there are {num_sentinels} sentinels; "
            "raise data.mean_span_length, or lower data.seq_length"
        )
    sentinels = first_sentinel - np.arange(num_spans)
    inputs_N = tokens_N.astype(np.int32)  # a copy
    inputs_N[starts_N] = sentinels
    inputs = inputs_N[~mask_N | starts_N]
    targets = np.insert(tokens_N[mask_N].astype(np.int32), np.flatnonzero(starts_N[mask_N]), sentinels)
    return inputs, targets


def row(
    tokens_N: np.ndarray,
    *,
    inputs_length: int,
    targets_length: int,
    noise_density: float,
    mean_span_length: float,
    first_sentinel: int,
    num_sentinels: int,
    end_of_text: int,
    pad: int,
    seed: int,
    row: int,
) -> dict[str, np.ndarray]:
    """The arrays of one example for an encoder-decoder; a pure function of the arguments.

    Args:
      tokens_N: raw tokens, at most the `raw_length` of inputs_length. Fewer make a shorter example with more padding;
        one token stays and has the target EOS alone, as in T5; none make a row of padding.
      inputs_length: L, slots of the encoder.
      targets_length: M, slots of the decoder.
      noise_density: see `counts`.
      mean_span_length: see `counts`.
      first_sentinel: see `corrupt`.
      num_sentinels: see `corrupt`.
      end_of_text: see `slots`.
      pad: see `slots`.
      seed: see `noise_mask`.
      row: see `noise_mask`.

    Returns:
      The arrays of `slots`: the inputs are corrupted tokens, the targets the spans, each after its sentinel.

    Raises:
      config.ConfigError: see `counts` and `corrupt`.
      ValueError: inputs or targets do not fit.
    """
    inputs = targets = None
    if len(tokens_N):
        mask_N = noise_mask(len(tokens_N), noise_density, mean_span_length, seed, row)
        inputs, targets = corrupt(tokens_N, mask_N, first_sentinel, num_sentinels)
        if len(inputs) >= inputs_length or len(targets) >= targets_length:
            raise ValueError(
                f"{len(tokens_N)} raw tokens become {len(inputs) + 1} inputs and {len(targets) + 1} targets with EOS, "
                f"more than inputs_length={inputs_length} or targets_length={targets_length}; take both lengths from "
                "raw_length"
            )
    return slots(
        inputs,
        targets,
        inputs_length=inputs_length,
        targets_length=targets_length,
        end_of_text=end_of_text,
        pad=pad,
    )


def slots(
    inputs: np.ndarray | None,
    targets: np.ndarray | None,
    *,
    inputs_length: int,
    targets_length: int,
    end_of_text: int,
    pad: int,
) -> dict[str, np.ndarray]:
    """The arrays of one example for an encoder-decoder.

    Args:
      inputs: tokens of the encoder without EOS, fewer than inputs_length. None: a row of padding.
      targets: tokens of the decoder without EOS, fewer than targets_length; None as above.
      inputs_length: L.
      targets_length: M.
      end_of_text: the id of EOS, which ends inputs and targets.
      pad: the id that fills up, and with which the decoder starts; it may be an ordinary id, as the masks say what
        is padding.

    Returns:
      encoder_inputs_L int32: inputs and EOS.
      encoder_mask_L bool: True for those, False for padding.
      decoder_inputs_M int32: targets_M one slot later, after `pad`.
      targets_M int32: targets and EOS.
      loss_mask_M bool: True but for padding.
    """
    encoder_inputs_L, targets_M = np.full(inputs_length, pad, np.int32), np.full(targets_length, pad, np.int32)
    counts = []
    for slots, tokens in ((encoder_inputs_L, inputs), (targets_M, targets)):
        if tokens is not None:
            slots[: len(tokens)] = tokens
            slots[len(tokens)] = end_of_text
        counts.append(0 if tokens is None else len(tokens) + 1)
    decoder_inputs_M = np.full(targets_length, pad, np.int32)
    decoder_inputs_M[1:] = targets_M[:-1]
    return {
        "encoder_inputs_L": encoder_inputs_L,
        "encoder_mask_L": np.arange(inputs_length) < counts[0],
        "decoder_inputs_M": decoder_inputs_M,
        "targets_M": targets_M,
        "loss_mask_M": np.arange(targets_length) < counts[1],
    }
