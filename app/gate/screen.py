"""What a request may make the server do beyond computing: nothing, unless the operator allows it.

vLLM's request models have fields by which a client can make the server fetch a URL or read a file, run a template
of its own, hand over tensors, or connect to another engine. They are refused here, before the engine sees them and
whatever the model can do with them. `tests/gate/test_screen.py` asks vLLM's models which fields there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from app.errors import BadCall

# Fields of the body that reach into the engine. `trusted_fields` names those that clients may set.
GUARDED = {
    "chat_template": "runs in the server",
    "chat_template_kwargs.chat_template": "runs in the server",
    "vllm_xargs": "goes to the engine's plug-ins as it is",
    "mm_processor_kwargs": "goes to the model's processor as it is",
    "media_io_kwargs": "goes to the decoders of media as it is",
    "prompt_embeds": "is a tensor that the engine would load",
    "kv_transfer_params": "names an engine to connect to",
    "ec_transfer_params": "names an engine to connect to",
}
# Where a constraint on the output stands; each tool is one too.
CONSTRAINTS = ("response_format", "structured_outputs", "text", "output_config")

# The members of a content part that refer to media, those inside which the reference stands, and tensors by value.
_MEDIA = ("image_url", "audio_url", "video_url", "file_url", "source", "file")
_REFERENCES = ("url", "file_url")
_TENSORS = ("image_embeds", "audio_embeds", "video_embeds", "prompt_embeds")
# What the model itself said, and what it is told of tools: a URL in there is text.
_TEXT = frozenset({"arguments", "annotations", "parameters", "input_schema"})
# One form of a URL alone, so that no two parsers can find two hosts in it: no user, no backslash, no white space.
_PLAIN_URL = re.compile(r"https?://(?P<host>[A-Za-z0-9.-]+)(?::[0-9]{1,5})?(?:[/?#][!-\[\]-~]*)?")


@dataclass(frozen=True, slots=True)
class Screen:
    """What is allowed here: hosts that media may come from, guarded fields, and the size of a constraint in bytes."""

    media_hosts: frozenset[str] = frozenset()
    trusted_fields: frozenset[str] = frozenset()
    max_constraint_bytes: int = 65_536

    def check(self, body: dict[str, Any]) -> None:
        """Raises BadCall, whose `param` names the field, where the body asks for something that is not allowed."""
        self._check_fields(body)
        self._check_constraints(body)
        for name in ("messages", "input", "system", "prompt", "previous_input_messages"):
            for part, where in _parts(body.get(name), name):
                self._check_part(part, where)
        _check_tools(body.get("tools"))

    def _check_fields(self, body: dict[str, Any]) -> None:
        given = {name for name, value in body.items() if value is not None}
        template = body.get("chat_template_kwargs")
        if isinstance(template, dict) and template.get("chat_template") is not None:
            given.add("chat_template_kwargs.chat_template")
        for name in sorted(given & GUARDED.keys()):
            if name.rpartition(".")[2] not in self.trusted_fields:
                raise BadCall(
                    f"`{name}` {GUARDED[name]}, and this server does not take it from clients",
                    param=name,
                    code="field_not_allowed",
                )

    def _check_constraints(self, body: dict[str, Any]) -> None:
        constraints = [(name, body[name]) for name in CONSTRAINTS if name in body]
        if isinstance(tools := body.get("tools"), list):
            constraints += [(f"tools.{index}", tool) for index, tool in enumerate(tools)]
        for where, value in constraints:
            if isinstance(value, dict) and len(msgspec.json.encode(value)) > self.max_constraint_bytes:
                raise BadCall(
                    f"`{where}` is larger than {self.max_constraint_bytes} bytes",
                    param=where,
                    code="constraint_too_large",
                )

    def _check_part(self, part: dict[str, Any], where: str) -> None:
        for name in _TENSORS:
            if part.get(name) is not None and name not in self.trusted_fields:
                raise BadCall(
                    f"`{name}` is a tensor that the engine would load, and this server does not take it from clients",
                    param=where,
                    code="field_not_allowed",
                )
        if part.get("type") == "prompt_embeds" and "prompt_embeds" not in self.trusted_fields:
            raise BadCall("this server does not take tensors from clients", param=where, code="field_not_allowed")
        for name in _MEDIA:
            for url in _urls(name, part.get(name)):
                if not self._is_allowed(url):
                    raise BadCall(
                        "this server does not fetch that: send media as a data: URL"
                        + (f", or by http(s) from {', '.join(sorted(self.media_hosts))}" if self.media_hosts else ""),
                        param=f"{where}.{name}",
                        code="url_not_allowed",
                    )

    def _is_allowed(self, url: str) -> bool:
        if url[:5].lower() == "data:":
            return True
        plain = _PLAIN_URL.fullmatch(url)
        return plain is not None and plain["host"].lower() in self.media_hosts


def _urls(name: str, value: Any) -> Iterator[str]:
    """The references of one member of a part; the empty one fetches nothing. `source` and `file` hold theirs inside."""
    if isinstance(value, str):
        if value and name not in ("source", "file"):
            yield value
    elif isinstance(value, dict):
        for inner in _REFERENCES:
            yield from _urls(inner, value.get(inner))


def _parts(value: Any, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Every object in a conversation, however it is nested, and where it stands."""
    waiting: list[tuple[Any, str]] = [(value, where)]
    while waiting:
        each, at = waiting.pop()
        if isinstance(each, list):
            waiting += [(inner, f"{at}.{index}") for index, inner in enumerate(each) if isinstance(inner, dict | list)]
        elif isinstance(each, dict):
            yield each, at
            waiting += [(each[name], f"{at}.{name}") for name in _nested(each)]


def _nested(part: dict[str, Any]) -> Iterable[str]:
    is_tool_use = part.get("type") == "tool_use"  # its `input` is what the model said
    return [
        name
        for name, value in part.items()
        if isinstance(value, dict | list) and name not in _TEXT and not (is_tool_use and name == "input")
    ]


def _check_tools(tools: Any) -> None:
    """A tool that the server would reach by the client's address (`mcp` of the Responses API)."""
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if not isinstance(tool, dict):
            continue
        for name in ("server_url", "connector_id", "tunnel_id"):
            if tool.get(name) is not None:
                raise BadCall(
                    "this server connects to no tool server that a client names",
                    param=f"tools.{index}.{name}",
                    code="url_not_allowed",
                )
        if tool.get("type") == "namespace":
            _check_tools(tool.get("tools"))
