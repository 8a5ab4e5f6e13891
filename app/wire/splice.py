"""One stream continued by another that says the same: what was sent is left out, the rest goes on, nothing is mixed.

A generation that is made again after its server died begins at its first word, under other names and perhaps cut
into other chunks. `Splice` compares the two by what they say and lets through only what is new.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from app.domain import Endpoint
from app.errors import Diverged
from app.wire import sse

Json = dict[str, Any]
# Where a text grows: a choice's content, a block's arguments, ...
Channel = tuple[Any, ...]

_DONE: frozenset[Channel] = frozenset({("done",)})


class Splice:
    """Made of the events that were sent; `fit` takes the new stream's events one by one, in order."""

    def __init__(self, endpoint: Endpoint, sent: Iterable[bytes]) -> None:
        self._endpoint = endpoint
        self._said: dict[Channel, str] = {}
        self._silences: Counter[tuple[Channel, int]] = Counter()
        self._marks: set[Channel] = set()
        self._names: list[str] = []
        self._renamed: dict[bytes, bytes] = {}
        self._new_names: list[str] = []
        self._created: int | None = None
        self._again: dict[Channel, str] = {}
        self._number = 0
        for event in sent:
            document = _document(event)
            if document is None:
                self._marks |= _DONE
                continue
            self._number = max(self._number, document.get("sequence_number", -1) + 1)
            self._created = self._created or _created(document)
            self._note_names(document, self._names)
            for channel, text in _texts(self._endpoint, document):
                said = self._said.get(channel, "")
                self._silences[channel, len(said)] += not text
                self._said[channel] = said + text
            self._marks |= _marks(self._endpoint, document)

    def fit(self, event: bytes) -> bytes | None:
        """The event as it continues what was sent: whole, less what was said already, or None.

        Raises:
            Diverged: the new stream says something else than the one it should continue.
        """
        document = _document(event)
        if document is None:
            return None if self._marks >= _DONE else event
        self._rename(document)
        texts, marks = list(_texts(self._endpoint, document)), _marks(self._endpoint, document)
        fresh = [self._fresh(channel, text) for channel, text in texts]
        is_fresh = [
            bool(new) or self._is_fresh_silence(channel, text)
            for new, (channel, text) in zip(fresh, texts, strict=True)
        ]
        if not marks - self._marks and not any(is_fresh):
            return None
        self._marks |= marks
        if fresh != [text for _, text in texts]:
            if _has_logprobs(document):
                raise Diverged("the chunks of the two streams differ, and each names its tokens")
            event = _with_texts(self._endpoint, document, fresh)
        return self._in_old_names(event)

    def _is_fresh_silence(self, channel: Channel, text: str) -> bool:
        """An event that says nothing, where what was sent had none (any more): such a one can mean something too."""
        at = len(self._again[channel])
        if text or at < len(self._said.get(channel, "")):
            return False
        self._silences[channel, at] -= 1
        return self._silences[channel, at] < 0

    def _fresh(self, channel: Channel, text: str) -> str:
        """What of this text was not said before on its channel."""
        said, at = self._said.get(channel, ""), len(self._again.get(channel, ""))
        known = said[at : at + len(text)]
        if not text.startswith(known):
            raise Diverged("the answer was generated again and came out differently")
        self._again[channel] = self._again.get(channel, "") + text
        return text[len(known) :]

    def _note_names(self, document: Json, names: list[str]) -> None:
        for name in _names(self._endpoint, document):
            if name not in names:
                names.append(name)

    def _rename(self, document: Json) -> None:
        """Names are made up in order, so the n-th of the one stream is the n-th of the other; the time is one."""
        if self._created is not None and (created := _created(document)) not in (None, self._created):
            for name in (b'"created":', b'"created_at":'):
                self._renamed[name + str(created).encode()] = name + str(self._created).encode()
        known = len(self._new_names)
        self._note_names(document, self._new_names)
        for at in range(known, min(len(self._new_names), len(self._names))):
            self._renamed[_quoted(self._new_names[at])] = _quoted(self._names[at])

    def _in_old_names(self, event: bytes) -> bytes:
        for new, old in self._renamed.items():
            event = event.replace(new, old)
        if self._endpoint is Endpoint.RESPONSES:
            document = _document(event) or {}
            event = sse.event(document | {"sequence_number": self._number}, name=document["type"])
            self._number += 1
        return event


