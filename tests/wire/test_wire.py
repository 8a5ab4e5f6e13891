"""What is whole and what is not; ids, times, usage. The streams here are vLLM 0.32's, byte for byte."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from app import wire
from app.domain import Endpoint
from app.errors import Incomplete
from tests.wire import bodies
from tests.wire.bodies import CREATED

HEAD = f'"id":"chatcmpl-old","object":"chat.completion.chunk","created":{CREATED},"model":"tuned"'
OPENING = (
    f'data: {{{HEAD},"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}},"logprobs":null,'
    '"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}\n\n'
)
SAID = (
    f'data: {{{HEAD},"choices":[{{"index":0,"delta":{{"content":"Paris"}},"logprobs":null,"finish_reason":null,'
    '"token_ids":null}]}\n\n'
)
FINISH = (
    f'data: {{{HEAD},"choices":[{{"index":0,"delta":{{"content":""}},"logprobs":null,"finish_reason":"stop",'
    '"stop_reason":null,"token_ids":null}]}\n\n'
)
CHAT_USAGE = (
    f'data: {{{HEAD},"choices":[],"usage":{{"prompt_tokens":11,"total_tokens":18,"completion_tokens":7}},'
    '"system_fingerprint":"vllm-0.32.0-a1b2c3d4"}\n\n'
)
DONE = "data: [DONE]\n\n"
ERROR = 'data: {"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}}\n\n'
WHOLE = (OPENING, SAID, FINISH, CHAT_USAGE, DONE)


def fold_chat(*events: str) -> bodies.Json:
    return wire.fold(Endpoint.CHAT, [event.encode() for event in events])


def test_vllms_chat_stream_folds_to_its_body() -> None:
    assert fold_chat(*WHOLE) == bodies.chat_body(bodies.chat_choice("Paris"))


def test_the_replay_of_a_chat_body_is_vllms_stream() -> None:
    events = wire.unfold(Endpoint.CHAT, bodies.chat_body(bodies.chat_choice("Paris")))
    assert [event[6:] for event in events[-1:]] == [b"[DONE]\n\n"]
    # Only vLLM's closing chunk names the fingerprint; in ours each does, for clients that ask for no usage.
    mark = {"system_fingerprint": "vllm-0.32.0-a1b2c3d4"}
    assert [json.loads(event[6:]) for event in events[:-1]] == [json.loads(event[6:]) | mark for event in WHOLE[:-1]]


@pytest.mark.parametrize(
    "events",
    [
        (),
        (DONE,),
        (OPENING, SAID, FINISH, CHAT_USAGE),
        (OPENING, SAID, FINISH, DONE),
        (OPENING, SAID, CHAT_USAGE, DONE),
        (CHAT_USAGE, DONE),
        (OPENING, SAID, ERROR, DONE),
        (OPENING, SAID, FINISH, CHAT_USAGE, ERROR, DONE),
        (ERROR, *WHOLE),
        (OPENING, SAID, FINISH.replace('"stop"', '"abort"'), CHAT_USAGE, DONE),
        (OPENING, SAID, FINISH.replace('"stop"', '"error"'), CHAT_USAGE, DONE),
        # A second choice began and never ended; a choice is missing in between.
        (OPENING, OPENING.replace('"index":0', '"index":1'), FINISH, CHAT_USAGE, DONE),
        (OPENING, FINISH, OPENING.replace("0", "2"), FINISH.replace('"index":0', '"index":2'), CHAT_USAGE, DONE),
        (OPENING, "data: {cut\n\n", FINISH, CHAT_USAGE, DONE),
        (OPENING, "data: 7\n\n", FINISH, CHAT_USAGE, DONE),
        (OPENING, 'data: {"choices":[{"delta":{}}]}\n\n', FINISH, CHAT_USAGE, DONE),
    ],
)
def test_a_chat_stream_that_is_not_whole(events: tuple[str, ...]) -> None:
    with pytest.raises(Incomplete):
        fold_chat(*events)


def responses(**changes: Any) -> bodies.Json:
    return bodies.response_body(bodies.message_item("Paris"), **changes)


BROKEN_BODIES: list[tuple[Endpoint, bodies.Json]] = [
    (Endpoint.CHAT, {"error": {"message": "no", "code": 500}}),
    (Endpoint.CHAT, bodies.chat_body()),
    (Endpoint.CHAT, bodies.chat_body(bodies.chat_choice("Par", "abort"))),
    (Endpoint.CHAT, bodies.chat_body(bodies.chat_choice("Paris"), bodies.chat_choice("P", "error"))),
    (Endpoint.CHAT, bodies.chat_body(bodies.chat_choice("Paris"), usage=None)),
    (Endpoint.CHAT, {"object": "chat.completion", "choices": [7], "usage": {}}),
    (Endpoint.COMPLETIONS, bodies.completion_body(bodies.completion_choice("Par", "abort"))),
    (Endpoint.COMPLETIONS, bodies.chat_body(bodies.chat_choice("Paris"))),
    (Endpoint.RESPONSES, responses(status="failed")),
    (Endpoint.RESPONSES, responses(status="cancelled")),
    (Endpoint.RESPONSES, responses(status="queued")),
    (Endpoint.RESPONSES, responses(status="in_progress")),
    (Endpoint.RESPONSES, responses(status="incomplete", incomplete_details={"reason": "content_filter"})),
    (Endpoint.RESPONSES, responses(usage=None)),
    (Endpoint.MESSAGES, bodies.message_body(bodies.text_block("Par"), stop_reason=None)),
    (Endpoint.MESSAGES, bodies.message_body()),
    (Endpoint.MESSAGES, {"type": "error", "error": {"type": "overloaded_error", "message": "no"}}),
    (Endpoint.EMBEDDINGS, bodies.embedding_body() | {"data": []}),
    (Endpoint.EMBEDDINGS, bodies.embedding_body() | {"data": [{"index": 0, "embedding": []}]}),
]


@pytest.mark.parametrize(("endpoint", "body"), BROKEN_BODIES)
def test_a_body_that_is_not_whole(endpoint: Endpoint, body: bodies.Json) -> None:
    with pytest.raises(Incomplete):
        wire.check_body(endpoint, body)


@pytest.mark.parametrize(
    "changes",
    [{"status": "failed"}, {"status": "cancelled"}, {"status": "in_progress"}, {"error": {"code": "server_error"}}],
)
def test_a_response_stream_that_closes_with_a_failure(changes: bodies.Json) -> None:
    with pytest.raises(Incomplete):
        wire.fold(Endpoint.RESPONSES, wire.unfold(Endpoint.RESPONSES, responses(**changes)))


@pytest.mark.parametrize("kind", ["error", "response.failed", "response.cancelled"])
def test_a_response_stream_with_a_failure_in_it(kind: str) -> None:
    events = wire.unfold(Endpoint.RESPONSES, responses())
    failure = b'event: %b\ndata: {"type":"%b"}\n\n' % (kind.encode(), kind.encode())
    with pytest.raises(Incomplete):
        wire.fold(Endpoint.RESPONSES, [*events[:4], failure, *events[4:]])


def test_a_response_may_close_as_openai_says_when_it_was_cut_short() -> None:
    body = responses(status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    *events, last = wire.unfold(Endpoint.RESPONSES, body)
    last = last.replace(b"response.completed", b"response.incomplete")
    assert wire.fold(Endpoint.RESPONSES, [*events, last]) == body


def test_a_message_stream_with_an_error_or_half_a_tool_call() -> None:
    call = bodies.tool_block(0, "weather", {"city": "Köln"})
    events = wire.unfold(Endpoint.MESSAGES, bodies.message_body(call, stop_reason="max_tokens"))
    error = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"no"}}\n\n'
    pieces = [event for event in events if b"input_json_delta" in event]
    for broken in ([*events[:2], error, *events[2:]], [event for event in events if event is not pieces[-1]]):
        with pytest.raises(Incomplete):
            wire.fold(Endpoint.MESSAGES, broken)


def test_thinking_and_text_in_turns_become_one_block_each() -> None:
    body = bodies.message_body(
        bodies.thinking_block("One."), bodies.text_block("a"), bodies.thinking_block("Two."), bodies.text_block("b")
    )
    folded = wire.fold(Endpoint.MESSAGES, wire.unfold(Endpoint.MESSAGES, body))
    assert folded["content"] == [bodies.thinking_block("One.Two."), bodies.text_block("ab")]


def test_chunks_carry_the_logprobs_and_ids_of_their_own_tokens() -> None:
    tokens = [bodies.token(said) for said in ("<think>", "Hm", ".", "</think>", "Pa", "ris", "</s>")]
    choice = bodies.chat_choice("Paris", reasoning="Hm.") | {"logprobs": {"content": tokens}}
    choice |= {"token_ids": [1, 2, 3, 4, 5, 6, 7]}
    parts = [
        json.loads(event[6:])["choices"][0] for event in wire.unfold(Endpoint.CHAT, bodies.chat_body(choice))[1:-2]
    ]
    assert [
        (part["delta"], [t["token"] for t in part["logprobs"]["content"]], part["token_ids"]) for part in parts
    ] == [
        ({"reasoning": "Hm"}, ["<think>", "Hm"], [1, 2]),
        ({"reasoning": "."}, ["."], [3]),
        ({"content": "Pa"}, ["</think>", "Pa"], [4, 5]),
        ({"content": "ris"}, ["ris"], [6]),
        ({"content": ""}, ["</s>"], [7]),
    ]


def test_a_token_outside_the_top_logprobs_gets_its_defaults_back() -> None:
    said = SAID.replace('"logprobs":null', '"logprobs":{"content":[{"token":"Paris","bytes":[80]}]}')
    (choice,) = fold_chat(OPENING, said, FINISH, CHAT_USAGE, DONE)["choices"]
    assert choice["logprobs"] == {
        "content": [{"token": "Paris", "logprob": -9999.0, "bytes": [80], "top_logprobs": []}]
    }


BODIES: dict[Endpoint, bodies.Json] = {
    Endpoint.CHAT: bodies.chat_body(bodies.chat_choice('say "id":"chatcmpl-old" and "created":1764000000, twice')),
    Endpoint.COMPLETIONS: bodies.completion_body(bodies.completion_choice('"id": "cmpl-old"')),
    Endpoint.RESPONSES: responses(),
    Endpoint.MESSAGES: bodies.message_body(bodies.text_block('"id":"chatcmpl-old"')),
    Endpoint.EMBEDDINGS: bodies.embedding_body(),
}


@pytest.mark.parametrize("endpoint", Endpoint)
def test_every_endpoint_knows_its_ids_and_its_usage(endpoint: Endpoint) -> None:
    body = BODIES[endpoint]
    wire.check_body(endpoint, body)
    created = None if endpoint is Endpoint.MESSAGES else CREATED
    assert wire.identity(endpoint, body) == (body["id"], created)
    assert wire.usage(endpoint, body) == (11, 0 if endpoint is Endpoint.EMBEDDINGS else 7)
    if endpoint is not Endpoint.EMBEDDINGS:
        first = json.loads(wire.unfold(endpoint, body)[0].split(b"data: ")[1])
        assert wire.identity(endpoint, first) == (body["id"], created)
    assert wire.new_id(endpoint) != wire.new_id(endpoint)
    assert len(wire.new_id(endpoint).removeprefix(PREFIXES[endpoint])) == 32


PREFIXES = {
    Endpoint.CHAT: "chatcmpl-",
    Endpoint.COMPLETIONS: "cmpl-",
    Endpoint.RESPONSES: "resp_",
    Endpoint.MESSAGES: "msg_",
    Endpoint.EMBEDDINGS: "embd-",
}


def test_tokens_from_the_prefix_cache_are_prompt_tokens() -> None:
    counts = {"input_tokens": 5, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 2, "output_tokens": 7}
    assert wire.usage(Endpoint.MESSAGES, {"usage": counts}) == (11, 7)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.MESSAGES, Endpoint.EMBEDDINGS])
def test_a_fresh_identity_leaves_the_text_alone(endpoint: Endpoint, separators: tuple[str, str]) -> None:
    body = BODIES[endpoint]
    content = json.dumps(body, separators=separators, ensure_ascii=False).encode()
    old = wire.identity(endpoint, body)
    fresh = wire.template(endpoint, content, old)(("new", old[1] and 1999999999), {})
    expected = body | {"id": "new"} | ({"created": 1999999999} if old[1] else {})
    assert fresh == json.dumps(expected, separators=separators, ensure_ascii=False).encode()


def test_a_fresh_response_echoes_the_new_request_alone() -> None:
    request = {"metadata": {"trace": "new"}, "store": False, "input": "?"}
    events = b"".join(wire.unfold(Endpoint.RESPONSES, responses()))
    fresh = wire.template(Endpoint.RESPONSES, events, ("resp_old", CREATED))(("resp_new", 7), request)
    documents = [json.loads(part.split(b"data: ")[1]) for part in fresh.split(b"\n\n") if part]
    embedded = [document["response"] for document in documents if "response" in document]
    assert len(embedded) == 3
    for response in embedded:
        assert (response["id"], response["created_at"]) == ("resp_new", 7)
        assert (response["metadata"], response["user"]) == ({"trace": "new"}, None)
        assert "store" not in response
    deltas = [part for part in events.split(b"\n\n") if b"delta" in part]
    assert [part for part in fresh.split(b"\n\n") if b"delta" in part] == deltas


def test_usage_is_split_off_the_stream() -> None:
    events = [event.encode() for event in WHOLE]
    assert wire.split_usage(Endpoint.CHAT, events) == (b"".join(events[:3]), events[3], events[4])
    assert wire.split_usage(Endpoint.CHAT, events[:3]) == (b"".join(events[:3]), b"", b"")


def test_text_that_looks_like_a_usage_event_is_text() -> None:
    body = bodies.chat_body(bodies.chat_choice('{"choices":[],"usage":{}}'))
    events = wire.unfold(Endpoint.CHAT, body)
    assert wire.split_usage(Endpoint.CHAT, events)[1] == events[-2]


@pytest.mark.parametrize("way", ["fold", "unfold"])
def test_embeddings_are_not_streamed(way: str) -> None:
    with pytest.raises(ValueError, match="not streamed"):
        getattr(wire, way)(Endpoint.EMBEDDINGS, bodies.embedding_body() if way == "unfold" else [])


def test_a_long_answer_costs_milliseconds() -> None:
    """A generous cap: at 4,000 words a quadratic step would take seconds. Of this thread's own, not of waiting."""
    tokens = [bodies.token(f" word{n}") for n in range(4000)]
    said = "".join(token["token"] for token in tokens)
    body = bodies.chat_body(bodies.chat_choice(said) | {"logprobs": {"content": tokens}})
    start = time.thread_time()
    events = wire.unfold(Endpoint.CHAT, body)
    assert wire.fold(Endpoint.CHAT, events) == body
    wire.template(Endpoint.CHAT, b"".join(events), ("chatcmpl-old", CREATED))(("chatcmpl-new", 7), {})
    assert time.thread_time() - start < 2
