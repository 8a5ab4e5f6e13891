"""What a model costs, read from its `config.json`: bytes of weights, bytes of cache per token, multiplications."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import StartRefused

# Bytes of one weight, by what vLLM calls the quantization or dtype; four-bit methods add scales, about a tenth.
WEIGHT_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "awq": 0.55,
    "gptq": 0.55,
    "mxfp4": 0.55,
    "nvfp4": 0.56,
}
_KV_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's sizes. `experts` and `experts_per_token` are 1 where there is no mixture.

    `matrices` are the (rows, columns) of what one token is multiplied with in one layer, experts counted as one of
    the chosen; `head` that of the vocabulary.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    is_tied: bool
    max_context: int
    dtype: str
    quantization: str | None = None
    experts: int = 1
    experts_per_token: int = 1
    kv_dtype: str | None = None

    @property
    def attention(self) -> int:
        """Weights of one layer's attention."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expert(self) -> int:
        """Weights of one feed-forward block: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.is_tied else 2)
        return embeddings + self.layers * (self.attention + self.experts * self.expert + 2 * self.hidden)

    @property
    def multiplied(self) -> int:
        """Weights that one token is multiplied with: the chosen experts, the head, and no embedding table."""
        layer = self.attention + self.experts_per_token * self.expert
        return self.layers * layer + self.vocabulary * self.hidden

    @property
    def bytes_per_weight(self) -> float:
        return WEIGHT_BYTES[self.quantization or self.dtype]

    @property
    def weight_bytes(self) -> float:
        """In memory. The vocabulary's tables stay in the dtype whatever the quantization is, as vLLM keeps them."""
        tables = self.vocabulary * self.hidden * (1 if self.is_tied else 2)
        return (self.parameters - tables) * self.bytes_per_weight + tables * WEIGHT_BYTES[self.dtype]

    def read_bytes(self, batch: int) -> float:
        """What one step reads of the weights: of a mixture only the experts that some token of the batch chose."""
        chosen = self.experts * (1 - (1 - self.experts_per_token / self.experts) ** batch)
        layers = self.layers * (self.attention + chosen * self.expert) * self.bytes_per_weight
        return layers + self.vocabulary * self.hidden * WEIGHT_BYTES[self.dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _KV_BYTES[self.kv_dtype or self.dtype]

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """As vLLM runs them: query, key and value as one, gate and up as one."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = [(query + 2 * kv, self.hidden), (self.hidden, query)]
        return layer + [(2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)] * self.experts_per_token


def shape_of(folder: Path, name: str, *, dtype: str | None, quantization: str | None) -> Shape:
    """The shape that `config.json` in this folder says. Raises StartRefused where it cannot be told."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise StartRefused(f"{folder}/config.json cannot be read: {error}") from error
    return from_config(config.get("text_config", config), name, dtype=dtype, quantization=quantization)


def from_config(
    config: dict[str, Any], name: str, *, dtype: str | None = None, quantization: str | None = None
) -> Shape:
    """Hugging Face's names for the sizes, as the Llama, Qwen, Mistral, Gemma and Mixtral families write them.

    Raises:
        StartRefused: a size is missing, or the attention is one whose cache is not keys and values per head.
    """
    if "kv_lora_rank" in config:
        raise StartRefused(f"{name} compresses its cache (MLA); its arithmetic is not known here")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        experts = config.get("num_local_experts") or config.get("num_experts") or 1
        found = Shape(
            name=name,
            layers=config["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate=(config.get("moe_intermediate_size") if experts > 1 else None) or config["intermediate_size"],
            vocabulary=config["vocab_size"],
            is_tied=config.get("tie_word_embeddings", False),
            max_context=config.get("max_position_embeddings", 4096),
            dtype=_dtype(dtype or config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
            quantization=quantization or _quantization(config.get("quantization_config")),
            experts=experts,
            experts_per_token=config.get("num_experts_per_tok", 1) if experts > 1 else 1,
        )
    except KeyError as error:
        raise StartRefused(f"config.json of {name} has no {error}; is it a text model?") from error
    if found.quantization is not None and found.quantization not in WEIGHT_BYTES:
        raise StartRefused(
            f"the quantization {found.quantization!r} is not known here; known: {', '.join(WEIGHT_BYTES)}"
        )
    return found


def _dtype(named: str) -> str:
    dtype = {"half": "float16", "float": "float32"}.get(named, named)
    if dtype not in _KV_BYTES or dtype == "fp8":
        raise StartRefused(f"the dtype {named!r} is not known here; known: float32, bfloat16, float16")
    return dtype


def _quantization(config: dict[str, Any] | None) -> str | None:
    if config is None:
        return None
    method = str(config.get("quant_method", ""))
    if method == "compressed-tensors":
        groups = config.get("config_groups", {}).values()
        bits = min((group.get("weights", {}).get("num_bits", 16) for group in groups), default=16)
        return {4: "gptq", 8: "fp8"}.get(bits)
    return method
