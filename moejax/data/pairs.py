"""Text-to-text pairs (T5, arXiv 1910.10683, section 2.4): an input for the encoder, its target for the decoder.

A pair is a document like any other on its way to a row: as text the input and the target with a line end between, as
tokens the input, end-of-text and the target. So it is shuffled, held out and counted as documents are.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from moejax import config as config_lib
from moejax.data import corruption, sources


class Pair(str):
    """Both texts of a pair, one after the other."""

    source: str
    target: str

    def __new__(cls, source: str, target: str) -> "Pair":
        pair = super().__new__(cls, f"{source}\n{target}")
        pair.source, pair.target = source, target
        return pair


class Pairs(Sequence[str]):
    """The pairs of a source of records; see `sources.Source`."""

    has_labels = False

    def __init__(self, source: sources.Source):
        """source: texts are the inputs, and labels the targets."""
        self._source = source
        self.num_bytes, self.num_skipped = source.num_bytes, source.num_skipped
        self.paths, self.fingerprint = source.paths, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Pair:
        with _of_targets():
            return Pair(self._source[index], self._source.label(index) or "")

    def label(self, index: int) -> None:
        """A pair has none."""


def open_source(spec: str, *, split: str, text_field: str, target_field: str, tfds_dir: str) -> Pairs:
    """The pairs in the records that a spec names; see `sources.open_source`. A target may be an integer, too.

    Raises:
      config.ConfigError: as there; or a file has no fields.
    """
    with _of_targets():
        label = f"field:{target_field}"
        return Pairs(sources.open_source(spec, split=split, text_field=text_field, label=label, tfds_dir=tfds_dir))


@contextlib.contextmanager
def _of_targets() -> Iterator[None]:
    """To a source targets are labels; a user knows them by their own name."""
    try:
        yield
    except config_lib.ConfigError as error:
        line = str(error).replace("data.label=field:NAME", "data.target_field").replace("the label", "the target")
        raise config_lib.ConfigError(line.replace("set data.label=folder, or name", "name")) from None


def join(input_ids: Sequence[int], target_ids: Sequence[int], end_of_text: int) -> list[int]:
    """A pair's tokens. None if either side has none: such a pair is blank."""
    if not (len(input_ids) and len(target_ids)):
        return []
    if end_of_text in input_ids:
        raise config_lib.ConfigError(
            "data.text_field: the tokenizer makes its end-of-text of an input's characters, which would end the input "
            "there; take them out of the texts"
        )
    return [*input_ids, end_of_text, *target_ids]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToText:
    """The arrays of a pair for an encoder-decoder model; one pair a row."""

    inputs_length: int
    targets_length: int
    end_of_text: int
    pad: int
    overlap = 0  # see `packing.SpanCorruption`

    @property
    def num_units(self) -> int:
        """Tokens of a full row's pair: the input, the mark between, and the target, each of the two without EOS."""
        return self.inputs_length + self.targets_length - 1

    def whole(self, tokens: np.ndarray) -> np.ndarray:
        """A pair with as much of its input as the encoder has slots for; its target fits (`objectives.check`)."""
        num_inputs, _ = self.sizes(tokens)
        return np.concatenate([tokens[: min(num_inputs, self.inputs_length - 1)], tokens[num_inputs:]])

    def sizes(self, tokens: np.ndarray) -> tuple[int, int]:
        """Tokens of the input and of the target, without EOS."""
        num_inputs = int(np.argmax(tokens == self.end_of_text))
        return num_inputs, len(tokens) - num_inputs - 1

    def arrays(self, streams: Sequence[np.ndarray], index: int, labels: object = None) -> dict[str, np.ndarray]:
        """The arrays of one row (`corruption.slots`). index and labels are not used."""
        inputs = targets = None
        if streams:
            num_inputs, _ = self.sizes(streams[0])
            inputs, targets = streams[0][:num_inputs], streams[0][num_inputs + 1 :]
        return corruption.slots(
            inputs,
            targets,
            inputs_length=self.inputs_length,
            targets_length=self.targets_length,
            end_of_text=self.end_of_text,
            pad=self.pad,
        )
