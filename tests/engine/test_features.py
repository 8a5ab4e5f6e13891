"""What the endpoints can do with a real model behind them: every feature live, recorded and replayed."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Process, until
from tests.engine.conftest import (
    ANEW,
    CHAT,
    MODEL,
    ONLY_CACHED,
    PATIENCE_S,
    QUESTION,
    RUNNING,
    chat,
    metric,
    payloads,
)

pytestmark = pytest.mark.engine

PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"type": "string", "maxLength": 20}},
    "required": ["city", "country"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
# Without `strict` vLLM lets the model write any JSON as the arguments, and one of this size writes any.
WEATHER = {"name": "get_weather", "description": "The weather in a city", "parameters": CITY, "strict": True}
TOOL = {"type": "function", "function": WEATHER}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
ABOUT_WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}

COMPLETION = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
RESPONSE = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 32, "store": False}
MESSAGE = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 32}
COMPLETIONS, RESPONSES, MESSAGES = "/v1/completions", "/v1/responses", "/v1/messages"

# What two answers to one question may differ in: names that are made up for each.
MADE_UP = {"id", "created", "created_at", "call_id"}

FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "n": (CHAT, chat(n=2, temperature=0.8, seed=7, max_tokens=12)),
    "logprobs": (CHAT, chat(logprobs=True, top_logprobs=3, max_tokens=8)),
    "stop": (CHAT, chat(stop=["Germany"])),
    "length": (CHAT, chat(max_tokens=3)),
    "json_schema": (CHAT, chat(response_format=JSON_SCHEMA, max_tokens=64)),
    "tools_required": (CHAT, chat(messages=ABOUT_WEATHER, tools=[TOOL], tool_choice="required", max_tokens=96)),
    "tools_named": (CHAT, chat(messages=ABOUT_WEATHER, tools=[TOOL], tool_choice=NAMED, max_tokens=96)),
    "token_ids": (CHAT, chat(return_token_ids=True, max_tokens=4)),
    "completion_n_logprobs": (COMPLETIONS, COMPLETION | {"n": 2, "logprobs": 2, "temperature": 0.8, "seed": 7}),
    "completion_echo": (COMPLETIONS, COMPLETION | {"prompt": ["The capital of France is", "One two"], "echo": True}),
    "response_json_schema": (
        RESPONSES,
        RESPONSE | {"text": {"format": {"type": "json_schema", "name": "p", "schema": PLACE}}},
    ),
    "response_tool": (
        RESPONSES,
        RESPONSE
        | {
            "input": ABOUT_WEATHER,
            "tools": [{"type": "function"} | WEATHER],
            "tool_choice": "required",
            "max_output_tokens": 96,
        },
    ),
    "message_stop": (MESSAGES, MESSAGE | {"stop_sequences": ["Germany"]}),
    "message_tool": (
        MESSAGES,
        MESSAGE
        | {
            "messages": ABOUT_WEATHER,
            "tools": [{"name": "get_weather", "input_schema": CITY, "strict": True}],
            "tool_choice": {"type": "any"},
            "max_tokens": 96,
        },
    ),
}


@pytest.mark.parametrize(("path", "body"), FEATURES.values(), ids=FEATURES)
def test_every_feature_is_recorded_and_replayed_in_both_forms(
    http: httpx.Client, client: OpenAI, claude: Anthropic, path: str, body: dict
) -> None:
    """A recorded stream reads as the body that the engine gives, and either recording streams to the SDK."""
    read = {CHAT: _read_chat, COMPLETIONS: _read_completion, RESPONSES: _read_response, MESSAGES: _read_message}[path]
    sdk = claude if path == MESSAGES else client

    stream = http.post(path, json=body | {"stream": True}, headers=ANEW)
    assert stream.headers["x-cache"] == "miss"
    folded = http.post(path, json=body, headers=ONLY_CACHED).json()
    replayed = http.post(path, json=body | {"stream": True}, headers=ONLY_CACHED)
    assert len(payloads(replayed.text)) == len(payloads(stream.text)), "a replay has as many chunks, and is no lump"
    of_stream = read(sdk, body)

    generated = http.post(path, json=body, headers=ANEW)
    assert generated.headers["x-cache"] == "miss"
    of_body = read(sdk, body)

    _assert_same(folded, generated.json())
    assert of_stream == of_body
    assert any(of_body)


def _read_chat(client: OpenAI, body: dict) -> list[Any]:
    """What openai-python makes of the replayed stream, put together from its chunks."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in client.chat.completions.create(stream=True, extra_headers=ONLY_CACHED, **_as_arguments(body)):
        for part in chunk.choices:
            said = choices.setdefault(part.index, {"text": "", "tokens": [], "name": "", "arguments": "", "end": None})
            said["text"] += part.delta.content or ""
            said["tokens"] += [token.token for token in (part.logprobs.content if part.logprobs else None) or ()]
            for call in part.delta.tool_calls or ():
                said["name"] += call.function.name or ""
                said["arguments"] += call.function.arguments or ""
            said["end"] = part.finish_reason or said["end"]
    for said in choices.values():
        said["arguments"] = _parsed(said["arguments"])
    return [choices[index] for index in sorted(choices)]


