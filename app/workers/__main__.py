"""`python -m app.workers CHANNEL LISTENER`: two descriptors of the server's, whose `Pool` alone starts it."""

from __future__ import annotations

import signal
import socket
import sys

from app.lifeline import die_with_parent


def main() -> None:
    die_with_parent(signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT):  # who stops all processes of a group means the server; it tells us
        signal.signal(number, signal.SIG_IGN)
    channel, listener = (socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[1:])

    import uvloop

    from app.workers.worker import serve

    uvloop.run(serve(channel, listener))


if __name__ == "__main__":
    main()
