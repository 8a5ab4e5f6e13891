"""What is found in a body that the output must be held to: nothing that vLLM would compile may be missed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.request import get_structured_output_key

from app.engine.constraints import KINDS, constraints, digest

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
NAMED = {"name": "x", "schema": SCHEMA}
TAG = {
    "type": "structural_tag",
    "format": {"type": "json_schema", "json_schema": SCHEMA},
}
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": SCHEMA} | fields}


ASKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "response_format": (
        ChatCompletionRequest,
        HELLO | {"response_format": {"type": "json_schema", "json_schema": NAMED}},
    ),
    "structural tag": (ChatCompletionRequest, HELLO | {"response_format": TAG}),
    "json": (ChatCompletionRequest, HELLO | {"structured_outputs": {"json": SCHEMA}}),
    "regex": (ChatCompletionRequest, HELLO | {"structured_outputs": {"regex": "a+"}}),
    "choice": (ChatCompletionRequest, HELLO | {"structured_outputs": {"choice": ["a", "b"]}}),
    "grammar": (ChatCompletionRequest, HELLO | {"structured_outputs": {"grammar": 'root ::= "a"'}}),
    "text.format": (
        ResponsesRequest,
        {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
    ),
    "output_config": (
        AnthropicMessagesRequest,
        HELLO | {"model": "m", "max_tokens": 5, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_found_is_what_vllm_compiles(name: str) -> None:
    model, body = ASKED[name]
    request = model.model_validate(json.loads(json.dumps(body)))
    if model is AnthropicMessagesRequest:
        request = AnthropicServingMessages.to_chat_completion_request(request)
    (found,) = constraints(body)
    kind, theirs = get_structured_output_key(request.extract_structured_outputs())
    our_kind, ours = get_structured_output_key(StructuredOutputsParams(**found))
    assert our_kind == kind
    if name == "structural tag":
        assert json.loads(ours)["format"].items() <= json.loads(theirs)["format"].items()
    else:
        assert ours == theirs


def test_no_kind_of_vllms_is_missed() -> None:
    theirs = set(StructuredOutputsParams.__dataclass_fields__)
    settings = {name for name in theirs if name.startswith(("_", "disable_")) or name == "whitespace_pattern"}
    assert theirs - settings - {"json_object"} == set(KINDS)


def test_tools_count_where_the_model_is_held_to_them() -> None:
    held = [{"json": SCHEMA}]
    assert constraints({"tools": [tool()]}) == constraints({"tools": [tool()], "tool_choice": "auto"}) == []
    assert constraints({"tools": [tool()], "tool_choice": "required"}) == held
    assert constraints({"tools": [tool(strict=True)]}) == held
    assert constraints({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "f"}}}) == held
    flat = {"name": "f", "input_schema": SCHEMA}
    assert constraints({"tools": [flat], "tool_choice": {"type": "any"}}) == held
    custom = {"type": "custom", "name": "f", "format": {"type": "grammar", "syntax": "regex", "definition": "a+"}}
    assert constraints({"tools": [custom]}) == [{"regex": "a+"}]


def test_nonsense_holds_to_nothing() -> None:
    for wrong in (None, 1, "x", [], {}, [1], {"type": 3}, {"json_schema": 4}):
        assert constraints(dict.fromkeys(("tools", "response_format", "text", "output_config"), wrong)) == []


def test_a_digest_is_of_the_content() -> None:
    assert digest({"json": {"a": 1, "b": 2}}) == digest({"json": {"b": 2, "a": 1}}) != digest({"regex": "a"})