def _read_completion(client: OpenAI, body: dict) -> list[Any]:
    choices: dict[int, list[str]] = {}
    for chunk in client.completions.create(stream=True, extra_headers=ONLY_CACHED, **_as_arguments(body)):
        for part in chunk.choices:
            tokens = part.logprobs.tokens if part.logprobs else []
            choices.setdefault(part.index, []).append(part.text)
            assert all(isinstance(token, str) for token in tokens)
    return ["".join(choices[index]) for index in sorted(choices)]


def _read_response(client: OpenAI, body: dict) -> list[Any]:
    with client.responses.stream(extra_headers=ONLY_CACHED, **body) as stream:
        answer = stream.get_final_response()
    return [answer.output_text, *(_parsed(item.arguments) for item in answer.output if item.type == "function_call")]


def _read_message(client: Anthropic, body: dict) -> list[Any]:
    arguments = {name: value for name, value in body.items() if name != "temperature"}
    arguments["extra_body"] = {"temperature": body["temperature"]}  # newer versions have no argument for it
    with client.messages.stream(extra_headers=ONLY_CACHED, **arguments) as stream:
        answer = stream.get_final_message()
    return [answer.stop_reason, *(block.text if block.type == "text" else block.input for block in answer.content)]


def _as_arguments(body: dict) -> dict[str, Any]:
    """vLLM's own fields are no arguments of the SDK."""
    extra = {name: value for name, value in body.items() if name == "return_token_ids"}
    return {name: value for name, value in body.items() if name not in extra} | {"extra_body": extra}


def _parsed(arguments: str) -> Any:
    """vLLM streams a call's arguments as the model wrote them and tidies their blanks in a body."""
    return json.loads(arguments) if arguments else arguments


# --- each feature for itself -------------------------------------------------------------------------


def test_n_gives_that_many_choices_and_counts_their_tokens(client: OpenAI) -> None:
    answer = client.chat.completions.create(**chat(n=3, temperature=1, seed=1, max_tokens=6), extra_headers=ANEW)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens <= 18


def test_stop_ends_the_answer_before_the_word(client: OpenAI) -> None:
    choice = client.chat.completions.create(**chat(stop=["Germany"]), extra_headers=ANEW).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("The capital of ", "stop")


def test_the_same_seed_gives_the_same_answer_and_is_cached(client: OpenAI) -> None:
    create = client.chat.completions.with_raw_response.create

    def ask(seed: int, **headers: str) -> tuple[str, str]:
        raw = create(**chat(temperature=1, seed=seed, max_tokens=8), extra_headers=headers)
        return raw.headers["x-cache"], raw.parse().choices[0].message.content

    (_, first), (_, again), (status, cached) = ask(11, **ANEW), ask(11, **ANEW), ask(11)
    assert first == again == cached
    assert status == "hit"
    assert len({ask(seed, **ANEW)[1] for seed in (12, 13)} | {first}) > 1


def test_a_sampled_answer_without_a_seed_is_not_cached(http: httpx.Client) -> None:
    assert http.post(CHAT, json=chat(temperature=1, max_tokens=2)).headers["x-cache"] == "bypass"


