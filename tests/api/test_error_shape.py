"""One shape for every refusal, whoever made it: ours, FastAPI's, Starlette's, the engine's.

```
{
  "error": {"message": "...", "type": "...", "param": null | "...", "code": null | "..."},     OpenAI's clients
  "type": "error", "request_id": "req_..."                                                     Anthropic's clients
}
```
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

import app.errors as errors
from app.domain import Endpoint
from app.engine import Phase
from app.errors import AppError, EngineFailed
from app.gate.keys import KeyFile
from app.gate.owned import new_id
from tests.conftest import Process, RedisServer, Running, chat, make_settings, run_server, start_process, until

CHAT = "/v1/chat/completions"
STORED = new_id("resp_", "default")
OUR_ID = re.compile(r"req_[0-9a-f]{32}")
MESSAGE = {"model": "scripted", "max_tokens": 9, "temperature": 0, "messages": [{"role": "user", "content": "hi"}]}


def assert_canonical_error(response: httpx.Response, status: int, code: str | None, type: str | None = None) -> dict:
    """The whole contract of an error: status, headers, body; returns what is under `error`."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error", "type", "request_id"}
    assert body["type"] == "error"
    assert body["request_id"] == response.headers["x-request-id"]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in response.text
    assert error["code"] == code, error
    assert isinstance(error["type"], str)
    if type is not None:
        assert error["type"] == type
    if status == 503:
        assert int(response.headers["retry-after"]) > 0
    return error


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shared_redis: RedisServer) -> Iterator[Running]:
    """One for all tests that only ask."""
    running = run_server(make_settings(tmp_path_factory.mktemp("s"), shared_redis, scripted_tokens_per_s=2000.0))
    yield running
    running.stop()


@pytest.fixture
def keyed(serve: Callable[..., Running], settings: Any) -> tuple[Running, str, str]:
    """A server with keys: itself, a user's key, an admin's."""
    file = KeyFile(settings.home / "keys.json")
    (user, _), (admin, _) = file.create("shop"), file.create("ops", admin=True)
    return serve(), user, admin


# --- who asks -------------------------------------------------------------------------------------

GUARDED = [
    *[("POST", endpoint.value) for endpoint in Endpoint],
    ("GET", "/v1/models"),
    ("GET", "/v1/models/scripted"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/messages/count_tokens"),
    ("GET", "/v1/responses/resp_1"),
    ("POST", "/v1/responses/resp_1/cancel"),
    ("GET", "/admin/cache"),
    ("POST", "/admin/cache/purge"),
]


def test_every_route_that_serves_asks_for_a_key(keyed: tuple[Running, str, str]) -> None:
    running, user, _ = keyed
    with running.client() as client:
        for method, path in GUARDED:
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": f"Basic {user}"},
                {"authorization": user},
            ):
                response = client.request(method, path, json={} if method == "POST" else None, headers=headers)
                assert_canonical_error(response, 401, "invalid_api_key", "authentication_error")
        for path in ("/healthz", "/readyz", "/metrics", "/version", "/docs", "/openapi.json", "/"):
            assert client.get(path).status_code == 200, path


def test_a_key_in_x_api_key_counts_for_messages_alone(keyed: tuple[Running, str, str]) -> None:
    running, user, _ = keyed
    with running.client(headers={"x-api-key": user}) as client:
        assert client.post("/v1/messages", json=MESSAGE).status_code == 200
        assert client.post("/v1/messages/count_tokens", json=MESSAGE).status_code == 200
        assert_canonical_error(client.post(CHAT, json=chat()), 401, "invalid_api_key")
    with running.client(headers={"x-api-key": "wrong"}) as client:
        assert_canonical_error(client.post("/v1/messages", json=MESSAGE), 401, "invalid_api_key")


def test_admin_routes_need_an_admins_key(keyed: tuple[Running, str, str]) -> None:
    running, user, admin = keyed
    with running.client() as client:
        for method, path in (("GET", "/admin/cache"), ("POST", "/admin/cache/purge")):
            body = {"all": True} if method == "POST" else None
            users = client.request(method, path, json=body, headers={"authorization": f"Bearer {user}"})
            assert_canonical_error(users, 403, "forbidden", "permission_error")
            admins = client.request(method, path, json=body, headers={"authorization": f"Bearer {admin}"})
            assert admins.status_code == 200


