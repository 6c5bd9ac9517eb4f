"""Files are found by name, read by position from any thread, and indexed once."""

import os
import pickle

import fsspec
import google_crc32c
import numpy as np
import pytest
import shards

from moejax.data import storage

cache_folder = pytest.fixture(shards.fresh_cache, autouse=True)


def names(files):
    return [file.name for file in files]


@pytest.fixture(params=["local", "memory"])
def tree(request, tmp_path):
    """The path of a folder with files at two depths."""
    for name in ("b.txt", "a.txt", "a-b.txt", "sub/c.txt", "sub/d.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
        shards.in_memory(path, f"tree/{name.rpartition('/')[0]}".rstrip("/"))
    return str(tmp_path) if request.param == "local" else "memory://tree"


def test_find_takes_names_and_patterns_and_leaves_folders_out(tree):
    assert names(storage.find(f"{tree}/b.txt")) == ["b.txt"]
    assert names(storage.find(f"{tree}/*")) == ["a-b.txt", "a.txt", "b.txt"]
    assert names(storage.find(f"{tree}/**/*.txt")) == ["a-b.txt", "a.txt", "b.txt", "c.txt"]
    assert storage.find(f"{tree}/absent*") == storage.find(f"{tree}/absent") == storage.find(f"{tree}/sub") == []


def test_walk_goes_to_any_depth_and_contents_to_none(tree):
    inside = storage.walk(tree)
    assert inside is not None
    assert names(inside) == ["a-b.txt", "a.txt", "b.txt", "c.txt", "d.md"]
    assert storage.walk(f"{tree}/b.txt") is None
    folders, files = storage.contents(tree)
    assert (folders, names(files)) == (["sub"], ["a-b.txt", "a.txt", "b.txt"])
    assert storage.contents(f"{tree}/absent") == ([], [])


def test_a_file_is_the_same_however_it_is_found_and_another_once_it_is_written_again(tree):
    (file,) = storage.find(f"{tree}/b.txt")
    assert file in storage.find(f"{tree}/*")
    assert file in storage.contents(tree)[1]
    assert file in (storage.walk(tree) or [])
    if file.is_local:
        os.utime(file.path, ns=(0, 0))
    else:
        fsspec.filesystem("memory").pipe("/tree/b.txt", b"x")
    assert storage.find(f"{tree}/b.txt") != [file]


def test_home_and_file_urls_and_names_that_look_like_patterns_are_local_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a[1].txt").write_text("x")
    for path in ("~/a[1].txt", f"file://{tmp_path}/a[1].txt", f"{tmp_path}/a[[]1].txt"):
        assert [file.path for file in storage.find(path)] == [str(tmp_path / "a[1].txt")]


def test_read_gives_the_bytes_asked_for_and_blocks_all_of_them(tree, monkeypatch):
    (file,) = storage.find(f"{tree}/a-b.txt")
    assert storage.read(file, 2, 3) == b"b.t"
    assert storage.read(file, 7, 0) == b""
    for size in (1, 3, 7, 100):
        monkeypatch.setattr(storage, "BLOCK", size)
        assert b"".join(storage.blocks(file)) == b"a-b.txt"
        assert max(map(len, storage.blocks(file))) == min(size, 7)
    assert storage.open_binary(file).read() == b"a-b.txt"


def test_a_file_that_has_shrunk_or_gone_is_refused(tree, tmp_path):
    (file,) = storage.find(f"{tree}/b.txt")
    message = shards.refusal(storage.read, file, 4, 10)
    assert f"{file} has changed since it was opened: 1 bytes where 10 were" in message
    gone = storage.File(f"{tree}/gone", 5, "")
    assert f"{gone} can't be read" in shards.refusal(storage.read, gone, 0, 5)


def test_no_more_files_stay_open_than_the_limit(tmp_path):
    def num_open():
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return sum(os.readlink(link).startswith(str(tmp_path)) for link in links if os.path.lexists(link))

    for i in range(storage.MAX_OPEN + 20):
        (tmp_path / f"{i}").write_text("x")
        (file,) = storage.find(str(tmp_path / f"{i}"))
        assert storage.read(file, 0, 1) == b"x"
    assert num_open() == storage.MAX_OPEN
    storage._descriptor.cache_clear()
    assert num_open() == 0


@pytest.mark.parametrize("protocol", ["gs", "s3"])
def test_a_missing_package_is_named(protocol, monkeypatch):
    package = {"gs": "gcsfs", "s3": "s3fs"}[protocol]

    def missing(path):
        raise ImportError(f"Please install {package} to access it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)  # it may be installed here
    for look in (storage.find, storage.walk, storage.contents):
        message = shards.refusal(look, f"{protocol}://bucket/c4")
        assert f"{protocol}://bucket/c4 needs a package that is not installed" in message
        assert message.endswith(f"run: pip install {package}")


def test_the_package_of_a_protocol_within_fsspec_is_its_extra():
    assert storage._package_of("http://example.com/a") == "'fsspec[http]'"


def test_an_unknown_protocol_is_refused():
    assert "Protocol not known: nowhere" in shards.refusal(storage.find, "nowhere://a/b")


def test_a_local_copy_is_fetched_once_and_again_when_the_file_is_another(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("one")
    (file,) = storage.find(shards.in_memory(tmp_path / "a"))
    copy = storage.local_copy(file)
    assert (copy.is_local, storage.read(copy, 0, 3)) == (True, b"one")
    system = type(fsspec.filesystem("memory"))
    with monkeypatch.context() as patch:
        patch.setattr(system, "get_file", None)  # can't be called
        assert storage.local_copy(file) == copy
    (tmp_path / "a").write_text("two")
    (file,) = storage.find(shards.in_memory(tmp_path / "a"))
    assert storage.read(storage.local_copy(file), 0, 3) == b"two"

    (tmp_path / "no_folder").write_text("")
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "no_folder"))
    assert "set MOEJAX_CACHE to a folder with room" in shards.refusal(storage.local_copy, file)


# --- indices -------------------------------------------------------------------------------------------------------

NUMBERS = np.array([0, -1, 2**62, 7])


@pytest.fixture
def file(tmp_path):
    (tmp_path / "data").write_text("data")
    return storage.find(str(tmp_path / "data"))[0]


def builder(calls):
    def build():
        calls.append(1)
        return NUMBERS, b"a blob"

    return build


def test_an_index_is_built_once_and_holds_what_was_built(file):
    calls = []
    for _ in range(3):
        index = pickle.loads(pickle.dumps(storage.index(file, "kind", builder(calls))))
        assert index.num_ints == 4
        assert index.ints(0, 4).tolist() == NUMBERS.tolist()
        assert index.ints(1, 2).tolist() == NUMBERS[1:3].tolist()
        assert index.blob(2, 4) == b"blob"
    assert len(calls) == 1
    storage.index(file, "another", builder(calls))
    assert len(calls) == 2


def test_an_index_is_built_again_for_a_file_of_another_time_or_size(file):
    calls = []
    storage.index(file, "kind", builder(calls))
    os.utime(file.path, ns=(0, 0))
    (later,) = storage.find(file.path)
    storage.index(later, "kind", builder(calls))
    storage.index(storage.File(file.path, 5, file.version), "kind", builder(calls))
    assert len(calls) == 3


def test_a_damaged_index_is_built_again(file, cache_folder):
    calls = []
    storage.index(file, "kind", builder(calls))
    (stored,) = (cache_folder / "indices").iterdir()
    whole = stored.read_bytes()
    num_checked = len(whole) - len(b"a blob")
    damaged = [whole[:-1], whole + b"x", b"", whole[:20]]
    damaged += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(num_checked)]
    for number, content in enumerate(damaged, start=2):
        stored.write_bytes(content)
        index = storage.index(file, "kind", builder(calls))
        assert len(calls) == number
        assert stored.read_bytes() == whole
        assert index.ints(0, 4).tolist() == NUMBERS.tolist()
    assert [path.name for path in (cache_folder / "indices").iterdir()] == [stored.name]  # nothing partial is left


def test_an_index_that_is_removed_under_way_is_refused_with_the_remedy(file, cache_folder):
    index = storage.index(file, "kind", builder([]))
    (stored,) = (cache_folder / "indices").iterdir()
    stored.unlink()
    message = shards.refusal(index.ints, 0, 4)
    assert f"the cached index {stored} has gone or changed" in message
    assert message.endswith("start again to have it made anew")


def test_a_cache_folder_that_cannot_be_written_costs_a_warning(file, tmp_path, monkeypatch, caplog):
    (tmp_path / "no_folder").write_text("")
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "no_folder"))
    with caplog.at_level("WARNING", logger="absl"):
        index = pickle.loads(pickle.dumps(storage.index(file, "kind", builder([]))))
    assert index.ints(0, 4).tolist() == NUMBERS.tolist()
    assert index.blob(0, 6) == b"a blob"
    assert "is not cached" in caplog.text
    assert "set MOEJAX_CACHE" in caplog.text


def test_crc32c_has_its_published_value():
    assert google_crc32c.value(b"123456789") == 0xE3069283  # RFC 3720, B.4 has others; this one is Castagnoli's check
