"""What is spent on an answer: how long it may be, and what of an over-long chat is left out. Pure."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from app.domain import Endpoint
from app.errors import BadCall, PromptTooLong

# What the API makes of a call to completions that sets no limit.
_COMPLETIONS_LIMIT = 16

_LIMITS = {
    Endpoint.CHAT: ("max_completion_tokens", "max_tokens"),
    Endpoint.COMPLETIONS: ("max_tokens",),
    Endpoint.RESPONSES: ("max_output_tokens",),
    Endpoint.MESSAGES: ("max_tokens",),
    Endpoint.EMBEDDINGS: (),
}


def output_limit(endpoint: Endpoint, body: dict[str, Any]) -> tuple[str, int | None]:
    """The field that bounds the answer, and its value; None: as much as the model can take. Raises BadCall."""
    names = _LIMITS[endpoint]
    name = next((name for name in names if body.get(name) is not None), names[0] if names else "")
    given = body.get(name)
    if given is None:
        return name, _COMPLETIONS_LIMIT if endpoint is Endpoint.COMPLETIONS else None
    # The engine would read "512" and 512.0 as numbers, past every cap.
    if type(given) is not int:
        raise BadCall(f"`{name}` must be a whole number", param=name)
    return name, given


def capped(endpoint: Endpoint, body: dict[str, Any], cap: int | None, *, refuses: bool) -> dict[str, Any]:
    """The body, or one that asks for no more than the cap.

    Raises:
        BadCall: it asks for more, and that is refused; or its limit is no number.
    """
    if cap is None or endpoint is Endpoint.EMBEDDINGS:
        return body
    name, limit = output_limit(endpoint, body)
    if limit is None and endpoint is Endpoint.MESSAGES:  # required there: the engine says so
        return body
    if limit is not None and limit <= cap:
        return body
    if refuses and limit is not None:
        raise BadCall(f"`{name}` is {limit}, and this key may ask for {cap} tokens at most", param=name)
    return body | {name: cap}


def choices(body: dict[str, Any]) -> int:
    """How many answers the call asks for. Raises BadCall."""
    n, prompt = body.get("n"), body.get("prompt")
    if n is not None and type(n) is not int:
        raise BadCall("`n` must be a whole number", param="n")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return max(1, n or 1) * prompts


# --- over-long chats ---------------------------------------------------------------------------------


# The endpoints whose prompt is made of turns, and counted by the engine.
TRIMMED = (Endpoint.CHAT, Endpoint.MESSAGES)


class Trimmed(NamedTuple):
    """A body without its oldest turns. `tokens`: how many that spares."""

    body: dict[str, Any]
    turns: int
    tokens: int


Count = Callable[[dict[str, Any]], Awaitable[int]]


async def trimmed(body: dict[str, Any], room: int, max_model_len: int, count: Count) -> Trimmed:
    """The body without as few of its oldest turns as make its prompt fit into `room` tokens.

    A turn goes from one message of the user to the next, so tool calls and their results stay together. What the
    system or developer says stays, and so does the last turn.

    Raises:
        PromptTooLong: the last turn alone does not fit.
    """
    whole = await count(body)
    if whole <= room:
        return Trimmed(body, 0, 0)
    turns = _turns(body["messages"])
    fewest, most = 1, len(turns) - 1
    last = await count(_without(body, turns[:most])) if most > 0 else whole
    if last > room:
        raise PromptTooLong(
            f"This model's maximum context length is {max_model_len} tokens,"
            f" {max_model_len - room} of them for the answer. However, your messages have {whole} tokens,"
            f" and {last} without all turns but the last. Please reduce the length of the messages.",
            param="messages",
        )
    left = last
    while fewest < most:
        middle = (fewest + most) // 2
        tokens = await count(_without(body, turns[:middle]))
        if tokens <= room:
            most, left = middle, tokens
        else:
            fewest = middle + 1
    return Trimmed(_without(body, turns[:most]), most, whole - left)


def has_turns(body: dict[str, Any]) -> bool:
    """Whether there is something to leave out; what is no list of messages the engine refuses in its own words."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    return len(_turns(messages)) > 1


def _turns(messages: Sequence[dict[str, Any]]) -> list[set[int]]:
    """The places of each turn's messages, the oldest first; what the system says is of no turn."""
    turns: list[set[int]] = []
    for at, message in enumerate(messages):
        if message.get("role") in ("system", "developer"):
            continue
        if not turns or _opens_turn(message):
            turns.append(set())
        turns[-1].add(at)
    return turns


def _opens_turn(message: dict[str, Any]) -> bool:
    """Anthropic's clients send the results of tools as messages of the user."""
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    is_result = any(isinstance(part, dict) and part.get("type") == "tool_result" for part in parts)
    return message.get("role") == "user" and not is_result


def _without(body: dict[str, Any], turns: Sequence[set[int]]) -> dict[str, Any]:
    left_out = set().union(*turns)
    return body | {"messages": [each for at, each in enumerate(body["messages"]) if at not in left_out]}
