"""Every knob, in one table: name, type, default, one line of help.

Values come from the command line, the environment (`REFRAIN_<NAME>`), a TOML file
(`REFRAIN_CONFIG`, else `refrain.toml` in the working directory) and the defaults, in that order.
`refrain config` prints them with their origin. Nothing else in the package reads the environment.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

import platformdirs
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from app.errors import StartRefused

PREFIX = "REFRAIN_"
DEFAULT_MODEL = "smollm2-135m-instruct"
# A budget as it is written: at most fifteen digits, since larger numbers are not exact everywhere.
BUDGET = re.compile(
    r"(?!0+(\.0+)? )((?P<tokens>\d{1,15}) tokens|(?P<money>\d{1,9}(\.\d{1,6})?) money)"
    r"/(?P<period>hour|day|month|forever)"
)

# What a request may not set unless `trusted_fields` says so; what each does is in app/gate/screen.py.
GUARDED_FIELDS = frozenset(
    "chat_template vllm_xargs mm_processor_kwargs media_io_kwargs prompt_embeds image_embeds audio_embeds "
    "video_embeds kv_transfer_params ec_transfer_params".split()
)


class Settings(BaseSettings):
    """Frozen; built once by the command line and handed down, never read from a global."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, validate_default=True
    )

    # serving
    host: str = Field("127.0.0.1", description="Address to bind. Any other than loopback needs keys.")
    port: int = Field(8000, ge=0, le=65535, description="Port to bind; 0 takes a free one.")
    home: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("refrain")),
        description="Where weights, keys and run-time files live.",
    )
    drain_s: float = Field(30.0, ge=0, description="How long SIGTERM waits for running answers, in seconds.")
    drain_delay_s: float = Field(
        0.0,
        ge=0,
        description="How long before that work is still taken, while /readyz says draining: balancers must see it.",
    )
    http_workers: int = Field(
        0, ge=0, le=64, description="Processes beside the server's own that answer hits; see README."
    )
    max_body_bytes: int = Field(8 * 2**20, ge=1024, description="Largest request body; more is a 413.")
    max_json_depth: int = Field(64, ge=8, le=500, description="Deepest nesting of a request body; more is a 400.")
    body_timeout_s: float = Field(30.0, gt=0, description="Time a client has to send its body; then 408.")
    header_timeout_s: float = Field(
        15.0, gt=0, description="Time a client has to send a request's headers, and to begin; then it is cut off."
    )
    max_header_bytes: int = Field(32_768, ge=1024, description="Largest head of a request; more is a 431.")
    write_timeout_s: float = Field(
        60.0, gt=0, description="How long a client may read nothing of its answer; then it is cut off."
    )
    idle_timeout_s: int = Field(
        12,
        gt=0,
        description="How long a connection is kept after an answer, in seconds; a client that keeps it longer may "
        "send a call into its end. OpenAI's and Anthropic's keep it for 5.",
    )
    max_connections: int = Field(4096, gt=0, description="Most connections of one process; one more is a 503.")
    keep_alive_s: float = Field(
        10.0, gt=0, description="Silence on a stream, in seconds, before a keep-alive comment is sent."
    )
    cors_origins: str | None = Field(
        None,
        description="Origins whose pages may use the server, by commas: https://chat.example.com, or *; none: none.",
    )
    allowed_hosts: str | None = Field(
        None, description="Names with a dot that a server without keys is called by, by commas; addresses always go."
    )
    media_hosts: str | None = Field(
        None, description="Hosts that images, audio and video may be fetched from, by commas; none: no URL is fetched."
    )
    trusted_fields: str | None = Field(
        None,
        description="Guarded request fields that clients may set, by commas: chat_template, vllm_xargs, "
        "mm_processor_kwargs, media_io_kwargs, prompt_embeds, image_embeds, audio_embeds, video_embeds, "
        "kv_transfer_params, ec_transfer_params.",
    )
    grammar_max_bytes: int = Field(
        65_536, gt=0, description="Largest schema, regex, grammar or tool of a request; more is a 400."
    )
    grammar_cpu_s: float = Field(
        2.0, gt=0, description="Processor time that a schema, regex or grammar may take to prepare; more is a 400."
    )
    log_format: Literal["text", "json"] = Field("text", description="Shape of the log lines.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    access_log: bool = Field(True, description="One line per call.")
    traces: bool = Field(
        False, description="Send OpenTelemetry spans to where OTEL_EXPORTER_OTLP_ENDPOINT says; needs refrain[otel]."
    )

    # model
    model: str = Field(
        DEFAULT_MODEL, description="What to serve: a registry name, a local Hugging Face directory, or a hub id."
    )
    served_model_name: str | None = Field(None, description="Name clients use; by default the model's own.")
    weights_store: str | None = Field(
        None,
        description="Where weights are pushed to and pulled from: s3://bucket/prefix (needs refrain[s3]), another URL "
        "that fsspec knows, or a folder.",
    )
    watch_s: float = Field(
        2.0, ge=0, description="How often a running server looks for other current weights, in seconds; 0: never."
    )
    swap: Literal["auto", "beside", "pause"] = Field(
        "auto",
        description="How other weights are put in: by a second engine beside the first, or after it while calls wait; "
        "auto: beside where memory allows.",
    )
    adapters: str | None = Field(
        None, description="Published LoRA adapters of the served weights to serve as models, by commas."
    )
    max_adapters: int = Field(0, ge=0, description="Most adapters at one time, where some are to be loaded later.")
    max_adapter_rank: Literal[8, 16, 32, 64, 128, 256] = Field(
        32, description="Highest rank of an adapter; memory is set aside for it."
    )

    # engine
    engine: Literal["vllm", "scripted"] = Field("vllm", description="vllm, or scripted: canned text at a fixed rate.")
    loading_wait_s: float = Field(
        60.0, ge=0, description="How long a miss waits for an engine that is still loading; then 503."
    )
    engine_hang_s: float = Field(
        30.0,
        ge=0,
        description="How long an engine core with calls may do nothing at all before it is killed; 0: for ever.",
    )
    engine_stuck_s: float = Field(
        600.0, ge=0, description="How long an engine core may compute one step before it is killed; 0: for ever."
    )
    quarantine_s: float = Field(
        600.0, ge=0, description="How long a call that the engine died of twice is refused, in seconds; 0: not."
    )
    dtype: str = Field(
        "auto",
        description="bfloat16, float16, float32; auto is the weights' own, or float32 on a CPU that has no bfloat16.",
    )
    quantization: str | None = Field(None, description="vLLM's quantization method, if the weights do not say it.")
    max_model_len: int | None = Field(None, gt=0, description="Longest prompt plus answer, in tokens.")
    max_num_seqs: int | None = Field(None, gt=0, description="Most sequences in one batch.")
    max_num_batched_tokens: int | None = Field(None, gt=0, description="Most tokens in one engine step.")
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1, description="Share of GPU memory vLLM may take.")
    kv_cache_gib: int | None = Field(
        None, gt=0, description="KV cache on a CPU, in GiB; by default 2, or a quarter of memory where that is less."
    )
    tensor_parallel_size: int | None = Field(None, gt=0, description="GPUs one replica is split over.")
    pipeline_parallel_size: int | None = Field(None, gt=0, description="Pipeline stages of one replica.")
    tool_call_parser: str | None = Field(
        "hermes", description="vLLM's parser for tool calls (hermes, llama3_json, mistral, ...); empty: none."
    )
    reasoning_parser: str | None = Field(None, description="vLLM's parser for reasoning text.")
    chat_template: str | None = Field(None, description="Path of a chat template that replaces the weights' own.")
    cpu_threads: int | None = Field(None, gt=0, description="Threads that compute on a CPU; by default all cores.")
    compile: bool = Field(
        True,
        description="CPU only: compile the model. Faster; the first start takes a minute more, later ones load it.",
    )
    responses_store: bool = Field(
        False, description="Keep Responses in memory for GET, cancel and background. vLLM never evicts them."
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description='Any other vLLM engine argument as JSON: {"enable_lora": true, "block_size": 32}.',
    )
    scripted_tokens_per_s: float = Field(200.0, gt=0, description="Speed of the scripted engine, per call.")
    scripted_max_calls: int | None = Field(
        None, gt=0, description="Most calls that the scripted engine works on at one time; by default all."
    )
    scripted_total_tokens_per_s: float | None = Field(
        None, gt=0, description="Speed of the scripted engine over all calls, prompts counted; by default unlimited."
    )

    # admission
    queue_max_calls: int | None = Field(
        None,
        ge=0,
        description="Most calls that wait for the engine; by default 8 for each of its places, 1024 at least.",
    )
    queue_max_tokens: int | None = Field(
        None, ge=0, description="Most tokens that wait, prompts and expected answers; by default as the wait allows."
    )
    queue_max_wait_s: float = Field(
        600.0, gt=0, description="A call that would wait longer for the engine, at its measured speed, is refused."
    )
    request_timeout_s: float = Field(
        0.0, ge=0, description="Time for an answer where a call has no `x-request-timeout`; then 504. 0: no limit."
    )

    # cache
    cache: Literal["deterministic", "all", "off"] = Field(
        "deterministic", description="What is cached: calls at temperature 0 or with a seed; all; nothing."
    )
    cache_ttl_s: int = Field(86_400, gt=0, description="Life of a recording, in seconds, give or take 10%.")
    cache_max_entry_bytes: int = Field(1 * 2**20, gt=0, description="A larger recording is not kept.")
    cache_compress_above_bytes: int = Field(1024, ge=0, description="Recordings above this size are zstd-compressed.")
    cache_near_mib: int = Field(
        64, ge=0, description="Memory for recordings that this process holds itself, kept right by Redis; 0: none."
    )

    cache_samples: int = Field(
        0,
        ge=0,
        le=64,
        description="Calls at temperature > 0 without a seed draw from a pool of so many answers; 0: off.",
    )
    cache_samples_sticky: bool = Field(
        False, description="Draws from a pool follow `user`: the same user, the same answer."
    )
    cache_secret: SecretStr | None = Field(
        None,
        description="Signs what is kept in Redis, so that who can write there cannot plant answers; 16 characters.",
    )
    cache_old_secrets: SecretStr | None = Field(
        None, description="Earlier values of the secret, by commas: what they signed or encrypted still opens."
    )
    cache_encrypt: bool = Field(
        False,
        description="Encrypts what is kept in Redis, with a key made of the secret; what is plain there is a miss.",
    )
    cache_stale_while_revalidate_s: int = Field(
        0, ge=0, description="How long past its time a recording still answers, while one call refreshes it; 0: not."
    )
    cache_stale_if_error_s: int = Field(
        0, ge=0, description="How long past its time a recording answers where generating anew fails; 0: not."
    )
    cache_negative_s: float = Field(
        0.0, ge=0, description="How long a call that the engine refused for good is refused without asking it; 0: not."
    )
    cache_scope: Literal["tenant", "global", "key"] = Field(
        "tenant",
        description="Who shares answers: each tenant's callers, everybody, or only calls with the same API key.",
    )
    idempotency_ttl_s: int = Field(
        86_400, gt=0, description="How long an Idempotency-Key stands for the answer that it was first given."
    )

    # flight
    flight_lease_s: float = Field(
        5.0, ge=0.3, description="How long a server that leads a generation may be silent before another takes over."
    )
    stream_resume_s: float = Field(
        0.0, ge=0, description="How long a stream that lost its client goes on and can be resumed; 0: it ends at once."
    )
    flight_max_bytes: int = Field(
        16 * 2**20,
        ge=64 * 2**10,
        description="Memory for one answer under way; beyond it nobody else comes aboard, and what was read goes.",
    )
    flights_max_bytes: int = Field(
        256 * 2**20, ge=2**20, description="Memory for all answers under way; beyond it the same for the largest."
    )
    stream_max_bytes: int = Field(
        8 * 2**20, gt=0, description="A longer stream is not passed on to other servers beyond this."
    )
    stream_keep_bytes: int = Field(
        64 * 2**20, gt=0, description="Memory for finished streams that can still be resumed; the oldest go first."
    )

    # ledger
    ledger: bool = Field(True, description="Record each call, and what it used and cost, in ledger/ under home.")
    ledger_flush_s: float = Field(
        0.2, ge=0.01, le=60, description="How often records are written to the disk; a crash loses as much."
    )
    ledger_file_mib: int = Field(64, gt=0, description="A file of the ledger that is larger is closed and compressed.")
    ledger_keep_days: int = Field(400, ge=0, description="Days of records that are kept; 0: all.")
    ledger_text_bytes: int = Field(
        0, ge=0, le=2**20, description="Bytes of each request and response that are recorded too; 0: none."
    )

    # cost
    price_device_hour: float = Field(0.0, ge=0, description="What one device costs per hour, in any currency.")
    price_prompt_per_million: float = Field(0.0, ge=0, description="Price of a million prompt tokens.")
    price_completion_per_million: float = Field(0.0, ge=0, description="Price of a million completion tokens.")
    compare_prompt_per_million: float = Field(
        0.0, ge=0, description="Another API's price of a million prompt tokens, for `refrain usage cost`."
    )
    compare_completion_per_million: float = Field(0.0, ge=0, description="The same for completion tokens.")

    # redis
    redis_url: SecretStr | None = Field(
        None, description="redis://, rediss:// or unix:// URL of a shared server. Without one, one is started for you."
    )
    redis_sentinel: str | None = Field(
        None, description="host:port,host:port/service of a Sentinel set-up; redis_url then gives user, password, db."
    )
    redis_cluster: bool = Field(False, description="redis_url is a node of a Redis Cluster.")
    redis_timeout_s: float = Field(0.25, gt=0, description="Longest a request waits for Redis before it goes on alone.")
    redis_max_memory_mib: int = Field(256, ge=8, description="Memory of the embedded server; it evicts above that.")
    redis_namespace: str = Field(
        "refrain",
        pattern=r"^[^\s{}\[\]*?\\^]+$",  # a brace would be a Cluster's hash tag, the others a pattern's
        description="First part of every Redis key; without blanks, brackets, braces, * and ?.",
    )

    # keys
    keys_file: Path | None = Field(None, description="API keys, hashed; by default keys.json under home.")

    # limits of a key that sets none of its own
    limit_rpm: int | None = Field(None, gt=0, description="Requests a minute of each key, unless it has its own limit.")
    limit_tpm: int | None = Field(None, gt=0, description="Tokens a minute of each key, unless it has its own limit.")
    limit_concurrency: int | None = Field(None, gt=0, description="Calls that a key may have under way at one time.")
    limit_max_output_tokens: int | None = Field(None, gt=0, description="Most tokens of an answer; see limit_output.")
    limit_budget: str | None = Field(
        None, description="Budget of each key: 1000000 tokens/day, 25.50 money/month; hour, day, month or forever."
    )
    limit_trim: Literal["none", "oldest"] = Field(
        "none", description="What is done with an over-long chat: refused, or its oldest turns are left out."
    )
    limit_output: Literal["cap", "refuse"] = Field(
        "cap", description="What is done with a call that asks for more tokens than it may have."
    )
    limit_hits: Literal["free", "requests", "full"] = Field(
        "requests",
        description="What a hit, or another call's generation, costs its key: nothing, a request, tokens too.",
    )
    limit_rates_without_redis: Literal["open", "closed"] = Field(
        "open", description="While Redis is away, calls of keys with a rate are let in uncounted, or refused (503)."
    )
    limit_budgets_without_redis: Literal["open", "closed"] = Field(
        "closed", description="The same for calls that cost a key with a budget something."
    )

    @field_validator("tool_call_parser", "reasoning_parser", "quantization", "served_model_name", mode="after")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or None

    @field_validator("home", "keys_file", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value else None

    @field_validator("redis_url", mode="after")
    @classmethod
    def _is_a_redis_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("a redis://, rediss:// or unix:// URL is needed")
        return value

    @field_validator("cache_secret", mode="after")
    @classmethod
    def _is_long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not 16 <= len(value.get_secret_value().encode()) <= 64:
            raise ValueError("16 to 64 characters are needed")
        return value

    @field_validator("limit_budget", mode="after")
    @classmethod
    def _is_a_budget(cls, value: str | None) -> str | None:
        if value and not BUDGET.fullmatch(value):
            raise ValueError("`1000000 tokens/day` or `25.50 money/month` is needed; hour, day, month or forever")
        return value

    @model_validator(mode="after")
    def _money_has_prices(self) -> Self:
        is_free = not (self.price_prompt_per_million or self.price_completion_per_million)
        if is_free and self.limit_budget and " money/" in self.limit_budget:
            raise ValueError("a budget in money needs REFRAIN_PRICE_PROMPT_PER_MILLION or ..._COMPLETION_PER_MILLION")
        return self

    @field_validator("cache_old_secrets", mode="after")
    @classmethod
    def _each_is_long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        for secret in value.get_secret_value().split(",") if value else ():
            cls._is_long_enough(SecretStr(secret.strip()))
        return value

    @model_validator(mode="after")
    def _secrets_agree(self) -> Self:
        if (self.cache_encrypt or self.cache_old_secrets) and self.cache_secret is None:
            raise ValueError("REFRAIN_CACHE_ENCRYPT and REFRAIN_CACHE_OLD_SECRETS need REFRAIN_CACHE_SECRET")
        return self

    @model_validator(mode="after")
    def _redis_options_agree(self) -> Self:
        if (self.redis_sentinel or self.redis_cluster) and self.redis_url is None:
            raise ValueError("REFRAIN_REDIS_SENTINEL and REFRAIN_REDIS_CLUSTER need REFRAIN_REDIS_URL")
        return self

    @field_validator("cors_origins", mode="after")
    @classmethod
    def _are_origins(cls, value: str | None) -> str | None:
        for each in listed(value):
            if each != "*" and not _ORIGIN.fullmatch(each):
                raise ValueError(f"{each} is no origin; one looks like https://chat.example.com")
        return value

    @field_validator("weights_store", mode="after")
    @classmethod
    def _holds_no_secret(cls, value: str | None) -> str | None:
        """It is shown by `refrain config` and in messages."""
        if value and "://" not in value and not Path(value).is_absolute():
            raise ValueError("a URL like s3://bucket/prefix, or an absolute path, is needed")
        if value and _SECRET_IN_URL.search(value):
            raise ValueError("it may hold no password and no ?; credentials go where the store's own library looks")
        return value or None

    @field_validator("trusted_fields", mode="after")
    @classmethod
    def _are_guarded(cls, value: str | None) -> str | None:
        if unknown := set(listed(value)) - GUARDED_FIELDS:
            raise ValueError(f"{min(unknown)} is no guarded field; those are {', '.join(sorted(GUARDED_FIELDS))}")
        return value

    @property
    def adapter_names(self) -> list[str]:
        return listed(self.adapters)

    @property
    def adapter_places(self) -> int:
        """How many adapters can be served at one time; 0 leaves LoRA off, which costs base calls their speed."""
        return max(self.max_adapters, len(self.adapter_names))

    @property
    def cache_secrets(self) -> list[bytes]:
        """The secret, and the older ones after it; none is none."""
        if self.cache_secret is None:
            return []
        older = self.cache_old_secrets.get_secret_value().split(",") if self.cache_old_secrets else []
        return [secret.encode() for secret in (self.cache_secret.get_secret_value(), *map(str.strip, older))]

    @property
    def cache_keep_s(self) -> int:
        """How long a recording is kept: its time, and as long after it as it may still be of use."""
        return self.cache_ttl_s + max(self.cache_stale_while_revalidate_s, self.cache_stale_if_error_s)

    @property
    def keys_path(self) -> Path:
        return self.keys_file or self.home / "keys.json"

    @property
    def ledger_root(self) -> Path:
        return self.home / "ledger"

    @property
    def devices(self) -> int:
        """How many one engine is spread over, all ranks of data parallelism together."""
        return self.devices_per_rank * int(self.engine_args.get("data_parallel_size") or 1)

    @property
    def devices_per_rank(self) -> int:
        """How many one copy of the weights is spread over."""
        own = {"tensor_parallel_size": self.tensor_parallel_size, "pipeline_parallel_size": self.pipeline_parallel_size}
        return prod(int((own | self.engine_args)[name] or 1) for name in own)

    @property
    def weights_root(self) -> Path:
        return self.home / "weights"

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = TomlConfigSettingsSource(settings_cls, toml_file=config_file())
        return (init_settings, env_settings, toml)


def listed(value: str | None) -> list[str]:
    """The parts of a list that is written with commas."""
    return [part.strip() for part in (value or "").split(",") if part.strip()]


def config_file() -> Path | None:
    """The TOML file in use, if any. Raises StartRefused when the one that was named does not exist."""
    if named := os.environ.get(f"{PREFIX}CONFIG"):
        if not Path(named).is_file():
            raise StartRefused(f"{PREFIX}CONFIG names {named}, which is not a file")
        return Path(named)
    default = Path("refrain.toml")
    return default if default.is_file() else None


def load(**overrides: Any) -> Settings:
    """Settings from all sources; an override of None means "not given".

    Raises:
        StartRefused: a value that does not fit, or a variable under our prefix that nobody reads.
    """
    known = {name.upper() for name in Settings.model_fields} | {"CONFIG"}
    for variable in os.environ:
        prefix, name = variable[: len(PREFIX)].upper(), variable[len(PREFIX) :].upper()
        if prefix == PREFIX and name not in known:
            hint = _meant(name, known, PREFIX)
            raise StartRefused(f"{variable} is set but is no setting of ours{hint} (`refrain config` lists all)")
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise StartRefused(_first_mistake(error, given)) from error
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise StartRefused(f"settings cannot be read: {error}") from error


def to_hand_down(settings: Settings) -> dict[str, Any]:
    """Every value in plain types, secrets as they are: for a process of ours that shall have the very same."""
    secrets = {name: value.get_secret_value() for name, value in settings if isinstance(value, SecretStr)}
    return settings.model_dump(mode="json") | secrets


def handed_down(values: dict[str, Any]) -> Settings:
    """The settings of `to_hand_down`, whatever environment and file say here and now."""
    return _HandedDown(**values)


class _HandedDown(Settings):
    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def _first_mistake(error: ValidationError, given: dict[str, Any]) -> str:
    """One line, that names the setting the way it was given; a secret's value is not in it."""
    first = error.errors(include_input=False, include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":  # variables were looked at before, so it stands in the file
        return f"{name} in {config_file()} is no setting of ours{_meant(name, set(Settings.model_fields))}"
    shown = f"--{name.replace('_', '-')}" if name in given else PREFIX + name.upper()
    return f"{shown}: {message}"


def _meant(name: str, known: set[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def origins(settings: Settings, overrides: dict[str, Any]) -> dict[str, str]:
    """Where each value came from: `flag`, `environment`, `file` or `default`."""
    file = config_file()
    in_file = tomllib.loads(file.read_text()) if file else {}
    environment = {name.upper() for name, value in os.environ.items() if value}

    def origin(name: str) -> str:
        if overrides.get(name) is not None:
            return "flag"
        if PREFIX + name.upper() in environment:
            return "environment"
        return f"file {file}" if name in in_file else "default"

    return {name: origin(name) for name in type(settings).model_fields}


def masked(settings: Settings) -> dict[str, str]:
    """Every value as text, secrets as stars; a URL keeps its host and loses its password."""

    def show(name: str, value: Any) -> str:
        if isinstance(value, SecretStr):
            return mask_url(value.get_secret_value()) if name == "redis_url" else "***"
        return "" if value is None else str(value)

    return {name: show(name, getattr(settings, name)) for name in type(settings).model_fields}


def mask_url(url: str) -> str:
    """`redis://user:secret@host:1/0` becomes `redis://user:***@host:1/0`; a `?password=` is masked too."""
    scheme, separator, rest = _PASSWORD_OPTION.sub(r"\1***", url).partition("://")
    credentials, at, location = rest.rpartition("@")
    user = credentials.partition(":")[0]
    return f"{scheme}{separator}{user}:***@{location}" if at else f"{scheme}{separator}{rest}"


_SECRET_IN_URL = re.compile(r"://[^@]*:[^@]*@|\?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9.\-\[\]:]+")
_PASSWORD_OPTION = re.compile(r"([?&]\w*password=)[^&]*", re.IGNORECASE)
