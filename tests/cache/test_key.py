"""The cache key: what it must not depend on, and what it must."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from hashlib import sha256
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from app.cache import key as key_module
from app.cache.fields import EXTRAS_IGNORED, FIELDS
from app.cache.key import cache_key, canonical, is_deterministic, why_uncacheable
from app.domain import Call, Caller, Endpoint, Weights

WEIGHTS = Weights(
    name="smollm2-135m-instruct",
    path="/models/smollm2",
    digest="d" * 64,
    settings_digest="5" * 64,
    sampling_defaults={"temperature": 0.6, "top_p": 0.9},
)
BODIES: dict[Endpoint, dict[str, Any]] = {
    Endpoint.CHAT: {"model": WEIGHTS.name, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0},
    Endpoint.COMPLETIONS: {"model": WEIGHTS.name, "prompt": "Once", "temperature": 0, "max_tokens": 5},
    Endpoint.RESPONSES: {"model": WEIGHTS.name, "input": "Hi", "temperature": 0},
    Endpoint.MESSAGES: {
        "model": WEIGHTS.name,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
        "temperature": 0,
    },
    Endpoint.EMBEDDINGS: {"model": WEIGHTS.name, "input": ["Hi", "there"]},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

scalars = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False) | st.text()
json_values = st.recursive(
    scalars.filter(lambda v: not isinstance(v, float) or abs(v) != float("inf")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
endpoints = st.sampled_from(Endpoint)


def call(endpoint: Endpoint, body: dict[str, Any], *, request_id: str = "r") -> Call:
    return Call(endpoint=endpoint, body=body, caller=Caller(), request_id=request_id)


def key(endpoint: Endpoint, body: dict[str, Any], *, tenant: str = "t", weights: Weights = WEIGHTS) -> str:
    return cache_key(call(endpoint, body), weights, tenant=tenant)


def chat_key(**fields: Any) -> str:
    return key(Endpoint.CHAT, BODIES[Endpoint.CHAT] | fields)


def shuffled(body: dict[str, Any], draw: st.DrawFn) -> dict[str, Any]:
    return dict(draw(st.permutations(list(body.items()))))


def test_a_key_is_pinned_so_that_a_new_canonical_form_is_a_decision() -> None:
    """If this fails on purpose, raise `SCHEMA`: recordings made under the old form must not be found."""
    form = canonical(call(Endpoint.CHAT, BODIES[Endpoint.CHAT]), WEIGHTS, tenant="t")
    assert form == {
        "schema": 1,
        "endpoint": "/v1/chat/completions",
        "weights": "d" * 64,
        "settings": "5" * 64,
        "tenant": "t",
        "fields": {"model": "smollm2-135m-instruct", "temperature": 0},
        "texts": {"messages": '[{"content":"Hi","role":"user"}]'},
    }
    pinned = "6988772bd37dfeb3a2bc8a9c73f357d4ac4a52a92dcf6277cc7ad6caf5af1e56"
    assert key(Endpoint.CHAT, BODIES[Endpoint.CHAT]) == pinned
    body = {
        "prompt": ["é", "e\u0301"],
        "logit_bias": {"11": -1.5},
        "top_p": 1e-7,
        "seed": 7,
        "ünknown": "\x00\x7f\u2028😀",
    }
    assert key(Endpoint.COMPLETIONS, body) == "a9ba3dde37d3eb00d04ae6ba17cdc776685450f97ffb90a004d78137074fa6da"


@given(st.data())
def test_the_order_of_the_body_and_of_message_members_does_not_matter(data: st.DataObject) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"}
    parts = [shuffled(message["content"][0], data.draw)]  # type: ignore[index]
    body = {"messages": [message], "temperature": 0.5, "max_tokens": 5, "x": {"deep": 1}}
    other = shuffled({**body, "messages": [shuffled({**message, "content": parts}, data.draw)]}, data.draw)
    assert key(Endpoint.CHAT, body) == key(Endpoint.CHAT, other)


def test_the_order_that_the_model_sees_matters() -> None:
    """xgrammar makes the model write a schema's properties in their order; templates print tools as they come."""

    def schema(*names: str) -> dict[str, Any]:
        properties = {name: {"type": "string"} for name in names}
        return {"type": "json_schema", "json_schema": {"name": "s", "schema": {"properties": properties}}}

    assert chat_key(response_format=schema("reason", "answer")) != chat_key(response_format=schema("answer", "reason"))
    assert chat_key(response_format={"const": 1.0}) != chat_key(response_format={"const": 1})


