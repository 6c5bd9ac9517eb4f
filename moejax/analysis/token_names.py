"""One token as a reader can see it: "␣the", "⏎", "<0xE2>"."""

import functools
from collections.abc import Callable, Iterable

from moejax.data import tokenizers

_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_REPLACEMENT = "\ufffd"  # what bytes that are no text are decoded to


def names(tokenizer: tokenizers.Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of each token, with white space and what does not print made visible.

    A token that ends or starts within a character shows its bytes, or its id where these can't be found out.
    """
    before = tokenizer.encode("a")[-1]  # SentencePiece takes the space off a text's first token
    start = tokenizer.decode([before])
    part_bytes = functools.cache(lambda: _part_bytes(tokenizer))
    special = {tokenizer.pad: "<padding>", tokenizer.end_of_text: "<end of text>"}
    texts = [(i, tokenizer.decode([before, i]).removeprefix(start)) for i in ids]
    return [special.get(i) or _show(i, text, part_bytes) for i, text in texts]


def _show(i: int, text: str, part_bytes: Callable[[], dict[int, bytes]]) -> str:
    if _REPLACEMENT in text:
        text = part_bytes().get(i, b"").decode(errors="surrogateescape")
    return "".join(map(_show_character, text)) or f"<token {i}>"


def _show_character(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is no text
        return f"<0x{ord(character) - 0xDC00:02X}>"
    if character in _VISIBLE or character.isprintable():
        return _VISIBLE.get(character, character)
    return f"<U+{ord(character):04X}>"


def _part_bytes(tokenizer: tokenizers.Tokenizer) -> dict[int, bytes]:
    """The bytes of tokens that are a part of a character, as far as they follow from how characters are encoded."""
    # Every pair of first bytes of a character, alone and behind a space.
    blocks = (
        range(0x80, 0x800),
        range(0x800, 0xD800, 0x40),
        range(0xE000, 0x10000, 0x40),
        range(0x10000, 0x110000, 0x1000),
    )
    characters = [chr(i) for block in blocks for i in block]
    texts = [*characters, *(f" {character}" for character in characters)]
    one = functools.cache(lambda i: tokenizer.decode([i]))
    known: dict[int, bytes] = {}
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if tokenizer.decode(ids) == text:  # nothing was normalised
            found = [known.get(i) if _REPLACEMENT in one(i) else one(i).encode() for i in ids]
            known |= _solve(text.encode(), ids, found)
    return known


def _solve(content: bytes, ids: list[int], found: list[bytes | None]) -> dict[int, bytes]:
    """What the tokens that are not found yet must be, if all together are `content`."""
    while found and found[0] is not None:
        content, found, ids = content.removeprefix(found[0]), found[1:], ids[1:]
    while found and found[-1] is not None:
        content, found, ids = content.removesuffix(found[-1]), found[:-1], ids[:-1]
    if len(ids) == len(content):
        return {i: content[k : k + 1] for k, i in enumerate(ids)}
    return {ids[0]: content} if len(ids) == 1 else {}
