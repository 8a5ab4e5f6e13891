"""What one tenant stored, no other can name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.errors import NotFound
from app.gate.keys import KeyFile
from app.gate.owned import check_id, new_id
from tests.conftest import Running


def test_an_id_is_its_tenants_alone() -> None:
    given = new_id("resp_", "acme")
    check_id(given, "resp_", "acme")
    for wrong, tenant in (
        (given, "other"),
        (given[:-1], "acme"),
        (given[:-1] + "é", "acme"),
        ("resp_", "acme"),
        ("", "acme"),
        (given.replace("resp_", "", 1), "acme"),
    ):
        with pytest.raises(NotFound):
            check_id(wrong, "resp_", tenant)
    assert len({new_id("resp_", "acme") for _ in range(100)}) == 100


def test_a_client_neither_chooses_an_id_nor_goes_on_from_anothers(serve: Callable[..., Running], tmp_path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    ours, theirs = (keys.create(tenant)[0] for tenant in ("ours", "theirs"))
    server = serve(responses_store=True)
    with server.client(headers={"authorization": f"Bearer {ours}"}) as client:
        asked = {"model": "scripted", "input": "hi"}
        client.post("/v1/responses", json=asked | {"request_id": "resp_mine", "store": True})
        stored = server.engine.calls[-1].body["request_id"]
        check_id(stored, "resp_", "ours")
        again = client.post("/v1/responses", json=asked | {"previous_response_id": stored})
        assert again.status_code == 200
        assert server.engine.calls[-1].body["request_id"] != stored
        client.post("/v1/responses", json=asked | {"request_id": "resp_mine", "store": False})
        assert "request_id" not in server.engine.calls[-1].body
    count = len(server.engine.calls)
    with server.client(headers={"authorization": f"Bearer {theirs}"}) as client:
        for given in (stored, "resp_nope"):
            response = client.post("/v1/responses", json=asked | {"previous_response_id": given})
            assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
            assert client.get(f"/v1/responses/{given}").status_code == 404
            assert client.post(f"/v1/responses/{given}/cancel").status_code == 404
    assert len(server.engine.calls) == count