def test_on_an_open_server_nobody_is_admin(server: Running) -> None:
    with server.client() as client:
        assert_canonical_error(client.get("/admin/cache"), 401, "invalid_api_key")
        assert_canonical_error(client.post("/admin/cache/purge", json={"all": True}), 401, "invalid_api_key")


# --- what is asked for ----------------------------------------------------------------------------


def test_what_is_not_there_is_a_404(server: Running) -> None:
    with server.client() as client:
        for path in (
            "/nothing",
            "/v1",
            "/v1/chat",
            "/v1/files",
            "/docs/static/nothing.js",
            "/%00",
            "/a%0d%0ab",
            "/" + "x" * 5000,
        ):
            assert_canonical_error(client.get(path), 404, "not_found", "not_found_error")
        for path in ("/v1/models/other", "/v1/models/a/b/c", "/v1/models/%F0%9F%92%A9", "/v1/models/%ff"):
            assert assert_canonical_error(client.get(path), 404, "model_not_found")["param"] == "model"
        for endpoint in (*Endpoint, "/tokenize", "/v1/messages/count_tokens"):
            response = client.post(str(endpoint), json={**MESSAGE, "model": "gpt-4"})
            assert assert_canonical_error(response, 404, "model_not_found")["param"] == "model"
        assert_canonical_error(client.get("/v1/responses/resp_nothing"), 404, "not_found")
        assert_canonical_error(client.post("/v1/responses/resp_nothing/cancel"), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, {"POST"}),
        ("DELETE", "/v1/messages", {"POST"}),
        ("OPTIONS", "/v1/responses", {"POST"}),
        ("PUT", "/tokenize", {"POST"}),
        ("POST", "/v1/models", {"GET"}),
        ("PATCH", "/healthz", {"GET"}),
        ("POST", "/docs", {"GET", "HEAD"}),
        ("POST", "/openapi.json", {"GET", "HEAD"}),
        ("POST", "/docs/static/docs.js", set()),
        ("GET", "/admin/cache/purge", {"POST"}),
        ("DELETE", "/v1/responses/resp_1", {"GET"}),
    ],
)
def test_another_method_is_a_405_that_says_which_are_allowed(
    server: Running, method: str, path: str, allowed: set[str]
) -> None:
    with server.client() as client:
        response = client.request(method, path)
    assert_canonical_error(response, 405, "method_not_allowed", "invalid_request_error")
    if allowed:
        assert set(response.headers["allow"].replace(" ", "").split(",")) == allowed


def test_a_head_of_an_error_has_its_status_and_no_body(server: Running) -> None:
    with server.client() as client:
        response = client.head("/nothing")
        assert (response.status_code, response.content) == (404, b"")
        assert response.headers["x-request-id"]
        assert client.get("/healthz").status_code == 200, "the connection is still of use"


# --- bodies ---------------------------------------------------------------------------------------

TAKES_A_BODY = [CHAT, "/v1/messages", "/tokenize", "/v1/messages/count_tokens"]


@pytest.mark.parametrize("path", TAKES_A_BODY)
@pytest.mark.parametrize(
    "media_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "json", "application/jsonx"]
)
def test_another_content_type_is_a_415(server: Running, path: str, media_type: str | None) -> None:
    headers = {} if media_type is None else {"content-type": media_type}
    with server.client() as client:
        response = client.post(path, content=json.dumps(chat()).encode(), headers=headers)
    assert_canonical_error(response, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "media_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/problem+json"]
)
def test_json_by_any_name_is_json(server: Running, media_type: str) -> None:
    with server.client(headers={"content-type": media_type}) as client:
        assert client.post(CHAT, content=json.dumps(chat()).encode()).status_code == 200


@pytest.mark.parametrize("path", TAKES_A_BODY)
def test_a_body_that_says_it_is_too_large_is_a_413(serve: Callable[..., Running], path: str) -> None:
    running = serve(max_body_bytes=2000)
    with running.client() as client:
        for size in (2001, 100_000, 20_000_000):
            # 20 MB do not fit into the socket's buffers: the answer has to reach a client that is still sending.
            response = client.post(path, content=b" " * size, headers={"content-type": "application/json"})
            assert_canonical_error(response, 413, "request_too_large")
            assert "2000" in response.json()["error"]["message"]
        body = json.dumps({**MESSAGE, "messages": [{"role": "user", "content": ""}]}).encode()
        response = client.post(CHAT, content=body.ljust(2000), headers={"content-type": "application/json"})
        assert response.status_code == 200


