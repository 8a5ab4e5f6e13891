"""RMSNorm on a CPU by the kernels that vLLM's CPU build carries.

vLLM 0.32 offers them to GPUs alone (`vllm/kernels/vllm_c.py`); an eager CPU engine runs each norm as ten PyTorch
operators instead, some 600 for one token of a small model, and at batch 1 starting them is what takes the time
(benchmarks/LOG.md). A compiled engine fuses them by itself and does without this. Importing it registers them, in every
process that builds an engine or runs one.
"""

from __future__ import annotations

import torch
from vllm import ir
from vllm.platforms import current_platform

PROVIDER = "cpu_kernel"

current_platform.import_kernels()


def _fits(x: torch.Tensor, weight: torch.Tensor | None, variance_size: int | None) -> bool:
    """The kernels know one layout, one type, and no part of a row."""
    return variance_size is None and weight is not None and weight.dtype == x.dtype and x.is_contiguous()


@ir.ops.rms_norm.register_impl(  # type: ignore[untyped-decorator]
    PROVIDER, supports_args=lambda x, weight, epsilon, variance_size=None: _fits(x, weight, variance_size)
)
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


@ir.ops.fused_add_rms_norm.register_impl(  # type: ignore[untyped-decorator]
    PROVIDER,
    supports_args=lambda x, x_residual, weight, epsilon, variance_size=None: (
        _fits(x, weight, variance_size) and x_residual.is_contiguous() and x_residual.dtype == x.dtype
    ),
    inplace=True,
)
def fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
