"""Refrain on Ray Serve, really run: two doors, a killed replica, other weights, more and fewer replicas."""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from app.cluster import replica as rooms
from app.cluster.replica import Replica
from app.cluster.scaling import by_calls
from app.engine import Phase
from app.errors import EngineDown, StartRefused
from app.gate.keys import KeyFile
from app.main import find_weights
from app.settings import Settings
from app.weights import Registry
from benchmarks.ray_local import LONGEST_S
from benchmarks.servers import free_port
from tests.conftest import REPOSITORY, RedisServer, Running, until
from tests.deploy.ray_cluster import BOT, Cluster, started
from tests.flight.asking import CHAT
from tests.weights.conftest import publish

pytestmark = [
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20:ray"),
    pytest.mark.filterwarnings("ignore:.*metrics_interval_s"),  # Ray's default of 10 s has no other way yet
]

FOLDER = REPOSITORY / "deploy" / "ray"


@pytest.fixture(scope="module")
def cluster(shared_redis: RedisServer) -> Iterator[Cluster]:
    with started(shared_redis) as running:
        yield running


@pytest.fixture(scope="module")
def two(cluster: Cluster) -> Cluster:
    cluster.deploy(num_replicas=2)
    cluster.wait_running(2)
    return cluster


def body(content: str, tokens: int = 16, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": tokens} | fields


def text_of(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


class Stream:
    """A client that goes on with `Last-Event-ID`, on a new connection, whenever its stream is cut."""

    def __init__(self, url: str, headers: dict[str, str], asked: dict[str, Any]) -> None:
        self.text, self.cuts, self.is_whole = "", 0, False
        self._url, self._headers, self._asked = url, headers, asked | {"stream": True}
        self._seen: dict[str, str] = {}

    def run(self) -> Stream:
        deadline = time.monotonic() + 120
        with httpx.Client(base_url=self._url, timeout=60, headers=self._headers) as client:
            while not self.is_whole:
                assert time.monotonic() < deadline, f"not whole after {self.cuts} cuts: {self.text!r}"
                try:
                    self._read(client)
                except httpx.TransportError:
                    self.cuts += 1
                    time.sleep(0.1)
        return self

    def _read(self, client: httpx.Client) -> None:
        with client.stream("POST", CHAT, json=self._asked, headers=self._seen) as response:
            assert response.status_code == 200, response.read()
            ident = ""
            for line in response.iter_lines():
                if line.startswith("id: "):
                    ident = line[4:]
                elif line.startswith("data: "):
                    self._take(line[6:])
                    self._seen = {"last-event-id": ident}

    def _take(self, data: str) -> None:
        self.is_whole = data == "[DONE]"
        if not self.is_whole:
            event = json.loads(data)
            assert "error" not in event, event
            self.text += "".join(each["delta"].get("content") or "" for each in event["choices"])


def test_either_door_streams_and_what_came_by_one_is_a_hit_at_the_other(two: Cluster) -> None:
    by_ray = Stream(two.rays, two.headers, body("by ray")).run()
    with httpx.Client(headers=two.headers, timeout=60) as client:
        again = client.post(f"{two.url}{CHAT}", json=body("by ray"))
        assert (again.headers["x-cache"], text_of(again)) == ("hit", by_ray.text)
        miss = client.post(f"{two.url}{CHAT}", json=body("at its own port"))
        assert miss.headers["x-cache"] == "miss"
        assert Stream(two.rays, two.headers, body("at its own port")).run().text == text_of(miss)
        assert client.get(f"{two.url}/readyz").json()["status"] == "ready"
    assert httpx.post(f"{two.rays}{CHAT}", json=body("no key"), timeout=60).status_code == 401


def test_a_replica_killed_under_load_gives_no_wrong_answer_and_its_streams_go_on_at_the_other(
    two: Cluster, serve: Callable[..., Running]
) -> None:
    victim, other = two.wait_running(2)
    # Five seconds each: the first to begin has not ended when the last one has begun.
    asked = [body(f"question {number}", 200) for number in range(16)]
    streams = [Stream(two.url, two.headers, each) for each in asked]
    with ThreadPoolExecutor(len(streams)) as pool:
        running = [pool.submit(each.run) for each in streams]
        until(lambda: all(each.text for each in streams))
        victim.send_signal(signal.SIGKILL)
        for each in running:
            each.result()
    assert 0 < sum(each.cuts > 0 for each in streams) < len(streams), "the kernel gave all to one replica"
    # What another server says, that has seen none of this.
    weights = find_weights(Settings(engine="scripted", home=two.home, model=f"{BOT}@{two.digests[0]}"), lambda _: None)
    alone = serve(weights=weights, cache="off", scripted_tokens_per_s=20_000.0)
    with alone.client() as client:
        assert [each.text for each in streams] == [text_of(client.post(CHAT, json=each)) for each in asked]
    now = two.wait_running(2)  # Ray starts another
    assert other in now
    assert victim not in now


class Asking:
    """Clients that call in turn, each time for something new, until they are left; answers and failures are kept."""

    def __init__(self, cluster: Cluster, tokens: int = 4, clients: int = 1) -> None:
        self.answers: list[httpx.Response] = []
        self.failed: list[Exception] = []
        self._cluster, self._tokens = cluster, tokens
        self._numbers = itertools.count()
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Asking:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for each in self._threads:
            each.join(60)

    def _ask(self) -> None:
        # A connection for each call, so that the kernel deals them out to the replicas.
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(headers=self._cluster.headers, timeout=60, limits=limits) as client:
            while not self._ends.is_set():
                asked = body(f"{id(self)} {next(self._numbers)}", self._tokens)
                try:
                    self.answers.append(client.post(f"{self._cluster.url}{CHAT}", json=asked))
                except httpx.HTTPError as error:
                    self.failed.append(error)

    def check(self) -> None:
        """Every call was answered."""
        assert self.failed == []
        assert self.answers
        assert [each.text for each in self.answers if each.status_code != 200] == []


def test_other_weights_come_into_running_replicas_and_no_call_fails(two: Cluster) -> None:
    before = {each.pid for each in two.wait_running(2)}
    first, second = two.digests

    def served() -> set[str]:
        return {
            httpx.get(f"{two.url}/readyz", timeout=60).json()["model"].partition("@")[2] for _ in range(12)
        }  # a connection each

    with Asking(two) as asking:
        two.deploy(num_replicas=2, user_config={"model": f"{BOT}@{second}"})
        until(lambda: served() == {second[:12]}, LONGEST_S)
        answered = len(asking.answers)
        until(lambda: len(asking.answers) > answered + 1)  # the one under way then, and another
    asking.check()
    for each in asking.answers:  # no answer speaks of other weights than its header
        assert text_of(each).startswith(each.headers["x-weights"].partition("@")[2][:12])
    assert {each.headers["x-weights"].partition("@")[2][:12] for each in asking.answers} >= {second[:12]}
    # What cannot be served leaves what is.
    two.deploy(num_replicas=2, user_config={"model": f"{BOT}@{'f' * 64}"})
    assert served() == {second[:12]}
    two.deploy(num_replicas=2, user_config={"model": f"{BOT}@{first}"})
    until(lambda: served() == {first[:12]}, LONGEST_S)
    assert {each.pid for each in two.replicas()} == before


def test_replicas_are_replaced_one_after_the_other_and_no_call_fails(two: Cluster) -> None:
    before = {each.pid for each in two.wait_running(2)}
    with Asking(two) as asking:
        two.deploy(num_replicas=2, speed=50.0)
        after = {each.pid for each in two.wait_running(2)}
    assert not before & after
    asking.check()


def test_replicas_are_added_under_load_and_taken_away_after_it_and_no_call_fails(two: Cluster) -> None:
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 4,
        "upscale_delay_s": 0.2,
        "downscale_delay_s": 0.5,
        "metrics_interval_s": 0.2,
        "look_back_period_s": 1.0,
        "policy": {"policy_function": "app.cluster.scaling:by_calls"},
    }
    two.deploy(autoscaling_config=scaling, speed=50.0)
    two.wait_running(1)
    # Each call takes seconds, so that eight run at any moment: a client that is slow to ask again is not less load.
    with Asking(two, tokens=200, clients=8) as asking:
        two.wait_running(2)
    two.wait_running(1)
    asking.check()


@pytest.fixture
def given(tmp_path: Path, shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(rooms.logs, "configure", lambda **_: None)
    return {"engine": "scripted", "home": str(tmp_path), "redis_url": shared_redis.url, "port": free_port()}


def test_replicas_without_a_redis_of_all_or_without_keys_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(StartRefused, match="keys create"):
        Replica(given)
    KeyFile(Path(given["home"]) / "keys.json").create("t")
    Replica(given)
    del given["redis_url"]
    with pytest.raises(StartRefused, match="REFRAIN_REDIS_URL"):
        Replica(given)


async def test_ray_is_told_when_the_engine_or_the_port_is_gone_and_not_when_weights_are_refused(
    given: dict[str, Any],
) -> None:
    home = Path(given["home"])
    KeyFile(home / "keys.json").create("t")
    digest = publish(Registry(home / "weights"), BOT, 1)
    one = Replica(given | {"model": f"{BOT}@{digest}"})
    with pytest.raises(StartRefused, match="port"):
        await one.reconfigure({"port": 1})
    await one.reconfigure({})
    await one.check_health()
    await one.reconfigure({"model": f"{BOT}@{'f' * 64}"})
    assert one._app.state.swapper.is_failed
    await one.check_health()
    assert await one.record_autoscaling_stats() == {"calls": 0}
    engine = one._app.state.service.engine
    engine.state.become(Phase.FAILED, "it died too often")
    with pytest.raises(EngineDown, match="too often"):
        await one.check_health()
    await one.drain()
    with pytest.raises(EngineDown, match="ended"):
        await one.check_health()


@pytest.mark.parametrize(("told", "wanted"), [({}, 3), ({"a": 0.0}, 1), ({"a": 4.0, "b": 5.0}, 3), ({"a": 8.0}, 2)])
def test_there_are_as_many_replicas_as_calls_need(told: dict[str, float], wanted: int) -> None:
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 4)
    context = SimpleNamespace(aggregated_metrics={"calls": told}, target_num_replicas=3, config=config)
    assert by_calls(context) == (wanted, {})


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every application of every file, those inside the manifest too."""
    for file in sorted(FOLDER.glob("*.yaml")):
        for each in yaml.safe_load_all(file.read_text()):
            if each.get("kind", "RayService") == "RayService":
                inner = yaml.safe_load(each["spec"]["serveConfigV2"]) if "kind" in each else each
                yield file.name, inner


CONFIGS = list(configs())


def test_every_config_fits_rays_schema_and_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    from app.cluster.application import build

    assert {name for name, _ in CONFIGS} == {"scripted.yaml", "cpu.yaml", "gpu.yaml", "rayservice.yaml"}
    for name, config in CONFIGS:
        read = ServeDeploySchema.model_validate(config)
        for application in read.applications:
            assert application.import_path == "app.cluster.application:build", name
            environment = (application.runtime_env or {}).get("env_vars", {})
            assert {each for each in environment if each.startswith("REFRAIN_")} <= {
                f"REFRAIN_{each.upper()}" for each in Settings.model_fields
            }
            build(application.args)
            assert [each.name for each in application.deployments] == ["refrain"], name


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_the_manifests_pods_and_service_fit_kubernetes_own_schemas(version: str) -> None:
    ray_service, service = yaml.safe_load_all((FOLDER / "rayservice.yaml").read_text())
    kubernetes_validate.validate(service, version, strict=True)
    cluster = ray_service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}} | group["template"]
        kubernetes_validate.validate(pod, version, strict=True)
    assert service["spec"]["selector"]["ray.io/group"] == groups[1]["groupName"]
    ports = {each["name"] for each in groups[1]["template"]["spec"]["containers"][0]["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in ports
