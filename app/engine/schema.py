"""The documented request schemas as a check, for an engine that has no models of its own to validate with."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from app.errors import BadCall

_OPENAPI = Path(__file__).parents[1] / "api" / "openapi.json"


def refuse_misfits(path: str, body: dict[str, Any]) -> None:
    """Raise BadCall where the body does not fit what `/openapi.json` says of this path."""
    error = best_match(_validator(path).iter_errors(body))
    if error is not None:
        where = ".".join(str(part) for part in error.absolute_path)
        raise BadCall(f"{where}: {error.message}"[:500] if where else error.message[:500], param=where or None)


@cache
def _document() -> dict[str, Any]:
    return json.loads(_OPENAPI.read_text())  # type: ignore[no-any-return]


@cache
def _validator(path: str) -> Draft202012Validator:
    operation = _document()["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    return Draft202012Validator(schema | {"components": _document()["components"]})
