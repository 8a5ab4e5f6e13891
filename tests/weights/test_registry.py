from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from app.errors import StartRefused
from app.weights import BrokenWeights, Manifest, Registry, UnknownWeights, digest_files, weights_digest

from .conftest import make_weights, publish, python


def leftovers(registry: Registry, name: str = "bot") -> list[str]:
    return [entry.name for entry in (registry.root / name).iterdir() if entry.name.startswith(".stage-")]


# --- publish, find, list


def test_published_weights_are_found_by_name_and_by_the_digests_first_digits(registry: Registry) -> None:
    digest = publish(registry, "bot")
    registry.point("bot", digest)
    manifest = registry.find("bot")
    assert manifest == registry.find(f"bot@{digest[:8]}") == registry.find(f"bot@{digest}")
    folder = registry.check(manifest)
    assert folder == registry.root / "bot" / digest
    assert weights_digest(digest_files(folder)) == digest == registry.current("bot")
    assert leftovers(registry) == []


def test_a_manifest_keeps_what_the_training_job_tells_it(registry: Registry) -> None:
    with registry.stage("bot") as staged:
        make_weights(staged)
        manifest = registry.publish(
            staged,
            "bot",
            {"kind": "finetune", "data": "ab" * 32},
            software={"trl": "1.16"},
            base="cd" * 32,
            metrics={"loss": 0.43},
            settings={"lr": 5e-4, "lora": {"r": 16}},
        )
    assert registry.find(f"bot@{manifest.digest}") == manifest
    assert manifest.settings == {"lr": 5e-4, "lora": {"r": 16}}


def test_every_row_says_if_it_is_current(registry: Registry) -> None:
    one, two, other = publish(registry, "bot", 1), publish(registry, "bot", 2), publish(registry, "other")
    registry.point("bot", two)
    assert {(row.name, row.digest, row.is_current) for row in registry.list()} == {
        ("bot", one, False),
        ("bot", two, True),
        ("other", other, False),
    }
    assert all(row.size_bytes > 16_384 and row.created > 0 for row in registry.list())


def test_an_empty_or_absent_registry_lists_nothing(registry: Registry) -> None:
    assert registry.list() == ()
    assert not registry.knows("bot")
    assert registry.current("bot") is None


def test_publishing_the_same_again_changes_nothing(registry: Registry) -> None:
    digest = publish(registry, "bot")
    manifest = (registry.root / "bot" / digest / "manifest.json").read_bytes()
    assert publish(registry, "bot") == digest
    assert (registry.root / "bot" / digest / "manifest.json").read_bytes() == manifest
    assert len(registry.list()) == 1
    assert leftovers(registry) == []


def test_publishing_again_repairs_damaged_weights(registry: Registry) -> None:
    digest = publish(registry, "bot")
    (registry.root / "bot" / digest / "model.safetensors").write_bytes(b"")
    assert publish(registry, "bot") == digest
    assert registry.verify("bot", digest) == ()


def test_what_is_published_can_be_read_by_others(registry: Registry) -> None:
    """safetensors writes mode 0600, and the server may be another user than the one who published."""
    with registry.stage("bot") as staged:
        (make_weights(staged) / "model.safetensors").chmod(0o600)
        mode = staged.stat().st_mode & 0o666
        digest = registry.publish(staged, "bot", {}).digest
    for file in (registry.root / "bot" / digest).iterdir():
        assert file.stat().st_mode & 0o777 == mode


def test_a_folder_without_weights_or_with_links_is_not_published(registry: Registry, tmp_path: Path) -> None:
    with registry.stage("bot") as staged, pytest.raises(BrokenWeights, match=r"no \*\.safetensors"):
        registry.publish(staged, "bot", {})
    with registry.stage("bot") as staged:
        make_weights(staged)
        (staged / "vocab.json").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(BrokenWeights, match="is a link"):
            registry.publish(staged, "bot", {})
    assert registry.list() == ()
    assert leftovers(registry) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "/abs", ".hidden", "a b", "x" * 97, "ä", "a\n", "a@b"])
