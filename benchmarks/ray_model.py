"""Two replicas of the real engine on Ray Serve: both doors, a kill, more and fewer, other weights; every text checked.

In float32, where a greedy answer does not depend on what else is in the batch: so each answer can be held against what
the weights that its header names said alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from app.domain import Weights
from app.gate.keys import KeyFile
from app.weights import Registry
from benchmarks import servers
from benchmarks.ray_local import APP, deploy, ray_running
from benchmarks.report import Report, step, verdict

PHYSICS = """\
Two engines on two cores are no faster than one: nothing here is about speed. It is about what becomes of calls while
replicas come, go, die and change their weights under them. What must hold: no call fails, no stream ends before its
end, and no text is another than the one that the weights in its header give."""

BOT, CHAT = "bot", "/v1/chat/completions"
STREAMS, TOKENS, QUESTIONS = 8, 64, 24
PATIENCE_S = 300.0
# Calls in the engines by which `by_calls` asks for one more replica.
TARGET = 3
_QUICK = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass
class Cluster:
    """Ray on this machine, and two sets of weights by which the application can be deployed."""

    args: dict[str, Any]
    proxy: str
    headers: dict[str, str]
    digests: tuple[str, str]

    @property
    def direct(self) -> str:
        return f"http://127.0.0.1:{self.args['port']}"

    def deploy(self, *, digest: str | None = None, **options: Any) -> None:
        """Ask for it; `wait` waits for it."""
        user_config = {"model": f"{BOT}@{digest}"} if digest else {}
        deploy(self.args, is_waited_for=False, user_config=user_config, **options)

    def wait(self, replicas: int) -> float:
        """Seconds until so many run and nothing else is under way."""
        return until(lambda: self._running() == replicas and len(self.processes()) == replicas)

    def _running(self) -> int:
        from ray import serve

        application = serve.status().applications.get(APP)
        if application is None or application.status != "RUNNING":
            return 0
        states = application.deployments["refrain"].replica_states
        return int(states.get("RUNNING", 0)) if set(states) == {"RUNNING"} else 0

    def processes(self) -> list[psutil.Process]:
        """Those that listen at the replicas' own port."""
        return [each for each in psutil.Process().children(recursive=True) if _listens(each, self.args["port"])]

    def served(self) -> set[str]:
        """Digests that are answered from, by several connections."""
        return {httpx.get(f"{self.direct}/readyz").json()["model"].partition("@")[2] for _ in range(12)}


@dataclass
class Stream:
    """A client that goes on with `Last-Event-ID`, on a new connection, whenever its stream is cut."""

    cluster: Cluster
    question: str
    url: str
    text: str = ""
    weights: str = ""
    cuts: int = 0
    broken: list[str] = field(default_factory=list)
    is_whole: bool = False
    first_s: float = 0.0

    def run(self) -> Stream:
        began, seen = time.monotonic(), ""
        while not self.is_whole and not self.broken:
            if time.monotonic() - began > PATIENCE_S:
                self.broken.append(f"not whole after {self.cuts} cuts: {self.text!r}")
                break
            headers = self.cluster.headers | ({"last-event-id": seen} if seen else {})
            try:
                with httpx.stream("POST", f"{self.url}{CHAT}", json=self._asked, headers=headers, timeout=60) as got:
                    if got.status_code != 200:
                        got.read()
                        self.broken.append(f"{got.status_code} {got.text}")
                        break
                    self.weights = got.headers["x-weights"].partition("@")[2]
                    seen = self._read(got.iter_lines(), seen, began)
            except httpx.TransportError:
                self.cuts += 1
                time.sleep(0.2)
        return self

    @property
    def _asked(self) -> dict[str, Any]:
        return asked(self.question) | {"stream": True}

    def _read(self, lines: Iterator[str], seen: str, began: float) -> str:
        ident = seen
        try:
            for line in lines:
                if line.startswith("id: "):
                    ident = line[4:]
                elif line == "data: [DONE]":
                    self.is_whole = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.broken.append(line)
                        break
                    self.first_s = self.first_s or time.monotonic() - began
                    self.text += "".join(each["delta"].get("content") or "" for each in event["choices"])
                    seen = ident
        except httpx.TransportError:
            self.cuts += 1
            time.sleep(0.2)
        return seen


