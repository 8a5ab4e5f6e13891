"""A bare Starlette app that answers every chat completion with one ready body: what a hit costs without a cache.

It is the ceiling of the comparison and, for LiteLLM, the OpenAI upstream; it counts its calls.
"""

from __future__ import annotations

import os
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

ANSWER = Path(os.environ["BENCH_ANSWER"]).read_bytes()
calls = 0


async def chat(request: Request) -> Response:
    global calls
    calls += 1
    await request.json()
    return Response(ANSWER, media_type="application/json")


async def count(_: Request) -> Response:
    return Response(str(calls))


app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/calls", count)])
