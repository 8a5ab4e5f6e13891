"""What `python -m benchmarks faults` calls whole, an error, or bad: its verdict is worth what this is worth."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks.faults_calls import Case, Clients

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
REFUSAL = {"error": {"message": "no room", "type": "overloaded_error", "param": None, "code": "busy"}}


def chunk(text: str | None = None, finish: str | None = None, usage: object = None) -> bytes:
    choices = [{"index": 0, "delta": {"content": text}, "finish_reason": finish}] if usage is None else []
    common = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}
    return event(common | {"usage": usage})


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


TEXT, END, USED, DONE = chunk("two "), chunk("words", "stop"), chunk(usage=USAGE), b"data: [DONE]\n\n"
STREAMS = {
    "whole": (200, TEXT + END + USED + DONE, "whole"),
    "cut in the text": (200, TEXT, "bad"),
    "cut in the text, yet done": (200, TEXT + DONE, "bad"),
    "without its usage": (200, TEXT + END + DONE, "bad"),
    "an error event": (200, TEXT + event(REFUSAL), "error"),
    "an error event that says nothing": (200, TEXT + event({"error": "oops"}), "bad"),
    "refused": (503, json.dumps(REFUSAL).encode(), "error"),
    "refused with a page": (502, b"<html>bad gateway</html>", "bad"),
}


async def heard_of(way: str, status: int, content: bytes, length: int | None = None) -> tuple[str, str]:
    """How a call ends that is answered with these bytes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        # Whoever has sent something that nobody read hears that the connection broke, and may lose what was said.
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
        kind = "text/event-stream" if status == 200 else "application/json"
        head = f"HTTP/1.1 {status} x\r\ncontent-type: {kind}\r\ncontent-length: {length or len(content)}\r\n"
        writer.write(f"{head}connection: close\r\n\r\n".encode() + content)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, Clients(f"http://127.0.0.1:{port}") as clients:
        heard = await clients.ask(Case("it", way, BODY, stream=True), {})
    return heard.end, heard.text


@pytest.mark.parametrize("way", ["bare", "chat"])
@pytest.mark.parametrize("what", STREAMS)
async def test_each_end_is_called_what_it_is(way: str, what: str) -> None:
    status, content, end = STREAMS[what]
    found, text = await heard_of(way, status, content)
    assert found == end
    assert end != "whole" or text == "two words"


@pytest.mark.parametrize("way", ["bare", "chat"])
async def test_a_connection_that_breaks_is_bad(way: str) -> None:
    assert (await heard_of(way, 200, TEXT + END, length=10_000))[0] == "bad"


async def test_a_stream_without_its_last_mark_is_bad() -> None:
    assert (await heard_of("bare", 200, TEXT + END + USED))[0] == "bad"
