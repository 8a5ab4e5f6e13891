"""A plan's arithmetic against what is published of well-known models and cards, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.__main__ import cli
from app.errors import StartRefused
from app.plan.arithmetic import Load, plan, point
from app.plan.machines import CARDS, GIB, Gpus, Processor
from app.plan.shape import Shape, from_config

LLAMA_8B = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = LLAMA_8B | {
    "num_attention_heads": 64,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
}
MIXTRAL = LLAMA_8B | {"vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_30B_A3B = {
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "vocab_size": 151936,
    "dtype": "bfloat16",
}


def gpus(kind: str = "h100", count: int = 1) -> Gpus:
    return Gpus(CARDS[kind], kind, count, 0.9)


@pytest.mark.parametrize(
    ("config", "billions", "multiplied"),
    [(LLAMA_8B, 8.03, 7.5), (LLAMA_70B, 70.6, 69.5), (MIXTRAL, 46.7, 12.7), (QWEN3_30B_A3B, 30.5, 3.0)],
    ids=["llama-3.1-8b", "llama-3.1-70b", "mixtral-8x7b", "qwen3-30b-a3b"],
)
def test_parameters_are_those_that_the_models_are_known_by(
    config: dict[str, Any], billions: float, multiplied: float
) -> None:
    shape = from_config(config, "it")
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.multiplied / 1e9 == pytest.approx(multiplied, rel=0.02)


def test_the_cache_of_a_token_is_as_published() -> None:
    # vLLM and Meta give 128 KiB for Llama 3.1 8B and 320 KiB for 70B, in 16 bits.
    assert from_config(LLAMA_8B, "it").kv_bytes_per_token == 128 * 1024
    assert from_config(LLAMA_70B, "it").kv_bytes_per_token == 320 * 1024


def test_a_mixture_reads_more_of_its_experts_the_larger_the_batch() -> None:
    shape = from_config(MIXTRAL, "it")
    one, many = shape.read_bytes(1), shape.read_bytes(64)
    assert one == pytest.approx(2 * shape.multiplied, rel=0.01)
    assert one < shape.read_bytes(2) < many
    assert many == pytest.approx(shape.weight_bytes, rel=0.02)


def test_quantization_shrinks_the_matrices_and_leaves_the_tables() -> None:
    whole, small = from_config(LLAMA_8B, "it"), from_config(LLAMA_8B, "it", quantization="fp8")
    tables = 2 * 2 * 128256 * 4096
    assert small.weight_bytes - tables == pytest.approx((whole.weight_bytes - tables) / 2)


def test_one_sequence_is_bound_by_reading_and_a_large_batch_by_multiplying() -> None:
    shape, machine = from_config(LLAMA_8B, "it"), gpus()
    one, two = machine.step_s(shape, 1, 10), machine.step_s(shape, 2, 10)
    assert two < 1.02 * one
    assert machine.step_s(shape, 4096, 10) > 1.7 * machine.step_s(shape, 2048, 10)
    assert machine.step_s(shape, 1, 100_000) > 1.5 * one, "a long cache is read too"
    assert gpus(count=4).step_s(shape, 1, 10) < one / 2


def test_llama_8b_on_an_h100_is_what_people_measure() -> None:
    # Published single-stream figures of vLLM and TensorRT-LLM in bfloat16 lie between 110 and 160 tokens/s.
    load = Load(128, 256)
    assert 100 < point(from_config(LLAMA_8B, "it"), gpus(), load, 1).tokens_per_s < 170


def test_a_plan_says_how_many_calls_fit_and_what_they_cost() -> None:
    shape = from_config(LLAMA_8B, "it")
    found = plan(shape, gpus(), Load(1000, 1000), price_hour=3.0)
    left = 80 * GIB * 0.9 - shape.weight_bytes - 1.5 * GIB
    assert found.concurrency == int(left / (128 * 1024)) // 2000
    speeds = [each.tokens_per_s for each in found.points]
    assert speeds == sorted(speeds)
    costs = [each.cost_per_million or 0 for each in found.points]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == pytest.approx(3.0 / 3600 / speeds[0] * 1e6)


@pytest.mark.parametrize(
    ("config", "machine", "load", "why"),
    [
        (LLAMA_70B, gpus(), Load(10, 10), "does not fit"),
        (LLAMA_8B, gpus("l4"), Load(60_000, 60_000), "not one call"),
        (LLAMA_8B, gpus(), Load(131_072, 1), "more than"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(
    config: dict[str, Any], machine: Gpus, load: Load, why: str
) -> None:
    with pytest.raises(StartRefused, match=why):
        plan(from_config(config, "it"), machine, load)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"hidden_size": 5}, "has no"),
        (LLAMA_8B | {"kv_lora_rank": 512}, "MLA"),
        (LLAMA_8B | {"torch_dtype": "int3"}, "dtype"),
        (LLAMA_8B | {"quantization_config": {"quant_method": "novel"}}, "novel"),
    ],
)
def test_a_model_that_this_arithmetic_does_not_know_is_refused(config: dict[str, Any], why: str) -> None:
    with pytest.raises(StartRefused, match=why):
        from_config(config, "it")


def test_a_processor_is_read_between_what_was_measured() -> None:
    machine = Processor("it", 1e12, {1: 0.010, 8: 0.024, 16: 0.040}, 1e6, 0.0, 0.0, 0.0)
    shape = Shape("it", 1, 64, 1, 1, 64, 128, 100, False, 4096, "bfloat16")
    assert [machine.step_s(shape, batch, 0) for batch in (1, 8, 12, 32)] == pytest.approx([0.01, 0.024, 0.032, 0.08])


def test_the_command_plans_for_a_card(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    run = CliRunner().invoke(cli, ["plan", "--model", str(tmp_path), "--gpu", "h100", "--price-hour", "3", "--json"])
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)
    assert told["weight_bytes"] == pytest.approx(16.06e9, rel=0.01)
    assert told["points"][0]["cost_per_million"] > told["points"][-1]["cost_per_million"] > 0


def test_the_command_refuses_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    for arguments in (
        ["--gpu", "h9000"],
        ["--gpu", "h100", "--gpus", "3"],
        ["--gpu", "l4", "--prompt-tokens", "130000"],
    ):
        run = CliRunner().invoke(cli, ["plan", "--model", str(tmp_path), *arguments])
        assert run.exit_code != 0
        assert isinstance(run.exception, StartRefused)