class Asking:
    """Calls one after the other in a thread of its own, until it is left; what came of each."""

    def __init__(self, cluster: Cluster) -> None:
        self.answers: list[httpx.Response | httpx.TransportError] = []
        self._cluster = cluster
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _ask(self) -> None:
        number = 0
        while not self._ends.is_set():
            # No hits here: each of these questions is asked of the engine again and again.
            body = asked(question(number % QUESTIONS)) | {"cache": {"no_store": True, "no_cache": True}}
            try:
                self.answers.append(
                    httpx.post(
                        f"{self._cluster.direct}{CHAT}", json=body, headers=self._cluster.headers, timeout=PATIENCE_S
                    )
                )
            except httpx.TransportError as error:
                self.answers.append(error)
            number += 1


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    del rounds  # each part is a scene, played once
    settings = {"streams": STREAMS, "tokens": TOKENS, "dtype": "float32", "threads_each": 1, "kv_cache_gib_each": 1}
    report = Report("ray_model", PHYSICS, settings)
    with started() as cluster:
        first, second = cluster.digests
        cluster.deploy(num_replicas=2)
        step(f"two replicas run after {cluster.wait(2):.0f} s")
        alone = {first[:12]: [told(cluster, number) for number in range(QUESTIONS)]}
        scenes = [_doors(cluster, alone), _kill(cluster, alone)]
        if not quick:
            scenes += [_other_weights(cluster, alone, second), _fewer_and_more(cluster, alone)]
    return _tell(report, scenes, save)


# --- scenes ----------------------------------------------------------------------------------


def _doors(cluster: Cluster, alone: dict[str, list[str]]) -> dict[str, Any]:
    """A stream by Ray's proxy, and one at the replicas' own port; each is then a hit at the other."""
    by_ray, own = [Stream(cluster, question(at), url).run() for at, url in ((0, cluster.proxy), (1, cluster.direct))]
    crossed = [
        httpx.post(f"{url}{CHAT}", json=asked(each.question), headers=cluster.headers, timeout=60)
        for each, url in ((by_ray, cluster.direct), (own, cluster.proxy))
    ]
    wrong = [each.broken for each in (by_ray, own) if each.broken]
    wrong += [[each.text] for each in crossed if each.headers.get("x-cache") != "hit"]
    wrong += [[each.text] for at, each in enumerate((by_ray, own)) if each.text != alone[each.weights][at]]
    return scene("both doors", calls=4, wrong=wrong, told=f"first token {by_ray.first_s:.2f} and {own.first_s:.2f} s")


def _kill(cluster: Cluster, alone: dict[str, list[str]]) -> dict[str, Any]:
    """One of two replicas is killed (SIGKILL) while streams run at both."""
    numbers = range(2, 2 + STREAMS)
    streams = [Stream(cluster, question(number), cluster.direct) for number in numbers]
    with ThreadPoolExecutor(STREAMS) as pool:
        running = [pool.submit(each.run) for each in streams]
        until(lambda: all(len(each.text) > 20 for each in streams))
        victim = cluster.processes()[0]
        victim.send_signal(signal.SIGKILL)
        for each in running:
            each.result()
    back_s = cluster.wait(2)
    wrong: list[Any] = [each.broken for each in streams if each.broken]
    wrong += [
        (each.text, expected)
        for each, number in zip(streams, numbers, strict=True)
        if not each.broken and each.text != (expected := alone[each.weights][number])
    ]
    cut = sum(each.cuts > 0 for each in streams)
    told = f"{cut} streams were cut and went on; two replicas again after {back_s:.0f} s"
    return scene("a replica killed", calls=STREAMS, wrong=wrong, told=told)


def _other_weights(cluster: Cluster, alone: dict[str, list[str]], digest: str) -> dict[str, Any]:
    """Other weights come into both replicas while calls are answered."""
    before = {each.pid for each in cluster.processes()}
    with ExitStack() as stack:
        askings = [stack.enter_context(Asking(cluster)) for _ in range(2)]
        until(lambda: all(each.answers for each in askings))
        cluster.deploy(num_replicas=2, digest=digest)
        took_s = until(lambda: cluster.served() == {digest[:12]})
        time.sleep(3)  # some of the new
    alone[digest[:12]] = [told(cluster, number) for number in range(QUESTIONS)]
    wrong, by = checked(askings, alone)
    if {each.pid for each in cluster.processes()} != before:
        wrong.append("the replicas are not those that were there")
    return scene(
        "other weights", calls=sum(by.values()), wrong=wrong, told=f"{took_s:.0f} s; answers by weights {dict(by)}"
    )


def _fewer_and_more(cluster: Cluster, alone: dict[str, list[str]]) -> dict[str, Any]:
    """Autoscaling: one replica when nothing is asked, two under load, one again."""
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": TARGET,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 3.0,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2.0,
        "policy": {"policy_function": "app.cluster.scaling:by_calls"},
    }
    cluster.deploy(autoscaling_config=scaling, digest=cluster.digests[1])
    one_s = cluster.wait(1)
    with ExitStack() as stack:
        askings = [stack.enter_context(Asking(cluster)) for _ in range(2 * TARGET)]
        two_s = cluster.wait(2)
        time.sleep(5)
    again_s = cluster.wait(1)
    wrong, by = checked(askings, alone)
    told = f"one after {one_s:.0f} s, two after {two_s:.0f} s of load, one {again_s:.0f} s after it"
    return scene("1 to 2 to 1", calls=sum(by.values()), wrong=wrong, told=told)


