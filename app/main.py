"""The only wiring: settings, then redis, engine and rooms, then the app. Every way of deploying calls `create_app`."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from app import __version__
from app.api.bounds import BOUNDS, Bounds
from app.api.browsers import METHODS, READABLE, Browsers
from app.api.docs import mount_docs
from app.api.edge import Edge, Ends
from app.api.hot import GIVE, STATE, HotHits, HotProtocol
from app.api.routes import mount_routes
from app.cache.embedded import EmbeddedRedis
from app.cache.link import Link
from app.cache.store import Store
from app.domain import Weights
from app.drain import Drain
from app.engine import Engine, Meter, cpu, room_for
from app.errors import StartRefused
from app.flight.flights import Flights
from app.gate.keys import Gate, KeyFile
from app.gate.limits import defaults
from app.gate.quotas import Quotas
from app.ledger.ledger import Ledger
from app.observe.access import AccessLog
from app.observe.traces import Tracer
from app.service import Service
from app.settings import Settings, listed
from app.swap import Sources, Swapper
from app.weights import (
    DEFAULT_MODEL,
    DigestMemo,
    InUse,
    Registry,
    Witness,
    is_registry_name,
    pull_default,
    pull_missing,
    resolve,
    resolve_adapter,
)
from app.workers import Pool

log = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    weights: Weights,
    *,
    engine: Engine | None = None,
    sources: Sources | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> FastAPI:
    """The whole server as an ASGI app; what it opens, its lifespan closes, in reverse.

    Args:
        settings: see `refrain config`.
        weights: what `find_weights` gives for them.
        engine: one of your own making, for tests; by default the one that the settings name.
        sources: where a swap takes weights and engines from; by default the registry and the settings.
        on_progress: called with one line per step of the engine's start.

    Raises:
        StartRefused: no keys on an open address, keys that cannot be read, or an adapter that is not one.
    """
    gate = open_gate(settings)
    redis = EmbeddedRedis(settings) if settings.redis_url is None else None
    url = settings.redis_url.get_secret_value() if settings.redis_url else redis.url  # type: ignore[union-attr]
    link = Link(settings, url)
    flights = Flights(settings, link, url, is_alone=redis is not None)
    adapters = [find_adapter(settings, name, weights) for name in settings.adapter_names]
    meter = engine.meter if engine else Meter(settings.devices)
    first = engine or make_engine(settings, weights, on_progress, adapters=adapters, meter=meter)
    service = Service(settings, weights, first, Store(settings, link), flights, adapters)
    quotas = Quotas(settings, link)
    drain = Drain(service, settings.drain_delay_s)
    in_use = InUse(settings.home / "serving")
    pool = Pool(settings, url, service, gate)

    async def tell(digests: list[str]) -> None:
        in_use.tell(digests)
        await pool.tell_served()

    swapper = Swapper(service, sources or swap_sources(settings, meter=meter), watch_s=settings.watch_s, tell=tell)

    access = AccessLog(settings.log_format) if settings.access_log else None
    tracer = open_tracer() if settings.traces else None
    ledger = Ledger(settings, meter) if settings.ledger else None
    if ledger is not None:
        flights.on_rest = lambda ticket, device_s: ledger.note_rest(
            ticket.caller, ticket.endpoint.value, ticket.weights, device_s
        )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            if access is not None:
                await stack.enter_async_context(access)
            if tracer is not None:
                stack.push_async_callback(asyncio.to_thread, tracer.close)
            if ledger is not None:  # closed when nothing can be noted any more
                await stack.enter_async_context(ledger)
            if redis is not None:
                stack.push_async_callback(redis.close)
                await redis.start()
            stack.push_async_callback(link.close)
            await stack.enter_async_context(service.store.opened())
            await stack.enter_async_context(quotas.opened())
            if engine is None:
                stack.push_async_callback(end_engines, settings)
            stack.push_async_callback(lambda: service.engine.close())
            await service.engine.start()
            stack.callback(in_use.end)
            stack.push_async_callback(swapper.close)
            await swapper.start()
            stack.push_async_callback(flights.close)
            stack.push_async_callback(pool.end)
            stack.callback(drain.close)
            yield {
                STATE: HotHits(answering, ends),
                GIVE: pool.give if settings.http_workers else None,
                BOUNDS: bounds(settings),
            }

    app = FastAPI(
        title="Refrain", version=__version__, lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None
    )
    app.state.service, app.state.pool, app.state.drain, app.state.swapper = service, pool, drain, swapper
    answering = mount_routes(app, service, gate, quotas, settings, swapper, drain, pool.counted)
    mount_docs(app)
    ends = Ends(access, ledger, tracer)
    browsers = Browsers(gate, frozenset(listed(settings.cors_origins)), frozenset(listed(settings.allowed_hosts)))
    app.add_middleware(Edge, direct=answering, ends=ends, browsers=browsers, text_bytes=settings.ledger_text_bytes)
    if browsers.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(browsers.origins),
            allow_methods=METHODS,
            allow_headers=["*"],
            expose_headers=READABLE,
        )
    return app


def create_service(settings: Settings, weights: Weights) -> Service:
    """The rooms of a server that is not started: to ask what it would do. Nothing is connected to."""
    url = settings.redis_url.get_secret_value() if settings.redis_url else "unix:///nowhere"
    link = Link(settings, url)
    flights = Flights(settings, link, url, is_alone=True)
    return Service(settings, weights, make_engine(settings, weights, None), Store(settings, link), flights)


def open_gate(settings: Settings) -> Gate:
    """The gate that the settings allow; raises StartRefused where an open address has no keys."""
    gate = Gate(KeyFile(settings.keys_path), defaults(settings))
    if gate.is_open and not settings.is_loopback:
        raise StartRefused(
            f"refusing to serve on {settings.host} without API keys: make one with "
            "`refrain keys create --tenant NAME`, or bind 127.0.0.1"
        )
    return gate


def open_tracer() -> Tracer:
    """Raises StartRefused where OpenTelemetry is not installed."""
    try:
        from app.observe.otel import OtelTracer
    except ImportError as error:
        raise StartRefused(f"REFRAIN_TRACES needs OpenTelemetry: pip install 'refrain[otel]' ({error})") from error
    return OtelTracer(__version__)


def find_weights(settings: Settings, report: Callable[[str], None]) -> Weights:
    """The weights that the settings name, on disk and digested; the default model is prepared if it is missing,
    others are pulled from `weights_store`, if there is one.

    Raises:
        StartRefused: there are none, or they are not what they should be.
    """
    registry = Registry(settings.weights_root)
    _pull_missing(settings, settings.model, registry, report)
    if settings.engine == "scripted":
        return _scripted_weights(settings, registry, report)
    if settings.model == DEFAULT_MODEL:
        pull_default(registry, report)
    memo = DigestMemo(settings.home / "digests.json")
    found = resolve(settings.model, registry, memo, _answer_settings(settings), report)
    dtype = cpu.dtype(settings, Path(found.path))
    return replace(
        found,
        dtype=dtype,
        settings_digest=hashlib.sha256(f"{found.settings_digest} {dtype}".encode()).hexdigest(),
        name=settings.served_model_name or found.name,
        max_model_len=settings.max_model_len or found.max_model_len,
    )


def _pull_missing(settings: Settings, model: str, registry: Registry, report: Callable[[str], None]) -> None:
    """From the store of weights, if there is one, what is called by a registry name and is not in the registry."""
    is_elsewhere = model == DEFAULT_MODEL or not is_registry_name(model) or Path(model).is_dir()
    if settings.weights_store and not is_elsewhere:
        pull_missing(model, registry, settings.weights_store, report)


def _scripted_weights(settings: Settings, registry: Registry, report: Callable[[str], None]) -> Weights:
    """Published weights give their name and digest, if they are asked for; nothing of them is loaded."""
    if settings.model == DEFAULT_MODEL or not registry.knows(settings.model.partition("@")[0]):
        return Weights(settings.served_model_name or "scripted", "", "0" * 64, "0" * 64, {}, max_model_len=8192)
    memo = DigestMemo(settings.home / "digests.json")
    found = resolve(settings.model, registry, memo, {"engine": "scripted"}, report)
    return replace(found, name=settings.served_model_name or found.name)


def _answer_settings(settings: Settings) -> dict[str, str]:
    """What the engine is told that can change an answer; with the weights' digest it is part of every key."""
    name, version = cpu.distribution()
    told: dict[str, Any] = {
        "vllm": f"{name}=={version}",
        "quantization": settings.quantization,
        "max_model_len": settings.max_model_len,
        "tool_call_parser": settings.tool_call_parser,
        "reasoning_parser": settings.reasoning_parser,
        "chat_template": _chat_template(settings),
        "compile": cpu.compiles(settings),
        "tensor_parallel_size": settings.tensor_parallel_size,
        "engine_args": settings.engine_args or None,
    }
    told |= {
        key: settings.engine_args[key]
        for key in ("generation_config", "override_generation_config")
        if key in settings.engine_args
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in told.items()
        if value is not None
    }