def test_logprobs_name_each_token_and_its_rivals(client: OpenAI) -> None:
    choice = client.chat.completions.create(**FEATURES["logprobs"][1]).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens).removesuffix("<|im_end|>") == choice.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
        assert max(token.top_logprobs, key=lambda top: top.logprob).token == token.token, "greedy takes the likeliest"


def test_logit_bias_forces_a_token(client: OpenAI, http: httpx.Client) -> None:
    banana = http.post("/tokenize", json={"model": MODEL, "prompt": " banana"}).json()["tokens"][0]
    body = chat(logit_bias={str(banana): 100}, max_tokens=3)
    answer = client.chat.completions.create(**body, extra_headers=ANEW)
    said = answer.choices[0].message.content
    expected = http.post("/detokenize", json={"model": MODEL, "tokens": [banana] * 3}).json()["prompt"]
    assert said == expected


def test_json_object_is_json_as_far_as_it_goes(client: OpenAI) -> None:
    messages = [{"role": "user", "content": 'Answer with {"capital": "Paris"} and nothing else.'}]
    body = chat(messages=messages, response_format={"type": "json_object"}, max_tokens=24)
    choice = client.chat.completions.create(**body, extra_headers=ANEW).choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_json_schema_is_obeyed(client: OpenAI) -> None:
    choice = client.chat.completions.create(**FEATURES["json_schema"][1]).choices[0]
    place = json.loads(choice.message.content)
    jsonschema.validate(place, PLACE)
    assert place["country"] == "Germany"


def test_json_schema_is_obeyed_by_responses(client: OpenAI) -> None:
    answer = client.responses.create(**FEATURES["response_json_schema"][1])
    jsonschema.validate(json.loads(answer.output_text), PLACE)


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")], ids=["required", "named"])
def test_a_tool_that_must_be_called_is_called(client: OpenAI, choice: Any, reason: str) -> None:
    body = chat(messages=ABOUT_WEATHER, tools=[TOOL], tool_choice=choice, max_tokens=96)
    answer = client.chat.completions.create(**body).choices[0]
    (call,) = answer.message.tool_calls
    assert (call.type, call.function.name, answer.finish_reason) == ("function", "get_weather", reason)
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_a_tool_that_may_be_called_leaves_an_answer_of_either_kind(client: OpenAI) -> None:
    body = chat(messages=ABOUT_WEATHER, tools=[TOOL], tool_choice="auto", max_tokens=16)
    message = client.chat.completions.create(**body, extra_headers=ANEW).choices[0].message
    assert message.content or message.tool_calls


def test_a_tool_that_must_not_be_called_is_not(client: OpenAI) -> None:
    body = chat(tools=[TOOL], tool_choice="none")
    message = client.chat.completions.create(**body, extra_headers=ANEW).choices[0].message
    assert "Berlin" in message.content
    assert not message.tool_calls


@pytest.mark.parametrize("headers", [ANEW, ONLY_CACHED], ids=["generated", "cached"])
def test_only_who_asks_for_usage_gets_its_event(client: OpenAI, headers: dict[str, str]) -> None:
    create = client.chat.completions.create
    plain = list(create(**chat(), stream=True, extra_headers=headers))
    asked = list(create(**chat(), stream=True, stream_options={"include_usage": True}, extra_headers=headers))
    assert [chunk for chunk in plain if chunk.usage] == []
    assert [len(chunk.choices) for chunk in asked if chunk.usage] == [0]
    usage = asked[-1].usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 8


def test_usage_of_a_hit_is_that_of_the_generation(client: OpenAI) -> None:
    for create, body, name in [
        (client.chat.completions.create, chat(), "completion_tokens"),
        (client.completions.create, COMPLETION, "completion_tokens"),
        (client.responses.create, RESPONSE, "output_tokens"),
    ]:
        generated, cached = create(**body, extra_headers=ANEW), create(**body, extra_headers=ONLY_CACHED)
        assert generated.usage == cached.usage
        assert getattr(cached.usage, name) > 0
        assert generated.id != cached.id


