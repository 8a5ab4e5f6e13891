"""Weights in an object store: an S3 server on a real socket, and a shared folder."""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from app import __main__ as command_line
from app.errors import StartRefused
from app.main import find_adapter, find_weights
from app.settings import load
from app.train import job as jobs
from app.train.config import Job
from app.weights import (
    DEFAULT_MODEL,
    BrokenWeights,
    Manifest,
    Registry,
    Store,
    UnknownWeights,
    exchange,
    pull_weights,
    push_weights,
)
from tests.conftest import make_settings

from .conftest import ROOT, make_weights

SECRET = "a-secret-that-nobody-may-read"
# What Python tells of before it happens; each is a moment at which the kernel may take the process.
STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree"}
PIECE, PIECES = 6000, 4  # in bytes, and of all that `published` publishes

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class S3:
    """The server, as a test sees it."""

    def __init__(self, address: str) -> None:
        self.address = address

    def _post(self, path: str) -> bytes:
        return httpx.post(f"{self.address}/-/{path}", timeout=60).content

    def kill_at(self, request: int) -> None:
        """This process, when its `request`-th request from now on has arrived and before it is done."""
        self._post(f"kill/{os.getpid()}/{request}")

    def refuse(self) -> None:
        self._post("refuse")

    def done(self, method: str = "", part: str = "") -> list[tuple[str, str, str]]:
        """What was done since the last look, by method and a part of the path. Nobody is killed or refused any more."""
        asked = [tuple(each) for each in json.loads(self._post("log"))]
        return [each for each in asked if each[0].startswith(method) and part in each[1]]


@pytest.fixture(scope="module")
def s3_process() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.weights.s3_server"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    yield process.stdout.readline().strip()
    process.kill()
    process.communicate()


@pytest.fixture
def s3(s3_process: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_process)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    server = S3(s3_process)
    server.done()
    client().create_bucket(Bucket="weights")
    server.done()
    return server


@pytest.fixture
def s3_url(s3: S3) -> str:
    return f"s3://weights/{secrets.token_hex(4)}"


