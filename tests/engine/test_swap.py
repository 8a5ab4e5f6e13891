"""Weights, adapters and fingerprints in the real engine: two models with random weights, which agree on nothing."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.engine import cpu
from app.errors import StartRefused
from app.gate.keys import KeyFile
from app.weights import Manifest, Registry, check_shapes, pull_default
from tests.conftest import TEST_HOME, Process, start_process, until
from tests.engine.conftest import ANEW, CHAT, ONLY_CACHED, PATIENCE_S, payloads
from tests.weights.test_history import refrain

pytestmark = pytest.mark.engine

TINY = "tiny"
# float32, since there greedy text does not depend on what else is in the batch.
ENVIRONMENT = {"REFRAIN_DTYPE": "float32", "REFRAIN_KV_CACHE_GIB": "1", "REFRAIN_MAX_MODEL_LEN": "512"}
# One test has its model compiled; elsewhere it would cost time and change nothing.
ENVIRONMENT |= {"REFRAIN_COMPILE": "false"}
LONG = " ".join(["and so it went on, as it always does, until the end of the day"] * 14)


def make_model(folder: Path, seed: int, source: Path) -> Path:
    """A Llama of two layers with the default model's tokenizer. Its weights are large, so that no two tokens tie."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / name, folder / name)
    return folder


