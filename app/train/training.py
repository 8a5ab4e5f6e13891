"""The training itself: TRL's SFTTrainer on rows that are tokens already, with checkpoints to go on from.

Every process of a distributed run calls `train`; what is written once is written by the first of them.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import StartRefused
from app.train.checkpoints import forget_later, newest_whole
from app.train.config import Job
from app.train.prepare import Part, Prepared
from app.weights import write_whole


class TrainingFailed(StartRefused):
    """Raised when training cannot go on; nothing was published, and the checkpoints before it are still good."""


@dataclass(frozen=True, slots=True)
class World:
    """Which process of how many this is, as torchrun and accelerate tell each in its environment."""

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True, slots=True)
class Step:
    """What is told after each step, and after each validation."""

    number: int
    total: int
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    steps: int
    loss: float
    base_eval_loss: float | None
    eval_loss: float | None
    seconds: float
    peak_memory_bytes: int
    dtype: str
    resumed_from: int


def world() -> World:
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def prepare_process() -> None:
    """Before PyTorch is imported: how its threads wait, and how its memory is kept.

    Threads that spin at barriers take the core from whoever else is there, and freed tensors that go back to the
    kernel are cleared again page by page: 1.95 s a step became 1.4 s on two cores (benchmarks/LOG.md).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD


def train(job: Job, base: Path, prepared: Prepared, tokenizer: Any, run: Path, tell: Callable[[Step], None]) -> Trained:
    """Train to the end, from the newest whole checkpoint of `run` if there is one; the result is in `run/final`.

    Raises:
        TrainingFailed: the loss is no number, the disk is full, memory is short.
    """
    with _failures_in_words(run):
        return _train(job, base, prepared, tokenizer, run, tell)


def _train(
    job: Job, base: Path, prepared: Prepared, tokenizer: Any, run: Path, tell: Callable[[Step], None]
) -> Trained:
    import torch

    began = time.monotonic()
    # 1. From where.
    checkpoint = newest_whole(run / "checkpoints")
    resumed_from = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    spent_s = forget_later(run / "metrics.jsonl", resumed_from) if world().is_first else 0.0
    # 2. What computes, in what.
    args = arguments(job, run, has_validation=prepared.validation is not None)
    trainer = make_trainer(job, args, base, prepared, tokenizer)
    narrator = narrator_of(run, tell, began - spent_s, is_first=args.process_index == 0)
    trainer.add_callback(narrator)
    # 3. The base on the held-out rows, before anything is learned: an adapter begins as nothing.
    base_eval_loss = _recorded(run, "base_eval_loss")
    if prepared.validation and base_eval_loss is None:
        base_eval_loss = float(trainer.evaluate(metric_key_prefix="base")["base_loss"])
        _require_number(base_eval_loss, 0)
        if args.process_index == 0:
            _record(run, base_eval_loss=base_eval_loss)
    # 4. The steps, the held-out rows again, and the result.
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    eval_loss = _final_eval_loss(job, trainer) if prepared.validation else None
    _require_number(eval_loss, trainer.state.global_step)
    trainer.save_model(str(run / "final"))
    trainer.accelerator.wait_for_everyone()
    return Trained(
        steps=trainer.state.global_step,
        loss=narrator.last_loss if narrator.last_loss is not None else float(result.training_loss),
        base_eval_loss=base_eval_loss,
        eval_loss=eval_loss,
        seconds=spent_s + time.monotonic() - began,
        peak_memory_bytes=_peak_memory(torch),
        dtype="bfloat16" if args.bf16 else "float32",
        resumed_from=resumed_from,
    )


def _final_eval_loss(job: Job, trainer: Any) -> float:
    """Of the weights that are kept: the best, or those of the last step, which mostly were measured already."""
    if job.early_stopping and trainer.state.best_metric is not None:
        return float(trainer.state.best_metric)
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return float(entry["eval_loss"])
    return float(trainer.evaluate()["eval_loss"])


def arguments(job: Job, run: Path, *, has_validation: bool) -> Any:
    """The job's settings as TRL's."""
    from trl import SFTConfig

    on_cpu = not _on_gpu(job)
    size = world().size
    if job.batch_size % size:
        raise TrainingFailed(f"batch_size {job.batch_size} cannot be shared among {size} processes")
    share = job.batch_size // size
    micro = min(job.micro_batch_size or share, share)
    if share % micro:
        raise TrainingFailed(f"micro_batch_size {micro} does not divide each process's share of {share} rows")
    keeps_best = job.early_stopping is not None
    return SFTConfig(
        output_dir=str(run / "checkpoints"),
        use_cpu=on_cpu,
        bf16=has_bfloat16(job) if job.dtype == "auto" else job.dtype == "bfloat16",
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        num_train_epochs=job.epochs,
        max_steps=job.max_steps or -1,
        learning_rate=job.learning_rate,
        lr_scheduler_type=job.schedule,
        warmup_steps=job.warmup_steps,
        weight_decay=job.weight_decay,
        max_grad_norm=job.max_grad_norm,
        train_sampling_strategy="group_by_length" if job.group_by_length and not job.packing else "random",
        packing=job.packing,
        eval_packing=False,
        # Rows are cut already, and counted; only packing still needs to know the length.
        max_length=job.max_length if job.packing else None,
        gradient_checkpointing=job.gradient_checkpointing,
        seed=job.seed,
        data_seed=job.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # by default a NaN is reported as the loss before it
        save_strategy="steps",
        save_steps=job.checkpoint_steps,
        save_total_limit=2,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=job.checkpoint_steps,
        load_best_model_at_end=keeps_best,
        metric_for_best_model="eval_loss" if keeps_best else None,
        greater_is_better=False if keeps_best else None,
        dataloader_pin_memory=not on_cpu,
        report_to="none",
        disable_tqdm=True,
    )


