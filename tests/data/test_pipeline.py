"""Batches depend on the seed and the step alone, read every row once an epoch, and keep the sides apart."""

import itertools
import math
import pathlib

import numpy as np
import pytest

from moejax import config as config_lib
from moejax.data import packing, pipeline, tokenizers

KEYS = ["inputs_BL", "targets_BL", "segment_ids_BL", "positions_BL", "loss_mask_BL"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Sixty files of a few words each; some twice."""
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for i in range(60):
        text = f"{i % 50} é: " + " ".join(rng.choice(["cat", "night", "rain", "sea"], size=rng.integers(1, 20)))
        (tmp_path / "texts" / f"{i}.txt").write_text(text if i < 50 else f"{i % 50} again")
    return config_lib.DataConfig(
        source="text",
        paths=(str(tmp_path / "texts"),),
        vocab_size=270,
        seq_length=64,
        batch_size=4,
        validation_fraction=0.3,
    )


@pytest.fixture
def prepared(config):
    return pipeline.prepare(config)


def texts_of(documents, tokenizer):
    return [tokenizer.decode(tokens) for tokens in documents]


def texts_in(batches, tokenizer):
    """The text of every segment of every row."""
    return [
        tokenizer.decode(targets_L[segments_L == segment])
        for batch in batches
        for targets_L, segments_L in zip(batch["targets_BL"], batch["segment_ids_BL"], strict=True)
        for segment in range(1, segments_L.max() + 1)
    ]


def assert_same(a, b):
    assert set(a) == set(b) == set(KEYS)
    for key in KEYS:
        np.testing.assert_array_equal(a[key], b[key])


def rows_of(batches):
    return [row.tobytes() for batch in batches for row in batch["inputs_BL"]]


# --- preparing -----------------------------------------------------------------------------------------------------


def test_prepare_keeps_every_text_once_and_none_on_both_sides(config, prepared):
    train, validation = (texts_of(side, prepared.tokenizer) for side in (prepared.train, prepared.validation))
    files = [path.read_text() for path in pathlib.Path(config.paths[0]).iterdir()]
    assert sorted(train + validation) == sorted(files)
    assert len(set(validation)) == 18
    assert not set(train) & set(validation)
    assert prepared.train.num_bytes == sum(len(text.encode()) for text in train)
    assert prepared.train[-1].tolist() == prepared.tokenizer.encode(train[-1])


def test_prepare_trains_the_tokenizer_on_the_training_documents_alone(config, prepared):
    train = texts_of(prepared.train, prepared.tokenizer)
    alone = tokenizers.Bpe.train(train, config.vocab_size)
    both = tokenizers.Bpe.train(train + texts_of(prepared.validation, prepared.tokenizer), config.vocab_size)
    assert alone.to_json() != both.to_json()
    assert prepared.tokenizer.to_json() == alone.to_json()


def test_prepare_uses_the_tokenizer_it_is_given(config):
    prepared = pipeline.prepare(config, tokenizers.Bytes())
    assert prepared.tokenizer == tokenizers.Bytes()
    assert len(prepared.train.tokens) == prepared.train.num_bytes


def test_bits_per_byte_counts_every_target_and_every_byte():
    documents = pipeline.tokenize(["ab", "é"], tokenizers.Bytes())
    assert (documents.num_targets, documents.num_bytes) == (6, 4)
    assert documents.bits_per_byte(math.log(2)) == pytest.approx(6 / 4)


# --- training ------------------------------------------------------------------------------------------------------


def test_training_batches_have_the_shapes_and_types_of_the_contract(config, prepared):
    batch = next(pipeline.train_batches(prepared, config))
    assert list(batch) == KEYS
    assert {batch[key].shape for key in KEYS} == {(4, 64)}
    assert [batch[key].dtype.name for key in KEYS] == ["int32"] * 4 + ["bool"]


@pytest.mark.parametrize("start", [0, 1, 7, 40])
def test_batch_n_is_the_same_from_the_start_and_after_resuming_at_n(config, prepared, start):
    dataset = pipeline.train_dataset(prepared, config)
    fresh = list(itertools.islice(pipeline.train_batches(prepared, config), start, start + 3))
    resumed = list(itertools.islice(pipeline.train_batches(pipeline.prepare(config), config, start), 3))
    for n in range(3):
        assert_same(fresh[n], resumed[n])
        assert_same(fresh[n], dataset[start + n])


def test_batches_are_the_same_with_worker_processes(config, prepared):
    alone = list(itertools.islice(pipeline.train_batches(prepared, config, 5), 5))
    config.num_workers = 2
    batches = pipeline.train_batches(prepared, config, 5)
    for expected in alone:
        assert_same(next(batches), expected)
    batches.close()


def test_an_epoch_reads_every_row_once_and_each_epoch_has_an_order_of_its_own(config, prepared):
    config.batch_size = 1
    length = len(pipeline.Rows(prepared.train, config.seq_length, prepared.tokenizer.end_of_text, config.seed))
    assert length > 10
    dataset = pipeline.train_dataset(prepared, config)
    epochs = [[dataset[epoch * length + i] for i in range(length)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(texts_in(epoch, prepared.tokenizer)) == sorted(texts_of(prepared.train, prepared.tokenizer))
    orders = [rows_of(epoch) for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_no_held_out_text_is_in_a_training_batch(config, prepared):
    batches = list(itertools.islice(pipeline.train_batches(prepared, config), 30))
    seen = set(texts_in(batches, prepared.tokenizer))
    assert seen == set(texts_of(prepared.train, prepared.tokenizer))
    assert not seen & set(texts_of(prepared.validation, prepared.tokenizer))


def test_another_seed_packs_other_rows_and_reads_them_in_another_order(config, prepared):
    config.batch_size = 1
    contents, orders = [], []
    for config.seed in (1, 1, 2, 2**40):
        rows = pipeline.Rows(prepared.train, config.seq_length, prepared.tokenizer.end_of_text, config.seed)
        content = rows_of(packing.batch([row]) for row in rows)
        dataset = pipeline.train_dataset(prepared, config)
        orders.append([content.index(row) for row in rows_of(dataset[n] for n in range(len(rows)))])
        contents.append(frozenset(content))
    assert contents[0] == contents[1]
    assert orders[0] == orders[1]
    assert len(set(contents)) == 3
    assert len({tuple(order) for order in orders}) == 3


def test_fewer_rows_than_a_batch_repeat(config, prepared):
    config.batch_size = 100
    length = len(pipeline.Rows(prepared.train, config.seq_length, prepared.tokenizer.end_of_text, config.seed))
    assert length < 50
    batch = next(pipeline.train_batches(prepared, config))
    assert batch["inputs_BL"].shape == (100, 64)
    assert len(set(rows_of([batch]))) == length


# --- held out ------------------------------------------------------------------------------------------------------


def test_validation_reads_each_held_out_document_once_and_fills_the_last_batch_with_padding(config, prepared):
    num_rows = len(pipeline.Rows(prepared.validation, config.seq_length, prepared.tokenizer.end_of_text))
    config.batch_size = num_rows - 1
    batches = list(pipeline.validation_batches(prepared, config))
    assert [batch["inputs_BL"].shape for batch in batches] == [(num_rows - 1, config.seq_length)] * 2
    assert sorted(texts_in(batches, prepared.tokenizer)) == sorted(texts_of(prepared.validation, prepared.tokenizer))
    assert sum(batch["loss_mask_BL"].sum() for batch in batches) == prepared.validation.num_targets
    assert batches[1]["loss_mask_BL"][0].any()
    assert not batches[1]["loss_mask_BL"][1:].any()
    assert not batches[1]["segment_ids_BL"][1:].any()
    assert (batches[1]["inputs_BL"][1:] == prepared.tokenizer.end_of_text).all()


def test_validation_is_the_same_each_time_and_stops_after_num_batches(config, prepared):
    config.batch_size = 1
    batches = list(pipeline.validation_batches(prepared, config))
    assert len(batches) > 3
    first = list(pipeline.validation_batches(prepared, config, num_batches=3))
    assert len(first) == 3
    for a, b in zip(first, batches, strict=False):
        assert_same(a, b)
    assert len(list(pipeline.validation_batches(prepared, config, num_batches=1000))) == len(batches)