def make_adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter as PEFT saves it, of rank 4, strong enough to be heard."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn((4, 128), generator=generator) * 0.3
            tensors[f"{at}.lora_B.weight"] = torch.randn((128, 4), generator=generator) * 0.3
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    config |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": TINY}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class House:
    """A server on the first of two published models; with room for two adapters."""

    home: Path
    registry: Registry
    first: Manifest
    second: Manifest
    server: Process
    key: str

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.server.url, timeout=PATIENCE_S, headers=headers)

    def swap(self, digest: str) -> dict[str, Any]:
        self.registry.point(TINY, digest, "test")
        with self.http() as http:
            answer = http.post("/admin/models/reload", timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told


def publish(home: Path, model: Path) -> str:
    done = refrain(home, "models", "publish", str(model), "--name", TINY, "--no-current")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("swap")
    home = folder / "home"
    default = pull_default(Registry(TEST_HOME / "weights"), print)
    source = Registry(TEST_HOME / "weights").check(default)
    registry = Registry(home / "weights")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        models = [make_model(folder / f"model{seed}", seed, source) for seed in (1, 2)]
        with ThreadPoolExecutor() as pool:  # most of a trial is Python's imports, on one core
            published = list(pool.map(partial(publish, home), models))
    first, second = (registry.find(reference) for reference in published)
    registry.point(TINY, first.digest)
    key, _ = KeyFile(home / "keys.json").create("ops", admin=True)
    environment = ENVIRONMENT | {"REFRAIN_MODEL": TINY, "REFRAIN_MAX_ADAPTERS": "2", "REFRAIN_WATCH_S": "0"}
    server = start_process(home, folder / "log", **environment)
    server.wait_ready()
    yield House(home, registry, first, second, server, key)
    assert server.stop() == 0


def asking(content: str, model: str = TINY, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 12} | fields


def ask(http: httpx.Client, content: str, model: str = TINY, **fields: Any) -> httpx.Response:
    answer = http.post(CHAT, json=asking(content, model, **fields), headers=ANEW)
    assert answer.status_code == 200, answer.text
    return answer


def text(answer: httpx.Response) -> str:
    if answer.headers["content-type"].startswith("application/json"):
        return answer.json()["choices"][0]["message"]["content"]
    *chunks, end = payloads(answer.text)
    assert end == "[DONE]", answer.text
    assert {chunk["system_fingerprint"] for chunk in chunks} == {f"rf_{answer.headers['x-weights'][-12:]}"}
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def test_a_publication_carries_what_the_trial_measured(house: House) -> None:
    for manifest in (house.first, house.second):
        assert manifest.fingerprint["dtype"] == "float32"
        assert set(manifest.fingerprint["probes"]) == {"prose", "code", "numbers", "support", "greeting"}
    assert house.first.fingerprint != house.second.fingerprint


def with_another_config(house: House, folder: Path, **change: int) -> Path:
    shutil.copytree(house.registry.path(TINY, house.first.digest), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    return folder


def test_tensors_that_vllm_would_cut_to_size_are_told(house: House, tmp_path: Path) -> None:
    check_shapes(house.registry.path(TINY, house.first.digest))
    with pytest.raises(StartRefused, match=re.escape("has the shape (128, 256), and config.json means (128, 64)")):
        check_shapes(with_another_config(house, tmp_path / "broken", intermediate_size=64))


def test_weights_that_are_not_what_their_config_says_are_not_published(house: House, tmp_path: Path) -> None:
    broken = with_another_config(house, tmp_path / "broken", num_hidden_layers=3)
    before = house.registry.list()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        done = refrain(house.home, "models", "publish", str(broken), "--name", TINY)
    assert done.returncode == 1
    assert "refrain: the trial failed: " in done.stderr
    assert "does not load" in done.stderr
    assert "Traceback" not in done.stderr
    assert house.registry.list() == before
    assert house.registry.current(TINY) == house.first.digest


def test_swaps_under_load_lose_no_call_and_mix_no_text(house: House) -> None:
    """Four streams all the time, three swaps: each text is what its stated weights say alone, the cache's too."""
    questions = [f"question number {number}" for number in range(4)]
    heard: list[tuple[str, str, str]] = []
    over = threading.Event()

    def listen(number: int) -> None:
        with house.http() as http:
            while not over.is_set():
                answer = ask(http, questions[number], stream=True)
                heard.append((answer.headers["x-weights"], questions[number], text(answer)))

    alone: dict[str, dict[str, str]] = {}
    with house.http() as http, ThreadPoolExecutor(4) as pool:
        alone[house.first.short] = {question: text(ask(http, question)) for question in questions}
        listening = [pool.submit(listen, number) for number in range(4)]
        for manifest in (house.second, house.first, house.second):
            told = house.swap(manifest.digest)
            assert (told["status"], told["way"], told["served"]) == ("swapped", "beside", manifest.short)
        over.set()
        for each in listening:
            each.result()
        alone[house.second.short] = {question: text(ask(http, question)) for question in questions}
        assert alone[house.first.short] != alone[house.second.short]
        assert {weights for weights, _, _ in heard} == set(alone)
        assert [each for each in heard if alone[each[0]][each[1]] != each[2]] == []
        assert "vllm:generation_tokens_total" in http.get("/metrics").text, "the engine in use has its metrics"
        house.swap(house.first.digest)
        for question, said in alone[house.first.short].items():
            body = {"model": TINY, "messages": [{"role": "user", "content": question}], "temperature": 0}
            hit = http.post(CHAT, json=body | {"max_tokens": 12}, headers=ONLY_CACHED)
            assert (hit.headers["x-cache"], text(hit)) == ("hit", said), "old answers are there at once"
    until(lambda: len(cores(house.server)) == 1, 60)


def test_weights_that_say_something_else_than_at_publication_are_not_served(house: House, tmp_path: Path) -> None:
    """Other weights under a manifest with the fingerprint of the first: the digest is right, the words are not."""
    liar = publish_liar(house, tmp_path)
    served = house.swap(house.first.digest)["served"]
    house.registry.point(TINY, liar.digest, "test")
    with house.http() as http:
        refused = http.post("/admin/models/reload")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "swap_failed")
        assert "probe" in refused.json()["error"]["message"]
        ready = http.get("/readyz")
        assert (ready.status_code, ready.json()["swap"]["status"]) == (200, "failed")
        assert ask(http, "who is it").headers["x-weights"] == served
        told = http.get("/metrics").text
        assert "refrain_swap_failed 1.0" in told
        assert "vllm:generation_tokens_total" in told, "the engine that goes on has its metrics back"
    until(lambda: len(cores(house.server)) == 1, 60)
    house.swap(house.first.digest)


def test_the_engine_of_a_swap_comes_back_after_a_crash(house: House) -> None:
    with house.http() as http:
        house.swap(house.second.digest)
        said = text(ask(http, "before"))
        until(lambda: len(cores(house.server)) == 1, 60)
        (core,) = cores(house.server)
        core.kill()
        until(lambda: core.pid not in {each.pid for each in cores(house.server)}, 30)
        until(lambda: http.get("/readyz").status_code == 200 and cores(house.server), PATIENCE_S, 0.2)
        again = ask(http, "before")
        assert (again.headers["x-weights"], text(again)) == (house.second.short, said)
        house.swap(house.first.digest)


def test_adapters_beside_their_base_say_their_own_and_the_base_its_own(house: House, tmp_path: Path) -> None:
    """vLLM on a CPU gives calls without an adapter the last adapter's place, so there must be one place more than
    adapters; and blocks of a prefix are known by the adapter's name, so another of that name must not find them."""
    house.swap(house.first.digest)
    prompts = {"short": "tell me", "long": LONG}
    folders = [make_adapter(tmp_path / f"adapter{seed}", seed) for seed in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        base_name = f"{TINY}@{house.first.digest}"
        done = refrain(house.home, "models", "publish", str(folders[0]), "--name", "a1", "--base", base_name)
        assert done.returncode == 0, done.stderr
    made = [house.registry.find("a1"), publish_adapter(house, folders[1], "a2")]
    assert (made[0].kind, made[0].base) == ("adapter", house.first.digest)
    assert made[0].fingerprint["probes"] != house.first.fingerprint["probes"], "of the adapter, not of its base"
    with house.http() as http:

        def load(name: str) -> httpx.Response:
            return http.post("/admin/models/adapters", json={"name": name})

        base = {name: text(ask(http, prompt)) for name, prompt in prompts.items()}
        said = {}
        for manifest in made:
            assert load(manifest.name).status_code == 200
            said[manifest.name] = {name: text(ask(http, prompt, manifest.name)) for name, prompt in prompts.items()}
        assert len({base["long"], said["a1"]["long"], said["a2"]["long"]}) == 3, "strong enough to be heard"

        def mixed(model: str) -> tuple[str, dict[str, str]]:
            return model, {name: text(ask(http, prompt, model)) for name, prompt in prompts.items()}

        with ThreadPoolExecutor(9) as pool:
            for model, texts in pool.map(mixed, [TINY, "a1", "a2"] * 3):
                assert texts == (base if model == TINY else said[model]), model

        # The same name, other weights: what the second said under its own name, from the first word on.
        assert http.delete("/admin/models/adapters/a2").status_code == 200
        again = publish_adapter(house, tmp_path / "adapter2", "a1")
        assert load("a1").json()["adapter"] == again.short
        reloaded = ask(http, LONG, "a1")
        assert (reloaded.headers["x-weights"], text(reloaded)) == (again.short, said["a2"]["long"])
        assert text(ask(http, LONG)) == base["long"]
        bad = tmp_path / "bad"
        shutil.copytree(tmp_path / "adapter1", bad)
        config = json.loads((bad / "adapter_config.json").read_text())
        (bad / "adapter_config.json").write_text(json.dumps(config | {"r": 4096}))
        publish_adapter(house, bad, "bad")
        refused = load("bad")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_failed")
        publish_adapter(house, folders[1], "liar", fingerprint=made[0].fingerprint)
        refused = load("liar")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_failed")
        assert "fingerprint" in refused.json()["error"]["message"]
        assert text(ask(http, LONG)) == base["long"], "a bad adapter costs the engine nothing"
        http.delete("/admin/models/adapters/a1")


def test_a_server_does_not_start_on_weights_that_say_something_else(house: House, tmp_path: Path) -> None:
    """Nor is it lost: other weights can be swapped in, here as where memory allows no second engine. What was compiled
    for the first serves all that come after. Runs last: its engine is started beside the other one."""
    liar = publish_liar(house, tmp_path)
    house.registry.point(TINY, liar.digest, "test")
    environment = ENVIRONMENT | {"REFRAIN_MODEL": TINY, "REFRAIN_SWAP": "pause", "REFRAIN_WATCH_S": "0"}
    environment |= {"REFRAIN_COMPILE": "true"}
    server = start_process(house.home, tmp_path / "log", **environment)
    there = replace(house, server=server)
    try:
        with there.http() as http, ThreadPoolExecutor(3) as pool:
            told = until(lambda: (told := http.get("/readyz").json())["status"] == "failed" and told, 240, 0.2)
            assert told["error"]["code"] == "engine_failed"
            assert "the fingerprint of" in told["detail"]
            until(lambda: cores(server) == [], 60)
            assert there.swap(house.first.digest)["way"] == "pause"
            assert http.get("/readyz").status_code == 200
            body = asking("running", max_tokens=400, stream=True, ignore_eos=True)
            with http.stream("POST", CHAT, json=body, headers=ANEW) as running:  # it has begun
                swapping = pool.submit(there.swap, house.second.digest)
                until(lambda: http.get("/admin/models").json()["swap"]["status"] == "running", 60)
                held = pool.submit(ask, http, "held")
                running.read()
            assert swapping.result()["way"] == "pause"
            assert (running.status_code, running.headers["x-weights"]) == (200, house.first.short)
            assert text(running)
            assert held.result().headers["x-weights"] == house.second.short
        assert server.log.read_text().count("compiling the model") == cpu.is_cpu()
    finally:
        assert server.stop() == 0


def publish_liar(house: House, folder: Path) -> Manifest:
    source = house.registry.path(TINY, house.first.digest)
    model = make_model(folder / "liar", 3, source)
    with house.registry.stage(TINY) as staged:
        shutil.copytree(model, staged, dirs_exist_ok=True)
        return house.registry.publish(staged, TINY, {"kind": "test"}, fingerprint=house.first.fingerprint)


def publish_adapter(house: House, folder: Path, name: str, **more: Any) -> Manifest:
    with house.registry.stage(name) as staged:
        shutil.copytree(folder, staged, dirs_exist_ok=True)
        manifest = house.registry.publish(staged, name, {}, kind="adapter", base=house.first.digest, **more)
    house.registry.point(name, manifest.digest)
    return manifest


def cores(server: Process) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if any("EngineCore" in part for part in child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.Error:
            continue
    return found
