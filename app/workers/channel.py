"""What the server and a worker say to each other, over a pair of sockets that nobody else can reach.

A client's connection travels with a message: the kernel gives the other process the very same connection (SCM_RIGHTS,
unix(7)), and what the client sends from then on is read there.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from app.domain import Weights
from app.observe.metrics import Key

# A packet arrives whole or not at all, so none may be larger than what the kernel keeps for the one who sends it.
_SEND_BUFFER_BYTES = 208 * 2**10
_LARGEST_BYTES = 512 * 2**10


class Message(msgspec.Struct, tag=True, frozen=True):
    """Of the other process; `number` is that of a question, and of its answer."""


class Begin(Message, frozen=True):
    """To a worker, first: how to serve. `is_locked`: keys are needed, even if none is left."""

    number: int
    settings: dict[str, Any]
    is_locked: bool


class Serve(Message, frozen=True):
    """To a worker: what is served from now on, the base first. With the first of these it begins to listen."""

    number: int
    weights: list[Weights]


class Tell(Message, frozen=True):
    """To a worker: say what you have counted."""

    number: int


class Done(Message, frozen=True):
    """From a worker: that is done."""

    number: int


class Told(Message, frozen=True):
    """From a worker: all that it has counted since it began."""

    number: int
    counts: dict[Key, float]


class Connection(Message, frozen=True):
    """A client's connection comes with it, and what the client has sent that nobody has answered."""

    received: bytes = b""


class Stop(Message, frozen=True):
    """To a worker: take nothing more, hand over what has begun to arrive, and end."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Begin | Serve | Tell | Done | Told | Connection | Stop)


class Channel:
    """One end. Iterate over it for what the other says; it ends when the other has."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._socket = end
        self._unsent: deque[tuple[bytes, int | None]] = deque()

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def send(self, message: Message, connection: int | None = None) -> None:
        """Nobody waits: what the other does not take yet is kept, at most one message per connection that is open.

        `connection` is a descriptor that is the other's from here on.
        """
        self._unsent.append((_encoder.encode(message), connection))
        if len(self._unsent) == 1:
            self._flush()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._unsent:
            data, connection = self._unsent[0]
            try:
                self._send(data, connection)
            except BlockingIOError:
                loop.add_writer(self._socket, self._flush)
                return
            except OSError:  # the other has ended; who iterates hears of it
                pass
            self._unsent.popleft()
            if connection is not None:
                os.close(connection)
        loop.remove_writer(self._socket)

    def _send(self, data: bytes, connection: int | None) -> None:
        if connection is None:
            self._socket.send(data)
        else:
            socket.send_fds(self._socket, [data], [connection])

    async def __aiter__(self) -> AsyncIterator[tuple[Message, socket.socket | None]]:
        while True:
            try:
                data, connections, _, _ = socket.recv_fds(self._socket, _LARGEST_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                await self._readable()
                continue
            except OSError:
                return
            if not data:
                return
            yield _decoder.decode(data), socket.socket(fileno=connections[0]) if connections else None
            await asyncio.sleep(0)  # others have a turn, however much there is to read

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        there = asyncio.Event()
        loop.add_reader(self._socket, there.set)
        try:
            await there.wait()
        finally:
            loop.remove_reader(self._socket)

    def close(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_writer(self._socket)
        for _, connection in self._unsent:
            if connection is not None:
                os.close(connection)
        self._unsent.clear()
        self._socket.close()


def detached(transport: asyncio.BaseTransport) -> int:
    """A descriptor of this transport's connection, of one's own; the transport is to be aborted, which closes its own.

    Only where the transport has nothing left to write, and nothing reads it any more. Raises OSError where the process
    may have no more descriptors.
    """
    return os.dup(transport.get_extra_info("socket").fileno())
