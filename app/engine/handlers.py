"""vLLM's own handlers, asked for one call: its OpenAI and Anthropic endpoints, and what counts tokens."""

from __future__ import annotations

import asyncio
from typing import Any

from app.domain import Endpoint
from app.errors import UnsupportedEndpoint


async def _chat(handlers: Any, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    handler = having(handlers, "openai_serving_chat", "chat completions")
    return await handler.create_chat_completion(ChatCompletionRequest(**body), None)


async def _completion(handlers: Any, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    handler = having(handlers, "openai_serving_completion", "completions")
    return await handler.create_completion(CompletionRequest(**body), None)


async def _response(handlers: Any, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    handler = having(handlers, "openai_serving_responses", "the Responses API")
    produced = await handler.create_responses(ResponsesRequest(**body), None)
    # A background stream is read from what a task makes that has only just been created: let it begin.
    await asyncio.sleep(0)
    return produced


async def _message(handlers: Any, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

    handler = having(handlers, "anthropic_serving_messages", "the Messages API")
    return await handler.create_messages(AnthropicMessagesRequest(**body), None)


async def _embedding(handlers: Any, body: dict[str, Any]) -> Any:
    from pydantic import TypeAdapter
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest

    handler = having(handlers, "serving_embedding", "embeddings")
    return await handler(TypeAdapter(EmbeddingRequest).validate_python(body), None)


async def _tokenize(handlers: Any, body: dict[str, Any]) -> Any:
    from pydantic import TypeAdapter
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeRequest

    return await handlers.serving_tokenization.create_tokenize(TypeAdapter(TokenizeRequest).validate_python(body), None)


async def _detokenize(handlers: Any, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest

    return await handlers.serving_tokenization.create_detokenize(DetokenizeRequest(**body), None)


async def _count_tokens(handlers: Any, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest

    handler = having(handlers, "anthropic_serving_messages", "the Messages API")
    return await handler.count_tokens(AnthropicCountTokensRequest(**body), None)


DISPATCH = {
    Endpoint.CHAT: _chat,
    Endpoint.COMPLETIONS: _completion,
    Endpoint.RESPONSES: _response,
    Endpoint.MESSAGES: _message,
    Endpoint.EMBEDDINGS: _embedding,
}
RANKED = (Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES)  # they have a `priority`
MARKED = (Endpoint.CHAT, Endpoint.COMPLETIONS)  # they have a `system_fingerprint`
TOKENS = {"/tokenize": _tokenize, "/detokenize": _detokenize, "/v1/messages/count_tokens": _count_tokens}


def having(handlers: Any, name: str, what: str) -> Any:
    handler = getattr(handlers, name, None)
    if handler is None:
        raise UnsupportedEndpoint(f"the served model does not support {what}")
    return handler
