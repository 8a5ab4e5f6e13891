"""How long answers may be, and what of an over-long chat is left out: told, and part of the key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from app.domain import Endpoint
from app.errors import BadCall, PromptTooLong
from app.gate.economy import capped, choices, trimmed
from app.settings import Settings
from tests.conftest import WEIGHTS, Running, chat
from tests.gate.limited import CHAT, ask, key

Serve = Callable[..., Running]


@pytest.mark.parametrize(
    ("endpoint", "body", "expected"),
    [
        (Endpoint.CHAT, {}, {"max_completion_tokens": 10}),
        (Endpoint.CHAT, {"max_tokens": 5}, {"max_tokens": 5}),
        (Endpoint.CHAT, {"max_tokens": 50}, {"max_tokens": 10}),
        (
            Endpoint.CHAT,
            {"max_tokens": None, "max_completion_tokens": 50},
            {"max_tokens": None, "max_completion_tokens": 10},
        ),
        (Endpoint.CHAT, {"max_tokens": 5, "max_completion_tokens": 50}, {"max_tokens": 5, "max_completion_tokens": 10}),
        (Endpoint.COMPLETIONS, {}, {"max_tokens": 10}),
        (Endpoint.RESPONSES, {"max_output_tokens": 50}, {"max_output_tokens": 10}),
        (Endpoint.MESSAGES, {}, {}),
        (Endpoint.MESSAGES, {"max_tokens": 50}, {"max_tokens": 10}),
        (Endpoint.EMBEDDINGS, {}, {}),
        (Endpoint.CHAT, {"max_tokens": 0}, {"max_tokens": 0}),
    ],
)
def test_no_call_asks_for_more_than_the_cap(endpoint: Endpoint, body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert capped(endpoint, body, 10, refuses=False) == expected
    assert capped(endpoint, body, None, refuses=False) is body


@pytest.mark.parametrize("given", ["50", 50.0, True, [50]])
def test_a_limit_that_only_the_engine_would_read_as_a_number_does_not_pass_the_cap(given: Any) -> None:
    with pytest.raises(BadCall, match="whole number"):
        capped(Endpoint.CHAT, {"max_tokens": given}, 10, refuses=False)
    with pytest.raises(BadCall, match="whole number"):
        choices({"n": given})


def test_completions_keep_the_apis_own_sixteen_under_a_higher_cap() -> None:
    assert capped(Endpoint.COMPLETIONS, {}, 100, refuses=False) == {}


def test_a_capped_call_says_so_and_is_the_same_call_as_one_that_asked_for_that(
    serve: Serve, settings: Settings
) -> None:
    headers, running = key(settings, max_output_tokens="4"), serve(redis_namespace=settings.redis_namespace)
    over = ask(running, headers, max_tokens=500)
    assert over.json()["usage"]["completion_tokens"] == 4
    assert over.headers["x-refrain-max-output-tokens"] == "4"
    within = ask(running, headers, max_tokens=4)
    assert within.headers["x-cache"] == "hit"
    assert "x-refrain-max-output-tokens" not in within.headers
    again = ask(running, headers, max_tokens=500, stream=True)
    assert (again.headers["x-cache"], again.headers["x-refrain-max-output-tokens"]) == ("hit", "4")
    with running.client(headers=headers) as client:
        assert client.post(CHAT, json=chat()).json()["usage"]["completion_tokens"] == 4, "without a limit of its own"


def test_a_call_that_asks_for_too_much_can_be_refused(serve: Serve) -> None:
    running = serve(limit_max_output_tokens=4, limit_output="refuse")
    refused = ask(running, {}, max_tokens=500)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
    assert "500" in refused.json()["error"]["message"]
    assert ask(running, {}, max_tokens=4).status_code == 200


# --- over-long chats ---------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "be brief"}
TOOL_TURN = [
    {"role": "user", "content": "weather"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]},
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    {"role": "assistant", "content": "it is sunny"},
]
ANTHROPIC_TURN = [
    {"role": "user", "content": "weather"},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "c1"}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1"}]},
    {"role": "assistant", "content": "it is sunny"},
]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
LAST = [{"role": "user", "content": "and now"}]


async def messages_of(body: dict[str, Any]) -> int:
    """As if every message were a token."""
    return len(body["messages"])


@pytest.mark.parametrize("turn", [TOOL_TURN, ANTHROPIC_TURN])
@pytest.mark.parametrize(
    ("room", "turns", "left"), [(12, 0, 11), (10, 1, 9), (8, 2, 5), (5, 2, 5), (4, 3, 3), (3, 3, 3)]
)
async def test_the_oldest_turns_go_whole_and_no_more_than_must(
    turn: list[Any], room: int, turns: int, left: int
) -> None:
    body = {"model": "m", "messages": [SYSTEM, *TALK, *turn, *TALK, SYSTEM, *LAST]}
    found = await trimmed(body, room, 20, messages_of)
    assert (found.turns, found.tokens, len(found.body["messages"])) == (turns, 11 - left, left)
    assert found.body["messages"][0] == SYSTEM
    assert found.body["messages"][-2:] == [SYSTEM, *LAST]
    assert found.body["model"] == "m"
    calls = [each for each in found.body["messages"] if each in turn]
    assert calls in ([], turn, turn[:1] if turn[0] in LAST else [])
    assert len(body["messages"]) == 11, "what the client sent stays as it was"


async def test_a_last_turn_that_does_not_fit_alone_is_refused_with_the_numbers() -> None:
    with pytest.raises(PromptTooLong, match="20 tokens") as refused:
        await trimmed({"messages": [*TALK, *TOOL_TURN]}, 3, 20, messages_of)
    assert "have 6 tokens, and 4 without" in refused.value.message
    assert refused.value.code == "context_length_exceeded"


def test_a_trimmed_call_says_so_and_is_kept_under_what_was_asked_in_the_end(serve: Serve, settings: Settings) -> None:
    """The scripted engine counts words."""
    long = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "word " * 20}]
    last = [{"role": "user", "content": "word " * 40}]
    headers = key(settings, trim="oldest")
    running = serve(redis_namespace=settings.redis_namespace, weights=replace(WEIGHTS, max_model_len=100))
    answer = ask(running, headers, messages=[*long, *last])
    assert answer.status_code == 200
    turns, tokens = answer.headers["x-refrain-trimmed"].split("; ")
    assert turns == "turns=1"
    assert 80 <= int(tokens.removeprefix("tokens=")) <= 90
    assert running.engine.calls[-1].body["messages"] == last
    assert ask(running, headers, messages=last).headers["x-cache"] == "hit"
    again = ask(running, headers, messages=[*long, *last])
    assert (again.headers["x-cache"], again.headers["x-refrain-trimmed"]) == (
        "hit",
        answer.headers["x-refrain-trimmed"],
    )
    too_long = ask(running, headers, messages=[*long, {"role": "user", "content": "word " * 200}])
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
    for body in ({"messages": "none"}, {"messages": ["none"]}, {"messages": []}):
        assert ask(running, headers, **body).status_code == 400 or body == {"messages": []}
