"""What one recording serves, against the real engine's own answer to each call: rule by rule."""

from __future__ import annotations

import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import httpx
import pytest

from tests.conftest import until
from tests.engine.conftest import ANEW, CHAT, MODEL, ONLY_CACHED, chat, metric, payloads

pytestmark = pytest.mark.engine

ANTHEM = [{"role": "user", "content": "Write three short lines about the sea, each with one emoji."}]
MADE_UP = {"id", "created"}
UNSAVED = {"Cache-Control": "no-cache, no-store"}


def told(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return {name: value for name, value in response.json().items() if name not in MADE_UP}


def pieces(stream: str) -> list[str]:
    """The text of a stream of any endpoint. Each piece ends where a token does; on a busy machine it is of several."""
    texts: list[Any] = []
    for each in payloads(stream):
        if isinstance(each, dict):
            choices = [
                choice.get("text") or choice.get("delta", {}).get("content") for choice in each.get("choices", ())
            ]
            texts += choices or [each.get("delta")]
    return [text for each in texts if (text := each.get("text") if isinstance(each, dict) else each)]


def smaller_limits(http: httpx.Client, path: str, body: dict) -> int:
    """How many a recording can serve: those where one of its pieces ends."""
    return len(pieces(http.post(path, json=body | {"stream": True}, headers=ONLY_CACHED).text)) - 1


def own_answer(http: httpx.Client, path: str, body: dict) -> dict[str, Any]:
    """The engine's, without the cache."""
    return told(http.post(path, json=body, headers=UNSAVED))


@pytest.mark.parametrize("first_streams", [True, False])
def test_a_longer_answer_serves_every_smaller_limit_as_the_engine_would(
    http: httpx.Client, first_streams: bool
) -> None:
    """Text, finish reason and usage, at every limit; emoji are several tokens that are one character."""
    body = chat(messages=ANTHEM, max_tokens=24, user=str(first_streams))
    assert http.post(CHAT, json=body | {"stream": first_streams}, headers=ANEW).headers["x-cache"] == "miss"
    served = 0
    for limit in range(1, 24):
        cut = http.post(CHAT, json=body | {"max_tokens": limit}, headers=ONLY_CACHED)
        if cut.status_code == 504:  # its boundary is not known; then it is not served
            continue
        served += 1
        assert told(cut) == own_answer(http, CHAT, body | {"max_tokens": limit}), limit
        stream = http.post(CHAT, json=body | {"max_tokens": limit, "stream": True}, headers=ONLY_CACHED).text
        assert "".join(pieces(stream)) == cut.json()["choices"][0]["message"]["content"]
        assert payloads(stream)[-2]["choices"][0]["finish_reason"] == "length"
    assert served == smaller_limits(http, CHAT, body) > 0


def test_a_longer_completion_serves_smaller_limits_too(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "The sea is", "temperature": 0, "max_tokens": 20}
    http.post("/v1/completions", json=body, headers=ANEW)
    served = set()
    for limit in (*range(1, 20), None):
        shorter = {name: value for name, value in body.items() if name != "max_tokens"}
        shorter |= {"max_tokens": limit} if limit else {}
        cut = http.post("/v1/completions", json=shorter, headers=ONLY_CACHED)
        if cut.status_code == 504:  # its boundary is not known; then it is not served
            continue
        served.add(limit)
        assert told(cut) == own_answer(http, "/v1/completions", shorter), limit
    assert (None in served) == (16 in served), "absent means 16"
    assert len(served - {None}) == smaller_limits(http, "/v1/completions", body) > 0


def asked_in(path: str, **fields: Any) -> dict[str, Any]:
    """The anthem, in the words of Messages or of Responses."""
    if path == "/v1/messages":
        return chat(messages=ANTHEM) | fields
    return {"model": MODEL, "input": ANTHEM, "temperature": 0, "store": False} | fields


def nameless(answer: dict[str, Any]) -> dict[str, Any]:
    """Without the time, and what each answer makes up for its items."""
    items = [item | {"id": None} for item in answer.get("output", ())]
    return answer | ({"created_at": None, "output": items} if items else {})


@pytest.mark.parametrize("first_streams", [True, False])
@pytest.mark.parametrize(
    ("path", "limit_name"), [("/v1/messages", "max_tokens"), ("/v1/responses", "max_output_tokens")]
)
def test_messages_and_responses_are_cut_as_the_engine_would_end_them(
    http: httpx.Client, path: str, limit_name: str, first_streams: bool
) -> None:
    """Body and stream at every limit: text, stop reason or status, usage, and all else."""
    mark = {"top_p": 0.9 + 0.01 * first_streams}
    body = asked_in(path, **mark, **{limit_name: 16})
    assert http.post(path, json=body | {"stream": first_streams}, headers=ANEW).headers["x-cache"] == "miss"
    assert nameless(told(http.post(path, json=body, headers=ONLY_CACHED))) == nameless(own_answer(http, path, body))
    served = 0
    for limit in range(1, 16):
        shorter = body | {limit_name: limit}
        cut = http.post(path, json=shorter, headers=ONLY_CACHED)
        if cut.status_code == 504:  # its boundary is not known; then it is not served
            continue
        served += 1
        assert nameless(told(cut)) == nameless(own_answer(http, path, shorter)), limit
        stream = http.post(path, json=shorter | {"stream": True}, headers=ONLY_CACHED).text
        own = http.post(path, json=shorter | {"stream": True}, headers=UNSAVED).text
        assert "".join(pieces(stream)) == "".join(pieces(own))
        assert kinds(stream) == kinds(own)
        assert ending(stream) == ending(own)
    assert served == smaller_limits(http, path, body) > 0


def kinds(stream: str) -> list[str]:
    """What comes after what; how many tokens come in one delta is the machine's to say."""
    return [kind for kind, _ in groupby(each["type"] for each in payloads(stream))]


def ending(stream: str) -> list[Any]:
    """What the last events say, made-up names and their numbers aside."""
    return [_anonymous(each) for each in payloads(stream)[-2:]]


def _anonymous(event: dict[str, Any]) -> dict[str, Any]:
    made_up: dict[str, Any] = {"sequence_number": None}
    if "response" in event:
        made_up["response"] = nameless(event["response"]) | {"id": None}
    if "item" in event:
        made_up["item"] = event["item"] | {"id": None}
    return event | made_up


def test_responses_that_ended_by_themselves_serve_the_limits_from_there_on_as_the_engine_tells_them(
    http: httpx.Client,
) -> None:
    """The body repeats the limit: the one that was asked for, or what the model has room for."""
    body = asked_in("/v1/responses") | {"input": "What is the capital of Germany?"}
    for first in (body, body | {"top_p": 0.98, "max_output_tokens": 60}):
        ended = http.post("/v1/responses", json=first, headers=ANEW).json()
        assert ended["status"] == "completed"
        length = ended["usage"]["output_tokens"]
        for limit in (length, length + 1, 60):
            served = http.post("/v1/responses", json=first | {"max_output_tokens": limit}, headers=ONLY_CACHED)
            own = own_answer(http, "/v1/responses", first | {"max_output_tokens": limit})
            assert nameless(told(served)) == nameless(own), limit
        beyond = ended["max_output_tokens"] + 1
        refused = http.post("/v1/responses", json=first | {"max_output_tokens": beyond}, headers=ONLY_CACHED)
        assert refused.status_code == 504, "what the engine would tell is not known"


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_an_answer_that_ended_by_itself_serves_every_limit_from_there_on(http: httpx.Client, path: str) -> None:
    body = chat(max_tokens=40)
    ended = http.post(path, json=body, headers=ANEW).json()
    usage = ended["usage"]
    length = usage.get("completion_tokens") or usage["output_tokens"]
    assert length < 40
    for limit in (length, length + 1, 41, 1000):
        served = http.post(path, json=body | {"max_tokens": limit}, headers=ONLY_CACHED)
        assert told(served) == own_answer(http, path, body | {"max_tokens": limit}), limit
    too_much = http.post(path, json=body | {"max_tokens": 10**6}, headers=ONLY_CACHED)
    assert too_much.status_code == 504, "whether that may be asked is the engine's to say"


def test_a_stop_string_at_the_limit_is_an_end_by_itself(http: httpx.Client) -> None:
    body = chat(stop=["Germany"], max_tokens=30)
    length = http.post(CHAT, json=body, headers=ANEW).json()["usage"]["completion_tokens"]
    for limit in (length, length + 5):
        served = http.post(CHAT, json=body | {"max_tokens": limit}, headers=ONLY_CACHED)
        assert told(served) == own_answer(http, CHAT, body | {"max_tokens": limit}), limit
    assert http.post(CHAT, json=body | {"max_tokens": length - 1}, headers=ONLY_CACHED).status_code == 504


def test_more_choices_serve_fewer(http: httpx.Client) -> None:
    body = chat(n=4, temperature=0.8, seed=7, max_tokens=12)
    http.post(CHAT, json=body, headers=ANEW)
    for n in (1, 2, 3):
        served = http.post(CHAT, json=body | {"n": n}, headers=ONLY_CACHED)
        assert told(served) == own_answer(http, CHAT, body | {"n": n}), n
    assert http.post(CHAT, json=body | {"n": 5}, headers=ONLY_CACHED).status_code == 504


def test_an_answer_with_log_probabilities_serves_one_without(http: httpx.Client) -> None:
    plain = chat(max_tokens=8, top_p=0.99)
    body = plain | {"logprobs": True, "top_logprobs": 2}
    for stream in (True, False):
        http.post(CHAT, json=body | {"stream": stream}, headers=ANEW)
        assert told(http.post(CHAT, json=plain, headers=ONLY_CACHED)) == own_answer(http, CHAT, plain)
    assert http.post(CHAT, json=body | {"top_logprobs": 3}, headers=ONLY_CACHED).status_code == 504


def test_sixty_four_at_once_are_one_generation(http: httpx.Client) -> None:
    """By the engine's own counter; half of them stream, and they come over two seconds."""
    question = f"Tell me about rivers, please. ({secrets.token_hex(4)})"
    body = chat(messages=[{"role": "user", "content": question}], max_tokens=64)
    before = metric(http, "vllm:request_success_total")

    def ask(number: int) -> str:
        time.sleep(number / 32)  # they come one after the other
        response = many.post(CHAT, json=body | {"stream": bool(number % 2)})
        if number % 2:
            return "".join(pieces(response.text))
        return response.json()["choices"][0]["message"]["content"]

    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=http.base_url, timeout=240, limits=limits) as many, ThreadPoolExecutor(64) as pool:
        texts = set(pool.map(ask, range(64)))
    assert len(texts) == 1
    until(lambda: metric(http, "vllm:request_success_total") > before)
    assert metric(http, "vllm:request_success_total") - before == 1
