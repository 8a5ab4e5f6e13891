"""Questions with what must be true of their answers, as data; judging them is a pure function."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from app.errors import StartRefused


class Check(BaseModel):
    """Exactly one of these. Texts are compared as they are; `equals` ignores blanks at both ends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    contains: str | None = None
    not_contains: str | None = None
    regex: str | None = None
    equals: str | None = None
    json_schema: dict[str, Any] | None = None
    judge: str | None = None

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _is_one(self) -> Check:
        if len(self.model_fields_set) != 1:
            raise ValueError("a check is exactly one of contains, not_contains, regex, equals, json_schema, judge")
        return self


class Question(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: str
    group: str = "task"
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    checks: list[Check]

    @model_validator(mode="after")
    def _asks(self) -> Question:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a question has either a prompt or messages")
        if not self.checks:
            raise ValueError("a question without checks can only pass: give it one")
        return self

    @property
    def conversation(self) -> list[dict[str, Any]]:
        return self.messages or [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True, slots=True)
class Judged:
    question: Question
    answer: str
    failed: tuple[str, ...]  # what was not true, in words

    @property
    def has_passed(self) -> bool:
        return not self.failed


def read(path: Path) -> tuple[Question, ...]:
    """All questions; `StartRefused` names the first line that is none."""
    questions: dict[str, Question] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise StartRefused(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = Question.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            raise StartRefused(f"{path}: line {number}: {f'{where}: ' if where else ''}{message}") from error
        if question.id in questions:
            raise StartRefused(f"{path}: line {number}: the id {question.id!r} is taken; ids are unique")
        questions[question.id] = question
    if not questions:
        raise StartRefused(f"{path} holds no questions")
    return tuple(questions.values())


def judge(question: Question, answer: str, verdicts: Mapping[tuple[str, str], bool]) -> Judged:
    """`verdicts`: what the base model said where a check asks it to judge, by question and criterion."""
    failed = [said for check in question.checks if (said := _failure(check, answer, question.id, verdicts))]
    return Judged(question, answer, tuple(failed))


def _failure(check: Check, answer: str, question: str, verdicts: Mapping[tuple[str, str], bool]) -> str:
    """Empty if it is true."""
    if check.contains is not None:
        return "" if check.contains in answer else f"does not contain {check.contains!r}"
    if check.not_contains is not None:
        return "" if check.not_contains not in answer else f"contains {check.not_contains!r}"
    if check.regex is not None:
        return "" if re.search(check.regex, answer) else f"does not match {check.regex!r}"
    if check.equals is not None:
        return "" if check.equals.strip() == answer.strip() else f"is not {check.equals!r}"
    if check.judge is not None:
        return "" if verdicts.get((question, check.judge)) else f"the judge says no: {check.judge}"
    return _against_schema(check.json_schema or {}, answer)


def _against_schema(schema: dict[str, Any], answer: str) -> str:
    from jsonschema import Draft202012Validator

    try:
        value = json.loads(answer)
    except ValueError:
        return "is no JSON"
    error = next(iter(Draft202012Validator(schema).iter_errors(value)), None)
    return f"does not fit the schema: {error.message}" if error else ""


def judge_prompt(criterion: str, question: Question, answer: str) -> list[dict[str, Any]]:
    asked = question.conversation[-1]["content"]
    text = (
        f"Question: {asked}\n\nAnswer: {answer}\n\nIs this true of the answer: {criterion}\n"
        "Reply with one word, yes or no."
    )
    return [{"role": "user", "content": text}]


def pass_rates(judged: Sequence[Judged]) -> dict[str, float]:
    """The share that passed, by group."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for each in judged:
        groups[each.question.group].append(each.has_passed)
    return {group: sum(passed) / len(passed) for group, passed in groups.items()}
