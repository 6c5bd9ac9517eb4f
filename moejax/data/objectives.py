"""The objective that a config names, from what its tokenizer has."""

import numpy as np

from moejax import config as config_lib
from moejax.data import corruption, documents, packing, pairs, tokenizers


def make(config: config_lib.DataConfig, tokenizer: tokenizers.Tokenizer) -> packing.Objective:
    """What a row is made into.

    Raises:
      config.ConfigError: the tokenizer has not the sentinels that it needs.
    """
    if config.objective == "next_token":
        return packing.NextToken(
            row_length=config.seq_length, end_of_text=tokenizer.end_of_text, isolate=config.isolate_documents
        )
    if config.objective == "text_to_text":
        inputs_length, targets_length = corruption.row_lengths(config)
        return pairs.TextToText(
            inputs_length=inputs_length,
            targets_length=targets_length,
            end_of_text=tokenizer.end_of_text,
            pad=tokenizer.pad,
        )
    if not tokenizer.num_sentinels and tokenizer.name in ("bpe", "bytes"):  # built for another objective
        is_prepared = config.source.startswith("prepared:")
        whose = config.source if is_prepared else "the other run"
        remedy = "prepare the corpus" if is_prepared else "start from a run"
        raise config_lib.ConfigError(
            f"data.objective={config.objective} needs sentinel tokens, and the {tokenizer.name} tokenizer of {whose} "
            f"was made for another objective, without any; {remedy} with data.objective={config.objective}"
        )
    if not tokenizer.num_sentinels:
        raise config_lib.ConfigError(
            f"data.objective={config.objective} needs sentinel tokens, and data.tokenizer={config.tokenizer} has none; "
            "use bpe, bytes or a T5 vocabulary, sentencepiece:FILE"
        )
    objective = packing.SpanCorruption(
        inputs_length=config.seq_length,
        noise_density=config.noise_density,
        mean_span_length=config.mean_span_length,
        first_sentinel=tokenizer.first_sentinel,
        num_sentinels=tokenizer.num_sentinels,
        end_of_text=tokenizer.end_of_text,
        pad=tokenizer.pad,
        seed=config.seed,
    )
    num_spans = corruption.counts(objective.num_units, config.noise_density, config.mean_span_length)[1]
    if num_spans > tokenizer.num_sentinels:
        raise config_lib.ConfigError(
            f"data.seq_length={config.seq_length} gives rows of {num_spans} spans, and "
            f"data.tokenizer={config.tokenizer} has {tokenizer.num_sentinels} sentinels; "
            "raise data.mean_span_length or lower data.seq_length"
        )
    return objective


def check(objective: packing.Objective, found: documents.InMemory) -> int:
    """How many documents lose a part for the objective's sake: pairs, whose input is longer than the encoder.

    Raises:
      config.ConfigError: the target of a pair is longer than the decoder.
    """
    if not isinstance(objective, pairs.TextToText):
        return 0
    sizes = np.array([objective.sizes(tokens) for tokens in found])
    too_long = sizes[:, 1] >= objective.targets_length
    if too_long.any():
        longest, count = int(sizes[:, 1].max()) + 1, int(too_long.sum())
        which = "a target has" if count == 1 else f"{count:,} targets are too long, the longest has"
        raise config_lib.ConfigError(
            f"data.target_length={objective.targets_length} slots of the decoder: {which} {longest:,} tokens with EOS; "
            f"set data.target_length={longest}, or leave long pairs out"
        )
    return int((sizes[:, 0] >= objective.inputs_length).sum())
