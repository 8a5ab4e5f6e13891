"""What a new core makes of a call that outlived another: news, a repetition, or something else than was sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from app.engine.running import Running
from app.engine.underway import Underway
from app.errors import EngineFailed


def running(*replay: int) -> Running:
    """A call whose client has these tokens already."""
    detokenizer = SimpleNamespace(num_output_tokens=lambda: len(replay), output_token_ids=list(replay))
    call = Running(request=None, state=SimpleNamespace(detokenizer=detokenizer), underway=Underway(), has_died=True)
    call.replay, call.goal = list(replay), len(replay)
    return call


def step(*tokens: int, finish_reason: Any = None) -> Any:
    return SimpleNamespace(
        new_token_ids=list(tokens), finish_reason=finish_reason, events=[], new_logprobs=None, prefill_stats="told"
    )


def test_its_place_is_what_this_core_has_made_of_it() -> None:
    again = running(1, 2, 3)
    again.took(step(1, 2))
    assert again.place == 2
    first = running(1, 2, 3)
    first.goal = 0  # from its prompt and its tokens, or for the first time
    assert first.place == 3


def test_what_is_known_is_left_out_and_the_rest_goes_on() -> None:
    call = running(1, 2, 3)
    again, further, on = step(1, 2), step(3, 4), step(5)
    assert not call.took(again)
    assert not call.is_further.is_set()
    assert call.took(further)
    assert (again.new_token_ids, further.new_token_ids) == ([], [4])
    assert call.is_further.is_set(), "it got further than it was when the core died"
    assert call.took(on)
    assert on.new_token_ids == [5]


@pytest.mark.parametrize("made", [step(1, 9), step(9), step(1, finish_reason="stop")], ids=["late", "early", "shorter"])
def test_what_differs_from_what_was_sent_is_an_error_and_never_passed_on(made: Any) -> None:
    with pytest.raises(EngineFailed, match="differs"):
        running(1, 2, 3).took(made)


def test_an_end_is_news_also_without_a_token() -> None:
    assert running().took(step(finish_reason="stop"))
