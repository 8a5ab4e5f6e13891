"""What vLLM's own handlers stream for a generation folds to the body that they give for the same generation.

No engine: its outputs are made here, one per token for the stream and one for the body, and handed to the
handlers' code. Importing that takes about ten seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from app import wire
from app.domain import Endpoint
from app.errors import Incomplete

pytest.importorskip("vllm")

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.context import SimpleContext
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.parser import ParserManager

EOS = "<|im_end|>"
SPECIAL = {EOS: 0, "<think>": 1, "</think>": 2, "<tool_call>": 3, "</tool_call>": 4}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


class Tokens:
    """As much of a tokenizer as the parsers ask for: special tokens, and a character each for the rest."""

    all_special_tokens = tuple(SPECIAL)
    all_special_ids = tuple(SPECIAL.values())

    def get_vocab(self) -> dict[str, int]:
        return SPECIAL

    def decode(self, ids: Any, **_: Any) -> str:
        names = {number: name for name, number in SPECIAL.items()}
        return "".join(names.get(i, chr(i)) for i in ([ids] if isinstance(ids, int) else ids))

    def encode(self, said: str, **_: Any) -> list[int]:
        return [number for number, _ in cut(said)]

    def convert_tokens_to_ids(self, token: str) -> int:
        return SPECIAL.get(token, ord(token[0]))


def cut(said: str) -> list[tuple[int, str]]:
    tokens: list[tuple[int, str]] = []
    while said:
        special = next((name for name in SPECIAL if said.startswith(name)), None)
        piece = special or said[0]
        tokens.append((SPECIAL.get(piece, ord(piece[0])), piece))
        said = said[len(piece) :]
    return tokens


def handler(kind: type, **changes: Any) -> Any:
    one = kind.__new__(kind)
    fields = {
        "parser_cls": None,
        "parser": None,
        "_include_reasoning_tokens_details": False,
        "enable_prompt_tokens_details": True,
        "enable_force_include_usage": False,
        "enable_per_request_metrics": False,
        "enable_log_outputs": False,
        "enable_log_deltas": False,
        "request_logger": None,
        "system_fingerprint": "vllm-0.32.0-a1b2c3d4",
        "response_role": "assistant",
        "enable_auto_tools": True,
        "return_tokens_as_token_ids": False,
        "default_chat_template_kwargs": {},
        "chat_template": None,
        "chat_template_content_format": "auto",
        "model_config": None,
        "use_harmony": False,
        "tool_server": None,
    }
    for name, value in (fields | changes).items():
        if not isinstance(getattr(kind, name, None), property):
            setattr(one, name, value)
    return one


def outputs(
    *texts: str, finish: str = "stop", stop: Any = None, logprobs: bool = False, is_delta: bool
) -> list[RequestOutput]:
    """The engine's outputs for one prompt: one per token and choice, or a single one with everything."""
    generated = [[*cut(said), *([(0, "")] if finish == "stop" and stop is None else [])] for said in texts]
    steps = [
        one(index, [token], logprobs, finish if token is tokens[-1] else None, stop if token is tokens[-1] else None)
        for index, tokens in enumerate(generated)
        for token in tokens
    ]
    if is_delta:
        turns = itertools.zip_longest(*([s for s in steps if s.index == index] for index in range(len(texts))))
        return [request_output([step]) for turn in turns for step in turn if step is not None]
    return [request_output([one(i, tokens, logprobs, finish, stop) for i, tokens in enumerate(generated)])]


def one(index: int, tokens: list[tuple[int, str]], logprobs: bool, finish: str | None, stop: Any) -> CompletionOutput:
    step_logprobs = [{number: Logprob(-0.25, 1, said), 999: Logprob(float("-inf"), 2, "x")} for number, said in tokens]
    return CompletionOutput(
        index=index,
        text="".join(said for _, said in tokens),
        token_ids=[number for number, _ in tokens],
        cumulative_logprob=None,
        logprobs=step_logprobs if logprobs else None,
        finish_reason=finish,
        stop_reason=stop,
    )


def request_output(choices: list[CompletionOutput]) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        prompt="Hi",
        prompt_token_ids=[72, 105],
        prompt_logprobs=None,
        outputs=choices,
        finished=all(choice.finish_reason for choice in choices),
        num_cached_tokens=1,
    )


async def each(things: list[Any]) -> AsyncIterator[Any]:
    for thing in things:
        yield thing


async def collected(stream: AsyncIterator[Any]) -> list[bytes]:
    return [event.encode() async for event in stream]


def parser_class(**names: str) -> Any:
    return ParserManager.get_parser(
        **names, enable_auto_tools=True, model_name="tuned", is_harmony=False, tokenizer=Tokens()
    )