def test_completions_take_several_prompts_and_echo_them(client: OpenAI) -> None:
    prompts = ["The capital of France is", "The capital of Germany is"]
    answer = client.completions.create(**COMPLETION | {"prompt": prompts}, echo=True, extra_headers=ANEW)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice, prompt, capital in zip(answer.choices, prompts, ("Paris", "Berlin"), strict=True):
        assert choice.text.startswith(prompt)
        assert capital in choice.text


def test_completions_take_token_ids(client: OpenAI, http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"model": MODEL, "prompt": COMPLETION["prompt"]}).json()["tokens"]
    said = client.completions.create(**COMPLETION | {"prompt": tokens}, extra_headers=ANEW).choices[0].text
    assert said == client.completions.create(**COMPLETION, extra_headers=ANEW).choices[0].text


def test_tokens_make_the_round_trip(http: httpx.Client) -> None:
    text = "Grüße aus Köln: 1 < 2, 😀\n"
    there = http.post("/tokenize", json={"model": MODEL, "prompt": text}).json()
    assert (there["count"], there["max_model_len"]) == (len(there["tokens"]), 8192)
    assert http.post("/detokenize", json={"model": MODEL, "tokens": there["tokens"]}).json() == {"prompt": text}


def test_all_ways_to_count_a_prompt_agree(http: httpx.Client, claude: Anthropic, client: OpenAI) -> None:
    counted = claude.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens
    assert counted == http.post("/tokenize", json={"model": MODEL, "messages": QUESTION}).json()["count"]
    assert counted == client.chat.completions.create(**chat()).usage.prompt_tokens


def test_models_tells_what_is_served(client: OpenAI) -> None:
    (card,) = client.models.list().data
    assert card == client.models.retrieve(MODEL)
    assert (card.id, card.object) == (MODEL, "model")
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("nope")
    assert refused.value.code == "model_not_found"


def test_version_names_both(http: httpx.Client) -> None:
    assert http.get("/version").json()["vllm"] == "0.32.0"