def test_a_name_cannot_leave_the_registry(registry: Registry, name: str) -> None:
    with pytest.raises(UnknownWeights), registry.stage(name):
        pass
    assert not registry.knows(name)
    for digest in ("..", "../../etc", "0" * 63, "A" * 64, "0" * 64 + "\n"):
        with pytest.raises(UnknownWeights):
            registry.path("bot", digest)


def test_what_is_not_there_is_refused_in_one_line(registry: Registry) -> None:
    one, two = publish(registry, "bot", 1), publish(registry, "bot", 2)
    for reference, words in {
        "nobody": "no weights called 'nobody'",
        "bot": "no weights of 'bot' are current",
        "bot@": "4 to 64 hexadecimal digits",
        "bot@zz": "4 to 64 hexadecimal digits",
        "bot@" + "0" * 64: f"there are {', '.join(sorted([one[:12], two[:12]]))}",
    }.items():
        with pytest.raises(UnknownWeights, match=words) as refused:
            registry.find(reference)
        assert "\n" not in str(refused.value)
        assert isinstance(refused.value, StartRefused)


def test_a_prefix_that_two_digests_share_is_ambiguous(registry: Registry) -> None:
    publish(registry, "bot", 1)
    for tail in ("0" * 60, "1" * 60):
        (registry.root / "bot" / f"abcd{tail}").mkdir()
    with pytest.raises(UnknownWeights, match="ambiguous"):
        registry.find("bot@abcd")


# --- damage


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors: holds other content"),
        (lambda folder: os.truncate(folder / "model.safetensors", 99), "model.safetensors: has 99 bytes"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
        (lambda folder: (folder / "added_tokens.json").write_text("{}"), "added_tokens.json: is not in the manifest"),
        (lambda folder: flip(folder / "manifest.json"), "manifest.json: "),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: "),
    ],
    ids=["a flipped byte", "cut", "missing", "extra", "manifest flipped", "manifest gone"],
)
def test_verify_finds(registry: Registry, damage: object, problem: str) -> None:
    digest = publish(registry, "bot")
    assert registry.verify("bot", digest) == ()
    assert callable(damage)
    damage(registry.root / "bot" / digest)
    (found,) = registry.verify("bot", digest)
    assert str(found).startswith(problem)


def test_verify_does_not_mind_a_readme(registry: Registry) -> None:
    digest = publish(registry, "bot")
    (registry.root / "bot" / digest / "README.md").write_text("# Bot")
    assert registry.verify("bot", digest) == ()


def test_verify_finds_a_folder_under_another_digest(registry: Registry) -> None:
    digest = publish(registry, "bot")
    (registry.root / "bot" / digest).rename(registry.root / "bot" / ("0" * 64))
    assert "holds the manifest of" in str(registry.verify("bot", "0" * 64)[0])


def test_the_quick_check_finds_an_edit_of_the_same_length(registry: Registry) -> None:
    digest = publish(registry, "bot")
    file = registry.root / "bot" / digest / "generation_config.json"
    file.write_text(file.read_text().replace("0.7", "0.2"))
    with pytest.raises(BrokenWeights, match=r"generation_config\.json: holds other content"):
        registry.check(registry.find(f"bot@{digest}"))


@pytest.mark.parametrize("name", ["../../etc/passwd.json", "/etc/x.json", "a\\b.json", "a/../../b.json"])
def test_a_manifest_cannot_point_outside_its_folder(registry: Registry, name: str) -> None:
    digest = publish(registry, "bot")
    path = registry.root / "bot" / digest / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    with pytest.raises(BrokenWeights, match="outside its folder"):
        registry.find(f"bot@{digest}")
    assert registry.list() == ()


def test_a_manifest_of_a_newer_schema_is_refused_and_a_new_field_is_not(registry: Registry) -> None:
    digest = publish(registry, "bot")
    path = registry.root / "bot" / digest / "manifest.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps(manifest | {"probes": [1, 2]}))
    assert isinstance(registry.find(f"bot@{digest}"), Manifest)
    path.write_text(json.dumps(manifest | {"schema": 2}))
    with pytest.raises(BrokenWeights, match="schema 2"):
        registry.find(f"bot@{digest}")