def scene(name: str, *, calls: int, wrong: list[Any], told: str) -> dict[str, Any]:
    step(f"{name}: {calls} calls, {len(wrong)} wrong; {told}")
    for each in wrong[:5]:
        step(f"  wrong: {each}"[:600])
    return {"scene": name, "calls": calls, "wrong": len(wrong), "told": told}


def checked(askings: list[Asking], alone: dict[str, list[str]]) -> tuple[list[Any], Counter[str]]:
    """What is wrong in these answers, and how many each of the weights gave."""
    wrong: list[Any] = []
    by: Counter[str] = Counter()
    for asking in askings:
        for number, each in enumerate(asking.answers):
            if isinstance(each, httpx.TransportError):
                wrong.append(repr(each))
                continue
            digest = each.headers.get("x-weights", "").partition("@")[2]
            by[digest] += 1
            if each.status_code != 200 or text_of(each) != alone[digest][number % QUESTIONS]:
                wrong.append((each.status_code, digest, each.text))
    return wrong, by


# --- asking ----------------------------------------------------------------------------------


def question(number: int) -> str:
    return f"Tell me in some sentences what the number {number} is good for."


def asked(content: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
    }


def told(cluster: Cluster, number: int) -> str:
    """What the weights that are served say when nothing else is asked."""
    body = asked(question(number)) | {"cache": {"no_store": True, "no_cache": True}}
    return text_of(httpx.post(f"{cluster.direct}{CHAT}", json=body, headers=cluster.headers, timeout=PATIENCE_S))


def text_of(response: httpx.Response) -> str:
    return str(response.raise_for_status().json()["choices"][0]["message"]["content"])


def until(is_so: Callable[[], bool]) -> float:
    """Seconds until it is so. Raises TimeoutError after PATIENCE_S."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() - began > PATIENCE_S:
            raise TimeoutError(f"not so after {PATIENCE_S:.0f} s")
        time.sleep(0.1)  # polling: there is nothing to wait on across processes
    return time.monotonic() - began


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        found = process.net_connections(kind="tcp")
    except psutil.Error:  # it has just ended
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in found)


# --- Ray -------------------------------------------------------------------------------------


@contextmanager
def started() -> Iterator[Cluster]:
    os.environ |= _QUICK
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
        _, redis_port = stack.enter_context(servers.valkey(folder))
        secret, _ = KeyFile(folder / "keys.json").create("bench")
        step("publishing two sets of weights")
        digests = _published(Registry(folder / "weights"), servers.weights(step))
        proxy = stack.enter_context(ray_running(folder))
        args = {
            "home": str(folder),
            "model": f"{BOT}@{digests[0]}",
            "redis_url": f"redis://127.0.0.1:{redis_port}/0",
            "port": servers.free_port(),
            "dtype": "float32",
            "compile": False,
            "cpu_threads": 1,
            "kv_cache_gib": 1,
            "max_model_len": 1024,
            "stream_resume_s": 60.0,
        }
        yield Cluster(args, proxy, {"authorization": f"Bearer {secret}"}, digests)


def _published(registry: Registry, default: Weights) -> tuple[str, str]:
    """The default model, and one that differs from it in one matrix of its last layer: it speaks, and says others."""
    from safetensors.torch import load_file, save_file

    found = []
    for is_other in (False, True):
        with registry.stage(BOT) as staged:
            shutil.copytree(default.path, staged, dirs_exist_ok=True)
            if is_other:
                file = next(staged.glob("*.safetensors"))
                tensors = load_file(file)
                name = next(each for each in tensors if each.endswith("layers.29.mlp.down_proj.weight"))
                save_file(tensors | {name: tensors[name] * 0.5}, file, metadata={"format": "pt"})
            found.append(registry.publish(staged, BOT, {"kind": "benchmark"}).digest)
    return found[0], found[1]


def _tell(report: Report, scenes: list[dict[str, Any]], save: bool) -> dict[str, Any]:
    report.table("scenes", list(scenes[0]), [list(each.values()) for each in scenes])
    is_met = not any(each["wrong"] for each in scenes)
    report.table("verdict", ["", ""], [["no call failed, no text was wrong", verdict(is_met)]])
    return report.finish(save, scenes=scenes, is_met=is_met)
