"""What every field of every request means for the cache: data, and the reason for each group.

Read from the request models and serving code of vLLM 0.32; nothing of vLLM is imported here.
`tests/cache/test_fields.py` does import it, and fails on a field that nobody has classified, on one
that is gone, and on a default that moved. A field is in exactly one of these groups:

- *ignored*: whatever its value, the answer's content is the same.
- *keyed*: it is part of the key. The values listed with it are the same as leaving it out; an
  empty list means that it is keyed whenever it is there. `null` is listed only where vLLM takes it
  and then computes the same.
- *sampled*: keyed, but what leaving it out means is the generation config's business
  (`Weights.sampling_defaults`), and else the neutral value given here.
- *ruled*: keyed under a rule that looks at more than the field itself; the rules are in `key.py`.
- *uncacheable*: set to anything but its default, the call is kept apart from the cache, with a reason.

A field that vLLM does not know is keyed as it comes, except for the bookkeeping that OpenAI's and
Anthropic's clients send and vLLM drops (`EXTRAS_IGNORED`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.domain import Endpoint

Values = tuple[Any, ...]

_REQUIRED: Values = ()
_NONE: Values = (None,)
_FALSE: Values = (False,)
_TRUE: Values = (True,)
_ZERO: Values = (0,)

# Reasons why a call is kept apart from the cache; they are the values of a metric label.
STATEFUL = "stateful"  # the answer depends on what the server kept from an earlier call, or leaves something behind
TRANSFER = "transfer"  # one leg of disaggregated serving: the answer is a handle to this engine's memory
SERVER_TOOLS = "server_tools"  # tools that run on the server and look at the world
REMOTE_CONTENT = "remote_content"  # an image, audio, video or file behind a URL, which may change
BINARY = "binary"  # the answer is not JSON
CONTINUOUS_USAGE = "continuous_usage"  # token counts in every chunk: a recording has them once
REFUSED = "refused"  # vLLM refuses the call because of `stream`, which the key leaves out: a hit must not hide that
NUMBER_OUT_OF_RANGE = "number_out_of_range"  # RFC 8785 has no form for it (beyond 2^53, NaN, infinity)
NOT_ENCODABLE = "not_encodable"  # lone surrogates, or nested too deep to write down

# Transport and bookkeeping.
_HOW_IT_IS_SENT = frozenset({"stream", "stream_options", "stream_interval"})
_WHO_ASKS = frozenset({"user", "session_id", "request_id"})  # a replay has its own id; the tenant is in the key
_WHEN_IT_RUNS = frozenset({"priority"})
_BOOKKEEPING = _HOW_IT_IS_SENT | _WHO_ASKS | _WHEN_IT_RUNS

# Fields unknown to vLLM that clients send for the provider's own book-keeping. vLLM accepts and drops
# unknown fields, so none of these can matter; the others are keyed out of caution.
_CLIENT_BOOKKEEPING = frozenset({"safety_identifier", "prompt_cache_key", "prompt_cache_retention", "timeout"})
_PROVIDER_BOOKKEEPING = _CLIENT_BOOKKEEPING | {"metadata", "store", "service_tier"}
EXTRAS_IGNORED: Mapping[Endpoint, frozenset[str]] = {
    Endpoint.CHAT: _PROVIDER_BOOKKEEPING,
    Endpoint.COMPLETIONS: _PROVIDER_BOOKKEEPING,
    Endpoint.RESPONSES: (_CLIENT_BOOKKEEPING | {"stream_options"}) - {"prompt_cache_key"},  # vLLM knows that one here
    Endpoint.MESSAGES: (_PROVIDER_BOOKKEEPING | {"user", "request_id", "stream_options"}) - {"metadata"},
    Endpoint.EMBEDDINGS: _PROVIDER_BOOKKEEPING | {"stream", "session_id"},
}


@dataclass(frozen=True, slots=True)
class Fields:
    """The classification of one endpoint's fields; see the module docstring for the groups."""

    ignored: frozenset[str]
    keyed: Mapping[str, Values]
    sampled: Mapping[str, float]
    ruled: frozenset[str]
    uncacheable: Mapping[str, tuple[str, Values]]  # name -> (reason, the values that are as good as absent)


