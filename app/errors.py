"""The error tree.

```
AppError                      has a public face: message · status · type · code · param · headers
├─ Refused      (4xx)         the caller can change something
│   ├─ BadCall 400            PromptTooLong, UnsupportedEndpoint
│   ├─ Unauthenticated 401 · Forbidden 403 · UnknownModel 404 · NotFound 404
│   ├─ BodyTimedOut, HeadTimedOut 408 · BodyTooLarge 413 · UrlTooLong 414 · NotJson 415 · HeadTooLarge 431
│   ├─ StreamLost 410 · KeyReused 422
│   └─ RateLimited 429        QuotaSpent, QueueShareUsed
├─ Busy         (503)         Draining, Loading, QueueFull, DeadlineUnreachable, LimitsUnknown: come back after
│                             `retry_after_s`
├─ DeadlineExceeded (504)     the client's own, or the default one
├─ SwapFailed   (409)         other weights or an adapter could not be served: AdapterFailed
├─ NotCached    (504)         only-if-cached, and it is not
└─ Broken       (5xx)         EngineFailed 500, EngineDown 503, Quarantined 503, EngineTimedOut 504
RoomError                     never leaves its room: it is turned into behaviour at the door
```

`AppError.body()` is OpenAI's error object, with what Anthropic's clients look for beside it.
"""

from __future__ import annotations

from typing import Any


class AppError(Exception):
    """An error whose message is safe to show to a client."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.type = type or self.type
        self.code = code or self.code
        self.param = param
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """OpenAI's error object; `type: error` and `request_id` are what Anthropic's clients read."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error, "type": "error", "request_id": request_id}


class Refused(AppError):
    status = 400
    type = "invalid_request_error"


class BadCall(Refused):
    """Raised when the request itself is wrong; `param` names the field where it is known."""


class PromptTooLong(BadCall):
    """Raised when prompt and answer do not fit into the model; the message says by how much."""

    code = "context_length_exceeded"


class UnsupportedEndpoint(Refused):
    """Raised when the served model cannot do what the endpoint is for (embeddings on a chat model)."""

    code = "unsupported_endpoint"


class Unauthenticated(Refused):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(Refused):
    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(Refused):
    status = 404
    type = "not_found_error"
    code = "not_found"


class UnknownModel(Refused):
    status = 404
    code = "model_not_found"


class BodyTimedOut(Refused):
    status = 408
    type = "timeout_error"
    code = "request_timeout"


class HeadTimedOut(BodyTimedOut):
    """Raised when a request's line and headers take too long to arrive."""


class HeadTooLarge(Refused):
    status = 431
    code = "request_headers_too_large"


class UrlTooLong(Refused):
    status = 414
    code = "url_too_long"


class BodyTooLarge(Refused):
    status = 413
    type = "request_too_large"
    code = "request_too_large"


class NotJson(Refused):
    status = 415
    code = "unsupported_media_type"


class StreamLost(Refused):
    """Raised when a stream cannot go on where its client was: only a new one would be whole."""

    status = 410
    code = "stream_lost"


class KeyReused(Refused):
    """Raised for an `Idempotency-Key` that was used with another body."""

    status = 422
    type = "idempotency_error"
    code = "idempotency_key_reused"


class RateLimited(Refused):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class QuotaSpent(RateLimited):
    """Raised when what is left of a key's budget may not be enough for the call."""

    type = "insufficient_quota"
    code = "insufficient_quota"


class Busy(AppError):
    status = 503
    type = "overloaded_error"
    code = "overloaded"


class Loading(Busy):
    """Raised when the engine is not ready within the time that a call may wait for it."""

    code = "engine_loading"


class LimitsUnknown(Busy):
    """Raised when a limit that must not be passed unseen cannot be looked up."""

    code = "limits_unavailable"


class QueueFull(Busy):
    """Raised when more waits for the engine than may: it is about the server, and another one may have room."""

    code = "queue_full"


class QueueShareUsed(RateLimited):
    """Raised when a tenant has its share of the queue waiting already: it is about the tenant, others are served."""

    code = "queue_share_used"


class DeadlineUnreachable(Busy):
    """Raised before a call is begun that would not be answered in time."""

    code = "deadline_unreachable"


class DeadlineExceeded(AppError):
    """Raised when a client's time was up before its answer was complete."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class SwapFailed(AppError):
    """Raised when other weights were to be served and could not be: what was served before still is."""

    status = 409
    code = "swap_failed"


class AdapterFailed(SwapFailed):
    """Raised when an adapter does not fit the served weights, or there is no room for one more."""

    code = "adapter_failed"


class Draining(Busy):
    """Raised when the server is about to stop and takes no new generation."""

    code = "draining"


class NotCached(AppError):
    """Raised for `Cache-Control: only-if-cached` without a recording (RFC 9111, 5.2.1.7)."""

    status = 504
    type = "not_cached_error"
    code = "not_cached"


class Broken(AppError):
    code = "internal_error"


class EngineFailed(Broken):
    """Raised when a generation broke: its client gets this, never half an answer passed off as whole."""

    code = "engine_error"


class EngineDown(Broken):
    """Raised when there is no engine to ask; hits are still answered."""

    status = 503
    code = "engine_down"


class Quarantined(Broken):
    """Raised for a call that the engine died of, so that it does not die of it again."""

    status = 503
    code = "quarantined"


class EngineTimedOut(Broken):
    status = 504
    type = "timeout_error"
    code = "engine_timeout"


class RoomError(Exception):
    """An error that is turned into behaviour (a miss, another try) before it leaves its room."""


class RedisDown(RoomError):
    """Raised when Redis did not answer in time or not at all."""


class BrokenRecording(RoomError):
    """Raised when what Redis holds under a key is not a recording that we wrote, whole, for that key."""


class Incomplete(RoomError):
    """Raised when an answer is not a complete, successful one and so must not be recorded."""


class LeaseLost(RoomError):
    """Raised when another server holds the lease of a flight by now: what we still say of it must not be heard."""


class Diverged(RoomError):
    """Raised when a generation made again is no continuation of what clients were sent already."""


class StartRefused(Exception):
    """Raised before the server starts: the message is one clear line for the operator."""
