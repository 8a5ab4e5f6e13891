"""Which recordings and generations serve calls that are not quite the same. Pure.

`max_tokens`, `n` and chat's `logprobs` are left out of the key of a *family* of calls; what they ask for is the
call's `Shape`, and whether a recording of the family serves it is decided when it is read. Each rule, its reason
and the test that compares it with the engine's own answer are in decisions/0012-what-one-recording-serves.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256

from app.cache.recording import Recording
from app.domain import Call, Endpoint

# With these fields alone the stream of an answer folds into the very body that the engine would give.
_SAMPLING = (
    "model temperature top_p top_k min_p seed stop presence_penalty frequency_penalty repetition_penalty logit_bias "
    "user metadata stream "
)
_CHUNKED = f"{_SAMPLING} messages prompt max_tokens max_completion_tokens stream_options n"
_PLAIN = {
    endpoint: frozenset(names.split())
    for endpoint, names in (
        (Endpoint.CHAT, _CHUNKED),
        (Endpoint.COMPLETIONS, _CHUNKED),
        (Endpoint.MESSAGES, f"{_SAMPLING} messages system max_tokens stop_sequences"),
        (Endpoint.RESPONSES, f"{_SAMPLING} input instructions max_output_tokens store"),
    )
}
_STOPS = ("stop", "stop_sequences")
_COMPLETIONS_LIMIT = 16  # what vLLM makes of an absent `max_tokens` there
_MOST_CHOICES = 128


class Rule(StrEnum):
    """How a recording serves a call; the values of a metric label."""

    SAME = "same"
    ENDED = "ended_by_itself"
    CUT = "cut_shorter"
    FEWER = "fewer_choices"


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a call its family's key leaves out. `limit` None: as much as the model can take."""

    limit: int | None = None
    n: int = 1
    logprobs: int | None = None
    is_cuttable: bool = False
    endpoint: Endpoint = Endpoint.CHAT

    def key(self, family: str) -> str:
        """The key of calls of just this shape."""
        if (self.limit, self.n, self.logprobs) == (None, 1, None):
            return family
        return sha256(f"{family} {self.limit} {self.n} {self.logprobs}".encode()).hexdigest()


def reads_the_same_streamed(call: Call) -> bool:
    """Whether a call without `stream` may be generated as a stream: one plain text, of one prompt."""
    body = call.body
    if not body.keys() <= _PLAIN.get(call.endpoint, frozenset()) or body.get("n") not in (None, 1):
        return False
    return call.endpoint is not Endpoint.COMPLETIONS or isinstance(body.get("prompt"), str)


def family(call: Call) -> tuple[Call, Shape]:
    """The call without what its shape says; the call itself, and a shape that says nothing, where that is not sure."""
    body = call.body
    if call.endpoint is Endpoint.EMBEDDINGS or body.get("use_beam_search") or _cuts_its_prompt(call):
        return call, Shape()
    limit, n, logprobs = _limit(call), 1, None
    left_out = {"max_output_tokens"} if call.endpoint is Endpoint.RESPONSES else {"max_tokens", "max_completion_tokens"}
    if limit is not None and (type(limit) is not int or limit < 1):
        return call, Shape()
    if call.endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS):
        n = 1 if body.get("n") is None else body["n"]
        if type(n) is not int or not 1 <= n <= _MOST_CHOICES:
            return call, Shape()
        left_out.add("n")
    if call.endpoint is Endpoint.CHAT and "logprob_token_ids" not in body:
        asked, top = body.get("logprobs"), body.get("top_logprobs")
        if asked not in (None, True, False) or not (top is None or (type(top) is int and top >= 0)):
            return call, Shape()
        if asked or not top:  # `top_logprobs` without `logprobs` is refused, and not ours to hide
            logprobs = (top or 0) if asked else None
            left_out |= {"logprobs", "top_logprobs"}
    is_cuttable = reads_the_same_streamed(call) and not any(body.get(name) for name in _STOPS)
    body = {name: value for name, value in body.items() if name not in left_out}
    return replace(call, body=body), Shape(limit, n, logprobs, is_cuttable, call.endpoint)


def _cuts_its_prompt(call: Call) -> bool:
    """Whether the prompt itself depends on the limit: to truncate it, room for the answer is set aside first."""
    return call.endpoint is Endpoint.RESPONSES and call.body.get("truncation", "disabled") != "disabled"


def _limit(call: Call) -> object:
    if call.endpoint is Endpoint.RESPONSES:
        return call.body.get("max_output_tokens")
    if call.endpoint is Endpoint.CHAT and call.body.get("max_completion_tokens") is not None:
        return call.body["max_completion_tokens"]
    given = call.body.get("max_tokens")
    if call.endpoint is Endpoint.MESSAGES and given is None:
        return 0  # required there: the engine refuses the call
    return _COMPLETIONS_LIMIT if given is None and call.endpoint is Endpoint.COMPLETIONS else given


def rule(recording: Recording, shape: Shape, max_model_len: int | None) -> Rule | None:
    """By which rule a recording of the family serves a call of this shape; None: it does not."""
    if recording.logprobs != shape.logprobs and shape.logprobs is not None:
        return None
    if recording.n != shape.n and (recording.n < shape.n or recording.choice_tokens is None):
        return None
    if recording.limit == shape.limit or _ended_within(recording, shape, max_model_len):
        same = (recording.n, recording.logprobs) == (shape.n, shape.logprobs)
        return (Rule.SAME if recording.limit == shape.limit else Rule.ENDED) if same else Rule.FEWER
    is_cut_here = shape.is_cuttable and recording.n == 1 and recording.logprobs is None
    if is_cut_here and recording.counts and shape.limit in recording.counts:
        return Rule.CUT
    return None


def _ended_within(recording: Recording, shape: Shape, max_model_len: int | None) -> bool:
    """Whether the answer ended by itself and would have under this limit too: the limit alone ends nothing earlier."""
    limit = shape.limit
    if not recording.ended:
        return False
    if shape.endpoint is Endpoint.RESPONSES:  # they repeat their limit, and none is told as what the model has room for
        return (
            limit is not None and recording.most is not None and recording.completion_tokens <= limit <= recording.most
        )
    if limit is None:
        return True
    # With several choices the longest is not known, only that none is longer than all of them together.
    if limit < recording.completion_tokens:
        return False
    if recording.limit is not None and limit <= recording.limit:
        return True
    # A limit beyond what the model can take is the engine's to judge.
    return max_model_len is not None and recording.prompt_tokens + limit <= max_model_len


def covers(new: Recording, old: Recording) -> bool:
    """Whether the new one serves all that the old one does, and may take its place in the family."""
    if (new.limit, new.n, new.logprobs) == (old.limit, old.n, old.logprobs):
        return True
    if old.n > new.n or (old.logprobs is not None and new.logprobs is None):
        return False
    if old.most is not None and (new.most is None or new.most < old.most or old.limit is None):
        return False
    return new.ended or (not old.ended and bool(new.counts) and new.completion_tokens >= old.completion_tokens)
