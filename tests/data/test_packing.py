"""Every packer against a slow definition; best fit and concatenation predict every token once an epoch."""

import time

import numpy as np
import pytest

from moejax import config as config_lib
from moejax.data import packing, randomness

EOT = 99


def make_documents(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, EOT, size=rng.integers(0, longest + 1)).astype(np.int32) for _ in range(count)]


def objective(row_length, isolate=True):
    return packing.NextToken(row_length=row_length, end_of_text=EOT, isolate=isolate)


def streams(pieces, documents):
    """The definition of a stream."""
    return [np.array([EOT, *documents[i].tolist(), EOT], np.int32)[start : stop + 1] for i, start, stop in pieces]


def pack(documents, row_length):
    pieces = packing.best_fit([len(tokens) + 1 for tokens in documents], row_length)
    return pieces, [objective(row_length).arrays(streams(row, documents), 0) for row in pieces]


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
    row = objective(8).arrays(streams(((0, 0, 3), (1, 0, 1), (2, 2, 4)), documents), 0)
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


def test_without_isolation_a_row_is_one_segment_of_the_same_tokens():
    pieces = ((0, 0, 3), (2, 2, 4))
    documents = [np.array([7, 8], np.int32), np.array([], np.int32), np.array([5, 6, 4], np.int32)]
    apart, together = (objective(7, isolate).arrays(streams(pieces, documents), 0) for isolate in (True, False))
    for name in ("inputs_L", "targets_L", "loss_mask_L"):
        np.testing.assert_array_equal(apart[name], together[name])
    assert apart["segment_ids_L"].tolist() == [1, 1, 1, 2, 2, 0, 0]
    assert together["segment_ids_L"].tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert together["positions_L"].tolist() == [0, 1, 2, 3, 4, 0, 0]


# --- packers -------------------------------------------------------------------------------------------------------


def arrays_of(packer, rows):
    return [packer.objective.arrays(streams, row) for row, streams in zip(rows, packer.read(rows), strict=True)]


def random_order(count):
    return np.random.default_rng(3).permutation(count)


def lengths_of(documents):
    return np.array([len(tokens) for tokens in documents])


