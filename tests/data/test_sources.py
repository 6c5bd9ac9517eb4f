"""A spec names the documents of files in a fixed order, or is refused with what is there instead."""

import pickle
import random
import shutil

import fsspec
import numpy as np
import pytest
import shards

from moejax.data import lines, sources

every_form = pytest.mark.parametrize("form", shards.FORMS)


@pytest.fixture(autouse=True)
def _folders(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    fsspec.filesystem("memory").store.clear()


def texts_of(source):
    return [source[i] for i in range(len(source))]


def read(spec, **kwargs):
    return texts_of(sources.open_source(spec, **kwargs))


# --- a sequence ----------------------------------------------------------------------------------------------------


@every_form
def test_indices_are_those_of_a_list(form, tmp_path):
    shards.write(tmp_path, form, ["a", "b", "c"], stem="0")
    if form == "array_record":  # the one form whose writer leaves a file without records that is not empty
        shards.write(tmp_path, form, [], stem="1")
    shards.write(tmp_path, form, ["d", "e"], stem="2")
    source = sources.open_source(f"files:{tmp_path}/*")
    documents = list("abcde")
    assert len(source) == 5
    for i in range(-5, 5):
        assert source[i] == documents[i]
    assert source[np.int64(3)] == "d"  # pyright: ignore[reportArgumentType]  # as shuffles give them
    for i in (5, -6):
        with pytest.raises(IndexError):
            source[i]


def test_all_forms_may_come_in_one_source_and_survive_pickling(tmp_path):
    spec = ",".join(str(shards.write(tmp_path / form, form, shards.TEXTS)) for form in shards.FORMS)
    source = sources.open_source(f"files:{spec}")
    assert texts_of(source) == shards.TEXTS * 5
    assert texts_of(pickle.loads(pickle.dumps(source))) == shards.TEXTS * 5
    assert source.num_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())


@every_form
def test_local_and_remote_files_hold_the_same(form, tmp_path):
    paths = [shards.write(tmp_path, form, shards.TEXTS[i::2], stem=f"part-{i}") for i in range(2)]
    remote = [shards.in_memory(path, "bucket/c4") for path in paths]
    local_source = sources.open_source(f"files:{tmp_path}/part-*")
    remote_source = sources.open_source("files:memory://bucket/c4/part-*")
    assert texts_of(remote_source) == texts_of(local_source) == shards.TEXTS[::2] + shards.TEXTS[1::2]
    assert remote_source.fingerprint == local_source.fingerprint
    assert texts_of(sources.open_source(f"files:{remote[1]}")) == shards.TEXTS[1::2]


# --- the order of files --------------------------------------------------------------------------------------------


def test_files_come_by_pattern_then_by_name_and_once(tmp_path, monkeypatch):
    for name in ("b", "a", "a-b", "c", "sub/a"):
        shards.write((tmp_path / name).parent, "json", [name], stem=name.rpartition("/")[-1])
    everything = ["a-b", "a", "b", "c"]
    assert read(f"files:{tmp_path}/*.jsonl") == everything
    assert read(f"files:{tmp_path}/c.jsonl,{tmp_path}/*.jsonl, {tmp_path}/b.jsonl") == ["c", "a-b", "a", "b"]
    assert read(f"files:{tmp_path}/**/a.jsonl") == ["a", "sub/a"]
    monkeypatch.chdir(tmp_path)
    assert read("files:[bc].jsonl,a.jsonl") == ["b", "c", "a"]


def test_a_folder_stands_for_its_text_at_any_depth_and_a_named_file_is_text(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for name, text in {"b.txt": "b", "a.MD": "a", "deep/c.txt": "c", "d.py": "no text", "blank.txt": " \n"}.items():
        (folder / name).write_text(text)
    (folder / "empty.txt").write_text("")
    (tmp_path / "named.py").write_bytes("é\r\n".encode())
    source = sources.open_source(f"files:{tmp_path}/named.py,{folder},{folder}/b.txt")
    assert texts_of(source) == ["é\r\n", "a", "b", "c"]
    assert source.num_skipped == 2
    (tmp_path / "odd[1].py").write_text("literal")
    assert read(f"files:{tmp_path}/odd[1].py") == ["literal"]


def test_the_form_is_told_by_the_name(tmp_path):
    for name in ("a.ndjson", "b.json", "c.JSONL"):
        shards._json(tmp_path / name, [{"text": name}])
    shards._json_gz(tmp_path / "d.ndjson.gz", [{"text": "d"}])
    shards._array_record(tmp_path / "train.arrayrecord", [{"text": "e"}])
    shards._tfrecord(tmp_path / "x.tfrecords", [{"text": "f"}])
    (tmp_path / "z.text").write_text("g")
    assert read(f"files:{tmp_path}/*") == ["a.ndjson", "b.json", "c.JSONL", "d", "e", "f", "g"]


# --- the fingerprint -----------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_names_sizes_order_and_field_and_not_of_the_folder(tmp_path):
    for stem in "ab":
        shards.write(tmp_path / "one", "json", [stem * 9], stem=stem)
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)  # of another time

    def fingerprint(files, folder="one", **kwargs):
        return sources.open_source(f"files:{tmp_path / folder}/{files}", **kwargs).fingerprint

    base = fingerprint("*")
    assert base == fingerprint("*", folder="two")
    shards.write(tmp_path / "two", "json", ["b" * 8], stem="b")
    others = [
        fingerprint("*", folder="two"),
        fingerprint("a*"),
        fingerprint("*", text_field="url"),
        fingerprint(f"b*,{tmp_path}/one/a*"),
    ]
    assert len({base, *others}) == 5


