"""What a request may not make the server do: fetch, read a file, run a template, load a tensor, connect somewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm.entrypoints.anthropic.protocol import AnthropicContentBlock, AnthropicCountTokensRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest
from vllm.renderers.chat_utils import _KNOWN_CONTENT_PART_FIELDS, MM_PARSER_MAP

from app.api.answers import screen_of
from app.domain import Endpoint
from app.errors import BadCall
from app.gate.screen import _MEDIA, _TENSORS, GUARDED, Screen
from app.settings import GUARDED_FIELDS
from tests.cache.test_fields import BODIES, MODELS
from tests.conftest import Running, chat, make_settings

URL = "http://169.254.169.254/latest/meta-data"
FILE = "file:///etc/passwd"
DATA = "data:image/png;base64,iVBORw0KGgo="


def said(part: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}]}


def of_messages(part: Any) -> dict[str, Any]:
    return {"model": "scripted", "max_tokens": 4} | said(part)


# Every way of asking the server to fetch `url`, by the endpoint whose request it is.
REFERENCES: dict[str, tuple[Endpoint, Callable[[str], dict[str, Any]]]] = {
    "image": (Endpoint.CHAT, lambda url: said({"type": "image_url", "image_url": {"url": url}})),
    "image as a string": (Endpoint.CHAT, lambda url: said({"type": "image_url", "image_url": url})),
    "image without a type": (Endpoint.CHAT, lambda url: said({"image_url": url})),
    "image with a uuid": (Endpoint.CHAT, lambda url: said({"image_url": {"url": url}, "uuid": "u"})),
    "audio": (Endpoint.CHAT, lambda url: said({"type": "audio_url", "audio_url": {"url": url}})),
    "video": (Endpoint.CHAT, lambda url: said({"type": "video_url", "video_url": {"url": url}})),
    "a part that is the content": (
        Endpoint.CHAT,
        lambda url: {"messages": [{"role": "user", "content": {"image_url": url}}]},
    ),
    "an old answer's": (
        Endpoint.CHAT,
        lambda url: {"messages": [{"role": "tool", "tool_call_id": "c", "content": [{"image_url": {"url": url}}]}]},
    ),
    "responses image": (
        Endpoint.RESPONSES,
        lambda url: {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
    ),
    "responses file": (
        Endpoint.RESPONSES,
        lambda url: {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": url}]}]},
    ),
    "responses tool output": (
        Endpoint.RESPONSES,
        lambda url: {
            "input": [
                {
                    "type": "computer_call_output",
                    "call_id": "c",
                    "output": {"type": "computer_screenshot", "image_url": url},
                }
            ]
        },
    ),
    "responses prompt": (
        Endpoint.RESPONSES,
        lambda url: {
            "input": "hi",
            "prompt": {"id": "p", "variables": {"x": {"type": "input_image", "image_url": url}}},
        },
    ),
    "mcp": (
        Endpoint.RESPONSES,
        lambda url: {"input": "hi", "tools": [{"type": "mcp", "server_label": "x", "server_url": url}]},
    ),
    "messages image": (
        Endpoint.MESSAGES,
        lambda url: of_messages({"type": "image", "source": {"type": "url", "url": url}}),
    ),
    "messages document": (
        Endpoint.MESSAGES,
        lambda url: of_messages({"type": "document", "source": {"type": "url", "url": url}}),
    ),
    "messages tool result": (
        Endpoint.MESSAGES,
        lambda url: of_messages(
            {
                "type": "tool_result",
                "tool_use_id": "t",
                "content": [{"type": "image", "source": {"type": "url", "url": url}}],
            }
        ),
    ),
    "embeddings": (Endpoint.EMBEDDINGS, lambda url: said({"type": "image_url", "image_url": {"url": url}})),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_nothing_is_fetched_and_no_file_is_read(server: Running, name: str) -> None:
    endpoint, body = REFERENCES[name]
    with server.client() as client:
        for url in (URL, FILE, "FTP://x/y", "http:\\\\x", "//x/y", "/etc/passwd", "http://a@b/"):
            response = client.post(endpoint.value, json=body(url))
            assert response.status_code == 400, (url, response.text)
            assert response.json()["error"]["code"] == "url_not_allowed"
    assert server.engine.calls == []


def test_tokenizing_fetches_nothing_either(server: Running) -> None:
    _, body = REFERENCES["image"]
    with server.client() as client:
        for path in ("/tokenize", "/v1/messages/count_tokens"):
            response = client.post(path, json=body(URL) | {"model": "scripted"})
            assert response.json()["error"]["code"] == "url_not_allowed", path


def test_data_urls_pass_and_are_bounded_by_the_body(server: Running) -> None:
    screen = Screen()
    for name in set(REFERENCES) - {"mcp"}:
        screen.check(REFERENCES[name][1](DATA))
    _, body = REFERENCES["image"]
    with server.client() as client:
        response = client.post(Endpoint.CHAT.value, json=body("data:image/png;base64," + "A" * 9_000_000))
    assert response.status_code == 413


def test_what_the_model_said_may_hold_any_url() -> None:
    Screen().check(
        {
            "messages": [
                {"role": "user", "content": f"Read {URL} and {FILE}"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_use", "id": "t", "name": "fetch", "input": {"image_url": URL, "url": URL}},
                        {"type": "output_text", "text": URL, "annotations": [{"type": "url_citation", "url": URL}]},
                    ],
                    "tool_calls": [{"function": {"name": "f", "arguments": f'{{"image_url":"{URL}"}}'}}],
                },
            ],
            "tools": [{"type": "function", "function": {"parameters": {"properties": {"image_url": {"type": "x"}}}}}],
        }
    )


def test_media_come_from_the_hosts_that_are_allowed_alone(tmp_path) -> None:
    screen = screen_of(make_settings(tmp_path, None, media_hosts="Images.example.com, cdn.example.com"))
    for url in ("https://images.example.com/a.png?x=1#f", "http://CDN.example.com:8080/", "https://cdn.example.com"):
        screen.check(REFERENCES["image"][1](url))
    for url in (
        "https://example.com/",
        "https://images.example.com.evil.com/",
        "https://evil.com#images.example.com",
        "https://images.example.com@evil.com/",
        "https://evil.com\\@images.example.com/",
        "https://images.example.com\t.evil.com/",
        "file://images.example.com/etc/passwd",
        "https:images.example.com",
        " https://images.example.com/",
        "https://images.example.com:80@evil.com/",
        "https://[::1]/images.example.com",
    ):
        with pytest.raises(BadCall) as refused:
            screen.check(REFERENCES["image"][1](url))
        assert "cdn.example.com, images.example.com" in refused.value.message


@pytest.mark.parametrize("name", sorted(GUARDED))
def test_fields_that_reach_into_the_engine_are_refused_unless_trusted(name: str, tmp_path) -> None:
    outer, _, inner = name.partition(".")
    body = chat() | {outer: {inner: "{{ x }}"} if inner else {"x": 1}}
    with pytest.raises(BadCall) as refused:
        Screen().check(body)
    assert (refused.value.param, refused.value.code) == (name, "field_not_allowed")
    screen_of(make_settings(tmp_path, None, trusted_fields=inner or outer)).check(body)
    Screen().check(chat() | {outer: None})
    Screen().check(chat() | {"chat_template_kwargs": {"enable_thinking": False}})


@pytest.mark.parametrize("name", _TENSORS)
def test_tensors_in_a_message_are_refused_unless_trusted(name: str) -> None:
    for part in ({"type": name, name: "AAAA"}, {name: "AAAA"}, {"type": "prompt_embeds", "data": "AAAA"}):
        with pytest.raises(BadCall):
            Screen().check(said(part))
    Screen(trusted_fields=frozenset({name, "prompt_embeds"})).check(said({"type": name, name: "AAAA"}))


def test_constraints_are_bounded_in_size() -> None:
    schema = {"type": "string", "enum": [f"value {number}" for number in range(10_000)]}
    for body in (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
        {"structured_outputs": {"regex": "a" * 100_000}},
        {"text": {"format": {"type": "json_schema", "schema": schema}}},
        {"output_config": {"format": {"schema": schema}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
    ):
        with pytest.raises(BadCall) as refused:
            Screen().check(body)
        assert refused.value.code == "constraint_too_large"


# --- against vLLM's own models: nothing forgotten -------------------------------------------------------------------

# Read in vLLM 0.32: none of these makes the server fetch, read, run or load anything.
HARMLESS = frozenset(
    """
    add_generation_prompt add_special_tokens allowed_token_ids background bad_words cache_salt chat_template_kwargs
    continue_final_message dimensions documents echo embed_dtype enable_response_messages encoding_format endianness
    frequency_penalty ignore_eos include include_reasoning include_stop_str_in_output input instructions
    length_penalty logit_bias logprob_token_ids logprobs max_completion_tokens max_output_tokens max_tokens
    max_tool_calls messages metadata min_p min_tokens mm_payload model n output_config padding parallel_tool_calls
    presence_penalty previous_input_messages previous_response_id priority prompt prompt_cache_key prompt_logprobs
    reasoning reasoning_effort repetition_detection repetition_penalty
    request_id response_format return_mm_kwargs return_prompt_text return_token_ids return_token_offsets
    return_tokens_as_token_ids seed service_tier session_id skip_special_tokens spaces_between_special_tokens stop
    stop_sequences stop_token_ids store stream stream_interval stream_options structured_outputs suffix system
    temperature text thinking thinking_token_budget tool_choice tools top_k top_logprobs top_p truncate_prompt_tokens
    truncation truncation_side use_activation use_beam_search user watermarking
    return_token_strs routed_experts_prompt_start
    """.split()
)
HARMLESS_PARTS = frozenset({"text", "thinking", "input_text", "output_text", "refusal", "tool_reference", "image_pil"})
HARMLESS_PART_FIELDS = frozenset(
    "text thinking type refusal detail uuid name closed input_audio file data image_pil prompt_cache_breakpoint".split()
)


def test_every_field_of_vllms_request_models_is_guarded_or_was_read() -> None:
    models = [model for each in MODELS.values() for model in each]
    models += [TokenizeChatRequest, TokenizeCompletionRequest, AnthropicCountTokensRequest]
    theirs = {name for model in models for name in model.model_fields}
    unread = theirs - HARMLESS - GUARDED.keys()
    assert unread == set(), "new in vLLM: read what they make the server do, then list or guard them"
    assert HARMLESS | {name for name in GUARDED if "." not in name} <= theirs, "gone from vLLM"
    assert {name.rpartition(".")[2] for name in GUARDED} | set(_TENSORS) == GUARDED_FIELDS


def test_every_kind_of_content_part_that_vllm_reads_is_screened() -> None:
    screened = set(_MEDIA) | set(_TENSORS)
    by_value = {"input_audio"}  # base64 inside the body
    by_another_name = {"input_image"}  # of `image_url`
    assert set(MM_PARSER_MAP) - screened - HARMLESS_PARTS - by_value - by_another_name == set()
    assert _KNOWN_CONTENT_PART_FIELDS - screened - HARMLESS_PART_FIELDS == set()
    anthropic = {
        name
        for name, field in AnthropicContentBlock.model_fields.items()
        if name not in _MEDIA and "dict" in str(field.annotation)
    }
    assert anthropic == {"input", "content"}  # what the model said; parts, which are looked into


def test_bodies_that_ask_for_nothing_pass() -> None:
    for body in BODIES.values():
        Screen().check(body)