def _chat_template(settings: Settings) -> str | None:
    if settings.chat_template is None:
        return None
    try:
        with open(settings.chat_template, encoding="utf-8") as file:  # noqa: PTH123 - a template may be given as text too
            return file.read()
    except OSError:
        return settings.chat_template


def make_engine(
    settings: Settings,
    weights: Weights,
    on_progress: Callable[[str], None] | None = None,
    *,
    adapters: Sequence[Weights] = (),
    is_trial: bool = False,
    meter: Meter | None = None,
) -> Engine:
    """The engine that the settings name, not started. In a trial nothing vouches for the weights yet.

    Engines that share devices share a meter.
    """
    if settings.engine == "scripted":
        from app.engine.scripted import ScriptedEngine

        return ScriptedEngine(settings, weights, adapters=adapters, meter=meter)
    from app.engine.vllm import VllmEngine

    check = None if is_trial else Witness(settings.home / "fingerprints").check
    return VllmEngine(settings, weights, on_progress, check=check, adapters=adapters, meter=meter)


def find_adapter(settings: Settings, name: str, base: Weights) -> Weights:
    """A published adapter of `base`; raises StartRefused where there is none of that name."""
    registry = Registry(settings.weights_root)
    _pull_missing(settings, name, registry, log.info)
    return resolve_adapter(name, registry, base)


