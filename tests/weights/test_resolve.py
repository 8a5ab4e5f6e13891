from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from app.domain import Weights
from app.errors import StartRefused
from app.weights import DigestMemo, FileDigest, Registry, digest_files, resolve, sampling_defaults, weights_digest
from app.weights import registry as registry_module
from app.weights.digest import Progress

from .conftest import make_weights, publish, python


def resolved(model: str, registry: Registry, **settings: str) -> Weights:
    return resolve(model, registry, DigestMemo(registry.root.parent / "digests.json"), settings, lambda step: None)


def refusal(model: str, registry: Registry, **settings: str) -> str:
    with pytest.raises(StartRefused) as refused:
        resolved(model, registry, **settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_published_name_is_resolved_from_its_manifest(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = publish(registry, "bot")
    registry.point("bot", digest)
    read = list[Path]()
    real = registry_module.digest_file

    def spy(path: Path, progress: Progress | None = None) -> FileDigest:
        read.append(path)
        return real(path, progress)

    monkeypatch.setattr(registry_module, "digest_file", spy)
    for model in ("bot", f"bot@{digest[:6]}"):
        weights = resolved(model, registry, dtype="bfloat16")
        assert (weights.name, weights.digest, weights.short) == ("bot", digest, f"bot@{digest[:12]}")
        assert Path(weights.path) == registry.root / "bot" / digest
        assert weights.sampling_defaults == {"temperature": 0.7, "top_k": 20, "max_tokens": 99}
        assert weights.max_model_len == 2048
        assert weights.created > 0
    monkeypatch.setattr(registry_module, "_SMALL_BYTES", 0)
    read.clear()
    resolved("bot", registry)
    assert read == [], "no large file is hashed on the start-up path"


def test_damage_is_refused_at_the_start(registry: Registry) -> None:
    digest = publish(registry, "bot")
    registry.point("bot", digest)
    os.truncate(registry.root / "bot" / digest / "model.safetensors", 10)
    assert "is damaged: model.safetensors: has 10 bytes" in refusal("bot", registry)


def test_a_file_that_cannot_be_read_is_one_line(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.point("bot", publish(registry, "bot"))

    def refuse(path: Path, progress: Progress | None = None) -> FileDigest:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(registry_module, "digest_file", refuse)
    assert "'bot' cannot be read: [Errno 13] Permission denied" in refusal("bot", registry)


def test_a_folder_is_resolved_by_its_content(registry: Registry, tmp_path: Path) -> None:
    folder = make_weights(tmp_path / "mine")
    weights = resolved(str(folder), registry)
    assert (weights.name, weights.path) == ("mine", str(folder))
    assert weights.digest == weights_digest(digest_files(folder))
    (folder / "chat_template.jinja").write_text("{{ other }}")
    assert resolved(str(folder), registry).digest != weights.digest


def test_a_name_wins_over_a_folder_unless_it_is_spelled_as_a_path(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = publish(registry, "bot")
    registry.point("bot", digest)
    here = make_weights(tmp_path / "cwd" / "bot", seed=9)
    make_weights(tmp_path / "cwd" / "other", seed=9)
    monkeypatch.chdir(here.parent)
    assert resolved("bot", registry).digest == digest
    for spelled in ("./bot", "../cwd/bot", str(here)):
        assert resolved(spelled, registry).path == str(here)
    assert resolved("other", registry).path == str(here.parent / "other")


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ([], "holds no *.safetensors"),
        (["config.json"], "holds no *.safetensors"),
        (["model.safetensors"], "holds no config.json"),
        (["config.json", "pytorch_model.bin"], "pickled weights only"),
        (["config.json", "x.gguf"], "GGUF only"),
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter"),
    ],
)
def test_a_folder_that_is_not_hf_weights_is_refused(
    registry: Registry, tmp_path: Path, there: list[str], words: str
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in there:
        (folder / name).write_text("{}")
    assert words in refusal(str(folder), registry)


def test_a_missing_shard_is_refused(registry: Registry, tmp_path: Path) -> None:
    folder = make_weights(tmp_path / "w")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is incomplete: model-2.safetensors" in refusal(str(folder), registry)


def test_what_is_nowhere_is_refused(registry: Registry) -> None:
    publish(registry, "bot")
    assert "(there: bot)" in refusal("typo", registry)
    assert "no such folder" in refusal("./typo", registry)
    assert "no such folder" in refusal("/no/such/folder", registry)


@pytest.mark.parametrize("model", ["refrain-test/does-not-exist", "refrain-test/does-not-exist@v1.0"])
def test_a_hub_id_without_a_network_is_one_line(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    words = refusal(model, registry)
    assert words.startswith("'refrain-test/does-not-exist' is no folder here and could not be fetched from the hub")


def test_a_snapshot_in_the_hubs_cache_is_served_offline(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--tuned"
    commit = "c" * 40
    real = make_weights(tmp_path / "plain")
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, file in enumerate(real.iterdir()):
        blob = repo / "blobs" / f"{number}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    weights = resolved("org/tuned", registry)
    assert (weights.name, weights.path) == ("org/tuned", str(snapshot))
    assert weights.digest == weights_digest(digest_files(real))


def test_settings_have_a_digest_of_their_own(registry: Registry, tmp_path: Path) -> None:
    registry.point("bot", publish(registry, "bot"))
    one = resolved("bot", registry, dtype="bfloat16", vllm="0.32.0").settings_digest
    assert one == resolved("bot", registry, vllm="0.32.0", dtype="bfloat16").settings_digest
    assert one != resolved("bot", registry, vllm="0.32.0", dtype="float32").settings_digest


def test_a_generation_config_from_elsewhere_counts_by_its_content(registry: Registry, tmp_path: Path) -> None:
    registry.point("bot", publish(registry, "bot"))
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.1}')
    one = resolved("bot", registry, generation_config=str(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.2}')
    two = resolved("bot", registry, generation_config=str(tmp_path))
    assert (one.sampling_defaults, two.sampling_defaults) == ({"temperature": 0.1}, {"temperature": 0.2})
    assert one.settings_digest != two.settings_digest
    assert "neither auto, vllm nor a folder" in refusal("bot", registry, generation_config="/no/where")


@pytest.mark.parametrize(
    ("generation_config", "settings", "expected"),
    [
        ({"temperature": 0.7, "max_new_tokens": 9, "eos_token_id": 2}, {}, {"temperature": 0.7, "max_tokens": 9}),
        ({"temperature": 1.0}, {}, {"temperature": 1.0}),
        ({"temperature": 0.7}, {"generation_config": "vllm"}, {}),
        ({"temperature": 0.7}, {"override_generation_config": '{"top_k": 5}'}, {"temperature": 0.7, "top_k": 5}),
        ({"temperature": 0.7}, {"override_generation_config": '{"temperature": null}'}, {}),
        ({}, {}, {}),
    ],
)
def test_sampling_defaults(
    tmp_path: Path, generation_config: dict[str, object], settings: dict[str, str], expected: dict[str, float]
) -> None:
    """The cases that a table can hold; `test_pull.py` compares with vLLM itself."""
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert sampling_defaults(tmp_path, settings) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"text_config": {"max_position_embeddings": 4096}}, None),
        ({}, None),
    ],
)
def test_the_context_length_is_stated_only_where_it_is_plain(
    registry: Registry, tmp_path: Path, config: dict[str, object], expected: int | None
) -> None:
    folder = make_weights(tmp_path / "w")
    (folder / "config.json").write_text(json.dumps(config))
    assert resolved(str(folder), registry).max_model_len == expected


_LIGHT = """
import sys
from pathlib import Path
import app.weights
registry = app.weights.Registry(Path(sys.argv[1]))
app.weights.resolve("bot", registry, app.weights.DigestMemo(Path(sys.argv[1]) / "memo.json"), {}, print)
heavy = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "vllm", "filelock", "asyncio", "pydantic"}
print(*sorted(heavy & sys.modules.keys()))
"""


def test_starting_from_published_weights_imports_nothing_heavy(registry: Registry) -> None:
    registry.point("bot", publish(registry, "bot"))
    process = python(_LIGHT, str(registry.root))
    stdout, stderr = process.communicate(timeout=60)
    assert (stdout.strip(), stderr) == ("", "")