def without_ids(value: Any) -> Any:
    """Without what is drawn anew for each answer, the ids of answers and of the things in them."""
    if isinstance(value, list):
        return [without_ids(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: without_ids(inner)
        for key, inner in value.items()
        if key not in ("id", "created", "created_at", "call_id", "signature")
    }


def wired(model: Any, **options: Any) -> dict[str, Any]:
    """As the route sends it."""
    document: dict[str, Any] = json.loads(json.dumps(model.model_dump(**options), allow_nan=False))
    return document


def both_chat(texts: list[str], parser: Any = None, *, kind: Any = OpenAIServingChat, **given: Any) -> Any:
    generation = {key: given.pop(key) for key in ("finish", "stop") if key in given}
    request = {"model": "tuned", "messages": [{"role": "user", "content": "Hi"}], "n": len(texts)} | given
    body_request = ChatCompletionRequest(**request)
    options = {"include_usage": True, "continuous_usage_stats": kind is AnthropicServingMessages}
    stream_request = ChatCompletionRequest(**request, stream=True, stream_options=options)
    server = handler(kind, parser_cls=parser, _include_reasoning_tokens_details=parser is not None)
    shared = ("chatcmpl-1", "tuned", [], Tokens())
    generation |= {"logprobs": bool(given.get("logprobs"))}

    async def run() -> tuple[Any, Any]:
        metadata = SimpleNamespace(final_usage_info=None)
        one_parser = server._make_parser(body_request, Tokens(), {}) if parser else None
        body = await server.chat_completion_full_generator(
            body_request, each(outputs(*texts, **generation, is_delta=False)), *shared, metadata, parser=one_parser
        )
        stream = server.chat_completion_stream_generator(
            stream_request, each(outputs(*texts, **generation, is_delta=True)), *shared, metadata
        )
        if kind is AnthropicServingMessages:
            body = server.messages_full_converter(body)
            stream = server.message_stream_converter(stream)
        return body, await collected(stream)

    body, events = asyncio.run(run())
    return wired(body, exclude_none=kind is AnthropicServingMessages), events


CHAT = {
    "plain": {"texts": ["The capital of\nFrance is 😀 Paris."]},
    "empty": {"texts": [""]},
    "length": {"texts": ["The capital"], "finish": "length"},
    "stop string": {"texts": ["The capital"], "stop": "\n\n"},
    "two choices": {"texts": ["The capital", "Paris it is"]},
    "logprobs": {"texts": ["Paris", "Köln"], "logprobs": True, "top_logprobs": 2},
    "token ids": {"texts": ["Paris"], "return_token_ids": True},
}


@pytest.mark.parametrize("case", CHAT)
def test_chat(case: str) -> None:
    body, events = both_chat(**CHAT[case])
    assert without_ids(wire.fold(Endpoint.CHAT, events)) == without_ids(body)
    assert wire.fold(Endpoint.CHAT, wire.unfold(Endpoint.CHAT, body)) == body


PARSED = {
    "content": {"texts": ["Paris"]},
    "one call": {"texts": [CALL]},
    "two calls": {"texts": [CALL + "\n" + CALL]},
    "text and a call": {"texts": ["Let me look.\n" + CALL]},
    "blanks and a call": {"texts": ["\n\n" + CALL]},
    "a call and text": {"texts": [CALL + " There."]},
    "a named tool": {
        "texts": ['{"city": "Köln"}'],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    },
}


@pytest.mark.parametrize("kind", [OpenAIServingChat, AnthropicServingMessages])
@pytest.mark.parametrize("case", PARSED)
def test_tool_calls(case: str, kind: Any) -> None:
    endpoint = Endpoint.CHAT if kind is OpenAIServingChat else Endpoint.MESSAGES
    parser = parser_class(tool_parser_name="hermes", reasoning_parser_name="")
    body, events = both_chat(**({"tool_choice": "auto"} | PARSED[case]), parser=parser, kind=kind, tools=TOOLS)
    assert without_ids(wire.fold(endpoint, events)) == without_ids(body)
    assert wire.fold(endpoint, wire.unfold(endpoint, body)) == body


@pytest.mark.parametrize("kind", [OpenAIServingChat, AnthropicServingMessages])
@pytest.mark.parametrize(
    "said", ["<think>\nHm, France.\n</think>\n\nParis", "<think>Hm, Fr", "<think>Hm.</think>" + CALL]
)
def test_reasoning(said: str, kind: Any) -> None:
    endpoint = Endpoint.CHAT if kind is OpenAIServingChat else Endpoint.MESSAGES
    parser = parser_class(tool_parser_name="hermes", reasoning_parser_name="qwen3")
    finish = "length" if "</" not in said else "stop"
    body, events = both_chat([said], parser, kind=kind, finish=finish, tools=TOOLS, tool_choice="auto")
    assert without_ids(wire.fold(endpoint, events)) == without_ids(body)


@pytest.mark.parametrize("case", ["plain", "empty", "length", "stop string"])
def test_messages(case: str) -> None:
    body, events = both_chat(**CHAT[case], kind=AnthropicServingMessages)
    assert without_ids(wire.fold(Endpoint.MESSAGES, events)) == without_ids(body)
    assert wire.fold(Endpoint.MESSAGES, wire.unfold(Endpoint.MESSAGES, body)) == body


@pytest.mark.parametrize("finish", ["abort", "error"])
@pytest.mark.parametrize("kind", [OpenAIServingChat, AnthropicServingMessages])
def test_what_broke_off_is_not_whole(finish: str, kind: Any) -> None:
    request = {"model": "tuned", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    server = handler(kind)

    async def run() -> list[bytes]:
        stream = server.chat_completion_stream_generator(
            ChatCompletionRequest(**request, stream_options=options),
            each(outputs("Paris", finish=finish, is_delta=True)),
            "chatcmpl-1",
            "tuned",
            [],
            Tokens(),
            SimpleNamespace(),
        )
        return await collected(server.message_stream_converter(stream) if kind is AnthropicServingMessages else stream)

    with pytest.raises(Incomplete):
        wire.fold(Endpoint.CHAT if kind is OpenAIServingChat else Endpoint.MESSAGES, asyncio.run(run()))


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("texts", [["The capital", "Köln 😀"], [""]])
def test_completions(texts: list[str], logprobs: int | None) -> None:
    request = {"model": "tuned", "prompt": "Hi", "n": len(texts), "logprobs": logprobs, "return_token_ids": True}
    server = handler(OpenAIServingCompletion)
    asked = logprobs is not None

    async def run() -> tuple[Any, list[bytes]]:
        body = server.request_output_to_completion_response(
            outputs(*texts, logprobs=asked, is_delta=False),
            CompletionRequest(**request),
            "cmpl-1",
            1,
            "tuned",
            Tokens(),
            SimpleNamespace(),
        )
        numbered = [(0, output) for output in outputs(*texts, logprobs=asked, is_delta=True)]
        stream = server.completion_stream_generator(
            CompletionRequest(**request, stream=True, stream_options={"include_usage": True}),
            [None],
            each(numbered),
            "cmpl-1",
            1,
            "tuned",
            1,
            Tokens(),
            SimpleNamespace(),
        )
        return body, await collected(stream)

    body, events = asyncio.run(run())
    assert wire.fold(Endpoint.COMPLETIONS, events) == wired(body)
    assert wire.fold(Endpoint.COMPLETIONS, wire.unfold(Endpoint.COMPLETIONS, wired(body))) == wired(body)


def both_responses(said: str, parser: Any, finish: str = "stop") -> tuple[dict[str, Any], list[bytes]]:
    tools = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}]
    request = {"model": "tuned", "input": "Hi", "store": False, "tools": tools}
    sampling = SimpleNamespace(
        temperature=0.0, top_p=1.0, max_tokens=64, presence_penalty=0.0, frequency_penalty=0.0, logprobs=None
    )
    server = handler(OpenAIServingResponses, parser=parser)

    def context() -> SimpleContext:
        return SimpleContext(response_parser=parser(Tokens(), ResponsesRequest(**request).tools) if parser else None)

    async def fed(one: SimpleContext, given: list[RequestOutput]) -> AsyncIterator[SimpleContext]:
        for output in given:
            one.append_output(output)
            yield one

    async def run() -> tuple[Any, list[bytes]]:
        rest: tuple[Any, ...] = ("tuned", Tokens(), SimpleNamespace())
        whole, streamed = context(), context()
        body = await server.responses_full_generator(
            ResponsesRequest(**request),
            sampling,
            fed(whole, outputs(said, finish=finish, is_delta=False)),
            whole,
            *rest,
        )
        stream = server.responses_stream_generator(
            ResponsesRequest(**request, stream=True),
            sampling,
            fed(streamed, outputs(said, finish=finish, is_delta=True)),
            streamed,
            *rest,
        )
        events = [
            f"event: {event.type}\ndata: {event.model_dump_json(indent=None, by_alias=True)}\n\n".encode()
            async for event in stream
        ]
        return body, events

    body, events = asyncio.run(run())
    return wired(body, mode="json", by_alias=True), events


@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize(
    "said", ["The capital is 😀 Paris", "<think>Hm, France.</think>Paris", "Look:" + CALL, "\n" + CALL]
)
def test_responses(said: str, finish: str) -> None:
    parser = parser_class(tool_parser_name="hermes", reasoning_parser_name="qwen3") if "<" in said else None
    body, events = both_responses(said, parser, finish)
    assert without_ids(wire.fold(Endpoint.RESPONSES, events)) == without_ids(body)
    assert wire.fold(Endpoint.RESPONSES, wire.unfold(Endpoint.RESPONSES, body)) == body
    if said.startswith("\n"):
        return  # vLLM's stream has one item more, see responses.py
    mine = [event.split(b"\n")[0] for event in wire.unfold(Endpoint.RESPONSES, body)]
    theirs = [event.split(b"\n")[0] for event in events]
    assert [kind for kind, _ in itertools.groupby(mine)] == [kind for kind, _ in itertools.groupby(theirs)]
