"""The fine-tuning job against plain TRL: the same model, rows, adapter and steps, in turns, each in its own process."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import servers
from benchmarks.report import ROOT, Report, medians, ratio, step, verdict

PHYSICS = """\
Both are TRL's SFTTrainer with a LoRA adapter in bfloat16 (float32 on a CPU without it), so both do the same arithmetic:
about 4 FLOPs per parameter and token. What the job adds is a file of metrics, a line per step, its own masks, and,
before PyTorch is loaded, how threads wait and how freed memory is kept. Seconds are those between the ends of steps,
without the first: their median, and the fastest, which other work on the machine disturbed least. CPU seconds are the
process's own. Memory is the largest resident size of the process."""

DATA = ROOT / "examples" / "support-bot" / "train.jsonl"
BATCH, RANK, RATE, SEED = 8, 16, 1e-3, 7


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    rounds, steps = rounds or (1 if quick else 3), 6 if quick else 16
    model = servers.weights(step)
    report = Report("train", PHYSICS, {"rounds": rounds, "steps": steps, "batch": BATCH, "model": model.short})
    samples: dict[str, list[dict[str, float]]] = {"refrain": [], "plain TRL": []}
    for number in range(rounds):
        for name in sorted(samples, reverse=number % 2 == 0):  # each is first in every second round
            found = _child(name, model.path, steps)
            samples[name].append(found)
            step(f"round {number + 1} of {rounds}, {name}: {found['step_s']:.2f} s a step")
    middle = {name: medians(found) for name, found in samples.items()}
    ours, theirs = middle["refrain"], middle["plain TRL"]
    figures = ("step_s", "fastest_s", "cpu_s", "peak_mib", "loss")
    rows = [[name, *(each[figure] for figure in figures)] for name, each in middle.items()]
    columns = ["", "s per step", "fastest", "CPU s per step", "peak MiB", "loss"]
    report.table("medians of the rounds", columns, rows)
    bars = {f"x_{figure}": ratio(ours[figure], theirs[figure]) for figure in figures[:-1]}
    report.table(
        "bar: within 5% of plain TRL",
        ["", "aim", "found", ""],
        [[name, "<= 1.05", found, verdict(found <= 1.05)] for name, found in bars.items()],
    )
    return report.finish(save, results=middle, rounds=samples, bars=bars)


def _child(name: str, model: str, steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="rb-") as scratch:
        command = [sys.executable, "-m", "benchmarks.train", name, model, str(steps), scratch]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))


Moment = tuple[float, float]  # by the clock, and of the process's CPU time


def _now() -> Moment:
    return time.monotonic(), time.process_time()


def _refrain(model: Path, steps: int, scratch: Path) -> list[Moment]:
    from app.train.config import load
    from app.train.prepare import prepare
    from app.train.template import Template
    from app.train.training import hush, prepare_process, train

    prepare_process()
    hush()
    told = {"batch_size": BATCH, "lora_rank": RANK, "learning_rate": RATE, "seed": SEED, "max_steps": steps}
    told |= {"schedule": "linear", "warmup_steps": 0, "validation_share": 0.0, "checkpoint_steps": 1000}
    job, _ = load(None, name="bench", data=DATA, **told)
    template = Template.of(model)
    ends: list[Moment] = []

    def tell(_: Any) -> None:
        ends.append(_now())

    train(job, model, prepare(job, template), template.tokenizer, scratch, tell)
    return ends


def _plain_trl(model: Path, steps: int, scratch: Path) -> list[Moment]:
    """As TRL's documentation does it: rows as prompt and completion, the trainer renders and masks."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from app.train.config import load
    from app.train.training import has_bfloat16

    bf16 = has_bfloat16(load(None, name="bench", data=DATA)[0])
    conversations = [json.loads(line)["messages"] for line in DATA.read_text().splitlines()]
    rows = [{"prompt": each[:-1], "completion": each[-1:]} for each in conversations]
    ends: list[Moment] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(_now())

    config = SFTConfig(
        output_dir=str(scratch),
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16,
        model_init_kwargs={"dtype": "bfloat16" if bf16 else "float32"},
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=RATE,
        seed=SEED,
        gradient_checkpointing=False,
        logging_steps=1,
        save_steps=1000,
        report_to="none",
        disable_tqdm=True,
    )
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        str(model), args=config, train_dataset=Dataset.from_list(rows), peft_config=adapter, callbacks=[Clock()]
    )
    trainer.train()
    trainer.save_model(str(scratch / "final"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (scratch / "metrics.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
    return ends


def main() -> None:
    name, model, steps, scratch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    ends = (_refrain if name == "refrain" else _plain_trl)(model, steps, scratch)
    wall, cpu = (sorted(after[kind] - before[kind] for before, after in pairwise(ends)) for kind in (0, 1))
    last = json.loads((scratch / "metrics.jsonl").read_text().splitlines()[-1])
    found = {
        "step_s": wall[len(wall) // 2],
        "fastest_s": wall[0],
        "cpu_s": cpu[len(cpu) // 2],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": last["loss"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