def test_a_model_without_embeddings_says_so(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support embeddings") as refused:
        client.embeddings.create(model=MODEL, input="hello")
    assert refused.value.code == "unsupported_endpoint"


def test_unknown_fields_are_let_through_and_are_part_of_the_key(http: httpx.Client) -> None:
    replies = [http.post(CHAT, json=chat(**fields)) for fields in ({}, {"frobnicate": 1}, {"frobnicate": 2})]
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert len({reply.headers["x-cache-key"] for reply in replies}) == 3


# --- the Responses API's memory ----------------------------------------------------------------------


def test_a_stored_response_can_be_asked_for_and_continued(client: OpenAI) -> None:
    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
    raw = client.responses.with_raw_response.create(**asked, input="My name is Ada. Say hello to me.")
    assert raw.headers["x-cache"] == "bypass", "its id is one that the engine knows, so nobody else may get it"
    first = raw.parse()
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(**asked, input="What is my name?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.total_tokens, "it has read what was said before"
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        client.responses.cancel(first.id)


def test_a_response_that_was_not_stored_is_not_there(client: OpenAI) -> None:
    forgotten = client.responses.create(**RESPONSE)
    for response_id in (forgotten.id, "resp_nope"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response_id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=MODEL, input="And?", previous_response_id="resp_nope")


def test_a_response_in_the_background_completes(client: OpenAI) -> None:
    started = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=32, background=True)
    assert started.status in ("queued", "in_progress")

    def completed() -> Any:
        found = client.responses.retrieve(started.id)
        assert found.status in ("queued", "in_progress", "completed")
        return found if found.status == "completed" else None

    assert "Berlin" in until(completed, PATIENCE_S, 0.1).output_text


def test_a_response_in_the_background_can_be_cancelled(client: OpenAI, http: httpx.Client) -> None:
    endless = {"max_output_tokens": 4000, "background": True, "extra_body": {"ignore_eos": True}}
    before = metric(http, "vllm:generation_tokens_total")
    started = client.responses.create(model=MODEL, input=QUESTION, **endless)
    until(lambda: metric(http, RUNNING) >= 1, PATIENCE_S, 0.1)
    assert client.responses.cancel(started.id).status == "cancelled"
    assert client.responses.retrieve(started.id).status == "cancelled"
    until(lambda: metric(http, RUNNING) == 0, PATIENCE_S, 0.1)  # the step that it is in ends first
    generated = metric(http, "vllm:generation_tokens_total")
    assert generated - before < 3000, "it did not come to its own end"
    # Were it still running it would count on; an answer after it shows that the engine's work is ours alone.
    answer = client.chat.completions.create(**chat(), extra_headers=ANEW)
    assert metric(http, "vllm:generation_tokens_total") - generated <= answer.usage.completion_tokens + 2


def test_a_background_stream_that_lost_its_client_goes_on_by_its_numbers(http: httpx.Client) -> None:
    """The API's own way to come back. Its events have no ids, so `Last-Event-ID` says nothing here."""
    asked = RESPONSE | {"store": True, "background": True, "stream": True, "top_p": 0.97}
    seen: list[dict[str, Any]] = []
    with http.stream("POST", "/v1/responses", json=asked) as response:
        assert response.headers["x-cache"] == "bypass"
        for line in response.iter_lines():
            assert not line.startswith("id:")
            if line.startswith("data: "):
                seen.append(json.loads(line[6:]))
            if len(seen) == 6:
                break  # the connection closes; nobody reads
    name, last = f"/v1/responses/{seen[0]['response']['id']}", seen[-1]["sequence_number"]
    rest = payloads(http.get(name, params={"stream": True, "starting_after": last}).text)
    whole = payloads(http.get(name, params={"stream": True}).text)
    assert [*seen, *rest] == whole
    assert [each["sequence_number"] for each in whole] == list(range(len(whole)))
    assert whole[-1]["type"] == "response.completed"
    assert whole[-1]["response"]["status"] == "completed"
    ignored = http.get(name, params={"stream": True}, headers={"Last-Event-ID": str(last)})
    assert payloads(ignored.text) == whole


def test_a_response_in_the_background_can_be_streamed(client: OpenAI) -> None:
    asked = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 32}
    events = list(client.responses.create(**asked, background=True, stream=True))
    assert events[-1].type == "response.completed"
    assert "Berlin" in events[-1].response.output_text
    again = list(client.responses.retrieve(events[-1].response.id, stream=True))
    assert [event.type for event in again] == [event.type for event in events]


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"n": 0}, "n must be at least 1", None),
        ({"top_p": 2}, "top_p must be in", "top_p"),
        ({"temperature": -1}, "temperature must be", "temperature"),
        ({"messages": []}, "at least one message", None),
        ({"messages": "hello"}, "should be a valid list", "messages"),
        ({"max_tokens": 0}, "at least 1", "max_tokens"),
        ({"seed": "x"}, "valid integer", "seed"),
        ({"logit_bias": {"999999": 1}}, "out-of-vocab", "logit_bias"),
        ({"logprobs": True, "top_logprobs": 99}, "greater than max allowed", "logprobs"),
        ({"response_format": {"type": "yaml"}}, "'json_object'", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "must be provided", "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}},
            "Invalid type",
            None,
        ),
        ({"tool_choice": "required"}, "`tools` must be set", "tool_choice"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("streams", [True, False], ids=["stream", "body"])
def test_a_bad_value_is_a_400_that_names_it(
    client: OpenAI, fields: dict, message: str, param: str | None, streams: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(message)) as refused:
        client.chat.completions.create(**chat(**fields), stream=streams)
    assert (refused.value.type, refused.value.param) == ("invalid_request_error", param)
    assert refused.value.request_id.startswith("req_")


def test_an_unknown_model_is_a_404(client: OpenAI, claude: Anthropic) -> None:
    with pytest.raises(openai.NotFoundError, match="`gpt-7`") as refused:
        client.chat.completions.create(model="gpt-7", messages=QUESTION)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(anthropic.NotFoundError, match="`claude-9`"):
        claude.messages.create(model="claude-9", messages=QUESTION, max_tokens=4)


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "body"])
def test_a_prompt_that_is_too_long_is_a_400_with_the_numbers(client: OpenAI, claude: Anthropic, streams: bool) -> None:
    long = "word " * 9000
    messages = [{"role": "user", "content": long}]
    for create in (
        lambda: client.chat.completions.create(**chat(messages=messages), stream=streams),
        lambda: client.completions.create(model=MODEL, prompt=long, stream=streams),
        lambda: client.responses.create(model=MODEL, input=long, stream=streams),
    ):
        with pytest.raises(
            openai.BadRequestError, match=r"maximum context length is 8192 tokens.*(9\d{3} tokens|8193 input tokens)"
        ):
            create()
    with pytest.raises(anthropic.BadRequestError, match=r"8192 tokens.*(9\d{3} tokens|8193 input tokens)"):
        claude.messages.create(model=MODEL, messages=messages, max_tokens=4, stream=streams)
    with pytest.raises(openai.BadRequestError, match=r"9000.*8192"):
        client.chat.completions.create(**chat(max_tokens=9000), stream=streams)


