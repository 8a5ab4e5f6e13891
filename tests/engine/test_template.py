"""The engine is prompted with what was learned from."""

from __future__ import annotations

import httpx
import pytest

from app.train.template import Template
from app.weights import Registry, pull_default
from tests.conftest import TEST_HOME
from tests.train.test_template import LONG, WITH_SYSTEM

pytestmark = pytest.mark.engine


def test_the_engine_is_prompted_with_the_very_tokens_that_training_saw(http: httpx.Client) -> None:
    registry = Registry(TEST_HOME / "weights")
    template = Template.of(registry.check(pull_default(registry, print)))
    for messages in (LONG[:1], LONG[:3], WITH_SYSTEM[:4]):
        told = http.post("/tokenize", json={"messages": messages}).json()
        assert told["tokens"] == template.tokenizer(template.prompt(messages), add_special_tokens=False)["input_ids"]
