"""Packing: which parts of which documents make a row, and the arrays of that row.

A document of n tokens t1..tn is the stream [EOT, t1, ..., tn, EOT], whose n + 1 pairs of neighbours are what a model
predicts: pair k has input stream[k] and target stream[k + 1]. So every token and the document's end are predicted
exactly once, the first token from EOT alone. Rows for span corruption hold tokens and no ends, as T5's do: there the
stream is t1..tn and each token is a unit by itself. A unit is what a packer counts: a pair, or such a token.

A packer is a sequence of rows, each a list of streams: consecutive parts of documents. It is a pure function of what it
was made with, and reads documents only when a row is asked for.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from moejax import config as config_lib
from moejax.data import corruption, pairs, randomness

MAX_BLANK = 4096  # blank documents that `Sample` draws for a row before it gives up

Piece = tuple[int, int, int]  # (document, first unit, last unit + 1)
Arrays = dict[str, np.ndarray]
LabelIds = Sequence[int] | np.ndarray  # by document


class Streams(list[np.ndarray]):
    """A row's parts of documents, int32 tokens each, from its first slot on."""

    def __init__(self, streams: Iterable[np.ndarray] = (), documents: Iterable[int] = ()):
        super().__init__(streams)
        self.documents = list(documents)  # which each is a part of; [] for rows packed beforehand, which don't say


class Documents(Protocol):
    """Tokenised documents by random access, without ends."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray:
        """The int32 tokens of document `index`; none for a blank document."""
        ...


class Packer(Protocol):
    """Rows by random access."""

    @property
    def num_rows(self) -> int | None:
        """Of an epoch; None: endless, row n is drawn anew for every n."""
        ...

    def read(self, rows: Sequence[int]) -> list[Streams]:
        """The streams of these rows."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """The arrays of a decoder-only language model; `row_length` = L."""

    row_length: int
    end_of_text: int
    isolate: bool  # each stream is a segment of its own; else a row is one segment
    overlap = 1  # a stream of n + 1 tokens has n pairs

    @property
    def num_units(self) -> int:
        """Units of a full row."""
        return self.row_length

    def whole(self, tokens: np.ndarray) -> np.ndarray:
        """The stream of a whole document."""
        end = np.array([self.end_of_text], np.int32)
        return np.concatenate([end, tokens, end])

    def arrays(self, streams: Streams, index: int, labels: LabelIds | None = None) -> Arrays:
        """The arrays of one row, each of shape [L].

        Args:
          streams: what lies in the row, from its first slot on; at most L pairs.
          index: not used; see `SpanCorruption.arrays`.
          labels: of every document, by number; None: they have none.

        Returns:
          inputs_L, targets_L int32: the pairs; padding holds EOT.
          segment_ids_L int32: 1, 2, ... by stream, or 1 everywhere without isolation; 0 is padding.
          positions_L int32: from 0 within each segment; 0 in padding.
          loss_mask_L bool: which targets count, all but padding.
          labels_L int32, if there are labels: that of the document whose pair it is; -1 in padding.
        """
        inputs_L = np.full(self.row_length, self.end_of_text, np.int32)
        targets_L = np.full(self.row_length, self.end_of_text, np.int32)
        segment_ids_L = np.zeros(self.row_length, np.int32)
        positions_L = np.zeros(self.row_length, np.int32)
        labels_L = np.full(self.row_length, -1, np.int32)
        slot = 0
        for segment, stream in enumerate(streams, start=1):
            end = slot + len(stream) - 1
            if labels is not None:
                labels_L[slot:end] = labels[streams.documents[segment - 1]]
            inputs_L[slot:end] = stream[:-1]
            targets_L[slot:end] = stream[1:]
            segment_ids_L[slot:end] = segment if self.isolate else 1
            positions_L[slot:end] = np.arange(end - slot) if self.isolate else np.arange(slot, end)
            slot = end
        row = {
            "inputs_L": inputs_L,
            "targets_L": targets_L,
            "segment_ids_L": segment_ids_L,
            "positions_L": positions_L,
            "loss_mask_L": segment_ids_L > 0,
        }
        return row if labels is None else row | {"labels_L": labels_L}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """The arrays of T5's objective for an encoder-decoder model; see `corruption.row`."""

    inputs_length: int
    noise_density: float
    mean_span_length: float
    first_sentinel: int
    num_sentinels: int
    end_of_text: int
    pad: int
    seed: int
    overlap = 0  # a stream of n tokens has n of them to corrupt

    @property
    def num_units(self) -> int:
        """Raw tokens of a full row."""
        return corruption.raw_length(self.inputs_length, self.noise_density, self.mean_span_length)[0]

    def whole(self, tokens: np.ndarray) -> np.ndarray:
        """The stream of a whole document."""
        return tokens

    def arrays(self, streams: Streams, index: int, labels: LabelIds | None = None) -> Arrays:
        """The arrays of one row; the spans are drawn by `index`, which grows from row to row and epoch to epoch.

        Labels are not used: a corrupted row has none.
        """
        num_units, targets_length = corruption.raw_length(self.inputs_length, self.noise_density, self.mean_span_length)
        tokens_N = np.concatenate([np.zeros(0, np.int32), *streams])
        assert len(tokens_N) <= num_units
        return corruption.row(
            tokens_N,
            inputs_length=self.inputs_length,
            targets_length=targets_length,
            noise_density=self.noise_density,
            mean_span_length=self.mean_span_length,
            first_sentinel=self.first_sentinel,
            num_sentinels=self.num_sentinels,
            end_of_text=self.end_of_text,
            pad=self.pad,
            seed=self.seed,
            row=index,
        )


