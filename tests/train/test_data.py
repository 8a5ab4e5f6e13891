"""Every line of a dataset is judged before anything else, and what is wrong is said with its line and its cure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.errors import StartRefused
from app.train import data
from app.train.prepare import in_words, prepare
from app.train.template import Template
from tests.conftest import REPOSITORY

from .conftest import chat, make_job, rows, write

CALL = {"id": "1", "type": "function", "function": {"name": "stock", "arguments": "{}"}}
USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"messages": [', "is no JSON"),
        ("[]", "is no object"),
        (b"\xff\xfe".decode("latin-1"), "is no JSON"),
        ({"message": [USER, GOOD]}, "message: no such field; did you mean messages?"),
        ({"messages": []}, "there is no assistant message"),
        ({"messages": [USER]}, "there is no assistant message: nothing to learn; add the answer"),
        ({"messages": [USER, GOOD, USER]}, "the last message is the user's: end with the assistant's answer"),
        ({"messages": [USER, GOOD | {"weight": 0}]}, "every assistant message has weight 0"),
        ({"messages": [USER, GOOD | {"weight": 2}]}, "messages.1.weight: Input should be 0 or 1"),
        ({"messages": [USER | {"weight": 1}, GOOD]}, "messages.0: tool_calls and weight are for the assistant's"),
        ({"messages": [{"role": "usr", "content": "x"}, GOOD]}, "messages.0.role: Input should be 'system'"),
        ({"messages": [{"role": "user"}, GOOD]}, "messages.0: the user's message is empty"),
        ({"messages": [{"content": "x"}, GOOD]}, "messages.0.role: is missing"),
        ({"messages": [USER | {"text": "x"}, GOOD]}, "messages.0.text: no such field"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "messages.1.content: Input should be a valid"),
        (
            {"messages": [USER, {"role": "tool", "tool_call_id": "9", "content": "3"}, GOOD]},
            "tool_call_id '9' answers no tool call before it",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            "messages.1.tool_calls.0.function.arguments: must be a JSON object as a string",
        ),
        ({"prompt": "x"}, "completion: is missing"),
        ({"prompt": "x", "completion": " "}, "the completion is empty"),
        ({"prompt": "x", "completion": [GOOD]}, "both text, or both lists of messages"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong_and_what_to_do(tmp_path: Path, line: object, told: str) -> None:
    path = write(tmp_path / "data.jsonl", [chat(("user", "a"), ("assistant", "b")), "", line])  # type: ignore[list-item]
    found = data.read(path)
    assert [problem.line for problem in found.problems] == [3]
    assert told in str(found.problems[0])
    with pytest.raises(StartRefused, match="1 lines cannot be used\n  line 3: "):
        found.require()


def test_all_bad_lines_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match=r"12 lines cannot be used(?s:.*)line 10: (?s:.*)and 2 more"):
        data.read(write(tmp_path / "data.jsonl", ["x"] * 12)).require()


def test_a_byte_order_mark_and_parts_of_text_are_taken_as_they_are_meant(tmp_path: Path) -> None:
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, GOOD]}
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(parts).encode())
    assert data.read(path).require().rows[0].messages[0]["content"][0]["text"] == "hi"


def test_a_pair_of_texts_is_a_conversation_or_stays_text(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "hi", "completion": "hello"}])
    assert data.read(path).rows[0].messages == (USER, GOOD)
    row = data.read(path, pairs="text").rows[0]
    assert (row.messages, row.prompt, row.completion) == ((), "hi", "hello")


def test_of_a_pair_of_conversations_the_completion_alone_is_learned(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": [USER, GOOD, USER], "completion": [GOOD]}])
    assert [message.get("weight") for message in data.read(path).rows[0].messages] == [None, 0, None, None]


def test_repeats_and_contradictions_are_found_whatever_the_case_and_the_blanks(tmp_path: Path) -> None:
    lines = [("Hi  there", "a"), ("hi there", "b"), ("Hi  there", "a"), ("other", "a")]
    found = data.read(write(tmp_path / "d.jsonl", [chat(("user", q), ("assistant", a)) for q, a in lines]))
    repeats = data.repeats(found.rows)
    assert repeats.duplicates == ((1, 3),)
    assert repeats.contradictions == ((1, 2),)


def test_held_out_prompts_that_are_trained_on_are_refused_by_line(
    tmp_path: Path, template: Template, tiny: Path
) -> None:
    job = make_job(tmp_path, tiny)
    write(tmp_path / "validation.jsonl", [chat(("user", "what is  3 AND 3?"), ("assistant", "6"))])
    with pytest.raises(StartRefused, match=r"1 held-out prompts are in the training data: lines 1 \(as line 4\)"):
        prepare(job, template)
    allowed = job.model_copy(update={"allow_leaks": True})
    assert "held-out prompts that are trained on: line 1" in "\n".join(in_words(prepare(allowed, template)))


def test_a_split_keeps_together_what_asks_the_same_and_does_not_depend_on_the_order(tmp_path: Path) -> None:
    lines = [*rows(20), *rows(20)]
    found = data.read(write(tmp_path / "d.jsonl", lines)).rows
    train, held_out = data.split(found, 0.2, seed=1)
    assert (len(train), len(held_out)) == (32, 8)
    assert data.leaks(train, held_out) == ()
    turned = data.read(write(tmp_path / "t.jsonl", lines[::-1])).rows
    assert {row.prompt_key for row in data.split(turned, 0.2, seed=1)[1]} == {row.prompt_key for row in held_out}
    assert {row.prompt_key for row in data.split(found, 0.2, seed=2)[1]} != {row.prompt_key for row in held_out}


def test_rows_that_are_too_long_are_dropped_cut_or_refused_and_named(
    tmp_path: Path, template: Template, tiny: Path
) -> None:
    long = [*rows(3), chat(("user", "tell me"), ("assistant", "word " * 200)), *rows(2, 50)]
    job = make_job(tmp_path, tiny, data=write(tmp_path / "d.jsonl", long))
    dropped = prepare(job, template).train
    assert (dropped.dropped, dropped.cut, len(dropped.examples)) == ([4], [], 5)
    cut = prepare(job.model_copy(update={"overlong": "cut"}), template).train
    assert (cut.dropped, cut.cut, cut.lengths[-1]) == ([], [4], 128)
    with pytest.raises(StartRefused, match=r"line 4: has 2.. tokens, max_length is 128"):
        prepare(job.model_copy(update={"overlong": "refuse"}), template)


def test_a_row_cut_so_that_every_token_left_is_masked_is_an_error(
    tmp_path: Path, template: Template, tiny: Path
) -> None:
    """TRL alone would drop it in silence, or learn nothing from it."""
    long = [*rows(3), chat(("user", "word " * 200), ("assistant", "yes"))]
    job = make_job(tmp_path, tiny, data=write(tmp_path / "d.jsonl", long), overlong="cut")
    with pytest.raises(
        StartRefused, match=r"line 4: has 2.. tokens; cut to max_length = 128, every token left is masked"
    ):
        prepare(job, template)


def test_the_support_bots_rows_are_right_and_none_of_its_questions_is_trained_on() -> None:
    folder = REPOSITORY / "examples" / "support-bot"
    train = data.read(folder / "train.jsonl").require().rows
    held_out = data.read(folder / "validation.jsonl").require().rows
    asked = [json.loads(line)["prompt"] for line in (folder / "checks.jsonl").read_text().splitlines()]
    questions = [data.Row(n, ({"role": "user", "content": each}, GOOD)) for n, each in enumerate(asked, 1)]
    assert len(train) >= 120
    assert len({row.prompt_key for row in train}) == len(train), "every row asks something else"
    assert data.leaks(train, [*held_out, *questions]) == ()
