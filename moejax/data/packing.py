"""Packing: from documents to rows of one length, with as little padding as whole documents allow.

A document of tokens t1..tn is the stream [EOT, t1, ..., tn, EOT] and yields its n + 1 pairs of neighbours: pair k has
input stream[k] and target stream[k + 1]. So every token and the document's end are predicted exactly once, the first
token from EOT alone, and no target crosses documents. A piece (document, start, stop) is a range of those pairs.
"""

import bisect
from collections.abc import Sequence

import numpy as np

Piece = tuple[int, int, int]


def best_fit(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[tuple[Piece, ...]]:
    """Packs documents into rows of at most `row_length` pairs, whole wherever they fit.

    Only a document longer than a row is cut: into row-length pieces and a rest. Pieces are then placed by best fit
    decreasing (Johnson 1974; for language models Ding et al. 2024, arXiv 2404.10830): the longest first, each into
    the fullest row that still has room for it. Deterministic; O(log n + row_length) a piece.

    Args:
      lengths: pairs of each document.
      row_length: pairs of a row.

    Returns:
      The rows, each a tuple of pieces; every pair of every document lies in exactly one. Rows and the pieces of a row
      are in the order of the documents, so that the first rows are not those with the longest documents.
    """
    pieces = [
        (document, start, min(start + row_length, length))
        for document, length in enumerate(np.asarray(lengths).tolist())
        for start in range(0, length, row_length)
    ]
    pieces.sort(key=lambda piece: piece[1] - piece[2])  # stable: equal lengths keep the documents' order
    rows: list[list[Piece]] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # the rows with that many pairs left
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


def row(
    pieces: Sequence[Piece], documents: Sequence[np.ndarray], row_length: int, end_of_text: int
) -> dict[str, np.ndarray]:
    """The arrays of one row, each of shape [L].

    Args:
      pieces: what lies in the row, from its first slot on.
      documents: the tokens of each document, without EOT.
      row_length: L, slots.
      end_of_text: the id of EOT; padding holds it too.

    Returns:
      inputs_L, targets_L int32: the pairs.
      segment_ids_L int32: 1, 2, ... by piece; 0 is padding.
      positions_L int32: from 0 within each piece; 0 in padding.
      loss_mask_L bool: True but for padding.
    """
    # Where no token is written below there is EOT: a document's first input, its last target, and padding.
    inputs_L = np.full(row_length, end_of_text, np.int32)
    targets_L = np.full(row_length, end_of_text, np.int32)
    segment_ids_L = np.zeros(row_length, np.int32)
    positions_L = np.zeros(row_length, np.int32)
    slot = 0
    for segment, (document, start, stop) in enumerate(pieces, start=1):
        tokens = documents[document]
        end = slot + stop - start
        previous = tokens[max(start - 1, 0) : stop - 1]
        following = tokens[start:stop]
        inputs_L[end - len(previous) : end] = previous
        targets_L[slot : slot + len(following)] = following
        segment_ids_L[slot:end] = segment
        positions_L[slot:end] = np.arange(stop - start)
        slot = end
    return {
        "inputs_L": inputs_L,
        "targets_L": targets_L,
        "segment_ids_L": segment_ids_L,
        "positions_L": positions_L,
        "loss_mask_L": segment_ids_L > 0,
    }


def batch(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stacks rows: inputs_L of each becomes inputs_BL, and so on."""
    return {f"{name.removesuffix('L')}BL": np.stack([row[name] for row in rows]) for name in rows[0]}
