"""The whole story, by `make finetune`: train, evaluate, try, publish; then serve the result and ask it.

What is asked is not in the training data. Before is the base, after is what the server answers with the new weights.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
QUESTIONS = (
    "I'd like to send my Bower back, how many days do I have?",
    "How often should I fill up the water tank?",
    "I am very unhappy with your service.",
    "What is the capital of France?",
)


def main() -> None:
    began = time.monotonic()
    # 1. Train, evaluate, try, publish. Killed, the same command goes on from its last checkpoint.
    command = [sys.executable, "-m", "app", "finetune", "run", str(FOLDER / "finetune.toml"), *sys.argv[1:]]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)
    print(f"\nfrom start to published: {time.monotonic() - began:.0f} s\n", flush=True)
    # 2. Serve both, one after the other, and ask them the same.
    before = answers("smollm2-135m-instruct")
    after = answers("support-bot")
    # 3. Side by side.
    for question in QUESTIONS:
        print(f"> {question}\n\n  before  {indented(before[question])}\n\n  after   {indented(after[question])}\n")
    print("Serve it: make serve MODEL=support-bot")


def answers(model: str) -> dict[str, str]:
    with serving(model) as url:
        return {question: ask(url, model, question) for question in QUESTIONS}


@contextmanager
def serving(model: str) -> Iterator[str]:
    """A server of its own on a free port; it ends with this."""
    print(f"serving {model} ...", flush=True)
    command = [sys.executable, "-m", "app", "serve", "--port", "0", "--model", model]
    server = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, env=environment())
    assert server.stdout is not None
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if found := re.search(r"listening on (http://\S+);", line):
                yield found[1]
                return
        sys.exit("".join(said[-20:]) + "the server did not start")
    finally:
        server.terminate()
        server.wait(60)


def environment() -> dict[str, str]:
    return os.environ | {"REFRAIN_ACCESS_LOG": "false", "REFRAIN_LOADING_WAIT_S": "300", "REFRAIN_CACHE": "off"}


def ask(url: str, model: str, question: str) -> str:
    body = {"model": model, "temperature": 0, "max_tokens": 96, "messages": [{"role": "user", "content": question}]}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=360) as response:  # noqa: S310  # the server that was just started
        told: dict[str, Any] = json.load(response)
    return str(told["choices"][0]["message"]["content"])


def indented(text: str) -> str:
    return text.replace("\n", "\n          ")


if __name__ == "__main__":
    main()