@given(endpoints, json_values)
def test_white_space_and_escapes_of_the_wire_do_not_matter(endpoint: Endpoint, value: Any) -> None:
    body = {**BODIES[endpoint], "x": value}
    try:
        compact, spaced = json.dumps(body, ensure_ascii=False), json.dumps(body, indent=3, ensure_ascii=True)
        assert key(endpoint, json.loads(compact)) == key(endpoint, json.loads(spaced))
    except ValueError:
        assert why_uncacheable(call(endpoint, body), WEIGHTS) is not None


@pytest.mark.parametrize("endpoint", Endpoint)
def test_ignored_fields_do_not_matter(endpoint: Endpoint) -> None:
    base = key(endpoint, BODIES[endpoint])
    for name in FIELDS[endpoint].ignored | EXTRAS_IGNORED[endpoint]:
        for value in ("x", 1, None, {"a": 1}, True):
            assert key(endpoint, {**BODIES[endpoint], name: value}) == base, name


@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_field_that_says_the_default_is_as_good_as_absent(endpoint: Endpoint) -> None:
    kinds = FIELDS[endpoint]
    as_absent = {**kinds.keyed, **{name: values for name, (_, values) in kinds.uncacheable.items()}}
    for name, values in as_absent.items():
        body = {k: v for k, v in BODIES[endpoint].items() if k != name}
        for value in values:
            assert key(endpoint, {**body, name: value}) == key(endpoint, body), (name, value)
    for name, neutral in kinds.sampled.items():
        body = {k: v for k, v in BODIES[endpoint].items() if k != name}
        for value in (None, WEIGHTS.sampling_defaults.get(name, neutral)):
            assert key(endpoint, {**body, name: value}) == key(endpoint, body), (name, value)


@pytest.mark.parametrize("endpoint", Endpoint)
def test_every_keyed_field_matters(endpoint: Endpoint) -> None:
    kinds = FIELDS[endpoint]
    names = [*kinds.keyed, *kinds.sampled, *kinds.ruled, *kinds.uncacheable]
    for name in names:
        for value in ("other", 0.37, 123, ["other"], {"other": 1}):
            assert key(endpoint, {**BODIES[endpoint], name: value}) != key(endpoint, BODIES[endpoint]), (name, value)
    every = {key(endpoint, {**BODIES[endpoint], name: "other"}) for name in names if name not in BODIES[endpoint]}
    aliases = {"max_tokens", "max_completion_tokens"} <= kinds.ruled
    assert len(every) == len([name for name in names if name not in BODIES[endpoint]]) - aliases


@given(endpoints, st.text(min_size=1), json_values)
def test_what_nobody_knows_matters(endpoint: Endpoint, name: str, value: Any) -> None:
    kinds = FIELDS[endpoint]
    known = {*kinds.ignored, *kinds.keyed, *kinds.sampled, *kinds.ruled, *kinds.uncacheable, *EXTRAS_IGNORED[endpoint]}
    body = {**BODIES[endpoint], name: value}
    if name not in known and why_uncacheable(call(endpoint, body), WEIGHTS) is None:
        assert key(endpoint, body) != key(endpoint, BODIES[endpoint])


def test_tenant_weights_settings_and_endpoint_matter() -> None:
    body = BODIES[Endpoint.CHAT]
    other_weights = dataclasses.replace(WEIGHTS, digest="e" * 64)
    other_settings = dataclasses.replace(WEIGHTS, settings_digest="6" * 64)
    keys = {
        key(Endpoint.CHAT, body),
        key(Endpoint.CHAT, body, tenant="u"),
        key(Endpoint.CHAT, body, weights=other_weights),
        key(Endpoint.CHAT, body, weights=other_settings),
        key(Endpoint.COMPLETIONS, body),
        key(Endpoint.MESSAGES, body),
    }
    assert len(keys) == 6