def make_trainer(job: Job, args: Any, base: Path, prepared: Prepared, tokenizer: Any) -> Any:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, EarlyStoppingCallback, PrinterCallback, set_seed
    from trl import SFTTrainer

    # A frozen base may be rounded; weights that learn are kept in float32 and computed with in bfloat16.
    stored = torch.bfloat16 if args.bf16 and job.method == "lora" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=stored, trust_remote_code=False, use_safetensors=True)
    model.config.use_cache = False
    set_seed(job.seed)  # before the adapter is drawn
    adapter = LoraConfig(
        r=job.lora_rank,
        lora_alpha=job.alpha,
        lora_dropout=job.lora_dropout,
        target_modules=job.targets,
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=as_dataset(prepared.train),
        eval_dataset=as_dataset(prepared.validation) if prepared.validation else None,
        processing_class=tokenizer,
        peft_config=adapter if job.method == "lora" else None,
    )
    trainer.remove_callback(PrinterCallback)
    if job.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=job.early_stopping))
    return trainer


def as_dataset(part: Part) -> Any:
    """With labels of ours: TRL trains on them as they are."""
    from datasets import Dataset

    rendered = [example.rendered for example in part.examples]
    return Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rendered], "labels": [row.labels for row in rendered]}
    )


def narrator_of(run: Path, tell: Callable[[Step], None], began: float, *, is_first: bool) -> Any:
    """A callback that keeps `metrics.jsonl`, tells of each step, and stops at a loss that is no number.

    `began` is when the job would have begun, had it never been interrupted: what was spent is counted over all runs.
    """
    from transformers import TrainerCallback

    class Narrator(TrainerCallback):  # type: ignore[misc]
        last_loss: float | None = None

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "train_runtime" in logs or any(name.startswith("base_") for name in logs):
                return
            for name in ("loss", "grad_norm", "eval_loss"):
                _require_number(logs.get(name), state.global_step)
            step = Step(
                state.global_step, state.max_steps, logs.get("loss"), logs.get("eval_loss"), logs.get("learning_rate")
            )
            self.last_loss = step.loss if step.loss is not None else self.last_loss
            if not is_first:
                return
            with (run / "metrics.jsonl").open("a") as file:
                spent_s = round(time.monotonic() - began, 2)
                file.write(json.dumps({"step": step.number, "spent_s": spent_s} | logs) + "\n")
            tell(step)

    return Narrator()


def _require_number(value: float | None, step: int) -> None:
    if value is not None and not math.isfinite(value):
        raise TrainingFailed(
            f"step {step}: the loss is {value}: training has diverged and was stopped, nothing was published. "
            "Lower learning_rate, raise warmup_steps, or set dtype = float32; the checkpoints before it are kept"
        )


def has_bfloat16(job: Job) -> bool:
    """Whether the hardware computes in bfloat16; emulated, it takes twice the time of float32."""
    if _on_gpu(job):
        import torch

        return bool(torch.cuda.is_bf16_supported())
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def _on_gpu(job: Job) -> bool:
    import torch

    if job.device == "gpu" and not torch.cuda.is_available():
        raise TrainingFailed("device = gpu, and PyTorch finds none")
    return job.device != "cpu" and bool(torch.cuda.is_available())


def _peak_memory(torch: Any) -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def hush() -> None:
    """What our own lines say better."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _recorded(run: Path, name: str) -> Any:
    path = run / "base.json"
    return json.loads(path.read_text()).get(name) if path.is_file() else None


def _record(run: Path, **values: Any) -> None:
    write_whole(run / "base.json", json.dumps(values).encode())


@contextmanager
def _failures_in_words(run: Path) -> Iterator[None]:
    """The failures that an operator can mend, in one line; everything else keeps its traceback."""
    try:
        yield
    except StartRefused:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        is_full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
        if is_full or any(
            words in said for words in ("No space left", "file write failed", "failed writing", "File too large")
        ):
            raise TrainingFailed(
                f"the disk of {run} is full: free some space and give the same command again, it goes on from the "
                f"last whole checkpoint; nothing was published"
            ) from error
        if "out of memory" in said or isinstance(error, MemoryError):
            raise TrainingFailed(
                "memory is short: lower micro_batch_size (rows at once) or max_length, or set gradient_checkpointing"
            ) from error
        raise
