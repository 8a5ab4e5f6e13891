"""The official SDKs read what `unfold` makes: each event as its model, and the stream as the whole answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import anthropic
import httpx2
import openai
import pytest
from anthropic.types import RawMessageStreamEvent
from hypothesis import HealthCheck, given, settings
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from app import wire
from app.domain import Endpoint
from app.wire import sse
from tests.wire import bodies

SAID = "Let me look:\n\nthe capital of France is 😀 Paris."
ARGUMENTS = '{"city": "Köln", "days": [1, 2, 3]}'


def documents(endpoint: Endpoint, body: bodies.Json) -> list[bodies.Json]:
    payloads = sse.payloads(wire.unfold(endpoint, body))
    return [json.loads(payload) for payload in payloads if payload != b"[DONE]"]


@contextmanager
def transport(endpoint: Endpoint, body: bodies.Json) -> Iterator[httpx2.Client]:
    content = b"".join(wire.unfold(endpoint, body))

    def answer(request: httpx2.Request) -> httpx2.Response:
        assert request.url.path == endpoint.value
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)

    with httpx2.Client(transport=httpx2.MockTransport(answer)) as client:
        yield client


@contextmanager
def openai_client(endpoint: Endpoint, body: bodies.Json) -> Iterator[openai.OpenAI]:
    with transport(endpoint, body) as client:
        yield openai.OpenAI(api_key="none", base_url="http://refrain/v1", http_client=client)


# vLLM's own reason "repetition" and the null that its text chunks have are not in the SDK's models.
@given(bodies.chat_bodies().filter(lambda body: all(c["finish_reason"] != "repetition" for c in body["choices"])))
@settings(max_examples=100, suppress_health_check=[HealthCheck.filter_too_much])
def test_chat_chunks_are_what_openai_says(body: bodies.Json) -> None:
    for document in documents(Endpoint.CHAT, body):
        ChatCompletionChunk.model_validate(document)


@given(bodies.response_bodies())
@settings(max_examples=100)
def test_response_events_are_what_openai_says(body: bodies.Json) -> None:
    events = documents(Endpoint.RESPONSES, body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        RESPONSE_EVENT.validate_python(event)


@given(bodies.message_bodies())
@settings(max_examples=100)
def test_message_events_are_what_anthropic_says(body: bodies.Json) -> None:
    for event in documents(Endpoint.MESSAGES, body):
        MESSAGE_EVENT.validate_python(event)


RESPONSE_EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
MESSAGE_EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)


def test_openai_reads_a_chat_with_tools_and_logprobs() -> None:
    tokens = [bodies.token(said) for said in ("Let me", " look:\n\n", SAID[14:], "</s>")]
    calls = [bodies.tool_call(0, "weather", ARGUMENTS), bodies.tool_call(1, "clock", "{}")]
    choice = bodies.chat_choice(SAID, "tool_calls", tool_calls=calls) | {"logprobs": {"content": tokens}}
    with openai_client(Endpoint.CHAT, bodies.chat_body(choice)) as client:
        question = {"model": "tuned", "messages": [{"role": "user", "content": "?"}]}
        with client.chat.completions.stream(**question, stream_options={"include_usage": True}) as stream:
            answer = stream.get_final_completion()
    (got,) = answer.choices
    assert (got.message.content, got.finish_reason) == (SAID, "tool_calls")
    assert [call.model_dump(include={"id", "type", "function"}) for call in got.message.tool_calls or ()] == [
        call | {"function": call["function"] | {"parsed_arguments": None}} for call in calls
    ]
    assert got.logprobs is not None
    assert [token.token for token in got.logprobs.content or ()] == [token["token"] for token in tokens]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 18


def test_openai_reads_several_choices_in_many_pieces() -> None:
    body = bodies.chat_body(bodies.chat_choice(SAID), bodies.chat_choice("Nein.", "length"))
    said: dict[int, list[str]] = {0: [], 1: []}
    with openai_client(Endpoint.CHAT, body) as client:
        for chunk in client.chat.completions.create(model="tuned", messages=[], n=2, stream=True):
            for choice in chunk.choices:
                said[choice.index].append(choice.delta.content or "")
    assert ("".join(said[0]), "".join(said[1])) == (SAID, "Nein.")
    assert len([piece for piece in said[0] if piece]) == 10


def test_openai_reads_a_text_completion() -> None:
    body = bodies.completion_body(bodies.completion_choice("one two three", "length", ["one", " two", " three"]))
    with openai_client(Endpoint.COMPLETIONS, body) as client:
        chunks = list(client.completions.create(model="tuned", prompt="?", stream=True))
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert [choice.text for choice in choices] == ["one", " two", " three", ""]
    assert [choice.logprobs.tokens for choice in choices if choice.logprobs] == [["one"], [" two"], [" three"], []]
    assert choices[-1].finish_reason == "length"
    assert chunks[-1].usage is not None


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_openai_reads_a_response(status: str) -> None:
    output = [
        bodies.reasoning_item("Hm, France."),
        bodies.message_item(SAID),
        bodies.function_item(0, "weather", ARGUMENTS),
        bodies.custom_item(1, "shell", "ls -l /tmp/somewhere"),
    ]
    details = {"reason": "max_output_tokens"} if status == "incomplete" else None
    body = bodies.response_body(*output, status=status, incomplete_details=details)
    with openai_client(Endpoint.RESPONSES, body) as client, client.responses.stream(model="tuned", input="?") as stream:
        events = list(stream)
        answer = stream.get_final_response()
    assert answer.output_text == SAID
    assert answer.status == status
    assert [item.type for item in answer.output] == [item["type"] for item in output]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert ("".join(deltas), len(deltas)) == (SAID, 10)
    arguments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert ("".join(arguments), len(arguments) > 2) == (ARGUMENTS, True)


def test_anthropic_reads_a_message() -> None:
    given = {"city": "Köln", "days": [1, 2, 3], "none": None}
    content = [bodies.thinking_block("Hm, France."), bodies.text_block(SAID), bodies.tool_block(0, "weather", given)]
    body = bodies.message_body(*content, stop_reason="tool_use")
    question = {"model": "tuned", "max_tokens": 9, "messages": [{"role": "user", "content": "?"}]}
    with transport(Endpoint.MESSAGES, body) as http:
        client = anthropic.Anthropic(api_key="none", base_url="http://refrain", http_client=http)
        with client.messages.stream(**question) as stream:
            pieces = list(stream.text_stream)
            answer = stream.get_final_message()
    assert ("".join(pieces), len(pieces)) == (SAID, 10)
    thought, said, call = answer.content
    assert thought.type == "thinking"
    assert (thought.thinking, thought.signature) == ("Hm, France.", "0123456789abcdef")
    assert said.type == "text"
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("weather", given)
    assert (answer.stop_reason, answer.usage.output_tokens, answer.usage.input_tokens) == ("tool_use", 7, 11)
