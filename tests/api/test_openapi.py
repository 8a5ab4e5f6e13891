"""`/openapi.json` and `/docs`: current, complete, true to vLLM's models, and without another host."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator

from app.api import openapi
from app.api.docs import mount_docs
from app.domain import Endpoint

DOCUMENT: dict[str, Any] = json.loads(openapi.PATH.read_text(encoding="utf-8"))
OPERATIONS = [
    pytest.param(path, method, operation, id=f"{method} {path}")
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
]
ROUTES = {
    "post /v1/chat/completions",
    "post /v1/completions",
    "post /v1/responses",
    "get /v1/responses/{response_id}",
    "post /v1/responses/{response_id}/cancel",
    "get /v1/streams/{stream_id}",
    "post /v1/messages",
    "post /v1/messages/count_tokens",
    "post /v1/embeddings",
    "get /v1/models",
    "get /v1/models/{model_id}",
    "post /tokenize",
    "post /detokenize",
    "get /version",
    "get /healthz",
    "get /readyz",
    "get /metrics",
    "get /admin/cache",
    "post /admin/cache/purge",
    "get /admin/models",
    "post /admin/models/reload",
    "post /admin/models/adapters",
    "delete /admin/models/adapters/{name}",
    "post /admin/drain",
    "get /admin/usage",
}


def test_the_file_is_what_the_models_say_today() -> None:
    """If this fails: `python -m app.api.openapi`, and look at what changed."""
    assert openapi.render(openapi.build()) == openapi.PATH.read_text(encoding="utf-8")


def test_every_route_is_described() -> None:
    assert {f"{method} {path}" for path, item in DOCUMENT["paths"].items() for method in item} == ROUTES
    assert set(Endpoint) <= set(DOCUMENT["paths"])
    ids = [operation.values[2]["operationId"] for operation in OPERATIONS]
    assert len(ids) == len(set(ids))


def test_every_reference_leads_somewhere_and_every_schema_is_used() -> None:
    targets = set(references(DOCUMENT))
    for target in targets:
        assert resolve(target) is not None, target
    named = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    assert named - targets == set()


def test_every_schema_is_one() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        assert "__" not in name


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_every_operation_says_what_it_takes_and_gives(path: str, method: str, operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert operation["tags"][0] in {tag["name"] for tag in DOCUMENT["tags"]}
    assert ("requestBody" in operation) == (method == "post" and not path.endswith(("cancel", "reload", "drain")))
    responses = {status: resolved(response) for status, response in operation["responses"].items()}
    assert "200" in responses
    for status, response in responses.items():
        assert response["content"], status
        assert "x-request-id" in response["headers"]
        if status != "200" and path != "/readyz":
            example = response["content"]["application/json"]["example"]
            assert set(example) == {"error", "type", "request_id"}
    expected = {"400", "401", "404", "405", "408", "413", "410", "415", "422", "429", "500", "503", "504"}
    if path in set(Endpoint):
        assert set(responses) == {"200", *expected}
        assert {"x-cache", "age", "x-cache-key", "x-weights", "server-timing"} <= set(responses["200"]["headers"])


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_every_example_fits_its_schema(path: str, method: str, operation: dict[str, Any]) -> None:
    bodies = [operation["requestBody"]] if "requestBody" in operation else []
    bodies += [resolved(response) for response in operation["responses"].values()]
    for body in bodies:
        for media_type, content in body["content"].items():
            values = [content["example"]] if "example" in content else []
            values += [example["value"] for example in content.get("examples", {}).values()]
            assert values, (path, media_type)
            for value in values:
                check(content["schema"], value)
            if media_type == "text/event-stream":
                check_events(content["schema"]["x-event-schema"], content["example"])


WIRE = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "x"},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "42"},
            ],
            "stop": ["a", "b"],
            "logit_bias": {"11": 1.5},
            "n": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "metadata": {"a": "b"},
            "cache": {"max_age": 5},
            "unknown": [1],
        },
    ),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": None, "cache": None}),
    (
        "/v1/responses",
        {
            "input": [
                {"role": "user", "content": "Hi"},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "42"},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And?"}]},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}],
        },
    ),
    (
        "/v1/messages",
        {
            "model": "m",
            "max_tokens": 5,
            "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "42"}]},
            ],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "cache": {"no_store": True},
        },
    ),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64", "cache": {"no_cache": True}}),
    ("/v1/embeddings", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("/tokenize", {"prompt": "Hi"}),
]


@pytest.mark.parametrize(("path", "body"), WIRE)
def test_what_clients_send_fits_the_schemas(path: str, body: dict[str, Any]) -> None:
    """vLLM fills in some members before it validates; the description must not ask clients for them."""
    check(request_schema(path), body)
    vllm_accepts(path, body)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "cache": {"no_cash": True}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": "many"}),
        ("/v1/completions", {"max_tokens": 5}),
        ("/v1/messages", {"messages": []}),
        ("/admin/cache/purge", {}),
        ("/admin/cache/purge", {"everything": True}),
    ],
)
def test_what_is_wrong_does_not_fit_the_schemas(path: str, body: dict[str, Any]) -> None:
    assert list(validator(request_schema(path)).iter_errors(body))


def test_the_pages_need_no_engine_and_no_other_host() -> None:
    with client() as http:
        page = http.get("/docs")
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "unsafe-eval" not in page.headers["content-security-policy"]
        assert "script-src 'self';" in page.headers["content-security-policy"]
        assert "://" not in page.text
        assert "<script>" not in page.text
        for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png", "docs.js", "docs.css"):
            assert f"docs/static/{name}" in page.text
            assert http.get(f"/docs/static/{name}").status_code == 200


def test_swagger_ui_is_recent_enough_for_openapi_3_1() -> None:
    with client() as http:
        bundle = http.get("/docs/static/swagger-ui-bundle.js").text
    version = bundle.partition('PACKAGE_VERSION:"')[2].partition('"')[0]
    assert int(version.split(".")[0]) >= 5


def test_the_document_is_served_whole_and_packed() -> None:
    with client() as http:
        plain = http.get("/openapi.json", headers={"accept-encoding": "identity"})
        packed = http.get("/openapi.json", headers={"accept-encoding": "gzip"})
    assert plain.json() == packed.json() == DOCUMENT
    assert plain.headers["content-type"] == "application/json"
    assert "content-encoding" not in plain.headers
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 5


def test_the_root_leads_people_to_the_docs_and_tells_programs() -> None:
    with client() as http:
        person = http.get("/", headers={"accept": "text/html,*/*"}, follow_redirects=False)
        assert (person.status_code, person.headers["location"]) == (307, "docs")
        told = http.get("/", headers={"accept": "*/*"}).json()
        assert told["docs"] == "/docs"
        assert http.head("/").status_code == 200
        assert http.post("/docs").status_code == 405


def client() -> TestClient:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    mount_docs(app)
    return TestClient(app)


def resolve(target: str) -> Any:
    found: Any = DOCUMENT
    for step in target.removeprefix("#/").split("/"):
        found = found[step]
    return found


def resolved(value: Any) -> Any:
    return resolve(value["$ref"]) if "$ref" in value else value


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "$ref" and isinstance(inner, str):
                yield inner
            elif name == "mapping" and isinstance(inner, dict):
                yield from (each for each in inner.values() if isinstance(each, str))
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def request_schema(path: str) -> dict[str, Any]:
    schema: dict[str, Any] = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return schema


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator(schema | {"components": DOCUMENT["components"]})


def check(schema: dict[str, Any], value: Any) -> None:
    validator(schema).validate(value)


def check_events(schema: dict[str, Any], text: str) -> None:
    for event in text.removesuffix("\n\n").split("\n\n"):
        data = event.splitlines()[-1].removeprefix("data: ")
        if data != "[DONE]":
            check(schema, json.loads(data))


def vllm_accepts(path: str, body: dict[str, Any]) -> None:
    from pydantic import TypeAdapter

    name = request_schema(path)["$ref"].rpartition("/")[2]
    TypeAdapter(openapi._theirs()[name]).validate_python(
        json.loads(json.dumps({k: v for k, v in body.items() if k != "cache"}))
    )
