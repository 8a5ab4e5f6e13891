from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from app.weights import DigestMemo, digest_files, files_that_matter, weights_digest
from app.weights import digest as digest_module

from .conftest import make_weights


def digest(folder: Path) -> str:
    return weights_digest(digest_files(folder))


def test_the_digest_is_of_content_alone(tmp_path: Path) -> None:
    """Order of writing, times, modes and the folder's name do not count."""
    one, two = make_weights(tmp_path / "one"), tmp_path / "two"
    two.mkdir()
    for file in sorted(one.iterdir(), reverse=True):
        (two / file.name).write_bytes(file.read_bytes())
        os.utime(two / file.name, (1, 1))
        (two / file.name).chmod(0o600)
    assert digest(one) == digest(two)


def test_the_digest_is_pinned(tmp_path: Path) -> None:
    """A change of the scheme would turn every recording cold: it must be meant."""
    (tmp_path / "config.json").write_text("{}")
    canonical = b'{"config.json":"44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}'  # SHA-256 of {}
    assert digest(tmp_path) == hashlib.sha256(canonical).hexdigest()


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"],
)
def test_any_change_of_a_file_that_matters_changes_the_digest(tmp_path: Path, name: str) -> None:
    folder = make_weights(tmp_path / "w")
    before = digest(folder)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    changed = digest(folder)
    (folder / name).unlink()
    assert len({before, changed, digest(folder)}) == 3


MATTER = [
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "spiece.model",
    "qwen.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_templates/rag.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "params.json",
    "tekken.json",
    "adapter_config.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "modules.json",
    "1_Pooling/config.json",
]
DO_NOT = [
    "README.md",
    ".gitattributes",
    ".hidden.json",
    "manifest.json",
    "pytorch_model.bin",
    "model.pt",
    "model.gguf",
    "modeling_x.py",
    "training_args.bin",
    "trainer_state.json",
    "loss.png",
    "original/params.json",
    "onnx/model.onnx",
    "checkpoint-5/model.safetensors",
]


@pytest.mark.parametrize(("name", "matters"), [(name, True) for name in MATTER] + [(name, False) for name in DO_NOT])
def test_which_files_matter(tmp_path: Path, name: str, matters: bool) -> None:
    folder = make_weights(tmp_path / "w")
    before = digest(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert (name in files_that_matter(folder)) is matters
    assert (digest(folder) != before) is matters


def test_links_are_followed_as_the_hubs_cache_needs(tmp_path: Path) -> None:
    real, linked = make_weights(tmp_path / "blobs"), tmp_path / "snapshot"
    linked.mkdir()
    for number, file in enumerate(real.iterdir()):
        blob = file.rename(real / f"{number}")
        (linked / file.name).symlink_to(blob)
    assert digest(linked) == digest(make_weights(tmp_path / "plain"))


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    folder, seen = make_weights(tmp_path / "w"), list[int]()
    files = digest_files(folder, progress=seen.append)
    assert sum(seen) == sum(file.size for file in files.values())


# --- the memo


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights that were written a while ago (ctime cannot be set, so the memo's patience is)."""
    monkeypatch.setattr(DigestMemo, "RACY_S", -1)
    return make_weights(tmp_path / "w")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are really read."""
    names, real = list[str](), digest_module.digest_file

    def spy(path: Path, progress: digest_module.Progress | None = None) -> digest_module.FileDigest:
        names.append(Path(path).name)
        return real(path, progress)

    monkeypatch.setattr(digest_module, "digest_file", spy)
    return names


def test_a_remembered_file_is_not_read_again(settled: Path, tmp_path: Path, hashed: list[str]) -> None:
    first = digest_files(settled, memo=DigestMemo(tmp_path / "memo.json"))
    assert sorted(hashed) == files_that_matter(settled)
    hashed.clear()
    seen = list[int]()
    assert digest_files(settled, memo=DigestMemo(tmp_path / "memo.json"), progress=seen.append) == first
    assert hashed == []
    assert sum(seen) == sum(file.size for file in first.values())


def test_a_changed_file_is_read_again_even_with_its_size_and_mtime_kept(
    settled: Path, tmp_path: Path, hashed: list[str]
) -> None:
    before = digest_files(settled, memo=DigestMemo(tmp_path / "memo.json"))
    hashed.clear()
    file = settled / "config.json"
    stat = file.stat()
    time.sleep(0.02)  # longer than the clock's grain: this is about ctime
    file.write_bytes(file.read_bytes().replace(b"2048", b"4096"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = digest_files(settled, memo=DigestMemo(tmp_path / "memo.json"))
    assert hashed == ["config.json"]
    assert weights_digest(after) != weights_digest(before)


def test_a_file_written_just_now_is_not_remembered(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again within the grain of the clock and keep its times."""
    assert DigestMemo.RACY_S > 0
    monkeypatch.setattr(DigestMemo, "RACY_S", 600.0)  # "just now", however long this machine takes
    folder, memo = make_weights(tmp_path / "w"), DigestMemo(tmp_path / "memo.json")
    digest_files(folder, memo=memo)
    hashed.clear()
    digest_files(folder, memo=memo)
    assert sorted(hashed) == files_that_matter(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"/x": [1, 2]}', b'{"/x": [1, 2, 3, 4, "no"]}', b"\xff" * 9])
def test_a_broken_memo_is_an_empty_one(settled: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "memo.json").write_bytes(content)
    assert digest_files(settled, memo=DigestMemo(tmp_path / "memo.json")) == digest_files(settled)
    assert len(json.loads((tmp_path / "memo.json").read_bytes())) == len(files_that_matter(settled))


def test_the_memo_is_bounded_and_forgets_the_oldest(settled: Path, tmp_path: Path) -> None:
    digest_files(settled, memo=DigestMemo(tmp_path / "memo.json", bound=3))
    kept = [Path(path).name for path in json.loads((tmp_path / "memo.json").read_bytes())]
    assert kept == files_that_matter(settled)[-3:]


def test_a_memo_that_cannot_be_written_is_no_failure(settled: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert digest_files(settled, memo=DigestMemo(tmp_path / "file" / "memo.json")) == digest_files(settled)
