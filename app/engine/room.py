"""Whether a second engine fits beside the first: what it would need, and what the machine has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from app.domain import Weights
from app.engine import cpu
from app.settings import Settings

# A core forked from the warm fork server shares most of what it imported; what it adds besides weights and KV cache is
# its heap and the activations of one step: 0.6 GiB measured with SmolLM2-135M (benchmarks/LOG.md).
CORE_BYTES = 1 * cpu.GIB
# Two engines on one GPU must each have been given no more than this share of it.
GPU_SHARE = 0.45


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that one more engine needs, and bytes that there are."""

    needed: int
    available: int

    @property
    def is_enough(self) -> bool:
        return self.needed <= self.available

    def __str__(self) -> str:
        return f"{self.needed / cpu.GIB:.1f} GiB needed, {self.available / cpu.GIB:.1f} available"


def room_for(settings: Settings, weights: Weights) -> Room:
    """Room on a CPU; on a GPU vLLM takes its share of the card whatever the weights are, so the share decides."""
    if not cpu.is_cpu():
        share = settings.gpu_memory_utilization or 0.9
        return Room(0, 0) if share <= GPU_SHARE else Room(1, 0)
    files = sum(file.stat().st_size for file in Path(weights.path).glob("*.safetensors"))
    widened = files * (2 if weights.dtype == "float32" else 1)
    # The first engine's start has put it into the environment, unless the operator did.
    kv_cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or cpu.environment(settings)["VLLM_CPU_KVCACHE_SPACE"])
    return Room(widened + kv_cache * cpu.GIB + CORE_BYTES, _available())


def _available() -> int:
    """What the kernel would give without swapping, and no more than what a container's limit leaves."""
    available: int = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - used)
