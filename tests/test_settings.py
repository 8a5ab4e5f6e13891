"""Settings: where each value came from, what is masked, and mistakes that are one line with the name in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anthropic
import httpx
import msgspec
import openai
import pytest
from pydantic import SecretStr

from app.cache.link import Link
from app.errors import StartRefused
from app.settings import PREFIX, Settings, handed_down, load, mask_url, masked, origins, to_hand_down
from tests.conftest import REPOSITORY


def refusal(**overrides: Any) -> str:
    with pytest.raises(StartRefused) as refused:
        load(**overrides)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_the_defaults_serve_on_loopback_and_every_setting_says_what_it_does() -> None:
    settings = load()
    assert (settings.host, settings.port, settings.cache) == ("127.0.0.1", 8000, "deterministic")
    assert settings.is_loopback
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert "\n" not in field.description


def test_flags_come_before_variables_before_the_file_before_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Path("refrain.toml").write_text('port = 1111\ncache = "all"\nmodel = "file"\ndtype = "float32"\n')
    monkeypatch.setenv("REFRAIN_PORT", "2222")
    monkeypatch.setenv("REFRAIN_CACHE", "off")
    settings = load(port=3333, host=None)
    assert (settings.port, settings.cache, settings.model, settings.drain_s) == (3333, "off", "file", 30.0)
    told = origins(settings, {"port": 3333, "host": None})
    assert {name: told[name] for name in ("port", "cache", "model", "dtype", "drain_s", "host")} == {
        "port": "flag",
        "cache": "environment",
        "model": "file refrain.toml",
        "dtype": "file refrain.toml",
        "drain_s": "default",
        "host": "default",
    }
    assert set(told) == set(Settings.model_fields)


def test_an_empty_variable_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAIN_PORT", "")
    monkeypatch.setenv("REFRAIN_REDIS_URL", "")
    settings = load()
    assert settings.port == 8000
    assert settings.redis_url is None
    assert origins(settings, {})["port"] == "default"


def test_the_file_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = tmp_path / "conf" / "r.toml"
    named.parent.mkdir()
    named.write_text("max_num_seqs = 7\nengine_args = {block_size = 32}\n")
    Path("refrain.toml").write_text("max_num_seqs = 9\n")
    monkeypatch.setenv("REFRAIN_CONFIG", str(named))
    settings = load()
    assert settings.max_num_seqs == 7
    assert settings.engine_args == {"block_size": 32}
    assert origins(settings, {})["max_num_seqs"] == f"file {named}"


def test_a_named_file_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAIN_CONFIG", "/nowhere/r.toml")
    assert "REFRAIN_CONFIG names /nowhere/r.toml" in refusal()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("port = = 1\n", "cannot be read"),
        ("port = \n", "cannot be read"),
        ('prot = 1\nhost = "127.0.0.1"\n', "did you mean port"),
        ("nothing_like_it_at_all = 1\n", "nothing_like_it_at_all"),
        ('port = "x"\n', "PORT"),
        ("[engine]\nkind = 1\n", "ENGINE"),
        ("\xff\xfe", ""),
    ],
)
def test_a_mistake_in_the_file_is_one_line(text: str, part: str) -> None:
    Path("refrain.toml").write_bytes(text.encode("latin-1"))
    message = refusal()
    assert part in message
    assert "--prot" not in message, "it must not name flags that there are not"


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("REFRAIN_PROT", "REFRAIN_PORT"),
        ("REFRAIN_REDIS_UR", "REFRAIN_REDIS_URL"),
        ("refrain_chace", "REFRAIN_CACHE"),
        ("REFRAIN_MAX_TOKENS_PER_FORTNIGHT_PLEASE", None),
    ],
)
def test_a_variable_that_nobody_reads_is_refused_with_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, name: str, suggested: str | None
) -> None:
    monkeypatch.setenv(name, "1")
    message = refusal()
    assert message.startswith(f"{name} is set but is no setting of ours")
    assert (f"did you mean {suggested}?" in message) if suggested else ("did you mean" not in message)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("CACHE", "sometimes"),
        ("ENGINE", "gpt"),
        ("DRAIN_S", "-1"),
        ("MAX_BODY_BYTES", "10"),
        ("MAX_JSON_DEPTH", "100000"),
        ("GPU_MEMORY_UTILIZATION", "1.5"),
        ("REDIS_MAX_MEMORY_MIB", "1"),
        ("REDIS_NAMESPACE", ""),
        ("ACCESS_LOG", "maybe"),
        ("ENGINE_ARGS", "{"),
        ("ENGINE_ARGS", "[1]"),
        ("LOG_FORMAT", "xml"),
        ("KV_CACHE_GIB", "0"),
    ],
)
def test_a_value_that_does_not_fit_is_one_line_with_the_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    if not value:
        monkeypatch.setenv("REFRAIN_CONFIG", "f.toml")
        Path("f.toml").write_text(f'{name.lower()} = ""\n')
    else:
        monkeypatch.setenv(PREFIX + name, value)
    assert name in refusal().upper()


def test_sentinel_and_cluster_need_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAIN_REDIS_CLUSTER", "true")
    assert "need REFRAIN_REDIS_URL" in refusal()
    monkeypatch.setenv("REFRAIN_REDIS_URL", "redis://h:1/0")
    assert load().redis_cluster


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://user:secret@h:6379/0", "redis://user:***@h:6379/0"),
        ("rediss://:secret@h", "rediss://:***@h"),
        ("redis://user:se@cr@et@h/1", "redis://user:***@h/1"),
        ("unix:///run/r.sock?db=1", "unix:///run/r.sock?db=1"),
        ("unix://user:secret@/run/r.sock", "unix://user:***@/run/r.sock"),
        ("redis://h:6379/0?password=secret&db=2", "redis://h:6379/0?password=***&db=2"),
        ("unix:///run/r.sock?db=1&password=secret", "unix:///run/r.sock?db=1&password=***"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert mask_url(url) == shown


def test_secrets_are_masked_wherever_settings_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAIN_REDIS_URL", "redis://app:hunter2@cache:6379/0")
    settings = load()
    assert isinstance(settings.redis_url, SecretStr)
    assert masked(settings)["redis_url"] == "redis://app:***@cache:6379/0"
    for text in (repr(settings), str(settings), settings.model_dump_json(), json.dumps(masked(settings))):
        assert "hunter2" not in text


def test_a_wrong_redis_url_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAIN_REDIS_URL", "http://app:hunter2@cache:6379/0")
    message = refusal()
    assert "REDIS_URL" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_which_addresses_are_ours_alone(host: str, is_loopback: bool) -> None:
    assert Settings(host=host).is_loopback is is_loopback


@pytest.mark.parametrize(
    "url",
    ["redis://u:hun/ter2@h:1/0", "redis://h:port/0", "redis://h/0?nothing_like_it=1", "redis://h?socket_timeout=x"],
)
def test_a_redis_url_that_cannot_be_used_is_one_line_without_the_password(url: str) -> None:
    """Each of these used to be a traceback, at the start or with the first request."""
    with pytest.raises(StartRefused) as refused:
        Link(Settings(redis_url=url), url)
    assert "REFRAIN_REDIS_URL" in str(refused.value)
    assert "hun" not in str(refused.value)


def test_a_sentinel_address_that_cannot_be_used_is_one_line() -> None:
    settings = Settings(redis_url="redis://h", redis_sentinel="somewhere")
    with pytest.raises(StartRefused, match="REFRAIN_REDIS_SENTINEL"):
        Link(settings, "redis://h")


def test_settings_do_not_change_once_made() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().port = 1


def test_relative_paths_are_made_absolute_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    settings = load(home="data", keys_file="~/k.json")
    assert settings.home == tmp_path / "data"
    assert settings.keys_path == tmp_path / "me" / "k.json"
    assert load(home="data").keys_path == tmp_path / "data" / "keys.json"


def test_nothing_else_reads_our_variables() -> None:
    """One table of settings: no other module looks at the environment for a name of ours."""
    readers = [
        path.relative_to(REPOSITORY).as_posix()
        for path in sorted((REPOSITORY / "app").rglob("*.py"))
        if path.name != "settings.py"
        and any('"REFRAIN_' in line and "environ" in line for line in path.read_text().splitlines())
    ]
    assert readers == []


def test_config_prints_every_setting_with_its_origin(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin", "REFRAIN_HOME": str(tmp_path), "REFRAIN_REDIS_URL": "redis://u:hunter2@h/0"}
    command = [sys.executable, "-m", "app", "config"]
    for options in ([], ["--json"]):
        done = subprocess.run(
            [*command, *options], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "hunter2" not in done.stdout + done.stderr
    shown = json.loads(done.stdout)
    assert set(shown) == set(Settings.model_fields)
    assert shown["redis_url"] == {"value": "redis://u:***@h/0", "origin": "environment"}
    assert shown["home"] == {"value": str(tmp_path), "origin": "environment"}
    assert shown["port"] == {"value": "8000", "origin": "default"}


def test_a_process_of_ours_gets_the_very_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets too, in what goes over the wire between them; whatever the environment says by then."""
    settings = load(port=0, redis_url="redis://u:hunter2@h:1/0", cache_secret="s" * 16, engine_args={"seed": 1})
    monkeypatch.setenv("REFRAIN_CACHE", "off")
    given = handed_down(msgspec.msgpack.decode(msgspec.msgpack.encode(to_hand_down(settings))))
    assert dict(given) == dict(settings)


def test_the_official_clients_let_go_of_a_connection_before_the_server_does() -> None:
    """Who keeps it as long as the server may send a call at the moment when it is closed, and gets no answer."""
    pools = [openai.DEFAULT_CONNECTION_LIMITS, anthropic.DEFAULT_CONNECTION_LIMITS, httpx.Limits()]
    kept_s = [pool.keepalive_expiry for pool in pools]
    assert all(each is not None and 2 * each < Settings().idle_timeout_s for each in kept_s), kept_s
