"""One Ray on this machine for all tests, and Refrain deployed on it: replicas, their processes, their two doors."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from app.gate.keys import KeyFile
from app.weights import Registry
from benchmarks.ray_local import APP, LONGEST_S, deploy, ray_running
from benchmarks.servers import free_port
from tests.conftest import PATIENCE_S, RedisServer, until
from tests.weights.conftest import publish

BOT = "bot"
BY_SESSION = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
_QUICK = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    # On a busy machine it takes longer than the 5 s that it is given.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(LONGEST_S),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}


@dataclass
class Cluster:
    """Ray, a Redis, a home with keys and two sets of weights, and the application that is deployed again and again."""

    home: Path
    redis: RedisServer
    secret: str
    digests: tuple[str, str]
    rays: str
    port: int

    @property
    def url(self) -> str:
        """The replicas' own door."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}

    def deploy(self, *, user_config: dict[str, Any] | None = None, speed: float = 40.0, **options: Any) -> None:
        """As `serve deploy` would; returns when Ray says that it is so. Another speed is for new replicas."""
        args = {
            "engine": "scripted",
            "model": f"{BOT}@{self.digests[0]}",
            "home": str(self.home),
            "redis_url": self.redis.url,
            "redis_timeout_s": PATIENCE_S,
            "port": self.port,
            "drain_s": 5.0,
            "stream_resume_s": 30.0,
            "flight_lease_s": 1.0,
            "scripted_tokens_per_s": speed,
            "scripted_max_calls": 32,
        }
        quick: dict[str, Any] = {"health_check_period_s": 0.5, "graceful_shutdown_wait_loop_s": 0.1}
        # In each deployment the same: another one would be for new replicas.
        quick |= {"request_router_config": {"request_router_class": BY_SESSION}}
        deploy(args, is_waited_for=True, user_config=user_config or {}, **(quick | options))

    def running(self) -> int:
        """How many replicas run; 0 while one comes or goes."""
        from ray import serve

        states = serve.status().applications[APP].deployments["refrain"].replica_states
        return states.get("RUNNING", 0) if set(states) == {"RUNNING"} else 0

    def wait_running(self, replicas: int) -> list[psutil.Process]:
        """Until so many run and listen, as Ray sees it too, which notices late that one has died; their processes."""

        def found() -> list[psutil.Process]:
            processes = self.replicas() if self.running() == replicas else []
            return processes if len(processes) == replicas else []

        return until(found, LONGEST_S, 0.1)  # each imports vLLM's front end, on a busy machine

    def replicas(self) -> list[psutil.Process]:
        """The processes that listen at the replicas' own door."""
        return [each for each in psutil.Process().children(recursive=True) if _listens(each, self.port)]


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        found = process.net_connections(kind="tcp")
    except psutil.Error:  # it has just ended
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in found)


@contextmanager
def started(redis: RedisServer) -> Iterator[Cluster]:
    for name in [each for each in os.environ if each.startswith("REFRAIN_")]:
        del os.environ[name]
    os.environ |= _QUICK
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: unix sockets lie below it
    home = folder / "home"
    secret, _ = KeyFile(home / "keys.json").create("t")
    registry = Registry(home / "weights")
    digests = publish(registry, BOT, 1), publish(registry, BOT, 2)
    try:
        with ray_running(folder) as rays:
            yield Cluster(home, redis, secret, digests, rays, free_port())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
