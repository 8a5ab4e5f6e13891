"""What the output of a call is to be held to: every schema, regex and grammar that its body brings. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

# The kinds of vLLM's StructuredOutputsParams; one of them is set.
KINDS = ("json", "regex", "choice", "grammar", "structural_tag")

# One member: the kind, and what it is held to.
Constraint = dict[str, Any]


def constraints(body: dict[str, Any]) -> list[Constraint]:
    """All that an engine would have to compile for this body, in the form of vLLM's `structured_outputs`."""
    return [*_of_outputs(body.get("structured_outputs")), *_of_formats(body), *_of_tools(body)]


def digest(constraint: Constraint) -> str:
    """The same for equal constraints; what was found out about one is remembered by it."""
    return hashlib.sha256(json.dumps(constraint, sort_keys=True).encode()).hexdigest()


def _of_outputs(outputs: Any) -> Iterator[Constraint]:
    if isinstance(outputs, dict):
        yield from ({kind: outputs[kind]} for kind in KINDS if outputs.get(kind) is not None)


def _of_formats(body: dict[str, Any]) -> Iterator[Constraint]:
    """Chat's `response_format`, Responses' `text.format`, Messages' `output_config.format`."""
    formats = (body.get("response_format"), _member(body, "text", "format"), _member(body, "output_config", "format"))
    for each in formats:
        if not isinstance(each, dict):
            continue
        if each.get("type") == "structural_tag":
            yield {"structural_tag": json.dumps(each)}
        for schema in (each.get("schema"), _member(each, "json_schema", "schema")):
            if isinstance(schema, dict):
                yield {"json": schema}


def _of_tools(body: dict[str, Any]) -> Iterator[Constraint]:
    """The arguments of tools. Left to itself a model is held to those of strict tools alone; told to call, to all."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    is_told = isinstance(choice, dict) or choice in ("required", "any")
    for tool in tools if isinstance(tools, list) else ():
        if not isinstance(tool, dict):
            continue
        function = tool["function"] if isinstance(tool.get("function"), dict) else tool
        schema = function.get("parameters") or function.get("input_schema")
        if isinstance(schema, dict) and (is_told or function.get("strict")):
            yield {"json": schema}
        if isinstance(grammar := _member(tool, "format", "definition"), str):  # a custom tool of the Responses API
            yield {"regex" if _member(tool, "format", "syntax") == "regex" else "grammar": grammar}


def _member(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value
