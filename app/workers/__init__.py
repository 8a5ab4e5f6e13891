"""More processes that answer hits: they share the server's listening socket, and hand it every connection that asks for
more than a hit."""

from app.workers.pool import Pool

__all__ = ["Pool"]