Objective = NextToken | SpanCorruption | pairs.TextToText


def batch(rows: Sequence[Arrays]) -> Arrays:
    """Stacks rows: inputs_L of each becomes inputs_BL, and so on. Raises ConfigError by `check_segments`."""
    arrays = {f"{name[:-1]}B{name[-1]}": np.stack([row[name] for row in rows]) for name in rows[0]}
    if "segment_ids_BL" in arrays:
        check_segments(arrays["segment_ids_BL"])
    return arrays


def check_segments(segment_ids_BL: np.ndarray) -> None:
    """Raises ConfigError if a row's segment ids go backwards; padding, 0, may be anywhere.

    To Mamba a document begins wherever the id changes, to attention an id is one document wherever it is: of an id that
    comes back they would make different things.
    """
    highest_BL = np.maximum.accumulate(segment_ids_BL, axis=1)
    wrong = np.argwhere((segment_ids_BL < highest_BL) & (segment_ids_BL != 0))
    if len(wrong):
        row, place = wrong[0]
        raise config_lib.ConfigError(
            f"segment_ids_BL goes back from {highest_BL[row, place]} to {segment_ids_BL[row, place]} in row {row} at "
            f"position {place}; number the documents of a row 1, 2, ... from left to right, and padding 0"
        )


# --- packers -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class BestFit:
    """Whole documents, each once an epoch, with as little padding as they allow; see `best_fit`.

    Which documents share a row is fixed by `order`: they are packed as if they stood in it.
    """

    documents: Documents
    objective: Objective
    rows: list[tuple[Piece, ...]]

    @classmethod
    def make(cls, documents: Documents, lengths: np.ndarray, order: np.ndarray, objective: Objective) -> "BestFit":
        """Packs documents of so many tokens each (`lengths`, by document)."""
        packed = best_fit(lengths[order] + objective.overlap, objective.num_units)
        rows = [tuple((int(order[place]), start, stop) for place, start, stop in row) for row in packed]
        return cls(documents, objective, rows)

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int]) -> list[Streams]:
        return [_streams(self.documents, self.rows[row], self.objective) for row in rows]


