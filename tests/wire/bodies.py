"""Bodies as vLLM 0.32 gives them: a few written by hand, and strategies for all the others."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Json = dict[str, Any]

CREATED = 1764000000

text = st.text(max_size=60)
some_text = st.text(min_size=1, max_size=60)
counts = st.integers(0, 10_000)


def nothing(*keys: str) -> Json:
    return dict.fromkeys(keys)


def chat_usage(**changes: Any) -> Json:
    return {
        "prompt_tokens": 11,
        "total_tokens": 18,
        "completion_tokens": 7,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    } | changes


def chat_body(*choices: Json, **changes: Any) -> Json:
    return {
        "id": "chatcmpl-old",
        "object": "chat.completion",
        "created": CREATED,
        "model": "tuned",
        "choices": [choice | {"index": index} for index, choice in enumerate(choices)],
        "service_tier": None,
        "system_fingerprint": "vllm-0.32.0-a1b2c3d4",
        "usage": chat_usage(),
        **nothing("prompt_logprobs", "prompt_token_ids", "prompt_text", "kv_transfer_params", "ec_transfer_params"),
        "metrics": None,
    } | changes


def chat_choice(content: str | None, finish_reason: str = "stop", **message: Any) -> Json:
    calls = message.pop("tool_calls", None)
    return {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": content,
            **nothing("refusal", "annotations", "audio", "function_call"),
            **({"tool_calls": calls} if calls else {}),
            "reasoning": None,
        }
        | message,
        "logprobs": None,
        "finish_reason": finish_reason,
        **nothing("stop_reason", "token_ids", "routed_experts"),
    }


def tool_call(number: int, name: str, arguments: str) -> Json:
    return {
        "id": f"chatcmpl-tool-{number}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def token(said: str, *others: str) -> Json:
    tops = [{"token": t, "logprob": -0.5, "bytes": list(t.encode())} for t in (said, *others)]
    return {"token": said, "logprob": -0.5, "bytes": list(said.encode()), "top_logprobs": tops}


def completion_body(*choices: Json, **changes: Any) -> Json:
    return {
        "id": "cmpl-old",
        "object": "text_completion",
        "created": CREATED,
        "model": "tuned",
        "choices": [choice | {"index": index} for index, choice in enumerate(choices)],
        "service_tier": None,
        "system_fingerprint": "vllm-0.32.0-a1b2c3d4",
        "usage": chat_usage(),
        **nothing("kv_transfer_params", "ec_transfer_params", "metrics"),
    } | changes


def completion_choice(said: str, finish_reason: str = "stop", tokens: list[str] | None = None) -> Json:
    return {
        "index": 0,
        "text": said,
        "logprobs": None if tokens is None else completion_logprobs(tokens),
        "finish_reason": finish_reason,
        **nothing("stop_reason", "token_ids", "prompt_logprobs", "prompt_token_ids", "routed_experts"),
    }


def completion_logprobs(tokens: list[str]) -> Json:
    offsets = [sum(map(len, tokens[:at])) for at in range(len(tokens))]
    return {
        "text_offset": offsets,
        "token_logprobs": [-0.5] * len(tokens),
        "tokens": tokens,
        "top_logprobs": [{t: -0.5} for t in tokens],
    }


def response_body(*output: Json, **changes: Any) -> Json:
    return {
        "id": "resp_old",
        "created_at": CREATED,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {"trace": "old"},
        "model": "tuned",
        "object": "response",
        "output": list(output),
        "parallel_tool_calls": True,
        "temperature": 0.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "background": False,
        "max_output_tokens": 64,
        **nothing("max_tool_calls", "previous_response_id", "prompt", "reasoning"),
        "service_tier": "auto",
        "status": "completed",
        **nothing("text", "top_logprobs"),
        "truncation": "disabled",
        "usage": {
            "input_tokens": 11,
            "input_tokens_details": {
                "cache_write_tokens": 0,
                "cached_tokens": 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": 7,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": 18,
        },
        "user": "old",
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        **nothing("kv_transfer_params", "ec_transfer_params", "input_messages", "output_messages"),
    } | changes


def message_item(said: str, tokens: list[str] | None = None) -> Json:
    logprobs = None if tokens is None else [token(t, "other") for t in tokens]
    part = {"annotations": [], "text": said, "type": "output_text", "logprobs": logprobs}
    return {
        "id": "msg_item",
        "content": [part] if said else [],
        "role": "assistant",
        "status": "completed",
        "type": "message",
        "phase": None,
    }


def reasoning_item(thought: str) -> Json:
    return {
        "id": "rs_item",
        "summary": [],
        "type": "reasoning",
        "content": [{"text": thought, "type": "reasoning_text"}],
        "encrypted_content": None,
        "status": None,
    }


def function_item(number: int, name: str, arguments: str) -> Json:
    return {
        "arguments": arguments,
        "call_id": f"call_{number}",
        "name": name,
        "type": "function_call",
        "id": f"fc_{number}",
        **nothing("async", "caller", "namespace"),
        "status": "completed",
    }


def custom_item(number: int, name: str, given: str) -> Json:
    return {
        "call_id": f"call_{number}",
        "input": given,
        "name": name,
        "type": "custom_tool_call",
        "id": f"ctc_{number}",
        **nothing("async", "caller", "namespace"),
    }


def message_body(*content: Json, **changes: Any) -> Json:
    return {
        "id": "chatcmpl-old",
        "type": "message",
        "role": "assistant",
        "content": list(content),
        "model": "tuned",
        "stop_reason": "end_turn",
        **({"stop_sequence": changes["stop_sequence"]} if "stop_sequence" in changes else {}),
        "usage": {"input_tokens": 11, "output_tokens": 7},
    } | changes


def text_block(said: str) -> Json:
    return {"type": "text", "text": said}


def thinking_block(thought: str) -> Json:
    return {"type": "thinking", "thinking": thought, "signature": "0123456789abcdef"}


def tool_block(number: int, name: str, given: Json) -> Json:
    return {"type": "tool_use", "id": f"chatcmpl-tool-{number}", "name": name, "input": given}


def embedding_body() -> Json:
    return {
        "id": "embd-old",
        "object": "list",
        "created": CREATED,
        "model": "tuned",
        "data": [{"index": 0, "object": "embedding", "embedding": [0.25, -1.0]}],
        "usage": chat_usage(completion_tokens=0, total_tokens=11),
    }


# Token texts, some of them nowhere in the text (special tokens, halves of a character), some of them in it.
@st.composite
def tokens_of(draw: st.DrawFn, said: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(said)), max_size=12)))
    found = [said[a:b] for a, b in zip([0, *cuts], [*cuts, len(said)], strict=True)]
    for _ in range(draw(st.integers(0, 3))):
        found.insert(draw(st.integers(0, len(found))), draw(st.sampled_from(["", "�", "</s>", "token_id:7", " a"])))
    return found


arguments = st.one_of(st.just("{}"), st.just('{"city": "Köln", "days": [1, 2], "note": "a\\nb 😀"}'), text)
finish = st.sampled_from(["stop", "length", "tool_calls", "repetition"])
details = st.fixed_dictionaries(
    {
        "prompt_tokens_details": st.sampled_from(
            [None, {"cached_tokens": 3, "created_cache_tokens": None, "multimodal_tokens": None}]
        ),
        "completion_tokens_details": st.sampled_from([None, {"reasoning_tokens": 4}]),
    }
)


@st.composite
def chat_choices(draw: st.DrawFn) -> Json:
    names = draw(st.lists(some_text, max_size=3))
    calls = [tool_call(number, name, draw(arguments)) for number, name in enumerate(names)]
    # Beside tool calls vLLM gives no text of blanks alone.
    content = draw(st.none() | text.filter(lambda said: not calls or not said or bool(said.strip())))
    reasoning = draw(st.none() | some_text)
    choice = chat_choice(content, draw(finish), tool_calls=calls, reasoning=reasoning)
    choice["message"]["refusal"] = draw(st.none() | some_text)
    choice["stop_reason"] = draw(st.none() | st.integers(0, 50_000) | some_text)
    tokens = draw(st.none() | tokens_of((reasoning or "") + (content or "")))
    choice["logprobs"] = None if tokens is None else {"content": [token(t, "other") for t in tokens]}
    choice["token_ids"] = draw(st.none() | st.lists(st.integers(0, 50_000), max_size=20))
    choice["routed_experts"] = draw(st.none() | st.just("k05VTVBZ"))
    return choice


@st.composite
def chat_bodies(draw: st.DrawFn) -> Json:
    choices = draw(st.lists(chat_choices(), min_size=1, max_size=3))
    metrics = {
        **nothing("time_to_first_token_ms", "generation_time_ms", "queue_time_ms"),
        "mean_itl_ms": 2.5,
        **nothing("tokens_per_second", "speculative_decoding"),
    }
    return chat_body(
        *choices,
        usage=chat_usage(**draw(details)),
        system_fingerprint=draw(st.none() | some_text),
        prompt_token_ids=draw(st.none() | st.lists(st.integers(0, 50_000), max_size=5)),
        prompt_text=draw(st.none() | text),
        prompt_logprobs=draw(st.none() | st.just([None, {"7": {"logprob": -1.0, "rank": 1, "decoded_token": "a"}}])),
        metrics=draw(st.none() | st.just(metrics)),
        kv_transfer_params=draw(st.none() | st.just({"host": None})),
    )


@st.composite
def completion_choices(draw: st.DrawFn) -> Json:
    said = draw(text)
    choice = completion_choice(said, draw(finish), draw(st.none() | tokens_of(said)))
    choice["stop_reason"] = draw(st.none() | st.integers(0, 50_000) | some_text)
    choice["token_ids"] = draw(st.none() | st.lists(st.integers(0, 50_000), max_size=20))
    choice["prompt_token_ids"] = draw(st.none() | st.lists(st.integers(0, 50_000), max_size=5))
    choice["prompt_logprobs"] = draw(st.none() | st.just([None]))
    return choice


@st.composite
def completion_bodies(draw: st.DrawFn) -> Json:
    choices = draw(st.lists(completion_choices(), min_size=1, max_size=4))
    return completion_body(*choices, usage=chat_usage(**draw(details)))


@st.composite
def spoken_items(draw: st.DrawFn) -> Json:
    said = draw(some_text)
    return message_item(said, draw(st.none() | tokens_of(said)))


items = st.one_of(
    spoken_items(),
    some_text.map(reasoning_item),
    st.builds(function_item, counts, some_text, arguments),
    st.builds(custom_item, counts, some_text, text),
)


@st.composite
def response_bodies(draw: st.DrawFn) -> Json:
    output = draw(st.lists(items, max_size=4))
    if any(item["type"].endswith("_call") for item in output):
        # Beside tool calls vLLM gives no text of blanks alone.
        output = [item for item in output if item["type"] != "message" or item["content"][0]["text"].strip()]
    if draw(st.booleans()):
        return response_body(*output)
    return response_body(*output, status="incomplete", incomplete_details={"reason": "max_output_tokens"})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
tool_inputs = st.dictionaries(text, json_values, max_size=4)


@st.composite
def message_bodies(draw: st.DrawFn) -> Json:
    tools = [tool_block(n, draw(some_text), given) for n, given in enumerate(draw(st.lists(tool_inputs, max_size=3)))]
    thought, said = draw(st.none() | some_text), draw(st.none() | some_text)
    content = [thinking_block(thought)] if thought else []
    if said and (said.strip() or not tools):
        content.append(text_block(said))
    content += tools
    reasons = st.sampled_from(["end_turn", "max_tokens", "tool_use"])
    ending = draw(reasons.map(lambda reason: {"stop_reason": reason}) | st.just(STOPPED))
    return message_body(*(content or [text_block("")]), **ending, usage=draw(message_usages))


STOPPED = {"stop_reason": "stop_sequence", "stop_sequence": "\n\n"}
message_usages = st.sampled_from(
    [
        {"input_tokens": 11, "output_tokens": 7},
        {"input_tokens": 8, "output_tokens": 7, "cache_read_input_tokens": 3},
    ]
)
