"""Cutting a finished text into the pieces that a stream would have brought. Knows no wire format."""

from __future__ import annotations

import re
from collections.abc import Sequence

# About a token: a word with the space before it. The caps cut what has no spaces (Chinese, base64) as well.
_PIECE = re.compile(r"\s{0,16}\S{1,12}|\s{1,16}")

# Characters of text that one token without a text of its own may stand for when the thread is picked up again.
_GAP_PER_TOKEN = 8


def pieces(text: str) -> list[str]:
    """Word-sized pieces that join to `text`; an empty text has none."""
    return _PIECE.findall(text)


def shares(total: int, ways: int) -> list[int]:
    """`total` things dealt out to `ways` places, in order and as evenly as can be."""
    return [total * (way + 1) // ways - total * way // ways for way in range(ways)]


def along(text: str, tokens: Sequence[str]) -> list[tuple[str, int]]:
    """Cut `text` where its tokens end: pieces that join to `text`, each with the number of tokens it takes.

    All tokens are taken, in order. Not every token is in the text: special tokens are left out of it, a
    character may have several tokens, stop strings are cut off, and the client may have asked for token ids
    in place of tokens. Such a token goes with the next piece; those at the end have a last piece, perhaps empty.
    """
    cut: list[tuple[str, int]] = []
    at = waiting = 0
    for token in tokens:
        end = _end_of(token, text, at, _GAP_PER_TOKEN * waiting)
        waiting += 1
        if end is not None:
            cut.append((text[at:end], waiting))
            at, waiting = end, 0
    rest = pieces(text[at:]) or [""]
    if text[at:] or waiting:
        cut.extend(zip(rest, shares(waiting, len(rest)), strict=True))
    return cut


def _end_of(token: str, text: str, at: int, gap: int) -> int | None:
    found = text.find(token, at, at + gap + len(token)) if token else -1
    return None if found < 0 else found + len(token)
