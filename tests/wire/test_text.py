"""A finished text is cut as a stream would have brought it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.wire import text


@given(st.text())
def test_pieces_join_to_the_text(said: str) -> None:
    assert "".join(text.pieces(said)) == said


@pytest.mark.parametrize("said", ["a " * 50, "漢" * 100, "A" * 100, " " * 100, "\n" * 100, "😀" * 100])
def test_no_piece_is_a_lump(said: str) -> None:
    assert max(map(len, text.pieces(said))) <= 28


@given(st.text(), st.lists(st.text(max_size=4)))
def test_along_keeps_the_text_and_takes_every_token(said: str, tokens: list[str]) -> None:
    cut = text.along(said, tokens)
    assert "".join(piece for piece, _ in cut) == said
    assert sum(count for _, count in cut) == len(tokens)


@pytest.mark.parametrize(
    ("said", "tokens", "cut"),
    [
        ("Hello world", ["Hello", " world", "</s>"], [("Hello", 1), (" world", 1), ("", 1)]),
        # The halves of a character have no text, or one that is not in the answer.
        ("ok 😀!", ["ok", " ", "", "😀", "!"], [("ok", 1), (" ", 1), ("😀", 2), ("!", 1)]),
        ("ok 😀!", ["ok", " �", "�", "!"], [("ok", 1), (" 😀!", 3)]),
        # A stop string takes the end of the last token off.
        ("one tw", ["one", " two"], [("one", 1), (" tw", 1)]),
        # Token ids in place of tokens: there is no boundary to cut at.
        ("one two", ["token_id:1", "token_id:2"], [("one", 1), (" two", 1)]),
        ("", ["</s>"], [("", 1)]),
        ("", [], []),
    ],
)
def test_along_cuts_at_token_boundaries(said: str, tokens: list[str], cut: list[tuple[str, int]]) -> None:
    assert text.along(said, tokens) == cut


@given(st.integers(0, 1000), st.integers(1, 50))
def test_shares_are_even_and_complete(total: int, ways: int) -> None:
    shares = text.shares(total, ways)
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1
