"""An engine without a model: says what it is told, when it is told.

Left alone it answers every call with a text that follows from its body, at a fixed rate: a whole service
on a laptop without vLLM, and load tests whose engine costs nothing. Driven, it is the tests' engine: the test
holds each call and says the next word, finishes or fails it.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any, NamedTuple

from app import wire
from app.domain import Answer, Call, Endpoint, Timings, Weights
from app.engine.base import Capacity, EngineState, Phase
from app.engine.meter import Meter
from app.engine.schema import refuse_misfits
from app.errors import AdapterFailed, AppError, EngineDown, NotFound, UnsupportedEndpoint
from app.settings import Settings

_WORDS = "the cache remembers what the engine said and says it again without a second thought".split()

# So many calls are remembered, the last ones.
MOST_CALLS = 10_000
_NOT_SAID = frozenset({"stream", "stream_options", "max_tokens", "max_completion_tokens", "max_output_tokens", "user"})


class Script:
    """One call in the hands of a test: `say` words, then `finish`, or `fail`."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.was_aborted = False
        self._said: list[str] = []
        self._next: asyncio.Queue[str | AppError | None] = asyncio.Queue()

    def say(self, text: str) -> None:
        self._next.put_nowait(text)

    def finish(self) -> None:
        self._next.put_nowait(None)

    def fail(self, error: AppError) -> None:
        self._next.put_nowait(error)

    async def words(self) -> AsyncGenerator[str, None]:
        while (said := await self._next.get()) is not None:
            if isinstance(said, AppError):
                raise said
            yield said


class _Batch:
    """What all calls share: so many at a time, so many tokens a second, in the order they are asked for."""

    def __init__(self, most: int | None, tokens_per_s: float | None) -> None:
        self.most = most
        self._places = asyncio.Semaphore(most) if most else None
        self._seconds_per_token = 1 / tokens_per_s if tokens_per_s else 0.0
        self._free_at = 0.0

    def place(self) -> AbstractAsyncContextManager[None]:
        return self._places or nullcontext()

    async def compute(self, tokens: int) -> None:
        if self._seconds_per_token:
            now = time.perf_counter()
            self._free_at = max(now, self._free_at) + tokens * self._seconds_per_token
            await asyncio.sleep(self._free_at - now)


