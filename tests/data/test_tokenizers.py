"""Tokenizers give back any text exactly, mean the same to every process, and survive what happens to a cache."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from absl import logging

from moejax import config as config_lib
from moejax.data import tokenizers

TEXTS = [
    "",
    "   leading spaces, trailing spaces   ",
    "two\r\nlines\r\n\r\n\ttabbed",
    "emoji 👩‍👩‍👧‍👦 and 漢字, e\u0301 is not é",
    "\0\x7f\ufeff\uffff\U0010ffff",
    "a<|endoftext|>b",
    "<|endoftext|>",
]
DOCUMENTS = [f"The {noun} of {other} is {noun}." for noun in ("cat", "night", "rain") for other in ("sea", "sky")] * 3


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return tokenizers.build(config_lib.DataConfig(tokenizer=request.param, vocab_size=280), DOCUMENTS)


def test_encode_then_decode_is_the_identity_on_any_text(tokenizer):
    for text in TEXTS + DOCUMENTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_no_text_encodes_to_end_of_text_not_even_its_name(tokenizer):
    for text in TEXTS:
        assert tokenizer.end_of_text not in tokenizer.encode(text)
    assert len(tokenizer.encode("<|endoftext|>")) > 1


def test_end_of_text_and_ids_outside_the_vocabulary_decode_to_nothing_and_broken_utf8_to_the_replacement(tokenizer):
    ids = tokenizer.encode("né")
    assert tokenizer.decode(np.array([tokenizer.end_of_text, *ids, tokenizer.vocab_size, 10**6, -1])) == "né"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) in ("\ufffd", "é")
    assert tokenizers.Bytes().decode([0xC3, ord("a")]) == "\ufffda"


def test_there_are_no_sentinels_and_the_end_of_text_pads(tokenizer):
    assert (tokenizer.num_sentinels, tokenizer.pad) == (0, tokenizer.end_of_text)


def test_a_lone_surrogate_is_refused(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(UnicodeEncodeError if tokenizer.name == "bytes" else TypeError):
            encode("a \ud800 b")


def test_bytes_are_the_utf8_bytes():
    assert tokenizers.Bytes().encode("aé") == [97, 0xC3, 0xA9]
    assert (tokenizers.Bytes().vocab_size, tokenizers.Bytes().end_of_text) == (257, 256)


def test_what_save_wrote_load_reads_back(tokenizer, tmp_path):
    path = tmp_path / "run" / "tokenizer.json"
    tokenizer.save(path)
    loaded = tokenizers.load(path)
    assert (loaded.name, loaded.vocab_size, loaded.end_of_text) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    for copy in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert copy.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
        assert copy.digest == tokenizer.digest
        assert copy == tokenizer
    assert [path.name for path in path.parent.iterdir()] == ["tokenizer.json"]  # nothing half-written is left


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_span_corruption_gets_a_hundred_sentinels_above_the_text_that_no_text_encodes_to(kind, tmp_path):
    """<extra_id_0> is the last id; bpe keeps to its vocab_size."""
    config = config_lib.DataConfig(tokenizer=kind, vocab_size=370)
    plain = tokenizers.build(config, DOCUMENTS)
    config.objective = "span_corruption"
    built = tokenizers.build(config, DOCUMENTS)
    built.save(tmp_path / "tokenizer.json")
    for tokenizer in (built, tokenizers.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(built))):
        assert tokenizer == built != plain
        assert tokenizer.vocab_size == (370 if kind == "bpe" else 357)
        assert (tokenizer.first_sentinel, tokenizer.num_sentinels) == (tokenizer.vocab_size - 1, 100)
        for text in (*TEXTS, "<extra_id_0><extra_id_99>"):
            ids = tokenizer.encode(text)
            assert not ids or max(ids) <= tokenizer.first_sentinel - 100
            assert tokenizer.decode(ids) == text
        sentinels = [tokenizer.first_sentinel - number for number in (0, 31, 99)]
        assert tokenizer.decode([*tokenizer.encode("a"), *sentinels]) == "a<extra_id_0><extra_id_31><extra_id_99>"


def test_files_of_earlier_versions_load(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"type": "bytes"}')
    assert tokenizers.load(path) == tokenizers.Bytes()
    bpe = tokenizers.Bpe.train(DOCUMENTS, 280)
    assert {"model", "decoder"} <= set(json.loads(bpe.to_json()))  # was, and is, a tokenizer.json and nothing else
    path.write_text(bpe.to_json())
    assert tokenizers.load(path) == bpe


def test_digests_differ_where_the_encoding_does():
    built = [tokenizers.Bytes(), *(tokenizers.Bpe.train(DOCUMENTS, size) for size in (270, 280))]
    assert len({tokenizer.digest for tokenizer in built}) == len(set(built)) == 3


@pytest.mark.parametrize("name", ["", "gpt3", "bpe:file", "bytes:file"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(config_lib.ConfigError, match="choose bpe, bytes, gpt2"):
        tokenizers.build(config_lib.DataConfig(tokenizer=name), DOCUMENTS)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3}', '{"type": "bytes", "more": ""}'])
def test_load_refuses_what_is_no_tokenizer_in_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(config_lib.ConfigError, match="does not hold a tokenizer") as error:
        tokenizers.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bpe_learns_the_merges_of_its_documents_and_stops_where_nothing_repeats():
    tokenizer = tokenizers.Bpe.train(["abababab cd"], 4096)
    assert tokenizer.vocab_size == 257 + 2  # ab, abab: no other pair occurs twice
    assert len(tokenizer.encode("abababab")) == 2
    assert tokenizers.Bpe.train(DOCUMENTS, 270).vocab_size == 270


def test_bpe_training_is_deterministic_across_processes():
    code = (
        "from moejax.data import tokenizers\n"
        "documents = [' '.join(str(i * k) for i in range(200)) for k in range(50)]\n"
        "print(tokenizers.cache.digest([tokenizers.Bpe.train(documents, 700).to_json()]))"
    )
    run = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert run[0].stdout == run[1].stdout
    assert len(run[0].stdout.strip()) == 32


def test_bpe_is_read_from_the_cache_when_documents_and_size_are_the_same(cache_folder, monkeypatch):
    config = config_lib.DataConfig(vocab_size=280)
    built = tokenizers.build(config, iter(DOCUMENTS))
    assert len(list(cache_folder.iterdir())) == 1
    tokenizers.build(config_lib.DataConfig(vocab_size=281), DOCUMENTS)
    tokenizers.build(config, DOCUMENTS[1:])
    assert len(list(cache_folder.iterdir())) == 3

    def never(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(tokenizers.Bpe, "train", never)
    assert tokenizers.build(config, DOCUMENTS).encode_batch(TEXTS) == built.encode_batch(TEXTS)


def test_bpe_learns_from_the_first_characters_and_reads_no_further(monkeypatch):
    def documents():
        yield from ("abab", "", "cdcd cdcd")
        raise AssertionError("read on")

    messages = []
    monkeypatch.setattr(tokenizers, "MAX_CHARACTERS", 10)
    monkeypatch.setattr(logging, "info", lambda *args: messages.append(args[0] % args[1:]))
    config = config_lib.DataConfig(vocab_size=280)
    built = tokenizers.build(config, documents())
    assert messages == ["data.tokenizer=bpe learns from the first 10 characters, 3 documents"]
    assert built == tokenizers.Bpe.train(["abab", "", "cdcd c"], 280)

    messages.clear()
    assert tokenizers.build(config, ["abab", "cdcd c"]) == built  # as many as there may be
    assert not messages
    tokenizers.build(config, ["abab", "cdcd c", "d"])
    assert len(messages) == 1


def test_a_corrupt_cache_file_is_built_again(cache_folder):
    config = config_lib.DataConfig(vocab_size=280)
    built = tokenizers.build(config, DOCUMENTS)
    (path,) = cache_folder.iterdir()
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"\xff"):
        path.write_bytes(damage)
        assert tokenizers.build(config, DOCUMENTS).encode_batch(TEXTS) == built.encode_batch(TEXTS)
        assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_the_cache_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "file" / "cache"))
    assert tokenizers.build(config_lib.DataConfig(vocab_size=280), DOCUMENTS).vocab_size == 280
