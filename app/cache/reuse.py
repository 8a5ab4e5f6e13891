"""Which recordings and generations serve calls that are not quite the same. Pure.

Every rule is listed in decisions/0006-what-one-recording-serves.md with its reason, and proved against the engine.
"""

from __future__ import annotations

from app.domain import Call, Endpoint

# With these fields alone the stream of an answer folds into the very body that the engine would give.
_PLAIN = frozenset(
    "model messages prompt temperature top_p top_k min_p seed max_tokens max_completion_tokens stop presence_penalty "
    "frequency_penalty repetition_penalty logit_bias user metadata stream stream_options n".split()
)


def reads_the_same_streamed(call: Call) -> bool:
    """Whether a call without `stream` may be generated as a stream: one plain text, of one prompt."""
    body = call.body
    if call.endpoint not in (Endpoint.CHAT, Endpoint.COMPLETIONS) or not body.keys() <= _PLAIN:
        return False
    if body.get("n") not in (None, 1):
        return False
    return call.endpoint is Endpoint.CHAT or isinstance(body.get("prompt"), str)
