"""The rows of a dataset: read and judged line by line, before anything costs time. It knows neither models nor tokens.

A row is OpenAI's fine-tuning chat format (`messages`, `tools`, a `weight` per message), or a pair (`prompt`,
`completion`), one JSON object per line.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from app.errors import StartRefused

Role = Literal["system", "developer", "user", "assistant", "tool"]
Pairs = Literal["chat", "text"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Part(_Strict):
    type: Literal["text"]
    text: str


class Function(_Strict):
    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_a_json_object(cls, value: str) -> str:
        try:
            is_object = isinstance(json.loads(value or "{}"), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise ValueError('must be a JSON object as a string, like "{\\"city\\": \\"Utrecht\\"}"')
        return value


class ToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: Function


class Message(_Strict):
    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    weight: Literal[0, 1] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Message:
        said = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        if not said.strip() and not self.tool_calls:
            raise ValueError(f"the {self.role}'s message is empty: give it content, or leave it out")
        if self.role != "assistant" and (self.tool_calls or self.weight is not None):
            raise ValueError("tool_calls and weight are for the assistant's messages alone")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("a tool's message, and no other, has a tool_call_id")
        return self


class ChatRow(_Strict):
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _can_be_learned_from(self) -> ChatRow:
        answers = [message for message in self.messages if message.role == "assistant"]
        if not answers:
            raise ValueError("there is no assistant message: nothing to learn; add the answer")
        if all(message.weight == 0 for message in answers):
            raise ValueError("every assistant message has weight 0: nothing to learn; give one weight 1")
        if self.messages[-1].role != "assistant":
            raise ValueError(f"the last message is the {self.messages[-1].role}'s: end with the assistant's answer")
        called: set[str] = set()
        for message in self.messages:
            called |= {call.id for call in message.tool_calls or ()}
            if message.tool_call_id is not None and message.tool_call_id not in called:
                raise ValueError(f"tool_call_id {message.tool_call_id!r} answers no tool call before it")
        return self


class PairRow(_Strict):
    prompt: str | list[Message]
    completion: str | list[Message]

    @model_validator(mode="after")
    def _can_be_learned_from(self) -> PairRow:
        if isinstance(self.prompt, str) != isinstance(self.completion, str):
            raise ValueError("prompt and completion are both text, or both lists of messages")
        if not self.completion or (isinstance(self.completion, str) and not self.completion.strip()):
            raise ValueError("the completion is empty: write the text that the model is to learn")
        return self


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation, or with `pairs = "text"` a pair of texts; `line` counts from 1."""

    line: int
    messages: tuple[dict[str, Any], ...] = ()
    tools: list[dict[str, Any]] | None = None
    prompt: str = ""
    completion: str = ""

    @property
    def prompt_key(self) -> str:
        """Equal for rows that ask the same, whatever the case and the blanks: all but the last answer."""
        asked = [(message["role"], _words(message)) for message in self.messages[:-1]]
        return _sha256([asked or " ".join(self.prompt.lower().split()), self.tools])

    @property
    def key(self) -> str:
        return _sha256([self.messages, self.tools, self.prompt, self.completion])


@dataclass(frozen=True, slots=True)
class Problem:
    line: int
    what: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.what}"


@dataclass(frozen=True, slots=True)
class Dataset:
    path: Path
    sha256: str
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]

    def require(self) -> Dataset:
        """Itself, if every line is right; else `StartRefused` names the first few that are not."""
        if self.problems:
            shown = "\n".join(f"  {problem}" for problem in self.problems[:10])
            more = f"\n  and {len(self.problems) - 10} more" if len(self.problems) > 10 else ""
            raise StartRefused(f"{self.path}: {len(self.problems)} lines cannot be used\n{shown}{more}")
        if not self.rows:
            raise StartRefused(f"{self.path} holds no rows")
        return self


