"""Labels of documents: a topic, a language, a task. Experts may be chosen by them, and reports say who takes which.

They take no part in how documents are packed or in what order: with labels and without, rows hold the same tokens.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from moejax import config as config_lib
from moejax.data import cache, documents, packing, sources

OWN = {"wikipedia": "topic", "docstrings": "package"}  # what the documents of corpora without files are labelled with
_NUM_TRIED = 32  # documents looked at before the first step where nobody has looked at all

Side = tuple[sources.Source, documents.InMemory | documents.OnTheFly]  # documents as text, and those tokenised


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a corpus; none by default."""

    names: tuple[str, ...] = ()
    train: packing.LabelIds | None = None  # of each document, its place in names; -1: not there; None: no labels
    validation: packing.LabelIds | None = None

    def digest(self, data_digest: str, config: config_lib.DataConfig) -> str:
        """That of the documents together with the labels asked for. A corpus's own labels are a part of it as it is."""
        if not config.label:
            return data_digest
        known = [ids for ids in (self.train, self.validation) if isinstance(ids, np.ndarray)]
        hashes = [hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest() for ids in known]
        return cache.digest([data_digest, config.label, *self.names, *hashes])


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup(Sequence[int]):
    """The label of each document, looked up whenever it is asked for."""

    source: sources.Source
    places: dict[str | None, int]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> int:
        return self.places.get(self.source.label(index), -1)


def check(config: config_lib.DataConfig) -> None:
    """Refuses labels that the sources don't have.

    Raises:
      config.ConfigError: as it says.
    """
    label = config.label
    if label not in ("", "folder") and label.removeprefix("field:") in ("", label):
        raise config_lib.ConfigError(f"data.label={label} is not known; write field:NAME, folder, or leave it empty")
    if len(set(config.labels)) < len(config.labels):
        twice = next(name for name in config.labels if config.labels.count(name) > 1)
        raise config_lib.ConfigError(f"data.labels names {twice} more than once; leave out all but one")
    for field in ("source", "validation_source"):
        spec = getattr(config, field)
        kind = spec.partition(":")[0]
        if kind == "prepared" and (label or config.labels):
            raise config_lib.ConfigError(
                f"data.{'label' if label else 'labels'} is set and data.{field}={spec} holds no labels, as no prepared "
                "folder does; read the files themselves (files: or tfds:), or leave it empty"
            )
        if kind == "tfds" and label == "folder":
            raise config_lib.ConfigError(
                f"data.label=folder is for files:, and all of data.{field}={spec} lies in one folder; "
                "set data.label=field:NAME"
            )
        if kind in OWN and label not in ("", "field:topic" if kind == "wikipedia" else ""):
            raise config_lib.ConfigError(
                f"data.label={label} but the labels of data.{field}={spec} are each document's {OWN[kind]}; "
                "leave data.label empty"
            )
    if config.objective != "next_token" and (label or config.labels):
        raise config_lib.ConfigError(
            f"data.{'label' if label else 'labels'} is set and rows of data.objective={config.objective} carry no "
            "labels; leave it empty, or set data.objective=next_token"
        )


def load(config: config_lib.DataConfig, train: Side, validation: Side, max_bytes: int) -> Labels:
    """The labels of both sides, those of the training documents unless data.labels names them.

    Every training document is looked at, blank ones too, but where documents are tokenised when they are read and
    data.labels says which labels there are. Held-out documents of a source without labels have none of them: -1.

    Raises:
      config.ConfigError: no training document has one of data.labels; or data.labels must be set, since there are more
        than `max_bytes` of files to look through.
    """
    source, tokenised = train
    if config.objective != "next_token" or not source.has_labels:
        if config.labels:
            raise config_lib.ConfigError(
                f"data.labels is set and the documents of data.source={config.source} have no labels; "
                "set data.label=field:NAME or folder, or leave data.labels empty"
            )
        return Labels()
    on_the_fly = isinstance(tokenised, documents.OnTheFly)
    if on_the_fly and (config.labels or source.num_bytes > max_bytes):
        names = config.labels or _folders(config, source, max_bytes)
        of_train: packing.LabelIds = Lookup(source, {name: place for place, name in enumerate(names)})
        _try(config, of_train)
    else:
        found = [source.label(i) for i in range(len(source))]
        names = config.labels or tuple(sorted({label for label in found if label is not None}))
        of_train = _places(found, names, tokenised)
        if (of_train < 0).all():
            raise config_lib.ConfigError(
                f"data.labels={','.join(config.labels)} names no label of the training documents, which have "
                f"{', '.join(sorted(set(map(str, found)))[:12])}; name some of these, or leave it empty for all"
            )
    source, tokenised = validation
    return Labels(names, of_train, _places([source.label(i) for i in range(len(source))], names, tokenised))


def counts(names: tuple[str, ...], places: packing.LabelIds) -> dict[str, int]:
    """Documents of each label, the most frequent first."""
    count_N = np.bincount(np.array(places, np.int64) + 1, minlength=len(names) + 1)[1:]
    return {names[int(place)]: int(count_N[place]) for place in np.argsort(-count_N, kind="stable")}


def _places(
    found: Sequence[str | None], names: Sequence[str], tokenised: documents.InMemory | documents.OnTheFly
) -> np.ndarray:
    """Of the documents that are kept where blank ones are left out, as int32 numbers."""
    place: dict[str | None, int] = {name: place for place, name in enumerate(names)}
    place_of = np.array([place.get(label, -1) for label in found], np.int32)
    kept = None if isinstance(tokenised, documents.OnTheFly) else tokenised.indices
    return place_of if kept is None else place_of[kept]


def _folders(config: config_lib.DataConfig, source: sources.Source, max_bytes: int) -> tuple[str, ...]:
    if config.label != "folder":
        raise config_lib.ConfigError(
            f"data.labels is empty, and to find the labels all {source.num_bytes / 1e9:.0f} GB of data.source would be "
            f"read, over {max_bytes / 1e9:.0f} GB; name them in data.labels"
        )
    return tuple(sorted({path.split("/")[-2] for path in source.paths}))


def _try(config: config_lib.DataConfig, places: packing.LabelIds) -> None:
    """Says so if none of some documents, spread evenly, has a label that data.labels names."""
    tried = range(0, len(places), max(1, len(places) // _NUM_TRIED))
    if all(places[i] < 0 for i in tried):
        logging.warning(
            "none of %d training documents looked at has one of data.labels=%s; see moejax data inspect",
            len(tried),
            ",".join(config.labels),
        )
