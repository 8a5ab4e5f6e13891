"""A page of somebody else in a developer's browser: it reads nothing and asks for nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.gate.keys import KeyFile
from tests.conftest import Running, chat

PATH = "/v1/chat/completions"
EVIL, OURS = "https://evil.example.com", "https://chat.example.com"


def test_a_foreign_page_may_not_use_a_server_without_keys(server: Running) -> None:
    with server.client() as client:
        for origin in (EVIL, "null", "http://127.0.0.1:9", "http://localhost", "chrome-extension://abc", "file://"):
            for _ in range(2):  # also what would be a hot hit
                response = client.post(PATH, json=chat(), headers={"origin": origin})
                assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
                assert "access-control-allow-origin" not in response.headers
        plain = client.post(PATH, content=b'{"model":"scripted"}', headers={"content-type": "text/plain"})
        assert plain.status_code == 415, "what a page may send without asking first"
    assert server.engine.calls == []


def test_our_own_page_and_programs_may(server: Running) -> None:
    with server.client() as client:
        assert client.post(PATH, json=chat()).status_code == 200
        assert client.post(PATH, json=chat(), headers={"origin": server.url}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example.com", "evil.example.com:8000", "127.0.0.1.example.com", "a.b"])
def test_a_domain_that_was_pointed_here_is_not_served(server: Running, host: str) -> None:
    """DNS rebinding: for the browser the page and the server are of one origin."""
    with server.client() as client:
        headers = {"host": host, "origin": f"http://{host}"}
        for path in (PATH, "/v1/models", "/docs"):
            method = "POST" if path == PATH else "GET"
            response = client.request(method, path, json=chat() if method == "POST" else None, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")
        assert client.get("/v1/models", headers={"host": host}).status_code == 403


@pytest.mark.parametrize(
    "host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "192.168.1.5:80", "refrain", "a.localhost"]
)
def test_addresses_and_local_names_are(server: Running, host: str) -> None:
    with server.client() as client:
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_more_names_by_setting(serve: Callable[..., Running]) -> None:
    server = serve(allowed_hosts="llm.example.com")
    with server.client() as client:
        assert client.get("/v1/models", headers={"host": "LLM.example.com:80"}).status_code == 200
        assert client.get("/v1/models", headers={"host": "example.com"}).status_code == 403


def test_cors_is_closed_by_default(server: Running) -> None:
    asking = {"origin": EVIL, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    with server.client() as client:
        for path in (PATH, "/v1/models", "/healthz"):
            response = client.options(path, headers=asking)
            assert response.status_code >= 400
            assert not [name for name in response.headers if name.startswith("access-control-")]


def test_pages_of_an_allowed_origin_may_use_and_read(serve: Callable[..., Running]) -> None:
    server = serve(cors_origins=f"{OURS}, http://localhost:3000")
    asking = {
        "origin": OURS,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    with server.client() as client:
        allowed = client.options(PATH, headers=asking)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == OURS
        assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in allowed.headers
        for stream in (False, True, False):
            response = client.post(PATH, json=chat(stream=stream), headers={"origin": OURS})
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == OURS
            readable = {name.strip() for name in response.headers["access-control-expose-headers"].split(",")}
            own = {name for name in response.headers if name.startswith("x-") and name not in NOT_FOR_PAGES}
            assert own <= readable
        refused = client.post(PATH, json={}, headers={"origin": OURS})
        assert refused.headers["access-control-allow-origin"] == OURS, "a page must be able to read its error"
        assert client.options(PATH, headers=asking | {"origin": EVIL}).status_code == 400
        assert "access-control-allow-origin" not in client.post(PATH, json=chat(), headers={"origin": EVIL}).headers


NOT_FOR_PAGES = {"x-content-type-options", "x-accel-buffering"}


def test_with_keys_an_origin_alone_opens_and_closes_nothing(serve: Callable[..., Running], tmp_path) -> None:
    secret, _ = KeyFile(tmp_path / "keys.json").create("acme")
    page = {"origin": EVIL, "host": "llm.example.com"}
    with serve().client(headers=page) as client:
        assert client.post(PATH, json=chat()).status_code == 401
        with_key = client.post(PATH, json=chat(), headers={"authorization": f"Bearer {secret}"})
    assert with_key.status_code == 200
    assert "access-control-allow-origin" not in with_key.headers