def read(path: Path, pairs: Pairs = "chat") -> Dataset:
    """All rows and all problems. `StartRefused` if the file itself cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartRefused(f"{path} cannot be read: {error.strerror}") from error
    rows, problems = [], []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(number, line, pairs))
        except ValueError as error:  # pydantic's is one too
            problems.append(Problem(number, _in_words(error)))
    return Dataset(path, hashlib.sha256(content).hexdigest(), tuple(rows), tuple(problems))


def _row(number: int, line: bytes, pairs: Pairs) -> Row:
    try:
        given = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is no JSON ({error.msg} at column {error.colno}): one object per line, no commas between"
        ) from error
    if not isinstance(given, dict):
        raise ValueError('is no object: write {"messages": [...]}')  # noqa: TRY004  # a line's mistakes are ValueErrors
    if "prompt" in given or "completion" in given:
        return _pair(number, PairRow.model_validate(given), pairs)
    row = ChatRow.model_validate(given)
    return Row(number, _dumped(row.messages), row.tools)


def _pair(number: int, row: PairRow, pairs: Pairs) -> Row:
    """A pair becomes a conversation of which the completion is learned; pairs of text may stay text."""
    if isinstance(row.prompt, str) and isinstance(row.completion, str):
        if pairs == "text":
            return Row(number, prompt=row.prompt, completion=row.completion)
        turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]
        return Row(number, _dumped(ChatRow.model_validate({"messages": turns}).messages))
    assert isinstance(row.prompt, list) and isinstance(row.completion, list)  # noqa: S101, PT018  # for mypy
    before = [message | {"weight": 0} if message["role"] == "assistant" else message for message in _dumped(row.prompt)]
    whole = ChatRow.model_validate({"messages": [*before, *_dumped(row.completion)]})
    return Row(number, _dumped(whole.messages))


def _dumped(messages: Iterable[Message]) -> tuple[dict[str, Any], ...]:
    return tuple(message.model_dump(exclude_none=True) for message in messages)


_FIELDS = {name for model in (ChatRow, PairRow, Message, ToolCall, Function, Part) for name in model.model_fields}


def _in_words(error: ValueError) -> str:
    """The first thing that is wrong, where it stands, and what is meant instead."""
    if not isinstance(error, ValidationError):
        return str(error)
    # Of the shapes that a field may have, the one that went deepest is the one that was meant.
    first = max(error.errors(include_url=False), key=lambda each: (each["type"] == "extra_forbidden", len(each["loc"])))
    # Names of the union's branches ("str", "list[Part]") are ours, not the user's.
    path = [
        str(part)
        for part in first["loc"]
        if isinstance(part, int) or str(part) in _FIELDS or first["type"] == "extra_forbidden"
    ]
    where = ".".join(path)
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], _FIELDS, n=1)
        message = f"no such field{f'; did you mean {close[0]}?' if close else ': leave it out'}"
    elif first["type"] == "missing":
        message = "is missing"
    return f"{where}: {message}" if where else message


@dataclass(frozen=True, slots=True)
class Repeats:
    """Lines that say the same as an earlier one, and lines that answer the same prompt otherwise."""

    duplicates: tuple[tuple[int, int], ...]
    contradictions: tuple[tuple[int, int], ...]


def repeats(rows: Sequence[Row]) -> Repeats:
    whole: dict[str, int] = {}
    asked: dict[str, int] = {}
    duplicates, contradictions = [], []
    for row in rows:
        if (first := whole.setdefault(row.key, row.line)) != row.line:
            duplicates.append((first, row.line))
        elif (first := asked.setdefault(row.prompt_key, row.line)) != row.line:
            contradictions.append((first, row.line))
    return Repeats(tuple(duplicates), tuple(contradictions))


def leaks(train: Sequence[Row], held_out: Sequence[Row]) -> tuple[tuple[int, int], ...]:
    """Pairs of lines (training, held out) that ask the same: what is measured there was learned by heart."""
    known = {row.prompt_key: row.line for row in train}
    return tuple((known[row.prompt_key], row.line) for row in held_out if row.prompt_key in known)


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Training and validation; rows that ask the same stay together, and the order of the file does not matter."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.prompt_key].append(row)
    shuffled = sorted(groups, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    held_out = {row.line for key in shuffled[: round(len(shuffled) * share)] for row in groups[key]}
    return tuple(row for row in rows if row.line not in held_out), tuple(row for row in rows if row.line in held_out)


def _words(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else " ".join(part["text"] for part in content)
    calls = json.dumps(message.get("tool_calls") or [], sort_keys=True)
    return " ".join(f"{text} {calls}".lower().split())


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
