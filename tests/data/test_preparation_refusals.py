"""What cannot be prepared, or read as a prepared folder, is refused in a line, and nothing is touched."""

import pytest
from corpora_to_prepare import contents, dataclass_with, from_folder, make_config, refusal

from moejax import config as config_lib
from moejax.data import pipeline, preparation, tokenizers

config = pytest.fixture(make_config)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"num_shards": 3}, "num_shards=2 and now num_shards=3"),
        ({"form": "rows"}, "form=documents and now form=rows"),
        ({"tokenizer": "bpe"}, "tokenizer.name=bytes and now tokenizer.name=bpe"),
        ({"validation_documents": 2}, "corpus="),
    ],
)
def test_a_folder_begun_with_other_settings_is_refused_and_stays_as_it_is(config, tmp_path, change, found):
    preparation.prepare(config, tmp_path / "made", num_shards=2)
    before = contents(tmp_path / "made")
    arguments = {"num_shards": 2, "form": "documents"}
    for name, value in change.items():
        if name in arguments:
            arguments[name] = value
        else:
            setattr(config, name, value)
    with pytest.raises(config_lib.ConfigError) as error:
        preparation.prepare(config, tmp_path / "made", **arguments)
    assert f"--output={tmp_path / 'made'} was begun with" in str(error.value)
    assert found in str(error.value)
    assert contents(tmp_path / "made") == before


def test_a_folder_of_other_files_and_more_shards_than_documents_are_refused(config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(config_lib.ConfigError, match="holds other files"):
        preparation.prepare(config, tmp_path / "mine")
    with pytest.raises(config_lib.ConfigError, match="--num_shards=201 is more than the 200 documents"):
        preparation.prepare(config, tmp_path / "made", num_shards=201)
    config.packing = "sample"
    with pytest.raises(config_lib.ConfigError, match=r"--form=rows cannot hold data\.packing=sample"):
        preparation.prepare(config, tmp_path / "made", form="rows")
    assert not (tmp_path / "made").exists()


def test_what_cannot_be_packed_or_has_no_text_is_refused_before_it_looks_ready(config, tmp_path, monkeypatch):
    config.packing, config.objective = "concatenate", "span_corruption"
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers, "build", lambda *_: tokenizers.Bytes())
        with pytest.raises(config_lib.ConfigError, match="needs sentinel tokens"):
            preparation.prepare(config, tmp_path / "made", form="rows")
    assert not (tmp_path / "made").exists()
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    config.source, config.objective = f"files:{tmp_path / 'blank.jsonl'}", "next_token"
    with pytest.raises(config_lib.ConfigError, match="the train documents are all blank"):
        preparation.prepare(config, tmp_path / "made")
    assert not (tmp_path / "made" / "manifest.json").exists()


def test_a_folder_that_is_none_or_not_finished_is_refused(config, tmp_path):
    assert "is no prepared folder" in refusal(config, tmp_path / "absent")
    preparation.prepare(config, tmp_path / "made", num_shards=3, part=(0, 2))
    assert "is not finished" in refusal(config, tmp_path / "made")
    preparation.prepare(config, tmp_path / "made", num_shards=3)
    (tmp_path / "made" / "train-00001-of-00003.array_record").unlink()
    assert "train-00001-of-00003.array_record is missing" in refusal(config, tmp_path / "made")
    for text in ("{", "[]", '{"version": 1}', '{"version": 1, "splits": []}'):
        (tmp_path / "made" / "manifest.json").write_text(text)
        assert "manifest.json is damaged" in refusal(config, tmp_path / "made")
    (tmp_path / "made" / "manifest.json").write_text('{"version": 9, "splits": {}}')
    assert "has version 9 of the format" in refusal(config, tmp_path / "made")


def test_a_folder_made_with_another_tokenizer_is_refused_and_both_are_named(config, tmp_path):
    preparation.prepare(config, tmp_path / "bytes")
    message = refusal(dataclass_with(config, tokenizer="bpe", vocab_size=300), tmp_path / "bytes")
    assert "made with the tokenizer bytes (257 entries) and data.tokenizer is bpe with 300 entries" in message
    bpe = dataclass_with(config, tokenizer="bpe", vocab_size=270)
    preparation.prepare(bpe, tmp_path / "bpe")
    assert "tokenizer bpe (270 entries) and data.tokenizer is bpe with 280" in refusal(
        dataclass_with(bpe, vocab_size=280), tmp_path / "bpe"
    )
    with pytest.raises(config_lib.ConfigError, match=r"tokenizer bpe .* and the run's tokenizer is"):
        pipeline.load(from_folder(bpe, tmp_path / "bpe"), tokenizers.Bytes())
    assert pipeline.load(from_folder(bpe, tmp_path / "bpe")).tokenizer.vocab_size == 270


def test_rows_packed_in_another_way_are_refused(config, tmp_path):
    config.packing = "concatenate"
    preparation.prepare(config, tmp_path / "rows", form="rows")
    for name, value in (("packing", "pad"), ("seq_length", 64)):
        message = refusal(dataclass_with(config, **{name: value}), tmp_path / "rows")
        assert f"data.{name}={value} but the rows in {tmp_path / 'rows'} were packed with" in message
    assert pipeline.load(from_folder(dataclass_with(config, seed=7), tmp_path / "rows")).num_documents == 197


def test_a_flipped_bit_is_refused_with_the_file_when_the_record_is_read(config, tmp_path):
    preparation.prepare(config, tmp_path / "made")
    path = tmp_path / "made" / "train-00000-of-00001.array_record"
    raw = bytearray(path.read_bytes())
    raw[3000] ^= 1
    path.write_bytes(raw)
    data = pipeline.load(from_folder(config, tmp_path / "made"))
    with pytest.raises(config_lib.ConfigError, match=r"train-00000-of-00001\.array_record record \d+ is damaged"):
        list(data.train.documents)
