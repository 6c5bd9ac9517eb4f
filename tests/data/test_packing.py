"""Packing predicts every token once, cuts no document that fits, and wastes little."""

import time

import numpy as np
import pytest

from moejax.data import packing

EOT = 99


def make_documents(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, EOT, size=rng.integers(0, longest + 1)).astype(np.int32) for _ in range(count)]


def pack(documents, row_length):
    pieces = packing.best_fit([len(tokens) + 1 for tokens in documents], row_length)
    return pieces, [packing.row(row, documents, row_length, EOT) for row in pieces]


def slow_row(pieces, documents, row_length):
    """The definition, slot by slot."""
    slots = []
    for segment, (document, start, stop) in enumerate(pieces, start=1):
        stream = [EOT, *documents[document].tolist(), EOT]
        slots += [(stream[k], stream[k + 1], segment, k - start, True) for k in range(start, stop)]
    slots += [(EOT, EOT, 0, 0, False)] * (row_length - len(slots))
    return [list(column) for column in zip(*slots, strict=True)]


def test_a_row_worked_by_hand():
    documents = [np.array([7, 8], np.int32), np.array([], np.int32), np.array([5, 6, 4], np.int32)]
    row = packing.row(((0, 0, 3), (1, 0, 1), (2, 2, 4)), documents, 8, EOT)
    expected = {
        "inputs_L": [EOT, 7, 8, EOT, 6, 4, EOT, EOT],
        "targets_L": [7, 8, EOT, EOT, 4, EOT, EOT, EOT],
        "segment_ids_L": [1, 1, 1, 2, 3, 3, 0, 0],
        "positions_L": [0, 1, 2, 0, 0, 1, 0, 0],
        "loss_mask_L": [True] * 6 + [False] * 2,
    }
    assert {name: values.tolist() for name, values in row.items()} == expected
    assert {values.dtype for name, values in row.items() if name != "loss_mask_L"} == {np.dtype(np.int32)}
    assert row["loss_mask_L"].dtype == bool


@pytest.mark.parametrize(("longest", "row_length"), [(40, 8), (40, 2), (10, 32), (0, 5), (31, 32), (32, 32)])
def test_rows_equal_the_slow_definition(longest, row_length):
    documents = make_documents(60, longest)
    for pieces, row in zip(*pack(documents, row_length), strict=True):
        assert [values.tolist() for values in row.values()] == slow_row(pieces, documents, row_length)


@pytest.mark.parametrize(("longest", "row_length"), [(40, 8), (40, 2), (10, 32), (31, 32), (32, 32)])
def test_every_token_and_every_end_is_a_target_exactly_once(longest, row_length):
    """Documents are put together again from the rows alone: a segment that ends in EOT ends its document."""
    documents = make_documents(60, longest)
    pieces, rows = pack(documents, row_length)
    targets = [[-1] * (len(tokens) + 1) for tokens in documents]
    for row_pieces, row in zip(pieces, rows, strict=True):
        for segment, (document, start, stop) in enumerate(row_pieces, start=1):
            segment_targets = row["targets_L"][row["segment_ids_L"] == segment].tolist()
            assert len(segment_targets) == stop - start
            assert targets[document][start:stop] == [-1] * (stop - start)
            targets[document][start:stop] = segment_targets
    assert targets == [[*tokens.tolist(), EOT] for tokens in documents]
    assert sum(row["loss_mask_L"].sum() for row in rows) == sum(len(tokens) + 1 for tokens in documents)


def test_only_a_document_longer_than_a_row_is_cut_and_then_into_whole_rows_and_a_rest():
    lengths = [1, 7, 8, 9, 16, 17, 30]
    cuts = {document: [] for document in range(len(lengths))}
    for row in packing.best_fit(lengths, 8):
        assert sum(stop - start for _, start, stop in row) <= 8
        for document, start, stop in row:
            cuts[document].append((start, stop))
    assert {document: sorted(ranges) for document, ranges in cuts.items()} == {
        0: [(0, 1)],
        1: [(0, 7)],
        2: [(0, 8)],
        3: [(0, 8), (8, 9)],
        4: [(0, 8), (8, 16)],
        5: [(0, 8), (8, 16), (16, 17)],
        6: [(0, 8), (8, 16), (16, 24), (24, 30)],
    }


def test_each_piece_goes_to_the_fullest_row_with_room_longest_first():
    # 6 and 5 open rows with 4 and 5 left; 4 fits the first exactly, 3 the second, 2 its rest; 1 opens a row.
    assert packing.best_fit([3, 5, 1, 6, 2, 4], 10) == [
        ((0, 0, 3), (1, 0, 5), (4, 0, 2)),
        ((2, 0, 1),),
        ((3, 0, 6), (5, 0, 4)),
    ]


def slow_best_fit(lengths, row_length):
    """Best fit decreasing by looking at every row; of equally full rows the one that became so last."""
    rows = []  # [room, time it got that room, pieces]
    order = sorted(range(len(lengths)), key=lambda document: -lengths[document])
    for now, document in enumerate(order):
        open_rows = [row for row in rows if row[0] >= lengths[document]]
        if not open_rows:
            open_rows = [[row_length, now, []]]
            rows.append(open_rows[0])
        best = min(open_rows, key=lambda row: (row[0], -row[1]))
        best[0] -= lengths[document]
        best[1] = now
        best[2].append((document, 0, lengths[document]))
    return sorted(tuple(sorted(pieces)) for _, _, pieces in rows)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_equals_a_search_over_all_rows(seed):
    lengths = np.random.default_rng(seed).integers(1, 21, size=200).tolist()
    assert packing.best_fit(lengths, 20) == slow_best_fit(lengths, 20)


def test_ten_thousand_documents_pack_in_a_second_and_fill_rows_to_98_percent():
    lengths = np.random.default_rng(0).lognormal(np.log(130), 0.45, size=10_000).astype(int) + 1  # like wikipedia's
    start = time.perf_counter()
    rows = packing.best_fit(lengths, 256)
    assert time.perf_counter() - start < 1
    assert lengths.sum() / (256 * len(rows)) > 0.98


def test_the_first_rows_are_not_those_with_the_longest_documents():
    lengths = np.random.default_rng(0).integers(1, 101, size=2000)
    rows = packing.best_fit(lengths, 100)
    first = [stop - start for row in rows[:200] for _, start, stop in row]
    assert abs(np.mean(first) - lengths.mean()) < 5
