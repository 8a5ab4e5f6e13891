"""From what the operator names to `Weights`: a registry name, a folder of Hugging Face weights, or a hub id.

This is on the start-up path: published weights are looked at, not hashed, and nothing heavy is imported for them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.domain import Weights
from app.errors import StartRefused
from app.weights.digest import (
    DigestMemo,
    canonical_sha256,
    digest_file,
    digest_files,
    files_that_matter,
    weights_digest,
)
from app.weights.registry import Registry

Report = Callable[[str], None]

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# What `files_that_matter` would count, so that nothing else is downloaded: no pickles, no GGUF, no second format.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "tokenizer*", "vocab*", "merges.txt"]
_HUB_NOT = ["onnx/*", "openvino/*", "original/*", "*.onnx*", "checkpoint-*"]
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Hashing is announced from here on: below a second nobody asks what is going on.
_WORTH_A_LINE_BYTES = 1_000_000_000


def resolve(
    model: str, registry: Registry, memo: DigestMemo, engine_settings: Mapping[str, str], report: Report
) -> Weights:
    """Find the weights called `model`; raises `StartRefused` with one line that says what is wrong or missing.

    A registry name wins over a folder of that name, unless `model` is spelled as a path (`./name`, `a/b`).
    `engine_settings` is all that the engine is told about the weights, as text; it becomes `settings_digest`.
    """
    try:
        return _resolve(model, registry, memo, engine_settings, report)
    except OSError as exc:
        raise StartRefused(f"{model!r} cannot be read: {exc}") from exc


def _resolve(
    model: str, registry: Registry, memo: DigestMemo, engine_settings: Mapping[str, str], report: Report
) -> Weights:
    if not _is_path(model) and registry.knows(model.partition("@")[0]):
        manifest = registry.find(model)
        folder = registry.check(manifest)
        if manifest.kind == "adapter":
            raise StartRefused(f"{manifest.short} is a LoRA adapter: serve its base, and name it in REFRAIN_ADAPTERS")
        name, digest, created, said = manifest.name, manifest.digest, manifest.created, manifest.fingerprint
    else:
        folder, name = _folder_of(model, registry, report)
        require_weights(folder)
        digest, created, said = _digest(folder, memo, report), int((folder / "config.json").stat().st_mtime), {}
    return Weights(
        name=name,
        path=str(folder),
        digest=digest,
        settings_digest=_settings_digest(engine_settings),
        sampling_defaults=sampling_defaults(folder, engine_settings),
        created=created,
        max_model_len=max_model_len(folder),
        fingerprint=said,
    )


def resolve_adapter(name: str, registry: Registry, base: Weights) -> Weights:
    """The published adapter called `name` (or `name@digest`), as a model of its own beside its base.

    Raises `StartRefused`: there is none, it is no adapter, or one of other weights than `base`.
    """
    manifest = registry.find(name)
    if manifest.kind != "adapter":
        raise StartRefused(f"{manifest.short} is no LoRA adapter but a model of its own")
    if manifest.base != base.digest:
        raise StartRefused(f"{manifest.short} is an adapter of {str(manifest.base)[:12]}, and {base.short} is served")
    return replace(
        base,
        name=manifest.name,
        path=str(registry.check(manifest)),
        digest=manifest.digest,
        settings_digest=canonical_sha256({"settings": base.settings_digest, "base": base.digest}),
        created=manifest.created,
        fingerprint=manifest.fingerprint,
        base=base.digest,
    )


def _is_path(model: str) -> bool:
    return model.startswith((".", "~")) or "/" in model or os.sep in model


def is_registry_name(model: str) -> bool:
    """Whether `model` could be `name` or `name@digest` in a registry; no folder's path and no hub id is."""
    return not _is_path(model)


def config_folder(model: str, registry: Registry, report: Report) -> tuple[Path, str]:
    """A folder that holds at least the `config.json` of `model`, and its name; from the hub nothing else is fetched.

    Raises StartRefused.
    """
    if not _is_path(model) and registry.knows(model.partition("@")[0]):
        manifest = registry.find(model)
        return registry.check(manifest), manifest.name
    return _folder_of(model, registry, report, files=["config.json"])


def _folder_of(model: str, registry: Registry, report: Report, files: list[str] = _HUB_FILES) -> tuple[Path, str]:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve(), folder.resolve().name
    hub = _HUB_ID.fullmatch(model)
    if hub and not model.startswith((".", "~")):
        return _snapshot(hub["repo"], hub["revision"], report, files), model
    if _is_path(model):
        raise StartRefused(f"{model!r}: there is no such folder")
    known = ", ".join(sorted({row.name for row in registry.list()})) or "none yet"
    raise StartRefused(
        f"{model!r} is neither published in {registry.root} (there: {known}), nor a folder, nor a hub id (org/name)"
    )


