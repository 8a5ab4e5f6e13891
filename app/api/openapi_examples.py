"""What the examples in `openapi.json` say; the answers are the default model's own. Data for `app/api/openapi.py`."""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]

MODEL = "smollm2-135m-instruct"
CREATED = 1795320000

CARD: Json = {
    "id": MODEL,
    "object": "model",
    "created": CREATED,
    "owned_by": "refrain",
    "max_model_len": 8192,
    "weights": "3f786850e387550fdab836ed7e6dc881de23001b4c1a0f2fbf7d4cfa39c1f1d0",
}
USER: Json = {"role": "user", "content": "What is the capital of Germany?"}
GREETING = "A question"
ANSWER = "The capital of Germany is Berlin."
USAGE: Json = {"prompt_tokens": 37, "completion_tokens": 8, "total_tokens": 45}
COUNTRY: Json = {
    "type": "object",
    "properties": {"country": {"type": "string"}, "capital": {"type": "string"}},
    "required": ["country", "capital"],
    "additionalProperties": False,
}
WEATHER: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def _sse(*events: Json, done: bool = False, named: bool = False) -> str:
    lines = [
        (f"event: {event['type']}\n" if named else "") + "data: " + json.dumps(event, ensure_ascii=False)
        for event in events
    ]
    return "\n\n".join([*lines, "data: [DONE]"] if done else lines) + "\n\n"


def _chat_chunk(delta: Json, finish: str | None = None) -> Json:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    head = {"id": "chatcmpl-1f0c", "object": "chat.completion.chunk", "created": CREATED, "model": MODEL}
    return {**head, "choices": [choice]}


CHAT: Json = {
    "description": "OpenAI's Chat Completions. Greedy and seeded calls are cached, unless the server is set otherwise.",
    "request": "ChatCompletionRequest",
    "examples": {
        "question": (GREETING, {"model": MODEL, "messages": [USER], "temperature": 0, "max_tokens": 64}),
        "stream": (
            "A stream with usage",
            {
                "model": MODEL,
                "messages": [USER],
                "temperature": 0,
                "max_tokens": 64,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ),
        "json": (
            "JSON that fits a schema",
            {
                "model": MODEL,
                "messages": [{"role": "user", "content": "Germany and its capital, as JSON."}],
                "temperature": 0,
                "max_tokens": 64,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "country", "strict": True, "schema": COUNTRY},
                },
            },
        ),
        "tool": (
            "A tool call",
            {
                "model": MODEL,
                "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
                "temperature": 0,
                "max_tokens": 64,
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "get_weather", "strict": True, "parameters": WEATHER},
                    }
                ],
                "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            },
        ),
        "fresh": (
            "Past the cache",
            {"model": MODEL, "messages": [USER], "temperature": 0, "max_tokens": 64, "cache": {"no_cache": True}},
        ),
    },
    "response": "ChatCompletionResponse",
    "answer": {
        "id": "chatcmpl-1f0c",
        "object": "chat.completion",
        "created": CREATED,
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}],
        "usage": USAGE,
    },
    "event": "ChatCompletionStreamResponse",
    "stream": _sse(
        _chat_chunk({"role": "assistant", "content": ""}),
        _chat_chunk({"content": "The capital of"}),
        _chat_chunk({"content": " Germany is Berlin."}),
        _chat_chunk({"content": ""}, "stop"),
        done=True,
    ),
}


def _completion_body(kind: str, text: str, finish: str | None) -> Json:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return {"id": "cmpl-1f0c", "object": kind, "created": CREATED, "model": MODEL, "choices": [choice]}


COMPLETION: Json = {
    "description": "OpenAI's older text completions: a prompt as text or tokens, one or many.",
    "request": "CompletionRequest",
    "examples": {
        "prompt": (
            "A prompt",
            {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8},
        ),
        "logprobs": (
            "With log probabilities",
            {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8, "logprobs": 2},
        ),
        "seeded": (
            "Sampled, twice the same",
            {"model": MODEL, "prompt": "Once upon a time", "temperature": 0.8, "seed": 7, "max_tokens": 32},
        ),
    },
    "response": "CompletionResponse",
    "answer": {
        **_completion_body("text_completion", " Paris.", "stop"),
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    },
    "event": "CompletionStreamResponse",
    "stream": _sse(
        _completion_body("text_completion", " Paris", None), _completion_body("text_completion", ".", "stop"), done=True
    ),
}

