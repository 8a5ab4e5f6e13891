"""What the cache did for whom: by endpoint, model and reason, in `/metrics`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import MODEL, Running, chat, until
from tests.flight.asking import CHAT, Asking, boarded, on_loop, script_of


def count(running: Running, name: str, **labels: str) -> float:
    with running.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_hits_misses_and_what_they_saved_are_counted_by_endpoint_and_model(server: Running) -> None:
    asked = {"endpoint": "chat", "model": MODEL}
    before = {status: count(server, "refrain_calls_total", cache=status, **asked) for status in ("miss", "hit")}
    saved = count(server, "refrain_tokens_saved_total", kind="completion", model=MODEL)
    seconds = count(server, "refrain_generation_seconds_saved_total", model=MODEL)
    with server.client() as client:
        for _ in range(3):
            client.post(CHAT, json=chat(max_tokens=7)).raise_for_status()
    assert count(server, "refrain_calls_total", cache="miss", **asked) == before["miss"] + 1
    assert count(server, "refrain_calls_total", cache="hit", **asked) == before["hit"] + 2
    assert count(server, "refrain_tokens_saved_total", kind="completion", model=MODEL) == saved + 14
    assert count(server, "refrain_generation_seconds_saved_total", model=MODEL) > seconds


def test_a_bypass_is_counted_with_its_endpoint_and_its_reason(server: Running) -> None:
    def bypassed(reason: str) -> float:
        return count(server, "refrain_cache_bypass_total", endpoint="completions", model=MODEL, reason=reason)

    before, total = bypassed("not_deterministic"), count(server, "refrain_calls_total", cache="bypass")
    with server.client() as client:
        client.post("/v1/completions", json={"prompt": "hi", "temperature": 1}).raise_for_status()
    assert bypassed("not_deterministic") == before + 1
    assert count(server, "refrain_calls_total", cache="bypass") == total + 1


def test_what_is_shared_is_counted_for_its_model_and_nobody_can_make_up_a_label(
    serve: Callable[..., Running],
) -> None:
    running = serve(is_driven=True)
    before = count(running, "refrain_calls_total", endpoint="chat", cache="shared", model=MODEL)
    everybody = [Asking(running.url, chat(stream=True)) for _ in range(3)]
    script = script_of(running)
    until(lambda: boarded(running) == 3)
    on_loop(running, script.say, "one ")
    on_loop(running, script.finish)
    for asked in everybody:
        asked.done()
    with running.client() as client:
        assert client.post(CHAT, json=chat(model="made up")).status_code == 404
    assert count(running, "refrain_calls_total", endpoint="chat", cache="shared", model=MODEL) == before + 2
    with running.client() as client:
        assert "made up" not in client.get("/metrics").text
