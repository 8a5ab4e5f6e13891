"""Rolling back, and taking away what nobody needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.domain import Weights
from app.errors import StartRefused
from app.weights import BrokenWeights, InUse, Registry, UnknownWeights, resolve_adapter

from .conftest import make_weights, publish, python


@pytest.fixture
def abc(registry: Registry) -> tuple[str, str, str]:
    """Three publications, one after the other."""
    digests = tuple(publish(registry, "bot", seed) for seed in (1, 2, 3))
    for digest in digests:
        registry.point("bot", digest, "publish")
    return digests  # type: ignore[return-value]


def test_rolling_back_again_goes_further_back(registry: Registry, abc: tuple[str, str, str]) -> None:
    a, b, c = abc
    assert registry.rollback("bot").digest == b
    assert registry.rollback("bot").digest == a
    with pytest.raises(UnknownWeights, match="nothing was current before"):
        registry.rollback("bot")
    assert registry.current("bot") == a
    assert registry.rollback("bot", to=c).digest == c, "forward again, by name"
    assert registry.rollback("bot").digest == a


def test_what_is_published_after_a_rollback_is_taken_back_to_where_it_led(
    registry: Registry, abc: tuple[str, str, str]
) -> None:
    a, _, _ = abc
    registry.rollback("bot")
    registry.rollback("bot")
    d = publish(registry, "bot", 4)
    registry.point("bot", d, "publish")
    assert registry.rollback("bot").digest == a


def test_a_rollback_passes_over_what_was_removed(registry: Registry, abc: tuple[str, str, str]) -> None:
    a, b, _ = abc
    registry.remove("bot", b)
    assert registry.rollback("bot").digest == a


def test_a_rollback_to_what_is_damaged_or_unknown_moves_nothing(registry: Registry, abc: tuple[str, str, str]) -> None:
    _, b, c = abc
    (registry.path("bot", b) / "config.json").write_text("{}")
    with pytest.raises(BrokenWeights):
        registry.rollback("bot")
    for bad in ("f" * 64, "nonsense"):
        with pytest.raises(UnknownWeights):
            registry.rollback("bot", to=bad)
    with pytest.raises(UnknownWeights):
        registry.rollback("nobody")
    assert registry.current("bot") == c


def test_only_what_nobody_needs_is_unused(registry: Registry, abc: tuple[str, str, str]) -> None:
    a, b, c = abc
    d, never = publish(registry, "bot", 4), publish(registry, "bot", 9)
    registry.point("bot", d)

    def unused(keep: int, *in_use: str, age: float = 0) -> set[str]:
        return {row.digest for row in registry.unused("bot", keep, frozenset(in_use), younger_than_s=age)}

    assert unused(9) == {never}
    assert unused(2) == {a, b, never}, "the current one and the one before stay"
    assert unused(0) == {a, b, c, never}, "the current one stays whatever is asked"
    assert unused(0, b) == {a, c, never}
    assert unused(0, age=3600) == set(), "its publisher may be about to make it current"
    with registry.stage("polite") as staged:
        make_weights(staged, 7)
        registry.publish(staged, "polite", {}, kind="adapter", base=a)
    assert unused(0) == {b, c, never}, "an adapter needs its base"
    registry.remove("bot", never)
    assert [row.digest for row in registry.list() if row.digest == never] == []
    with pytest.raises(BrokenWeights, match="is current and stays"):
        registry.remove("bot", d)
    assert registry.verify("bot", d) == ()


def test_what_a_running_server_serves_is_in_use_until_it_is_gone(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from app.weights import InUse
InUse(Path(sys.argv[1])).tell(["a" * 64])
print("told", flush=True)
time.sleep(60)
"""
    process = python(script, str(tmp_path))
    assert process.stdout
    assert process.stdout.readline() == "told\n"
    own = InUse(tmp_path)
    own.tell(["b" * 64])
    assert own.digests() == {"a" * 64, "b" * 64}
    process.kill()
    process.wait()
    assert own.digests() == {"b" * 64}, "a killed server uses nothing"
    (named,) = {file.stem for file in tmp_path.iterdir()}
    assert named.startswith(f"{os.getpid()}-")
    own.end()
    assert own.digests() == frozenset()
    assert list(tmp_path.iterdir()) == []