# --- the pointer


def test_the_pointer_and_its_history(registry: Registry) -> None:
    one, two = publish(registry, "bot", 1), publish(registry, "bot", 2)
    registry.point("bot", one, why="publish")
    registry.point("bot", two, why="publish")
    registry.point("bot", two, why="again")
    registry.point("bot", one, why="rollback")
    assert registry.current("bot") == one
    assert [(move.digest, move.why) for move in registry.history("bot")] == [
        (one, "publish"),
        (two, "publish"),
        (one, "rollback"),
    ]


def test_the_pointer_never_points_at_what_is_not_there_or_damaged(registry: Registry) -> None:
    one, two = publish(registry, "bot", 1), publish(registry, "bot", 2)
    registry.point("bot", one)
    with pytest.raises(UnknownWeights):
        registry.point("bot", "0" * 64)
    (registry.root / "bot" / two / "config.json").unlink()
    with pytest.raises(BrokenWeights):
        registry.point("bot", two)
    assert registry.current("bot") == one


def test_a_pointer_to_removed_weights_is_said_so(registry: Registry) -> None:
    one, two = publish(registry, "bot", 1), publish(registry, "bot", 2)
    registry.point("bot", one)
    (registry.root / "bot" / one).rename(registry.root / "gone")
    with pytest.raises(BrokenWeights, match="points at"):
        registry.find("bot")
    registry.point("bot", two)
    assert registry.find("bot").digest == two


@pytest.mark.parametrize("content", [b"", b"{", b'{"digest": "../..", "at": 1}', b"\xff"])
def test_a_damaged_pointer_is_refused_and_can_be_set_again(registry: Registry, content: bytes) -> None:
    digest = publish(registry, "bot")
    registry.point("bot", digest)
    (registry.root / "bot" / "current.json").write_bytes(content)
    with pytest.raises(BrokenWeights, match="damaged"):
        registry.find("bot")
    assert [row.is_current for row in registry.list()] == [False]
    registry.point("bot", digest)
    assert registry.find("bot").digest == digest


def test_a_line_torn_by_a_crash_spoils_only_itself(registry: Registry) -> None:
    one, two = publish(registry, "bot", 1), publish(registry, "bot", 2)
    registry.point("bot", one)
    with (registry.root / "bot" / "history.jsonl").open("ab") as file:
        file.write(b'{"digest": "ab')
    registry.point("bot", two)
    assert [move.digest for move in registry.history("bot")] == [one, two]


def test_a_reader_sees_the_old_or_the_new_pointer_never_between(registry: Registry) -> None:
    digests = {publish(registry, "bot", 1), publish(registry, "bot", 2)}
    one, two = digests
    registry.point("bot", one)
    moves, has_seen_enough, is_over = [one], threading.Event(), threading.Event()

    def move() -> None:
        try:
            while len(moves) <= 120 or not has_seen_enough.is_set():
                moves.append(one if moves[-1] == two else two)
                registry.point("bot", moves[-1])
        finally:
            is_over.set()

    mover = threading.Thread(target=move)
    mover.start()
    looks, seen = 0, set()
    try:
        while not is_over.is_set():
            seen.add(registry.find("bot").digest)
            assert sum(row.is_current for row in registry.list()) == 1
            looks += 1
            if looks >= 20 and seen == digests:
                has_seen_enough.set()
    finally:
        has_seen_enough.set()
        mover.join()
    assert seen == digests
    assert [move.digest for move in registry.history("bot")] == moves


def test_a_registry_that_cannot_be_written_still_serves(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only mount: reading takes no lock and writes no file. (Tests may run as root, so modes prove nothing.)"""
    registry.point("bot", publish(registry, "bot"))

    def refuse(path: str, flags: int, *args: object, **kwargs: object) -> int:
        assert not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), path
        return real(path, flags, *args, **kwargs)  # type: ignore[arg-type]

    real = os.open
    monkeypatch.setattr(os, "open", refuse)
    before = sorted((str(path), path.stat().st_mtime_ns) for path in registry.root.rglob("*"))
    manifest = registry.find("bot")
    registry.check(manifest)
    assert registry.verify("bot", manifest.digest) == ()
    assert registry.list()
    assert sorted((str(path), path.stat().st_mtime_ns) for path in registry.root.rglob("*")) == before


# --- kill -9, and two at once

_DIE_AT = """
import os, signal, sys
from pathlib import Path
from app.weights import Registry
import app.weights.registry as module
from conftest import make_weights

root, step, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)

