"""Batches depend on the seed and the step alone, whoever reads them; every row once an epoch; the sides kept apart."""

import dataclasses
import itertools
import json
import math
import pathlib

import numpy as np
import pytest
import shards

from moejax import config as config_lib
from moejax.data import documents, pipeline, preparation, tokenizers

KEYS = ["inputs_BL", "targets_BL", "segment_ids_BL", "positions_BL", "loss_mask_BL"]
PACKINGS = ["best_fit", "concatenate", "sample", "pad"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Sixty files of a few words each; some twice."""
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0)  # sample and pad tokenise when a row is read, as of a large corpus
    rng = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for i in range(60):
        text = f"{i % 50} é: " + " ".join(rng.choice(["cat", "night", "rain", "sea"], size=rng.integers(1, 20)))
        (tmp_path / "texts" / f"{i}.txt").write_text(text if i < 50 else f"{i % 50} again")
    return config_lib.DataConfig(
        source=f"files:{tmp_path / 'texts'}",
        vocab_size=270,
        seq_length=64,
        batch_size=4,
        validation_fraction=0.3,
    )


@pytest.fixture
def data(config):
    return pipeline.load(config)


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


# --- loading -----------------------------------------------------------------------------------------------------


def test_load_keeps_every_text_once_and_none_on_both_sides(config, data):
    train, validation = (texts_of(side, data.tokenizer) for side in (data.train.documents, data.validation))
    files = [path.read_text() for path in pathlib.Path(config.source.removeprefix("files:")).iterdir()]
    assert sorted(train + validation) == sorted(files)
    assert len(set(validation)) == 18
    assert not set(train) & set(validation)
    assert data.train.documents.num_bytes == sum(len(text.encode()) for text in train)
    assert data.train.documents[-1].tolist() == data.tokenizer.encode(train[-1])
    assert data.num_tokens == sum(len(tokens) + 1 for tokens in data.train.documents)


@pytest.mark.parametrize("packing_name", PACKINGS)
def test_the_tokenizer_is_trained_on_the_training_documents_alone(config, packing_name):
    config.packing = packing_name
    data = pipeline.load(config)
    train = texts_of(data.train.documents, data.tokenizer)
    alone = tokenizers.Bpe.train(train, config.vocab_size)
    both = tokenizers.Bpe.train(train + texts_of(data.validation, data.tokenizer), config.vocab_size)
    assert alone.to_json() != both.to_json()
    assert data.tokenizer.to_json() == alone.to_json()


def test_load_uses_the_tokenizer_it_is_given(config):
    data = pipeline.load(config, tokenizers.Bytes())
    assert data.tokenizer == tokenizers.Bytes()
    assert len(data.train.documents.tokens) == data.train.documents.num_bytes


def test_bits_per_byte_counts_every_target_and_every_byte():
    found = documents.tokenize(["ab", "é"], tokenizers.Bytes())
    assert (found.num_targets, found.num_bytes) == (6, 4)
    assert found.bits_per_byte(math.log(2)) == pytest.approx(6 / 4)


@pytest.mark.parametrize("packing_name", PACKINGS)
@pytest.mark.parametrize("on_the_fly", [False, True])
def test_blank_documents_are_counted_and_left_out(config, tmp_path, monkeypatch, packing_name, on_the_fly):
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0 if on_the_fly else 2**20)
    lines = ["one two", "", " \n ", "three", "four four"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "held out"}) + "\n")
    config.source, config.validation_source = f"files:{tmp_path}/a.jsonl", f"files:{tmp_path}/b.jsonl"
    config.tokenizer, config.batch_size, config.packing = "bytes", 50, packing_name
    data = pipeline.load(config)
    if on_the_fly and packing_name in ("sample", "pad"):
        assert (data.num_documents, data.num_left_out) == (5, None)  # nobody has looked yet
    else:
        assert (data.num_documents, data.num_left_out) == (3, 2)
        assert data.num_tokens == 7 + 5 + 9 + 3
    kept = {"one two", "three", "four four"}
    batch = pipeline.TrainBatches(data, config)[0]
    assert kept <= set(texts_in([batch], data.tokenizer)) | (kept if packing_name == "sample" else set())
    ends = (batch["inputs_BL"] == data.tokenizer.end_of_text) & (batch["targets_BL"] == data.tokenizer.end_of_text)
    assert not (ends & batch["loss_mask_BL"]).any()


@pytest.mark.parametrize("packing_name", ["sample", "pad"])
def test_rows_are_the_same_whether_documents_are_tokenised_before_or_on_the_fly(config, monkeypatch, packing_name):
    config.packing = packing_name
    on_the_fly = pipeline.load(config)
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 2**20)
    before = pipeline.load(config)
    assert isinstance(on_the_fly.train.documents, documents.OnTheFly)
    assert isinstance(before.train.documents, documents.InMemory)
    for step in (0, 1, 50):
        assert_same(pipeline.TrainBatches(on_the_fly, config)[step], pipeline.TrainBatches(before, config)[step])


def test_of_documents_longer_than_a_row_pad_counts_what_it_reads(config, monkeypatch):
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 2**20)
    config.packing, config.seq_length = "pad", 8
    data = pipeline.load(config)
    assert data.num_tokens == sum(min(len(tokens) + 1, 8) for tokens in data.train.documents)
    assert data.num_tokens < sum(len(tokens) + 1 for tokens in data.train.documents)


@pytest.mark.parametrize("packing_name", PACKINGS)
@pytest.mark.parametrize("on_the_fly", [False, True])
@pytest.mark.parametrize("blank", ["source", "validation_source"])
def test_a_side_of_blank_documents_is_refused(config, tmp_path, monkeypatch, packing_name, on_the_fly, blank):
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0 if on_the_fly else 2**20)
    config.packing, config.tokenizer = packing_name, "bytes"
    for name in ("source", "validation_source"):
        texts = [" ", "\t", ""] if name == blank else ["one", "two"]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        setattr(config, name, f"files:{tmp_path}/{name}.jsonl")
    if (packing_name, on_the_fly, blank) == ("pad", True, "source"):
        return  # rows of padding, which nobody has looked at
    with pytest.raises(config_lib.ConfigError, match="all blank"):
        pipeline.TrainBatches(pipeline.load(config), config)[0]


def test_what_both_sides_would_read_is_refused(config, tmp_path):
    folder = config.source.removeprefix("files:")
    for spec in (config.source, f"files:{folder}/1.txt"):
        config.validation_source = spec
        with pytest.raises(config_lib.ConfigError, match=r"both read .*1\.txt|both read .*0\.txt"):
            pipeline.load(config)
    config.source = config.validation_source = "wikipedia"
    with pytest.raises(config_lib.ConfigError, match="both read wikipedia"):
        pipeline.load(config)


def test_held_out_documents_of_a_tfds_data_set_are_those_of_its_split_validation(config, tmp_path):
    for split, count in (("train", 30), ("validation", 3)):
        texts = [f"{split} {i}" for i in range(count)]
        made = shards.write(tmp_path / "tfds" / "c4" / "en" / "3.1.0", "tfrecord", texts)
        made.rename(made.parent / f"c4-{split}.tfrecord-00000-of-00001")
    config.tfds_dir = str(tmp_path / "tfds")
    held_out = [f"validation {i}" for i in range(3)]
    config.validation_source = "tfds:c4/en:3.1.0"
    assert texts_of((data := pipeline.load(config)).validation, data.tokenizer) == held_out
    config.source, config.validation_source = "tfds:c4/en:3.1.0", ""
    assert texts_of((data := pipeline.load(config)).validation, data.tokenizer) == held_out
    assert data.num_documents == 30


def test_a_broken_validation_source_is_named_as_such(config):
    config.validation_source = "files:/absent/*.json"
    with pytest.raises(config_lib.ConfigError, match=r"^data\.validation_source: no file matches"):
        pipeline.load(config)


def test_more_documents_than_best_fit_can_search_are_refused(config, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_BEST_FIT", 10)
    with pytest.raises(config_lib.ConfigError, match=r"set data\.packing=concatenate, or pack in shards"):
        pipeline.load(config)


def test_the_held_out_documents_are_those_of_the_validation_source_and_no_more_than_asked_for(config, tmp_path):
    for i in range(5):
        (tmp_path / f"held_{i}.txt").write_text(f"held out {i}")
    config.validation_source = f"files:{tmp_path}/held_*.txt"
    data = pipeline.load(config)
    assert texts_of(data.validation, data.tokenizer) == [f"held out {i}" for i in range(5)]
    assert data.num_documents == 60
    config.validation_documents = 2
    data = pipeline.load(config)
    assert texts_of(data.validation, data.tokenizer) == ["held out 0", "held out 1"]


def test_a_corpus_too_large_for_memory_is_refused_unless_its_rows_are_read_one_by_one(config, monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "MAX_IN_MEMORY", 100)
    with pytest.raises(config_lib.ConfigError, match=r"to hold out a share .* in data\.validation_source"):
        pipeline.load(config)
    (tmp_path / "held.txt").write_text("held out")
    config.validation_source = f"files:{tmp_path}/held.txt"
    with pytest.raises(config_lib.ConfigError, match=r"best_fit needs the length .* data prepare"):
        pipeline.load(config)
    config.packing = "sample"
    assert pipeline.TrainBatches(pipeline.load(config), config)[0]["inputs_BL"].shape == (4, 64)


@pytest.mark.parametrize("packing_name", PACKINGS)
def test_the_digest_follows_the_documents_and_not_their_place(config, packing_name, tmp_path):
    config.packing = packing_name
    first = pipeline.load(config)
    (tmp_path / "texts").rename(tmp_path / "moved")
    config.source = f"files:{tmp_path / 'moved'}"
    assert pipeline.load(config).digest == first.digest
    (tmp_path / "moved" / "1.txt").write_text("something else")
    assert pipeline.load(config).digest != first.digest


def test_span_corruption_needs_sentinels(config, tmp_path, monkeypatch):
    config.packing = "concatenate"
    preparation.prepare(config, tmp_path / "made")  # for another objective
    config.objective, tokenizer = "span_corruption", tokenizers.Bytes()
    with pytest.raises(config_lib.ConfigError, match=r"bytes tokenizer of the other run was .*; start from a run with"):
        pipeline.load(config, tokenizer)
    other = dataclasses.replace(config, source=f"prepared:{tmp_path}/made")
    line = r"the bpe tokenizer of prepared:\S+ was made .*, without any; prepare the corpus with data\.objective=span_"
    with pytest.raises(config_lib.ConfigError, match=line):
        pipeline.load(other)
    monkeypatch.setattr(tokenizers.Bytes, "name", "gpt2")
    config.tokenizer = "gpt2"
    with pytest.raises(config_lib.ConfigError, match=r"needs sentinel tokens, and data\.tokenizer=gpt2 has none; use"):
        pipeline.load(config, tokenizer)


# --- training ------------------------------------------------------------------------------------------------------


def test_training_batches_have_the_shapes_and_types_of_the_contract(config, data):
    batch = next(pipeline.train_batches(data, config))
    assert list(batch) == KEYS
    assert {batch[key].shape for key in KEYS} == {(4, 64)}
    assert [batch[key].dtype.name for key in KEYS] == ["int32"] * 4 + ["bool"]


@pytest.mark.parametrize("packing_name", PACKINGS)
@pytest.mark.parametrize("start", [0, 1, 7, 40])
def test_batch_n_is_the_same_from_the_start_and_after_resuming_at_n(config, start, packing_name):
    config.packing = packing_name
    fresh = list(itertools.islice(pipeline.train_batches(pipeline.load(config), config), start, start + 3))
    data = pipeline.load(config)
    resumed = list(itertools.islice(pipeline.train_batches(data, config, start), 3))
    for n in range(3):
        assert_same(fresh[n], resumed[n])
        assert_same(fresh[n], pipeline.TrainBatches(data, config)[start + n])


@pytest.mark.parametrize("packing_name", ["best_fit", "sample"])
def test_batches_are_the_same_with_worker_processes(config, packing_name):
    config.packing = packing_name
    data = pipeline.load(config)
    alone = list(itertools.islice(pipeline.train_batches(data, config, 5), 5))
    config.num_workers = 2
    batches = pipeline.train_batches(data, config, 5)
    for expected in alone:
        assert_same(next(batches), expected)
    batches.close()


@pytest.mark.parametrize("packing_name", PACKINGS)
def test_hosts_read_the_parts_of_one_batch_and_a_run_resumes_on_another_number_of_them(config, packing_name):
    config.batch_size, config.packing = 8, packing_name
    data = pipeline.load(config)
    alone = list(itertools.islice(pipeline.train_batches(data, config), 12))
    step = 0
    for num_hosts, num_steps in ((2, 3), (8, 1), (4, 5), (1, 3)):  # stop, and go on with another number of hosts
        hosts = [pipeline.train_batches(data, config, step, parts=(h,), num_parts=num_hosts) for h in range(num_hosts)]
        for _ in range(num_steps):
            parts = [next(host) for host in hosts]
            assert {part["inputs_BL"].shape[0] for part in parts} == {8 // num_hosts}
            assert_same({key: np.concatenate([part[key] for part in parts]) for key in KEYS}, alone[step])
            step += 1
    assert step == 12


def test_a_batch_that_does_not_divide_into_the_parts_is_refused(config, data):
    with pytest.raises(config_lib.ConfigError, match=r"data\.batch_size=4 does not divide into 3 parts"):
        pipeline.train_batches(data, config, num_parts=3)


@pytest.mark.parametrize("packing_name", ["best_fit", "concatenate", "pad"])
def test_an_epoch_reads_every_row_once_and_each_epoch_has_an_order_of_its_own(config, packing_name):
    config.batch_size, config.packing = 1, packing_name
    data = pipeline.load(config)
    length = data.train.num_rows
    assert length > 10
    batches = pipeline.TrainBatches(data, config)
    epochs = [[batches[epoch * length + i] for i in range(length)] for epoch in range(3)]
    eot = data.tokenizer.end_of_text
    whole = sorted([*tokens.tolist(), eot] for tokens in data.train.documents)
    for epoch in epochs:
        counted = np.concatenate([batch["targets_BL"][batch["loss_mask_BL"]] for batch in epoch])
        assert sorted(counted.tolist()) == sorted(itertools.chain.from_iterable(whole))
    orders = [rows_of(epoch) for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_no_held_out_text_is_in_a_training_batch(config, data):
    batches = list(itertools.islice(pipeline.train_batches(data, config), 30))
    seen = set(texts_in(batches, data.tokenizer))
    assert seen == set(texts_of(data.train.documents, data.tokenizer))
    assert not seen & set(texts_of(data.validation, data.tokenizer))


def test_another_seed_packs_other_rows_and_reads_them_in_another_order(config):
    config.batch_size = 1
    contents, orders = [], []
    for config.seed in (1, 1, 2, 2**31 - 1):
        data = pipeline.load(config)
        rows = data.train.num_rows
        content = [data.objective.arrays(streams, 0)["inputs_L"].tobytes() for streams in data.train.read(range(rows))]
        batches = pipeline.TrainBatches(data, config)
        orders.append([content.index(row) for row in rows_of(batches[n] for n in range(rows))])
        contents.append(frozenset(content))
    assert contents[0] == contents[1]
    assert orders[0] == orders[1]
    assert len(set(contents)) == 3
    assert len({tuple(order) for order in orders}) == 3


def test_fewer_rows_than_a_batch_repeat(config, data):
    config.batch_size = 100
    assert data.train.num_rows < 50
    batch = next(pipeline.train_batches(data, config))
    assert batch["inputs_BL"].shape == (100, 64)
    assert len(set(rows_of([batch]))) == data.train.num_rows


def test_without_isolation_the_rows_hold_the_same_tokens_in_one_segment(config):
    config.packing = "concatenate"
    apart = pipeline.TrainBatches(pipeline.load(config), config)[0]
    config.isolate_documents = False
    together = pipeline.TrainBatches(pipeline.load(config), config)[0]
    np.testing.assert_array_equal(apart["inputs_BL"], together["inputs_BL"])
    assert apart["segment_ids_BL"].max() > 1
    assert together["segment_ids_BL"].max() == 1
    assert together["positions_BL"].max() == 63


# --- held out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing_name", PACKINGS)
def test_validation_reads_each_held_out_document_once_and_fills_the_last_batch_with_padding(config, packing_name):
    config.packing = packing_name
    data = pipeline.load(config)
    num_rows = pipeline.validation_packer(data, config).num_rows
    config.batch_size = num_rows - 1
    batches = list(pipeline.validation_batches(data, config))
    assert [batch["inputs_BL"].shape for batch in batches] == [(num_rows - 1, config.seq_length)] * 2
    whole = [[*tokens.tolist(), data.tokenizer.end_of_text] for tokens in data.validation]
    counted = np.concatenate([batch["targets_BL"][batch["loss_mask_BL"]] for batch in batches])
    assert sorted(counted.tolist()) == sorted(itertools.chain.from_iterable(whole))
    assert sum(batch["loss_mask_BL"].sum() for batch in batches) == data.validation.num_targets
    assert batches[1]["loss_mask_BL"][0].any()
    assert not batches[1]["loss_mask_BL"][1:].any()
    assert not batches[1]["segment_ids_BL"][1:].any()
    assert (batches[1]["inputs_BL"][1:] == data.tokenizer.end_of_text).all()


def test_validation_is_the_same_each_time_and_stops_after_num_batches(config, data):
    config.batch_size = 1
    batches = list(pipeline.validation_batches(data, config))
    assert len(batches) > 3
    first = list(pipeline.validation_batches(data, config, num_batches=3))
    assert len(first) == 3
    for a, b in zip(first, batches, strict=False):
        assert_same(a, b)
    assert len(list(pipeline.validation_batches(data, config, num_batches=1000))) == len(batches)