def test_servers_with_the_same_number_do_not_end_for_each_other(tmp_path: Path) -> None:
    """As in containers that share a volume: each is number 1 there."""
    one, other = InUse(tmp_path), InUse(tmp_path)
    one.tell(["a" * 64])
    other.tell(["b" * 64])
    assert one.digests() == {"a" * 64, "b" * 64}
    other.end()
    assert InUse(tmp_path).digests() == {"a" * 64}


def test_an_adapter_is_found_for_its_base_alone(registry: Registry) -> None:
    a = publish(registry, "bot", 1)
    with registry.stage("polite") as staged:
        make_weights(staged, 5)
        adapter = registry.publish(staged, "polite", {}, kind="adapter", base=a)
    registry.point("polite", adapter.digest)
    base = Weights("bot", "", a, "b" * 64, {}, dtype="float32")
    found = resolve_adapter("polite", registry, base)
    assert (found.name, found.digest, found.base, found.dtype) == ("polite", adapter.digest, a, "float32")
    assert found.settings_digest != base.settings_digest, "its answers depend on its base too"
    with pytest.raises(StartRefused, match="is an adapter of"):
        resolve_adapter("polite", registry, Weights("bot", "", "c" * 64, "b" * 64, {}))
    with pytest.raises(StartRefused, match="no LoRA adapter"):
        resolve_adapter(f"bot@{a}", registry, base)
    with registry.stage("polite") as staged:
        make_weights(staged, 6)
        with pytest.raises(BrokenWeights, match="of which weights"):
            registry.publish(staged, "polite", {}, kind="adapter")


# --- the commands


def refrain(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"REFRAIN_HOME": str(home)},
        timeout=300,  # publishing loads an engine
    )


def test_the_commands_show_roll_back_and_clean_up(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "weights")
    a, b = publish(registry, "bot", 1), publish(registry, "bot", 2)
    for digest in (a, b):
        registry.point("bot", digest, "publish")
    shown = refrain(tmp_path, "models", "show", "bot").stdout
    assert b in shown
    assert "(publish)" in shown
    told = json.loads(refrain(tmp_path, "models", "show", f"bot@{a[:8]}", "--json").stdout)
    assert (told["digest"], told["is_current"], told["kind"]) == (a, False, "model")
    assert refrain(tmp_path, "models", "rollback", "bot").stdout.strip() == f"bot@{a[:12]} is current"
    assert registry.current("bot") == a
    refused = refrain(tmp_path, "models", "rollback", "bot")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert refrain(tmp_path, "models", "rollback", "bot", "--to", b[:8]).returncode == 0
    assert refrain(tmp_path, "models", "gc", "--keep", "1").stdout.strip() == "nothing to remove"
    dry = refrain(tmp_path, "models", "gc", "bot", "--keep", "1", "--min-age-s", "0", "--dry-run").stdout
    assert dry.startswith(f"would remove bot@{a[:12]}")
    assert len(registry.list()) == 2
    assert refrain(tmp_path, "models", "gc", "--keep", "1", "--min-age-s", "0").stdout.startswith("removed bot@")
    assert [row.digest for row in registry.list()] == [b]
    assert refrain(tmp_path, "models", "verify", "bot").returncode == 0
    tensors = registry.path("bot", b) / "model.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    broken = refrain(tmp_path, "models", "verify", "bot")
    assert (broken.returncode, "other content" in broken.stderr) == (1, True)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("nothing", None, "is no folder"),
        ("empty", {}, "holds no *.safetensors"),
        ("pickled", {"pytorch_model.bin": "x", "config.json": "{}"}, "unpickling runs code"),
    ],
)
def test_what_is_no_folder_of_weights_is_refused_before_anything_is_copied(
    tmp_path: Path, name: str, content: dict[str, str] | None, part: str
) -> None:
    folder = tmp_path / name
    if content is not None:
        folder.mkdir()
        for file, text in content.items():
            (folder / file).write_text(text)
    done = refrain(tmp_path, "models", "publish", str(folder), "--name", "bot")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert part in done.stderr
    assert Registry(tmp_path / "weights").list() == ()
