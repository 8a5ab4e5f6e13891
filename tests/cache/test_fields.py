"""The classification of fields against vLLM's own request models: nothing forgotten, nothing gone, no default moved."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest

from app.cache.fields import EXTRAS_IGNORED, FIELDS
from app.domain import Endpoint

EMBEDDING_MODELS: tuple[type[BaseModel], ...] = get_args(get_args(EmbeddingRequest)[0])
MODELS: dict[Endpoint, tuple[type[BaseModel], ...]] = {
    Endpoint.CHAT: (ChatCompletionRequest,),
    Endpoint.COMPLETIONS: (CompletionRequest,),
    Endpoint.RESPONSES: (ResponsesRequest,),
    Endpoint.MESSAGES: (AnthropicMessagesRequest,),
    Endpoint.EMBEDDINGS: EMBEDDING_MODELS,
}
HELLO = [{"role": "user", "content": "Hi"}]
BODIES: dict[Endpoint, dict[str, Any]] = {
    Endpoint.CHAT: {"messages": HELLO},
    Endpoint.COMPLETIONS: {"prompt": "Once"},
    Endpoint.RESPONSES: {"input": "Hi", "request_id": "r"},
    Endpoint.MESSAGES: {"model": "m", "messages": HELLO, "max_tokens": 5},
    Endpoint.EMBEDDINGS: {"input": "Hi"},
}
# Where the default is the generation config's, a config that differs from every neutral value.
SAMPLING_DEFAULTS = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "max_tokens": 50,
}


def classified(endpoint: Endpoint) -> list[str]:
    kinds = FIELDS[endpoint]
    return [*kinds.ignored, *kinds.keyed, *kinds.sampled, *kinds.ruled, *kinds.uncacheable]


@pytest.mark.parametrize("endpoint", Endpoint)
def test_every_field_is_classified_once_and_exists(endpoint: Endpoint) -> None:
    theirs = {name for model in MODELS[endpoint] for name in model.model_fields}
    ours = classified(endpoint)
    assert sorted(theirs - set(ours)) == [], "new in vLLM: read what they do, then classify them in fields.py"
    assert sorted(set(ours) - theirs) == [], "gone from vLLM"
    assert len(ours) == len(set(ours)), "in two groups"
    assert not EXTRAS_IGNORED[endpoint] & theirs, "not unknown to vLLM any more"


@pytest.mark.parametrize("endpoint", Endpoint)
def test_no_field_has_an_alias(endpoint: Endpoint) -> None:
    """The key reads the names of the wire, which are then the names of the models."""
    for model in MODELS[endpoint]:
        assert [name for name, field in model.model_fields.items() if field.alias or field.validation_alias] == []


@pytest.mark.parametrize("endpoint", Endpoint)
def test_defaults_are_those_of_vllm(endpoint: Endpoint) -> None:
    kinds = FIELDS[endpoint]
    as_absent = {**kinds.keyed, **{name: values for name, (_, values) in kinds.uncacheable.items()}}
    for model in MODELS[endpoint]:
        for name, field in model.model_fields.items():
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            if as_absent.get(name):
                assert not field.is_required(), name
                assert (type(default), default) == (type(as_absent[name][0]), as_absent[name][0]), name
            elif name in kinds.sampled:
                assert default is None, name
            elif name in kinds.keyed and endpoint is not Endpoint.EMBEDDINGS:
                assert field.is_required(), name
    assert kinds.ruled <= {"model", "tool_choice", "max_tokens", "max_completion_tokens"}


def test_neutral_sampling_values_are_those_of_vllm() -> None:
    def neutral(model: type[BaseModel]) -> Any:
        return model.__private_attributes__["_DEFAULT_SAMPLING_PARAMS"].default

    assert FIELDS[Endpoint.CHAT].sampled == neutral(ChatCompletionRequest)
    assert FIELDS[Endpoint.COMPLETIONS].sampled == neutral(CompletionRequest)
    theirs = neutral(ResponsesRequest)
    assert theirs.items() <= FIELDS[Endpoint.RESPONSES].sampled.items()


@pytest.mark.parametrize("endpoint", Endpoint)
def test_what_counts_as_absent_does_to_vllm_what_absent_does(endpoint: Endpoint) -> None:
    """The claim itself: same sampling, same tokenization, same template arguments, same fields that are echoed."""
    kinds = FIELDS[endpoint]
    bases = (BODIES[endpoint], {"messages": HELLO}) if endpoint is Endpoint.EMBEDDINGS else (BODIES[endpoint],)
    for base, defaults in product(bases, ({}, SAMPLING_DEFAULTS)):
        absent = effects(endpoint, base, defaults)
        for name, values in kinds.keyed.items():
            for value in values if name not in base else ():
                assert effects(endpoint, {**base, name: value}, defaults) == absent, (name, value)
        for name, neutral in kinds.sampled.items():
            for value in (None, defaults.get(name, neutral)):
                assert effects(endpoint, {**base, name: value}, defaults) == absent, (name, value)


def test_the_rules_hold_in_vllm() -> None:
    def chat(**fields: Any) -> Any:
        return effects(Endpoint.CHAT, {"messages": HELLO, **fields}, {})

    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tool_choice="none") == chat()
    assert chat(tools=tools, tool_choice="auto") == chat(tools=tools) != chat(tools=tools, tool_choice="none")
    assert chat(max_tokens=5)["sampling"] == chat(max_completion_tokens=5)["sampling"]
    assert chat(max_tokens=5)["tokens"].max_output_tokens == chat(max_completion_tokens=5)["tokens"].max_output_tokens

    def responses(**fields: Any) -> Any:
        return effects(Endpoint.RESPONSES, {"input": "Hi", "request_id": "r", **fields}, {})

    named = [{"type": "function", "name": "f", "parameters": {}, "strict": True}]
    assert responses(tool_choice="none") == responses(tool_choice="auto") == responses()
    assert responses(tools=named, tool_choice="auto") == responses(tools=named)
    assert responses(tools=named, tool_choice="none") != responses(tools=named)


def test_null_truncation_truncates() -> None:
    """Why `truncation: null` is not dropped, though a reader would take it for the default."""
    request = ResponsesRequest.model_validate({"input": "Hi", "truncation": None})
    assert request.build_tok_params(MODEL).truncate_prompt_tokens == -1


def test_a_seed_of_minus_one_is_none_and_small_temperatures_are_not_greedy() -> None:
    def sampling(**fields: Any) -> Any:
        return effects(Endpoint.CHAT, {"messages": HELLO, **fields}, {})["sampling"]

    assert sampling(seed=-1).seed is None
    assert sampling(temperature=1e-6).temperature > 1e-5
    assert sampling(temperature=0).temperature == 0


def test_the_anthropic_endpoint_knows_no_seed_and_needs_a_model() -> None:
    assert "seed" not in AnthropicMessagesRequest.model_fields
    with pytest.raises(ValidationError):
        AnthropicMessagesRequest.model_validate({"messages": HELLO, "max_tokens": 5})


MODEL = SimpleNamespace(max_model_len=2048, encoder_config=None, pooler_config=None)


def effects(endpoint: Endpoint, body: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Everything that vLLM's serving code derives from a request, short of the engine."""
    if endpoint is Endpoint.EMBEDDINGS:
        embed = TypeAdapter(EmbeddingRequest).validate_python(dict(body))
        return {
            "class": type(embed),
            "pooling": embed.to_pooling_params(),
            "tokens": embed.build_tok_params(MODEL),
            "fields": embed.model_dump(exclude={"request_id"}),
        }
    request: Any = MODELS[endpoint][0].model_validate(dict(body))
    if endpoint is Endpoint.MESSAGES:
        request = AnthropicServingMessages.to_chat_completion_request(request)
    limit = {"default_max_tokens": 100} if endpoint is Endpoint.RESPONSES else {"max_tokens": 100}
    found = {
        "sampling": request.to_sampling_params(**limit, default_sampling_params=defaults),
        "tokens": request.build_tok_params(MODEL),
        "fields": read_directly(request),
    }
    if endpoint is not Endpoint.COMPLETIONS:
        found["chat"] = request.build_chat_params(None, "auto")
        found["structured"] = request.extract_structured_outputs()
    if endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS):
        found["beams"] = request.to_beam_search_params(100, defaults)
    return found


# Fields that only `to_sampling_params` and the like read, where null and the default differ as attributes
# though not in effect; and those that serving code reads as `if request.echo`, `request.n or 1`.
READ_FOR_TRUTH = {"echo", "logprobs"}
READ_BY_PARAMS = {"stop", "stop_token_ids", "n", *SAMPLING_DEFAULTS} - {"max_tokens"}


def read_directly(request: BaseModel) -> dict[str, Any]:
    found = request.model_dump(exclude={"request_id", *READ_BY_PARAMS})
    is_chat = isinstance(request, ChatCompletionRequest)
    return {
        name: bool(value) if name in READ_FOR_TRUTH and (is_chat or name == "echo") else value
        for name, value in found.items()
    }
