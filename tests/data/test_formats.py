"""Every form gives back the texts that other writers put in, from anywhere, or says in a line what is wrong."""

import concurrent.futures
import gzip
import json
import pickle
import random
import struct

import fsspec
import google_crc32c
import pytest
import shards

from moejax.data import lines, records, storage, tables, zipped

INDEXED = ("tfrecord", "json", "gzip")
every_form = pytest.mark.parametrize("form", shards.READERS)


cache_folder = pytest.fixture(shards.fresh_cache, autouse=True)


# --- laws of all forms ---------------------------------------------------------------------------------------------


@every_form
def test_every_form_gives_the_texts_that_went_in(form, tmp_path):
    shard = shards.opened(form, shards.write(tmp_path, form, shards.TEXTS))
    assert shards.texts_of(shard) == shards.TEXTS
    assert shards.texts_of(pickle.loads(pickle.dumps(shard))) == shards.TEXTS
    assert shard.num_skipped == 0


@every_form
def test_every_form_reads_from_a_remote_file_system(form, tmp_path):
    path = shards.in_memory(shards.write(tmp_path, form, shards.TEXTS))
    shard = shards.opened(form, path)
    assert shards.texts_of(shard) == shards.TEXTS
    assert shard.text(3) == shards.texts_of(pickle.loads(pickle.dumps(shard)))[3]


@every_form
def test_every_form_takes_the_text_from_the_field_that_is_named(form, tmp_path):
    path = shards.write(tmp_path, form, ["a", "b"], field="content", text="not this", length=300)
    assert shards.texts_of(shards.opened(form, path, field="content")) == ["a", "b"]
    message = shards.refusal(lambda: shards.opened(form, path, field="body").text(0))
    assert path.name in message
    assert "no field 'body' but content, length, text, url; name the text's in data.text_field" in message
    message = shards.refusal(lambda: shards.opened(form, path, field="length").text(0))
    assert path.name in message
    assert message.endswith("name another in data.text_field")


@every_form
def test_threads_agree(form, tmp_path, monkeypatch):
    monkeypatch.setattr(zipped, "_SPACING", 2**16)
    monkeypatch.setattr(tables, "MAX_DECODED", 2**12)  # a few groups, so that they come and go
    texts = [f"{i} " * (i % 97) for i in range(300)]
    shard = shards.opened(form, shards.write(tmp_path, form, texts))

    def read(seed):
        order = random.Random(seed).choices(range(300), k=100)
        return [shard.text(i) for i in order] == [texts[i] for i in order]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


@every_form
@pytest.mark.parametrize("where", ["local", "memory"])
def test_an_empty_or_foreign_file_is_refused_or_holds_nothing(form, where, tmp_path):
    for content in (b"\0" * 100, b"hello\nworld\n" * 20, b"PAR1" * 20, b"\x1f\x8b\x08" + b"\0" * 40):
        path = shards.damaged(tmp_path, shards.FORMS[form][0], content)
        message = shards.outcome(form, shards.in_memory(path) if where == "memory" else path)
        assert path.name in message


@pytest.mark.parametrize("form", INDEXED)
def test_a_file_is_read_whole_once_and_again_after_a_change_or_damage_to_the_index(
    form, tmp_path, cache_folder, monkeypatch
):
    bytes_read = []
    original = storage.read

    def counted(file, start, length):
        if str(cache_folder) not in file.path:
            bytes_read.append(length)
        return original(file, start, length)

    monkeypatch.setattr(storage, "read", counted)
    texts = [random.Random(i).randbytes(100).hex() for i in range(100)]
    path = shards.write(tmp_path, form, texts)

    def cost_of_opening():
        bytes_read.clear()
        shard = shards.opened(form, path)
        cost = sum(bytes_read)
        assert shards.texts_of(shard) == texts
        return cost

    assert cost_of_opening() >= path.stat().st_size
    assert cost_of_opening() == 0
    for stored in (cache_folder / "indices").iterdir():
        stored.write_bytes(stored.read_bytes()[:-5])
    assert cost_of_opening() >= path.stat().st_size
    assert cost_of_opening() == 0
    texts.reverse()
    path.unlink()
    shards.write(tmp_path, form, texts)
    assert cost_of_opening() >= path.stat().st_size