_TRANSFERS: Mapping[str, tuple[str, Values]] = {
    "kv_transfer_params": (TRANSFER, _NONE),
    "ec_transfer_params": (TRANSFER, _NONE),
}

# `to_sampling_params` asks: the call, else the generation config, else these.
_SAMPLED = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

# What chat and completions share.
_GENERATION: Mapping[str, Values] = {
    "logit_bias": _NONE,
    "seed": _NONE,
    "stop": ([], None),  # SamplingParams makes [] of both
    "use_beam_search": _FALSE,
    "watermarking": _NONE,
    "length_penalty": (1.0,),
    "stop_token_ids": ([], None),
    "include_stop_str_in_output": _FALSE,
    "ignore_eos": _FALSE,
    "min_tokens": _ZERO,
    "skip_special_tokens": _TRUE,
    "spaces_between_special_tokens": _TRUE,
    "truncate_prompt_tokens": _NONE,
    "truncation_side": _NONE,
    "prompt_logprobs": _NONE,
    "logprob_token_ids": _NONE,
    "allowed_token_ids": _NONE,
    "bad_words": ([],),
    "response_format": _NONE,
    "structured_outputs": _NONE,
    "thinking_token_budget": _NONE,
    "return_tokens_as_token_ids": _NONE,
    "return_token_ids": _NONE,
    "routed_experts_prompt_start": _ZERO,
    "return_token_offsets": _FALSE,
    "repetition_detection": _NONE,
    "vllm_xargs": _NONE,
    "mm_payload": ("tensors",),
    "return_mm_kwargs": _NONE,
    # It only salts the prefix cache, but who salts wants to share nothing with those who do not.
    "cache_salt": _NONE,
}

_CHAT = Fields(
    ignored=_BOOKKEEPING,
    keyed={
        **_GENERATION,
        "messages": _REQUIRED,
        "logprobs": (False, None),
        "top_logprobs": (0, None),  # a validator of vLLM's makes 0 of null
        "n": (1, None),
        "tools": _NONE,
        "reasoning_effort": _NONE,
        "include_reasoning": _TRUE,
        "parallel_tool_calls": _TRUE,
        "echo": _FALSE,
        "add_generation_prompt": _TRUE,
        "continue_final_message": _FALSE,
        "add_special_tokens": _FALSE,
        "documents": _NONE,
        "chat_template": _NONE,
        "chat_template_kwargs": _NONE,
        "media_io_kwargs": _NONE,
        "mm_processor_kwargs": _NONE,
        "return_prompt_text": _NONE,
    },
    sampled=_SAMPLED,
    # `max_completion_tokens` overrides `max_tokens`; what `tool_choice` defaults to depends on `tools`.
    ruled=frozenset({"model", "tool_choice", "max_tokens", "max_completion_tokens"}),
    uncacheable=_TRANSFERS,
)

_COMPLETIONS = Fields(
    ignored=_BOOKKEEPING,
    keyed={
        **_GENERATION,
        "prompt": _NONE,
        "prompt_embeds": _NONE,  # tensors by value: their content is the key
        "echo": (False, None),
        "logprobs": _NONE,  # a number here, and 0 asks for something
        "max_tokens": (16, None),  # a validator of vLLM's makes 16 of null
        "n": (1,),
        "suffix": _NONE,
        "add_special_tokens": _TRUE,
    },
    sampled=_SAMPLED,
    ruled=frozenset({"model"}),
    uncacheable=_TRANSFERS,
)

