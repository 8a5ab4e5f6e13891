"""What finished calls taught: how long prompts and answers are, seconds per token, and how fast work drains."""

from __future__ import annotations

from app.admission.work import Asked, Work
from app.domain import Timings

# Until a call has finished: English text, and a few sentences.
_CHARACTERS_PER_TOKEN = 4.0
_OUTPUT_TOKENS = 256
# A template adds this much to a prompt, and no prompt is empty.
_LEAST_PROMPT_TOKENS = 8
# So many calls are remembered, the last ones weighing most.
_MEMORY = 64


# The fastest is forgotten by this much with each call.
_FADE = 1.01


class Average:
    """A mean over everything at first, then over the last `_MEMORY` values, the newest weighing most."""

    def __init__(self, before: float) -> None:
        self.value = before
        self.seen = 0

    def add(self, value: float) -> None:
        self.seen = min(self.seen + 1, _MEMORY)
        self.value += (value - self.value) / self.seen


class Learned:
    """Of one server. What is learned of answers is kept by the power of two of the limit that their calls set: a call
    that allows 16 tokens says nothing of one that allows 4,000."""

    def __init__(self) -> None:
        self._characters_per_token = Average(_CHARACTERS_PER_TOKEN)
        self._output_tokens: dict[int, Average] = {}
        self._prefill_s_per_token = Average(0.0)
        self._decode_s_per_token = Average(0.0)
        self._fastest_prefill: float | None = None

    def expected(self, asked: Asked, context: int | None) -> Work:
        """The work of a call. An answer is expected to be as long as those to calls that allowed about as much: the
        rest of the context, which is what no limit allows, is hardly ever used up."""
        one = asked.characters / self._characters_per_token.value + asked.token_ids
        prompt = max(_LEAST_PROMPT_TOKENS, round(one))
        if context is not None:
            prompt = min(prompt, context * asked.sequences)
        known = self._output_tokens.get(_octave(asked.limit))
        expected = round(known.value) if known else _OUTPUT_TOKENS
        most = context if asked.limit is None else asked.limit
        output = expected if most is None else min(expected, most)
        return Work(prompt, output * asked.sequences, asked.sequences)

    def prefill_s(self, work: Work) -> float:
        return self._prefill_s_per_token.value * work.prompt_tokens

    def prefilled_in(self, seconds: float) -> int | None:
        """The prompt tokens that the engine takes in so many seconds, at the fastest that was seen lately: a prompt
        that shared its step with many others says how fast these went, and not it."""
        return int(seconds / self._fastest_prefill) if self._fastest_prefill else None

    def decode_s(self, work: Work) -> float:
        return self._decode_s_per_token.value * work.output_tokens / work.sequences

    def learn(self, asked: Asked, timings: Timings) -> None:
        """From a call that ended well; not from one of several sequences, of which one at a time is told."""
        prompt, output = timings.prompt_tokens, timings.completion_tokens
        if asked.sequences > 1 or not prompt:
            return
        if asked.characters and not asked.token_ids:
            self._characters_per_token.add(asked.characters / prompt)
        if timings.prefill_s is not None:
            per_token = max(0.0, timings.prefill_s) / prompt
            self._prefill_s_per_token.add(per_token)
            self._fastest_prefill = min(per_token, _FADE * (self._fastest_prefill or per_token))
        if output:
            self._output_tokens.setdefault(_octave(asked.limit), Average(0.0)).add(output)
            if output > 1 and timings.decode_s is not None:
                self._decode_s_per_token.add(max(0.0, timings.decode_s) / (output - 1))


def _octave(limit: int | None) -> int:
    return -1 if limit is None else limit.bit_length()


class Drain:
    """The cost that the engine works off in a second, measured while it is behind: only then is it all it can do.

    Older time counts less: what was measured `_FADE_S` busy seconds ago weighs half.
    """

    _FADE_S = 15.0
    _STEP_S = 0.1
    _ENOUGH_S = 1.0

    def __init__(self) -> None:
        self._busy_s = 0.0
        self._cost = 0.0
        self._at = 0.0
        self._done = 0.0
        self._is_busy = False

    def note(self, now: float, done: float, *, is_busy: bool) -> None:
        """`done`: all cost worked off so far; `is_busy`: whether it is behind from now on, until the next note."""
        passed = now - self._at
        if self._is_busy and passed < self._STEP_S and is_busy:
            return
        if self._is_busy:
            kept = 2.0 ** (-passed / self._FADE_S)
            self._busy_s = self._busy_s * kept + passed
            self._cost = self._cost * kept + done - self._done
        self._at, self._done, self._is_busy = now, done, is_busy

    @property
    def per_s(self) -> float | None:
        """None before it was measured for long enough to mean anything."""
        return self._cost / self._busy_s if self._busy_s >= self._ENOUGH_S and self._cost > 0 else None
