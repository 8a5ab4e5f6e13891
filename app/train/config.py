"""Every setting of a fine-tuning job, in one table: name, type, default, one line of help.

Values come from flags, a TOML file, and the defaults, in that order; paths in the file are relative to it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from app.errors import StartRefused
from app.settings import DEFAULT_MODEL


class Job(BaseModel):
    """Frozen; `load` builds it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # what
    name: str = Field(description="Name to publish under.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
    base: str = Field(DEFAULT_MODEL, description="Weights to begin from: registry name, local directory, or hub id.")

    # data
    data: Path = Field(description="Training rows, JSONL: OpenAI's chat format, or prompt/completion pairs.")
    validation: Path | None = Field(None, description="Held-out rows; without it a share of the data is split off.")
    validation_share: float = Field(0.1, ge=0, lt=1, description="Share that is split off; 0: nothing is held out.")
    pairs: Literal["chat", "text"] = Field(
        "chat", description="Pairs of text are a user's and an assistant's turn (chat), or plain text (text)."
    )
    max_length: int = Field(1024, ge=8, description="Longest row, in tokens.")
    overlong: Literal["drop", "cut", "refuse"] = Field("drop", description="What becomes of a longer row.")
    allow_leaks: bool = Field(False, description="Go on although held-out prompts are in the training data.")

    # training
    method: Literal["lora", "full"] = Field("lora", description="Low-rank adapter, or all weights.")
    lora_rank: int = Field(16, ge=1, description="Rank of the adapter.")
    lora_alpha: int | None = Field(None, ge=1, description="Scale of the adapter; by default twice its rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in the adapter.")
    lora_targets: str = Field("all-linear", description="Layers that get it: all-linear, or names with commas.")
    epochs: float = Field(3.0, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(None, gt=0, description="Stop after so many steps.")
    batch_size: int = Field(8, ge=1, description="Rows per step, over all processes.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Rows at once in a process; the rest of its share is accumulated."
    )
    learning_rate: float = Field(2e-4, gt=0, description="Highest learning rate.")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field("cosine", description="How it falls.")
    warmup_steps: int = Field(3, ge=0, description="Steps in which it rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    group_by_length: bool = Field(
        False, description="Batches of rows of like length: less padding, and less variety in a batch."
    )
    packing: bool = Field(False, description="Several rows in one sequence of max_length, apart from each other.")
    gradient_checkpointing: bool = Field(False, description="Less memory for a third more time.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: bfloat16 where the hardware has it, else float32."
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: a GPU where there is one.")
    seed: int = Field(7, ge=0, description="Of the shuffling, the split and the adapter.")
    checkpoint_steps: int = Field(50, ge=1, description="Steps between checkpoints, and between validations.")
    early_stopping: int | None = Field(
        None, ge=1, description="Stop after so many validations without a better loss, and keep the best."
    )

    # evaluation and publication
    checks: Path | None = Field(None, description="Questions and what must be true of the answers, JSONL.")
    max_answer_tokens: int = Field(160, ge=1, description="Longest answer to a question.")
    min_pass: dict[str, float] = Field(
        default_factory=dict, description='Least share of passed questions, by group: {"task": 0.9}.'
    )
    max_loss_ratio: float = Field(
        1.0, gt=0, description="Most that the held-out loss may be, as a multiple of the base's."
    )
    adapter: bool = Field(False, description="Publish the LoRA adapter itself instead of merging it.")
    trial: bool = Field(True, description="Load the weights in the engine before they are published.")
    make_current: bool = Field(True, description="Serve them under their name from now on.")
    runs: Path | None = Field(None, description="Where checkpoints and reports are; by default train/ under home.")

    @field_validator("data", "validation", "checks", "runs", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value else None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.adapter and self.method != "lora":
            raise ValueError("adapter needs method = lora: a full fine-tune has no adapter")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError("batch_size must be a multiple of micro_batch_size")
        if (self.checks or self.min_pass) and not self.trial:
            raise ValueError("checks are answered by the trial's engine: they need trial = true")
        if self.min_pass and not self.checks:
            raise ValueError("min_pass needs checks")
        if self.early_stopping and not self.validation and not self.validation_share:
            raise ValueError("early_stopping needs validation rows")
        return self

    @property
    def alpha(self) -> int:
        return self.lora_alpha or 2 * self.lora_rank

    @property
    def targets(self) -> str | list[str]:
        return self.lora_targets if self.lora_targets == "all-linear" else self.lora_targets.split(",")

    def run_id(self, base: str, data: str) -> str:
        """Equal for jobs whose training would be the same, so that the same command finds its checkpoints again."""
        what = {name: str(getattr(self, name)) for name in _TRAINING}
        told = json.dumps([what, base, data], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]


_NOT_TRAINING = {
    "name", "base", "data", "validation", "checks", "max_answer_tokens", "min_pass", "max_loss_ratio", "adapter",
    "trial", "make_current", "runs", "allow_leaks", "device",
}  # fmt: skip
_TRAINING = sorted(Job.model_fields.keys() - _NOT_TRAINING)


def load(path: Path | None, **flags: Any) -> tuple[Job, dict[str, str]]:
    """The job, and where each value came from: `flag`, `file ...` or `default`. A flag of None was not given.

    Raises:
        StartRefused: the file cannot be read, a name is unknown, or a value does not fit.
    """
    in_file = _read(path) if path else {}
    given = {name: value for name, value in flags.items() if value is not None}
    if unknown := in_file.keys() - Job.model_fields.keys():
        name = min(unknown)
        close = difflib.get_close_matches(name, Job.model_fields, n=1)
        raise StartRefused(f"{name} in {path} is no setting{f'; did you mean {close[0]}?' if close else ''}")
    try:
        job = Job(**(in_file | given))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        name = str(first["loc"][0]) if first["loc"] else ""
        shown = f"--{name.replace('_', '-')}" if name in given or not path else name
        raise StartRefused(f"{shown}: {message}" if name else message) from error
    origins = {
        name: "flag" if name in given else f"file {path}" if name in in_file else "default" for name in Job.model_fields
    }
    return job, origins


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StartRefused(f"{path} cannot be read: {error}") from error
    for name in ("data", "validation", "checks", "runs"):
        if isinstance(values.get(name), str):
            values[name] = path.absolute().parent / Path(values[name]).expanduser()
    if isinstance(values.get("base"), str) and values["base"].startswith("."):
        values["base"] = str(path.absolute().parent / values["base"])
    return values
