"""From rows to tokens, with everything that was dropped, cut or repeated counted and named by its line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.errors import StartRefused
from app.train import data
from app.train.config import Job
from app.train.data import Problem, Row
from app.train.template import Rendered, Template, Untrainable


@dataclass(frozen=True, slots=True)
class Example:
    line: int
    rendered: Rendered


@dataclass(slots=True)
class Part:
    """One side of the data, training or validation."""

    path: Path
    sha256: str
    examples: list[Example] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    skipped_turns: list[int] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return sorted(len(example.rendered.input_ids) for example in self.examples)

    @property
    def learned_tokens(self) -> int:
        return sum(sum(example.rendered.is_learned) for example in self.examples)


@dataclass(frozen=True, slots=True)
class Prepared:
    train: Part
    validation: Part | None
    repeats: data.Repeats
    leaks: tuple[tuple[int, int], ...]

    def steps_per_epoch(self, job: Job) -> int:
        return math.ceil(len(self.train.examples) / job.batch_size)

    def steps(self, job: Job) -> int:
        """Without packing, which only the trainer can count."""
        return job.max_steps or math.ceil(job.epochs * self.steps_per_epoch(job))


def prepare(job: Job, template: Template) -> Prepared:
    """Both sides of the data as tokens.

    Raises:
        StartRefused: a line cannot be used, a row would be learned as nothing, or held-out prompts are trained on.
    """
    rows = data.read(job.data, job.pairs).require()
    if job.validation:
        held_out = data.read(job.validation, job.pairs).require()
        train_rows, validation_rows, held_path, held_sha = rows.rows, held_out.rows, job.validation, held_out.sha256
    else:
        train_rows, validation_rows = data.split(rows.rows, job.validation_share, job.seed)
        held_path, held_sha = job.data, rows.sha256
    leaked = data.leaks(train_rows, validation_rows)
    if leaked and not job.allow_leaks:
        shown = ", ".join(f"{held} (as line {trained})" for trained, held in leaked[:10])
        raise StartRefused(
            f"{held_path}: {len(leaked)} held-out prompts are in the training data: lines {shown}; "
            "take them out of one of the two, or allow it with --allow-leaks"
        )
    train = _part(job, template, Part(job.data, rows.sha256), train_rows)
    if not train.examples:
        raise StartRefused(f"{job.data}: no row is left to train on")
    validation = _part(job, template, Part(held_path, held_sha), validation_rows) if validation_rows else None
    return Prepared(train, validation if validation and validation.examples else None, data.repeats(rows.rows), leaked)


def _part(job: Job, template: Template, part: Part, rows: Sequence[Row]) -> Part:
    problems = []
    for row in rows:
        try:
            rendered = render(template, row)
            if len(rendered.input_ids) > job.max_length:
                _overlong(job, part, row, rendered)
            else:
                part.examples.append(Example(row.line, rendered))
            if rendered.skipped_turns:
                part.skipped_turns.append(row.line)
        except Untrainable as error:
            problems.append(Problem(row.line, str(error)))
    data.Dataset(part.path, part.sha256, tuple(rows), tuple(problems)).require()
    return part


def _overlong(job: Job, part: Part, row: Row, rendered: Rendered) -> None:
    if job.overlong == "drop":
        part.dropped.append(row.line)
        return
    length = len(rendered.input_ids)
    if job.overlong == "refuse":
        raise Untrainable(
            f"has {length} tokens, max_length is {job.max_length}: shorten it, or set overlong = drop or cut"
        )
    cut = rendered.cut(job.max_length)
    if not any(cut.is_learned):
        raise Untrainable(f"has {length} tokens; cut to max_length = {job.max_length}, every token left is masked")
    part.cut.append(row.line)
    part.examples.append(Example(row.line, cut))


def render(template: Template, row: Row) -> Rendered:
    if row.messages:
        return template.chat(row.messages, row.tools)
    return template.text(row.prompt, row.completion)


def in_words(prepared: Prepared) -> Iterable[str]:
    """What an operator wants to know of the data, line by line."""
    for name, part in (("training", prepared.train), ("validation", prepared.validation)):
        if part is None:
            yield f"{name}: none"
            continue
        lengths = part.lengths
        yield (
            f"{name}: {len(lengths)} rows, {sum(lengths)} tokens, {part.learned_tokens} of them learned; "
            f"per row median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"
        )
        for what, lines in (("dropped as too long", part.dropped), ("cut to max_length", part.cut)):
            if lines:
                yield f"  {what}: {len(lines)}, {_lines(lines)}"
        if part.skipped_turns:
            which = _lines(part.skipped_turns)
            yield f"  turns that the template renders otherwise in a longer conversation, not learned: {which}"
    repeats = prepared.repeats
    if repeats.duplicates:
        yield f"duplicates: {len(repeats.duplicates)}, {_lines([line for _, line in repeats.duplicates])}"
    if repeats.contradictions:
        yield f"same prompt, another answer: {_lines([line for _, line in repeats.contradictions])}"
    if prepared.leaks:
        yield f"held-out prompts that are trained on: {_lines([line for _, line in prepared.leaks])}"


def _lines(lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:12]))
    return f"line{'s' if len(lines) > 1 else ''} {shown}{' ...' if len(lines) > 12 else ''}"
