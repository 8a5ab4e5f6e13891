"""What a call asks of the engine, in tokens, as far as its body says. Pure; nothing is tokenised here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.domain import Call, Endpoint

# The weights of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024, section 3.1), which follow the
# usual price lists: an output token costs a pass over the weights of its own, prompt tokens share theirs.
PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0

# Where a prompt stands in a body, and what stands there without being text (pictures and sound).
_PROMPT_FIELDS = ("messages", "prompt", "input", "system", "instructions", "tools", "documents")
_NO_TEXT = frozenset({"image_url", "input_audio", "audio_url", "video_url", "file", "file_data", "data"})
# What vLLM takes where a completion sets no limit.
_COMPLETION_LIMIT = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """The size of a prompt in characters and in tokens that came as numbers; `limit` is the most output tokens of
    one sequence, None where only the context ends it."""

    characters: int
    token_ids: int
    limit: int | None
    sequences: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a call is expected to take, over all its sequences."""

    prompt_tokens: int
    output_tokens: int
    sequences: int = 1

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    @property
    def cost(self) -> float:
        return cost(self.prompt_tokens, self.output_tokens)


def cost(prompt_tokens: float, output_tokens: float) -> float:
    """What fairness and the drain rate count."""
    return PROMPT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens


def asked(call: Call) -> Asked:
    body = call.body
    characters = token_ids = 0
    for name in _PROMPT_FIELDS:
        if (value := body.get(name)) is not None:
            more_characters, more_ids = _size(value)
            characters, token_ids = characters + more_characters, token_ids + more_ids
    return Asked(characters, token_ids, _limit(call), _sequences(call))


def _size(value: Any) -> tuple[int, int]:
    """Characters, and numbers of a list of token ids."""
    if isinstance(value, str):
        return (0 if value.startswith("data:") else len(value)), 0
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return 0, len(value)
        sizes = [_size(each) for each in value]
    elif isinstance(value, dict):
        sizes = [_size(each) for name, each in value.items() if name not in _NO_TEXT]
    else:
        return 0, 0
    return sum(size[0] for size in sizes), sum(size[1] for size in sizes)


def _limit(call: Call) -> int | None:
    if call.endpoint is Endpoint.EMBEDDINGS:
        return 0
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        if (value := _count(call.body.get(name))) is not None:
            return value
    return _COMPLETION_LIMIT if call.endpoint is Endpoint.COMPLETIONS else None


def _sequences(call: Call) -> int:
    prompt, name = (call.body.get("input"), "") if call.endpoint is Endpoint.EMBEDDINGS else (None, "n")
    if call.endpoint is Endpoint.COMPLETIONS:
        prompt = call.body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return prompts * max(1, _count(call.body.get(name)) or 1)


def _count(value: Any) -> int | None:
    """A count that a body gives; anything else the engine refuses in its own words."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
