"""Tokenizers: bytes, byte-level BPE trained on the training documents, and those that others trained."""

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import tokenizers as hf_tokenizers
from absl import logging
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax import config as config_lib
from moejax.data import cache, pretrained

END_OF_TEXT = "<|endoftext|>"  # bpe: its name in the vocabulary; in a text these characters mean nothing
_SENTINEL = "<extra_id_{}>"  # and that of a sentinel, as in T5
MAX_CHARACTERS = 2**28  # bpe learns from so many at most, all of them in memory


class Tokenizer(Protocol):
    """Text to token ids and back.

    bytes, bpe and gpt2 give back any text exactly by encode -> decode. sentencepiece normalises the text (Unicode's
    NFKC, runs of spaces) and has one id for all it does not know; of hf the file decides.

    encode never yields `end_of_text`, which parts documents and is the caller's to place, nor `pad`, nor a sentinel;
    what hf can't help is at `pretrained.Hf`. A lone surrogate is not text: bpe and hf raise TypeError at it, the others
    UnicodeEncodeError.

    Any thread may call it, and it can be pickled. Tokenizers are equal if their name and all that defines them are.
    """

    @property
    def name(self) -> str:
        """Its kind: `data.tokenizer` up to the colon."""
        ...

    @property
    def digest(self) -> str:
        """A hash of all that defines the encoding; the same after `save` and `load`."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special ones included."""
        ...

    @property
    def end_of_text(self) -> int:
        """The id before, between and after documents."""
        ...

    @property
    def pad(self) -> int:
        """The id that fills a row; `end_of_text` where there is none of its own."""
        ...

    @property
    def first_sentinel(self) -> int:
        """The id of <extra_id_0>, which stands for the first span that is left out; <extra_id_N> is N below it.

        It means nothing if `num_sentinels` is 0.
        """
        ...

    @property
    def num_sentinels(self) -> int:
        """How many sentinels there are; 0 for gpt2, and for bytes and bpe without objective=span_corruption."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, by all cores (bytes: one). The lists take some 40 bytes a token."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. A sentinel is written as its name, <extra_id_3>; invalid UTF-8 gives U+FFFD.

        `end_of_text`, `pad` and ids outside the vocabulary give none: a model's vocabulary may be padded beyond the
        tokenizer's, so that a sample can hold ids with no text.
        """
        ...

    def save(self, path: pathlib.Path) -> None:
        """Writes one JSON file that `load` reads without any other, whole or not at all."""
        ...


class Bytes(pretrained.Base):
    """Token i is byte i of the UTF-8 text, for i < 256; 256 is end-of-text, and sentinels, if any, come after it."""

    name = "bytes"
    end_of_text = pad = config_lib.NUM_BYTES

    def __init__(self, sentinels: str = ""):
        """sentinels: how many; "" for none."""
        super().__init__(**({"sentinels": sentinels} if sentinels else {}))
        self.num_sentinels = int(sentinels or 0)
        self.vocab_size = config_lib.NUM_BYTES + 1 + self.num_sentinels
        self.first_sentinel = self.vocab_size - 1 if self.num_sentinels else 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        def written(i: int) -> bytes:
            if config_lib.NUM_BYTES < i < self.vocab_size:
                return _SENTINEL.format(self.first_sentinel - i).encode()
            return bytes([i]) if 0 <= i < config_lib.NUM_BYTES else b""

        return b"".join(map(written, ids)).decode(errors="replace")


class Bpe(pretrained.Hf):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019): it has tokens for any text."""

    name = "bpe"

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int, num_sentinels: int = 0) -> "Bpe":
        """Learns merges until the vocabulary has `vocab_size` entries, or no pair of tokens occurs twice.

        The sentinels, which are among the entries, come last.
        """
        model = hf_tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - num_sentinels,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[END_OF_TEXT],
            show_progress=False,
        )
        model.train_from_iterator(documents, trainer)
        model.add_special_tokens([_SENTINEL.format(number) for number in reversed(range(num_sentinels))])
        return cls(model.to_str(), END_OF_TEXT)

    def to_json(self) -> str:
        """The tokenizer in the format of Hugging Face's `tokenizer.json`."""
        return self._definition["tokenizer"]


