"""A core that cannot bear some prompts: it is killed, as by a fault in a kernel, when one comes into its batch."""

from __future__ import annotations

import itertools
import os
import signal
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor

# A prompt that holds one token so often in a row.
TOO_OFTEN = 12


class Poison(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, *_: Any) -> None:
        pass

    def apply(self, logits: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        for _, _, prompt, _ in batch_update.added if batch_update else ():
            if max(len(list(same)) for _, same in itertools.groupby(prompt or [0])) >= TOO_OFTEN:
                os.kill(os.getpid(), signal.SIGKILL)
