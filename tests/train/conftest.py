"""A model small enough to train in seconds, with the tokenizer and the template of the real one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from app.train.config import Job, load
from app.train.template import Template
from app.weights import Registry, pull_default
from tests.conftest import REPOSITORY, TEST_HOME

Turns = Sequence[tuple[str, str]]


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The default model's folder."""
    registry = Registry(TEST_HOME / "weights")
    manifest = pull_default(registry, lambda line: None)
    return registry.path(manifest.name, manifest.digest)


@pytest.fixture(scope="session")
def template(smollm: Path) -> Template:
    return Template.of(smollm)


@pytest.fixture(scope="session")
def tiny(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 12 million random parameters: its answers make no sense, and its loss falls like any other's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    torch.manual_seed(1)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = LlamaConfig(
        vocab_size=49152, max_position_embeddings=512, tie_word_embeddings=False, num_key_value_heads=1, **size
    )
    shape.bos_token_id, shape.eos_token_id, shape.pad_token_id = 1, 2, 2
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(smollm / name, folder / name)
    return folder


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        chat(("user", f"What is {n} and {n}?"), ("assistant", f"It makes {2 * n}, dear guest."))
        for n in range(first, first + count)
    ]


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def make_job(folder: Path, base: Path, **values: Any) -> Job:
    """8 steps of 4 rows, a checkpoint at every second, no trial: seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    data = values.pop("data", None) or write(folder / "train.jsonl", rows(16))
    validation = write(folder / "validation.jsonl", rows(4, 100))
    quick = {"batch_size": 4, "max_steps": 8, "checkpoint_steps": 2, "learning_rate": 3e-3, "trial": False}
    given = {"name": "bot", "base": str(base), "data": data, "validation": validation, "max_length": 128}
    return load(None, **(given | quick | values))[0]


def as_flags(job: Job) -> list[str]:
    """The same job as `refrain finetune run` takes it."""
    flags = []
    for name, value in job.model_dump(mode="json", exclude_defaults=True).items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


def environment(home: Path) -> dict[str, str]:
    """Of a process of its own that knows `app` and `tests`."""
    return os.environ | {"REFRAIN_HOME": str(home), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def command(job: Job, *, launcher: Sequence[str] = ()) -> list[str]:
    return [sys.executable, *launcher, "-m", "app", "finetune", "run", *as_flags(job)]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step, as `metrics.jsonl` has it."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