_RESPONSES = Fields(
    # The answer's body repeats `metadata` and `user`: a replay puts the new call's own in their place
    # (app/wire/responses.py). Whether `store` keeps the answer for later is the service's to ask.
    ignored=frozenset({"stream", "session_id", "request_id", "store", "prompt_cache_key", "metadata", "user"})
    | _WHEN_IT_RUNS,
    keyed={
        "input": _REQUIRED,
        "include": _NONE,
        "instructions": _NONE,
        "max_output_tokens": _NONE,
        "max_tool_calls": _NONE,
        "service_tier": ("auto",),  # the answer's body repeats it
        "logit_bias": _NONE,
        "parallel_tool_calls": _TRUE,
        "prompt": _NONE,
        "reasoning": _NONE,
        "include_reasoning": _TRUE,
        "text": _NONE,
        "tools": ([],),
        "top_logprobs": (0, None),
        "truncation": ("disabled",),  # null is not the default here: it truncates
        "skip_special_tokens": _TRUE,
        "include_stop_str_in_output": _FALSE,
        "watermarking": _NONE,
        "media_io_kwargs": _NONE,
        "mm_processor_kwargs": _NONE,
        "mm_payload": ("tensors",),
        "return_mm_kwargs": _NONE,
        "cache_salt": _NONE,
        "enable_response_messages": _FALSE,
        "previous_input_messages": _NONE,
        "structured_outputs": _NONE,
        "seed": _NONE,
        "stop": ([], None),
        "stop_token_ids": ([], None),
        "ignore_eos": _FALSE,
        "vllm_xargs": _NONE,
        "chat_template_kwargs": _NONE,
    },
    sampled=_SAMPLED,
    ruled=frozenset({"model", "tool_choice"}),
    uncacheable={
        **_TRANSFERS,
        "previous_response_id": (STATEFUL, _NONE),
        "background": (STATEFUL, _FALSE),
    },
)

_MESSAGES = Fields(
    # vLLM reads no `metadata` here and repeats none.
    ignored=frozenset({"stream", "metadata"}),
    keyed={
        "messages": _REQUIRED,
        "max_tokens": _REQUIRED,
        "model": _REQUIRED,  # without it the call is refused, so absent is not the default name
        "output_config": _NONE,
        "thinking": _NONE,
        "stop_sequences": _NONE,
        "system": _NONE,
        "tool_choice": _NONE,  # stays null, unlike chat's: "auto" with tools, "none" without
        "tools": _NONE,
        "mm_payload": ("tensors",),
        "return_mm_kwargs": _NONE,
        "cache_salt": _NONE,
        "watermarking": _NONE,
        "vllm_xargs": _NONE,
        "chat_template_kwargs": _NONE,
    },
    sampled={name: _SAMPLED[name] for name in ("temperature", "top_p", "top_k")},
    ruled=frozenset(),
    uncacheable=_TRANSFERS,
)

_EMBEDDINGS = Fields(
    ignored=frozenset({"user", "request_id"}) | _WHEN_IT_RUNS,
    keyed={
        "truncate_prompt_tokens": _NONE,
        "padding": _NONE,
        "truncation_side": _NONE,
        "mm_processor_kwargs": _NONE,
        "cache_salt": _NONE,
        "encoding_format": ("float",),
        "embed_dtype": ("float32",),
        "endianness": ("native",),
        "dimensions": _NONE,
        "use_activation": _NONE,
        # Not in every member of the union, or with another default: which member is meant may hang on
        # the field being there, so it is never dropped.
        "input": _REQUIRED,
        "messages": _REQUIRED,
        "add_special_tokens": _REQUIRED,
        "add_generation_prompt": _REQUIRED,
        "continue_final_message": _REQUIRED,
        "chat_template": _REQUIRED,
        "chat_template_kwargs": _REQUIRED,
        "media_io_kwargs": _REQUIRED,
    },
    sampled={},
    ruled=frozenset({"model"}),
    uncacheable={},
)

FIELDS: Mapping[Endpoint, Fields] = {
    Endpoint.CHAT: _CHAT,
    Endpoint.COMPLETIONS: _COMPLETIONS,
    Endpoint.RESPONSES: _RESPONSES,
    Endpoint.MESSAGES: _MESSAGES,
    Endpoint.EMBEDDINGS: _EMBEDDINGS,
}
