"""Rows show as text with their boundaries, sentinels and padding; the figures are those of a count by hand."""

import dataclasses
import json

import numpy as np
import pytest

from moejax import cli
from moejax import config as config_lib
from moejax.data import inspection, packing, pipeline, preparation, tokenizers


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Seven documents of 1, 1, 3, 3 (the same again), 4, 9 and no characters, and one held out."""
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    texts = ["a", "b", "cat", "cat", "", "rain", "sea shore"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "held out"}) + "\n")
    return config_lib.DataConfig(
        source=f"files:{tmp_path}/train.jsonl",
        validation_source=f"files:{tmp_path}/held.jsonl",
        tokenizer="bytes",
        packing="pad",
        seq_length=8,
        batch_size=3,
    )


def test_the_figures_of_documents_and_rows_are_those_counted_by_hand(config):
    found = inspection.summarise(pipeline.load(config), config)
    # rows of 8 slots hold 2 + 2 + 4 + 4 + 5 + 8 pairs, the last without two of its ten
    assert (found.rows, found.documents, found.documents_seen, found.blank) == (6, 6, 6, 1)
    assert found.tokens_per_row == pytest.approx(25 / 6)
    assert found.padding == pytest.approx(1 - 25 / 48)
    assert found.counted == pytest.approx(25 / 48)
    assert found.cut == pytest.approx(2 / 27)
    assert found.parts_per_row == 1
    assert found.repeated == pytest.approx(1 / 6)
    assert found.tokens_per_document["mean"] == pytest.approx(21 / 6)
    assert found.tokens_per_document["max"] == 9
    assert found.histogram == [(1, 2), (2, 2), (4, 1), (8, 1)]
    shown = inspection.show_summary(found)
    assert "16.7% repeat an earlier one" in shown
    assert "1 blank" in shown
    assert "7.4% of the tokens are beyond a row" in shown
    assert len(shown.splitlines()) == 3 + 4


@pytest.mark.parametrize("on_the_fly", [False, True])
def test_documents_are_counted_by_their_label(config, tmp_path, monkeypatch, on_the_fly):
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0 if on_the_fly else 2**25)
    assert inspection.summarise(pipeline.load(config), config).labels == {}
    of_labels = ["sea", "art", "sea", "sea", "art", "law", "sea"]  # the blank document's is art
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows = [row | {"topic": label} for row, label in zip(rows, of_labels, strict=True)]
    for name, part in (("train", rows), ("held", rows[:1])):
        (tmp_path / f"{name}-topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config.source, config.validation_source = (f"files:{tmp_path}/{name}-topics.jsonl" for name in ("train", "held"))
    config.label, config.labels = "field:topic", ("absent", "art", "sea")
    found = inspection.summarise(pipeline.load(config), config)
    num_art = 2 if on_the_fly else 1
    assert list(found.labels.items()) == [("sea", 4), ("art", num_art), ("absent", 0)]
    assert found.unlisted == 1
    assert inspection.to_json(found)["labels"] == found.labels
    line = f"labels of {5 + num_art} documents: sea 4, art {num_art}, absent 0, 1 with none of these"
    assert inspection.show_summary(found).splitlines()[-1] == line
    many = dataclasses.replace(found, labels={f"label {i}": 30 - i for i in range(25)})
    assert "label 19 11, and 5 more" in inspection.show_summary(many)


def test_rows_packed_beforehand_have_figures_too(config, tmp_path):
    config.packing = "concatenate"
    preparation.prepare(config, tmp_path / "rows", form="rows")
    config.source, config.validation_source = f"prepared:{tmp_path / 'rows'}", ""
    found = inspection.summarise(pipeline.load(config), config)
    assert (found.rows, found.documents, found.blank) == (4, 6, 1)
    assert found.tokens_per_row == pytest.approx(27 / 4)


def next_token(isolate=True):
    return packing.NextToken(row_length=16, end_of_text=256, isolate=isolate)


def streams(*texts):
    return [np.array([256 if byte == ord("|") else byte for byte in text.encode()], np.int32) for text in texts]


def test_a_row_shows_where_documents_begin_go_on_and_end():
    row = next_token().arrays(streams("xyz|", "|cat|", "|ra"), 0)
    assert (
        inspection.show_row(row, tokenizers.Bytes(), colour=False)
        == "⟨…⟩yz⟨end⟩⟨document⟩cat⟨end⟩⟨document⟩ra⟨7 padding⟩"
    )
    together = next_token(isolate=False).arrays(streams("xyz|", "|cat|", "|ra"), 0)
    assert inspection.show_row(together, tokenizers.Bytes(), colour=False) == "⟨…⟩yz⟨end⟩cat⟨end⟩ra⟨7 padding⟩"


def test_colour_marks_boundaries_and_what_does_not_count():
    row = next_token().arrays(streams("|cat|"), 0)
    row["loss_mask_L"][1] = False
    shown = inspection.show_row(row, tokenizers.Bytes(), colour=True)
    assert shown == "\x1b[36m⟨document⟩\x1b[0mc\x1b[2ma\x1b[0mt\x1b[36m⟨end⟩\x1b[0m\x1b[2m⟨12 padding⟩\x1b[0m"


def test_a_corrupted_row_shows_its_sentinels_and_restores_to_the_text():
    objective = packing.SpanCorruption(
        inputs_length=16, noise_density=0.3, mean_span_length=2.0, first_sentinel=356, num_sentinels=100,
        end_of_text=256, pad=256, seed=0,
    )  # fmt: skip
    row = objective.arrays(streams("the sea shore"), 0)
    shown = inspection.show_row(row, tokenizers.Bytes("100"), colour=False)
    inputs, targets = shown.split("\n")
    assert inputs.startswith("inputs ")
    assert targets.startswith("targets <extra_id_0>")
    assert inputs.count("⟨end⟩") == targets.count("⟨end⟩") == 1
    spans = targets.removeprefix("targets ").partition("⟨end⟩")[0].split("<extra_id_")[1:]
    text = inputs.removeprefix("inputs ").partition("⟨end⟩")[0]
    for span in spans:
        number, _, tokens = span.partition(">")
        text = text.replace(f"<extra_id_{number}>", tokens)
    assert text == "the sea shore"
    assert "\x1b[33;1m<extra_id_0>\x1b[0m" in inspection.show_row(row, tokenizers.Bytes("100"), colour=True)


def test_the_first_rows_are_those_of_the_first_batches(config):
    data = pipeline.load(config)
    rows = inspection.first_rows(data, config, 5)
    batches = pipeline.TrainBatches(data, config)
    assert len(rows) == 5
    np.testing.assert_array_equal(rows[4]["inputs_L"], batches[1]["inputs_BL"][1])


# --- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(config, tmp_path):
    return [
        f"--config=tests/tiny.py:{tmp_path}",
        f"--config.data.source={config.source}",
        f"--config.data.validation_source={config.validation_source}",
    ]


def test_data_inspect_shows_rows_and_figures_or_json(arguments, capsys):
    assert cli.run(["data", "inspect", *arguments, "--rows=1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("row 0\n")
    assert "⟨document⟩" in shown
    assert "documents: 6 to train on" in shown
    assert "\x1b" not in shown  # not a terminal
    assert cli.run(["data", "inspect", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 6


def test_data_prepare_by_parts_then_inspect_what_it_made(arguments, tmp_path, capsys):
    made = tmp_path / "made"
    prepare = ["data", "prepare", *arguments, f"--output={made}", "--num_shards=2"]
    assert cli.run([*prepare, "--shard=0/2"]) == 0
    assert "waits for 1 shards of other calls" in capsys.readouterr().out
    assert cli.run([*prepare, "--shard=1/2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == []
    assert cli.run(prepare) == 0
    assert f"{made} is ready: --config.data.source=prepared:{made}" in capsys.readouterr().out
    there = [arguments[0], f"--config.data.source=prepared:{made}"]
    assert cli.run(["data", "inspect", *there, "--rows=0"]) == 0
    assert "documents: 6 to train on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (["--shard=2/2"], "--shard=2/2 must be i/n with i from 0 to n - 1"),
        (["--shard=1"], "--shard=1 must be i/n"),
        (["--num_shards=-1"], "--num_shards=-1 must be 0 or more"),
        (["--output=gs://bucket/x"], "--output=gs://bucket/x is remote; name a local folder"),
        (["--config.data.source=files:/absent/*.parquet"], "/absent/*.parquet"),
        (["--config.data.source=wikipedia:x"], "data.source=wikipedia:x is not complete"),
    ],
)
def test_what_cannot_be_prepared_is_one_line_and_status_2_and_nothing_is_written(
    arguments, tmp_path, capsys, change, found
):
    assert cli.run(["data", "prepare", *arguments, f"--output={tmp_path / 'made'}", *change]) == 2
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1
    assert not (tmp_path / "made").exists()
