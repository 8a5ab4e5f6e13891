"""A look at a dataset before a job: what it holds, what it will cost, and what the engine will see of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.train import checks, data
from app.train.config import Job
from app.train.job import find_base
from app.train.prepare import Example, Prepared, in_words, prepare
from app.train.template import Template
from app.train.training import has_bfloat16, prepare_process
from app.weights import Registry

GIB = 2**30


def look(job: Job, home: Path, say: Callable[[str], None]) -> Iterator[str]:
    """Line by line; `StartRefused` if a line of the data cannot be used."""
    prepare_process()
    base = Path(find_base(job, Registry(home / "weights"), home, say).path)
    template = Template.of(base)
    prepared = prepare(job, template)
    yield f"base: {base.parent.name}, template {template.digest[:12]}"
    yield from in_words(prepared)
    if job.checks:
        questions = checks.read(job.checks)
        groups = sorted({each.group for each in questions})
        yield f"checks: {len(questions)} questions ({', '.join(groups)})"
        asked = {data.Row(0, (*each.conversation, {"role": "assistant"})).prompt_key for each in questions}
        rows = data.read(job.data, job.pairs).rows
        if known := [row.line for row in rows if row.prompt_key in asked]:
            yield f"  questions that are trained on: {len(known)}, lines {', '.join(map(str, known[:12]))}"
    yield from estimates(job, base, prepared)
    for example in prepared.train.examples[:2]:
        yield ""
        yield f"line {example.line}, as the engine will see it; what is learned stands between » and «:"
        yield marked(template, example)


def marked(template: Template, example: Example) -> str:
    """The text of the tokens themselves, so that what they do not hold is not shown."""
    shown, was_learned = "", False
    pieces = zip(example.rendered.input_ids, example.rendered.is_learned, strict=True)
    group: list[int] = []
    for token, learned in pieces:
        if learned != was_learned:
            shown += template.tokenizer.decode(group) + ("»" if learned else "«")
            group, was_learned = [], learned
        group.append(token)
    return shown + str(template.tokenizer.decode(group)) + ("«" if was_learned else "")


def estimates(job: Job, base: Path, prepared: Prepared) -> Iterator[str]:
    """Steps are counted; time and memory are arithmetic, right within a factor of two."""
    parameters = count_parameters(base)
    steps = prepared.steps(job)
    lengths = prepared.train.lengths
    padded = lengths[len(lengths) // 2] if job.group_by_length else lengths[-1]
    tokens_per_step = padded * job.batch_size
    # Forward and backward through the activations cost 4 FLOPs per parameter and token, the weights' own gradients 2.
    flops = (4 if job.method == "lora" else 6) * parameters * tokens_per_step
    seconds = flops / measured_flops_per_s(bfloat16=has_bfloat16(job)) + 0.3
    passes = math.ceil(steps / prepared.steps_per_epoch(job))
    yield f"steps: {steps} of {job.batch_size} rows, {passes} passes over the data"
    yield f"time: about {_duration(steps * seconds)} here, on one process ({seconds:.1f} s a step)"
    yield f"memory: about {memory_bytes(job, base, parameters, lengths[-1]) / GIB:.1f} GiB"


def count_parameters(base: Path) -> int:
    """From the headers of the safetensors: nothing is loaded."""
    total = 0
    for path in base.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def memory_bytes(job: Job, base: Path, parameters: int, longest: int) -> float:
    """Weights, optimizer (gradient and two moments in float32), logits in float32 twice, activations, libraries."""
    config: dict[str, Any] = json.loads((base / "config.json").read_bytes())
    vocabulary, hidden, layers = (
        int(config.get(name, usual))
        for name, usual in (("vocab_size", 50_000), ("hidden_size", 1024), ("num_hidden_layers", 24))
    )
    tokens = longest * (job.micro_batch_size or job.batch_size)
    weights = parameters * (2 if has_bfloat16(job) else 4) if job.method == "lora" else parameters * 16
    adapter = 16 * layers * 7 * 2 * hidden * job.lora_rank if job.method == "lora" else 0
    activations = tokens * hidden * layers * 2 * (4 if job.gradient_checkpointing else 34)
    return weights + adapter + tokens * vocabulary * 8 + activations + 0.9 * GIB


def measured_flops_per_s(*, bfloat16: bool, for_s: float = 0.3) -> float:
    """Of a matrix product as large as those in small models."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.bfloat16 if bfloat16 else torch.float32
    left, right = (torch.ones(1024, 1024, dtype=kind, device=device) for _ in range(2))
    count, began = 0, time.monotonic()
    while (spent := time.monotonic() - began) < for_s or not count:
        (left @ right)[0, 0].item()
        count += 1
    return count * 2 * 1024**3 / spent / 3  # a third of it is what training reaches, as measured (benchmarks/LOG.md)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
