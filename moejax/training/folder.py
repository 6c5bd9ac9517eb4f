"""A run's folder: what makes two runs the same, and how a run is found again."""

import json
import pathlib
import socket
import time
from collections.abc import Callable
from typing import Any

from moejax import config as config_lib
from moejax import files, rules
from moejax.config import plain
from moejax.data import pipeline, tokenizers
from moejax.training import metrics

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
DATA_FILE = "data.json"  # what the corpus was: `pipeline.Data.describe`
FILE_APPEARS = 60  # seconds until another host sees a new file: NFS remembers for so long that there is none

# What a run may change when it goes on; anything else would make another model, or other rows in another order.
# Documents may move to another place: `check_corpus` sees whether they are the same.
FREE_ON_RESUME = (
    *("training.", "checkpoint.", "mesh.", "optimizer."),
    *("model.mamba.scan", "model.mamba.chunk_size", "model.mamba2.scan", "model.mamba2.chunk_size"),
    *("model.moe.exchange", "model.moe.num_chunks", "model.moe.grouped_matmul"),
    *("data.num_workers", "data.source", "data.validation_source", "data.tfds_dir"),
)
# The first two are where the parameters come from; the others say of what arrays the optimizer's state is.
_NEVER_FREE = ("training.seed", "training.init_from", "optimizer.name", "optimizer.adafactor.min_factored_dim")


def describe(config: config_lib.Config, data: pipeline.Data, workdir: pathlib.Path) -> None:
    """Writes what the run is made of: its config, what its corpus is, and the tokenizer."""
    files.write(workdir / CONFIG_FILE, json.dumps(plain.to_dict(config), indent=2) + "\n")
    files.write(workdir / DATA_FILE, json.dumps(data.describe(), indent=2) + "\n")
    data.tokenizer.save(workdir / TOKENIZER_FILE)


def check_shared(data: pipeline.Data, workdir: pathlib.Path) -> None:
    """Refuses a process that sees another folder or another corpus than the process that has described them."""
    path = workdir / DATA_FILE
    deadline = time.monotonic() + FILE_APPEARS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(1)
    if not path.exists():
        raise config_lib.ConfigError(
            f"--workdir={workdir} is another folder on {socket.gethostname()} than where process 0 runs; name one on a "
            "disk that all hosts share"
        )
    there, here = files.read_json(path), data.describe()
    if there["digest"] != here["digest"]:
        raise config_lib.ConfigError(
            f"the corpus on {socket.gethostname()} is not that of process 0 ({_sizes(here)} here, {_sizes(there)} "
            "there); give every host the same documents"
        )


def check(config: config_lib.Config, workdir: pathlib.Path) -> list[str]:
    """Refuses a folder whose checkpoints are of another model or other rows; reads only.

    Returns:
      What else has changed since, as phrases.
    """
    if workdir.exists() and not workdir.is_dir():
        raise config_lib.ConfigError(f"--workdir={workdir} is a file; name a folder")
    changed: list[str] = []
    if not has_checkpoints(workdir):
        return changed
    for path, old, new in plain.differences(load_config(workdir), config):
        if blocks_resume(path):
            raise config_lib.ConfigError(
                f"{path}={new} but the checkpoints in {workdir} were made with {path}={old}; "
                "set it back, or choose another --workdir"
            )
        changed.append(f"{path}={new} (was {old})")
    return changed


def blocks_resume(path: str) -> bool:
    """Whether a run cannot go on after this field of its config has changed."""
    return path in _NEVER_FREE or not path.startswith(FREE_ON_RESUME)


def check_corpus(data: pipeline.Data, workdir: pathlib.Path) -> None:
    """Refuses other documents than the run began with: rows would come in another order, and documents that it has
    trained on might be held out."""
    path = workdir / DATA_FILE
    if not has_checkpoints(workdir) or not path.exists():
        return
    old, new = files.read_json(path), data.describe()
    if old["digest"] != new["digest"]:
        raise config_lib.ConfigError(
            f"the corpus has changed since the run in {workdir} began ({_sizes(old)} then, {_sizes(new)} now); "
            "bring back the documents in the form they had, or train anew in another --workdir"
        )


def _sizes(described: dict[str, Any]) -> str:
    tokens = described["train_tokens"]
    return f"{described['train_documents']} documents" + (f" of {tokens} tokens" if tokens else "")


def has_checkpoints(workdir: pathlib.Path) -> bool:
    """Whether the folder holds any checkpoint, sound or not."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


def load_config(workdir: pathlib.Path, setting: str = "--workdir") -> config_lib.Config:
    """The config that a run has written into its folder, which the user names by `setting`."""
    path = workdir / CONFIG_FILE
    try:
        config = plain.from_dict(files.read_json(path))
        rules.validate(config)
        return config
    except FileNotFoundError:
        raise config_lib.ConfigError(
            f"{setting}={workdir} holds no config.json; name the folder of a run of moejax train"
        ) from None
    except NotADirectoryError:
        raise config_lib.ConfigError(f"{setting}={workdir} is a file; name the folder of a run") from None


def load_tokenizer(workdir: pathlib.Path) -> tokenizers.Tokenizer | None:
    """The tokenizer a run has saved: its checkpoints mean nothing under another one. None before there are any."""
    path = workdir / TOKENIZER_FILE
    return tokenizers.load(path) if has_checkpoints(workdir) and path.exists() else None


def check_vocabulary(config: config_lib.Config, tokenizer: tokenizers.Tokenizer) -> None:
    """Refuses a tokenizer with more entries than the model has rows."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise config_lib.ConfigError(
            f"model.vocab_size={config.model.vocab_size} is below the tokenizer's {tokenizer.vocab_size} entries; "
            f"set it to {tokenizer.vocab_size} or more"
        )


def report_corrupt(workdir: pathlib.Path) -> Callable[[int, str], None]:
    """Says that a checkpoint is damaged and that the one before it is tried."""

    def report(step: int, reason: str) -> None:
        metrics.say(
            f"the checkpoint of step {step} in {workdir} is damaged ({reason}); falling back to the one before it"
        )

    return report