# --- what is told beside the answer ------------------------------------------------------------------


def test_server_timing_tells_the_phases(http: httpx.Client) -> None:
    missed, hit = http.post(CHAT, json=chat(), headers=ANEW), http.post(CHAT, json=chat())
    assert set(_phases(missed.headers["server-timing"])) >= {"queue", "prefill", "decode"}
    assert _phases(missed.headers["server-timing"])["decode"] > 0
    assert set(_phases(hit.headers["server-timing"])) == {"cache"}


def test_a_streams_timing_comes_as_a_comment_before_its_end(http: httpx.Client) -> None:
    stream = http.post(CHAT, json=chat(stream=True), headers=ANEW)
    assert _phases(stream.headers["server-timing"])
    comments = [line for line in stream.text.splitlines() if line.startswith(": server-timing ")]
    assert len(comments) == 1
    phases = _phases(comments[0].removeprefix(": server-timing "))
    assert set(phases) >= {"queue", "prefill", "decode"}
    assert payloads(stream.text)[-1] == "[DONE]"


def test_metrics_hold_vllms_families_and_ours(http: httpx.Client) -> None:
    hits = metric(http, "refrain_calls_total", endpoint="chat", cache="hit")
    http.post(CHAT, json=chat())
    http.post(CHAT, json=chat(), headers=ONLY_CACHED)
    until(lambda: metric(http, "refrain_calls_total", endpoint="chat", cache="hit") >= hits + 1)
    names = {family.name for family in text_string_to_metric_families(http.get("/metrics").text)}
    assert names >= {
        "vllm:num_requests_running",
        "vllm:generation_tokens",
        "vllm:time_to_first_token_seconds",
        "refrain_calls",
        "refrain_phase_seconds",
        "refrain_tokens_saved",
        "refrain_generations_in_flight",
        "refrain_redis_up",
    }
    assert metric(http, "refrain_engine_ready") == 1
    assert metric(http, "refrain_redis_up") == 1
    assert metric(http, "vllm:generation_tokens_total") > 0


@pytest.fixture
def claude(engine_server: Process, http: httpx.Client) -> Any:
    with Anthropic(base_url=engine_server.url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def _phases(server_timing: str) -> dict[str, float]:
    assert re.fullmatch(r"(\w+;dur=\d+(\.\d+)?)(, \w+;dur=\d+(\.\d+)?)*", server_timing), server_timing
    return {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", server_timing)}


def _assert_same(folded: Any, body: Any, where: str = "") -> None:
    """Equal but for made-up names, and for what vLLM itself does differently in a stream."""
    if isinstance(folded, dict) and isinstance(body, dict):
        assert set(folded) == set(body), where
        for key in set(folded) - MADE_UP:
            if key == "arguments":
                assert _parsed(folded[key]) == _parsed(body[key]), where
            elif key == "content" and folded.get("tool_calls"):
                assert {folded[key], body[key]} <= {None, ""}, "beside a call either stands for no text"
            elif key == "prompt_token_ids" and body[key] is None:
                continue  # an echoed prompt brings them along in a stream, asked for or not
            else:
                _assert_same(folded[key], body[key], f"{where}.{key}")
    elif isinstance(folded, list) and isinstance(body, list):
        assert len(folded) == len(body), where
        for index, (one, other) in enumerate(zip(folded, body, strict=True)):
            _assert_same(one, other, f"{where}[{index}]")
    elif isinstance(folded, float) and isinstance(body, float):
        assert math.isclose(folded, body, abs_tol=0.02), where  # two runs differ in the last digits
    else:
        assert folded == body, where
