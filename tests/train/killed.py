"""`python -m tests.train.killed JOB.json HOME EVENT SUFFIX COUNT`: the job, killed by the kernel at a given moment.

EVENT is `step` (COUNT steps are done), or an event of Python's audit (`open`, `os.rename`, ...) whose first argument
ends with SUFFIX: then the process is killed just before it happens for the COUNT-th time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(event: str, suffix: str, count: int) -> None:
    seen = 0

    def watch(happens: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if happens == event and arguments and str(arguments[0]).endswith(suffix):
            seen += 1
            if seen == count:
                die()

    sys.addaudithook(watch)


def main() -> None:
    from app.train import job as jobs
    from app.train.config import Job

    told, home, event, suffix, count = sys.argv[1:]
    given = Job(**json.loads(Path(told).read_text()))
    if event != "step":
        die_at(event, suffix, int(count))

    def tell(step: Any) -> None:
        if event == "step" and step.number >= int(count):
            die()

    jobs.run(given, Path(home), lambda line: None, tell)


if __name__ == "__main__":
    main()