@pytest.mark.parametrize("form", INDEXED)
def test_a_remote_file_is_indexed_in_blocks_and_not_by_record(form, tmp_path, monkeypatch):
    path = shards.in_memory(shards.write(tmp_path, form, ["word " * 100] * 1000))
    requests = []
    system = type(fsspec.filesystem("memory"))
    original = system.cat_file
    monkeypatch.setattr(system, "cat_file", lambda *a, **k: requests.append(1) or original(*a, **k))
    shard = shards.opened(form, path)
    assert len(shard) == 1000
    assert len(requests) <= 3
    shard.text(500)
    assert len(requests) <= 4


# --- ArrayRecord ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 1000, 65536, 70000])
def test_a_cut_array_record_is_refused_when_it_is_opened(cut, tmp_path):
    whole = shards.write(tmp_path, "array_record", shards.TEXTS).read_bytes()
    path = shards.damaged(tmp_path, "x.array_record", whole[:-cut])
    message = shards.refusal(shards.opened, "array_record", path)
    assert f"{path} is no whole ArrayRecord file" in message
    assert "none of its documents are readable; fetch the file again" in message


def test_a_damaged_array_record_names_the_record_and_spares_the_others(tmp_path):
    texts = [random.Random(i).randbytes(500).hex() for i in range(20)]
    content = bytearray(shards.write(tmp_path, "array_record", texts).read_bytes())
    for at in range(1000, 6000, 100):  # in the first records, which compress to about half
        content[at] ^= 1
    path = shards.damaged(tmp_path, "x.array_record", content)
    shard = shards.opened("array_record", path)
    found = []
    for i, text in enumerate(texts):
        try:
            assert shard.text(i) == text
            found.append(i)
        except ValueError as error:
            assert f"{path} record {i} is damaged (Corrupted Riegeli" in str(error)  # noqa: PT017
    assert 1 < len(found) < 20


# --- TFRecord ------------------------------------------------------------------------------------------------------


