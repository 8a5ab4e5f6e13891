"""RMSNorm by the CPU's kernels says what vLLM's own definition of it says."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_kernels_compute_what_the_definition_says(dtype: str, rows: int) -> None:
    import torch
    from vllm import ir

    from app.engine import norms

    torch.manual_seed(rows)
    kind = getattr(torch, dtype)
    x, residual = (torch.randn(rows, 576).to(kind) for _ in range(2))
    weight = torch.randn(576).to(kind)
    close = {"float32": (1e-5, 1e-5), "bfloat16": (2e-2, 2e-2)}[dtype]
    for op, arguments in ((ir.ops.rms_norm, (x,)), (ir.ops.fused_add_rms_norm, (x, residual))):
        kernel = op.impls[norms.PROVIDER]
        assert kernel.supports_args(*arguments, weight, 1e-5)
        wanted = op.impls["native"].impl_fn(*(each.clone() for each in arguments), weight, 1e-5)
        found = kernel.impl_fn(*(each.clone() for each in arguments), weight, 1e-5)
        for one, other in zip(
            *((each if isinstance(each, tuple) else (each,)) for each in (wanted, found)), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=close[0], atol=close[1])


def test_what_the_kernels_cannot_do_is_left_to_the_definition() -> None:
    import torch
    from vllm import ir

    from app.engine import norms

    x, weight = torch.randn(4, 8), torch.ones(8)
    kernel = ir.ops.rms_norm.impls[norms.PROVIDER]
    assert not kernel.supports_args(x, None, 1e-5)
    assert not kernel.supports_args(x, weight.bfloat16(), 1e-5)
    assert not kernel.supports_args(x, weight, 1e-5, 4)
    assert not kernel.supports_args(x[:, ::2], weight[:4], 1e-5)


def test_the_engine_is_told_to_use_them_by_the_name_they_have() -> None:
    from app.engine import norms, vllm

    assert vllm._NORMS_PROVIDER == norms.PROVIDER
