"""Parquet's columns of text, in every type they are stored in, and what is wrong with them, in a line."""

import numpy as np
import pyarrow as pa
import pytest
import shards
from pyarrow import parquet

from moejax.data import sources, tables

cache_folder = pytest.fixture(shards.fresh_cache, autouse=True)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_parquet_reads_every_type_of_text(kind, tmp_path):
    table = pa.table({"n": list(range(4)), "text": pa.array(["a", "b", "a", "é"], pa.string()).cast(kind)})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    assert shards.texts_of(shards.opened("parquet", tmp_path / "x.parquet")) == ["a", "b", "a", "é"]


def test_a_column_of_few_values_as_parquet_files_store_it_holds_labels(tmp_path):
    column = pa.array(["sea", "art", "sea"]).dictionary_encode()
    parquet.write_table(pa.table({"text": ["a", "b", "c"], "topic": column}), tmp_path / "docs.parquet")
    source = sources.open_source(f"files:{tmp_path}/docs.parquet", label="field:topic")
    assert [source.label(i) for i in range(3)] == ["sea", "art", "sea"]


def test_parquet_decodes_a_group_once_and_forgets_the_oldest(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_recent", tables._Recent())
    monkeypatch.setattr(tables, "MAX_DECODED", 2500)
    groups = []
    original = tables.Parquet._read_group
    monkeypatch.setattr(tables.Parquet, "_read_group", lambda self, g: groups.append(g) or original(self, g))
    shard = shards.opened(
        "parquet", shards.write(tmp_path, "parquet", ["x" * 300] * 30)
    )  # groups of 3, about 900 bytes
    shards.texts_of(shard)
    assert groups == list(range(10))
    shard.text(29)
    shard.text(26)
    assert groups == list(range(10))
    shard.text(0)  # the third kept would be too much: group 9, used before 8, goes
    shard.text(26)
    assert groups == [*range(10), 0]
    shard.text(29)
    assert groups == [*range(10), 0, 9]
    monkeypatch.setattr(tables, "MAX_DECODED", 0)
    for _ in range(2):
        shard.text(10)
        shard.text(11)  # of the same group: the last one stays
    assert groups == [*range(10), 0, 9, 3]


def test_parquet_damage_and_nulls_are_refused(tmp_path):
    whole = shards.write(tmp_path, "parquet", shards.TEXTS).read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[100:]):
        path = shards.damaged(tmp_path, "x.parquet", content)
        message = str(shards.outcome("parquet", path))
        assert f"{path} is " in message
        assert message.endswith("fetch the file again")

    table = pa.table({"text": ["fine", None, "x"]})
    parquet.write_table(table, tmp_path / "null.parquet")
    shard = shards.opened("parquet", tmp_path / "null.parquet")
    assert shard.text(0) == "fine"
    assert "null.parquet record 1 has null in the column 'text'" in shards.refusal(shard.text, 1)

    table = pa.table({"text": pa.array([b"fine", b"caf\xe9"])})
    parquet.write_table(table, tmp_path / "latin.parquet")
    message = shards.refusal(shards.opened("parquet", tmp_path / "latin.parquet").text, 1)
    assert "latin.parquet record 1 is not UTF-8 at byte 3 (unexpected end of data)" in message


def test_a_parquet_page_with_a_checksum_is_checked(tmp_path):
    texts = [np.random.default_rng(i).bytes(100).hex() for i in range(10)]
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"text": texts}), path, write_page_checksum=True, compression="none", row_group_size=5)
    content = bytearray(path.read_bytes())
    at = content.rindex(texts[7].encode())
    content[at] ^= 1
    path = shards.damaged(tmp_path, "x.parquet", content)
    shard = shards.opened("parquet", path)
    assert shard.text(4) == texts[4]
    assert f"{path} is damaged in records 5 to 9 (" in shards.refusal(shard.text, 7)