@pytest.fixture(params=["s3", "folder"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3_url")) if request.param == "s3" else f"file://{tmp_path / 'store'}"


@pytest.fixture(autouse=True)
def _small_pieces_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(exchange, "_PIECES_AHEAD", 1)


def client() -> Any:
    import boto3

    return boto3.client("s3")


class Objects:
    """What lies in the store, under its back."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._folder = Path(parts.path) if parts.scheme == "file" else None
        self._prefix = parts.path.lstrip("/")

    def read(self, path: str) -> bytes:
        if self._folder:
            return (self._folder / path).read_bytes()
        return bytes(client().get_object(Bucket="weights", Key=f"{self._prefix}/{path}")["Body"].read())

    def write(self, path: str, content: bytes) -> None:
        if self._folder:
            (self._folder / path).write_bytes(content)
        else:
            client().put_object(Bucket="weights", Key=f"{self._prefix}/{path}", Body=content)

    def remove(self, path: str) -> None:
        if self._folder:
            (self._folder / path).unlink()
        else:
            client().delete_object(Bucket="weights", Key=f"{self._prefix}/{path}")


def quiet(line: str) -> None:
    assert "\n" not in line


def published(registry: Registry, seed: int = 0, name: str = "bot") -> Manifest:
    """Two files that no other seed has: `model.safetensors` in three pieces, and a small one."""
    with registry.stage(name) as staged:
        make_weights(staged, seed)
        for file in set(staged.iterdir()) - {staged / "model.safetensors"}:
            file.unlink()
        (staged / "config.json").write_text(json.dumps({"max_position_embeddings": 2048, "seed": seed}))
        facts: dict[str, Any] = {"software": {"torch": "2"}, "metrics": {"loss": 0.5}, "settings": {"rank": 8}}
        facts |= {"base": "b" * 64, "fingerprint": {"schema": 1, "probes": {}}}
        manifest = registry.publish(staged, name, {"kind": "test", "seed": seed}, **facts)
    registry.point(name, manifest.digest)
    return manifest


def pushed(registry: Registry, url: str, seed: int = 0) -> Manifest:
    published(registry, seed)
    return push_weights("bot", registry, Store(url), quiet)


def other(tmp_path: Path) -> Registry:
    """Another machine's."""
    return Registry(tmp_path / f"elsewhere-{secrets.token_hex(4)}" / "weights")


def start(work: Callable[[], Any]) -> int:
    """Do it in a child."""
    if child := os.fork():
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def has_lived(child: int) -> bool:
    """Whether it came to its end; False if it was killed."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return not os.WIFSIGNALED(status)


def lives(work: Callable[[], Any]) -> bool:
    return has_lived(start(work))


def dying_at(step: int, root: Path, work: Callable[[], Any]) -> Callable[[], None]:
    """`work`, killed before its `step`-th deed on the files below `root`."""

    def run() -> None:
        done = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if event in STEPS and arguments and str(arguments[0]).startswith(str(root)):
                done += 1
                if done == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        work()

    return run


def is_valid(registry: Registry) -> bool:
    there = {row.digest for row in registry.list()}
    return registry.current("bot") in there and all(registry.verify("bot", digest) == () for digest in there)


# --- there and back


def test_what_is_pushed_is_pulled_whole_by_its_digest(registry: Registry, url: str, tmp_path: Path) -> None:
    sent = pushed(registry, url)
    elsewhere, told = other(tmp_path), list[tuple[int, int]]()
    got = pull_weights("bot", elsewhere, Store(url), quiet, lambda done, total: told.append((done, total)))
    facts = ("name", "digest", "files", "source", "software", "base", "metrics", "settings", "kind", "fingerprint")
    assert [getattr(got, name) for name in facts] == [getattr(sent, name) for name in facts]
    assert elsewhere.verify("bot", sent.digest) == ()
    assert elsewhere.current("bot") == sent.digest
    assert told[-1] == (sent.size_bytes, sent.size_bytes)
    assert told == sorted(told)
    assert {entry.name for entry in (elsewhere.root / "bot").iterdir() if entry.is_dir()} == {sent.digest}


def test_a_digest_can_be_named_and_no_pointer_moved(registry: Registry, url: str, tmp_path: Path) -> None:
    first, second = pushed(registry, url, 1), pushed(registry, url, 2)
    elsewhere = other(tmp_path)
    assert (
        pull_weights(f"bot@{first.digest[:8]}", elsewhere, Store(url), quiet, make_current=False).digest == first.digest
    )
    assert elsewhere.current("bot") is None
    assert pull_weights("bot", elsewhere, Store(url), quiet).digest == second.digest
    push_weights(f"bot@{first.digest}", registry, Store(url), quiet, make_current=False)
    assert Store(url).find("bot").digest == second.digest
    registry.rollback("bot")
    push_weights("bot", registry, Store(url), quiet)
    assert pull_weights("bot", elsewhere, Store(url), quiet).digest == first.digest
    assert elsewhere.current("bot") == first.digest


def test_nothing_is_sent_or_fetched_twice(registry: Registry, s3: S3, s3_url: str, tmp_path: Path) -> None:
    first = pushed(registry, s3_url, 1)
    assert len(s3.done("PUT", "/files/")) == 2
    pushed(registry, s3_url, 1)
    assert s3.done("PUT") == []
    with registry.stage("bot") as staged:  # a version that has the larger file in common with the first
        shutil.copytree(registry.path("bot", first.digest), staged, dirs_exist_ok=True)
        (staged / "config.json").write_text("{}")
        second = registry.publish(staged, "bot", {})
    push_weights(f"bot@{second.digest}", registry, Store(s3_url), quiet)
    (put,) = s3.done("PUT", "/files/")
    assert put[1].endswith(second.files["config.json"].sha256)
    elsewhere = other(tmp_path)
    pull_weights("bot", elsewhere, Store(s3_url), quiet)
    assert len(s3.done("GET", "/files/")) == PIECES
    pull_weights("bot", elsewhere, Store(s3_url), quiet)
    assert s3.done("GET", "/files/") == []


def test_of_two_pulls_at_once_one_fetches(registry: Registry, s3: S3, s3_url: str, tmp_path: Path) -> None:
    """Replicas that start together on one shared volume."""
    pushed(registry, s3_url)
    s3.done()
    elsewhere = other(tmp_path)
    began, go_on = os.pipe(), os.pipe()

    def first(line: str) -> None:
        if line.startswith("pulling"):
            os.write(began[1], b".")
            os.read(go_on[0], 1)

    def second(line: str) -> None:
        os.write(go_on[1], b".")  # it waits, or is at work itself
        assert not line.startswith("pulling")

    one = start(lambda: pull_weights("bot", elsewhere, Store(s3_url), first))
    os.read(began[0], 1)
    two = start(lambda: pull_weights("bot", elsewhere, Store(s3_url), second))
    assert has_lived(two)
    assert has_lived(one)
    assert len(s3.done("GET", "/files/")) == PIECES
    assert is_valid(elsewhere)
    for end in (*began, *go_on):
        os.close(end)


# --- kill -9


def test_a_push_killed_at_any_request_leaves_the_store_whole_and_the_next_one_goes_on(
    registry: Registry, s3: S3, s3_url: str, tmp_path: Path
) -> None:
    served, step, seen = None, 0, set()
    while True:
        step += 1
        wanted = published(registry, step)
        s3.done()

        def push(step: int = step) -> None:
            s3.kill_at(step)
            push_weights("bot", registry, Store(s3_url), quiet)

        is_done = lives(push)
        sent = s3.done("PUT", "/files/")
        seen.add((len(sent), current(s3_url) == wanted.digest))
        assert current(s3_url) in {served, wanted.digest}
        pull_what_is_visible(s3_url, wanted, tmp_path)
        if is_done:
            break
        s3.done()
        push_weights("bot", registry, Store(s3_url), quiet)
        assert not set(sent) & set(s3.done("PUT", "/files/")), f"step {step}: sent twice"
        assert current(s3_url) == wanted.digest
        served = wanted.digest
    assert seen == {(0, False), (1, False), (2, False), (2, True)}


def pull_what_is_visible(url: str, wanted: Manifest, tmp_path: Path) -> None:
    """What the name stands for, and the version that was being pushed: each is whole, or not there."""
    elsewhere = other(tmp_path)
    for reference in ("bot", f"bot@{wanted.digest}"):
        try:
            Store(url).find(reference)
        except UnknownWeights:
            continue
        pull_weights(reference, elsewhere, Store(url), quiet)
        assert is_valid(elsewhere)


def current(url: str) -> str | None:
    try:
        return Store(url).find("bot").digest
    except UnknownWeights:
        return None


def test_a_push_into_a_folder_killed_before_any_step_leaves_it_whole(registry: Registry, tmp_path: Path) -> None:
    """Where a file is seen while it is written, it is written beside and renamed."""
    root = tmp_path / "store"
    url = f"file://{root}"
    served, step = pushed(registry, url).digest, 0
    while True:
        step += 1
        wanted = published(registry, step)
        push = dying_at(step, root, lambda: push_weights("bot", registry, Store(url), quiet))
        is_done = lives(push)
        for file in (root / "files").iterdir():
            assert file.suffix == ".part" or file.stat().st_size in {file.size for file in all_files(registry)}
        assert current(url) in {served, wanted.digest}, f"step {step}"
        pull_what_is_visible(url, wanted, tmp_path)
        if is_done:
            break
        served = push_weights("bot", registry, Store(url), quiet).digest
        assert Store(url).find("bot").digest == served == wanted.digest
    assert step > 12, "the steps were seen"
    parts = list((root / "files").glob("*.part"))
    assert parts
    for part in parts:
        os.utime(part, (1, 1))
    pushed(registry, url, 999)
    assert not list((root / "files").glob("*.part"))


def all_files(registry: Registry) -> list[Any]:
    return [file for row in registry.list() for file in registry.find(f"bot@{row.digest}").files.values()]


def test_a_pull_killed_at_any_request_goes_on_where_it_was(
    registry: Registry, s3: S3, s3_url: str, tmp_path: Path
) -> None:
    old, new = published(registry, 1), pushed(registry, s3_url, 2)
    step, fetched = 0, set()
    while True:
        step += 1
        elsewhere = other(tmp_path)
        published(elsewhere, 1)
        s3.done()

        def pull(step: int = step, elsewhere: Registry = elsewhere) -> None:
            s3.kill_at(step)
            pull_weights("bot", elsewhere, Store(s3_url), quiet)

        is_done = lives(pull)
        first = s3.done("GET", "/files/")
        assert is_valid(elsewhere)
        if is_done:
            assert elsewhere.current("bot") == new.digest
            break
        assert elsewhere.current("bot") == old.digest, "what is served stays"
        pull_weights("bot", elsewhere, Store(s3_url), quiet)
        second = s3.done("GET", "/files/")
        assert len(first) + len(second) == len({*first, *second}) == PIECES, f"step {step}: a piece was fetched twice"
        assert elsewhere.current("bot") == new.digest
        assert is_valid(elsewhere)
        fetched.add(len(first))
    assert fetched == set(range(PIECES)), "killed between any two pieces"


def test_a_pull_killed_before_any_step_on_the_disk_leaves_the_registry_whole(
    registry: Registry, tmp_path: Path
) -> None:
    url = f"file://{tmp_path / 'store'}"
    new = pushed(registry, url, 2)
    step, outcomes = 0, set()
    while True:
        step += 1
        elsewhere = other(tmp_path)
        old = published(elsewhere, 1)
        pull = dying_at(step, elsewhere.root, lambda: pull_weights("bot", elsewhere, Store(url), quiet))  # noqa: B023
        is_done = lives(pull)
        assert is_valid(elsewhere), f"step {step}"
        outcomes.add((len(elsewhere.list()), elsewhere.current("bot") == new.digest))
        if is_done:
            break
        assert elsewhere.current("bot") in {old.digest, new.digest}
        pull_weights("bot", elsewhere, Store(url), quiet)
        assert elsewhere.current("bot") == new.digest
        assert is_valid(elsewhere)
        assert not [entry for entry in (elsewhere.root / "bot").iterdir() if entry.name.startswith(".pulled-")]
    assert step > 20, "the steps were seen"
    assert outcomes >= {(1, False), (2, False), (2, True)}


# --- what lies there is not what it should be


def test_a_corrupt_object_is_never_served_and_can_be_mended(registry: Registry, url: str, tmp_path: Path) -> None:
    sent, objects = pushed(registry, url), Objects(url)
    path = f"files/{sent.files['model.safetensors'].sha256}"
    content = bytearray(objects.read(path))
    content[len(content) // 2] ^= 1
    objects.write(path, bytes(content))
    elsewhere = other(tmp_path)
    for _ in range(2):  # and again, from what the first left
        with pytest.raises(BrokenWeights, match=r"is damaged: its SHA-256 is another; not used .*--resend"):
            pull_weights("bot", elsewhere, Store(url), quiet)
        assert elsewhere.list() == ()
        assert elsewhere.current("bot") is None
    push_weights("bot", registry, Store(url), quiet)
    assert objects.read(path) == content, "of the right size: taken for whole"
    push_weights("bot", registry, Store(url), quiet, resend=True)
    assert pull_weights("bot", elsewhere, Store(url), quiet).digest == sent.digest
    assert is_valid(elsewhere)


def test_a_cut_or_missing_object_is_named_and_the_next_push_mends_it(
    registry: Registry, url: str, tmp_path: Path
) -> None:
    sent, objects, elsewhere = pushed(registry, url), Objects(url), other(tmp_path)
    path = f"files/{sent.files['model.safetensors'].sha256}"
    objects.write(path, objects.read(path)[:-1])
    with pytest.raises(BrokenWeights, match=r"has 16455 bytes, not 16456 in .*: pushing these weights again sends it"):
        pull_weights("bot", elsewhere, Store(url), quiet)
    objects.remove(path)
    with pytest.raises(BrokenWeights, match=r"is missing in .*: pushing these weights again sends it"):
        pull_weights("bot", elsewhere, Store(url), quiet)
    assert elsewhere.list() == ()
    push_weights("bot", registry, Store(url), quiet)
    pull_weights("bot", elsewhere, Store(url), quiet)
    assert is_valid(elsewhere)


def test_what_a_power_cut_tore_is_fetched_anew(registry: Registry, url: str, tmp_path: Path) -> None:
    sent, elsewhere = pushed(registry, url), other(tmp_path)
    torn = elsewhere.root / "bot" / f".pulled-{sent.digest}" / "model.safetensors"
    torn.parent.mkdir(parents=True)
    for content in (b"\0" * 5000, b"\0" * 16456, b"\0" * 99999):
        torn.parent.mkdir(exist_ok=True)
        torn.write_bytes(content)
        pull_weights("bot", elsewhere, Store(url), quiet)
        assert is_valid(elsewhere)
        elsewhere = Registry(elsewhere.root)
        shutil.rmtree(elsewhere.root / "bot" / sent.digest)


def test_a_manifest_that_lies_brings_nothing_in(registry: Registry, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'store'}"
    sent, objects, elsewhere = pushed(registry, url), Objects(url), other(tmp_path)
    path = f"models/bot/{sent.digest}.json"
    honest = json.loads(objects.read(path))

    def refused(told: bytes, why: str) -> None:
        objects.write(path, told)
        with pytest.raises(BrokenWeights, match=why):
            pull_weights("bot", elsewhere, Store(url), quiet)
        assert elsewhere.list() == ()
        assert not (tmp_path / "evil.json").exists()

    refused(b"{", "cannot be read")
    refused(json.dumps(honest | {"name": "cat"}).encode(), "is the manifest of cat@")
    refused(json.dumps(honest | {"files": {}}).encode(), "contradicts itself")
    outside = honest["files"] | {"../../../evil.json": honest["files"]["config.json"]}
    refused(json.dumps(honest | {"files": outside}).encode(), "names a file outside its folder")
    # A file that no engine reads is no part of a digest: what claims one is not what it says.
    from app.weights import FileDigest, weights_digest

    files = {name: FileDigest(**each) for name, each in honest["files"].items()}
    files["pickled.bin"] = files["config.json"]
    digest = weights_digest(files)
    told = honest | {"digest": digest, "files": honest["files"] | {"pickled.bin": honest["files"]["config.json"]}}
    objects.write(f"models/bot/{digest}.json", json.dumps(told).encode())
    with pytest.raises(BrokenWeights, match="not published"):
        pull_weights(f"bot@{digest}", elsewhere, Store(url), quiet)
    assert elsewhere.list() == ()


def test_damaged_weights_are_not_pushed(registry: Registry, tmp_path: Path) -> None:
    manifest = published(registry)
    model = registry.path("bot", manifest.digest) / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    with pytest.raises(BrokenWeights, match=r"is damaged: model\.safetensors: holds other content"):
        push_weights("bot", registry, Store(f"file://{tmp_path / 'store'}"), quiet)
    assert not (tmp_path / "store").exists()


def test_damaged_weights_here_are_mended_by_a_pull(registry: Registry, url: str) -> None:
    sent = pushed(registry, url)
    (registry.path("bot", sent.digest) / "model.safetensors").unlink()
    pull_weights("bot", registry, Store(url), quiet)
    assert is_valid(registry)


# --- no room


def test_without_room_nothing_is_fetched(
    registry: Registry, s3: S3, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(registry, s3_url)
    s3.done()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StartRefused, match=r"has 0 MB free; bot@\w+ needs 1 MB more"):
        pull_weights("bot", other(tmp_path), Store(s3_url), quiet)
    assert s3.done("GET", "/files/") == []


def test_a_disk_that_fills_up_is_one_line_and_what_came_is_kept(
    registry: Registry, s3: S3, s3_url: str, tmp_path: Path
) -> None:
    """A limit on the size of a file stands for the full disk: both come from the kernel, at any write."""
    sent, elsewhere = pushed(registry, s3_url), other(tmp_path)
    s3.done()

    def pull() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PIECE, 2 * PIECE))
        with pytest.raises(StartRefused, match=r"cannot take bot@\w+: File too large"):
            pull_weights("bot", elsewhere, Store(s3_url), quiet)

    assert lives(pull)
    half = elsewhere.root / "bot" / f".pulled-{sent.digest}" / "model.safetensors"
    assert half.stat().st_size == 2 * PIECE
    assert elsewhere.list() == ()
    s3.done()
    pull_weights("bot", elsewhere, Store(s3_url), quiet)
    assert len(s3.done("GET", "/files/")) == 1, "the last piece"
    assert is_valid(elsewhere)


# --- the commands

Refrain = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refrain:
    """A command: its exit code, what it printed, and what it said."""
    monkeypatch.setenv("REFRAIN_HOME", str(tmp_path))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refrain", *arguments])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def test_the_commands_push_and_pull(
    refrain: Refrain, registry: Registry, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = published(registry)
    monkeypatch.setenv("REFRAIN_WEIGHTS_STORE", s3_url)
    code, out, err = refrain("models", "push", "bot")
    assert (code, out) == (0, f"bot@{sent.digest} is in {s3_url}\n")
    assert "sending model.safetensors" in err
    elsewhere = other(tmp_path)
    monkeypatch.setenv("REFRAIN_HOME", str(elsewhere.root.parent))
    assert refrain("models", "pull", "bot")[:2] == (0, f"{sent.short} is ready in {elsewhere.root}\n")
    assert is_valid(elsewhere)


def one_line(refrain: Refrain, *arguments: str) -> str:
    code, out, err = refrain(*arguments)
    assert (code, out) == (1, "")
    line = err.splitlines()[-1]
    assert line.startswith("refrain: ")
    assert "Traceback" not in err
    assert SECRET not in err
    return line


def test_what_goes_wrong_is_one_line_without_a_secret(
    refrain: Refrain, registry: Registry, s3: S3, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(registry)
    assert "set REFRAIN_WEIGHTS_STORE" in one_line(refrain, "models", "push", "bot")
    monkeypatch.setenv("REFRAIN_WEIGHTS_STORE", s3_url)
    assert f"no weights called 'cat' in {s3_url}" in one_line(refrain, "models", "pull", "cat")
    assert "cannot be a name" in one_line(refrain, "models", "pull", "../cat")
    push_weights("bot", registry, Store(s3_url), quiet, make_current=False)
    assert "no weights of 'bot' are current" in one_line(refrain, "models", "pull", "bot")
    assert "no weights 'bot@ffff' in" in one_line(refrain, "models", "pull", "bot@ffff")
    monkeypatch.setenv("REFRAIN_WEIGHTS_STORE", "s3://no-such-bucket/x")
    assert "s3://no-such-bucket/x does not answer as it should" in one_line(refrain, "models", "push", "bot")
    monkeypatch.setenv("REFRAIN_WEIGHTS_STORE", "carrier-pigeon://x")
    assert "carrier-pigeon://x is no store" in one_line(refrain, "models", "pull", "bot")
    for url in (f"sftp://me:{SECRET}@host/x", f"s3://key:{SECRET}/+@bucket", f"https://host/x?sig={SECRET}"):
        monkeypatch.setenv("REFRAIN_WEIGHTS_STORE", url)
        assert "it may hold no password" in one_line(refrain, "models", "pull", "bot")
    monkeypatch.setenv("REFRAIN_WEIGHTS_STORE", "relative/path")
    assert "absolute path" in one_line(refrain, "models", "pull", "bot")


def test_a_store_that_is_away_or_that_nobody_let_us_into_is_one_line(
    refrain: Refrain, s3: S3, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    monkeypatch.setenv("REFRAIN_WEIGHTS_STORE", s3_url)
    s3.refuse()
    assert f"{s3_url} refuses: " in one_line(refrain, "models", "pull", "bot")
    s3.done()
    S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert f"{s3_url} does not answer as it should" in one_line(refrain, "models", "pull", "bot")
    S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert f"no credentials for {s3_url}" in one_line(refrain, "models", "pull", "bot")
    S3FileSystem.clear_instance_cache()
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert "pip install 'refrain[s3]'" in one_line(refrain, "models", "pull", "bot")


# --- who else uses it


def test_a_server_pulls_what_it_lacks_and_asks_nobody_afterwards(
    registry: Registry, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pushed(registry, url, 1), pushed(registry, url, 2)
    settings = make_settings(tmp_path / "replica", None, model=f"bot@{first.digest[:12]}", weights_store=url)
    weights = find_weights(settings, quiet)
    assert (weights.name, weights.digest) == ("bot", first.digest)
    replica = Registry(settings.weights_root)
    assert replica.current("bot") is None, "a digest was asked for"
    by_name = make_settings(tmp_path / "replica", None, model="bot", weights_store=url)
    assert find_weights(by_name, quiet).digest == second.digest
    away = make_settings(tmp_path / "replica", None, model="bot", weights_store="file:///nowhere")
    assert find_weights(away, quiet).digest == second.digest
    for model in ("./folder", "org/model", DEFAULT_MODEL):
        find_weights(away.model_copy(update={"model": model}), quiet)
    with pytest.raises(UnknownWeights, match="no weights called 'cat' in file:///nowhere"):
        find_weights(away.model_copy(update={"model": "cat"}), quiet)


def test_an_adapter_is_pulled_too(registry: Registry, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'store'}"
    base = pushed(registry, url)
    with registry.stage("polite") as staged:
        save_file({"lora": np.zeros(4, np.float32)}, staged / "adapter_model.safetensors")
        (staged / "adapter_config.json").write_text("{}")
        adapter = registry.publish(staged, "polite", {}, base=base.digest, kind="adapter")
    push_weights(f"polite@{adapter.digest}", registry, Store(url), quiet)
    settings = make_settings(tmp_path / "replica", None, model="bot", weights_store=url)
    found = find_adapter(settings, "polite", find_weights(settings, quiet))
    assert (found.digest, found.base) == (adapter.digest, base.digest)


def test_a_job_that_cannot_push_says_what_was_published_and_how_to_go_on(registry: Registry, tmp_path: Path) -> None:
    manifest = published(registry)
    job = Job(name="bot", data=tmp_path / "d")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StartRefused, match=rf"{manifest.short} is published here and not in the store: .* \(refrain models push bot@"
    ):
        jobs.send(registry, job, manifest, f"file://{tmp_path / 'file' / 'store'}", quiet)
    url = f"file://{tmp_path / 'store'}"
    jobs.send(registry, job, manifest, url, quiet)
    assert Store(url).find("bot").digest == manifest.digest
    assert load().weights_store is None
