"""How many bytes of text each token of a tokenizers file stands for: found from what it spells, and checked on every document."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_SPACE = "\u2581"  # what SentencePiece writes for a space
_RAW = re.compile("<0x[0-9A-Fa-f]{2}>")  # what it writes for a byte that no piece holds


def spellings(tokenizer: Any) -> list[bytes]:
    """The bytes that each id spells, where tokens keep the text: byte-level BPE, SentencePiece pieces, whole words otherwise.

    Whether an encoded text is what its ids spell is for `sizes` to see: the file alone does not say what a normaliser drops.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.

    Returns:
        One bytes object for each id from 0 to the largest; empty for numbers that no token has.
    """
    about = json.loads(tokenizer.to_str())
    parts = [about[name] for name in ("pre_tokenizer", "decoder", "normalizer") if about.get(name)]
    types = {kind for part in parts for kind in _types(part)}
    added = {entry["id"]: entry["content"].encode() for entry in about.get("added_tokens") or ()}
    if "ByteLevel" in types:
        read = _of_byte_level
    else:
        spaces = "Metaspace" in types or _SPACE in json.dumps(parts, ensure_ascii=False)
        read = functools.partial(_of_piece, spaces=spaces)
    raw = bool(about["model"].get("byte_fallback"))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    found = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for text, number in vocabulary.items():
        found[number] = _raw(text) if raw and _RAW.fullmatch(text) else added.get(number) or read(text)
    return found


def sizes(spelt: Sequence[bytes], lengths: np.ndarray, ids: Sequence[int], content: bytes) -> np.ndarray | None:
    """Bytes of a document that each of its tokens stands for, or None if the tokens do not spell it exactly.

    A space that the tokenizer itself put before the document belongs to no text: the first token stands for one byte less.

    Args:
        spelt: of `spellings`.
        lengths: ints [ids], of each entry of `spelt`.
        ids: of the document.
        content: the document, UTF-8.

    Returns:
        Ints [tokens], of the type of `lengths`, which add up to the document's bytes.
    """
    whole = b"".join(map(spelt.__getitem__, ids))
    found = lengths[np.asarray(ids, np.int64)]
    if whole == content:
        return found
    if whole != b" " + content:
        return None
    first = int(np.argmax(found > 0))
    found[first] -= 1
    return found


def _types(part: Any) -> Iterator[str]:
    """Every "type" in a part of the file, however deep."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        for inner in part.values():
            yield from _types(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _types(inner)


@functools.cache
def _byte_of() -> dict[str, int]:
    """{character: byte} of byte-level BPE: printable characters of Latin-1 are their own, the rest are counted from 256 on."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(rest)}


def _of_byte_level(text: str) -> bytes:
    known = _byte_of()
    return bytes(known[letter] for letter in text) if all(letter in known for letter in text) else text.encode()


def _of_piece(text: str, spaces: bool) -> bytes:
    return (text.replace(_SPACE, " ") if spaces else text).encode()


def _raw(text: str) -> bytes:
    return bytes([int(text[3:5], 16)])
