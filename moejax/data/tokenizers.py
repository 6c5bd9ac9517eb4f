"""Tokenizers: bytes, or byte-level BPE trained on the training documents."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import tokenizers as hf_tokenizers
from absl import logging
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax import config as config_lib
from moejax import files
from moejax.data import cache

END_OF_TEXT = "<|endoftext|>"  # its name in the vocabulary; in a text these characters mean nothing

# Unless it is set, the library warns in every process forked after its threads have run. Nothing in moejax forks:
# Grain spawns its workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class Tokenizer(Protocol):
    """Text to token ids and back.

    encode -> decode gives back any text exactly. encode never yields `end_of_text`, which parts documents and is the
    caller's to place. A lone surrogate is not text: bytes raise UnicodeEncodeError at it, BPE raises TypeError.
    """

    @property
    def name(self) -> str:
        """The value of `data.tokenizer` that builds it."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids, `end_of_text` included."""
        ...

    @property
    def end_of_text(self) -> int:
        """The id before, between and after documents."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: `end_of_text` and ids outside the vocabulary give none, invalid UTF-8 gives U+FFFD.

        A model's vocabulary may be padded beyond the tokenizer's, so that a sample can hold ids with no text.
        """
        ...

    def save(self, path: pathlib.Path) -> None:
        """Writes a JSON file that `load` reads, whole or not at all."""
        ...


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Token i is byte i of the UTF-8 text, for i < 256."""

    name = "bytes"
    vocab_size = config_lib.NUM_BYTES + 1
    end_of_text = config_lib.NUM_BYTES

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < config_lib.NUM_BYTES).decode(errors="replace")

    def save(self, path: pathlib.Path) -> None:
        files.write(path, json.dumps(_BYTES_FILE))


_BYTES_FILE = {"type": "bytes"}


class Bpe:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019): it has tokens for any text."""

    name = "bpe"

    def __init__(self, model: hf_tokenizers.Tokenizer):
        self._model = model
        # Else the characters <|endoftext|> in a text would become the token that ends it. Not kept in the file.
        self._model.encode_special_tokens = True
        end_of_text = model.token_to_id(END_OF_TEXT)
        if end_of_text is None:
            raise ValueError(f"its vocabulary lacks {END_OF_TEXT}")
        self.vocab_size: int = model.get_vocab_size()
        self.end_of_text: int = end_of_text

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "Bpe":
        """Learns merges until the vocabulary has `vocab_size` entries, or no pair of tokens occurs twice."""
        model = hf_tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[END_OF_TEXT],
            show_progress=False,
        )
        model.train_from_iterator(documents, trainer)
        return cls(model)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch_fast(texts)]  # fast: computes no offsets

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True)

    def to_json(self) -> str:
        """The tokenizer in the format of Hugging Face's `tokenizer.json`."""
        return self._model.to_str()

    def save(self, path: pathlib.Path) -> None:
        files.write(path, self.to_json())


def build(config: config_lib.DataConfig, documents: Iterable[str]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    BPE learns from `documents`, which must be the training documents alone, and is cached under a hash of them. Few
    documents give fewer than `data.vocab_size` entries: `vocab_size` tells.
    """
    match config.tokenizer:
        case "bytes":
            return Bytes()
        case "bpe":
            return _build_bpe(list(documents), config.vocab_size)
        case name:
            raise config_lib.ConfigError(f"data.tokenizer={name} is not known; choose bpe or bytes")


def _build_bpe(documents: list[str], vocab_size: int) -> Tokenizer:
    recipe = f"byte-level bpe {vocab_size} tokenizers {hf_tokenizers.__version__}"
    path = cache.folder() / f"tokenizer-{cache.digest([recipe, *documents])}.json"
    try:
        return load(path)
    except FileNotFoundError:
        pass
    except (config_lib.ConfigError, OSError) as error:
        logging.warning("%s; training it again", error)
    tokenizer = Bpe.train(documents, vocab_size)
    cache.store(path, tokenizer.to_json())
    return tokenizer


def load(path: pathlib.Path) -> Tokenizer:
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      config.ConfigError: the file does not hold a tokenizer of moejax.
    """
    text = path.read_bytes().decode(errors="replace")
    try:
        if json.loads(text) == _BYTES_FILE:
            return Bytes()
        return Bpe(hf_tokenizers.Tokenizer.from_str(text))
    except Exception as error:  # the library raises bare Exception
        raise config_lib.ConfigError(
            f"{path} does not hold a tokenizer ({error}); restore it, or delete it where it can be built again"
        ) from None
