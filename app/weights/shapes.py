"""Whether the tensors on the disk have the shapes that `config.json` promises.

vLLM cuts a tensor that is too large to the size that it wants, without a word: a config that says less than the weights
hold loads, and computes nonsense. transformers builds the model without memory, and the shapes are compared.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from app.errors import StartRefused


def check_shapes(folder: Path) -> None:
    """Raises `StartRefused` over the first tensor of another shape. What transformers cannot build is not judged."""
    wanted = _wanted(folder)
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in _header(file).items():
            shape = tuple(tensor.get("shape", ()))
            if name in wanted and wanted[name] != shape:
                raise StartRefused(f"{file.name}: {name} has the shape {shape}, and config.json means {wanted[name]}")


def _wanted(folder: Path) -> dict[str, tuple[int, ...]]:
    config = json.loads((folder / "config.json").read_bytes())
    if "quantization_config" in config:
        return {}  # packed tensors have shapes of their own
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder)))
    except Exception:  # an architecture that it does not know, or no text model: the engine is asked, not we
        return {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _header(file: Path) -> dict[str, Any]:
    """The names and shapes: a JSON object after eight bytes that say how long it is."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, Any] = json.loads(opened.read(length))
    return header
