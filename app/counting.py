"""How many tokens a call's prompt has: asked of the engine where it can tell, bounded by its bytes elsewhere."""

from __future__ import annotations

import json
from typing import Any

from app.domain import Call, Endpoint
from app.engine import Engine
from app.errors import AppError, PromptTooLong
from app.gate.economy import choices, output_limit
from app.gate.limits import Usage
from app.serving import Serving

_PROMPT = ("messages", "system", "tools", "prompt", "suffix", "input", "instructions")
# The template's own words around the messages, and a system prompt that it brings along.
_TEMPLATE_TOKENS = 256
# Of a model whose length is not known.
_MOST_TOKENS = 32_768
# What of a call the question for its tokens has too.
_ASKED = {
    Endpoint.CHAT: (
        "model messages tools add_generation_prompt continue_final_message chat_template_kwargs add_special_tokens"
    ).split(),
    Endpoint.MESSAGES: "model messages system tools tool_choice".split(),
}
_PATHS = {Endpoint.CHAT: "/tokenize", Endpoint.MESSAGES: "/v1/messages/count_tokens"}


async def exactly(endpoint: Endpoint, body: dict[str, Any], engine: Engine) -> int:
    """The prompt's tokens, the template's with them, of a chat or message. Raises AppError."""
    asked = {name: body[name] for name in _ASKED[endpoint] if name in body}
    found = await engine.tokens(_PATHS[endpoint], asked)
    return int(found["count"] if "count" in found else found["input_tokens"])


def at_most(body: dict[str, Any]) -> int:
    """No tokenizer makes more tokens than there are bytes. Images are not in it."""
    return len(json.dumps([body.get(name) for name in _PROMPT])) + _TEMPLATE_TOKENS


async def in_numbers(refused: PromptTooLong, call: Call, serving: Serving) -> PromptTooLong:
    """The refusal in OpenAI's words, with the numbers; vLLM stops counting where it is too much."""
    tokens, longest = await _counted(call, serving.engine), serving.weights.max_model_len
    if tokens is None or longest is None:
        return refused
    what = "prompt" if call.endpoint is Endpoint.COMPLETIONS else "messages"
    return PromptTooLong(
        f"This model's maximum context length is {longest} tokens. However, your {what} resulted in {tokens} tokens."
        f" Please reduce the length of the {what}.",
        param=what,
    )


async def most_usage(call: Call, serving: Serving) -> Usage:
    """What a call may take; the prompt counted where the engine can, else bounded. Raises BadCall."""
    _, limit = output_limit(call.endpoint, call.body)
    answers, prompt = choices(call.body), await _counted(call, serving.engine)
    most = at_most(call.body) if prompt is None else prompt
    if call.endpoint is Endpoint.EMBEDDINGS:
        return Usage(most, 0)
    room = max(0, (serving.weights.max_model_len or _MOST_TOKENS) - (prompt or 0))
    return Usage(most, answers * max(0, room if limit is None else min(limit, room)))


async def _counted(call: Call, engine: Engine) -> int | None:
    """The prompt's tokens; None where the engine cannot tell now."""
    try:
        if call.endpoint in _PATHS:
            return await exactly(call.endpoint, call.body, engine)
        if call.endpoint is Endpoint.COMPLETIONS and isinstance(prompt := call.body.get("prompt"), str):
            asked = {"model": call.body.get("model"), "prompt": prompt}
            return int((await engine.tokens("/tokenize", asked))["count"])
    except AppError:  # it is loading, or will refuse the call: in its own words, and not here
        pass
    return None
