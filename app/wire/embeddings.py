"""Embeddings: a body only; nothing of it is ever streamed."""

from __future__ import annotations

from collections.abc import Sequence

from app.errors import Incomplete
from app.wire.chunks import Json, identity, split_usage, usage
from app.wire.stamp import template

__all__ = ["ID_PREFIX", "check_body", "fold", "identity", "split_usage", "template", "unfold", "usage"]

ID_PREFIX = "embd-"


def fold(events: Sequence[bytes]) -> Json:
    raise ValueError("embeddings are not streamed")


def unfold(body: Json) -> list[bytes]:
    raise ValueError("embeddings are not streamed")


def check_body(body: Json) -> None:
    data = body.get("data")
    if body.get("object") != "list" or not data or not isinstance(body.get("usage"), dict):
        raise Incomplete("the body is not a whole list of embeddings")
    if not all(one.get("embedding") for one in data):
        raise Incomplete("an embedding is missing")
