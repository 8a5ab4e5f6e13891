"""What this machine's processor does with a model's matrices, measured in a few seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import psutil

from app.plan.machines import GIB, Processor
from app.plan.shape import Shape

TOKENS = (1, 4, 8, 16, 32, 64, 256)
# Each size is multiplied for so long, and its best pass counts: what else the machine does comes in bursts.
EACH_S = 0.4
# Distinct layers are multiplied with, so that no cache holds what a real pass would read anew.
MOST_BYTES = 2 * GIB
# Besides the matrices, of vLLM on two cores with AVX-512 (benchmarks/LOG.md). What PyTorch takes to start each layer's
# small kernels, once a step: nothing where the model is compiled into few.
LAYER_S = 0.00007
# Norms, rotation, attention and activation, for each token of a step in each layer.
TOKEN_LAYER_S = 2.2e-6
# Sampling, detokenisation and its stream, for each sequence of a step.
SEQUENCE_S = 0.00034


def measured(shape: Shape, *, threads: int, is_compiled: bool) -> Processor:
    """Takes a few seconds of all cores; on a busy machine what it finds is as slow as the engine would be.

    Raises ImportError without torch.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the engine has it (engine/cpu.py says why)
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, shape.dtype)
    layer_bytes = sum(rows * columns for rows, columns in shape.matrices) * dtype.itemsize
    layers = max(1, min(shape.layers, int(MOST_BYTES / layer_bytes)))
    matrices = [torch.ones(size, dtype=dtype) for size in shape.matrices * layers]
    head = torch.ones((shape.vocabulary, shape.hidden), dtype=dtype)

    def seconds(tokens: int) -> float:
        inputs = {columns: torch.ones((tokens, columns), dtype=dtype) for _, columns in shape.matrices}
        last = torch.ones((min(tokens, 64), shape.hidden), dtype=dtype)
        multiply = torch.nn.functional.linear

        def layers_pass() -> None:
            for matrix in matrices:
                multiply(inputs[matrix.shape[1]], matrix)

        with torch.inference_mode():
            return _best(layers_pass) * shape.layers / layers + _best(lambda: multiply(last, head))

    return Processor(
        name=f"this machine ({threads} threads, {'compiled' if is_compiled else 'eager'})",
        memory_bytes=float(psutil.virtual_memory().total),
        pass_s={tokens: seconds(tokens) for tokens in TOKENS},
        bandwidth_gb_s=_bandwidth(torch),
        layer_s=0.0 if is_compiled else LAYER_S,
        token_layer_s=TOKEN_LAYER_S,
        sequence_s=SEQUENCE_S,
    )


def _bandwidth(torch: Any) -> float:
    """GB/s of reading, as a sum over more than the caches hold."""
    much = torch.ones(64 * 2**20, dtype=torch.float32)
    return float(much.nbytes / _best(much.sum) / 1e9)


def _best(work: Callable[[], Any]) -> float:
    work()
    best, until = float("inf"), time.perf_counter() + EACH_S
    while (began := time.perf_counter()) < until:
        work()
        best = min(best, time.perf_counter() - began)
    return best