# --- refusals ------------------------------------------------------------------------------------------------------


def refusal(spec, **kwargs):
    return shards.refusal(sources.open_source, spec, **kwargs)


def test_a_spec_that_names_nothing_is_refused(tmp_path):
    assert "data.source=c4 is no source of files; write files:PATTERN or tfds:" in refusal("c4")
    assert "has an empty pattern" in refusal("files:")
    assert "has an empty pattern" in refusal("files:, ")
    assert f"no file matches {tmp_path}/*.json (seen from " in refusal(f"files:{tmp_path}/*.json")
    assert "no file matches memory://bucket/*.json" in refusal("files:memory://bucket/*.json")
    (tmp_path / "a.py").write_text("x")
    message = refusal(f"files:{tmp_path}")
    assert f"the folder {tmp_path} holds no *.txt or *.md file at any depth; name another folder" in message


def test_a_file_of_no_known_form_is_refused_unless_it_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.csv").write_text("y")
    message = refusal(f"files:{tmp_path}/*")
    assert f"{tmp_path}/b.csv is of no known form: a name has array_record or tfrecord in it, or ends in" in message
    assert ".jsonl, .ndjson (or these with .gz), .parquet, .txt" in message
    assert read(f"files:{tmp_path}/b.csv") == ["y"]
    (tmp_path / "c.jsonl.zst").write_text("z")
    assert "c.jsonl.zst is of no known form" in refusal(f"files:{tmp_path}/c.jsonl.zst")


@every_form
def test_an_empty_file_is_refused(form, tmp_path):
    path = tmp_path / f"x.{shards.FORMS[form][0]}"
    path.write_bytes(b"")
    assert f"{path} is empty (0 bytes); fetch the file again" in refusal(f"files:{path}")


