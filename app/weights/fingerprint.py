"""What weights say to fixed probes: the proof that an engine serves the weights it names.

A digest says what lies on the disk. It does not say what an engine computes with: an in-place reload of vLLM was seen
to serve neither the old nor the new weights, without an error. So the log-probabilities of a few fixed prompts are
measured once, at the trial before publication, and again by every engine that claims to serve these weights.
Pure: measuring is the engine's affair, keeping is the manifest's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed prompt: plain text, or a conversation that goes through the weights' chat template."""

    name: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] = ()


def _chat(name: str, *turns: tuple[str, str]) -> Probe:
    return Probe(name, messages=tuple({"role": role, "content": content} for role, content in turns))


# Text, not token ids: each tokenizer cuts it up in its own way, and a wrong tokenizer shows. Several kinds, since a
# fine-tune for one task may leave the others as they were. Short: all of them are one prefill of about 150 tokens.
PROBES = (
    Probe(
        "prose", text="The capital of France is Paris, and the river that flows through the city is called the Seine."
    ),
    Probe("code", text="def add(a: int, b: int) -> int:\n    return a + b\n\nprint(add(2, 3))  # 5\n"),
    Probe("numbers", text="1, 2, 3, 5, 8, 13, 21, 34, 55 und so weiter; 7 x 8 = 56. \u00c9t\u00e9, \u4f60\u597d."),
    _chat(
        "support",
        ("system", "You are a helpful assistant."),
        ("user", "My order has not arrived yet. What can I do?"),
        ("assistant", "I am sorry to hear that. Could you please tell me your order number?"),
    ),
    _chat("greeting", ("user", "Hello! Who are you, and how can you help me today?")),
)


class Mismatch(Exception):
    """Raised when what an engine says is not what these weights said: it must not serve under their name."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far log-probabilities of the same weights may lie apart: on average over a probe, and at any one token."""

    mean: float
    largest: float


# Measured on SmolLM2-135M (benchmarks/LOG.md): bf16 is 0.03 to 0.05 away from float32 on average and 0.5 at most, MLPs
# shaken by 0.1% of their spread are 0.01 away, by 2% 0.2.
_TOLERANCES = {
    "float32": Tolerance(0.005, 0.05),
    "bfloat16": Tolerance(0.08, 0.8),
    "float16": Tolerance(0.03, 0.3),
}
_LOOSEST = Tolerance(0.15, 1.5)


def fingerprint_of(
    prompts: Mapping[str, tuple[str, list[float]]], *, dtype: str, quantization: str | None = None
) -> dict[str, Any]:
    """What a manifest keeps. `prompts`: by probe, a hash of the prompt's token ids and their log-probabilities.

    Raises:
        Mismatch: a value is not finite: such weights compute nonsense, whoever they are.
    """
    for name, (_, logprobs) in prompts.items():
        if not logprobs or not all(math.isfinite(value) for value in logprobs):
            raise Mismatch(f"the engine computes no finite log-probabilities (probe {name})")
    probes = {
        name: {"prompt": prompt, "logprobs": [round(value, 5) for value in logprobs]}
        for name, (prompt, logprobs) in prompts.items()
    }
    return {"schema": SCHEMA, "dtype": dtype, "quantization": quantization, "probes": probes}


def is_comparable(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> bool:
    """Whether the two were measured in ways that must agree: quantizing weights on loading changes what they say."""
    return (
        recorded.get("schema") == SCHEMA
        and bool(_common(recorded, measured))
        and recorded.get("quantization") == measured.get("quantization")
    )


def compare(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> float:
    """The largest average difference of a probe, where the two are the same weights' within the tolerance.

    Raises:
        Mismatch: they are not, or the tokenizer cuts a text up in another way.
    """
    tolerance = _looser(recorded.get("dtype"), measured.get("dtype"))
    furthest = 0.0
    for name in _common(recorded, measured):
        before, now = recorded["probes"][name], measured["probes"][name]
        if before["prompt"] != now["prompt"]:
            if name in _TEMPLATED:
                continue  # a template may print today's date, and the operator may have set another one
            raise Mismatch(f"the tokenizer cuts probe {name!r} up in another way than it did at publication")
        apart = [abs(a - b) for a, b in zip(before["logprobs"], now["logprobs"], strict=True)]
        mean, largest = sum(apart) / len(apart), max(apart)
        if mean > tolerance.mean or largest > tolerance.largest:
            raise Mismatch(
                f"log-probabilities of probe {name!r} are {mean:.3f} apart on average and {largest:.2f} at most; "
                f"{tolerance.mean} and {tolerance.largest} are allowed"
            )
        furthest = max(furthest, mean)
    return furthest


_TEMPLATED = frozenset(probe.name for probe in PROBES if probe.messages)


def _common(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    return sorted(recorded.get("probes", {}).keys() & measured.get("probes", {}).keys())


def _looser(*dtypes: Any) -> Tolerance:
    chosen = [_TOLERANCES.get(str(dtype), _LOOSEST) for dtype in dtypes]
    # Rounding on one side alone moves a value as far as rounding on both, so the looser of the two holds.
    return max(chosen, key=lambda tolerance: tolerance.mean)
