"""Lua scripts in Redis, called by their digests: a script's source crosses the wire once for each server."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from pathlib import Path
from typing import Any

from redis.exceptions import NoScriptError


class Scripts:
    """The `*.lua` of a folder, by name; `common.lua`, where there is one, stands before each of the others."""

    def __init__(self, folder: Path) -> None:
        texts = {path.stem: path.read_text() for path in folder.glob("*.lua")}
        common = texts.pop("common", "")
        self._texts = {name: common + text for name, text in texts.items()}
        self._digests = {
            name: sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in self._texts.items()
        }

    async def run(self, redis: Any, name: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Raises redis's errors. A server that was restarted, or is another's replica by now, is told the source."""
        try:
            return await redis.evalsha(self._digests[name], len(keys), *keys, *arguments)
        except NoScriptError:
            return await redis.eval(self._texts[name], len(keys), *keys, *arguments)
