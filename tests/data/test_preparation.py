"""A prepared folder holds the corpus token for token, whoever made it and however often they were killed."""

import hashlib
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent import futures

import fsspec
import numpy as np
import pytest
from corpora_to_prepare import assert_same_batches, contents, from_folder, make_config, refusal

from moejax import config as config_lib
from moejax.data import packing, pipeline, preparation, prepared, tokenizers

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
config = pytest.fixture(make_config)
PACKINGS = ["best_fit", "concatenate", "sample", "pad"]


# --- what it holds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing_name", PACKINGS)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_training_reads_the_same_rows_from_the_folder_as_from_the_source(config, tmp_path, packing_name, tokenizer):
    config.packing, config.tokenizer, config.vocab_size = packing_name, tokenizer, 270
    preparation.prepare(config, tmp_path / "made", num_shards=3)
    there = from_folder(config, tmp_path / "made")
    data, read = pipeline.load(config), pipeline.load(there)
    assert (read.num_documents, len(read.validation), read.num_left_out) == (197, 19, 4)
    np.testing.assert_array_equal(read.validation.tokens, data.validation.tokens)
    assert read.validation.num_bytes == data.validation.num_bytes
    a, b = pipeline.TrainBatches(data, config), pipeline.TrainBatches(read, there)
    assert read.num_tokens == data.num_tokens
    for step in (0, 1, 30):
        assert_same_batches(a[step], b[step])


@pytest.mark.parametrize("packing_name", ["best_fit", "concatenate", "pad"])
def test_rows_packed_beforehand_are_those_that_training_would_pack(config, tmp_path, packing_name):
    config.packing = packing_name
    preparation.prepare(config, tmp_path / "documents")
    preparation.prepare(config, tmp_path / "rows", form="rows")
    settings = [from_folder(config, tmp_path / name) for name in ("documents", "rows")]
    datas = [pipeline.load(c) for c in settings]
    assert datas[0].train.num_rows == datas[1].train.num_rows
    batches = [pipeline.TrainBatches(data, c) for data, c in zip(datas, settings, strict=True)]
    for step in (0, 7, 100):
        assert_same_batches(batches[0][step], batches[1][step])


def test_every_token_of_rows_in_several_shards_is_there_once(config, tmp_path):
    config.packing = "concatenate"
    preparation.prepare(config, tmp_path / "rows", form="rows", num_shards=3)
    data = pipeline.load(from_folder(config, tmp_path / "rows"))
    rows = data.train.read(range(data.train.num_rows))
    found = sorted(token for streams in rows for stream in streams for token in stream[1:].tolist())
    expected = [[*tokens.tolist(), 256] for tokens in pipeline.load(config).train.documents]
    assert found == sorted(token for tokens in expected for token in tokens)


def test_rows_for_span_corruption_are_read_as_they_were_packed(config, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers.Bytes, "num_sentinels", 100, raising=False)
    monkeypatch.setattr(tokenizers.Bytes, "first_sentinel", 356, raising=False)
    config.packing, config.objective = "concatenate", "span_corruption"
    preparation.prepare(config, tmp_path / "rows", form="rows")
    there = from_folder(config, tmp_path / "rows")
    a = pipeline.TrainBatches(pipeline.load(config), config)[3]
    b = pipeline.TrainBatches(pipeline.load(there), there)[3]
    assert_same_batches(a, b)
    assert "encoder_inputs_BL" in a


def test_a_folder_on_a_remote_file_system_is_read_like_a_local_one(config, tmp_path):
    preparation.prepare(config, tmp_path / "made", num_shards=2)
    remote = fsspec.filesystem("memory")
    remote.put(str(tmp_path / "made"), "/bucket/made", recursive=True)
    local, there = from_folder(config, tmp_path / "made"), from_folder(config, "memory://bucket/made")
    a, b = (pipeline.TrainBatches(pipeline.load(c), c) for c in (local, there))
    for step in (0, 9):
        assert_same_batches(a[step], b[step])
    remote.rm("/bucket/made/train-00001-of-00002.sizes.npy")
    assert "train-00001-of-00002.sizes.npy is missing" in refusal(config, "memory://bucket/made")


