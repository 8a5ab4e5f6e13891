"""`python -m tests.weights.s3_server`: moto's S3 on a socket of its own, that remembers what it was asked and can kill.

It prints its address. `POST /-/kill/PID/N`: the N-th request from then on is not done, and the process is killed.
`POST /-/refuse`: everything is forbidden from then on.
`POST /-/log`: the end of both; the requests done since the last time, as JSON: method, path, range.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Start = Callable[..., Any]


class Watched:
    def __init__(self) -> None:
        self._inner = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._done: list[tuple[str, str, str]] = []
        self._victim, self._left, self._is_closed = 0, 0, False

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            if path.startswith("/-/"):
                return self._told(path, start)
            if self._is_fatal():
                os.kill(self._victim, signal.SIGKILL)
                start("503 Service Unavailable", [])
                return []
            if self._is_closed:
                start("403 Forbidden", [("content-type", "application/xml")])
                return [] if method == "HEAD" else [b"<Error><Code>AccessDenied</Code></Error>"]
            self._done.append((method, path, environ.get("HTTP_RANGE", "")))
        return self._inner(environ, start)  # type: ignore[no-any-return]

    def _is_fatal(self) -> bool:
        self._left -= self._left > 0
        return bool(self._victim) and not self._left

    def _told(self, path: str, start: Start) -> Iterable[bytes]:
        start("200 OK", [])
        if path == "/-/log":
            done, self._done = self._done, []
            self._victim, self._is_closed = 0, False
            return [json.dumps(done).encode()]
        if path == "/-/refuse":
            self._is_closed = True
            return []
        self._victim, self._left = (int(part) for part in path.split("/")[3:5])
        return []


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, Watched(), threaded=True)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
