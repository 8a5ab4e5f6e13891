"""A trial: weights loaded in the real engine, as the server would load them, before anybody is served by them.

`python -m app.engine.trial WEIGHTS_DIR [--adapter DIR] --out FILE.json [--ask QUESTIONS.json]`

A process of its own: it comes and goes with its engine, and what breaks in it breaks nothing else. It measures the
fingerprint that a manifest keeps, answers the questions greedily through the chat template, and writes both as JSON.
QUESTIONS.json is a list of `{"messages": [...], "max_tokens": 128, "tools": [...], "id": ...}`. Exit code 1
and one line on standard error where the weights do not load, compute nonsense, or answer nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from app import main as wiring
from app.domain import Answer, Call, Caller, Endpoint, Weights
from app.engine.base import Engine
from app.engine.measure import measure
from app.errors import AppError, Refused, StartRefused
from app.lifeline import die_with_parent
from app.settings import Settings, load
from app.weights import Mismatch, check_shapes, digest_files, fingerprint_of, weights_digest

MAX_TOKENS = 128
# As many as fill a batch on a small CPU.
CONCURRENCY = 32
_NOBODY = Caller(tenant="refrain")


class Question(msgspec.Struct, frozen=True, omit_defaults=True):
    """One conversation to be continued; `id` comes back in the answer."""

    messages: list[dict[str, Any]]
    max_tokens: int = MAX_TOKENS
    tools: list[dict[str, Any]] | None = None
    id: str | int | None = None


async def trial(settings: Settings, adapter: Path | None, questions: list[Question]) -> dict[str, Any]:
    """Load, measure, ask.

    Raises:
        StartRefused, AppError, Mismatch: the weights cannot be served, with the reason.
    """
    began = time.monotonic()
    weights = wiring.find_weights(settings, _say)
    engine = wiring.make_engine(settings, weights, is_trial=True)
    await engine.try_start()
    try:
        check_shapes(Path(weights.path))
        loaded_s = time.monotonic() - began
        asked = weights if adapter is None else await _with_adapter(engine, weights, adapter)
        measured = getattr(engine, "fingerprint", {})
        if adapter is not None:
            prompts = await measure(engine.answer, asked.name)
            measured = fingerprint_of(prompts, dtype=measured["dtype"], quantization=settings.quantization)
        turns = asyncio.Semaphore(CONCURRENCY)
        answers = await asyncio.gather(*(_answer(engine, asked.name, question, turns) for question in questions))
        is_alive = any(answer["text"].strip() for answer in answers) or (not questions and await _speaks(engine, asked))
    finally:
        await engine.close()
        await wiring.end_engines(settings)
    if not is_alive:
        raise StartRefused(f"{asked.short} loads, and answers nothing")
    return {
        "fingerprint": measured,
        "answers": answers,
        "loaded_s": round(loaded_s, 2),
        "seconds": round(time.monotonic() - began, 2),
    }


async def _with_adapter(engine: Engine, base: Weights, adapter: Path) -> Weights:
    files = await asyncio.to_thread(digest_files, adapter)
    weights = replace(base, name="adapter", path=str(adapter), digest=weights_digest(files), base=base.digest)
    await engine.load_adapter(weights)
    return weights


async def _answer(engine: Engine, model: str, question: Question, turns: asyncio.Semaphore) -> dict[str, Any]:
    body = {"model": model, "temperature": 0, "messages": question.messages, "max_tokens": question.max_tokens}
    if question.tools:
        body["tools"] = question.tools
    async with turns:
        answer: Answer = await engine.answer(Call(Endpoint.CHAT, body, _NOBODY, "trial"))
    told = json.loads(answer.body or b"{}")
    choice, usage = told["choices"][0], told["usage"]
    return {
        "id": question.id,
        "text": choice["message"].get("content") or "",
        "finish_reason": choice["finish_reason"],
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
    }


async def _speaks(engine: Engine, weights: Weights) -> bool:
    """Whether the weights do what they are for: chat, or go on with a text, or embed it."""
    model, at_most = weights.name, {"max_tokens": 8, "temperature": 0}
    hello = {"messages": [{"role": "user", "content": "Hello!"}]}
    bodies: list[tuple[Endpoint, dict[str, Any]]] = [
        (Endpoint.CHAT, hello | at_most),
        (Endpoint.COMPLETIONS, {"prompt": "Hello! My name is"} | at_most),
        (Endpoint.EMBEDDINGS, {"input": "Hello!"}),
    ]
    for endpoint, body in bodies:
        try:
            answer = await engine.answer(Call(endpoint, body | {"model": model}, _NOBODY, "trial"))
        except Refused:
            continue
        told = json.loads(answer.body or b"{}")
        if endpoint is Endpoint.EMBEDDINGS:
            return bool(told["data"])
        choice = told["choices"][0]
        return bool((choice.get("text") or (choice.get("message") or {}).get("content") or "").strip())
    return False


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _questions(path: Path | None) -> list[Question]:
    if path is None:
        return []
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Question])
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise StartRefused(f"{path} is no list of questions: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m app.engine.trial", description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path, help="a folder of Hugging Face weights")
    parser.add_argument("--adapter", type=Path, help="a folder of a LoRA adapter of them")
    parser.add_argument("--ask", type=Path, help="questions, as JSON")
    parser.add_argument("--out", type=Path, required=True, help="where the result goes, as JSON")
    given = parser.parse_args()
    die_with_parent(signal.SIGKILL)
    try:
        settings = load(model=str(given.weights.resolve()), engine="vllm", **_places(given.adapter))
        questions = _questions(given.ask)
        result = asyncio.run(trial(settings, given.adapter and given.adapter.resolve(), questions))
        given.out.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    except (AppError, StartRefused, Mismatch, OSError) as error:
        message = error.message if isinstance(error, AppError) else str(error)
        _say(f"trial: {message}".splitlines()[0])
        sys.exit(1)


def _places(adapter: Path | None) -> dict[str, int]:
    """Settings that make room for this one adapter, whatever its rank."""
    if adapter is None:
        return {}
    try:
        rank = int(json.loads((adapter / "adapter_config.json").read_bytes())["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartRefused(f"{adapter} is no LoRA adapter: {error}") from error
    return {"max_adapters": 1, "max_adapter_rank": next((size for size in (8, 16, 32, 64, 128) if rank <= size), 256)}


if __name__ == "__main__":
    main()