@pytest.mark.parametrize(("vocab_size", "name"), [(257, "<u2"), (2**16, "<u2"), (2**16 + 1, "<u4")])
def test_records_take_two_bytes_a_token_where_the_vocabulary_allows(vocab_size, name):
    token_type = prepared.dtype(vocab_size)
    assert token_type == np.dtype(name)
    for streams in ([], [[0, vocab_size - 1]], [[1], [], [2, 3, 4]]):
        row = [np.array(stream, np.int32) for stream in streams]
        decoded = prepared.decode_row(prepared.encode_row(row, token_type), token_type)
        assert [stream.tolist() for stream in decoded] == streams


def test_the_manifest_counts_what_is_there_and_its_digests_are_those_of_the_files(config, tmp_path):
    outcome = preparation.prepare(config, tmp_path / "made", num_shards=4)
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    assert manifest == outcome.manifest
    shards = manifest["splits"]["train"]
    assert [shard["name"] for shard in shards] == [f"train-{i:05d}-of-00004" for i in range(4)]
    assert [shard["documents"] + shard["blank"] for shard in shards] == [50] * 4
    assert sum(shard["blank"] for shard in shards) == 3
    assert sum(shard["tokens"] for shard in shards) == sum(shard["bytes"] for shard in shards)  # bytes are the tokens
    for shard in shards:
        data = (tmp_path / "made" / f"{shard['name']}.array_record").read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["size"], shard["sha256"])


# --- many processes, and killed ones -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", prepared.FORMS)
def test_processes_that_make_a_part_each_end_with_the_same_bytes_as_one(config, tmp_path, form):
    config.packing = "concatenate"
    preparation.prepare(config, tmp_path / "one", form=form, num_shards=5)
    for place in (2, 0, 1):
        outcome = preparation.prepare(config, tmp_path / "three", form=form, num_shards=5, part=(place, 3))
        assert (outcome.manifest is None) == (place != 1)
        assert len(outcome.made) == 2
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


# Every document takes a while, so that a kill hits the writing and not the imports.
SLOW = """
import pathlib, sys, time
from moejax import config
from moejax.data import preparation
real = preparation._tokenised
def slow(*arguments):
    for document in real(*arguments):
        time.sleep(0.002)
        yield document
preparation._tokenised = slow
c = config.DataConfig(source=sys.argv[1], validation_source=sys.argv[2], tokenizer="bytes")
pathlib.Path(sys.argv[4]).touch()
preparation.prepare(c, pathlib.Path(sys.argv[3]), num_shards=5)
"""


def test_a_preparation_killed_at_random_times_ends_with_the_same_bytes(config, tmp_path):
    preparation.prepare(config, tmp_path / "straight", num_shards=5)
    folder, ready = tmp_path / "killed", tmp_path / "ready"
    command = [sys.executable, "-c", SLOW, config.source, config.validation_source, str(folder), str(ready)]
    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while not ready.exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.02, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        ready.unlink()
    assert not (folder / "manifest.json").exists()  # the kills came before the end
    assert any(folder.iterdir())
    for left in (
        f".plan.json.{'0' * 32}",
        f".train-00001-of-00005.json.{'a' * 32}",
    ):  # what a kill during a smaller write leaves
        (folder / left).write_text("{")
    preparation.prepare(config, folder, num_shards=5)
    assert contents(folder) == contents(tmp_path / "straight")


def test_a_call_on_a_finished_folder_changes_nothing(config, tmp_path):
    preparation.prepare(config, tmp_path / "made", num_shards=2)
    before = contents(tmp_path / "made")
    outcome = preparation.prepare(config, tmp_path / "made", num_shards=2)
    assert outcome.made == ()
    assert contents(tmp_path / "made") == before


def test_a_source_that_breaks_half_way_leaves_the_whole_shards_and_no_other(config, tmp_path):
    good = pathlib.Path(config.source.removeprefix("files:"))
    lines = good.read_text().split("\n")
    lines[150] = "{}"
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "train.jsonl").write_text("\n".join(lines))
    config.source = f"files:{bad / 'train.jsonl'}"
    with pytest.raises(config_lib.ConfigError, match=r"train\.jsonl.* 151 "):
        preparation.prepare(config, tmp_path / "made", num_shards=4)
    names = set(contents(tmp_path / "made"))
    whole = {f"train-{i:05d}-of-00004{suffix}" for i in range(3) for suffix in (".array_record", ".json", ".sizes.npy")}
    assert names == whole | {"plan.json", "tokenizer.json"}


