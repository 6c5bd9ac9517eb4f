"""A gzip file of JSON lines is read at random, at the cost of a block, and its damage named."""

import gzip
import random
import zlib

import pytest
import shards

from moejax.data import lines, sources, storage, zipped

cache_folder = pytest.fixture(shards.fresh_cache, autouse=True)


WORDS = [random.Random(seed).randbytes(5).hex() for seed in range(2000)]


def documents(num, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(200))) for _ in range(num)]


def pack(texts, level=6, strategy=zlib.Z_DEFAULT_STRATEGY):
    packer = zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS + 16, strategy=strategy)
    return packer.compress(shards.json_lines({"text": text} for text in texts)) + packer.flush()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda texts: pack(texts), id="one member"),
        pytest.param(lambda texts: pack(texts, level=0), id="stored"),
        pytest.param(lambda texts: pack(texts, strategy=zlib.Z_FIXED), id="fixed codes"),
        pytest.param(lambda texts: pack(texts[:300]) + pack([]) + pack(texts[300:]) + bytes(99), id="three, padded"),
        pytest.param(lambda texts: b"".join(pack([text]) for text in texts), id="a member a document"),
        pytest.param(
            lambda texts: b"".join(
                gzip.compress(content[i : i + 5000])
                for content in [shards.json_lines({"text": text} for text in texts)]
                for i in range(0, len(content), 5000)
            ),
            id="members that cut documents",
        ),
    ],
)
def test_gzip_reads_at_random_from_any_packer(make, tmp_path, monkeypatch):
    monkeypatch.setattr(zipped, "_SPACING", 2**16)
    texts = documents(1000)
    shard = shards.opened("gzip", shards.damaged(tmp_path, "x.json.gz", make(texts)))
    assert shard._points.num_ints >= 5 * 8  # so that windows and bit offsets matter
    assert [shard.text(i) for i in reversed(range(1000))] == texts[::-1]


def test_gzip_points_begin_at_every_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(zipped, "_SPACING", 2**16)
    shard = shards.opened("gzip", shards.damaged(tmp_path, "x.json.gz", pack(documents(5000))))
    points = shard._points.ints(0, shard._points.num_ints).reshape(-1, 5)
    assert set(points[:, 2].tolist()) == set(range(8))


def test_a_gzip_read_costs_the_spacing_and_not_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(zipped, "_SPACING", 2**16)
    shard = shards.opened("gzip", shards.damaged(tmp_path, "x.json.gz", pack(documents(5000))))
    lengths = []
    original = storage.read
    monkeypatch.setattr(
        storage, "read", lambda file, *a: (lengths.append(a[1]) if file is shard.file else 0) or original(file, *a)
    )
    assert shard.text(4321) == documents(5000)[4321]
    assert len(lengths) == 1
    assert lengths[0] < shard.file.size / 20


def test_gzip_of_a_thousandfold_ratio_is_decompressed_a_block_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", 2**14)
    monkeypatch.setattr(zipped, "_SPACING", 2**16)
    longest = []
    add = lines.LineFinder.add
    monkeypatch.setattr(lines.LineFinder, "add", lambda self, block: longest.append(len(block)) or add(self, block))
    texts = ["a" * 1000] * 3000
    shard = shards.opened("gzip", shards.damaged(tmp_path, "x.json.gz", pack(texts, level=9)))
    assert shards.texts_of(shard) == texts
    assert shard.file.size < 20_000
    assert max(longest) == 2**14


def test_a_gzip_pass_that_goes_back_sees_every_byte_once(tmp_path):
    (file,) = storage.find(str(shards.damaged(tmp_path, "x.json.gz", pack(["one", "two", "three"]))))
    again = zipped._GzipPass(file)
    again.read(30)
    assert [part.tolist() for part, _ in again.run()] == [part.tolist() for part, _ in zipped._GzipPass(file).run()]


def test_a_gzip_file_cut_anywhere_is_refused_with_what_is_readable(tmp_path):
    texts = ["one", "two", "three"]
    whole = pack(texts)
    for size in range(1, len(whole)):
        path = shards.damaged(tmp_path, "x.json.gz", whole[:size])
        message = shards.refusal(shards.opened, "gzip", path)
        assert f"{path} ends inside line " in message
    assert "ends inside line 4 (3 documents before it are readable); fetch the file again" in message
    path = shards.damaged(tmp_path, "x.json.gz", whole + whole[:-20])  # inside the second member
    assert f"{path} ends inside line " in shards.refusal(shards.opened, "gzip", path)


def test_a_cut_gzip_file_of_many_blocks_counts_its_documents(tmp_path):
    texts = documents(1000)
    whole = pack(texts)
    path = shards.damaged(tmp_path, "x.json.gz", whole[: len(whole) // 2])
    text = zlib.decompressobj(zlib.MAX_WBITS + 16).decompress(whole[: len(whole) // 2])
    num = text.count(b"\n")
    assert 300 < num < 700
    message = shards.refusal(shards.opened, "gzip", path)
    assert f"ends inside line {num + 1} ({num} documents before it are readable)" in message


def test_a_flipped_bit_in_gzip_data_is_refused_when_it_is_opened(tmp_path):
    whole = pack(["one", "two", "three"] * 5)
    for at in range(10, len(whole)):  # after the header, in which a time and a name mean nothing
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        path = shards.damaged(tmp_path, "x.json.gz", content)
        assert str(path) in shards.refusal(shards.opened, "gzip", path)
    content = bytearray(whole)
    content[-8] ^= 1
    message = shards.refusal(shards.opened, "gzip", shards.damaged(tmp_path, "x.json.gz", content))
    assert "incorrect data check; at most 0 documents before it are readable); fetch" in message


def test_bytes_after_the_gzip_data_are_refused(tmp_path):
    path = shards.damaged(tmp_path, "x.json.gz", pack(["one"]) + b"garbage")
    assert f"{path} is damaged" in shards.refusal(shards.opened, "gzip", path)


def test_a_damaged_window_of_the_cached_points_is_refused(tmp_path, cache_folder, monkeypatch):
    monkeypatch.setattr(zipped, "_SPACING", 2**16)
    path = shards.damaged(tmp_path, "x.json.gz", pack(documents(1000)))
    shards.opened("gzip", path)
    (stored,) = (cache_folder / "indices").glob("points-*")
    content = bytearray(stored.read_bytes())
    for at in range(-len(content) // 2, 0, 500):  # the last windows
        content[at] ^= 1
    stored.write_bytes(content)
    shard = shards.opened("gzip", path)
    assert shard.text(0) == documents(1000)[0]
    message = shards.refusal(shard.text, 999)
    assert f"{path} is damaged in document 999" in message


def test_gzip_read_in_order_decompresses_each_part_of_the_file_once(tmp_path, monkeypatch):
    texts = [f"{i} {'word ' * (i % 300)}" for i in range(6000)]
    shard = sources.open_source(f"files:{shards.write(tmp_path, 'gzip', texts)}")
    parts = []
    real = zipped.GzipJsonLines._read_member

    def counted(self, points, at, start, stop):
        parts.append(at)
        return real(self, points, at, start, stop)

    monkeypatch.setattr(zipped.GzipJsonLines, "_read_member", counted)
    assert list(shard) == texts
    num_points = max(parts) + 1
    assert num_points > 2
    # the first line after a point alone, then the rest at once; a line may lie across two parts
    assert len(parts) <= 3 * num_points
    for i in random.Random(0).sample(range(6000), 200):  # and at random again
        assert shard[i] == texts[i]
