"""Calls of every kind to one server, and what came of each: whole, left, a typed error, or what must not be."""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx
import openai

# Two cores and sixteen clients, an engine that has to be noticed to hang and started again: what is longer hangs.
PATIENCE_S = 180.0
UNSAVED = {"cache-control": "no-cache, no-store"}
WHOLE_ENDS = {"stop", "length", "end_turn", "max_tokens", "completed", "incomplete"}

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A call whose answer is always the same. `way` names how it is asked, in `WAYS`."""

    name: str
    way: str
    body: Fields
    stream: bool = False


@dataclass(slots=True)
class Heard:
    """What a client knows of one call. `end`: whole, left, error (`code` says which) or bad (`code` says how)."""

    case: str
    id: str
    began: float
    ended: float = 0.0
    end: str = "bad"
    code: str = ""
    status: int = 0
    cache: str = ""
    stream: bool = False
    text: str = ""
    finish: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def note(self, status: int, headers: Any) -> None:
        self.status, self.cache = status, headers.get("x-cache", "")

    def add(self, text: str | None, finish: str | None = None, usage: Any = None) -> None:
        """Some more of its text, how it ended, and its `usage` in any of three dialects, where they are there."""
        self.text += text or ""
        self.finish = finish or self.finish
        if usage is not None:
            told = usage if isinstance(usage, dict) else usage.model_dump()
            self.prompt_tokens = told.get("prompt_tokens", told.get("input_tokens")) or self.prompt_tokens
            self.completion_tokens = told.get("completion_tokens", told.get("output_tokens"))

    @property
    def told(self) -> tuple[str, str | None, int | None, int | None]:
        """All of an answer that is the same whenever it is asked for."""
        return self.text, self.finish, self.prompt_tokens, self.completion_tokens

    def broke(self, code: str) -> None:
        self.end, self.code = "bad", code

    def failed(self, error: Any) -> None:
        """An error as both dialects tell it: an object with a type, a message, and for ours a code."""
        inner = error.get("error", error) if isinstance(error, dict) else None
        if isinstance(inner, dict) and inner.get("type") and inner.get("message"):
            self.end, self.code = "error", str(inner.get("code") or inner["type"])
        else:
            self.broke(f"untyped error: {str(error)[:200]}")


@dataclass
class Clients:
    """One of each library, no retries, on the same connections for all who call."""

    url: str
    http: httpx.AsyncClient = field(init=False)
    openai: openai.AsyncOpenAI = field(init=False)
    anthropic: anthropic.AsyncAnthropic = field(init=False)

    def __post_init__(self) -> None:
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S, limits=limits)
        options: Fields = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE_S}
        self.openai = openai.AsyncOpenAI(base_url=f"{self.url}/v1", **options)
        self.anthropic = anthropic.AsyncAnthropic(base_url=self.url, **options)

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        await self.openai.close()
        await self.anthropic.close()

    async def ask(self, case: Case, headers: dict[str, str], leave_after: int | None = None) -> Heard:
        """One call from beginning to end, whatever that is; raises nothing."""
        heard = Heard(case.name, secrets.token_hex(8), time.monotonic(), stream=case.stream)
        try:
            await self._ask(case, headers | {"x-request-id": heard.id}, heard, leave_after)
        except (openai.APIStatusError, anthropic.APIStatusError) as error:
            heard.note(error.status_code, error.response.headers)
            heard.failed(error.body)
        except (openai.APITimeoutError, anthropic.APITimeoutError, httpx.TimeoutException):
            heard.broke(f"no answer within {PATIENCE_S:g} s")
        except (openai.APIConnectionError, anthropic.APIConnectionError, httpx.HTTPError) as error:
            heard.broke(f"connection: {error.__cause__ or error!r}")
        except (openai.APIError, anthropic.APIError) as error:  # an event of the stream
            heard.failed(error.body)
        except Exception as error:
            heard.broke(f"unreadable: {error!r}")
        heard.ended = time.monotonic()
        return heard

    async def _ask(self, case: Case, headers: dict[str, str], heard: Heard, leave_after: int | None) -> None:
        parts = 0
        async with aclosing(WAYS[case.way](self, case, headers, heard)) as told:
            async for _ in told:
                parts += 1
                if leave_after is not None and parts >= leave_after:
                    heard.end = "left"
                    return
        if heard.code:
            return
        if heard.finish in WHOLE_ENDS and heard.prompt_tokens and heard.completion_tokens is not None:
            heard.end = "whole"
        else:
            heard.broke(f"cut: finish {heard.finish}, usage {heard.prompt_tokens}, {heard.completion_tokens}")


# --- the ways: each yields once for every part that came ---


async def _chat(clients: Clients, case: Case, headers: dict[str, str], heard: Heard) -> AsyncIterator[None]:
    more: Fields = {"stream": True, "stream_options": {"include_usage": True}} if case.stream else {}
    raw = await clients.openai.chat.completions.with_raw_response.create(**case.body, **more, extra_headers=headers)
    heard.note(raw.http_response.status_code, raw.headers)
    answer: Any = raw.parse()
    if not case.stream:
        heard.add(answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage)
        return
    async with answer:
        async for chunk in answer:
            for choice in chunk.choices:
                heard.add(choice.delta.content, choice.finish_reason)
            heard.add(None, usage=chunk.usage)
            yield


async def _responses(clients: Clients, case: Case, headers: dict[str, str], heard: Heard) -> AsyncIterator[None]:
    more: Fields = {"stream": True} if case.stream else {}
    raw = await clients.openai.responses.with_raw_response.create(**case.body, **more, extra_headers=headers)
    heard.note(raw.http_response.status_code, raw.headers)
    answer: Any = raw.parse()
    if not case.stream:
        heard.add(answer.output_text, answer.status, answer.usage)
        return
    async with answer:
        async for event in answer:
            if event.type == "response.output_text.delta":
                heard.add(event.delta)
            elif event.type in ("response.completed", "response.incomplete"):
                heard.add(None, event.response.status, event.response.usage)
            elif event.type in ("response.failed", "error"):
                heard.failed(event.model_dump().get("response", {}).get("error") or event.model_dump())
            yield


async def _messages(clients: Clients, case: Case, headers: dict[str, str], heard: Heard) -> AsyncIterator[None]:
    more: Fields = {"stream": True} if case.stream else {}
    raw = await clients.anthropic.messages.with_raw_response.create(**case.body, **more, extra_headers=headers)
    heard.note(raw.http_response.status_code, raw.headers)
    answer: Any = await raw.parse()  # this library's is a coroutine
    if not case.stream:
        heard.add(answer.content[0].text, answer.stop_reason, answer.usage)
        return
    async with answer:
        async for event in answer:
            if event.type == "message_start":
                heard.add(None, usage=event.message.usage)
            elif event.type == "content_block_delta":
                heard.add(event.delta.text)
            elif event.type == "message_delta":
                heard.add(None, event.delta.stop_reason, event.usage)
            yield


async def _bare(clients: Clients, case: Case, headers: dict[str, str], heard: Heard) -> AsyncIterator[None]:
    """No library between: chat or text completions, every byte looked at."""
    path = "/v1/chat/completions" if "messages" in case.body else "/v1/completions"
    more: Fields = {"stream": True, "stream_options": {"include_usage": True}} if case.stream else {}
    async with clients.http.stream("POST", path, json=case.body | more, headers=headers) as response:
        heard.note(response.status_code, response.headers)
        if response.status_code != 200 or not case.stream:
            body = json.loads(await response.aread())
            if response.status_code != 200:
                heard.failed(body)
            else:
                _take(heard, body)
            return
        is_done = False
        async for line in response.aiter_lines():
            is_done |= line == "data: [DONE]"
            if line.startswith("data: {"):
                _take(heard, json.loads(line.removeprefix("data: ")))
                yield
        if not is_done and not heard.code:
            heard.broke("a stream without [DONE]")


def _take(heard: Heard, body: Fields) -> None:
    if body.get("error"):
        heard.failed(body)
        return
    for choice in body["choices"]:
        said = choice.get("delta") or choice.get("message") or choice
        heard.add(said.get("content") or said.get("text"), choice["finish_reason"])
    heard.add(None, usage=body.get("usage"))


WAYS: dict[str, Callable[..., Any]] = {
    "chat": _chat,
    "responses": _responses,
    "messages": _messages,
    "bare": _bare,
}

# --- what is asked ---

_TOPICS = (
    "rivers,winter,bread,a lighthouse,old maps,bees,the moon,trains,a small village,music,glass,a long road".split(",")
)


def cases(model: str, seed: int) -> list[Case]:
    """All that a core may have of a call besides its tokens: seeds, penalties, grammars; streams and bodies of each."""
    chance = random.Random(seed)
    found = []
    for number, topic in enumerate(_TOPICS):
        chat = {"model": model, "messages": [{"role": "user", "content": f"Tell me about {topic}, in your words."}]}
        greedy = {"temperature": 0}
        tokens = [chance.choice((16, 24, 32, 48, 64, 96, 128)) for _ in range(4)]
        odd = number % 2 == 1
        shapes: list[Fields] = [
            greedy | {"presence_penalty": 0.5},
            {"temperature": 0.8, "seed": number},
            greedy | {"response_format": {"type": "json_object"}},
            greedy | {"frequency_penalty": 0.3},
        ]
        found += [
            Case(f"chat {topic}", "chat", chat | shapes[number % 4] | {"max_tokens": tokens[0]}, odd),
            Case(
                f"text {topic}",
                "bare",
                {"model": model, "prompt": f"Once upon a time, {topic}", "max_tokens": tokens[1]} | greedy,
                not odd,
            ),
            Case(
                f"responses {topic}",
                "responses",
                {"model": model, "input": f"What do you know of {topic}?", "max_output_tokens": tokens[2]} | greedy,
                odd,
            ),
            Case(f"messages {topic}", "messages", chat | {"max_tokens": tokens[3], "extra_body": greedy}, not odd),
        ]
    return found


def hot_cases(model: str) -> list[Case]:
    """Short ones, that are recorded before anything happens."""
    return [
        Case(
            f"hot {topic}",
            "bare",
            {
                "model": model,
                "messages": [{"role": "user", "content": f"One sentence on {topic}."}],
                "temperature": 0,
                "max_tokens": 16,
            },
            bool(number % 2),
        )
        for number, topic in enumerate(_TOPICS)
    ]