@pytest.mark.parametrize("row_length", [2, 7, 32, 500, 10_000])
def test_concatenate_cuts_the_stream_of_all_documents_in_their_order(row_length):
    documents = make_documents(60, 40)
    order = random_order(60)
    packer = packing.Concatenate.make(documents, lengths_of(documents), order, objective(row_length))
    stream = [EOT]
    for document in order:
        stream += [*documents[document].tolist(), EOT]
    rows = arrays_of(packer, range(packer.num_rows))
    assert packer.num_rows == -(-(len(stream) - 1) // row_length)
    for number, row in enumerate(rows):
        pairs = stream[number * row_length : (number + 1) * row_length + 1]
        count = len(pairs) - 1
        assert row["inputs_L"][:count].tolist() == pairs[:-1]
        assert row["targets_L"][:count].tolist() == pairs[1:]
        assert row["loss_mask_L"].tolist() == [True] * count + [False] * (row_length - count)
        # a segment begins at the row's first slot and at every end of text, which is the input of a first token
        starts = [slot == 0 or pairs[slot] == EOT for slot in range(count)]
        assert row["segment_ids_L"][:count].tolist() == np.cumsum(starts).tolist()
        last = np.maximum.accumulate(np.where(starts, np.arange(count), 0))
        assert row["positions_L"][:count].tolist() == (np.arange(count) - last).tolist()


def test_concatenate_reads_a_row_alone_as_among_others():
    documents = make_documents(60, 40)
    packer = packing.Concatenate.make(documents, lengths_of(documents), random_order(60), objective(32))
    together = packer.read(range(packer.num_rows))
    for row in reversed(range(packer.num_rows)):
        assert [stream.tolist() for stream in packer.read([row])[0]] == [stream.tolist() for stream in together[row]]


def test_best_fit_packs_the_documents_in_the_order_given():
    documents = make_documents(60, 40)
    order = random_order(60)
    packer = packing.BestFit.make(documents, lengths_of(documents), order, objective(32))
    expected, _ = pack([documents[i] for i in order], 32)
    assert [[(order[place], *cut) for place, *cut in row] for row in expected] == [list(row) for row in packer.rows]
    for pieces, found in zip(packer.rows, packer.read(range(packer.num_rows)), strict=True):
        assert [stream.tolist() for stream in found] == [stream.tolist() for stream in streams(pieces, documents)]


def slow_sample(documents, row_length, seed, row):
    """(inputs, targets) as in MoE-Mamba's reference code: documents until all but the longest are more than a row, each
    with an end of text; a start anywhere; around and around."""
    draws = iter(randomness.below(randomness.bits(seed, "sample", row, 4096), len(documents)).tolist())
    buffer, lengths = [], []
    while sum(lengths) - max(lengths, default=0) <= row_length:
        tokens = documents[next(draws)].tolist()
        if tokens:
            buffer += [*tokens, EOT]
            lengths.append(len(tokens) + 1)
    start = int(randomness.below(randomness.bits(seed, "start", row, 1), len(buffer))[0])
    around = [buffer[place % len(buffer)] for place in range(start, start + row_length + 1)]
    return around[:-1], around[1:]


@pytest.mark.parametrize(("longest", "row_length"), [(40, 8), (40, 2), (10, 32), (3, 200), (300, 32)])
def test_sample_equals_the_slow_definition_of_the_reference_code(longest, row_length):
    documents = make_documents(60, longest)
    packer = packing.Sample(documents, objective(row_length), seed=5)
    rows = [*range(200), 2**40]
    for number, row in zip(rows, arrays_of(packer, rows), strict=True):
        inputs, targets = slow_sample(documents, row_length, 5, number)
        assert row["inputs_L"].tolist() == inputs
        assert row["targets_L"].tolist() == targets
        assert row["loss_mask_L"].all()
        starts = [slot == 0 or inputs[slot] == EOT for slot in range(row_length)]
        assert row["segment_ids_L"].tolist() == np.cumsum(starts).tolist()


def test_sample_draws_every_document_alike_whatever_its_length_and_starts_anywhere():
    # document i holds its own number, (i + 1) times; a row of one unit is any token of the documents drawn
    documents = [np.full(4 * (i + 1), i, np.int32) for i in range(5)]
    drawn = np.zeros(5)
    reader = Recorder(documents)
    packer = packing.Sample(reader, objective(64), seed=0)
    firsts = [packer.read([row])[0][0][0] for row in range(4000)]
    drawn = np.bincount(reader.read, minlength=5)
    assert (abs(drawn / drawn.sum() - 0.2) < 0.01).all()
    # the first input of a row is a token of the buffer, drawn evenly: a document weighs in with its length there
    shares = np.bincount([first for first in firsts if first != EOT], minlength=5) / 4000
    expected = lengths_of(documents) / (lengths_of(documents) + 1).sum()
    assert (abs(shares - expected) < 0.03).all()


class Recorder:
    """Documents that note what was read."""

    def __init__(self, documents):
        self.documents, self.read = documents, []

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        self.read.append(index)
        return self.documents[index]


def test_sample_of_documents_without_a_token_is_refused():
    packer = packing.Sample([np.zeros(0, np.int32)] * 3, objective(2), seed=0)
    with pytest.raises(config_lib.ConfigError, match="give documents with text"):
        packer.read([0])


def test_pad_puts_a_document_in_a_row_of_its_own_and_shows_the_beginning_of_a_longer_one():
    documents = [np.array(tokens, np.int32) for tokens in ([1, 2], [], [3, 4, 5, 6, 7], [8, 9, 10])]
    packer = packing.Pad(documents, objective(4), np.array([2, 0, 1, 3]))
    rows = arrays_of(packer, range(packer.num_rows))
    assert [row["inputs_L"].tolist() for row in rows] == [
        [EOT, 3, 4, 5], [EOT, 1, 2, EOT], [EOT] * 4, [EOT, 8, 9, 10],
    ]  # fmt: skip
    assert [row["targets_L"].tolist() for row in rows] == [
        [3, 4, 5, 6], [1, 2, EOT, EOT], [EOT] * 4, [8, 9, 10, EOT],
    ]  # fmt: skip
    assert [row["loss_mask_L"].sum() for row in rows] == [4, 3, 0, 4]


def span_corruption(inputs_length):
    return packing.SpanCorruption(
        inputs_length=inputs_length, noise_density=0.15, mean_span_length=3.0, first_sentinel=199, num_sentinels=100,
        end_of_text=1, pad=0, seed=9,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [packing.Concatenate, packing.BestFit])
def test_rows_for_span_corruption_hold_every_token_once_and_no_ends(kind):
    documents = [tokens for tokens in make_documents(60, 40) if len(tokens)]
    what = span_corruption(64)
    assert what.num_units > 64
    packer = kind.make(documents, lengths_of(documents), random_order(len(documents)), what)
    found = [token for row in packer.read(range(packer.num_rows)) for stream in row for token in stream.tolist()]
    assert sorted(found) == sorted(token for tokens in documents for token in tokens.tolist())
    sizes = [sum(map(len, row)) for row in packer.read(range(packer.num_rows))]
    assert max(sizes) <= what.num_units
    if kind is packing.Concatenate:
        assert set(sizes[:-1]) == {what.num_units}


def test_the_spans_of_a_row_change_from_epoch_to_epoch_and_not_from_read_to_read():
    documents = [np.arange(2, 90, dtype=np.int32)]
    what = span_corruption(64)
    (row,) = packing.Concatenate.make(documents, lengths_of(documents), np.arange(1), what).read([0])
    first, again, later = what.arrays(row, 0), what.arrays(row, 0), what.arrays(row, 1)
    assert {name: values.shape for name, values in first.items()}["encoder_inputs_L"] == (64,)
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["encoder_inputs_L"] != later["encoder_inputs_L"]).any()


def test_batch_stacks_rows_under_the_names_of_batches():
    row = span_corruption(64).arrays([np.arange(2, 40, dtype=np.int32)], 0)
    batch = packing.batch([row, row])
    assert list(batch) == [
        "encoder_inputs_BL", "encoder_mask_BL", "decoder_inputs_BM", "targets_BM", "loss_mask_BM",
    ]  # fmt: skip
    assert batch["encoder_inputs_BL"].shape == (2, 64)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 1, 2, 0], [1, 2, 1, 0]], "goes back from 2 to 1 in row 1 at position 2;"),
        ([[3, 2, 2, 1]], "goes back from 3 to 2 in row 0 at position 1;"),
        ([[1, 2, 0, 1]], "goes back from 2 to 1 in row 0 at position 3;"),
    ],
)
def test_segment_ids_that_go_backwards_are_refused(ids, message):
    rows = [{"segment_ids_L": np.array(row, np.int32)} for row in ids]
    with pytest.raises(ValueError, match=f"^segment_ids_BL {message} number the documents of a row 1, 2, [^\n]*$"):
        packing.batch(rows)


def test_padding_may_lie_before_between_and_after_documents_whose_ids_rise():
    rows = [{"segment_ids_L": np.array(row, np.int32)} for row in ([0, 0, 1, 1], [1, 0, 2, 0], [1, 5, 5, 9], [0] * 4)]
    assert packing.batch(rows)["segment_ids_BL"].shape == (4, 4)