@pytest.mark.parametrize("path", TAKES_A_BODY)
@pytest.mark.parametrize("chunks", [30, 20_000])
def test_a_body_that_turns_out_too_large_is_a_413(serve: Callable[..., Running], path: str, chunks: int) -> None:
    running = serve(max_body_bytes=2000)

    def content() -> Iterator[bytes]:
        for _ in range(chunks):
            yield b" " * 1000

    with running.client() as client:
        response = client.post(path, content=content(), headers={"content-type": "application/json"})
        assert_canonical_error(response, 413, "request_too_large")
        assert client.get("/healthz").status_code == 200


def test_a_client_that_asks_before_it_sends_is_refused_at_once(serve: Callable[..., Running]) -> None:
    with raw(serve(max_body_bytes=2000)) as connection:
        connection.send("POST", CHAT, "content-type: application/json", "content-length: 5000", "expect: 100-continue")
        assert_canonical_error(connection.response(), 413, "request_too_large")


@pytest.mark.parametrize("path", TAKES_A_BODY)
def test_a_body_that_does_not_come_is_a_408(serve: Callable[..., Running], path: str) -> None:
    running = serve(body_timeout_s=0.2)
    with raw(running) as connection:
        connection.send("POST", path, "content-type: application/json", "content-length: 500", body=b'{"model": ')
        response = connection.response()
        assert_canonical_error(response, 408, "request_timeout", "timeout_error")
        assert response.headers["connection"] == "close"
        assert connection.is_closed()


def test_a_body_that_comes_drop_by_drop_has_one_deadline(serve: Callable[..., Running]) -> None:
    with raw(serve(body_timeout_s=0.3)) as connection:
        connection.send("POST", CHAT, "content-type: application/json", "transfer-encoding: chunked")
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.05):
                try:
                    connection.socket.sendall(b"1\r\n \r\n")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert_canonical_error(connection.response(), 408, "request_timeout")
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("path", TAKES_A_BODY)
def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_ours(
    server: Running, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    def gone() -> float:
        with server.client() as client:
            found = re.search(r'refrain_http_responses_total\{status="499"\} (\S+)', client.get("/metrics").text)
        return float(found[1]) if found else 0

    before = gone()
    with raw(server) as connection:
        connection.send("POST", path, "content-type: application/json", "content-length: 500", body=b'{"model": ')
    until(lambda: gone() == before + 1)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_fastapis_own_refusal_is_a_400(server: Running) -> None:
    with server.client() as client:
        for query in ("starting_after=x", "stream=perhaps", "starting_after=" + "9" * 5000):
            error = assert_canonical_error(
                client.get(f"/v1/responses/resp_1?{query}"), 400, None, "invalid_request_error"
            )
            assert error["param"] == query.partition("=")[0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 5}, "model"),
        ({"model": ["scripted"]}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"cache": "no"}, "cache"),
        ({"cache": {"nocache": True}}, "cache.nocache"),
        ({"messages": "hello"}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(server: Running, fields: dict, param: str) -> None:
    with server.client() as client:
        error = assert_canonical_error(client.post(CHAT, json=chat() | fields), 400, None, "invalid_request_error")
    assert str(error["param"]).split(".")[0] == param.split(".")[0]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"null", b"\xff", b'{"a": NaN}', b"[" * 100_000])
def test_what_is_no_json_object_is_a_400(server: Running, body: bytes) -> None:
    with server.client(headers={"content-type": "application/json"}) as client:
        for path in TAKES_A_BODY:
            assert_canonical_error(client.post(path, content=body), 400, None, "invalid_request_error")


def test_an_endpoint_that_the_model_cannot_serve_is_a_400(server: Running) -> None:
    with server.client() as client:
        response = client.post("/v1/embeddings", json={"model": "scripted", "input": "hello"})
    assert_canonical_error(response, 400, "unsupported_endpoint")


def test_cache_control_with_an_age_of_5000_digits_is_understood(server: Running) -> None:
    """Python refuses to make an int of it, which was a 500."""
    with server.client(headers={"cache-control": "max-age=" + "9" * 5000}) as client:
        assert [client.post(CHAT, json=chat("old")).headers["x-cache"] for _ in range(2)] == ["miss", "hit"]


# --- what goes wrong behind -----------------------------------------------------------------------

SECRET = "the password is hunter2"


async def _breaks(*_: object, **__: object) -> Any:
    raise RuntimeError(SECRET)


