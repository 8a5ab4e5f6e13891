"""Where a constraint is rehearsed: vLLM's own checks and backends, as the engine core will use them, in a child."""

from __future__ import annotations

import time
from functools import cache
from importlib import import_module
from typing import Any

from app.engine.constraints import Constraint

# Parsing is done once more on the event loop, so it may take little.
PARSE_CPU_S = 0.25
# A token that is asked about takes 0.01 to 0.1 ms with a plain grammar, between two steps of the whole batch.
WALK_TOKENS = 48
MASK_CPU_S = 0.004

_BACKENDS = {
    "xgrammar": ("backend_xgrammar", "XgrammarBackend"),
    "guidance": ("backend_guidance", "GuidanceBackend"),
    "outlines": ("backend_outlines", "OutlinesBackend"),
    "lm-format-enforcer": ("backend_lm_format_enforcer", "LMFormatEnforcerBackend"),
}


class Stage:
    """The tokenizer and the compilers of one engine."""

    def __init__(self, vllm_config: Any) -> None:
        from vllm.tokenizers import cached_tokenizer_from_config

        self._config = vllm_config
        self._tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        self._backend = cache(self._made)
        self._backend("xgrammar")

    def rehearse(self, constraint: Constraint) -> str | None:
        """Why the constraint is too slow to use, or None. Raises what vLLM raises where it is no constraint."""
        from vllm.sampling_params import SamplingParams, StructuredOutputsParams
        from vllm.v1.structured_output.request import get_structured_output_key

        params = SamplingParams(structured_outputs=StructuredOutputsParams(**constraint))
        began = time.process_time()
        params._validate_structured_outputs(
            self._config.model_config, self._config.structured_outputs_config, self._tokenizer
        )
        if (taken := time.process_time() - began) > PARSE_CPU_S:
            return f"the schema, regex or grammar takes {taken:.2f} s of processor time to read"
        backend = self._backend(params.structured_outputs._backend)
        grammar = backend.compile_grammar(*get_structured_output_key(params.structured_outputs))
        per_token = _walked(backend, grammar)
        if per_token > MASK_CPU_S:
            return f"the schema, regex or grammar takes {per_token * 1000:.0f} ms of processor time for each token"
        return None

    def _made(self, name: str) -> Any:
        module, kind = _BACKENDS[name]
        made = getattr(import_module(f"vllm.v1.structured_output.{module}"), kind)
        return made(self._config, tokenizer=self._tokenizer, vocab_size=self._config.model_config.get_vocab_size())


def _walked(backend: Any, grammar: Any) -> float:
    """Mean processor seconds that a token takes between two steps, along a path drawn from a fixed seed."""
    import numpy as np

    mask, chance, taken, asked = backend.allocate_token_bitmask(1), np.random.default_rng(0), 0.0, 0
    is_accepted = True
    while is_accepted and asked < WALK_TOKENS and not grammar.is_terminated():
        began = time.process_time()
        grammar.fill_bitmask(mask, 0)
        taken += time.process_time() - began
        allowed = np.flatnonzero(np.unpackbits(mask[0].numpy().view(np.uint8), bitorder="little"))
        if not allowed.size:
            break
        began = time.process_time()
        is_accepted = grammar.accept_tokens("rehearsal", [int(chance.choice(allowed))])
        taken, asked = taken + time.process_time() - began, asked + 1
    return taken / max(asked, 16)  # of a short one, one slow token is not a rule