def before(name):
    setattr(module, name, die)

def after(name):
    real = getattr(module, name)
    def then_die(*args, **kwargs):
        real(*args, **kwargs)
        die()
    setattr(module, name, then_die)

registry = Registry(Path(root))
with registry.stage("bot") as staged:
    make_weights(staged, seed)
    if step == "filled": die()
    if step == "hashed": before("_share")
    if step == "synced": after("sync_tree")
    if step == "manifest written": after("write_whole")
    if step == "renamed": before("sync")
    digest = registry.publish(staged, "bot", {}).digest
if step == "published": die()
if step == "pointing": before("write_whole")
if step == "pointed": before("append_line")
if step == "told": after("append_line")
registry.point("bot", digest)
"""
_VISIBLE = ("renamed", "published", "pointing", "pointed", "told")
_CURRENT = ("pointed", "told")


@pytest.mark.parametrize("step", ["filled", "hashed", "synced", "manifest written", *_VISIBLE])
def test_kill_9_leaves_a_consistent_registry(registry: Registry, step: str) -> None:
    """Before the rename nothing is seen; after it everything is. The next to work sweeps and completes."""
    old = publish(registry, "bot", 1)
    registry.point("bot", old)
    process = python(_DIE_AT, str(registry.root), step, "2")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, stderr

    listed = {row.digest for row in registry.list()}
    assert len(listed) == (2 if step in _VISIBLE else 1)
    assert all(registry.verify("bot", digest) == () for digest in listed)
    assert (registry.find("bot").digest == old) is (step not in _CURRENT)

    new = publish(registry, "bot", 2)
    registry.point("bot", new)
    assert leftovers(registry) == []
    assert registry.find("bot").digest == new
    assert registry.verify("bot", new) == ()
    assert [move.digest for move in registry.history("bot")] == [old, new]


_PUBLISH = """
import sys
from pathlib import Path
from app.weights import Registry
from conftest import publish
registry = Registry(Path(sys.argv[1]))
for seed in map(int, sys.argv[2].split(",")):
    registry.point("bot", publish(registry, "bot", seed))
"""


def test_many_processes_publish_and_point_at_once(registry: Registry) -> None:
    """Some the same weights, some others: each digest is there once, and the pointer agrees with its history."""
    processes = [
        python(_PUBLISH, str(registry.root), seeds) for seeds in ("1,2,3,4,5", "1,2,3,4,5", "5,4,3,2,1", "6,1,7")
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    rows = registry.list()
    assert len(rows) == 7
    assert sum(row.is_current for row in rows) == 1
    assert all(registry.verify("bot", row.digest) == () for row in rows)
    assert registry.history("bot")[-1].digest == registry.current("bot")
    assert leftovers(registry) == []


def test_work_under_way_is_neither_listed_nor_swept(registry: Registry) -> None:
    with registry.stage("bot") as staged:
        make_weights(staged)
        os.utime(staged, (1, 1))  # as old as it may be
        publish(registry, "bot", 2)
        assert staged.is_dir()
        assert len(registry.list()) == 1
        registry.publish(staged, "bot", {})
    assert len(registry.list()) == 2


def test_a_folder_without_a_lock_is_swept_after_an_hour(registry: Registry) -> None:
    home = registry.root / "bot"
    for name, age_s in (("old", 3700), ("new", 3500)):
        (home / f".stage-{name}").mkdir(parents=True)
        then = home.stat().st_mtime - age_s
        os.utime(home / f".stage-{name}", (then, then))
    publish(registry, "bot")
    assert leftovers(registry) == [".stage-new"]