def test_who_and_where_from_do_not_matter() -> None:
    one = call(Endpoint.CHAT, BODIES[Endpoint.CHAT], request_id="1")
    two = dataclasses.replace(one, request_id="2", caller=Caller(tenant="other", key_id="k", is_admin=True))
    moved = dataclasses.replace(WEIGHTS, path="/elsewhere", created=1, max_model_len=8)
    assert cache_key(one, WEIGHTS, tenant="t") == cache_key(two, moved, tenant="t")


@pytest.mark.parametrize(
    ("one", "two"),
    [("1", 1), (True, 1), (False, 0), ([], {}), (None, "null"), ("", None), ("[]", []), ("1.0", "1"), ([1], [True])],
)
def test_values_of_another_type_are_other_values(one: Any, two: Any) -> None:
    assert chat_key(x=one) != chat_key(x=two)
    assert chat_key(x={"y": one}) != chat_key(x={"y": two})


def test_whole_numbers_are_one_number_in_plain_fields() -> None:
    assert chat_key(temperature=0) == chat_key(temperature=0.0) == chat_key(temperature=-0.0)
    assert chat_key(max_tokens=5) == chat_key(max_tokens=5.0)


def test_unicode_normal_forms_are_different_texts() -> None:
    text = "Ångström ﬁne"
    forms = {unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")}
    assert len({chat_key(messages=[{"role": "user", "content": form}]) for form in forms}) == len(forms) > 2


def test_a_clients_field_cannot_pass_for_one_of_ours() -> None:
    body = BODIES[Endpoint.CHAT]
    ours = canonical(call(Endpoint.CHAT, body), WEIGHTS, tenant="t")
    keys = {key(Endpoint.CHAT, {**body, name: value}) for name, value in ours.items()}
    assert len(keys | {key(Endpoint.CHAT, body)}) == len(ours) + 1
    assert key(Endpoint.CHAT, {**body, "tenant": "u"}) != key(Endpoint.CHAT, body, tenant="u")
    assert chat_key(messages=ours["texts"]["messages"]) != chat_key()  # the text itself, as a string


@given(st.text(), st.text())
def test_two_texts_have_two_keys(one: str, two: str) -> None:
    assert (chat_key(x=one) == chat_key(x=two)) == (one == two)
    assert (chat_key(x=[one, two]) == chat_key(x=[two, one])) == (one == two)


@given(endpoints, st.dictionaries(st.text(), json_values, max_size=6))
def test_the_key_is_the_digest_of_the_rfc_8785_bytes(endpoint: Endpoint, extras: dict[str, Any]) -> None:
    """The fast way of writing the form down gives the very bytes of the reference."""
    asked = call(endpoint, {**extras, **BODIES[endpoint]})
    if why_uncacheable(asked, WEIGHTS) is None:
        form = canonical(asked, WEIGHTS, tenant="t\x1f\x7f\u2028é")
        assert json.loads(json.dumps(form)) == form
        assert cache_key(asked, WEIGHTS, tenant="t\x1f\x7f\u2028é") == sha256(rfc8785.dumps(form)).hexdigest()


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False))
def test_where_the_fast_way_is_taken_it_writes_what_rfc_8785_writes(text: str, number: float) -> None:
    plain = {"text": text, "number": key_module._plain_number(number)}
    if key_module._is_simple(plain, {}):
        assert key_module._encode_plain(plain) == rfc8785.dumps(plain)


@given(endpoints, st.dictionaries(st.sampled_from(["seed", "stop", "x", "messages", "input", "tools"]), json_values))
def test_any_json_has_either_a_reason_or_a_key(endpoint: Endpoint, extras: dict[str, Any]) -> None:
    asked = call(endpoint, {**BODIES[endpoint], **extras})
    if why_uncacheable(asked, WEIGHTS) is None:
        assert len(cache_key(asked, WEIGHTS, tenant="t")) == 64
    is_deterministic(asked, WEIGHTS)


