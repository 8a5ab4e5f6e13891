"""Publication killed before any of its steps on the disk: nothing half published, and what is served is untouched."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from app.train.config import Job
from app.train.job import publish
from app.weights import Registry

# What Python tells of before it happens; each is a moment at which the kernel may take the process.
STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree"}
FACTS: dict[str, Any] = {"source": {"kind": "finetune"}, "base": "a" * 64, "metrics": {"loss": 1.0}}


def fill(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    save_file({"w": rng.standard_normal((8, 8)).astype(np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")


def publish_one(root: Path, job: Job, seed: int) -> str:
    registry = Registry(root)
    with registry.stage(job.name) as staged:
        fill(staged, seed)
        return publish(registry, job, staged, FACTS).digest


def killed_at(step: int, root: Path, job: Job, seed: int) -> bool:
    """Publish in a child that is killed before its `step`-th deed in the registry. False if it has fewer."""
    child = os.fork()
    if child == 0:
        done = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if event in STEPS and arguments and str(arguments[0]).startswith(str(root)):
                done += 1
                if done == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        publish_one(root, job, seed)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_before_any_step_of_publishing_the_registry_verifies_and_what_is_served_stays(tmp_path: Path) -> None:
    root = tmp_path / "weights"
    job = Job(name="bot", data=tmp_path / "d")
    served = publish_one(root, job, seed=0)
    registry = Registry(root)
    step, outcomes = 0, set()
    while True:
        step += 1
        was_killed = killed_at(step, root, job, seed=step)
        for row in registry.list():
            assert registry.verify("bot", row.digest) == (), f"step {step}"
        current = registry.current("bot")
        assert current in {row.digest for row in registry.list()}, f"step {step}"
        assert registry.find("bot").digest == current
        if not was_killed:
            assert current not in {None, served}
            break
        # Either not published at all, or published and not served, or already pointed at: never in between.
        outcomes.add((len(registry.list()) > 1, current != served))
        published = publish_one(root, job, seed=1000 + step)  # the same command again
        assert registry.current("bot") == published
        registry.point("bot", served)
    assert step > 15, "the steps were seen"
    assert outcomes >= {(False, False), (True, False)}
    leftovers = [path.name for path in (root / "bot").iterdir() if path.name.startswith(".stage")]
    publish_one(root, job, seed=9999)
    assert [path.name for path in (root / "bot").iterdir() if path.name.startswith(".stage")] == [], leftovers
