"""From what the trainer saved to a folder that the engine serves: the base's own files, and the weights that changed.

Tokenizer, chat template, config and generation config are copied from the base byte by byte: training rendered with
them, and what is served must render the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from app.errors import StartRefused
from app.train.config import Job
from app.weights import files_that_matter


def export(job: Job, base: Path, final: Path, out: Path, base_name: str) -> None:
    """Fill `out`: the adapter itself, or the model with the adapter merged into it."""
    if job.adapter:
        _copy_adapter(final, out, base_name)
    else:
        _copy_all_but_weights(base, out)
        _save_model(job, base, final, out)
    _require_the_same_template(base, out, is_adapter=job.adapter)


def _copy_adapter(final: Path, out: Path, base_name: str) -> None:
    """The trainer notes the path of the base on this machine; published is its name and digest."""
    shutil.copyfile(final / "adapter_model.safetensors", out / "adapter_model.safetensors")
    config = json.loads((final / "adapter_config.json").read_bytes())
    config["base_model_name_or_path"] = base_name
    config["inference_mode"] = True
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _copy_all_but_weights(base: Path, out: Path) -> None:
    for name in files_that_matter(base):
        if name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, out / name)


def _save_model(job: Job, base: Path, final: Path, out: Path) -> None:
    """Merged in float32 and rounded once, to the base's own precision."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = AutoConfig.from_pretrained(str(base)).dtype or torch.float32
    source = base if job.method == "lora" else final
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32, use_safetensors=True)
    if job.method == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(final)).merge_and_unload(safe_merge=True)
    model = model.to(stored)
    scratch = out / ".saved"
    model.save_pretrained(scratch)
    for path in scratch.glob("*.safetensors*"):  # with the index of shards, where there are several
        path.rename(out / path.name)
    shutil.rmtree(scratch)


def _require_the_same_template(base: Path, out: Path, *, is_adapter: bool) -> None:
    """The template is a part of the base that an adapter is served on; a merged model carries its own copy."""
    if is_adapter:
        return
    for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        if (base / name).is_file() and (base / name).read_bytes() != (out / name).read_bytes():
            raise StartRefused(f"{name} to be published is not the one that training rendered with")
