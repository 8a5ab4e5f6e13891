"""Whether a second engine fits beside the first, by arithmetic alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from app import main
from app.engine import Room, cpu, room_for
from app.settings import Settings
from tests.conftest import WEIGHTS

GIB = 2**30


def test_an_engine_needs_its_weights_its_kv_cache_and_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(3 * GIB)
    settings = Settings(home=tmp_path, kv_cache_gib=2)
    weights = replace(WEIGHTS, path=str(tmp_path), dtype="bfloat16")
    assert room_for(settings, weights).needed == (3 + 2 + 1) * GIB
    assert room_for(settings, replace(weights, dtype="float32")).needed == (6 + 2 + 1) * GIB
    assert 0 < room_for(settings, weights).available <= psutil.virtual_memory().total


def test_on_a_gpu_the_share_of_its_memory_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "distribution", lambda: ("vllm", "0"))
    assert not room_for(Settings(home=tmp_path), WEIGHTS).is_enough
    assert room_for(Settings(home=tmp_path, gpu_memory_utilization=0.45), WEIGHTS).is_enough


def test_what_does_not_fit_is_swapped_in_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "room_for", lambda *_: Room(2 * GIB, GIB))
    fits, why = main.swap_sources(Settings(home=tmp_path)).fits(WEIGHTS)
    assert (fits, why) == (False, "2.0 GiB needed, 1.0 available")
    assert main.swap_sources(Settings(home=tmp_path, swap="beside")).fits(WEIGHTS)[0]