class ScriptedEngine:
    """`calls` are the last that were asked for; in driven mode the test takes each from `asked`."""

    def __init__(
        self,
        settings: Settings,
        weights: Weights,
        *,
        adapters: Sequence[Weights] = (),
        is_driven: bool = False,
        is_ready: bool = True,
        meter: Meter | None = None,
    ) -> None:
        self.state = EngineState()
        self.meter = meter or Meter()
        self.calls: list[Call] = []
        self.asked: asyncio.Queue[Script] = asyncio.Queue()
        self.running = 0
        self._weights = weights
        self._adapters = {adapter.name: adapter for adapter in adapters}
        self._places = settings.adapter_places
        self._is_driven = is_driven
        self._is_ready = is_ready
        # Left alone it never ends by itself: what it says is cut at the limit that the call sets, or 16.
        self._finish = "stop" if is_driven else "length"
        self._seconds_per_token = 1 / settings.scripted_tokens_per_s
        self._batch = _Batch(settings.scripted_max_calls, settings.scripted_total_tokens_per_s)

    @property
    def capacity(self) -> Capacity:
        return Capacity(sequences=self._batch.most)

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        if self._is_ready:
            self.state.become(Phase.READY, "scripted")

    async def try_start(self) -> None:
        await self.start()

    async def load_adapter(self, adapter: Weights) -> None:
        if adapter.name not in self._adapters and len(self._adapters) >= self._places:
            raise AdapterFailed(f"there are {self._places} places for adapters, all taken")
        self._adapters[adapter.name] = adapter

    async def unload_adapter(self, name: str) -> None:
        self._adapters.pop(name, None)

    async def close(self) -> None:
        self.state.become(Phase.DRAINING, "closing")

    async def examine(self, call: Call) -> None:
        """It compiles nothing."""

    async def answer(self, call: Call, timings: Timings | None = None) -> Answer:
        if self.state.phase is Phase.FAILED:
            raise EngineDown("the engine is down", retry_after_s=5)
        if call.endpoint is Endpoint.EMBEDDINGS:
            raise UnsupportedEndpoint("the served model does not support embeddings")
        refuse_misfits(call.endpoint.value, call.body)
        self.calls.append(call)
        if len(self.calls) > MOST_CALLS:  # a load test must not fill memory with what nobody will look at
            del self.calls[: MOST_CALLS // 2]
        script = Script(call)
        if self._is_driven:
            self.asked.put_nowait(script)
        timings = timings or Timings()
        timings.queue_s = 0.0
        words = script.words() if self._is_driven else self._at_a_rate(call)
        if call.is_streaming:
            return Answer(events=self._streamed(call, words, script, timings), timings=timings)
        said = [word async for word in self._counted(words, script, timings)]
        name = _name(call, self._asked(call))
        return Answer(body=wire.dump(_body(call, said, name, self._finish)), timings=timings)

    async def _streamed(
        self, call: Call, words: AsyncGenerator[str, None], script: Script, timings: Timings
    ) -> AsyncGenerator[bytes, None]:
        """Chunks as they are said. The events that open and close come from a body, cut up as for a replay."""
        said: list[str] = []
        name = _name(call, self._asked(call))
        numbers = itertools.count()
        async with aclosing(self._counted(words, script, timings)) as counted:
            async for word in counted:
                said.append(word)
                opening, deltas, _ = _cut(call, [word], name)
                for event in (*opening, *deltas) if len(said) == 1 else deltas:
                    yield _numbered(call.endpoint, event, numbers)
        opening, _, closing = _cut(call, said or [" "], name, self._finish)
        for event in closing if said else (*opening, *closing):
            yield _numbered(call.endpoint, event, numbers)

    async def _counted(
        self, words: AsyncGenerator[str, None], script: Script, timings: Timings
    ) -> AsyncGenerator[str, None]:
        began, first = time.perf_counter(), None
        self.running += 1
        self.meter.begin()
        timings.prompt_tokens, timings.completion_tokens = _prompt_tokens(script.call), 0
        try:
            async with aclosing(words), self._batch.place():
                timings.queue_s, began = time.perf_counter() - began, time.perf_counter()
                await self._batch.compute(timings.prompt_tokens)
                async for word in words:
                    await self._batch.compute(1)
                    first = first or time.perf_counter()
                    timings.completion_tokens += 1
                    timings.streamed_tokens += 1
                    timings.prefill_s, timings.decode_s = first - began, time.perf_counter() - first
                    self.meter.step([(timings, 1)])
                    yield word
        except (asyncio.CancelledError, GeneratorExit):
            script.was_aborted = True
            raise
        finally:
            self.running -= 1
            self.meter.end(timings)

    async def _at_a_rate(self, call: Call) -> AsyncGenerator[str, None]:
        weights = self._asked(call)
        # As with a model, neither the form of the answer nor its longest length changes what is said.
        said_by = {name: value for name, value in call.body.items() if name not in _NOT_SAID}
        seed = hashlib.sha256(f"{weights.digest} {json.dumps(said_by, sort_keys=True)}".encode()).digest()
        limit = call.body.get("max_tokens") or call.body.get("max_completion_tokens") or 16
        for index in range(min(int(limit), 512)):
            await asyncio.sleep(self._seconds_per_token)
            yield (_WORDS[seed[index % 32] % len(_WORDS)] if index else weights.digest[:12]) + " "

    def _asked(self, call: Call) -> Weights:
        """Whose text it is: other weights say other words, and the first of them is their digest."""
        return self._adapters.get(str(call.body.get("model")), self._weights)

    async def tokens(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        refuse_misfits(path, body)
        if path == "/detokenize":
            return {"prompt": " ".join(_WORDS[int(token) % len(_WORDS)] for token in body["tokens"])}
        text = json.dumps(body.get("messages") or body.get("prompt"))
        if path.endswith("count_tokens"):
            return {"input_tokens": len(text.split())}
        tokens = [_token(word) for word in text.split()]
        return {"count": len(tokens), "max_model_len": self._weights.max_model_len or 8192, "tokens": tokens}

    async def stored_response(self, response_id: str, *, starting_after: int | None, stream: bool) -> Answer:
        raise NotFound(f"no response with id {response_id!r}")

    async def cancel_response(self, response_id: str) -> Answer:
        raise NotFound(f"no response with id {response_id!r}")


# --- wire forms: the smallest bodies that are whole, and the chunks between ------------------------


class _Name(NamedTuple):
    """What an answer calls itself, the same in each of its events."""

    ident: str
    created: int
    model: str
    mark: str


def _name(call: Call, weights: Weights) -> _Name:
    return _Name(wire.new_id(call.endpoint), int(time.time()), weights.name, weights.mark)


def _body(call: Call, said: list[str], name: _Name, finish: str = "stop") -> dict[str, Any]:
    text, (ident, now, model, mark) = "".join(said), name
    prompt, completion = _prompt_tokens(call), len(said)
    usage = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
    in_out = {"input_tokens": prompt, "output_tokens": completion}
    match call.endpoint:
        case Endpoint.CHAT:
            message = {"role": "assistant", "content": text, "tool_calls": []}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish, "stop_reason": None}
            return {
                "id": ident,
                "object": "chat.completion",
                "created": now,
                "model": model,
                "choices": [choice],
                "usage": usage,
                "system_fingerprint": mark,
            }
        case Endpoint.COMPLETIONS:
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
            return {
                "id": ident,
                "object": "text_completion",
                "created": now,
                "model": model,
                "choices": [choice],
                "usage": usage,
                "system_fingerprint": mark,
            }
        case Endpoint.RESPONSES:
            part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
            item = {
                "id": f"msg_{ident[5:]}",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [part],
            }
            return {
                "id": ident,
                "object": "response",
                "created_at": now,
                "model": model,
                "status": "completed",
                "output": [item],
                "parallel_tool_calls": True,
                "tool_choice": "auto",
                "tools": [],
                "metadata": call.body.get("metadata"),
                "usage": in_out
                | {
                    "total_tokens": prompt + completion,
                    "input_tokens_details": {"cached_tokens": 0},
                    "output_tokens_details": {"reasoning_tokens": 0},
                },
            }
        case _:
            return {
                "id": ident,
                "type": "message",
                "role": "assistant",
                "model": model,
                "content": [{"type": "text", "text": text}],
                "stop_reason": "end_turn" if finish == "stop" else "max_tokens",
                "usage": in_out,
            }


def _cut(
    call: Call, said: list[str], name: _Name, finish: str = "stop"
) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """The events of a whole stream: those before the first delta, the deltas, those after the last."""
    events = wire.unfold(call.endpoint, _body(call, said, name, finish))
    deltas = [index for index, event in enumerate(events) if _is_delta(call.endpoint, event)]
    return events[: deltas[0]], events[deltas[0] : deltas[-1] + 1], events[deltas[-1] + 1 :]


def _is_delta(endpoint: Endpoint, event: bytes) -> bool:
    return {
        Endpoint.CHAT: b'"content":"' in event and b'"content":""' not in event,
        Endpoint.COMPLETIONS: b'"text":"' in event and b'"text":""' not in event,
        Endpoint.RESPONSES: b"event: response.output_text.delta" in event,
        Endpoint.MESSAGES: b"event: content_block_delta" in event,
    }[endpoint]


def _numbered(endpoint: Endpoint, event: bytes, numbers: Iterator[int]) -> bytes:
    """Events of Responses count; pieces of several streams made one must count on."""
    if endpoint is not Endpoint.RESPONSES:
        return event
    named, _, data = event.partition(b"data: ")
    return named + b"data: " + wire.dump(json.loads(data) | {"sequence_number": next(numbers)}) + b"\n\n"


def _prompt_tokens(call: Call) -> int:
    asked = call.body.get("messages") or call.body.get("prompt") or call.body.get("input") or ""
    return len(json.dumps(asked).split())


def _token(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "big")