def test_the_call_is_left_as_it_was() -> None:
    body = {**BODIES[Endpoint.CHAT], "max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "text"}]}]}
    before = json.dumps(body)
    key(Endpoint.CHAT, body)
    assert json.dumps(body) == before


def test_tool_choice_defaults_to_auto_with_tools_and_to_none_without() -> None:
    assert chat_key(tool_choice="none") == chat_key() != chat_key(tool_choice="auto")
    assert (
        chat_key(tools=TOOLS, tool_choice="auto") == chat_key(tools=TOOLS) != chat_key(tools=TOOLS, tool_choice="none")
    )
    assert chat_key(tools=TOOLS, tool_choice=None) != chat_key(tools=TOOLS)
    body = BODIES[Endpoint.RESPONSES]
    plain = key(Endpoint.RESPONSES, body)
    assert plain == key(Endpoint.RESPONSES, {**body, "tool_choice": "auto"})
    assert plain == key(Endpoint.RESPONSES, {**body, "tool_choice": "none"})
    with_tools = {**body, "tools": [{"type": "function", "name": "f"}]}
    assert key(Endpoint.RESPONSES, with_tools) == key(Endpoint.RESPONSES, {**with_tools, "tool_choice": "auto"})
    assert key(Endpoint.RESPONSES, with_tools) != key(Endpoint.RESPONSES, {**with_tools, "tool_choice": "none"})


def test_both_names_of_the_chat_token_limit_are_one_field() -> None:
    assert chat_key(max_tokens=5) == chat_key(max_completion_tokens=5) != chat_key(max_tokens=6)
    assert chat_key(max_tokens=5, max_completion_tokens=None) == chat_key(max_completion_tokens=5, max_tokens=None)
    assert chat_key(max_tokens=5) != chat_key(max_tokens=5, max_completion_tokens=6)


@pytest.mark.parametrize("endpoint", [e for e in Endpoint if e is not Endpoint.MESSAGES])
def test_no_model_is_the_served_model(endpoint: Endpoint) -> None:
    body = {k: v for k, v in BODIES[endpoint].items() if k != "model"}
    served = key(endpoint, BODIES[endpoint])
    assert (
        served == key(endpoint, body) == key(endpoint, {**body, "model": None}) == key(endpoint, {**body, "model": ""})
    )
    assert served != key(endpoint, {**body, "model": "another"})


def test_messages_without_a_model_are_not_those_with_one() -> None:
    """Anthropic's API requires it: a hit must not answer what vLLM refuses."""
    body = {k: v for k, v in BODIES[Endpoint.MESSAGES].items() if k != "model"}
    assert key(Endpoint.MESSAGES, body) != key(Endpoint.MESSAGES, BODIES[Endpoint.MESSAGES])


def image(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def source(**members: str) -> dict[str, Any]:
    block = {"type": "tool_result", "content": [{"type": "image", "source": members}]}
    return {"messages": [{"role": "user", "content": [block]}]}


@pytest.mark.parametrize(
    ("endpoint", "fields", "reason"),
    [
        (Endpoint.RESPONSES, {"previous_response_id": "resp_1"}, "stateful"),
        (Endpoint.RESPONSES, {"background": True}, "stateful"),
        (Endpoint.RESPONSES, {"background": None}, "stateful"),
        (Endpoint.RESPONSES, {"background": False, "previous_response_id": None}, None),
        (Endpoint.RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "stateful"),
        (Endpoint.RESPONSES, {"tools": [{"type": "web_search"}]}, "server_tools"),
        (Endpoint.RESPONSES, {"tools": [{"type": "namespace", "tools": [{"type": "mcp"}]}]}, "server_tools"),
        (Endpoint.RESPONSES, {"tools": [{"type": "namespace", "tools": [{"type": "function"}]}]}, None),
        (Endpoint.RESPONSES, {"input": [{"content": [{"type": "input_image", "file_id": "f"}]}]}, "remote_content"),
        (Endpoint.CHAT, {"kv_transfer_params": {}}, "transfer"),
        (Endpoint.CHAT, {"kv_transfer_params": None}, None),
        (Endpoint.MESSAGES, {"ec_transfer_params": {"a": 1}}, "transfer"),
        (Endpoint.CHAT, image("https://example.com/cat.png"), "remote_content"),
        (Endpoint.CHAT, image("file:///tmp/cat.png"), "remote_content"),
        (Endpoint.CHAT, image("data:image/png;base64,AAAA"), None),
        (Endpoint.EMBEDDINGS, {"messages": [image("https://a/b")["messages"]]}, "remote_content"),
        (Endpoint.MESSAGES, source(type="url", url="https://example.com/cat.png"), "remote_content"),
        (Endpoint.MESSAGES, source(type="base64", data="AAAA"), None),
        (Endpoint.CHAT, {"messages": [{"role": "user", "content": "see https://example.com"}]}, None),
        (Endpoint.CHAT, {"messages": [{"content": [{"type": "text", "text": "http://a"}]}]}, None),
        (Endpoint.CHAT, {"messages": [{"content": [{"type": "image_url", "uuid": "u"}]}]}, "stateful"),
        (Endpoint.CHAT, {"stream": True, "stream_options": {"continuous_usage_stats": True}}, "continuous_usage"),
        (Endpoint.CHAT, {"stream": True, "stream_options": {"include_usage": True}}, None),
        (Endpoint.CHAT, {"stream_options": {"include_usage": True}}, "refused"),
        (Endpoint.CHAT, {"stream": True, "prompt_logprobs": 1}, "refused"),
        (Endpoint.CHAT, {"prompt_logprobs": 1}, None),
        (Endpoint.COMPLETIONS, {"stream": True, "use_beam_search": True}, "refused"),
        (Endpoint.COMPLETIONS, {"stream": 1}, "refused"),
        (Endpoint.RESPONSES, {"stream": "yes"}, "refused"),
        (Endpoint.EMBEDDINGS, {"encoding_format": "bytes"}, "binary"),
        (Endpoint.EMBEDDINGS, {"encoding_format": "base64"}, None),
        (Endpoint.CHAT, {"seed": 2**53}, "number_out_of_range"),
        (Endpoint.CHAT, {"seed": 2**53 - 1}, None),
        (Endpoint.CHAT, {"x": {"y": [float("nan")]}}, "number_out_of_range"),
        (Endpoint.CHAT, {"temperature": float("inf")}, "number_out_of_range"),
        (Endpoint.CHAT, {"x": {"y": 2**70}}, None),
        (Endpoint.CHAT, {"x": "\ud800"}, "not_encodable"),
    ],
)
def test_some_calls_are_kept_apart(endpoint: Endpoint, fields: dict[str, Any], reason: str | None) -> None:
    assert why_uncacheable(call(endpoint, {**BODIES[endpoint], **fields}), WEIGHTS) == reason


def test_a_body_too_deep_to_write_down_is_kept_apart() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert why_uncacheable(call(Endpoint.CHAT, {"x": deep}), WEIGHTS) == "not_encodable"


@pytest.mark.parametrize(
    ("endpoint", "fields", "expected"),
    [
        (Endpoint.CHAT, {"temperature": 0}, True),
        (Endpoint.CHAT, {"temperature": 0.0}, True),
        (Endpoint.CHAT, {"temperature": 1e-6}, False),
        (Endpoint.CHAT, {"temperature": "0"}, False),
        (Endpoint.CHAT, {"temperature": False}, False),
        (Endpoint.CHAT, {"temperature": None}, False),
        (Endpoint.CHAT, {}, False),
        (Endpoint.CHAT, {"seed": 0}, True),
        (Endpoint.CHAT, {"seed": -1}, False),
        (Endpoint.CHAT, {"seed": True}, False),
        (Endpoint.CHAT, {"seed": 1, "use_beam_search": True}, False),
        (Endpoint.RESPONSES, {"seed": 1}, True),
        (Endpoint.MESSAGES, {"seed": 1}, False),
        (Endpoint.MESSAGES, {"temperature": 0}, True),
        (Endpoint.EMBEDDINGS, {}, True),
    ],
)
def test_greedy_and_seeded_calls_are_deterministic(endpoint: Endpoint, fields: dict[str, Any], expected: bool) -> None:
    assert is_deterministic(call(endpoint, fields), WEIGHTS) is expected


def test_a_greedy_generation_config_makes_calls_greedy() -> None:
    greedy = dataclasses.replace(WEIGHTS, sampling_defaults={"temperature": 0.0})
    plain = dataclasses.replace(WEIGHTS, sampling_defaults={})
    assert is_deterministic(call(Endpoint.CHAT, {}), greedy)
    assert not is_deterministic(call(Endpoint.CHAT, {"temperature": 0.5}), greedy)
    assert not is_deterministic(call(Endpoint.CHAT, {}), plain)