@dataclasses.dataclass(frozen=True, eq=False)
class Concatenate:
    """Documents end to end in `order`, cut into rows of one length: no padding but in the last row of an epoch.

    Every unit of every document lies in exactly one row of an epoch.
    """

    documents: Documents
    objective: Objective
    order: np.ndarray  # document at each place
    ends: np.ndarray  # int64, units of the documents up to and with each place

    @classmethod
    def make(cls, documents: Documents, lengths: np.ndarray, order: np.ndarray, objective: Objective) -> "Concatenate":
        """Lays documents of so many tokens each (`lengths`, by document) end to end."""
        return cls(documents, objective, order, np.cumsum(lengths[order] + objective.overlap, dtype=np.int64))

    @property
    def num_rows(self) -> int:
        return -(-int(self.ends[-1]) // self.objective.num_units) if len(self.ends) else 0

    def read(self, rows: Sequence[int]) -> list[Streams]:
        return [_streams(self.documents, self.pieces(row), self.objective) for row in rows]

    def pieces(self, row: int) -> list[Piece]:
        """What lies in a row."""
        at = row * self.objective.num_units
        stop = min(at + self.objective.num_units, int(self.ends[-1]))
        place = int(np.searchsorted(self.ends, at, side="right"))
        found = []
        while at < stop:
            begin, end = int(self.ends[place - 1]) if place else 0, int(self.ends[place])
            if end > at:  # a blank document has no unit
                found.append((int(self.order[place]), at - begin, min(stop, end) - begin))
                at = min(stop, end)
            place += 1
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Rows as MoE-Mamba's code draws them (llm-random, source/text/packers.py): every row is a draw of its own.

    Documents are drawn uniformly with replacement and laid end to end, an end-of-text after each, until all of them but
    the longest are more than a row; the row begins anywhere in that buffer and wraps around. So documents weigh in by
    number and not by length, and nothing limits how often one returns. A blank document is drawn again.
    """

    documents: Documents
    objective: Objective
    seed: int
    num_rows = None

    def read(self, rows: Sequence[int]) -> list[Streams]:
        return [self._draw(row) for row in rows]

    def _draw(self, row: int) -> Streams:
        overlap, num_units = self.objective.overlap, self.objective.num_units
        wholes: list[np.ndarray] = []
        drawn: list[int] = []
        total = longest = draw = 0
        bits = np.zeros(0, np.uint64)
        while total - longest <= num_units:
            if draw == len(bits):
                bits = randomness.bits(self.seed, "sample", row, max(32, 2 * draw))
                if draw >= MAX_BLANK and not wholes:
                    raise config_lib.ConfigError(
                        f"data.source: {draw} documents drawn at random are all blank; give documents with text"
                    )
            index = int(randomness.below(bits[draw : draw + 1], len(self.documents))[0])
            draw += 1
            tokens = self.documents[index]
            if len(tokens):
                drawn.append(index)
                wholes.append(self.objective.whole(tokens))
                units = len(wholes[-1]) - overlap
                total, longest = total + units, max(longest, units)
        start = int(randomness.below(randomness.bits(self.seed, "start", row, 1), total)[0]) + overlap
        # Pair k of the buffer [t1.., EOT, u1.., EOT] that wraps is (buffer[k - 1], buffer[k]).
        streams, place = Streams(), 0
        for index, whole in zip(drawn * 2, wholes * 2, strict=True):
            units = len(whole) - overlap
            first, last = max(start - place, 0), min(start + num_units - place, units)
            if first < last:
                streams.append(whole[first : last + overlap])
                streams.documents.append(index)
            place += units
        return streams


@dataclasses.dataclass(frozen=True, eq=False)
class Pad:
    """A document a row, in `order`, the rest padding; of a longer document the first row's worth is read."""

    documents: Documents
    objective: Objective
    order: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.order)

    def read(self, rows: Sequence[int]) -> list[Streams]:
        size = self.objective.num_units + self.objective.overlap
        found = [(int(self.order[row]), self.documents[int(self.order[row])]) for row in rows]
        return [
            Streams([self.objective.whole(tokens)[:size]], [i]) if len(tokens) else Streams() for i, tokens in found
        ]


def _streams(documents: Documents, pieces: Sequence[Piece], objective: Objective) -> Streams:
    parts = (objective.whole(documents[i])[start : stop + objective.overlap] for i, start, stop in pieces)
    return Streams(parts, (document for document, _, _ in pieces))


def best_fit(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[tuple[Piece, ...]]:
    """Packs documents into rows of at most `row_length` units, whole wherever they fit.

    Only a document longer than a row is cut: into row-length pieces and a rest. Pieces are then placed by best fit
    decreasing (Johnson 1974; for language models Ding et al. 2024, arXiv 2404.10830): the longest first, each into
    the fullest row that still has room for it. Deterministic; O(log n + row_length) a piece.

    Args:
      lengths: units of each document.
      row_length: units of a row.

    Returns:
      The rows, each a tuple of pieces; every unit of every document lies in exactly one. Rows and the pieces of a row
      are in the order of the documents, so that the first rows are not those with the longest documents.
    """
    pieces = [
        (document, start, min(start + row_length, length))
        for document, length in enumerate(np.asarray(lengths).tolist())
        for start in range(0, length, row_length)
    ]
    pieces.sort(key=lambda piece: piece[1] - piece[2])  # stable: equal lengths keep the documents' order
    rows: list[list[Piece]] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # the rows with that many units left
    rooms: list[int] = []  # ascending, those that some row has
    for piece in pieces:
        length = piece[2] - piece[1]
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del rooms[at]
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(piece)
        room -= length
        if room:
            if not by_room[room]:
                bisect.insort(rooms, room)
            by_room[room].append(row)
    return sorted(tuple(sorted(row)) for row in rows)