OUTPUT: Json = {
    "id": "msg_1f0c",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": ANSWER, "annotations": []}],
}
RESPONSE: Json = {
    "description": "OpenAI's Responses. Calls that lean on what the server kept (`previous_response_id`, `background`) "
    "or that use tools of the server are never cached.",
    "request": "ResponsesRequest",
    "examples": {
        "question": (GREETING, {"model": MODEL, "input": USER["content"], "temperature": 0, "max_output_tokens": 64}),
        "conversation": (
            "A conversation",
            {
                "model": MODEL,
                "instructions": "Answer in one sentence.",
                "input": [
                    USER,
                    {"role": "assistant", "content": ANSWER},
                    {"role": "user", "content": "And of Italy?"},
                ],
                "temperature": 0,
                "max_output_tokens": 64,
            },
        ),
        "stream": (
            "A stream",
            {
                "model": MODEL,
                "input": USER["content"],
                "temperature": 0,
                "max_output_tokens": 64,
                "stream": True,
            },
        ),
    },
    "response": "ResponsesResponse",
    "answer": {
        "id": "resp_1f0c",
        "object": "response",
        "created_at": CREATED,
        "model": MODEL,
        "status": "completed",
        "output": [OUTPUT],
        "background": False,
        "max_output_tokens": 64,
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "temperature": 0.0,
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 37,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 8,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 45,
        },
    },
    "event": "ResponsesStreamEvent",
}
RESPONSE["stream"] = _sse(
    {
        "type": "response.output_text.delta",
        "sequence_number": 4,
        "item_id": "msg_1f0c",
        "output_index": 0,
        "content_index": 0,
        "delta": "The capital of",
        "logprobs": [],
    },
    {"type": "response.completed", "sequence_number": 9, "response": RESPONSE["answer"]},
    named=True,
)

MESSAGE: Json = {
    "description": "Anthropic's Messages, for its clients and for Claude Code.",
    "request": "AnthropicMessagesRequest",
    "examples": {
        "question": (GREETING, {"model": MODEL, "max_tokens": 64, "temperature": 0, "messages": [USER]}),
        "system": (
            "With a system prompt, as a stream",
            {
                "model": MODEL,
                "max_tokens": 64,
                "temperature": 0,
                "system": "Answer in one sentence.",
                "messages": [USER],
                "stream": True,
            },
        ),
    },
    "response": "AnthropicMessagesResponse",
    "answer": {
        "id": "chatcmpl-1f0c",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": ANSWER}],
        "model": MODEL,
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 37, "output_tokens": 8},
    },
    "event": "AnthropicStreamEvent",
    "stream": _sse(
        {
            "type": "message_start",
            "message": {
                "id": "chatcmpl-1f0c",
                "type": "message",
                "role": "assistant",
                "content": [],
                "model": MODEL,
                "usage": {"input_tokens": 37, "output_tokens": 0},
            },
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": ANSWER}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn"},
            "usage": {"input_tokens": 37, "output_tokens": 8},
        },
        {"type": "message_stop"},
        named=True,
    ),
}

EMBEDDING: Json = {
    "description": "For models that embed. A model that only generates refuses this with 400 and the code "
    "`unsupported_endpoint`.",
    "request": "EmbeddingRequest",
    "examples": {
        "texts": ("Two texts", {"model": MODEL, "input": ["The capital of France", "Paris"]}),
        "base64": ("As base64", {"model": MODEL, "input": "Paris", "encoding_format": "base64"}),
    },
    "response": "EmbeddingResponse",
    "answer": {
        "id": "embd-1f0c",
        "object": "list",
        "created": CREATED,
        "model": MODEL,
        "data": [{"index": 0, "object": "embedding", "embedding": [0.0123, -0.0456, 0.0789]}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5},
    },
}
