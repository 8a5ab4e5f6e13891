"""One call in an engine core, and how another core goes on with it.

All that a client has seen of a call lives in our process: its tokens, their text, their log-probabilities, whatever of
a stop string may have begun (vLLM's `RequestState`). A core that dies takes with it only what it needs to make the next
token, and that follows from the prompt and the tokens so far, but for what `_is_stateful` names.
"""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from app.engine.underway import Underway
from app.errors import AppError, EngineDown, EngineFailed


class Course(Enum):
    """How a call goes on."""

    ANEW = auto()  # nothing of it was passed on yet
    ON = auto()  # from its prompt and its tokens
    REPLAY = auto()  # from its prompt; the tokens that it had are made again, and must be the same
    LOST = auto()  # it needs what died with the core


@dataclass(slots=True, eq=False)
class Running:
    """`request` is what vLLM gives a core, `state` what it keeps of the call on our side of it."""

    request: Any
    state: Any
    underway: Underway
    is_in_core: bool = False
    has_died: bool = False
    # Tokens that this core has made of it, and how many it takes to be further than at the death before.
    made: int = 0
    goal: int = 0
    replay: list[int] = field(default_factory=list)
    is_further: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def tokens(self) -> list[int]:
        """What is known of its answer. Pooling has none."""
        detokenizer = self.state.detokenizer
        return list(detokenizer.output_token_ids) if detokenizer is not None else []

    @property
    def place(self) -> int:
        """How many of its tokens its core has made: one that makes them again is behind what its client has."""
        return self.made if self.goal else len(self.tokens)

    @property
    def course(self) -> Course:
        request, tokens = self.request, self.tokens
        if request.resumable or any(each.data is None for each in request.mm_features or ()):
            return Course.LOST
        if not tokens:
            return Course.ANEW
        if request.prompt_embeds is None and not _is_stateful(request.sampling_params):
            return Course.ON
        return Course.ANEW if _is_told_at_the_end(request.sampling_params) else Course.REPLAY

    def fail(self, error: Exception) -> None:
        """End it with this error, for its client."""
        if isinstance(error, AppError):
            self.underway.error = error
        self.state.queue.put(error)
        self.is_further.set()

    def took(self, output: Any) -> bool:
        """What the new core made of a call that outlived another. False: nothing of it is news.

        Raises:
            AppError: it is no continuation of what its client has.
        """
        if self.state.detokenizer is not None and self.state.detokenizer.num_output_tokens():
            output.events = None  # when it was queued and scheduled for the first time is what counts
        self.made += len(output.new_token_ids)
        if self.replay:
            self._drop_what_is_known(output)
        if self.made > self.goal or output.finish_reason is not None:
            self.is_further.set()
        return bool(output.new_token_ids) or output.finish_reason is not None

    def _drop_what_is_known(self, output: Any) -> None:
        count = min(len(self.replay), len(output.new_token_ids))
        is_same = output.new_token_ids[:count] == self.replay[:count]
        if not is_same or (output.finish_reason is not None and count < len(self.replay)):
            raise EngineFailed("the engine died, and what it generated again differs from what was sent")
        del self.replay[:count]
        output.new_token_ids = output.new_token_ids[count:]
        output.prefill_stats = None
        if (logprobs := output.new_logprobs) is not None:
            kept = (part[count:] for part in (logprobs[:3]))
            output.new_logprobs = type(logprobs)(*kept, None)


def going_on(running: Running, course: Course) -> Any:
    """The request for the next core.

    Raises:
        EngineDown: it cannot be gone on with.
    """
    if course is Course.LOST:
        raise EngineDown("the engine stopped while it worked on this call, which cannot be gone on with")
    tokens, request = running.tokens, copy.copy(running.request)
    running.made, running.replay = 0, []
    running.goal = 0 if course is Course.ON else len(tokens)
    if course is Course.ON:
        request.prompt_token_ids = [*request.prompt_token_ids, *tokens]
        request.sampling_params = _for_the_rest(request.sampling_params, len(tokens))
    elif course is Course.REPLAY:
        running.replay = tokens
    return request


def _for_the_rest(params: Any, made: int) -> Any:
    """The same settings, after so many tokens. What is said of the prompt has been said."""
    rest = copy.copy(params)
    rest.max_tokens = params.max_tokens - made
    rest.min_tokens = max(0, params.min_tokens - made)
    rest.prompt_logprobs = rest.prompt_logprob_token_ids = rest.prompt_logprob_start = None
    return rest


def _is_stateful(params: Any) -> bool:
    """Whether a core that takes the tokens so far for a part of the prompt would make other ones from there on.

    Penalties on what was generated do not count what stands in the prompt (repetition does); a seed's generator, a
    grammar, forbidden words and a thinking budget have got as far as the tokens have.
    """
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or (params.seed is not None and params.temperature > 0)
        or params.structured_outputs is not None
        or params.bad_words
        or params.thinking_token_budget is not None
        or params.repetition_detection is not None
        or params.trace_decode_token_ids is not None
        or params.watermarking
        or params.extra_args
    )


def _is_told_at_the_end(params: Any) -> bool:
    kind: str = params.output_kind.name
    return kind == "FINAL_ONLY"
