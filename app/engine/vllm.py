"""The life of vLLM's AsyncLLM in our process, and what vLLM's own handlers in front of it answer.

All of vLLM is touched in this room, because its modules move between releases; its version is pinned in
pyproject.toml. Nothing of vLLM is imported before `start`: the HTTP port is open and hits are answered while this room
still loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import itertools
import json
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from prometheus_client import REGISTRY

import app.engine.preload  # noqa: F401 - its first line hushes a warning, here as in the fork server
from app.domain import Answer, Call, Endpoint, Priority, Timings, Weights
from app.engine import cpu
from app.engine.base import Capacity, EngineState, Phase
from app.engine.building import another_core, build, host_handlers
from app.engine.core import LastingCore
from app.engine.handlers import DISPATCH, MARKED, RANKED, TOKENS, having
from app.engine.measure import measure
from app.engine.meter import Meter
from app.engine.quarantine import Quarantine
from app.engine.rehearsal import Rehearsals
from app.engine.translation import as_answer, refuse_error_response, translated
from app.engine.underway import Underway, key_of, underway
from app.engine.watch import TICK_S, Watch, cpu_seconds, family
from app.errors import AdapterFailed, EngineDown, SwapFailed
from app.settings import Settings, listed
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
        self._quarantine = Quarantine(settings.quarantine_s)
        self._args: Any = None
        self._llm: Any = None
        self._handlers: Any = None
        self._life: asyncio.Task[None] | None = None
        self._adapters = {adapter.name: adapter for adapter in adapters}
        self._rehearsals = Rehearsals(settings.grammar_cpu_s, lambda: self._llm.vllm_config)

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
        await self._rehearsals.close()
        await self._shut_down()

    async def _live(self, *, is_loaded: bool = False) -> None:
        """Load; wait for the core's death; load another, at most RESTARTS times with growing pauses."""
        failures = 0
        while True:
            try:
                if not is_loaded:
                    await self._load()
                is_loaded = False
                loaded_at = time.monotonic()
                what = await self._end_of_core()
                log.error("the engine %s; starting it again", what)
                self.state.restarts += 1
                self.state.become(Phase.LOADING, f"restarting: it {what}")
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
            if failures > RESTARTS:
                await self._shut_down()
                self.state.become(Phase.FAILED, f"gave up after {RESTARTS} restarts; see the log")
                return
            await self._end_core()
            await asyncio.sleep(RESTART_BACKOFF_S * (2 ** (failures - 1) - 1))

    async def _load(self, *, is_beside: bool = False) -> None:
        """Build everything once. What is built lives as long as the engine, so the garbage collector need not
        walk its millions of objects again and again: a full collection would stop every stream for a tenth of a second.

        Beside another engine there are such streams, so nothing is collected, nor frozen: this engine's objects are
        few against those of all imports, and must be collectable when it goes in its turn.
        """
        began = time.monotonic()
        if self._llm is None:
            await self._build()
        else:
            await self._replace_core()
        self._progress("comparing the fingerprint")
        await self._prove()
        await self._add_adapters()
        if not is_beside:
            gc.unfreeze()  # what a dead predecessor left may go
            gc.collect()
            gc.freeze()
        _keep_variables()
        self._core.go_on()
        self.state.become(Phase.READY, f"loaded in {time.monotonic() - began:.1f} s")
        log.info("engine ready: %s in %.1f s", self._weights.short, time.monotonic() - began)
        self._on_progress("ready")

    async def _build(self) -> None:
        self._progress("importing vLLM")
        self._args = await asyncio.to_thread(_parse, self._settings, self._weights)
        self._progress("loading weights")
        self._llm = await asyncio.to_thread(build, self._args, self.meter)
        self._core.quarantine = self._quarantine
        self._progress("preparing handlers")
        self._handlers = await host_handlers(self._llm, self._args)
        self._handlers.openai_serving_models.model_name = self._called

    async def _replace_core(self) -> None:
        """Another process in place of the one that was lost; all that stands in front of it stays, calls and all."""
        self._progress("loading weights again")
        building = asyncio.create_task(asyncio.to_thread(another_core, self._args, self._llm))
        await self._watched(building)
        self._core.replace(building.result())
        self.meter.skip()
        async with asyncio.timeout(PROBES_S):
            await self._llm.reset_mm_cache()  # what the lost one held, this one does not

    async def _watched(self, building: asyncio.Task[Any]) -> None:
        """Return when it is done, which comes soon after the process is killed that hangs while it loads."""
        others = {process.pid for process in multiprocessing.active_children()}
        watch = Watch(self._settings.engine_hang_s, self._settings.engine_stuck_s)
        while not building.done():
            pids = [process.pid for process in multiprocessing.active_children() if process.pid]
            own = [pid for pid in pids if pid not in others]
            cpu_s = await asyncio.to_thread(_cpu_seconds, own)
            if watch.look(steps=0, has_calls=bool(own), cpu_s=cpu_s) is not None:
                log.error("the engine hangs while it loads")
                await asyncio.to_thread(_kill, own)
            await asyncio.wait({building}, timeout=TICK_S)

    @property
    def _core(self) -> LastingCore:
        core: LastingCore = self._llm.engine_core
        return core

    async def _prove(self) -> None:
        """Measure what was loaded, and have it compared. A model that generates nothing has no fingerprint."""
        if getattr(self._handlers, "openai_serving_completion", None) is None:
            return
        began = time.monotonic()
        async with asyncio.timeout(PROBES_S):
            prompts = await measure(partial(self._answer, is_probe=True), self._weights.name)
        dtype = str(self._llm.model_config.dtype).removeprefix("torch.")
        self.fingerprint = fingerprint_of(prompts, dtype=dtype, quantization=self._settings.quantization)
        if self._check is not None:
            self._check(self._weights, self.fingerprint)
        log.info("engine: fingerprint measured in %.2f s", time.monotonic() - began)

    def _progress(self, detail: str) -> None:
        self.state.become(Phase.LOADING, detail)
        log.info("engine: %s", detail)
        self._on_progress(detail)

    async def _end_of_core(self) -> str:
        """Wait for the core to die, or to hang, and end one that hangs. What happened, in a word."""
        watch = Watch(self._settings.engine_hang_s, self._settings.engine_stuck_s)
        ticks = round(TICK_S / DEATH_CHECK_S)
        for tick in itertools.count(1):
            if self._core.is_lost:  # vLLM sets a flag and wakes nobody
                return "died"
            if tick % ticks == 0 and (hung := await self._hangs(watch)) is not None:
                await asyncio.to_thread(_kill, self._core.pids)
                return f"hung ({hung})"
            self.state.quarantined = len(self._quarantine)
            await asyncio.sleep(DEATH_CHECK_S)
        raise AssertionError  # it counts for ever

    async def _hangs(self, watch: Watch) -> str | None:
        core = self._core
        has_calls, cpu_s = core.has_calls, None
        if has_calls and watch.is_silent:
            cpu_s = await asyncio.to_thread(_cpu_seconds, core.pids)
        return watch.look(steps=core.steps, has_calls=has_calls, cpu_s=cpu_s)

    async def _end_core(self) -> None:
        """End what is left of a core; calls wait for the next."""
        if self._llm is not None:
            await asyncio.to_thread(self._core.shutdown, SHUTDOWN_S)

    async def _shut_down(self) -> None:
        llm, self._llm, self._handlers = self._llm, None, None
        if llm is not None:
            llm.engine_core.give_up()
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
        await self._tell_core(adapter, request)
        before, known[adapter.name] = known.get(adapter.name), request
        if before is not None:
            await asyncio.wait_for(self._llm.remove_lora(before.lora_int_id), ADAPTER_S)
        try:
            await self._prove_adapter(adapter)
        except Mismatch as error:
            del known[adapter.name]
            await asyncio.wait_for(self._llm.remove_lora(number), ADAPTER_S)
            raise AdapterFailed(f"the fingerprint of {adapter.short} does not match: {error}") from error

    async def _add_adapters(self) -> None:
        """All of them; to a core that replaces another under their old numbers, since calls that go on name those."""
        known = self._ready_handlers().openai_serving_models.lora_requests
        for adapter in list(self._adapters.values()):
            if (request := known.get(adapter.name)) is None:
                await self._add_adapter(adapter)
            else:
                await self._tell_core(adapter, request)
                await self._prove_adapter(adapter)

    async def _tell_core(self, adapter: Weights, request: Any) -> None:
        try:
            await asyncio.wait_for(self._llm.add_lora(request), ADAPTER_S)
        except Exception as error:
            raise AdapterFailed(f"{adapter.short} does not load: {_reason(error)}") from error

    async def _prove_adapter(self, adapter: Weights) -> None:
        if self._check is None or not adapter.fingerprint:
            return
        async with asyncio.timeout(PROBES_S):
            prompts = await measure(partial(self._answer, is_probe=True), adapter.name)
        own = {"dtype": self.fingerprint["dtype"], "quantization": self._settings.quantization}
        self._check(adapter, fingerprint_of(prompts, **own))

    def _called(self, lora_request: Any = None) -> str:
        """What vLLM's handlers call the model in an answer: the name that was asked for."""
        return str(lora_request.lora_name).rpartition("@")[0] if lora_request is not None else self._weights.name

    def _mark(self, call: Call) -> str:
        return self._adapters.get(str(call.body.get("model")), self._weights).mark

    # --- answers ------------------------------------------------------------------------------

    async def examine(self, call: Call) -> None:
        await self._rehearsals.check(call.body, call.caller.tenant)

    async def answer(self, call: Call, timings: Timings | None = None) -> Answer:
        return await self._answer(call, timings)

    async def _answer(self, call: Call, timings: Timings | None = None, *, is_probe: bool = False) -> Answer:
        handlers = self._ready_handlers()
        about = Underway(key_of(call), is_probe, timings or Timings())
        self._quarantine.check(about.key)
        token = underway.set(about)
        try:
            with translated(about):
                produced = await DISPATCH[call.endpoint](handlers, self._asked(call))
            mark = self._mark(call) if call.endpoint in MARKED else None
            return await as_answer(produced, about, by_alias=call.endpoint is Endpoint.RESPONSES, mark=mark)
        finally:
            underway.reset(token)

    @property
    def capacity(self) -> Capacity:
        if self._llm is None:
            return Capacity()
        config = self._llm.vllm_config
        ranks, blocks = config.parallel_config.data_parallel_size, config.cache_config.num_gpu_blocks
        return Capacity(
            sequences=ranks * config.scheduler_config.max_num_seqs,
            kv_tokens=blocks * config.cache_config.block_size if blocks else None,
            step_tokens=config.scheduler_config.max_num_batched_tokens,
        )

    def _asked(self, call: Call) -> dict[str, Any]:
        """The body, with vLLM's own number for the call's class; what is no number vLLM refuses in its own words."""
        body = _salted(call, self._settings.cache_scope)
        if call.endpoint in RANKED and isinstance(body.get("priority"), int | None):
            is_ranked = self._llm.vllm_config.scheduler_config.policy == "priority"
            body["priority"] = 1 if is_ranked and call.priority is Priority.BATCH else 0
        return body

    async def tokens(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        handlers = self._ready_handlers()
        with translated():
            produced = await TOKENS[path](handlers, body)
        refuse_error_response(produced)
        dumped: dict[str, Any] = produced.model_dump(mode="json", exclude_none=path.endswith("count_tokens"))
        return dumped

    async def stored_response(self, response_id: str, *, starting_after: int | None, stream: bool) -> Answer:
        handler = having(self._ready_handlers(), "openai_serving_responses", "the Responses API")
        with translated():
            produced = await handler.retrieve_responses(response_id, starting_after=starting_after, stream=stream)
        return await as_answer(produced, Underway(), by_alias=True)

    async def cancel_response(self, response_id: str) -> Answer:
        handler = having(self._ready_handlers(), "openai_serving_responses", "the Responses API")
        with translated():
            produced = await handler.cancel_responses(response_id)
        return await as_answer(produced, Underway(), by_alias=True)

    def _ready_handlers(self) -> Any:
        if self._handlers is None:
            raise EngineDown("the engine is down", retry_after_s=5)
        return self._handlers


def _salted(call: Call, scope: str) -> dict[str, Any]:
    """The body, with those that may share answers set apart in vLLM's prefix cache too: how soon the first token comes
    would tell one tenant what another has asked."""
    given, caller = call.body.get("cache_salt"), call.caller
    if scope == "global" or not isinstance(given, str | None) or given == "":
        return dict(call.body)
    whose = f"{caller.tenant}:{caller.key_id}" if scope == "key" else caller.tenant
    return call.body | {"cache_salt": hashlib.sha256(f"{whose} {given}".encode("utf-8", "replace")).hexdigest()}


# --- building ------------------------------------------------------------------------------------


def _begin(settings: Settings) -> None:
    """The environment, and the fork server, once per process: it imports vLLM on the other core while we do here."""
    if (variables := sys.modules.get("vllm.envs")) is not None:
        variables.disable_envs_cache()
    _prepare_environment(settings)
    multiprocessing.set_forkserver_preload(["app.engine.preload"])
    os.environ["_REFRAIN_FORKSERVER"] = str(os.getpid())
    try:
        # It dies with the thread that starts it, hence the main one; that takes a few milliseconds.
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["_REFRAIN_FORKSERVER"]


def _keep_variables() -> None:
    """vLLM reads some of its variables once a token, unless it is told that they stay as they are. It tells its cores
    so, and not the process in front of them."""
    from vllm.envs import enable_envs_cache

    enable_envs_cache()


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


def _cpu_seconds(pids: list[int]) -> float | None:
    return cpu_seconds(family(pids))


def _kill(pids: list[int]) -> None:
    """The processes and what they started; one that is stopped takes no other signal."""
    for process in family(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


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
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # an allowed host must not lead to one that is not
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
        "scheduling_policy": "priority",  # where KV cache runs short, a batch's calls give way first
        "use_tqdm_on_load": False,
        "fingerprint_mode": "none",
        # A second lock behind `gate/screen.py`: for vLLM an empty list would be every host.
        "allowed_media_domains": listed(settings.media_hosts) or ["media.invalid"],
        "trust_request_chat_template": "chat_template" in listed(settings.trusted_fields),
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
        if cpu.computes_in_core(settings):
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
