"""What a conversation is as tokens, and which of them the model is to learn: exactly those it would have to produce.

A finished turn is rendered three ways with the template that will be served: up to the turn as the engine prompts it,
up to its end, and as part of the whole. Where each is the beginning of the next, the turn's tokens are those that the
engine would generate. So the mask needs no template of its own, and holds for every template or says why not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from app.errors import StartRefused

Messages = Sequence[dict[str, Any]]
Tools = list[dict[str, Any]] | None
IGNORED = -100  # what PyTorch's cross entropy leaves out


class Untrainable(ValueError):
    """Raised when a conversation cannot be rendered, or nothing of it would be learned; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Tokens, and for each whether it is learned."""

    text: str
    input_ids: list[int]
    is_learned: list[bool]
    # Turns that the template renders otherwise once more turns follow (Qwen3 drops earlier reasoning).
    skipped_turns: int = 0

    @property
    def labels(self) -> list[int]:
        return [token if learned else IGNORED for token, learned in zip(self.input_ids, self.is_learned, strict=True)]

    def cut(self, length: int) -> Rendered:
        return Rendered(self.text, self.input_ids[:length], self.is_learned[:length], self.skipped_turns)


class Template:
    """The chat template of a folder of weights, with the tokenizer, and the tokens at which the engine stops."""

    def __init__(self, tokenizer: Any, stops: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self._stops = stops

    @classmethod
    def of(cls, folder: Path) -> Template:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        if not tokenizer.is_fast:
            raise StartRefused(
                f"{folder} has no tokenizer.json: without one it is not known which text a token stands for"
            )
        return cls(tokenizer, _stops(folder) | {tokenizer.eos_token_id})

    @property
    def digest(self) -> str:
        """Of the template's text; training and publication are compared by it."""
        return hashlib.sha256(json.dumps(self.tokenizer.chat_template, sort_keys=True).encode()).hexdigest()

    def chat(self, messages: Messages, tools: Tools = None) -> Rendered:
        """One conversation; learned are the assistant's turns whose `weight` is not 0, with the token that ends each.

        Raises:
            Untrainable: the template refuses the conversation, or no turn of it is rendered as the engine prompts it.
        """
        plain = [_as_the_engine_reads_it(message) for message in messages]
        text = self._apply(plain, tools, prompt=False)
        turns, skipped = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            prompt = self._apply(plain[:number], tools, prompt=True)
            turn = self._apply(plain[: number + 1], tools, prompt=False)
            if text.startswith(turn) and turn.startswith(prompt) and len(turn) > len(prompt):
                turns.append((len(prompt), len(turn)))
            else:
                skipped += 1
        if not turns:
            raise Untrainable(_why_nothing(messages, skipped))
        ids, offsets = self._tokens_as_prompted(text, [start for start, _ in turns])
        learned = [False] * len(ids)
        for start, end in turns:
            span = _span(offsets, start, end)
            stop = next((place for place in reversed(span) if ids[place] in self._stops), None)
            if stop is None:
                raise Untrainable("the chat template ends an answer by no token at which the engine stops")
            for place in span[: span.index(stop) + 1]:  # after it the engine has stopped
                learned[place] = True
        return Rendered(text, ids, learned, skipped)

    def text(self, prompt: str, completion: str) -> Rendered:
        """A pair for `/v1/completions`: no template; learned are the completion and the end-of-text token."""
        ids, offsets = self._tokens(prompt + completion, add_special_tokens=True)
        learned = [False] * len(ids)
        for place in _span(offsets, len(prompt), len(prompt) + len(completion)):
            learned[place] = True
        if not any(learned):
            raise Untrainable("the completion is empty: write the text that the model is to learn")
        return Rendered(prompt + completion, [*ids, self.tokenizer.eos_token_id], [*learned, True])

    def prompt(self, messages: Messages, tools: Tools = None) -> str:
        """The conversation as the engine prompts it."""
        return self._apply([_as_the_engine_reads_it(message) for message in messages], tools, prompt=True)

    def _tokens_as_prompted(self, text: str, starts: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of `text`, those before each of `starts` being the ones that the engine is prompted with.

        Mostly they are anyway. But a tokenizer may join the prompt's last blanks with the answer's first, or part them
        because an answer follows (GPT-2's cuts two line breaks in two before a letter): then the text is cut there.
        """
        ids, offsets = self._tokens(text)
        if all(ids[: len(prompt)] == prompt for prompt in (self._tokens(text[:start])[0] for start in starts)):
            return ids, offsets
        cut_ids: list[int] = []
        cut_offsets: list[tuple[int, int]] = []
        for first, last in pairwise([0, *starts, len(text)]):
            piece, places = self._tokens(text[first:last])
            cut_ids += piece
            cut_offsets += [(first + begin, first + end) for begin, end in places]
        if self.tokenizer.decode(cut_ids) != self.tokenizer.decode(ids):  # one that adds a blank before every text
            raise Untrainable(
                "the answer's beginning and the prompt's end share a token: let it begin without blanks or line breaks"
            )
        return cut_ids, cut_offsets

    def _tokens(self, text: str, *, add_special_tokens: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])

    def _apply(self, messages: Messages, tools: Tools, *, prompt: bool) -> str:
        from jinja2 import TemplateError

        options = {"tools": tools or None, "tokenize": False, "add_generation_prompt": prompt}
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), **options))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise Untrainable(f"the chat template refuses the conversation: {error}") from error


def _span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """The tokens of `text[start:end]`."""
    return [place for place, (first, last) in enumerate(offsets) if first >= start and first < last <= end]


def _stops(folder: Path) -> frozenset[int]:
    """`eos_token_id` of the generation config, or else of the model's: the engine takes it from the same places."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def _why_nothing(messages: Messages, skipped: int) -> str:
    if skipped:
        return (
            "the chat template renders the answer otherwise than the engine prompts it, so nothing of it can be "
            "learned: see that each answer follows a user's or a tool's turn"
        )
    if any(message["role"] == "assistant" for message in messages):
        return "every token is masked: give one of the assistant's messages weight 1"
    return "every token is masked: there is no assistant message to learn"


def _as_the_engine_reads_it(message: dict[str, Any]) -> dict[str, Any]:
    """As vLLM 0.32 hands it to the template: parts as one string, arguments of tool calls as objects, no weight."""
    plain = {key: value for key, value in message.items() if key != "weight" and value is not None}
    if isinstance(plain.get("content"), list):
        plain["content"] = "\n".join(part["text"] for part in plain["content"])
    if calls := plain.get("tool_calls"):
        plain.setdefault("content", "")
        plain["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"] or "{}")}}
            for call in calls
        ]
    return plain
