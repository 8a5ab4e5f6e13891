"""vLLM's AsyncLLM in our process, with vLLM's own OpenAI and Anthropic handlers in front of it.

All of vLLM is touched here (and in `preload.py`), because its modules move between releases; its
version is pinned in pyproject.toml. Nothing of vLLM is imported before `start`: the HTTP port is open
and hits are answered while this room still loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from prometheus_client import REGISTRY

import app.engine.preload  # noqa: F401 - its first line hushes a warning, here as in the fork server
from app.domain import Answer, Call, Endpoint, Timings, Weights
from app.engine import cpu
from app.engine.base import EngineState, Phase
from app.engine.measure import measure
from app.engine.meter import Meter
from app.engine.steps import watch_steps
from app.errors import (
    AdapterFailed,
    AppError,
    BadCall,
    Busy,
    EngineDown,
    EngineFailed,
    NotFound,
    RateLimited,
    SwapFailed,
    UnknownModel,
    UnsupportedEndpoint,
)
from app.settings import Settings
from app.weights import Mismatch, fingerprint_of

log = logging.getLogger(__name__)

RESTARTS = 5
RESTART_BACKOFF_S = 2.0
DEATH_CHECK_S = 0.25
SHUTDOWN_S = 5.0
# A question to a core that has died meanwhile is never answered: each is bounded.
PROBES_S = 120.0
ADAPTER_S = 60.0

# Of the process, and never given twice: a core knows an adapter by its number, also one that was unloaded.
_adapter_ids = itertools.count(1)
_timings: ContextVar[Timings | None] = ContextVar("timings", default=None)


class VllmEngine:
    """One model on one AsyncLLM, whose core is a process of its own, forked from a warm fork server."""

    def __init__(
        self,
        settings: Settings,
        weights: Weights,
        on_progress: Callable[[str], None] | None = None,
        *,
        check: Callable[[Weights, dict[str, Any]], None] | None = None,
        adapters: Sequence[Weights] = (),
        meter: Meter | None = None,
    ) -> None:
        """`check` gets the fingerprint of each engine that was loaded, and raises Mismatch over a wrong one.
        `adapters` are loaded with it."""
        self.state = EngineState()
        self.meter = meter or Meter()
        self.fingerprint: dict[str, Any] = {}
        self._settings = settings
        self._weights = weights
        self._on_progress = on_progress or (lambda _: None)
        self._check = check
        self._llm: Any = None
        self._handlers: Any = None
        self._life: asyncio.Task[None] | None = None
        self._adapters = {adapter.name: adapter for adapter in adapters}

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        _begin(self._settings)
        self._life = asyncio.create_task(self._live(), name="engine-life")

    async def try_start(self) -> None:
        _begin(self._settings)
        before = _collectors()
        try:
            await self._load(is_beside=True)
        except Exception as error:
            await self._shut_down()
            _reinstate(before)
            log.debug("the engine did not start", exc_info=error)
            raise SwapFailed(f"{self._weights.short} does not load: {_reason(error)}") from error
        except asyncio.CancelledError:
            await self._shut_down()
            raise
        self._life = asyncio.create_task(self._live(is_loaded=True), name="engine-life")

    async def close(self) -> None:
        self.state.become(Phase.DRAINING, "closing")
        if self._life:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
        await self._shut_down()

    async def _live(self, *, is_loaded: bool = False) -> None:
        """Load; wait for death; load again, at most RESTARTS times with growing pauses."""
        failures = 0
        while True:
            try:
                if not is_loaded:
                    await self._load()
                is_loaded = False
                loaded_at = time.monotonic()
                await self._death()
                log.error("the engine died; starting it again")
                self.state.restarts += 1
                self.state.become(Phase.LOADING, "restarting after a crash")
                if time.monotonic() - loaded_at > 60:
                    failures = 0
            except Mismatch as error:  # another try would measure the same
                log.error("%s is not served: %s", self._weights.short, error)  # noqa: TRY400
                await self._shut_down()
                self.state.become(Phase.FAILED, f"the fingerprint of {self._weights.short} does not match: {error}")
                return
            except Exception as error:
                log.error("the engine did not start: %s", error, exc_info=log.isEnabledFor(logging.DEBUG))  # noqa: TRY400
                self.state.become(Phase.LOADING, f"start failed: {_reason(error)}")
            failures += 1
            await self._shut_down()
            if failures > RESTARTS:
                self.state.become(Phase.FAILED, f"gave up after {RESTARTS} restarts; see the log")
                return
            detail = self.state.detail if self.state.detail.startswith("start failed") else "restarting after a crash"
            self.state.become(Phase.LOADING, detail)
            await asyncio.sleep(RESTART_BACKOFF_S * (2 ** (failures - 1) - 1))

    async def _load(self, *, is_beside: bool = False) -> None:
        """Build everything once. What is built lives as long as the engine, so the garbage collector need not
        walk its millions of objects again and again: a full collection would stop every stream for a tenth of a second.

        Beside another engine there are such streams, so nothing is collected, nor frozen: this engine's objects are
        few against those of all imports, and must be collectable when it goes in its turn.
        """
        began = time.monotonic()
        self._progress("importing vLLM")
        args = await asyncio.to_thread(_parse, self._settings, self._weights)
        self._progress("loading weights")
        llm = await asyncio.to_thread(_build, args, self.meter)
        self._llm = llm
        self._progress("preparing handlers")
        self._handlers = await _host_handlers(llm, args)
        self._handlers.openai_serving_models.model_name = self._called
        self._progress("comparing the fingerprint")
        await self._prove()
        for adapter in list(self._adapters.values()):
            await self._add_adapter(adapter)
        if not is_beside:
            gc.unfreeze()  # what a dead predecessor left may go
            gc.collect()
            gc.freeze()
        self.state.become(Phase.READY, f"loaded in {time.monotonic() - began:.1f} s")
        log.info("engine ready: %s in %.1f s", self._weights.short, time.monotonic() - began)
        self._on_progress("ready")

    async def _prove(self) -> None:
        """Measure what was loaded, and have it compared. A model that generates nothing has no fingerprint."""
        if getattr(self._handlers, "openai_serving_completion", None) is None:
            return
        began = time.monotonic()
        async with asyncio.timeout(PROBES_S):
            prompts = await measure(self.answer, self._weights.name)
        dtype = str(self._llm.model_config.dtype).removeprefix("torch.")
        self.fingerprint = fingerprint_of(prompts, dtype=dtype, quantization=self._settings.quantization)
        if self._check is not None:
            self._check(self._weights, self.fingerprint)
        log.info("engine: fingerprint measured in %.2f s", time.monotonic() - began)

    def _progress(self, detail: str) -> None:
        self.state.become(Phase.LOADING, detail)
        log.info("engine: %s", detail)
        self._on_progress(detail)

    async def _death(self) -> None:
        while not self._llm.errored:  # vLLM sets a flag and wakes nobody
            await asyncio.sleep(DEATH_CHECK_S)

    async def _shut_down(self) -> None:
        llm, self._llm, self._handlers = self._llm, None, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown, SHUTDOWN_S)

    # --- adapters -----------------------------------------------------------------------------

    async def load_adapter(self, adapter: Weights) -> None:
        if adapter.name not in self._adapters and len(self._adapters) >= self._settings.adapter_places:
            raise AdapterFailed(
                f"there are {self._settings.adapter_places} places for adapters (REFRAIN_MAX_ADAPTERS), all taken"
            )
        await self._add_adapter(adapter)
        self._adapters[adapter.name] = adapter

    async def unload_adapter(self, name: str) -> None:
        self._adapters.pop(name, None)
        request = self._ready_handlers().openai_serving_models.lora_requests.pop(name, None)
        if request is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._llm.remove_lora(request.lora_int_id), ADAPTER_S)

    async def _add_adapter(self, adapter: Weights) -> None:
        """vLLM tells prefixes apart by an adapter's name and path, and a core tells adapters apart by their number:
        the digest is in the first two, and the number is new, so another adapter of that name shares nothing."""
        from vllm.lora.request import LoRARequest

        known = self._ready_handlers().openai_serving_models.lora_requests
        name, number = f"{adapter.name}@{adapter.digest}", next(_adapter_ids)
        request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=adapter.path)
        try:
            await asyncio.wait_for(self._llm.add_lora(request), ADAPTER_S)
        except Exception as error:
            raise AdapterFailed(f"{adapter.short} does not load: {_reason(error)}") from error
        before, known[adapter.name] = known.get(adapter.name), request
        if before is not None:
            await asyncio.wait_for(self._llm.remove_lora(before.lora_int_id), ADAPTER_S)
        try:
            await self._prove_adapter(adapter)
        except Mismatch as error:
            del known[adapter.name]
            await asyncio.wait_for(self._llm.remove_lora(number), ADAPTER_S)
            raise AdapterFailed(f"the fingerprint of {adapter.short} does not match: {error}") from error

    async def _prove_adapter(self, adapter: Weights) -> None:
        if self._check is None or not adapter.fingerprint:
            return
        async with asyncio.timeout(PROBES_S):
            prompts = await measure(self.answer, adapter.name)
        own = {"dtype": self.fingerprint["dtype"], "quantization": self._settings.quantization}
        self._check(adapter, fingerprint_of(prompts, **own))

    def _called(self, lora_request: Any = None) -> str:
        """What vLLM's handlers call the model in an answer: the name that was asked for."""
        return str(lora_request.lora_name).rpartition("@")[0] if lora_request is not None else self._weights.name

    def _mark(self, call: Call) -> str:
        return self._adapters.get(str(call.body.get("model")), self._weights).mark

    # --- answers ------------------------------------------------------------------------------

    async def answer(self, call: Call, timings: Timings | None = None) -> Answer:
        handlers = self._ready_handlers()
        timings = timings or Timings()
        token = _timings.set(timings)
        try:
            with _translated():
                produced = await _DISPATCH[call.endpoint](handlers, dict(call.body))
            mark = self._mark(call) if call.endpoint in _MARKED else None
            return await _as_answer(produced, timings, by_alias=call.endpoint is Endpoint.RESPONSES, mark=mark)
        finally:
            _timings.reset(token)

    async def tokens(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        handlers = self._ready_handlers()
        with _translated():
            produced = await _TOKENS[path](handlers, body)
        _refuse_error_response(produced)
        dumped: dict[str, Any] = produced.model_dump(mode="json", exclude_none=path.endswith("count_tokens"))
        return dumped

    async def stored_response(self, response_id: str, *, starting_after: int | None, stream: bool) -> Answer:
        handler = _having(self._ready_handlers(), "openai_serving_responses", "the Responses API")
        with _translated():
            produced = await handler.retrieve_responses(response_id, starting_after=starting_after, stream=stream)
        return await _as_answer(produced, Timings(), by_alias=True)

    async def cancel_response(self, response_id: str) -> Answer:
        handler = _having(self._ready_handlers(), "openai_serving_responses", "the Responses API")
        with _translated():
            produced = await handler.cancel_responses(response_id)
        return await _as_answer(produced, Timings(), by_alias=True)

    def _ready_handlers(self) -> Any:
        if self._handlers is None or self._llm.errored:
            raise EngineDown("the engine is being restarted", retry_after_s=5)
        return self._handlers


# --- asking vLLM's handlers ----------------------------------------------------------------------


async def _chat(handlers: Any, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    handler = _having(handlers, "openai_serving_chat", "chat completions")
    return await handler.create_chat_completion(ChatCompletionRequest(**body), None)


async def _completion(handlers: Any, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    handler = _having(handlers, "openai_serving_completion", "completions")
    return await handler.create_completion(CompletionRequest(**body), None)


async def _response(handlers: Any, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    handler = _having(handlers, "openai_serving_responses", "the Responses API")
    produced = await handler.create_responses(ResponsesRequest(**body), None)
    # A background stream is read from what a task makes that has only just been created: let it begin.
    await asyncio.sleep(0)
    return produced


async def _message(handlers: Any, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

    handler = _having(handlers, "anthropic_serving_messages", "the Messages API")
    return await handler.create_messages(AnthropicMessagesRequest(**body), None)


async def _embedding(handlers: Any, body: dict[str, Any]) -> Any:
    from pydantic import TypeAdapter
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest

    handler = _having(handlers, "serving_embedding", "embeddings")
    return await handler(TypeAdapter(EmbeddingRequest).validate_python(body), None)


async def _tokenize(handlers: Any, body: dict[str, Any]) -> Any:
    from pydantic import TypeAdapter
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeRequest

    return await handlers.serving_tokenization.create_tokenize(TypeAdapter(TokenizeRequest).validate_python(body), None)


async def _detokenize(handlers: Any, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest

    return await handlers.serving_tokenization.create_detokenize(DetokenizeRequest(**body), None)


async def _count_tokens(handlers: Any, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest

    handler = _having(handlers, "anthropic_serving_messages", "the Messages API")
    return await handler.count_tokens(AnthropicCountTokensRequest(**body), None)


_DISPATCH = {
    Endpoint.CHAT: _chat,
    Endpoint.COMPLETIONS: _completion,
    Endpoint.RESPONSES: _response,
    Endpoint.MESSAGES: _message,
    Endpoint.EMBEDDINGS: _embedding,
}
_MARKED = (Endpoint.CHAT, Endpoint.COMPLETIONS)  # they have a `system_fingerprint`
_TOKENS = {"/tokenize": _tokenize, "/detokenize": _detokenize, "/v1/messages/count_tokens": _count_tokens}


def _having(handlers: Any, name: str, what: str) -> Any:
    handler = getattr(handlers, name, None)
    if handler is None:
        raise UnsupportedEndpoint(f"the served model does not support {what}")
    return handler


# --- from what vLLM gives to an Answer -----------------------------------------------------------


async def _as_answer(produced: Any, timings: Timings, *, by_alias: bool, mark: str | None = None) -> Answer:
    """A model, an error, a ready HTTP response or a stream: one of the two wire forms, or a raised AppError."""
    _refuse_error_response(produced)
    if hasattr(produced, "__aiter__"):
        return Answer(events=await _opened(produced, mark), timings=timings)
    if hasattr(produced, "body"):  # pooling handlers give a starlette Response
        return Answer(body=bytes(produced.body), timings=timings)
    # As vLLM's own routes do: Anthropic's bodies leave out what is absent, OpenAI's say null.
    is_message = type(produced).__name__.startswith("Anthropic")
    content = produced.model_dump(mode="json", by_alias=by_alias, exclude_none=is_message)
    if mark is not None:
        content["system_fingerprint"] = mark
    return Answer(body=json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(), timings=timings)


async def _opened(stream: AsyncGenerator[Any, None], mark: str | None) -> AsyncIterator[bytes]:
    """The stream as bytes, started: a refusal or an early death is raised here and not sent as an event."""
    events = _as_bytes(stream, mark)
    try:
        with _translated():
            first = await anext(events)
    except StopAsyncIteration:
        raise EngineFailed("the engine gave an empty answer") from None
    except BaseException:
        await events.aclose()
        raise
    return _rest(first, events)


async def _rest(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        yield first
        with _translated():
            async for event in events:
                yield event


# vLLM would write a fingerprint into the last chunk alone, if no usage event follows; it is told to write none.
_CHUNK_BEGINS = b'data: {"id"'


async def _as_bytes(stream: AsyncGenerator[Any, None], mark: str | None) -> AsyncGenerator[bytes, None]:
    marked = b'data: {"system_fingerprint":"%s",' % mark.encode() if mark else b""
    async with aclosing(stream):
        async for event in stream:
            if isinstance(event, str):
                content = event.encode()
            else:  # Responses give event objects
                content = f"event: {event.type}\ndata: {event.model_dump_json(indent=None, by_alias=True)}\n\n".encode()
            _refuse_error_event(content)
            if marked and content.startswith(_CHUNK_BEGINS):
                content = marked + content[len(_CHUNK_BEGINS) - 4 :]
            yield content


# --- errors --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _translated() -> Any:
    """vLLM's and pydantic's exceptions leave as ours; around calls and around iteration alike."""
    try:
        yield
    except (AppError, asyncio.CancelledError, GeneratorExit, StopAsyncIteration):
        raise
    except Exception as error:
        raise _from_exception(error) from error


def _from_exception(error: Exception) -> AppError:
    from pydantic import ValidationError
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, ValidationError):
        return _from_validation(error)
    if isinstance(error, EngineDeadError):
        return EngineDown("the engine stopped while it worked on this call; it is being restarted", retry_after_s=5)
    if isinstance(error, RecursionError):
        return BadCall("the request is nested too deeply")
    info = create_error_response(error).error
    if info.code >= 500 and info.code != 501:
        log.error("the engine failed on a call: %s: %s", type(error).__name__, error, exc_info=error)
        # What broke inside is for the log; it can hold prompts and paths.
        return _app_error("the engine failed on this call", info.code, None)
    return _app_error(info.message, info.code, info.param)


def _from_validation(error: Any) -> BadCall:
    """The first thing that is wrong, in one line, with the field's name as OpenAI gives it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not _is_internal(str(part)))
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return BadCall(f"{where}: {message}" if where else message, param=where or None)


def _is_internal(part: str) -> bool:
    return any(mark in part for mark in "[](){}") or part in {"function-wrap", "function-before", "function-after"}


def _refuse_error_response(produced: Any) -> None:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if isinstance(produced, ErrorResponse):
        raise _app_error(produced.error.message, produced.error.code, produced.error.param)


def _refuse_error_event(event: bytes) -> None:
    """vLLM's handlers say in an event what broke a stream, and then end it as if it were whole ([DONE]).

    Raises:
        AppError: this is such an event. Generated text cannot look like one: it is inside a JSON string.
    """
    if not event.startswith((b'data: {"error"', b"event: error\n")):
        return
    told = json.loads(event[event.index(b"{") :])
    error = told.get("error") or told
    status = int(error["code"]) if str(error.get("code")).isdigit() else 500
    if status >= 500:
        log.error("the engine failed on a stream: %s", error.get("message"))
        raise _app_error("the engine failed on this call", status, None)
    raise _app_error(error["message"], status, error.get("param"))


def _app_error(message: str, status: Any, param: str | None) -> AppError:
    """vLLM's message under our types; a status it does not know is the engine's own fault."""
    status = int(status) if str(status).isdigit() else 500
    if status == 404 and "model" in message.lower():
        return UnknownModel(message, param=param or "model")
    kinds: dict[int, type[AppError]] = {
        400: BadCall,
        404: NotFound,
        422: BadCall,
        429: RateLimited,
        501: UnsupportedEndpoint,
        503: Busy,
    }
    kind = kinds.get(status, BadCall if 400 <= status < 500 else EngineFailed)
    return kind(message, param=param, retry_after_s=5 if status in (429, 503) else None)


# --- building ------------------------------------------------------------------------------------


def _begin(settings: Settings) -> None:
    """The environment, and the fork server, once per process: it imports vLLM on the other core while we do here."""
    _prepare_environment(settings)
    multiprocessing.set_forkserver_preload(["app.engine.preload"])
    os.environ["_REFRAIN_FORKSERVER"] = str(os.getpid())
    try:
        # It dies with the thread that starts it, hence the main one; that takes a few milliseconds.
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["_REFRAIN_FORKSERVER"]


async def end_fork_server() -> None:
    """Every core ends with it. Without this it would go on until our process ends."""
    await asyncio.to_thread(multiprocessing.forkserver._forkserver._stop)  # type: ignore[attr-defined]


def _collectors() -> list[Any]:
    """vLLM's metrics, as they are registered now; each AsyncLLM throws out those of the one before."""
    return [each for each in REGISTRY._collector_to_names if str(getattr(each, "_name", "")).startswith("vllm:")]


def _reinstate(collectors: list[Any]) -> None:
    """The metrics of an engine that goes on, after the one that should have followed it failed."""
    for each in _collectors():
        REGISTRY.unregister(each)
    for each in collectors:
        REGISTRY.register(each)


def _reason(error: BaseException) -> str:
    """One line: the last of the message."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _prepare_environment(settings: Settings) -> None:
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM's warnings at start are advice to people who run it by hand; `log_level=debug` shows everything.
        "VLLM_LOGGING_LEVEL": "DEBUG" if settings.log_level == "debug" else "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
        "VLLM_ENABLE_RESPONSES_API_STORE": "1" if settings.responses_store else "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cpu.is_cpu():
        defaults |= cpu.environment(settings)
        if settings.compile and not cpu.has_compiler():
            log.info("no C++ compiler (g++ and Python's headers): the model is not compiled")
        if cpu.compiles(settings):
            # A minute of compiling becomes some seconds longer. Else torch leaves 150 MB in /tmp, makes them again
            # where they are gone before it loads what is compiled, and needs `openssl` for it.
            defaults["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
        else:
            # Else the first call with logprobs waits 13 s for a compiler, which need not even be there.
            defaults["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


# What `norms.py` registers: named here, since importing it loads vLLM.
_NORMS = ("rms_norm", "fused_add_rms_norm")
_NORMS_PROVIDER = "cpu_kernel"
_WORKER = "app.engine.compiled.Worker"


def arguments(settings: Settings, weights: Weights) -> list[str]:
    """The `vllm serve` command line that our settings stand for."""
    options: dict[str, Any] = {
        "model": weights.path,
        "served_model_name": weights.name,
        "dtype": weights.dtype,
        "quantization": settings.quantization,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "reasoning_parser": settings.reasoning_parser,
        "chat_template": settings.chat_template,
        "use_tqdm_on_load": False,
        "fingerprint_mode": "none",
    }
    if places := settings.adapter_places:
        # One more than there are: on a CPU vLLM gives calls without an adapter the last place, which must stay empty.
        options |= {"enable_lora": True, "max_loras": places + 1, "max_lora_rank": settings.max_adapter_rank}
    if settings.tool_call_parser:
        options |= {"enable_auto_tool_choice": True, "tool_call_parser": settings.tool_call_parser}
    if cpu.is_cpu():
        compiles = cpu.compiles(settings)
        options["enforce_eager"] = not compiles
        if compiles:
            options |= {"worker_cls": _WORKER, "compilation_config": {"cache_dir": str(settings.home / "compiled")}}
        if cpu.computes_in_core():
            options["distributed_executor_backend"] = "uni"
            if not compiles:
                options["kernel_config"] = {"ir_op_priority": {name: [_NORMS_PROVIDER] for name in _NORMS}}
    options |= settings.engine_args
    return [part for name, value in options.items() for part in _argument(name, value)]


def _argument(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    match value:
        case None:
            return []
        case True:
            return [flag]
        case False:
            return ["--no-" + name.replace("_", "-")] if name != "enforce_eager" else []
        case list():
            return [flag, *map(str, value)]
        case dict():
            return [flag, json.dumps(value)]
    return [flag, str(value)]


def _parse(settings: Settings, weights: Weights) -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if cpu.is_cpu():
        import app.engine.norms  # noqa: F401 - the arguments name what it registers

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise ValueError(f"vLLM does not take these engine arguments: {message}")

    args = make_arg_parser(Parser()).parse_args(arguments(settings, weights))
    validate_parsed_serve_args(args)
    return args


def _build(args: Any, meter: Meter) -> Any:
    import vllm.v1.engine.utils as core_processes
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    # vLLM takes spawn or fork only (on a CPU it insists on spawn); its context is replaced by ours.
    core_processes.get_mp_context = lambda: multiprocessing.get_context("forkserver")

    class ObservedLLM(AsyncLLM):  # type: ignore[misc]
        """AsyncLLM that notes each call's timings where the call's own task can read them."""

        async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            timings = _timings.get()
            async with aclosing(super().generate(*args, **kwargs)) as outputs:
                async for output in outputs:
                    if timings is not None:
                        timings.streamed_tokens += sum(len(part.token_ids) for part in output.outputs)
                        if output.metrics is not None:
                            _note(timings, output)
                    if any(part.finish_reason == "abort" for part in output.outputs):
                        # The Responses handler would call it "completed". An answer is whole or an error.
                        raise EngineFailed("the generation was aborted")
                    yield output

    llm = ObservedLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
    watch_steps(llm, meter, _timings.get)
    return llm


def _note(timings: Timings, output: Any) -> None:
    stats = output.metrics
    timings.queue_s = stats.scheduled_ts - stats.queued_ts
    timings.prefill_s = stats.first_token_ts - stats.scheduled_ts
    timings.decode_s = stats.last_token_ts - stats.first_token_ts
    timings.prompt_tokens = len(output.prompt_token_ids or ())
    timings.completion_tokens = stats.num_generation_tokens


async def _host_handlers(llm: Any, args: Any) -> Any:
    from starlette.datastructures import State
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state

    handlers = State()
    await init_app_state(llm, handlers, args, await llm.get_supported_tasks())
    return handlers
