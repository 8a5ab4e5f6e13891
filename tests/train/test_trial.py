"""The trial and the gate with the real engine: what is published has loaded there and has answered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from app.train import job as jobs
from app.train.trial import Asked, TrialFailed, trial
from app.weights import Registry

from .conftest import make_job, write

QUESTIONS = [
    {"id": "a", "group": "any", "prompt": "What is 7 and 7?", "checks": [{"regex": r"\S"}]},
    {"id": "judged", "group": "judged", "prompt": "What is 7 and 7?", "checks": [{"judge": "it is right"}]},
    {"id": "b", "group": "none", "prompt": "What is 8 and 8?", "checks": [{"equals": "what no model says"}]},
]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a home of its own, in which nothing is compiled yet."""
    monkeypatch.setenv("REFRAIN_COMPILE", "false")


@pytest.mark.engine
def test_both_models_answer_the_questions_in_the_engine_and_the_gate_counts(tiny: Path, tmp_path: Path) -> None:
    told: list[str] = []
    checks = write(tmp_path / "checks.jsonl", QUESTIONS)
    wanted = {"max_steps": 4, "trial": True, "checks": checks, "max_answer_tokens": 16, "max_loss_ratio": 2.0}
    job = make_job(tmp_path / "d", tiny, min_pass={"any": 1.0, "none": 0.5}, **wanted)
    outcome = jobs.run(job, tmp_path, told.append, lambda step: None, force=True)
    assert outcome is not None
    reason = "0% of 'none' passed, 50% are asked for (min_pass)"
    assert outcome.manifest.settings["gate"] == {"reasons": [reason], "forced": True}
    registry = Registry(tmp_path / "weights")
    kept = tmp_path / "train" / "base-answers"
    assert len(list(kept.iterdir())) == 1, "the next job on this base need not ask it again"
    assert sum("the base judges 2 answers" in line for line in told) == 1
    assert "asked 2 questions" in "\n".join(told), "two questions about one answer: it is asked for once"
    metrics = outcome.manifest.metrics
    assert (metrics["passed.any"], metrics["passed.none"], metrics["base_passed.any"]) == (1.0, 0.0, 1.0)
    assert metrics["passed.judged"] == 0.0, "a model of random words says no yes"
    answers = json.loads((outcome.folder / "answers.json").read_text())
    assert [each["question"] for each in answers] == ["What is 7 and 7?"] * 2 + ["What is 8 and 8?"]
    assert all(each["before"] and each["after"] for each in answers)
    assert answers[0]["before"] != answers[0]["after"]
    assert registry.current("bot") == outcome.manifest.digest


@pytest.mark.engine
def test_weights_that_do_not_load_in_the_engine_fail_the_trial_in_one_line(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"intermediate_size": 512}))
    with pytest.raises(TrialFailed, match="the engine does not serve these weights") as failed:
        trial(folder, [Asked("a", [{"role": "user", "content": "hi"}], 4)], tmp_path)
    assert len(str(failed.value).splitlines()) == 1
