"""`refrain finetune check`: what a dataset holds and costs, and what the engine will see of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from app.errors import StartRefused
from app.train.look import count_parameters, look, marked
from app.train.prepare import prepare
from app.train.template import Template

from .conftest import chat, make_job, rows, write


def test_it_counts_estimates_and_shows_two_rows_with_what_is_learned_marked(tiny: Path, tmp_path: Path) -> None:
    lines = [*rows(10), *rows(1), chat(("user", "What is 1 and 1?"), ("assistant", "Three."))]
    job = make_job(tmp_path / "d", tiny, data=write(tmp_path / "x.jsonl", lines), max_steps=None, epochs=2.0)
    told = list(look(job, tmp_path, lambda line: None))
    text = "\n".join(told)
    assert "training: 12 rows" in text
    assert "validation: 4 rows" in text
    assert "duplicates: 1, line 11" in text
    assert "same prompt, another answer: line 12" in text
    assert "steps: 6 of 4 rows, 2 passes over the data" in text
    assert any(line.startswith("time: about") for line in told)
    assert any(line.startswith("memory: about") for line in told)
    assert text.count("»It makes") == 2


def test_what_is_shown_is_the_text_of_the_tokens_themselves(tiny: Path, tmp_path: Path) -> None:
    template = Template.of(tiny)
    example = prepare(make_job(tmp_path / "d", tiny), template).train.examples[0]
    shown = marked(template, example)
    assert shown.replace("»", "").replace("«", "") == example.rendered.text
    assert shown.endswith("»It makes 0, dear guest.<|im_end|>«\n")


def test_parameters_are_counted_without_loading_them(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert count_parameters(tiny) == sum(math.prod(tensor.shape) for tensor in model.parameters())


def test_a_bad_line_ends_it(tiny: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "d", tiny, data=write(tmp_path / "x.jsonl", [*rows(2), "nonsense"]))
    with pytest.raises(StartRefused, match="line 3: is no JSON"):
        list(look(job, tmp_path, lambda line: None))
