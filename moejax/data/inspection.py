"""What the model sees: rows as text, and the figures of documents and rows."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax import config as config_lib
from moejax.data import labels as labels_lib
from moejax.data import packing, pipeline, tokenizers

MAX_ROWS = 1024  # looked at for the figures
MAX_DOCUMENTS = 10_000
MAX_LABELS = 20  # shown

_BOUNDARY, _SENTINEL, _DIM, _RESET = "\x1b[36m", "\x1b[33;1m", "\x1b[2m", "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class Summary:
    """Figures of the first rows of training, and of documents spread evenly over the training side."""

    rows: int  # looked at
    tokens_per_row: float  # mean, without padding
    padding: float  # share of the slots
    counted: float  # share of the target slots that count in the loss
    parts_per_row: float  # parts of documents
    documents: int  # to train on
    documents_seen: int  # looked at; where rows were packed beforehand, parts of documents
    blank: int  # left out, blank or unreadable; on the fly, of those looked at
    cut: float  # share of the tokens of those looked at that packing=pad never reads
    repeated: float  # share of those looked at whose tokens are those of an earlier one
    tokens_per_document: dict[str, float]  # mean, p10, p50, p90, max
    histogram: list[tuple[int, int]]  # (fewest tokens, documents) of lengths from a power of two to below the next
    labels: dict[str, int]  # documents of each label, the most frequent first; read on the fly: of those looked at
    unlisted: int  # and of those not in data.labels


def summarise(data: pipeline.Data, config: config_lib.DataConfig) -> Summary:
    """The figures. Rows packed when a folder was prepared know no documents: there parts of documents take their
    place."""
    num_rows = min(MAX_ROWS, data.train.num_rows or MAX_ROWS)
    slots = used = counted = target_slots = 0
    streams_of = []
    for first in range(0, num_rows, config.batch_size):
        indices = range(first, min(first + config.batch_size, num_rows))
        for index, streams in zip(indices, data.train.read(list(indices)), strict=True):
            arrays = data.objective.arrays(streams, index)
            mask = arrays[_mask_of(arrays)]
            slots, used = slots + mask.size, used + int(mask.sum())
            loss_mask = arrays["loss_mask_L" if "loss_mask_L" in arrays else "loss_mask_M"]
            target_slots, counted = target_slots + loss_mask.size, counted + int(loss_mask.sum())
            streams_of.append(streams)
    parts = [stream for streams in streams_of for stream in streams]
    stored = getattr(data.train, "documents", None)
    places = data.train_labels if data.train_labels is not None else []
    if stored is None:
        looked_at: Sequence[np.ndarray] = parts[:MAX_DOCUMENTS]
    else:
        indices = range(0, len(stored), max(1, len(stored) // MAX_DOCUMENTS))[:MAX_DOCUMENTS]
        looked_at = [stored[index] for index in indices]
        if isinstance(places, labels_lib.Lookup):
            places = [places[index] for index in indices]
    count_of = labels_lib.counts(data.labels, places)
    lengths = np.array([len(tokens) for tokens in looked_at])
    texts = [hashlib.blake2b(tokens.tobytes(), digest_size=16).digest() for tokens in looked_at if len(tokens)]
    positive = lengths[lengths > 0]
    units, beyond = positive + data.objective.overlap, 0
    if isinstance(data.train, packing.Pad):
        most = data.objective.num_units
        kept = [len(data.objective.whole(tokens)) - data.objective.overlap for tokens in looked_at if len(tokens)]
        beyond = units.sum() - np.minimum(kept, most).sum()
    bins = np.bincount(np.log2(positive).astype(int)) if len(positive) else np.zeros(0, int)
    return Summary(
        rows=num_rows,
        tokens_per_row=used / max(num_rows, 1),
        padding=1 - used / max(slots, 1),
        counted=counted / max(target_slots, 1),
        parts_per_row=len(parts) / max(num_rows, 1),
        documents=data.num_documents,
        documents_seen=len(looked_at),
        blank=int((lengths == 0).sum()) if data.num_left_out is None else data.num_left_out,
        cut=float(beyond / max(units.sum(), 1)),
        repeated=1 - len(set(texts)) / max(len(texts), 1),
        tokens_per_document=_quantiles(positive),
        histogram=[(2**power, int(count)) for power, count in enumerate(bins) if count],
        labels=count_of,
        unlisted=len(places) - sum(count_of.values()),
    )


def _mask_of(arrays: packing.Arrays) -> str:
    return "encoder_mask_L" if "encoder_mask_L" in arrays else "loss_mask_L"


def _quantiles(lengths: np.ndarray) -> dict[str, float]:
    if not len(lengths):
        return {}
    p10, p50, p90 = np.percentile(lengths, [10, 50, 90])
    return {"mean": float(lengths.mean()), "p10": p10, "p50": p50, "p90": p90, "max": float(lengths.max())}


def show_summary(summary: Summary) -> str:
    """The figures as lines, with a histogram."""
    of = summary.tokens_per_document
    lines = [
        f"rows: {summary.rows:,} looked at, {summary.tokens_per_row:.1f} tokens each in {summary.parts_per_row:.2f} "
        f"parts of documents; {summary.padding:.1%} padding; {summary.counted:.1%} of the targets count",
        f"documents: {summary.documents:,} to train on, {summary.documents_seen:,} looked at; {summary.blank:,} blank; "
        f"{summary.repeated:.1%} repeat an earlier one"
        + (f"; {summary.cut:.1%} of the tokens are beyond a row and never read" if summary.cut else ""),
    ]
    if of:
        lines.append("tokens a document: " + ", ".join(f"{name} {value:,.0f}" for name, value in of.items()))
    largest = max((count for _, count in summary.histogram), default=1)
    for fewest, count in summary.histogram:
        lines.append(f"{fewest:>9,} to {2 * fewest - 1:<9,} {count:>7,} {'█' * round(40 * count / largest)}")
    if summary.labels:
        lines.append(_show_labels(summary))
    return "\n".join(lines)


def _show_labels(summary: Summary) -> str:
    shown = [f"{name} {count:,}" for name, count in list(summary.labels.items())[:MAX_LABELS]]
    if len(summary.labels) > MAX_LABELS:
        shown.append(f"and {len(summary.labels) - MAX_LABELS} more")
    if summary.unlisted:
        shown.append(f"{summary.unlisted:,} with none of these")
    total = sum(summary.labels.values()) + summary.unlisted
    return f"labels of {total:,} documents: {', '.join(shown)}"


# --- rows as text --------------------------------------------------------------------------------------------------


def first_rows(data: pipeline.Data, config: config_lib.DataConfig, count: int) -> list[packing.Arrays]:
    """The arrays of the rows that training reads first."""
    batches = pipeline.TrainBatches(data, config)
    rows = []
    for step in range(-(-count // config.batch_size)):
        batch = batches[step]
        rows += [
            {name.replace("_B", "_"): array[row] for name, array in batch.items()} for row in range(config.batch_size)
        ]
    return rows[:count]


def show_row(arrays: packing.Arrays, tokenizer: tokenizers.Tokenizer, *, colour: bool) -> str:
    """One row, as `packing.NextToken.arrays` or `corruption.row` made it, as text.

    Document ends show as ⟨end⟩, the first slot of a segment that a new document opens as ⟨document⟩, of one that goes
    on from another row as ⟨…⟩, padding as its number of slots, and what does not count in the loss dimly.
    """
    if "segment_ids_L" in arrays:
        return "".join(_show_segments(arrays, tokenizer, colour))
    encoder = arrays["encoder_inputs_L"][arrays["encoder_mask_L"]]
    decoder = arrays["targets_M"][arrays["loss_mask_M"]]
    return (
        f"{_paint('inputs ', _DIM, colour)}{_show_tokens(encoder, tokenizer, colour)}"
        f"{_padding(int((~arrays['encoder_mask_L']).sum()), colour)}\n"
        f"{_paint('targets ', _DIM, colour)}{_show_tokens(decoder, tokenizer, colour)}"
        f"{_padding(int((~arrays['loss_mask_M']).sum()), colour)}"
    )


def _show_segments(arrays: packing.Arrays, tokenizer: tokenizers.Tokenizer, colour: bool) -> list[str]:
    segments_L, targets_L, mask_L = arrays["segment_ids_L"], arrays["targets_L"], arrays["loss_mask_L"]
    shown = []
    for segment in range(1, int(segments_L.max(initial=0)) + 1):
        slots = np.flatnonzero(segments_L == segment)
        opens = arrays["inputs_L"][slots[0]] == tokenizer.end_of_text
        shown.append(_paint("⟨document⟩" if opens else "⟨…⟩", _BOUNDARY, colour))
        # runs of slots that count, and runs that do not
        for run in np.split(slots, np.flatnonzero(np.diff(mask_L[slots].astype(int))) + 1):
            text = _show_tokens(targets_L[run], tokenizer, colour and bool(mask_L[run[0]]))
            shown.append(text if mask_L[run[0]] else _paint(text, _DIM, colour))
    return [*shown, _padding(int((segments_L == 0).sum()), colour)]


def _show_tokens(tokens: np.ndarray, tokenizer: tokenizers.Tokenizer, colour: bool) -> str:
    last = tokenizer.first_sentinel
    special = (tokens == tokenizer.end_of_text) | (
        (tokens <= last) & (tokens > last - tokenizer.num_sentinels) if tokenizer.num_sentinels else False
    )
    shown = []
    for run in np.split(tokens, np.unique(np.concatenate([np.flatnonzero(special), np.flatnonzero(special) + 1]))):
        if not len(run):
            continue
        if run[0] == tokenizer.end_of_text:
            shown.append(_paint("⟨end⟩", _BOUNDARY, colour))
        elif len(run) == 1 and tokenizer.num_sentinels and last - tokenizer.num_sentinels < run[0] <= last:
            shown.append(_paint(tokenizer.decode(run.tolist()), _SENTINEL, colour))
        else:
            shown.append(tokenizer.decode(run.tolist()))
    return "".join(shown)


def _padding(count: int, colour: bool) -> str:
    return _paint(f"⟨{count} padding⟩", _DIM, colour) if count else ""


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_RESET}" if colour else text


def to_json(summary: Summary) -> dict[str, Any]:
    """The figures for a program to read."""
    return dataclasses.asdict(summary)