def _created(document: Json) -> int | None:
    """When the answer says that it was begun, in unix seconds; messages do not."""
    created = document.get("created") or (document.get("response") or {}).get("created_at")
    return created if isinstance(created, int) else None


def _quoted(name: str) -> bytes:
    return msgspec.json.encode(name)


def _document(event: bytes) -> Json | None:
    """What the event holds; None for `[DONE]` and comments."""
    for payload in sse.payloads([event]):
        if payload != b"[DONE]":
            return sse.parse(payload)
    return None


def _has_logprobs(document: Json) -> bool:
    return any(choice.get("logprobs") for choice in document.get("choices") or ()) or bool(document.get("logprobs"))


def _names(endpoint: Endpoint, document: Json) -> Iterator[str]:
    """The names that were made up for this answer, in the order of their first use."""
    match endpoint:
        case Endpoint.CHAT | Endpoint.COMPLETIONS:
            yield document["id"]
        case Endpoint.MESSAGES:
            if document.get("type") == "message_start":
                yield document["message"]["id"]
        case _:
            if isinstance(document.get("response"), dict):
                yield document["response"]["id"]
            if isinstance(document.get("item"), dict) and document["item"].get("id"):
                yield document["item"]["id"]


def _holders(endpoint: Endpoint, document: Json) -> Iterator[tuple[Channel, Json, str]]:
    """Each place of the event that holds a piece of text: its channel, the object, and the member's name."""
    match endpoint:
        case Endpoint.CHAT:
            for choice in document.get("choices") or ():
                for name in ("content", "reasoning", "refusal"):
                    yield (choice["index"], name), choice["delta"], name
                for call in choice["delta"].get("tool_calls") or ():
                    if isinstance(call.get("function"), dict):
                        yield (choice["index"], "call", call["index"]), call["function"], "arguments"
        case Endpoint.COMPLETIONS:
            for choice in document.get("choices") or ():
                yield (choice["index"],), choice, "text"
        case Endpoint.MESSAGES:
            if document.get("type") == "content_block_delta":
                for name in ("text", "thinking", "partial_json", "signature"):
                    yield (document["index"], name), document["delta"], name
        case _:
            if str(document.get("type")).endswith(".delta"):
                where = (document["type"], document.get("output_index"), document.get("content_index"))
                yield where, document, "delta"


def _texts(endpoint: Endpoint, document: Json) -> Iterator[tuple[Channel, str]]:
    for channel, holder, name in _holders(endpoint, document):
        if isinstance(holder.get(name), str):
            yield channel, holder[name]


def _with_texts(endpoint: Endpoint, document: Json, texts: list[str]) -> bytes:
    left = iter(texts)
    for _, holder, name in _holders(endpoint, document):
        if isinstance(holder.get(name), str):
            holder[name] = next(left)
    return sse.event(document, name=document.get("type"))


def _marks(endpoint: Endpoint, document: Json) -> frozenset[Channel]:
    """What the event says beside text: that a choice opened or finished, that a block began, the usage."""
    if endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS):
        marks: set[Channel] = {("usage",)} if document.get("usage") else set()
        for choice in document.get("choices") or ():
            index, delta = choice["index"], choice.get("delta") or {}
            if choice.get("finish_reason") is not None:
                marks.add((index, "finish"))
            if delta.get("role"):
                marks.add((index, "role"))
            marks |= {(index, "call", call["index"]) for call in delta.get("tool_calls") or () if call.get("id")}
        return frozenset(marks)
    kind = str(document.get("type"))
    if (kind.endswith("_delta") and kind != "message_delta") or kind.endswith(".delta"):
        return frozenset()
    return frozenset({(kind, document.get("index"), document.get("output_index"), document.get("content_index"))})
