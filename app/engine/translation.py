"""From what vLLM gives and raises to ours: answers in one of the two wire forms, and the error tree."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from app.domain import Answer
from app.engine.underway import Underway, underway
from app.errors import (
    AppError,
    BadCall,
    Busy,
    EngineDown,
    EngineFailed,
    NotFound,
    PromptTooLong,
    RateLimited,
    UnknownModel,
    UnsupportedEndpoint,
)

log = logging.getLogger(__name__)


async def as_answer(produced: Any, about: Underway, *, by_alias: bool, mark: str | None = None) -> Answer:
    """A model, an error, a ready HTTP response or a stream: one of the two wire forms, or a raised AppError."""
    refuse_error_response(produced)
    if hasattr(produced, "__aiter__"):
        return Answer(events=await _opened(produced, about, mark), timings=about.timings)
    if hasattr(produced, "body"):  # pooling handlers give a starlette Response
        return Answer(body=bytes(produced.body), timings=about.timings)
    # As vLLM's own routes do: Anthropic's bodies leave out what is absent, OpenAI's say null.
    is_message = type(produced).__name__.startswith("Anthropic")
    content = produced.model_dump(mode="json", by_alias=by_alias, exclude_none=is_message)
    if mark is not None:
        content["system_fingerprint"] = mark
    return Answer(body=json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(), timings=about.timings)


async def _opened(stream: AsyncGenerator[Any, None], about: Underway, mark: str | None) -> AsyncIterator[bytes]:
    """The stream as bytes, started: a refusal or an early death is raised here and not sent as an event."""
    marked = b'data: {"system_fingerprint":"%s",' % mark.encode() if mark else b""
    try:
        with translated(about):
            first = _as_bytes(await anext(stream), about, marked)
    except StopAsyncIteration:
        raise EngineFailed("the engine gave an empty answer") from None
    except BaseException:
        await stream.aclose()
        raise
    return _streamed(first, stream, about, marked)


async def _streamed(
    first: bytes, rest: AsyncGenerator[Any, None], about: Underway, marked: bytes
) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        underway.set(about)  # Responses ask the engine only after their first event, when `answer` has returned
        with translated(about):
            async for event in rest:
                yield _as_bytes(event, about, marked)


# vLLM would write a fingerprint into the last chunk alone, if no usage event follows; it is told to write none.
_CHUNK_BEGINS = b'data: {"id"'


def _as_bytes(event: Any, about: Underway, marked: bytes) -> bytes:
    """`marked` is how a chunk begins that has a fingerprint. Raises AppError where the event says what broke."""
    if isinstance(event, str):
        content = event.encode()
    else:  # Responses give event objects
        content = f"event: {event.type}\ndata: {event.model_dump_json(indent=None, by_alias=True)}\n\n".encode()
    _refuse_error_event(content, about)
    if marked and content.startswith(_CHUNK_BEGINS):
        return marked + content[len(_CHUNK_BEGINS) - 4 :]
    return content


# --- errors --------------------------------------------------------------------------------------


@contextlib.contextmanager
def translated(about: Underway | None = None) -> Any:
    """vLLM's and pydantic's exceptions leave as ours; around calls and around iteration alike."""
    try:
        yield
    except (AppError, asyncio.CancelledError, GeneratorExit, StopAsyncIteration):
        raise
    except Exception as error:
        known = about.error if about is not None else None
        raise (known or _from_exception(error)) from error


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


def refuse_error_response(produced: Any) -> None:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if isinstance(produced, ErrorResponse):
        raise _app_error(produced.error.message, produced.error.code, produced.error.param)


def _refuse_error_event(event: bytes, about: Underway) -> None:
    """vLLM's handlers say in an event what broke a stream, and then end it as if it were whole ([DONE]).

    Raises:
        AppError: this is such an event. Generated text cannot look like one: it is inside a JSON string.
    """
    if not event.startswith((b'data: {"error"', b"event: error\n")):
        return
    if about.error is not None:
        raise about.error
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
    if status == 400 and "maximum context length" in message:
        return PromptTooLong(message, param=param)
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
