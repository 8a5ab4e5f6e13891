"""HTTP by raw sockets, since HTTP libraries decide for themselves how bytes leave."""

from __future__ import annotations

import socket

Response = tuple[int, dict[str, str], bytes]


def request_bytes(method: str, path: str, content: bytes, **headers: str) -> bytes:
    """A request; a header that is given replaces the one that would be there."""
    lines = {"host": "x", "content-type": "application/json", "content-length": str(len(content))} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def post(path: str, content: bytes, **headers: str) -> bytes:
    return request_bytes("POST", path, content, **headers)


def received(connection: socket.socket, count: int = 1) -> list[Response]:
    """So many responses: status, headers, body; chunks as they are."""
    content, found = b"", []
    while len(found) < count:
        head, mark, rest = content.partition(b"\r\n\r\n")
        if mark:
            status, *lines = head.decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            chunked_end = rest.find(b"0\r\n\r\n")
            size = int(headers.get("content-length", chunked_end + 5 if chunked_end >= 0 else len(rest) + 1))
            if len(rest) >= size:
                found.append((int(status.split()[1]), headers, rest[:size]))
                content = rest[size:]
                continue
        more = connection.recv(65536)
        assert more, f"the server closed the connection after {content!r}"
        content += more
    return found