def swap_sources(
    settings: Settings,
    make: Callable[[Weights, list[Weights]], Engine] | None = None,
    *,
    meter: Meter | None = None,
) -> Sources:
    """Where a swap takes its weights and engines from."""
    return Sources(
        find=lambda: find_weights(settings, log.info),
        adapter=lambda name, base: find_adapter(settings, name, base),
        make=make or (lambda weights, adapters: make_engine(settings, weights, adapters=adapters, meter=meter)),
        fits=lambda weights: _fits(settings, weights),
        pointer=_pointer(settings),
    )


def _fits(settings: Settings, weights: Weights) -> tuple[bool, str]:
    if settings.swap != "auto":
        return settings.swap == "beside", "as REFRAIN_SWAP says"
    if settings.engine == "scripted":
        return True, "nothing is needed"
    room = room_for(settings, weights)
    return room.is_enough, str(room)


def _pointer(settings: Settings) -> Path | None:
    """What tells that other weights are current; none for a folder, a hub id, or a digest that is named."""
    registry = Registry(settings.weights_root)
    return registry.pointer(settings.model) if registry.knows(settings.model) else None


async def end_engines(settings: Settings) -> None:
    """End what all engines of this process share."""
    if settings.engine != "scripted":
        from app.engine.vllm import end_fork_server

        await end_fork_server()


class Server(uvicorn.Server):
    """uvicorn that drains: on SIGTERM no new generation starts, running ones finish, and the exit code is 0."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, on_listening: Callable[[str], None]) -> None:
        super().__init__(config)
        self._app = app
        self._on_listening = on_listening
        self._signal = signal.SIGTERM
        app.state.drain.on_over = lambda: self.handle_exit(self._signal, None)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again after the shutdown, so that a clean stop looks like a kill.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        yield

    def _stop(self, number: signal.Signals) -> None:
        self._signal = number
        self._app.state.drain.begin(f"got {number.name}")

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            self._app.state.pool.start(sockets[0], self._take)

    async def shutdown(self, sockets: Any = None) -> None:
        await self._app.state.pool.end()  # what has begun to arrive there comes here, and is drained with the rest
        await super().shutdown(sockets)

    async def _take(self, connection: socket.socket, received: bytes) -> None:
        """A client's connection from a worker, as if it had been accepted here."""
        protocol = HotProtocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        protocol.received_before = received
        with contextlib.suppress(OSError):  # its client has left
            await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection)


def run(settings: Settings, app: FastAPI, on_listening: Callable[[str], None]) -> bool:
    """Serve until a signal; True when everything went well.

    Raises:
        StartRefused: the address cannot be bound.
    """
    server = Server(uvicorn_config(settings, app), app, on_listening)
    with bound(settings) as listener, contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return server.started


def uvicorn_config(settings: Settings, app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves the app; on other ASGI servers it works too, with slower hits."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=HotProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here depends on the client's address
        ws="none",
        timeout_keep_alive=settings.idle_timeout_s,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )


def bounds(settings: Settings) -> Bounds:
    """What one connection may cost."""
    return Bounds(
        settings.max_header_bytes,
        settings.header_timeout_s,
        settings.body_timeout_s,
        settings.write_timeout_s,
        settings.max_connections,
    )


def bound(settings: Settings, *, is_shared: bool = False) -> socket.socket:
    """A socket on the address; uvicorn's own way to bind ends the process where it fails.

    One that is shared takes connections only from when it listens, and the kernel deals them out to all who do.

    Raises:
        StartRefused: the address cannot be bound.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if is_shared:
            listener = socket.socket(family)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address[:2])
        else:
            listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise StartRefused(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from error
    _notice_the_vanished(listener, settings.write_timeout_s)
    return listener


def _notice_the_vanished(listener: socket.socket, after_s: float) -> None:
    """A client whose machine is gone says no farewell: the kernel asks for it. Accepted sockets inherit this."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_USER_TIMEOUT", round(after_s * 1000))):
        if (option := getattr(socket, name, None)) is not None:  # Linux has all three
            listener.setsockopt(socket.IPPROTO_TCP, option, value)
