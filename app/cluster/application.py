"""What Ray Serve imports: `serve run app.cluster.application:build model=...`, or a config file in deploy/ray/."""

from __future__ import annotations

from typing import Any

from ray import serve

from app.cluster.replica import Replica
from app.settings import load

# To close the port and the engine, before and after what runs has ended.
_CLOSE_S = 20.0


class _OnRay(Replica):
    """The names that Ray calls things by."""

    def __serve_build_asgi_app__(self) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:  # uvicorn knows no bound method for an app
            await self.door(scope, receive, send)

        return app

    async def __del__(self) -> None:
        await self.drain()


def deployment(args: dict[str, Any]) -> serve.Deployment:
    """What `build` binds, for who sets Ray's own options in Python. Raises StartRefused."""
    settings = load(**args)
    return serve.deployment(
        serve.ingress()(_OnRay),
        name="refrain",
        user_config={},  # without one Ray would not call `reconfigure`, which starts the server
        max_ongoing_requests=settings.max_connections,  # who waits for the engine is decided behind this
        # Ray first lets end what came by its own door, then calls us.
        graceful_shutdown_timeout_s=2 * settings.drain_s + settings.drain_delay_s + _CLOSE_S,
    )


def build(args: dict[str, Any]) -> serve.Application:
    """The application; `args` are settings by their names in `refrain config`, without the prefix.

    Everything else (replicas, autoscaling, cards, placement, router) is Ray's own and stands in the config file.

    Raises:
        StartRefused: settings that do not fit.
    """
    return deployment(args).bind(args)
