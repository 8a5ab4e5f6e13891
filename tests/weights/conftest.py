from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from app.weights import Registry

ROOT = Path(__file__).parents[2]


def make_weights(folder: Path, seed: int = 0) -> Path:
    """A folder as `save_pretrained` leaves it, small; another seed makes other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    save_file({"w": rng.standard_normal((64, 64)).astype(np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 2048}))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_k": 20, "max_new_tokens": 99}))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def publish(registry: Registry, name: str, seed: int = 0) -> str:
    with registry.stage(name) as staged:
        make_weights(staged, seed)
        return registry.publish(staged, name, {"kind": "test"}).digest


def python(script: str, *args: str) -> subprocess.Popen[str]:
    """A process of its own that knows `app` and this file."""
    command = [sys.executable, "-c", script, *args]
    path = f"{ROOT}:{Path(__file__).parent}"
    return subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
    )


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "weights")