def _snapshot(repo: str, revision: str | None, report: Report, files: list[str]) -> Path:
    """The files, from the hub or its cache here; `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE` mean what they always do."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as exc:
        raise StartRefused(f"{repo!r} looks like a hub id, and huggingface_hub is not installed") from exc
    if not sys.stderr.isatty():
        disable_progress_bars()
    report(f"fetching {repo} from the hub (what is already here is not fetched again)")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files, ignore_patterns=_HUB_NOT))
    except Exception as exc:  # the hub's own errors, httpx's, OS errors: for the operator all of them are one thing
        why = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        raise StartRefused(
            f"{repo!r} is no folder here and could not be fetched from the hub ({type(exc).__name__}: {why})"
        ) from exc


def require_weights(folder: Path) -> None:
    """Refuse a folder that the engine could not, or should not, load: `StartRefused` says what is missing."""
    there = {entry.name for entry in folder.iterdir()}
    tensors = [name for name in files_that_matter(folder) if name.endswith(".safetensors")]
    if "adapter_config.json" in there and "config.json" not in there:
        raise StartRefused(f"{folder} is a LoRA adapter, not a model: merge it into its base")
    if not tensors:
        if any(name.endswith(_PICKLED) for name in there):
            raise StartRefused(f"{folder} holds pickled weights only, and unpickling runs code: save it as safetensors")
        if any(name.endswith(".gguf") for name in there):
            raise StartRefused(f"{folder} holds GGUF only: convert it to safetensors")
        raise StartRefused(f"{folder} holds no *.safetensors: it is not a folder of weights")
    if "config.json" not in there:
        raise StartRefused(f"{folder} holds no config.json: it is not a folder of Hugging Face weights")
    if missing := _shards(folder) - set(tensors):
        raise StartRefused(f"{folder} is incomplete: {min(missing)} and {len(missing) - 1} more are missing")


def _shards(folder: Path) -> set[str]:
    index = _json_object(folder / "model.safetensors.index.json") or {}
    shards = index.get("weight_map")
    return {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()


def _digest(folder: Path, memo: DigestMemo, report: Report) -> str:
    size = sum((folder / name).stat().st_size for name in files_that_matter(folder))
    if size >= _WORTH_A_LINE_BYTES:
        report(f"computing the digest of {folder} ({size / 1e9:.1f} GB; unchanged files are remembered)")
    return weights_digest(digest_files(folder, memo=memo))


def _settings_digest(engine_settings: Mapping[str, str]) -> str:
    """A generation config taken from elsewhere is no part of the weights, so its content counts here."""
    settings = dict(engine_settings)
    if elsewhere := _elsewhere(engine_settings):
        settings["generation_config.json"] = digest_file(elsewhere / "generation_config.json").sha256
    return canonical_sha256(settings)


def _elsewhere(engine_settings: Mapping[str, str]) -> Path | None:
    source = engine_settings.get("generation_config") or "auto"
    if source in {"auto", "vllm"}:
        return None
    if not (Path(source) / "generation_config.json").is_file():
        raise StartRefused(
            f"generation_config: {source!r} is neither auto, vllm nor a folder with generation_config.json"
        )
    return Path(source)


# The keys, in vLLM 0.32's `ModelConfig.get_diff_sampling_param`.
_SAMPLING = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_new_tokens",
)
# transformers 5.19 takes these from a model's config too; from there it drops the others on loading.
_FROM_MODEL_CONFIG = ("min_p", "max_new_tokens")


def sampling_defaults(folder: Path, engine_settings: Mapping[str, str]) -> dict[str, float]:
    """What vLLM 0.32 samples with where a call says nothing: its `get_diff_sampling_param`, without importing it.

    `engine_settings` may hold `generation_config` (`auto`, `vllm`, or a folder) and `override_generation_config` (a
    JSON object), as vLLM spells them. An engine test compares this function with vLLM's own.
    """
    values: dict[str, Any] = {}
    if engine_settings.get("generation_config") != "vllm":
        place = _elsewhere(engine_settings) or folder
        given = _json_object(place / "generation_config.json")
        values = _from_model_config(place) if given is None else given
    values |= _override(engine_settings.get("override_generation_config"))
    return {
        "max_tokens" if key == "max_new_tokens" else key: values[key]
        for key in _SAMPLING
        if isinstance(values.get(key), int | float)
    }


def _from_model_config(folder: Path) -> dict[str, Any]:
    """No generation config: transformers makes one of the model's config (old models kept such values there)."""
    config = _json_object(folder / "config.json") or {}
    nested = (config[key] for key in ("decoder", "generator", "text_config") if isinstance(config.get(key), dict))
    inner: dict[str, Any] = next(nested, {})
    return {key: inner.get(key) if config.get(key) is None else config[key] for key in _FROM_MODEL_CONFIG}


def _override(text: str | None) -> dict[str, Any]:
    if not text:
        return {}
    try:
        override = json.loads(text)
    except ValueError as exc:
        raise StartRefused(f"override_generation_config is not JSON: {exc}") from exc
    if not isinstance(override, dict):
        raise StartRefused("override_generation_config must be a JSON object")
    return override


def max_model_len(folder: Path) -> int | None:
    """The context length where the config says it plainly; None where vLLM must work it out (scaled RoPE, nesting)."""
    config = _json_object(folder / "config.json") or {}
    length = config.get("max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    is_scaled = isinstance(rope, dict) and (rope.get("rope_type") or rope.get("type") or "default") != "default"
    if not isinstance(length, int) or is_scaled:
        return None
    tokenizer_length = (_json_object(folder / "tokenizer_config.json") or {}).get("model_max_length")
    return min(length, int(tokenizer_length)) if isinstance(tokenizer_length, int | float) else length


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
