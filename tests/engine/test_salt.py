"""Who may share answers shares prefixes in the engine, and nobody else: else the first token's time would tell."""

from __future__ import annotations

from typing import Any

from app.domain import Call, Caller, Endpoint
from app.engine.vllm import _salted


def salt(tenant: str, key: str | None = None, *, scope: str = "tenant", **fields: Any) -> Any:
    body = {"messages": []} | fields
    salted = _salted(Call(Endpoint.CHAT, body, Caller(tenant, key), ""), scope)
    assert body == {"messages": []} | fields, "the call's own body stays as it is"
    return salted.get("cache_salt")


def test_tenants_are_apart_and_their_keys_together() -> None:
    assert salt("a", "k1") == salt("a", "k2") != salt("b", "k1")
    assert salt("a") is not None


def test_the_scope_of_answers_is_that_of_prefixes() -> None:
    assert salt("a", "k1", scope="key") != salt("a", "k2", scope="key")
    assert salt("a", scope="global") is None


def test_a_salt_of_the_clients_own_sets_apart_still_more() -> None:
    assert salt("a", cache_salt="x") == salt("a", cache_salt="x")
    assert len({salt("a", cache_salt="x"), salt("a", cache_salt="y"), salt("a"), salt("b", cache_salt="x")}) == 4
    assert salt("a", cache_salt="\ud800") is not None


def test_what_is_no_salt_is_left_for_vllm_to_refuse() -> None:
    assert salt("a", cache_salt="") == ""
    assert salt("a", cache_salt=5) == 5
