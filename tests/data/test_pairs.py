"""Laws of text-to-text pairs: a pair a row, whole targets, and nothing cut or left out without a word."""

import json
import pickle

import numpy as np
import pytest

from moejax import config as config_lib
from moejax import rules
from moejax.data import corruption, inspection, packing, pipeline, preparation
from moejax.training import trainer

PAIRS = [("ab", "c"), ("sea", "shore"), ("a", "b"), ("rain", "bow")]
EOS = 256


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "train.jsonl", PAIRS)
    write(tmp_path / "held.jsonl", [("held", "out")])
    return config_lib.DataConfig(
        source=f"files:{tmp_path}/train.jsonl",
        validation_source=f"files:{tmp_path}/held.jsonl",
        text_field="question",
        target_field="answer",
        objective="text_to_text",
        tokenizer="bytes",
        packing="pad",
        seq_length=8,
        target_length=6,
        batch_size=2,
    )


def write(path, pairs):
    rows = [{"id": i, "question": source, "answer": target} for i, (source, target) in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def model_of(data):
    """A whole config, with a model for such rows."""
    model = config_lib.ModelConfig(period=("attention", "cross_attention"), encoder_period=("attention",))
    model.num_encoder_periods = 1
    return config_lib.Config(model=model, data=data)


def read_pairs(data, config, num_rows):
    rows = inspection.first_rows(data, config, num_rows)
    pairs = []
    for row in rows:
        sides = row["encoder_inputs_L"][row["encoder_mask_L"]], row["targets_M"][row["loss_mask_M"]]
        assert all(side[-1] == EOS for side in sides)
        pairs.append(tuple(bytes(side[:-1].tolist()).decode() for side in sides))
    return pairs


def test_a_row_is_a_pair_with_eos_at_both_ends_and_its_decoder_begins_with_padding(config):
    data = pipeline.load(config)
    (batch,) = pipeline.validation_batches(data, config)
    np.testing.assert_array_equal(batch["encoder_inputs_BL"][0], [*b"held", EOS, *[EOS] * 3])  # bytes pads with its EOS
    np.testing.assert_array_equal(batch["encoder_mask_BL"][0], [True] * 5 + [False] * 3)
    np.testing.assert_array_equal(batch["targets_BM"][0], [*b"out", EOS, EOS, EOS])
    np.testing.assert_array_equal(batch["decoder_inputs_BM"][0], [EOS, *b"out", EOS, EOS])
    np.testing.assert_array_equal(batch["loss_mask_BM"][0], [True] * 4 + [False] * 2)
    assert not batch["encoder_mask_BL"][1].any()  # the last batch is filled up with rows of padding
    assert not batch["loss_mask_BM"][1].any()


def test_rows_have_the_arrays_of_span_corruption(config):
    span = packing.SpanCorruption(
        inputs_length=8, noise_density=0.5, mean_span_length=1.0, first_sentinel=300, num_sentinels=9, end_of_text=EOS,
        pad=EOS, seed=0,
    )  # fmt: skip
    theirs = span.arrays(packing.Streams([np.arange(5, dtype=np.int32)], [0]), 0)
    ours = inspection.first_rows(pipeline.load(config), config, 1)[0]
    assert {name: array.dtype for name, array in ours.items()} == {name: array.dtype for name, array in theirs.items()}
    assert corruption.row_lengths(config) == (8, 6) == (len(ours["encoder_inputs_L"]), len(ours["targets_M"]))
    config.target_length = 0
    assert corruption.row_lengths(config) == (8, 8)


def test_an_epoch_reads_every_pair_once(config):
    data = pipeline.load(config)
    assert data.num_documents == 4
    for _ in range(2):
        assert sorted(read_pairs(data, config, 4)) == sorted(PAIRS)
    assert data.num_tokens == sum(len(a) + len(b) + 2 for a, b in PAIRS)
    assert data.validation.num_targets == len("out") + 1  # what the loss is a mean over
    assert data.validation.num_bytes == len("out")


def test_a_share_of_the_pairs_is_held_out_whole(config):
    config.validation_source, config.validation_fraction = "", 0.25
    data = pipeline.load(config)
    (batch,) = pipeline.validation_batches(data, config)
    target = batch["targets_BM"][0][batch["loss_mask_BM"][0]]
    held_out = [pair for pair in PAIRS if pair[1] == bytes(target[:-1].tolist()).decode()]
    assert sorted([*held_out, *read_pairs(data, config, 3)]) == sorted(PAIRS)


def test_pairs_come_from_parquet_too_and_a_target_may_be_a_number(config, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"question": ["like?", "dislike?"], "answer": [12, 3], "more": ["", ""]})
    parquet.write_table(table, tmp_path / "a.parquet")
    config.source = f"files:{tmp_path}/a.parquet"
    assert sorted(read_pairs(pipeline.load(config), config, 2)) == [("dislike", "3"), ("like?", "12")]


