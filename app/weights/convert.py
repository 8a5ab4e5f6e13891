"""GGUF to a folder of Hugging Face weights: `python -m app.weights.convert FILE.gguf OUT_DIR`.

Run as a process of its own (see `pull.py`): transformers holds the model three times over while it converts, and
that memory, like its warnings, is no business of the process that asked. It knows nothing of the registry.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(gguf: Path, out: Path) -> None:
    """Write bf16 safetensors, config, tokenizer, chat template and generation config into `out`.

    Nothing is written over: `out` must be empty. Raises what transformers raises.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    # 1. Weights: dequantized in fp32, then rounded once to bf16.
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).to(torch.bfloat16)

    # 2. The config must not say that these are quantized weights: the engine would look for the quantization.
    model.hf_quantizer = None
    for leftover in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    model.config.dtype = torch.bfloat16

    # 3. Tokenizer. transformers 5.19 loses the GGUF's pre-tokenizer "smollm", which sets every digit apart before
    #    the usual split; without it the blanks before a number become other tokens than in training.
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise ValueError(f"{gguf.name} holds no chat template")
    if _pre_tokenizer(gguf) == "smollm":
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.model_max_length = model.config.max_position_embeddings
    for leftover in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(leftover, None)

    # 4. Special tokens: the engine stops at the generation config's `eos_token_id`.
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    for key, value in ids.items():
        setattr(model.config, key, value)
    model.generation_config = GenerationConfig(**ids)

    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _pre_tokenizer(gguf: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field else None


def main() -> None:
    gguf, out = (Path(arg) for arg in sys.argv[1:3])
    convert(gguf, out)


if __name__ == "__main__":
    main()