def build(config: config_lib.DataConfig, documents: Iterable[str]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; bytes and bpe with sentinels, if data.objective needs them.

    BPE alone reads `documents`, which must be the training documents, up to MAX_CHARACTERS; it is cached under a hash
    of what it read. Few documents give fewer than `data.vocab_size` entries: `vocab_size` tells.

    Raises:
      config.ConfigError: there is no such tokenizer, or its files are missing or not what they should be.
    """
    num_sentinels = config_lib.NUM_SENTINELS if config.objective == "span_corruption" else 0
    match config.tokenizer.partition(":"):
        case "bytes", _, "":
            return Bytes(str(num_sentinels or ""))
        case "bpe", _, "":
            return _build_bpe(_first(documents), config.vocab_size, num_sentinels)
        case ("gpt2" | "sentencepiece" | "hf") as kind, _, place:
            return _read(kind, place, config)
    raise config_lib.ConfigError(
        f"data.tokenizer={config.tokenizer} is not known; "
        "choose bpe, bytes, gpt2[:FOLDER], sentencepiece:FILE or hf:FILE"
    )


def _read(kind: str, place: str, config: config_lib.DataConfig) -> Tokenizer:
    try:
        match kind:
            case "gpt2":
                return pretrained.Gpt2.read(place)
            case "sentencepiece":
                return pretrained.SentencePiece.read(pathlib.Path(place))
            case _:
                return pretrained.Hf.read(pathlib.Path(place), config.end_of_text)
    except config_lib.ConfigError:
        raise
    except Exception as error:  # the libraries raise what they like
        raise config_lib.ConfigError(
            f"data.tokenizer={config.tokenizer} can't be used ({pretrained.one_line(error)}); name another"
        ) from None


def _first(documents: Iterable[str]) -> list[str]:
    """The first documents, MAX_CHARACTERS in all; the last of them may be cut."""
    taken: list[str] = []
    room = MAX_CHARACTERS
    for document in documents:
        taken.append(document[:room])
        if len(document) > room:
            logging.info(
                "data.tokenizer=bpe learns from the first %d characters, %d documents", MAX_CHARACTERS, len(taken)
            )
            break
        room -= len(document)
    return taken


def _build_bpe(documents: list[str], vocab_size: int, num_sentinels: int) -> Tokenizer:
    recipe = f"byte-level bpe {vocab_size} tokenizers {hf_tokenizers.__version__}"
    recipe += f" sentinels {num_sentinels}" if num_sentinels else ""
    path = cache.folder() / f"tokenizer-{cache.digest([recipe, *documents])}.json"
    try:
        return load(path)
    except FileNotFoundError:
        pass
    except (config_lib.ConfigError, OSError) as error:
        logging.warning("%s; training it again", error)
    tokenizer = Bpe.train(documents, vocab_size, num_sentinels)
    cache.store(path, tokenizer.to_json())
    return tokenizer


def load(path: pathlib.Path) -> Tokenizer:
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      config.ConfigError: the file does not hold a tokenizer of moejax.
    """
    text = path.read_bytes().decode(errors="replace")
    kinds = {kind.name: kind for kind in (Bytes, pretrained.Gpt2, pretrained.SentencePiece, pretrained.Hf)}
    try:
        values = json.loads(text)
        if "type" not in values:
            return Bpe(text, END_OF_TEXT)
        return kinds[values.pop("type")](**values)
    except Exception as error:  # the libraries raise what they like
        raise config_lib.ConfigError(
            f"{path} does not hold a tokenizer ({pretrained.one_line(error)}); "
            "restore it, or delete it where it can be built again"
        ) from None