@pytest.mark.parametrize("side", [0, 1])
def test_a_pair_with_a_blank_side_is_left_out_and_counted(config, tmp_path, side):
    blank = tuple(" " if place == side else "x" for place in (0, 1))
    write(tmp_path / "train.jsonl", [*PAIRS, blank])
    data = pipeline.load(config)
    assert (data.num_documents, data.num_left_out) == (4, 1)


def test_an_input_longer_than_the_encoder_is_cut_before_eos_and_counted(config, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0)  # however large the corpus is
    write(tmp_path / "train.jsonl", [*PAIRS, ("0123456", "fits"), ("01234567", "cut"), ("0" * 20, "cut")])
    write(tmp_path / "held.jsonl", [("0123456789", "held")])
    data = pipeline.load(config)
    assert data.num_cut == 3
    assert sorted(read_pairs(data, config, 7))[:3] == [("0000000", "cut"), ("0123456", "cut"), ("0123456", "fits")]
    assert "; 3 inputs over data.seq_length=8 cut; packing pad" in trainer.describe(model_of(config), data)
    summary = inspection.summarise(data, config)
    whole = sum(len(a) + len(b) + 1 for a, b in PAIRS) + (7 + 4 + 1) + (8 + 3 + 1) + (20 + 3 + 1)
    assert summary.cut == pytest.approx((1 + 13) / whole)


def test_a_target_longer_than_the_decoder_is_refused_before_the_first_step(config, monkeypatch):
    config.target_length = 5
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0)  # however large the corpus is
    with pytest.raises(config_lib.ConfigError, match=r"target_length=5 .* has 6 tokens with EOS; set .*length=6"):
        pipeline.load(config)


def test_more_pairs_than_memory_holds_are_refused(config, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_IN_MEMORY", 10)
    with pytest.raises(
        config_lib.ConfigError, match=r"text_to_text needs the length of every target; give fewer pairs"
    ):
        pipeline.load(config)


def test_of_held_out_targets_too(config, tmp_path):
    write(tmp_path / "held.jsonl", [("a", "far too long"), ("b", "also too long")])
    with pytest.raises(config_lib.ConfigError, match="2 targets are too long, the longest has 14 tokens with EOS"):
        pipeline.load(config)


def test_a_record_without_its_target_is_named_with_the_setting(config, tmp_path):
    config.target_field = "reply"
    with pytest.raises(config_lib.ConfigError, match=r"no field 'reply' .* the target's in data\.target_field"):
        pipeline.load(config)
    (tmp_path / "train.txt").write_text("text")
    config.source = f"files:{tmp_path}/train.txt"
    with pytest.raises(config_lib.ConfigError, match=r"has no field 'reply' to be the target; name files of records"):
        pipeline.load(config)


def test_pairs_survive_the_way_to_a_worker(config):
    batches = pipeline.TrainBatches(pipeline.load(config), config)
    for name, array in pickle.loads(pickle.dumps(batches))[1].items():
        np.testing.assert_array_equal(array, batches[1][name])


def test_inspect_shows_both_sides(config):
    data = pipeline.load(config)
    (row,), (first,) = inspection.first_rows(data, config, 1), read_pairs(data, config, 1)
    shown = inspection.show_row(row, data.tokenizer, colour=False)
    assert shown.splitlines()[0].startswith(f"inputs {first[0]}⟨end⟩⟨")
    assert shown.splitlines()[1].startswith(f"targets {first[1]}⟨end⟩")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"source": "wikipedia"}, "data.source=wikipedia has no pairs of texts .*; use files: or tfds:"),
        ({"validation_source": "docstrings"}, "data.validation_source=docstrings has no pairs"),
        ({"source": "prepared:x", "validation_source": ""}, "data.source=prepared:x has no pairs"),
        ({"target_field": ""}, "data.target_field= must name the field of the target"),
        ({"target_field": "question"}, "data.target_field=question must name the field of the target"),
        ({"packing": "best_fit"}, "data.packing=best_fit is for rows of several .*; set data.packing=pad"),
        ({"target_length": 1}, "data.target_length=1 must be 2 or more"),
        ({"objective": "next_token"}, "data.target_field=answer has no effect with data.objective=next_token"),
        ({"objective": "span_corruption", "target_field": ""}, "data.target_length=6 has no effect with .*span_corrup"),
    ],
)
def test_what_pairs_cannot_be_is_refused_in_one_line(config, fields, line):
    whole = model_of(config)
    rules.validate(whole)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(config_lib.ConfigError, match=line):
        rules.validate(whole)


def test_pairs_need_an_encoder_and_no_prepared_folder(config, tmp_path):
    with pytest.raises(config_lib.ConfigError, match="text_to_text has rows for an encoder-decoder, and"):
        rules.validate(config_lib.Config(data=config))
    with pytest.raises(config_lib.ConfigError, match="text_to_text is not for prepared folders"):
        preparation.prepare(config, tmp_path / "prepared")