def test_a_shard_that_was_cut_is_made_again(config, tmp_path):
    preparation.prepare(config, tmp_path / "made", num_shards=2)
    before = contents(tmp_path / "made")
    shard = tmp_path / "made" / "train-00001-of-00002.array_record"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(config_lib.ConfigError, match=r"train-00001-of-00002\.array_record has .* bytes where"):
        prepared.open_folder(str(tmp_path / "made"))
    assert preparation.prepare(config, tmp_path / "made", num_shards=2).made == ("train-00001-of-00002",)
    assert contents(tmp_path / "made") == before


@pytest.mark.parametrize("damage", ["sizes", "tokenizer", "no tokenizer", "json"])
def test_what_is_damaged_beside_the_shards_is_made_again(config, tmp_path, damage):
    folder = tmp_path / "made"
    preparation.prepare(config, folder, num_shards=2)
    before = contents(folder)
    match damage:
        case "sizes":
            (folder / "train-00000-of-00002.sizes.npy").write_bytes(b"\x93NUMPY")
            assert "sizes.npy is damaged" in refusal(config, folder)
        case "tokenizer":
            (folder / "tokenizer.json").write_text("{")
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "json":
            (folder / "train-00000-of-00002.json").write_text("{")
    preparation.prepare(config, folder, num_shards=2)
    assert contents(folder) == before


@pytest.mark.parametrize("left", [[], [f".plan.json.{'0' * 32}"], ["plan.json"], ["plan.json", "tokenizer.json"]])
def test_a_call_killed_while_it_began_is_gone_on_with(config, tmp_path, left):
    preparation.prepare(config, tmp_path / "straight")
    folder = tmp_path / "made"
    folder.mkdir()
    for name in left:
        source = tmp_path / "straight" / name
        (folder / name).write_bytes(source.read_bytes() if source.exists() else b"{")
    preparation.prepare(config, folder)
    assert contents(folder) == contents(tmp_path / "straight")


def test_a_source_that_broke_at_once_and_was_mended_is_prepared_in_the_same_folder(config, tmp_path):
    source = pathlib.Path(config.source.removeprefix("files:"))
    good = source.read_text()
    source.write_text(good.replace('{"text"', '{"test"', 2).replace('{"test"', '{"text"', 1))
    with pytest.raises(config_lib.ConfigError, match="line 2 has no field 'text' but test"):
        preparation.prepare(config, tmp_path / "made")
    source.write_text(good)
    preparation.prepare(config, tmp_path / "made")
    preparation.prepare(config, tmp_path / "straight")
    assert contents(tmp_path / "made") == contents(tmp_path / "straight")


def test_calls_that_begin_at_the_same_time_agree(config, tmp_path):
    with futures.ThreadPoolExecutor(6) as pool:
        parts = [
            pool.submit(preparation.prepare, config, tmp_path / "made", num_shards=6, part=(i, 6)) for i in range(6)
        ]
        made = [name for part in parts for name in part.result().made]
    assert len(made) == len(set(made)) == 7
    preparation.prepare(config, tmp_path / "one", num_shards=6)
    assert contents(tmp_path / "made") == contents(tmp_path / "one")


def test_the_folder_may_move_and_rows_are_read_by_many_threads_and_after_pickling(config, tmp_path):
    preparation.prepare(config, tmp_path / "made", num_shards=4)
    shutil.move(tmp_path / "made", tmp_path / "moved")
    there = from_folder(config, tmp_path / "moved")
    data = pipeline.load(there)
    assert isinstance(data.train, packing.BestFit)
    expected = pipeline.TrainBatches(data, there)[0]
    assert_same_batches(next(pipeline.train_batches(data, there)), expected)
    there.num_workers = 1
    batches = pipeline.train_batches(data, there)
    assert_same_batches(next(batches), expected)
    batches.close()
