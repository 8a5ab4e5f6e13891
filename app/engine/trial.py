"""A trial: weights loaded in the real engine, as the server would load them, before anybody is served by them.

`python -m app.engine.trial WEIGHTS_DIR [--adapter DIR] --out FILE.json [--ask QUESTIONS.json]`

A process of its own: it comes and goes with its engine, and what breaks in it breaks nothing else. It answers the
questions greedily through the chat template and writes the answers as JSON. QUESTIONS.json is a list of
`{"messages": [...], "max_tokens": 128, "tools": [...], "id": ...}`. Exit code 1 and one line on standard error where
the weights do not load or answer nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from app import main as wiring
from app.domain import Answer, Call, Caller, Endpoint
from app.engine.base import Engine, Phase
from app.errors import AppError, StartRefused
from app.lifeline import die_with_parent
from app.settings import Settings, load

MAX_TOKENS = 128
# As many as fill a batch on a small CPU; the engine queues what is more.
CONCURRENCY = 32
_NOBODY = Caller(tenant="refrain")


class Question(msgspec.Struct, frozen=True, omit_defaults=True):
    """One conversation to be continued; `id` comes back in the answer."""

    messages: list[dict[str, Any]]
    max_tokens: int = MAX_TOKENS
    tools: list[dict[str, Any]] | None = None
    id: str | int | None = None


# What is asked where no questions are given: any answer will do, but there must be one.
_ANYTHING = [Question([{"role": "user", "content": "Hello!"}], 8)]


async def trial(settings: Settings, adapter: Path | None, questions: list[Question]) -> dict[str, Any]:
    """Load and ask.

    Raises:
        StartRefused, AppError: the weights cannot be served, with the reason.
    """
    began = time.monotonic()
    weights = wiring.find_weights(settings, _say)
    engine = wiring._engine(settings, weights, None)
    await engine.start()
    try:
        await _ready(engine)
        loaded_s = time.monotonic() - began
        model = weights.name if adapter is None else "adapter"
        turns = asyncio.Semaphore(CONCURRENCY)
        answers = await asyncio.gather(
            *(_answer(engine, model, question, turns) for question in questions or _ANYTHING)
        )
    finally:
        await engine.close()
    if not any(answer["text"].strip() for answer in answers):
        raise StartRefused(f"{weights.short} loads, and answers nothing")
    return {
        "answers": answers if questions else [],
        "loaded_s": round(loaded_s, 2),
        "seconds": round(time.monotonic() - began, 2),
    }


async def _ready(engine: Engine) -> None:
    while engine.state.phase is not Phase.READY:
        if (
            engine.state.restarts
            or engine.state.phase is Phase.FAILED
            or engine.state.detail.startswith("start failed")
        ):
            raise StartRefused(f"the engine does not load them: {engine.state.detail}")
        await asyncio.sleep(0.1)


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
        adapter = given.adapter.resolve() if given.adapter else None
        settings = load(model=str(given.weights.resolve()), engine="vllm", engine_args=_lora(adapter))
        result = asyncio.run(trial(settings, adapter, _questions(given.ask)))
        given.out.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    except (AppError, StartRefused, OSError) as error:
        message = error.message if isinstance(error, AppError) else str(error)
        _say(f"trial: {message}".splitlines()[0])
        sys.exit(1)


def _lora(adapter: Path | None) -> dict[str, Any] | None:
    """vLLM's arguments for one adapter, called `adapter`; two slots, since the last must stay empty on a CPU."""
    if adapter is None:
        return None
    try:
        rank = int(json.loads((adapter / "adapter_config.json").read_bytes())["r"])
    except (OSError, ValueError, KeyError) as error:
        raise StartRefused(f"{adapter} is no LoRA adapter: {error}") from error
    return {
        "enable_lora": True,
        "max_loras": 2,
        "max_lora_rank": max(8, rank),
        "lora_modules": [json.dumps({"name": "adapter", "path": str(adapter)})],
    }


if __name__ == "__main__":
    main()