def test_files_without_any_document_are_refused(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    message = refusal(f"files:{tmp_path}/blank.txt")
    assert "1 files hold no document, all of them empty" in message
    assert f"({tmp_path}/blank.txt); give files with text" in message


def test_of_several_damaged_files_the_first_is_named(tmp_path):
    for i in range(40):
        path = shards.write(tmp_path, "tfrecord", [f"text {i}"], stem=f"{i:02d}")
        if i in (7, 8, 30):
            path.write_bytes(path.read_bytes()[:-3])
    message = refusal(f"files:{tmp_path}/*")
    assert "/07.tfrecord-00000-of-00001 ends inside record 0 (0 documents before it are readable)" in message


# --- tfds: ---------------------------------------------------------------------------------------------------------


def prepare(root, split, form="array_record", total=3, skip=(), name="c4", folder="c4/en/3.1.0"):
    """The shards of a split with two documents each; the documents, in order."""
    documents = [f"{split} {form} {folder} {i}" for i in range(2 * total)]
    (root / folder).mkdir(parents=True, exist_ok=True)
    for i in set(range(total)) - set(skip):
        path = root / folder / f"{name}-{split}.{form}-{i:05d}-of-{total:05d}"
        shards.FORMS[form][1](path, [{"text": text} for text in documents[2 * i : 2 * i + 2]])
    return documents


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
def test_a_prepared_data_set_is_read_by_split_and_its_splits_are_known(form, tmp_path, monkeypatch):
    train = prepare(tmp_path, "train", form, total=12)
    validation = prepare(tmp_path, "bg-Latn-validation", form)  # as in c4/multilingual
    (tmp_path / "c4/en/3.1.0/dataset_info.json").write_text("{}")
    directory = {"tfds_dir": str(tmp_path)}
    assert read("tfds:c4/en:3.1.0", **directory) == train
    assert read("tfds:c4/en:3.1.0", split="bg-Latn-validation", **directory) == validation
    assert sources.splits("tfds:c4/en:3.1.0", **directory) == ("bg-Latn-validation", "train")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert read("tfds:c4/en") == train
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.move(tmp_path / "c4", tmp_path / "home/tensorflow_datasets/c4")
    assert read("tfds:c4/en") == train
    assert sources.splits("files:anything") == sources.splits("wikipedia") == ()


def test_a_prepared_data_set_is_read_from_a_remote_folder(tmp_path):
    documents = prepare(tmp_path, "train")
    for path in sorted((tmp_path / "c4/en/3.1.0").iterdir()):
        shards.in_memory(path, "tfds/c4/en/3.1.0")
    assert read("tfds:c4/en", tfds_dir="memory://tfds/") == documents
    assert sources.splits("tfds:c4/en", tfds_dir="memory://tfds") == ("train",)


def test_the_highest_version_is_read_by_number_and_a_half_prepared_one_is_none(tmp_path):
    for version in ("2.3.1", "10.0.0", "9.9.9", "11.0.0.incompleteABC"):
        prepare(tmp_path, "train", folder=f"lm1b/{version}", name="lm1b")
    assert all("/10.0.0 " in text for text in read("tfds:lm1b", tfds_dir=str(tmp_path)))
    assert all("/2.3.1 " in text for text in read("tfds:lm1b:2.3.1", tfds_dir=str(tmp_path)))


def test_array_records_come_before_tfrecords_whatever_the_metadata_says(tmp_path):
    prepare(tmp_path, "train", "tfrecord")
    documents = prepare(tmp_path, "train", "array_record")
    (tmp_path / "c4/en/3.1.0/dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    assert read("tfds:c4/en", tfds_dir=str(tmp_path)) == documents


def test_a_data_set_that_is_not_all_there_is_refused(tmp_path):
    prepare(tmp_path, "train", total=12, skip=(2, 4, 5, 6, 7, 8, 11))
    prepare(tmp_path, "validation", total=3, skip=(0,))
    folder = tmp_path / "c4/en/3.1.0"
    message = refusal("tfds:c4/en", tfds_dir=str(tmp_path))
    assert f"{folder} lacks 7 of the 12 train.array_record files: 2, 4, 5, 6, 7, ...; fetch them too" in message
    message = refusal("tfds:c4/en", split="validation", tfds_dir=str(tmp_path))
    assert "lacks 1 of the 3 validation.array_record files: 0; fetch" in message
    message = refusal("tfds:c4/en", split="test", tfds_dir=str(tmp_path))
    assert f"{folder} has no split test, only train, validation; name one of these" in message


def test_two_sets_of_files_for_one_split_are_refused(tmp_path):
    prepare(tmp_path, "train", total=2)
    prepare(tmp_path, "train", total=3)
    message = refusal("tfds:c4/en", tfds_dir=str(tmp_path))
    assert "c4-train.array_record-*-of-00002 and c4-train.array_record-*-of-00003; remove all but one" in message


def test_a_folder_that_is_no_data_set_is_refused_with_what_it_holds(tmp_path):
    message = refusal("tfds:c4/en:3.1.0", tfds_dir=str(tmp_path))
    assert f"data.source=tfds:c4/en:3.1.0: no version 3.1.0 in {tmp_path}/c4/en, which is no folder" in message
    assert "set data.tfds_dir (or TFDS_DATA_DIR)" in message
    prepare(tmp_path, "train")
    message = refusal("tfds:c4/en:2.0.0", tfds_dir=str(tmp_path))
    assert f"no version 2.0.0 in {tmp_path}/c4/en, which holds 3.1.0" in message
    message = refusal("tfds:c4", tfds_dir=str(tmp_path))
    assert f"no version in {tmp_path}/c4, which holds en" in message
    for path in (tmp_path / "c4/en/3.1.0").iterdir():
        path.unlink()
    message = refusal("tfds:c4/en", tfds_dir=str(tmp_path))
    assert "holds neither *-SPLIT.array_record-*-of-* nor *-SPLIT.tfrecord-*-of-* files" in message
    for spec in ("tfds:", "tfds:c4/en:latest", "tfds:a/b/c", "tfds:/x"):
        assert "is no data set's name; write tfds:NAME[/CONFIG][:VERSION]" in refusal(spec)
        assert "is no data set's name" in shards.refusal(sources.splits, spec)


def test_documents_of_many_shards_are_read_at_random(tmp_path):
    texts = [f"{i} " * (i % 50) for i in range(600)]
    for i in range(30):
        shards.write(tmp_path, "tfrecord", texts[20 * i : 20 * i + 20], stem=f"{i:02d}")
    source = sources.open_source(f"files:{tmp_path}/*")
    for i in random.Random(0).sample(range(600), 600):
        assert source[i] == texts[i]


def test_long_text_files_count_as_the_documents_they_are_cut_into(tmp_path):
    (tmp_path / "long.txt").write_text("word\n" * 2**16)
    source = sources.open_source(f"files:{tmp_path}")
    assert len(source) == 6  # of at most 2**16 characters, each ending at a line's end
    assert max(map(len, texts_of(source))) <= lines.MAX_TEXT
    assert "".join(texts_of(source)) == "word\n" * 2**16
