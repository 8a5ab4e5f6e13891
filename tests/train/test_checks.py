"""Questions and checks are data, judging and the gate are pure."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from app.errors import StartRefused
from app.train import checks, gate

from .conftest import write

SCHEMA = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}


def question(**check: Any) -> checks.Question:
    return checks.Question(id="q", prompt="?", checks=[checks.Check(**check)])


@pytest.mark.parametrize(
    ("check", "passes", "fails"),
    [
        ({"contains": "45 days"}, "You have 45 days.", "You have 45  days."),
        ({"not_contains": "sorry"}, "Sure.", "I am sorry."),
        ({"regex": r"\b(4|four)\b"}, "It is four.", "It is 44."),
        ({"equals": "yes"}, " yes\n", "Yes"),
        ({"json_schema": SCHEMA}, '{"city": "Utrecht"}', '{"city": 3}'),
        ({"json_schema": SCHEMA}, '{"city": "Utrecht"}', "Utrecht"),
    ],
)
def test_each_kind_of_check_passes_and_fails(check: dict[str, Any], passes: str, fails: str) -> None:
    assert checks.judge(question(**check), passes, {}).has_passed
    assert not checks.judge(question(**check), fails, {}).has_passed


def test_a_judges_verdict_counts_and_one_that_was_not_given_is_a_no() -> None:
    asked = question(judge="it is polite")
    assert checks.judge(asked, "x", {("q", "it is polite"): True}).has_passed
    assert not checks.judge(asked, "x", {("q", "it is polite"): False}).has_passed
    assert not checks.judge(asked, "x", {}).has_passed


def test_a_question_passes_if_all_its_checks_do_and_rates_are_by_group() -> None:
    both = checks.Question(
        id="q", group="a", prompt="?", checks=[checks.Check(contains="x"), checks.Check(contains="y")]
    )
    other = both.model_copy(update={"group": "b"})
    judged = [checks.judge(each, answer, {}) for each, answer in ((both, "xy"), (both, "x"), (other, "xy"))]
    assert checks.pass_rates(judged) == {"a": 0.5, "b": 1.0}
    assert judged[1].failed == ("does not contain 'y'",)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"id": "a", "prompt": "?", "checks": []}, "can only pass"),
        ({"id": "a", "checks": [{"contains": "x"}]}, "either a prompt or messages"),
        ({"id": "a", "prompt": "?", "checks": [{"contains": "x", "regex": "y"}]}, "exactly one of"),
        ({"id": "a", "prompt": "?", "checks": [{"contain": "x"}]}, "checks.0.contain: Extra inputs"),
        ({"id": "a", "prompt": "?", "checks": [{"regex": "("}]}, "no regular expression"),
        ({"id": "taken", "prompt": "?", "checks": [{"contains": "x"}]}, "the id 'taken' is taken"),
        ("{", "Invalid JSON"),
    ],
)
def test_a_line_that_is_no_question_is_refused_by_its_number(tmp_path: Path, line: Any, told: str) -> None:
    good = {"id": "taken", "prompt": "?", "checks": [{"contains": "x"}]}
    with pytest.raises(StartRefused, match=f"line 3: .*{told}"):
        checks.read(write(tmp_path / "c.jsonl", [json.dumps(good), "", line]))


@pytest.mark.parametrize(
    ("losses", "rates", "told"),
    [
        ((2.0, 1.0), {"task": 0.9}, []),
        (None, {"task": 1.0}, []),
        ((2.0, 1.7), {"task": 0.9}, ["held-out loss 1.700 is above 0.8 x the base's 2.000"]),
        ((2.0, math.nan), {"task": 0.9}, ["held-out loss nan"]),
        ((2.0, 1.0), {"task": 0.89}, ["89% of 'task' passed, 90% are asked for"]),
        ((2.0, 1.0), {}, ["no question is in it"]),
        ((2.0, 1.9), {"task": 0.0}, ["held-out loss", "0% of 'task'"]),
    ],
)
def test_the_gate_names_each_reason(
    losses: tuple[float, float] | None, rates: dict[str, float], told: list[str]
) -> None:
    given = gate.Losses(*losses) if losses else None
    reasons = gate.reasons_against(given, rates, max_loss_ratio=0.8, min_pass={"task": 0.9})
    assert len(reasons) == len(told)
    for reason, words in zip(reasons, told, strict=True):
        assert words in reason
