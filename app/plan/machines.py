"""What a machine does in a second: cards from their data sheets, or this machine's processor, measured.

A step of decoding is bound by reading the weights and the caches, or by multiplying, whichever takes longer (the
"roofline" of Williams, Waterman and Patterson, CACM 52(4), 2009). No engine reaches either roof; the shares that are
reached are assumptions, said in the output, and `--against` compares with a running server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from app.plan.shape import Shape

GIB = 2**30
# Of the memory bandwidth in decoding, and of the arithmetic in prefill: what well-tuned engines are reported to reach
# (Databricks, "LLM Inference Performance Engineering: Best Practices", 2023: 50-60% of either on A100 and H100).
BANDWIDTH_SHARE = 0.6
ARITHMETIC_SHARE = 0.5
# Scheduling, sampling and handing over, per step, and two reductions per layer where a model is split over cards.
GPU_STEP_S = 0.0008
REDUCTION_S = 15e-6


class Machine(Protocol):
    """`step_s`: seconds for one token of each of `batch` sequences, each `context` tokens long. `prefill_s`: for a
    prompt of so many tokens. `memory_bytes`: for weights and cache."""

    @property
    def name(self) -> str: ...
    @property
    def memory_bytes(self) -> float: ...
    def step_s(self, shape: Shape, batch: int, context: int) -> float: ...
    def prefill_s(self, shape: Shape, tokens: int) -> float: ...
    def assumptions(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Card:
    """A data sheet: GiB, GB/s, and dense TFLOP/s in bfloat16 (no sparsity); fp8 where the card has it."""

    memory_gib: float
    bandwidth_gb_s: float
    bf16_tflops: float
    fp8_tflops: float | None = None


# NVIDIA's and AMD's data sheets.
CARDS = {
    "l4": Card(24, 300, 121, 242),
    "a10g": Card(24, 600, 70),
    "a100-40g": Card(40, 1555, 312),
    "a100-80g": Card(80, 2039, 312),
    "l40s": Card(48, 864, 362, 733),
    "rtx-4090": Card(24, 1008, 165, 330),
    "h100": Card(80, 3350, 989, 1979),
    "h100-pcie": Card(80, 2000, 756, 1513),
    "h200": Card(141, 4800, 989, 1979),
    "b200": Card(180, 8000, 2250, 4500),
    "mi300x": Card(192, 5300, 1307, 2614),
}


@dataclass(frozen=True, slots=True)
class Gpus:
    """`count` equal cards that one replica is split over (tensor parallel)."""

    card: Card
    kind: str
    count: int
    utilization: float

    @property
    def name(self) -> str:
        return f"{self.count} x {self.kind}"

    @property
    def memory_bytes(self) -> float:
        return self.count * self.card.memory_gib * GIB * self.utilization

    def step_s(self, shape: Shape, batch: int, context: int) -> float:
        read = shape.read_bytes(batch) + batch * context * shape.kv_bytes_per_token
        reading_s = read / (self.count * self.card.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE)
        return max(reading_s, self._multiplying_s(shape, batch)) + self._overhead_s(shape)

    def prefill_s(self, shape: Shape, tokens: int) -> float:
        read_s = shape.read_bytes(tokens) / (self.count * self.card.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE)
        return max(read_s, self._multiplying_s(shape, tokens)) + self._overhead_s(shape)

    def _multiplying_s(self, shape: Shape, tokens: int) -> float:
        is_fp8 = shape.quantization == "fp8" and self.card.fp8_tflops is not None
        tflops = self.card.fp8_tflops if is_fp8 else self.card.bf16_tflops
        return 2 * shape.multiplied * tokens / (self.count * (tflops or 0) * 1e12 * ARITHMETIC_SHARE)

    def _overhead_s(self, shape: Shape) -> float:
        return GPU_STEP_S + (2 * shape.layers * REDUCTION_S if self.count > 1 else 0.0)

    def assumptions(self) -> str:
        return (
            f"data sheet, per card: {self.card.bandwidth_gb_s:g} GB/s, {self.card.bf16_tflops:g} TFLOP/s in bfloat16; "
            f"assumed reached: {BANDWIDTH_SHARE:.0%} and {ARITHMETIC_SHARE:.0%}; not measured"
        )


@dataclass(frozen=True, slots=True)
class Processor:
    """This machine's processor. `pass_s`: tokens at once -> seconds for all of a model's matrices, measured. Besides
    them the engine takes `layer_s` for each layer of a step, `token_layer_s` for each token in each layer, and
    `sequence_s` for each sequence that gets a token."""

    name: str
    memory_bytes: float
    pass_s: dict[int, float]
    bandwidth_gb_s: float
    layer_s: float
    token_layer_s: float
    sequence_s: float

    def step_s(self, shape: Shape, batch: int, context: int) -> float:
        cache_s = batch * context * shape.kv_bytes_per_token / (self.bandwidth_gb_s * 1e9)
        return self._layers_s(shape, batch) + cache_s + batch * self.sequence_s

    def prefill_s(self, shape: Shape, tokens: int) -> float:
        return self._layers_s(shape, tokens) + self.sequence_s

    def _layers_s(self, shape: Shape, tokens: int) -> float:
        return self._pass_s(tokens) + shape.layers * (self.layer_s + tokens * self.token_layer_s)

    def _pass_s(self, tokens: int) -> float:
        """Between what was measured, on a line; beyond it, at the last one's pace."""
        known = sorted(self.pass_s)
        above = next((each for each in known if each >= tokens), None)
        if above is None:
            return self.pass_s[known[-1]] * tokens / known[-1]
        below = max((each for each in known if each <= tokens), default=above)
        if above == below:
            return self.pass_s[above]
        share = (tokens - below) / (above - below)
        return self.pass_s[below] + share * (self.pass_s[above] - self.pass_s[below])

    def assumptions(self) -> str:
        return (
            "this machine's kernels, measured at the model's own sizes just now; the engine's own time per step as "
            "measured on two cores (benchmarks/LOG.md)"
        )
