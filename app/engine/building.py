"""vLLM's engine and its handlers, built from its own arguments; and one more core for an engine that lost its own."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from app.domain import Timings
from app.engine.core import LastingCore
from app.engine.meter import Meter
from app.engine.running import Running
from app.engine.steps import watch_steps
from app.engine.underway import Underway, underway
from app.errors import AppError, EngineDown, EngineFailed
from app.observe.traces import carrier


def build(args: Any, meter: Meter) -> Any:
    """An AsyncLLM that outlives its cores, and tells the meter what they compute. Blocks until its first core is up."""
    import vllm.v1.engine.utils as core_processes
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    # vLLM takes spawn or fork only (on a CPU it insists on spawn); its context is replaced by ours.
    core_processes.get_mp_context = lambda: multiprocessing.get_context("forkserver")

    class LastingLLM(AsyncLLM):  # type: ignore[misc]
        """AsyncLLM on a core that may be replaced, that notes each call's timings where the call itself reads them."""

        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            capacity = self.vllm_config.scheduler_config.max_num_seqs
            self.engine_core: Any = LastingCore(self.engine_core, self.output_processor, capacity, self._renewed)

        @property
        def errored(self) -> bool:
            return bool(self.engine_core.is_given_up) or not self.is_running

        def _renewed(self, running: Running) -> Any:
            return _renewed(self.output_processor, running)

        async def generate(self, *given: Any, **options: Any) -> AsyncGenerator[Any, None]:
            about = underway.get() or Underway()
            if args.otlp_traces_endpoint is not None:  # else vLLM warns that nobody takes its spans
                options["trace_headers"] = carrier()
            try:
                async with aclosing(super().generate(*given, **options)) as outputs:
                    async for output in outputs:
                        _note(about.timings, output)
                        if any(part.finish_reason == "abort" for part in output.outputs):
                            # The Responses handler would call it "completed". An answer is whole or an error.
                            raise EngineFailed("the generation was aborted")
                        yield output
            except EngineDeadError:
                about.error = EngineDown("the engine stopped while it worked on this call", retry_after_s=5)
                raise
            except AppError as error:  # the handlers would put it into words of their own
                about.error = error
                raise

    llm = LastingLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
    watch_steps(llm, meter, lambda: about.timings if (about := underway.get()) else None)
    return llm


def another_core(args: Any, llm: Any) -> Any:
    """A process like the one that was lost. Blocks until it is up; from a fresh config, since a core's answer to a
    client changes the one that it was started with."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.executor import Executor

    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    return EngineCoreClient.make_async_mp_client(config, Executor.get_class(config), llm.log_stats)


async def host_handlers(llm: Any, args: Any) -> Any:
    """vLLM's own handlers of every endpoint that the model supports, on this engine."""
    from starlette.datastructures import State
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state

    handlers = State()
    await init_app_state(llm, handlers, args, await llm.get_supported_tasks())
    return handlers


def _renewed(states: Any, running: Running) -> Any:
    """The state of this call as it was before its first token; what it belongs to, and who waits for it, stay."""
    from vllm.v1.engine.output_processor import RequestState

    old = running.state
    fresh = RequestState.from_new_request(
        tokenizer=states.tokenizer,
        request=copy.copy(running.request),
        prompt=old.prompt,
        parent_req=old.parent_req,
        request_index=old.request_index,
        queue=old.queue,
        log_stats=states.log_stats,
        stream_interval=states.stream_interval,
    )
    states.request_states[old.request_id] = fresh
    return fresh


def _note(timings: Timings, output: Any) -> None:
    timings.streamed_tokens += sum(len(part.token_ids) for part in output.outputs)
    stats = output.metrics
    if stats is None:
        return
    timings.queue_s = stats.scheduled_ts - stats.queued_ts
    timings.prefill_s = stats.first_token_ts - stats.scheduled_ts
    timings.decode_s = stats.last_token_ts - stats.first_token_ts
    timings.prompt_tokens = len(output.prompt_token_ids or ())
    timings.completion_tokens = stats.num_generation_tokens