def test_an_unexpected_error_is_a_500_that_tells_nothing(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("answer", "tokens", "stored_response", "cancel_response"):
        monkeypatch.setattr(server.engine, name, _breaks)
    with server.client() as client:
        for response in (
            client.post(CHAT, json=chat("breaks")),
            client.post(CHAT, json=chat("breaks", stream=True)),
            client.post("/v1/messages", json=MESSAGE | {"top_k": 1}),
            client.post("/tokenize", json={"prompt": "x"}),
            client.get(f"/v1/responses/{STORED}"),
            client.post(f"/v1/responses/{STORED}/cancel"),
        ):
            assert_canonical_error(response, 500, "internal_error", "server_error")
            assert "hunter2" not in response.text
            assert "RuntimeError" not in response.text
        assert client.get("/healthz").status_code == 200


def test_an_unexpected_error_inside_a_stream_is_an_error_event(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True, keep_alive_s=0.2)
    with running.client() as client, client.stream("POST", CHAT, json=chat(stream=True)) as response:
        script = next_script(running)
        on_loop(running, script.say, "half an ")
        on_loop(running, script._next.put_nowait, {"not": SECRET})  # what is no word breaks the engine's own code
        text = response.read().decode()
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "internal_error"
    assert last["request_id"] == response.headers["x-request-id"]
    assert "[DONE]" not in text
    assert "hunter2" not in text


def test_an_engine_that_is_not_ready_is_a_503_with_a_time_to_come_back(serve: Callable[..., Running]) -> None:
    running = serve(is_ready=False, loading_wait_s=0.1)
    asks: list[Callable[[httpx.Client], httpx.Response]] = [
        lambda client: client.post(CHAT, json=chat()),
        lambda client: client.post(CHAT, json=chat(stream=True)),
        lambda client: client.post("/tokenize", json={"prompt": "x"}),
        lambda client: client.get(f"/v1/responses/{STORED}"),
    ]
    for phase, code in ((Phase.LOADING, "engine_loading"), (Phase.FAILED, "engine_down"), (Phase.DRAINING, "draining")):
        on_loop(running, running.engine.state.become, phase, "for the test")
        with running.client() as client:
            for ask in asks:
                assert_canonical_error(ask(client), 503, code)
            ready = client.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (503, phase.value)
            assert int(ready.headers["retry-after"]) > 0
            assert ready.json()["error"]["code"] == f"engine_{phase.value}"
            assert ready.json()["request_id"] == ready.headers["x-request-id"]


def test_only_if_cached_without_a_recording_is_a_504(server: Running) -> None:
    with server.client(headers={"cache-control": "only-if-cached"}) as client:
        for body in (chat("never"), chat("never", stream=True), chat(temperature=1)):
            assert_canonical_error(client.post(CHAT, json=body), 504, "not_cached", "not_cached_error")


def test_redis_down_is_a_503_for_the_admin(serve: Callable[..., Running], settings: Any) -> None:
    admin, _ = KeyFile(settings.home / "keys.json").create("ops", admin=True)
    running = serve(redis=None, redis_url="unix:///nowhere/r.sock")
    with running.client(headers={"authorization": f"Bearer {admin}"}) as client:
        assert_canonical_error(client.get("/admin/cache"), 503, "redis_down")
        assert_canonical_error(client.post("/admin/cache/purge", json={"all": True}), 503, "redis_down")


# --- the classes themselves -----------------------------------------------------------------------


def classes_below(base: type) -> list[type]:
    return [base, *(deeper for each in base.__subclasses__() for deeper in classes_below(each))]


@pytest.mark.parametrize("kind", classes_below(AppError), ids=lambda kind: kind.__name__)
def test_every_class_of_the_tree_reaches_the_client_in_the_shape(
    server: Running, monkeypatch: pytest.MonkeyPatch, kind: type[AppError]
) -> None:
    async def refuses(*_: object, **__: object) -> Any:
        raise kind("told to the client", param="messages", retry_after_s=7)

    monkeypatch.setattr(server.engine, "answer", refuses)
    monkeypatch.setattr(server.engine, "tokens", refuses)
    with server.client() as client:
        for response in (
            client.post(CHAT, json=chat("refused")),
            client.post(CHAT, json=chat("refused", stream=True)),
            client.post("/tokenize", json={"prompt": "x"}),
        ):
            error = assert_canonical_error(response, kind.status, kind.code, kind.type)
            assert (error["message"], error["param"]) == ("told to the client", "messages")
            assert response.headers["retry-after"] == "7"


def test_the_docstring_of_the_tree_names_every_class() -> None:
    public = [each for each in classes_below(AppError) if each is not AppError]
    assert [each.__name__ for each in public if each.__name__ not in (errors.__doc__ or "")] == []


@pytest.mark.parametrize("kind", ["stream", "plain"])
def test_the_engines_failure_keeps_its_shape_in_the_middle_of_an_answer(
    serve: Callable[..., Running], kind: str
) -> None:
    running = serve(is_driven=True)
    replies: list[httpx.Response] = []
    with running.client() as client:
        ask = threading.Thread(target=lambda: replies.append(client.post(CHAT, json=chat(stream=kind == "stream"))))
        ask.start()
        half_an_answer(running)
        ask.join()
    (reply,) = replies
    if kind == "plain":
        assert_canonical_error(reply, 500, "engine_error")
        return
    body = json.loads(reply.text.strip().splitlines()[-1].removeprefix("data: "))
    assert set(body) == {"error", "type", "request_id"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["request_id"] == reply.headers["x-request-id"]


# --- request ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ident", ["a", "abc-123", "req_1", "A.b_c:d/e+f=g-h", "x" * 128, "9"])
def test_a_sane_request_id_of_the_client_is_kept(server: Running, ident: str) -> None:
    with server.client(headers={"x-request-id": ident}) as client:
        for response in (
            client.post(CHAT, json=chat()),
            client.get("/v1/models"),
            client.get("/nothing"),
            client.get("/docs"),
        ):
            assert response.headers["x-request-id"] == ident
        assert client.get("/nothing").json()["request_id"] == ident


@pytest.mark.parametrize(
    "ident",
    [b"", b"x" * 129, b"a b", b"a\tb", b"-a", b"<script>", b"a\xffb", "ü".encode(), "\u202e".encode(), b'a"b', b"a;b"],
)
def test_another_one_is_replaced(server: Running, ident: bytes) -> None:
    with raw(server) as connection:
        connection.send("GET", "/nothing", b"x-request-id: " + ident)
        response = connection.response()
    assert_canonical_error(response, 404, "not_found")
    assert OUR_ID.fullmatch(response.headers["x-request-id"])


def test_a_header_smuggled_into_a_request_id_goes_nowhere(server: Running) -> None:
    with raw(server) as connection:
        connection.send("GET", "/nothing", b"x-request-id: a\r\n x-evil: 1")  # a folded line, which HTTP/1.1 gave up
        response = connection.response()
    assert "x-evil" not in response.headers
    assert response.headers.get("x-request-id") != "a"
    with raw(server) as connection:
        connection.send("GET", "/nothing", b"x-request-id: a\rx-evil: 1")
        assert "x-evil" not in connection.response().headers


def test_every_response_has_one_request_id_and_no_two_the_same(server: Running) -> None:
    paths = [
        "/",
        "/docs",
        "/openapi.json",
        "/healthz",
        "/readyz",
        "/metrics",
        "/version",
        "/v1/models",
        "/nothing",
        "/docs/",
    ]
    with server.client() as client:
        responses = [client.get(path) for path in paths] + [
            client.post(CHAT, json=chat(stream=flag)) for flag in (False, True)
        ]
    ids = [response.headers.get_list("x-request-id") for response in responses]
    assert all(len(each) == 1 and OUR_ID.fullmatch(each[0]) for each in ids)
    assert len({each[0] for each in ids}) == len(ids)


# --- what uvicorn answers before there is a request ------------------------------------------------


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The server as it is really run, with its own HTTP protocol class."""
    directory = tmp_path_factory.mktemp("p")
    slow = {"REFRAIN_ENGINE": "scripted", "REFRAIN_SCRIPTED_TOKENS_PER_S": "20"}
    running = start_process(directory / "home", directory / "log", **slow)
    yield running
    assert running.stop() == 0


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET /nothing\x00 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
        b"BREW / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx-request-id: a\rb\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: minus\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS, spoken to a plain port
    ],
)
def test_what_is_not_http_gets_the_shape_too(process: Process, sent: bytes) -> None:
    with raw(process) as connection:
        connection.socket.sendall(sent)
        response = connection.response()
        assert_canonical_error(response, 400, "invalid_http", "invalid_request_error")
        assert OUR_ID.fullmatch(response.headers["x-request-id"])
        assert connection.is_closed()
    with process.client() as client:
        assert client.get("/healthz").status_code == 200


def test_nonsense_behind_a_good_request_does_not_land_in_its_answer(process: Process) -> None:
    # It takes the engine 25 s, so that it is not over when the nonsense comes.
    body = json.dumps(chat("slow", max_tokens=512, stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with raw(process) as connection:
        connection.socket.sendall(head.encode() + body)
        received = connection.socket.recv(65536)
        assert received.startswith(b"HTTP/1.1 200")
        connection.socket.sendall(b"nonsense\r\n\r\n")
        while more := connection.socket.recv(65536):
            received += more
    assert received.count(b"HTTP/1.1") == 1


# --- the official clients understand it -----------------------------------------------------------


def test_openais_client_raises_its_own_exceptions(keyed: tuple[Running, str, str]) -> None:
    running, user, _ = keyed

    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)

    with pytest.raises(openai.AuthenticationError) as unauthenticated:
        client("wrong").models.list()
    assert unauthenticated.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as missing:
        client(user).chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as refused:
        client(user).chat.completions.create(model="scripted", messages="x")  # type: ignore[call-overload]
    assert refused.value.type == "invalid_request_error"


# Anthropic's newest client has no `temperature` any more.
UNTEMPERED = {name: value for name, value in MESSAGE.items() if name != "temperature"}


def test_anthropics_client_raises_its_own_exceptions(keyed: tuple[Running, str, str]) -> None:
    running, user, _ = keyed

    def client(key: str) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=running.url, api_key=key, max_retries=0)

    with pytest.raises(anthropic.AuthenticationError) as unauthenticated:
        client("wrong").messages.create(**UNTEMPERED)
    assert unauthenticated.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    assert OUR_ID.fullmatch(unauthenticated.value.body["request_id"])  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError) as missing:
        client(user).messages.create(**UNTEMPERED | {"model": "claude"})
    assert missing.value.type is not None
    with pytest.raises(anthropic.BadRequestError):
        client(user).messages.create(**UNTEMPERED | {"messages": [{"role": "nobody", "content": 5}]})
    on_loop(running, running.engine.state.become, Phase.FAILED, "for the test")
    with pytest.raises(anthropic.InternalServerError) as down:
        client(user).messages.create(**UNTEMPERED)
    assert down.value.status_code == 503


def test_anthropics_client_sees_a_stream_that_breaks(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True, keep_alive_s=0.2)
    client = anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
    with (  # noqa: PT012 - where it is raised is up to the client
        pytest.raises(anthropic.APIStatusError, match="the engine failed"),
        client.messages.stream(**UNTEMPERED) as stream,
    ):
        half_an_answer(running)
        list(stream)


# --- helpers --------------------------------------------------------------------------------------


class Raw:
    """A connection on which a test may say what no client library would."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, method: str, path: str, *headers: str | bytes, body: bytes = b"") -> None:
        lines = [f"{method} {path} HTTP/1.1".encode(), b"host: x"]
        lines += [header.encode() if isinstance(header, str) else header for header in headers]
        self.socket.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)

    def response(self) -> httpx.Response:
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._more(received)
        head, _, body = received.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = [tuple(line.split(": ", 1)) for line in lines]
        length = int(dict(headers)["content-length"])
        while len(body) < length:
            body += self._more(received + body)
        assert len(body) == length, "more than one response came back"
        return httpx.Response(int(status.split()[1]), headers=headers, content=body)

    def is_closed(self) -> bool:
        return self.socket.recv(1) == b""

    def _more(self, so_far: bytes) -> bytes:
        more = self.socket.recv(65536)
        assert more, f"the connection ended after {so_far!r}"
        return more


def raw(running: Running | Process) -> Raw:
    return Raw(running.url)


def next_script(running: Running) -> Any:
    return until(lambda: None if running.engine.asked.empty() else running.engine.asked.get_nowait())


def half_an_answer(running: Running) -> None:
    script = next_script(running)
    on_loop(running, script.say, "half an ")
    on_loop(running, script.fail, EngineFailed("the engine failed on this call"))


def on_loop(running: Running, function: Callable[..., Any], *arguments: object) -> None:
    """Call it where the server's own code runs, and wait until it has."""

    async def call() -> None:
        function(*arguments)

    asyncio.run_coroutine_threadsafe(call(), running.engine.loop).result(timeout=30)