def test_masked_crc_follows_its_definition_and_the_published_check_value():
    crc = 0xE3069283  # CRC-32C of 123456789
    assert google_crc32c.value(b"123456789") == crc
    assert records.masked_crc(b"123456789") == (((crc >> 15) | (crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) % 2**32


def test_an_empty_tfrecord_matches_the_bytes_worked_out_by_hand(tmp_path):
    """The record of no bytes, as TensorFlow writes it: length 0, its masked CRC, masked CRC of nothing."""
    content = bytes(8) + bytes.fromhex("29039807") + struct.pack("<I", 0xA282EAD8)
    path = shards.damaged(tmp_path, "x.tfrecord", content * 2)
    assert len(shards.opened("tfrecord", path)) == 2
    assert "record 1 has no field 'text' but nothing" in shards.refusal(shards.opened("tfrecord", path).text, 1)


@pytest.mark.parametrize("block", [12, 13, 40, 64, 1000])
def test_tfrecords_may_straddle_blocks(block, tmp_path, monkeypatch):
    path = shards.write(tmp_path, "tfrecord", shards.TEXTS)
    monkeypatch.setattr(storage, "BLOCK", block)
    assert shards.texts_of(shards.opened("tfrecord", path)) == shards.TEXTS


def test_a_tfrecord_cut_anywhere_is_refused_with_what_is_readable(tmp_path):
    texts = ["one", "two", "three"]
    whole = shards.write(tmp_path, "tfrecord", texts).read_bytes()
    ends = shards.opened("tfrecord", tmp_path / "docs.tfrecord-00000-of-00001")._bounds.ints(0, 4).tolist()
    assert ends[-1] == len(whole)
    for size in range(1, len(whole)):
        path = shards.damaged(tmp_path, "x.tfrecord", whole[:size])
        num = sum(end <= size for end in ends[1:])
        if size in ends:  # nothing is amiss in such a file
            assert shards.texts_of(shards.opened("tfrecord", path)) == texts[:num]
            continue
        message = shards.refusal(shards.opened, "tfrecord", path)
        assert f"{path} ends inside record {num} ({num} documents before it are readable); fetch" in message


def test_a_flipped_bit_anywhere_in_a_tfrecord_is_refused_with_its_record(tmp_path):
    whole = shards.write(tmp_path, "tfrecord", ["one", "two", "three"]).read_bytes()
    bounds = shards.opened("tfrecord", tmp_path / "docs.tfrecord-00000-of-00001")._bounds.ints(0, 4).tolist()
    for at in range(len(whole)):
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        path = shards.damaged(tmp_path, "x.tfrecord", content)
        num = sum(bound <= at for bound in bounds) - 1
        if at - bounds[num] < 12:
            message = shards.refusal(shards.opened, "tfrecord", path)
            assert "the CRC of" in message
        else:
            shard = shards.opened("tfrecord", path)
            assert shard.text((num + 1) % 3)
            message = shards.refusal(shard.text, num)
            assert f"record {num} is damaged: its CRC does not match; fetch the file again" in message
        assert str(path) in message
        assert f"record {num}" in message


def test_records_that_hold_no_text_are_refused(tmp_path):
    def message(**row):
        path = shards.damaged(tmp_path, "x.tfrecord", b"")
        shards._tfrecord(path, [{"text": "fine"}, row])
        return shards.refusal(shards.opened("tfrecord", path).text, 1)

    assert "record 1 holds 2 texts in the field 'text', which must hold one" in message(text=["a", "b"])
    assert "record 1 holds 0 texts" in message(text=[])
    assert "record 1 holds 0 texts" in message(text=12)
    assert "record 1 is not UTF-8 at byte 3 (unexpected end of data)" in message(text=b"caf\xc3")
    assert "record 1 is not UTF-8 at byte 0" in message(text=b"\xed\xa0\x80")  # half of a surrogate pair


def test_a_record_that_is_no_example_is_refused(tmp_path):
    path = tmp_path / "x.tfrecord"
    writer = shards.record_writer.RecordWriter(str(path))
    writer.write(b"hello")
    writer.close()
    assert f"{path} record 0 is no tf.train.Example" in shards.refusal(shards.opened("tfrecord", path).text, 0)


# --- JSON lines ----------------------------------------------------------------------------------------------------


def json_file(form, folder, content):
    packed = gzip.compress(content) if form == "gzip" else content
    return shards.damaged(folder, f"x.{shards.FORMS[form][0]}", packed)


both_json = pytest.mark.parametrize("form", ["json", "gzip"])
MIXED = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \t\n  {"text": "b"} \n\n\n{"text": "c"}'


@both_json
@pytest.mark.parametrize("block", [1, 2, 7, 16, 1000])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\n \n\n"])
def test_blank_lines_and_missing_last_ends_and_blocks_do_not_matter(form, block, ending, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", block)
    assert shards.texts_of(shards.opened(form, json_file(form, tmp_path, MIXED + ending))) == ["a", "b", "c"]
    assert shards.texts_of(shards.opened(form, json_file(form, tmp_path, b"\n\n" + MIXED[3:] + ending))) == [
        "a",
        "b",
        "c",
    ]


@both_json
def test_blank_lines_alone_are_no_documents(form, tmp_path):
    assert len(shards.opened(form, json_file(form, tmp_path, b"\n \n"))) == 0


@both_json
@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "a"', "line 3 is no JSON object (Expecting ',' delimiter at its character"),
        (b"[1]", "line 3 is a JSON list and no object"),
        (b'"text"', "line 3 is a JSON str and no object"),
        (b"[" * 100_000, "line 3 is no JSON object ("),
        (b'{"body": "a", "url": "b"}', "line 3 has no field 'text' but body, url; name the text's in data.text_field"),
        (b'{"text": null}', "line 3 has NoneType in the field 'text', which must hold a string"),
        (b'{"text": "caf\xe9"}', "line 3 is not UTF-8 at its byte 13 (invalid continuation byte)"),
        (b'{"text": "\\ud800"}', "line 3 holds half of a surrogate pair, which is no valid Unicode"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_the_others_are_read(form, line, what, tmp_path):
    path = json_file(form, tmp_path, b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    shard = shards.opened(form, path)
    assert (shard.text(0), shard.text(2)) == ("a", "b")
    assert f"{path} {what}" in shards.refusal(shard.text, 1)


def test_surrogates_in_pairs_are_characters(tmp_path):
    assert shards.texts_of(shards.opened("json", json_file("json", tmp_path, rb'{"text": "\ud83d\ude00"}'))) == [
        "\N{GRINNING FACE}"
    ]


@both_json
def test_json_of_another_kind_is_refused_when_it_is_opened(form, tmp_path):
    for content in (json.dumps([{"text": "a"}]).encode(), json.dumps({"text": "a"}, indent=1).encode()):
        path = json_file(form, tmp_path, b"\n" + content)
        message = shards.refusal(shards.opened, form, path)
        assert f"{path} line 2 is no JSON object, so that none of its documents are readable" in message


@both_json
def test_text_cut_inside_a_line_is_refused_when_it_is_opened(form, tmp_path):
    content = b'{"text": "a"}\n\n{"text": "b"}\n{"text": "c"}'
    for size in range(len(content) - 13, len(content) - 1):
        path = json_file(form, tmp_path, content[: size + 1])
        if size + 1 < len(content):
            message = shards.refusal(shards.opened, form, path)
            assert f"{path} ends inside line 4 (2 documents before it are readable); fetch the file again" in message


# --- text ----------------------------------------------------------------------------------------------------------


def text_shard(path):
    (file,) = storage.find(str(path))
    return lines.Text(file)


def test_a_text_file_is_a_document_as_it_stands_and_a_blank_one_is_none(tmp_path):
    for i, text in enumerate(shards.TEXTS):
        if len(text) <= lines.MAX_TEXT:
            (tmp_path / f"{i}.txt").write_bytes(text.encode())
            shard = text_shard(tmp_path / f"{i}.txt")
            assert shards.texts_of(pickle.loads(pickle.dumps(shard))) == ([text] if text.strip() else [])
            assert shard.num_skipped == (not text.strip())


@pytest.mark.parametrize(
    ("paragraph", "end"),
    [
        ("two\nlinés\n\n", "linés\n\n"),
        ("two\r\nlinés\r\n\r\n", "linés\r\n\r\n"),
        ("a liné\n", "a liné\n"),
        ("wörd", ""),
    ],
)
def test_a_long_text_file_is_cut_at_blank_lines_else_at_lines_else_anywhere(tmp_path, paragraph, end):
    text = paragraph * (2**18 // len(paragraph) + 40) + "the end"
    (tmp_path / "long.txt").write_bytes(text.encode())
    documents = shards.texts_of(text_shard(tmp_path / "long.txt"))
    assert "".join(documents) == text
    assert len(documents) == 5
    assert all(2**16 - len(paragraph) <= len(document) <= 2**16 for document in documents[:-1])
    assert all(document.endswith(end) for document in documents[:-1])


def test_blank_pieces_of_a_long_text_file_are_counted(tmp_path):
    (tmp_path / "long.txt").write_bytes(b" " * 2**17 + b"word")
    shard = text_shard(tmp_path / "long.txt")
    assert shards.texts_of(shard) == ["word"]
    assert shard.num_skipped == 2


def test_text_that_is_not_utf_8_is_refused_when_it_is_opened(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    message = shards.refusal(text_shard, tmp_path / "latin.txt")
    assert f"{tmp_path / 'latin.txt'} is not UTF-8 at byte 3 (invalid continuation byte); convert it" in message
