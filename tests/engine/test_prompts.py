"""How many tokens a prompt has, before it is answered: what limits reserve and trimming measures is what is used."""

from __future__ import annotations

from typing import Any

import pytest

from app import counting
from app.domain import Endpoint
from app.gate.economy import trimmed
from tests.conftest import Process
from tests.engine.conftest import CHAT, MODEL

pytestmark = pytest.mark.engine

TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look it up.", "parameters": {"type": "object"}},
}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France? Größe: 5 €"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Spain?"},
]


class Asked:
    """The running server's tokenizer, in the engine's place."""

    def __init__(self, server: Process) -> None:
        self._server = server

    async def tokens(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._server.client() as client:
            response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (Endpoint.CHAT, {"messages": TALK}),
        (Endpoint.CHAT, {"messages": TALK[1:2]}),
        (Endpoint.CHAT, {"messages": TALK, "tools": [TOOL], "tool_choice": "none"}),
        (Endpoint.MESSAGES, {"system": "Be brief.", "messages": TALK[1:]}),
    ],
)
async def test_a_prompt_counted_beforehand_has_the_tokens_that_the_engine_computes(
    engine_server: Process, endpoint: Endpoint, body: dict[str, Any]
) -> None:
    body = body | {"model": MODEL, "max_tokens": 1, "temperature": 0}
    with engine_server.client() as client:
        usage = client.post(endpoint.value, json=body).json()["usage"]
    used = usage.get("prompt_tokens") or usage["input_tokens"]
    assert await counting.exactly(endpoint, body, Asked(engine_server)) == used  # type: ignore[arg-type]
    assert used <= counting.at_most(body)


async def test_an_over_long_chat_is_refused_with_its_tokens_and_trimmed_to_what_fits(engine_server: Process) -> None:
    old = [{"role": "user", "content": f"Tell me about the number {number}. " * 40} for number in range(60)]
    body = {"model": MODEL, "messages": [TALK[0], *old, TALK[3]], "max_tokens": 4, "temperature": 0}
    count = Asked(engine_server)

    async def tokens(of: dict[str, Any]) -> int:
        return await counting.exactly(Endpoint.CHAT, of, count)  # type: ignore[arg-type]

    whole = await tokens(body)
    with engine_server.client() as client:
        refused = client.post(CHAT, json=body)
        error = refused.json()["error"]
        longest = client.get("/v1/models").json()["data"][0]["max_model_len"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert f"maximum context length is {longest} tokens" in error["message"]
    assert f"resulted in {whole} tokens" in error["message"]
    short = await trimmed(body, 1000, longest, tokens)
    assert await tokens(short.body) == whole - short.tokens <= 1000
    assert short.body["messages"][0] == TALK[0]
    assert short.body["messages"][-1] == TALK[3]
    one_more = [TALK[0], *old[short.turns - 1 :], TALK[3]]
    assert await tokens(body | {"messages": one_more}) > 1000, "no more was left out than had to be"
