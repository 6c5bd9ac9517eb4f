"""A corpus to prepare, and looks at what came of it."""

import copy
import hashlib
import json

import numpy as np
import pytest

from moejax import config as config_lib
from moejax.data import pipeline


def make_config(tmp_path, monkeypatch):
    """Two hundred documents in JSON lines, three of them blank, and twenty held out."""
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name, count in (("train", 200), ("validation", 20)):
        words = [" ".join(rng.choice(["cat", "é", "rain", "sea"], size=rng.integers(1, 30))) for _ in range(count)]
        texts = [text if i not in (3, 50, 199) else " \n" for i, text in enumerate(words)]
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return config_lib.DataConfig(
        source=f"files:{tmp_path / 'train.jsonl'}",
        validation_source=f"files:{tmp_path / 'validation.jsonl'}",
        tokenizer="bytes",
        seq_length=32,
        batch_size=4,
    )


def from_folder(config, folder):
    changed = copy.copy(config)
    changed.source, changed.validation_source = f"prepared:{folder}", ""
    return changed


def contents(folder):
    """The bytes of every file, hidden ones too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def assert_same_batches(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def dataclass_with(config, **changes):
    changed = copy.copy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def refusal(config, folder):
    with pytest.raises(config_lib.ConfigError) as error:
        pipeline.load(from_folder(config, folder))
    assert "\n" not in str(error.value)
    return str(error.value)
