"""Other weights into a running server: no call fails, and no answer is ever told, or kept, under a digest not its own.

The scripted engine says its weights' digest as its first word, so a text that contradicts its headers shows.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import main
from app.domain import Weights
from app.engine.scripted import Script, ScriptedEngine
from app.errors import SwapFailed
from app.gate.keys import KeyFile
from app.settings import Settings
from app.weights import Registry
from tests.conftest import RedisServer, Running, chat, make_settings, run_server, until
from tests.sockets import post
from tests.weights.conftest import make_weights, publish

BOT = "bot"
CHAT = "/v1/chat/completions"


class Unloadable(ScriptedEngine):
    """An engine whose weights are not what they should be."""

    async def try_start(self) -> None:
        raise SwapFailed(f"{self._weights.short} does not load: probes are 1.0 apart")


class Endless(ScriptedEngine):
    """An engine that loads and loads."""

    async def try_start(self) -> None:
        await asyncio.Event().wait()


@dataclass
class House:
    """A server on published weights, a registry that a test moves, and every engine that a swap made."""

    running: Running
    registry: Registry
    engines: list[ScriptedEngine]
    admin: str

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.running.url, timeout=30, headers={"authorization": f"Bearer {self.admin}"})

    def ask(self, content: str = "hello", **fields: Any) -> httpx.Response:
        with self.client() as client:
            answer = client.post(CHAT, json=chat(content, model=BOT) | fields)
        assert answer.status_code == 200, answer.text
        assert_one_digest(answer)
        return answer

    def reload(self) -> httpx.Response:
        with self.client() as client:
            return client.post("/admin/models/reload")

    def point(self, digest: str) -> None:
        self.registry.point(BOT, digest, "test")

    def served(self) -> str:
        with self.client() as client:
            return client.get("/v1/models").json()["data"][0]["weights"]


def assert_one_digest(answer: httpx.Response) -> None:
    """Headers, body and the words themselves speak of the same weights."""
    digest = answer.headers["x-weights"].partition("@")[2]
    if answer.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]", answer.text
        chunks = [json.loads(line) for line in lines[:-1]]
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
        marks = {chunk["system_fingerprint"] for chunk in chunks}
    else:
        body = answer.json()
        text, marks = body["choices"][0]["message"]["content"], {body["system_fingerprint"]}
    assert text.split()[0] == digest, (answer.headers, text)
    assert marks == {f"rf_{digest}"}


Build = Callable[..., House]


@pytest.fixture
def house(tmp_path: Path, shared_redis: RedisServer) -> Iterator[Build]:
    started: list[Running] = []

    def build(*, engine: type[ScriptedEngine] = ScriptedEngine, is_driven: bool = False, **values: Any) -> House:
        registry = Registry(tmp_path / "weights")
        a = publish(registry, BOT, 1)
        registry.point(BOT, a)
        admin, _ = KeyFile(tmp_path / "keys.json").create("ops", admin=True)
        values = {"watch_s": 0, "scripted_tokens_per_s": 2000.0, "model": BOT} | values
        settings = make_settings(tmp_path, shared_redis, **values)
        engines: list[ScriptedEngine] = []

        def make(weights: Weights, adapters: list[Weights]) -> ScriptedEngine:
            # The first weights load, so that a pause can go back to them.
            kind = ScriptedEngine if weights.digest == a else engine
            engines.append(kind(settings, weights, adapters=adapters))
            return engines[-1]

        weights = main.find_weights(settings, print)
        sources = replace(main.swap_sources(settings), make=make)
        running = run_server(settings, weights=weights, sources=sources, is_driven=is_driven)
        started.append(running)
        return House(running, registry, engines, admin)

    yield build
    for running in started:
        running.stop()


def test_a_running_server_notices_what_became_current(house: Build) -> None:
    there = house(watch_s=0.05)
    a = there.served()
    assert there.ask().headers["x-weights"] == f"{BOT}@{a[:12]}"
    b = publish(there.registry, BOT, 2)
    there.point(b)
    until(lambda: there.served() == b)
    assert there.ask().headers["x-weights"] == f"{BOT}@{b[:12]}"
    assert there.ask(stream=True).headers["x-weights"] == f"{BOT}@{b[:12]}"
    with there.client() as client:
        told = client.get("/metrics").text
    assert f'refrain_weights_served{{digest="{b[:12]}",name="bot"}} 1.0' in told
    assert a[:12] not in told


def test_after_a_swap_the_same_call_is_a_miss_and_after_rollback_a_hit_at_once(house: Build) -> None:
    there = house()
    a = there.served()
    assert [there.ask().headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
    old = there.ask().json()["choices"]
    b = publish(there.registry, BOT, 2)
    there.point(b)
    told = there.reload().json()
    assert (told["status"], told["way"], told["served"]) == ("swapped", "beside", f"{BOT}@{b[:12]}")
    assert [step["step"] for step in told["steps"]]
    assert [there.ask().headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
    assert there.registry.rollback(BOT).digest == a
    assert there.reload().json()["status"] == "swapped"
    again = there.ask()
    assert (again.headers["x-cache"], again.json()["choices"]) == ("hit", old)
    assert there.reload().json()["status"] == "unchanged"


def test_a_stream_ends_on_the_weights_it_began_with_and_is_kept_under_them(house: Build) -> None:
    there = house(is_driven=True)
    a = there.served()
    first = there.running.engine
    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(there.ask, stream=True)
        script = taken(first)
        on_loop(first, script.say, f"{a[:12]} ")
        b = publish(there.registry, BOT, 2)
        there.point(b)
        assert there.reload().json()["status"] == "swapped"
        assert there.ask().headers["x-weights"] == f"{BOT}@{b[:12]}", "new calls do not wait for old ones"
        assert first.state.phase == "ready", "the old engine lives as long as its last call"
        on_loop(first, script.say, "and on")
        on_loop(first, script.finish)
        assert streaming.result().headers["x-weights"] == f"{BOT}@{a[:12]}"
    until(lambda: first.state.phase == "draining")
    there.registry.rollback(BOT)
    there.reload()
    hit = there.ask()
    assert (hit.headers["x-cache"], hit.json()["choices"][0]["message"]["content"]) == ("hit", f"{a[:12]} and on")


def test_without_room_for_a_second_engine_calls_wait_and_none_fails(house: Build) -> None:
    there = house(is_driven=True, swap="pause")
    a = there.served()
    first = there.running.engine
    with ThreadPoolExecutor(6) as pool:
        known = pool.submit(there.ask, "known")
        answer(first, a)
        assert known.result().headers["x-cache"] == "miss"
        running = pool.submit(there.ask, "running", stream=True)
        script = taken(first)
        on_loop(first, script.say, f"{a[:12]} ")
        b = publish(there.registry, BOT, 2)
        there.point(b)
        swapping = pool.submit(there.reload)
        until(lambda: there.running.app.state.service.holds_calls)
        held = [pool.submit(there.ask, f"held {number}", stream=bool(number % 2)) for number in range(3)]
        assert there.ask("known").headers["x-cache"] == "hit", "hits need no engine"
        with there.client() as client:
            ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["swap"]["status"]) == (200, "running")
        assert not any(each.done() for each in (*held, swapping))
        on_loop(first, script.finish)
        assert running.result().headers["x-weights"] == f"{BOT}@{a[:12]}"
        assert {each.result().headers["x-weights"] for each in held} == {f"{BOT}@{b[:12]}"}
        told = swapping.result().json()
    assert (told["status"], told["way"]) == ("swapped", "pause")
    assert told["held_s"] > 0
    assert first.state.phase == "draining"
    assert len(there.engines) == 1


@pytest.mark.parametrize("way", ["beside", "pause"])
def test_weights_that_do_not_load_leave_the_old_ones_serving(house: Build, way: str) -> None:
    there = house(engine=Unloadable, swap=way)
    a = there.served()
    there.ask()
    b = publish(there.registry, BOT, 2)
    there.point(b)
    refused = there.reload()
    assert refused.status_code == 409
    error = refused.json()["error"]
    assert error["code"] == "swap_failed"
    assert b[:12] in error["message"]
    with there.client() as client:
        ready, told = client.get("/readyz"), client.get("/metrics").text
    assert ready.status_code == 200
    assert ready.json()["swap"]["status"] == "failed"
    assert b[:12] in ready.json()["swap"]["wanted"]
    assert "refrain_swap_failed 1.0" in told
    assert there.ask().headers["x-cache"] == "hit"
    assert there.ask("new").headers["x-weights"] == f"{BOT}@{a[:12]}"
    there.registry.rollback(BOT)
    assert there.reload().json()["status"] == "unchanged"
    with there.client() as client:
        assert "refrain_swap_failed 0.0" in client.get("/metrics").text


def test_weights_that_are_damaged_are_never_started(house: Build) -> None:
    there = house()
    b = publish(there.registry, BOT, 2)
    there.point(b)
    tensors = there.registry.path(BOT, b) / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    refused = there.reload()
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "swap_failed")
    assert "damaged" in refused.json()["error"]["message"]
    assert there.engines == []
    there.ask()


@pytest.mark.parametrize("way", ["beside", "pause"])
def test_a_server_that_stops_in_the_middle_of_a_swap_stops(house: Build, way: str) -> None:
    there = house(engine=Endless, swap=way)
    there.point(publish(there.registry, BOT, 2))
    with ThreadPoolExecutor(2) as pool:

        def post(path: str, **body: Any) -> httpx.Response:
            with there.client() as client:
                return client.post(path, **body)

        asking = [pool.submit(post, "/admin/models/reload")]
        until(lambda: there.engines)
        if way == "pause":
            asking.append(pool.submit(post, CHAT, json=chat("meanwhile", model=BOT)))
            until(lambda: len(there.running.server.server_state.tasks) == 2)  # it has arrived
        there.running.stop()
        told = [each.result() for each in asking]
    assert [(each.status_code, each.json()["error"]["code"]) for each in told] == [(503, "draining")] * len(told)
    assert there.running.engine.state.phase == "draining"


def test_a_swap_goes_on_when_who_asked_for_it_leaves(house: Build) -> None:
    there = house(engine=Endless)
    there.point(publish(there.registry, BOT, 2))
    url = httpx.URL(there.running.url)
    with socket.create_connection((url.host, url.port)) as leaving:
        leaving.sendall(post("/admin/models/reload", b"", authorization=f"Bearer {there.admin}"))
        until(lambda: there.engines)
    until(lambda: not there.running.server.server_state.connections)  # it knows that nobody waits
    with there.client() as client:
        assert client.get("/admin/models").json()["swap"]["status"] == "running"
    there.ask()


@pytest.mark.parametrize("way", ["beside", "pause"])
def test_no_text_contradicts_its_digest_however_often_weights_are_swapped(house: Build, way: str) -> None:
    """Streams and bodies, misses and hits, while the weights change all the time."""
    there = house(swap=way)
    digests = [there.served(), publish(there.registry, BOT, 2)]
    over = threading.Event()
    seen: list[str] = []

    def ask(number: int) -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            # Few questions, so that most are hits; some are generated anew all the same.
            anew = {"cache": {"no_cache": True}} if turn % 3 == 0 else {}
            seen.append(there.ask(f"q{turn % 5}", stream=bool(number % 2), **anew).headers["x-weights"])

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, number) for number in range(8)]
        try:
            for turn in range(20):
                digest = digests[1 - turn % 2]
                there.point(digest)
                assert there.reload().json()["status"] == "swapped"
                # However slow they are, somebody has been answered by each of the two.
                name = f"{BOT}@{digest[:12]}"
                until(lambda name=name: name in seen or any(each.done() for each in asking))
        finally:
            over.set()
        for each in asking:
            each.result()
    assert set(seen) == {f"{BOT}@{digest[:12]}" for digest in digests}
    until(lambda: all(each.state.phase == "draining" for each in [there.running.engine, *there.engines[:-1]]))


async def test_a_call_planned_before_the_switch_is_planned_anew_or_keeps_its_own_engine() -> None:
    """A swap between plan and generate: the key, the header and the engine change together, or not at all."""
    from app.cache.policy import NONE
    from app.domain import Call, Caller, Endpoint
    from app.main import create_service
    from app.serving import Catalog, Serving
    from tests.conftest import WEIGHTS

    settings = Settings(engine="scripted")
    old, new = WEIGHTS, replace(WEIGHTS, digest="c" * 64)
    service = create_service(settings, old)
    call = Call(Endpoint.CHAT, chat(), Caller(), "test")
    before = service.plan(call, NONE)
    assert await service.up_to_date(call, before) is before
    with before.serving.hold():
        service.catalog = Catalog(Serving(new, ScriptedEngine(settings, new)))
        before.serving.retire()
        after = await service.up_to_date(call, before)
        assert after.serving.weights is new
        assert before.slot
        assert after.slot
        assert after.slot.key != before.slot.key
        leaving = asyncio.create_task(before.serving.left())
        await asyncio.sleep(0)
        assert not leaving.done()
    await asyncio.wait_for(leaving, 5)


def test_adapters_are_models_of_their_own_that_come_and_go(house: Build, tmp_path: Path) -> None:
    there = house(max_adapters=1)
    base = there.served()
    adapter = publish_adapter(there.registry, "polite", base)
    there.registry.point("polite", adapter)
    other = publish_adapter(there.registry, "rude", base, seed=6)
    there.registry.point("rude", other)
    stray = publish_adapter(there.registry, "stray", "f" * 64, seed=7)
    there.registry.point("stray", stray)
    with there.client() as client:

        def load(name: str) -> httpx.Response:
            return client.post("/admin/models/adapters", json={"name": name})

        assert client.post(CHAT, json=chat(model="polite")).json()["error"]["code"] == "model_not_found"
        assert load("polite").json()["adapter"] == f"polite@{adapter[:12]}"
        assert load("polite").status_code == 200, "again is nothing new"
        for name, part in [("rude", "places"), ("stray", "is an adapter of"), ("no", "no weights"), (BOT, "no LoRA")]:
            refused = load(name)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_failed"), name
            assert part in refused.json()["error"]["message"]
        cards = client.get("/v1/models").json()["data"]
        assert [(card["id"], card["weights"]) for card in cards] == [(BOT, base), ("polite", adapter)]
        assert cards[1]["parent"] == BOT
        assert client.get("/v1/models/polite").json()["base"] == base
        for model, digest in [(BOT, base), ("polite", adapter)]:
            first, second = (there.ask(model=model) for _ in range(2))
            assert [first.headers["x-cache"], second.headers["x-cache"]] == ["miss", "hit"], "each has its own answers"
            assert first.headers["x-weights"] == f"{model}@{digest[:12]}"
            assert first.json()["model"] == model
        newer = publish_adapter(there.registry, "polite", base, seed=8)
        there.registry.point("polite", newer)
        assert load("polite").json()["adapter"] == f"polite@{newer[:12]}"
        changed = there.ask(model="polite")
        assert (changed.headers["x-cache"], changed.headers["x-weights"]) == ("miss", f"polite@{newer[:12]}")
        assert client.delete("/admin/models/adapters/polite").status_code == 200
        assert client.delete("/admin/models/adapters/polite").status_code == 404
        assert client.post(CHAT, json=chat(model="polite")).status_code == 404
        assert load("rude").status_code == 200, "its place is free again"


def test_adapters_of_other_weights_leave_with_their_base(house: Build) -> None:
    there = house(max_adapters=2)
    there.registry.point("polite", publish_adapter(there.registry, "polite", there.served()))
    with there.client() as client:
        client.post("/admin/models/adapters", json={"name": "polite"})
    b = publish(there.registry, BOT, 2)
    there.point(b)
    there.reload()
    with there.client() as client:
        assert [row["name"] for row in client.get("/admin/models").json()["served"]] == [BOT]


def test_swaps_need_an_admin_key(house: Build, tmp_path: Path, serve: Callable[..., Running]) -> None:
    there = house()
    plain, _ = KeyFile(tmp_path / "keys.json").create("shop")
    routes = [
        ("GET", "/admin/models"),
        ("POST", "/admin/models/reload"),
        ("POST", "/admin/models/adapters"),
        ("DELETE", "/admin/models/adapters/x"),
    ]
    for method, path in routes:
        url = there.running.url + path
        assert httpx.request(method, url).status_code == 401
        headers = {"authorization": f"Bearer {plain}"}
        until(
            lambda url=url, method=method, headers=headers: (
                httpx.request(method, url, headers=headers).status_code == 403
            )
        )


def taken(engine: ScriptedEngine) -> Script:
    """The next call that a driven engine was asked, from another thread."""
    return asyncio.run_coroutine_threadsafe(engine.asked.get(), engine.loop).result(30)


def on_loop(engine: ScriptedEngine, function: Callable[..., None], *arguments: object) -> None:
    """Scripts are not thread-safe; their queue lives in the server's loop."""
    engine.loop.call_soon_threadsafe(function, *arguments)


def answer(engine: ScriptedEngine, digest: str) -> None:
    script = taken(engine)
    on_loop(engine, script.say, f"{digest[:12]} ")
    on_loop(engine, script.finish)


def publish_adapter(registry: Registry, name: str, base: str, seed: int = 5) -> str:
    with registry.stage(name) as staged:
        make_weights(staged, seed)
        return registry.publish(staged, name, {"kind": "test"}, kind="adapter", base=base).digest
