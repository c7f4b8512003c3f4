"""Settings of the commands, beside those of the engine."""

from dataclasses import dataclass
from typing import Literal

from cottention.engine.errors import ConfigurationError
from cottention.engine.sessions.store.postgres.address import check_address
from cottention.engine.settings.declaration import check_settings, setting
from cottention.server.log_config import LogFormat

LogLevel = Literal["debug", "info", "warning", "error"]


SEND_SECONDS = 300.0
"""Default of --send-seconds."""
MAX_SEND_SECONDS = 2_147_483
"""As many milliseconds as a socket takes."""

GENERATE_MAX_TOKENS = 256
"""Where neither --max-tokens nor the model's files limit what `generate` prints."""

_UNSET = "that of the model's generation_config.json, else {}"


@dataclass(frozen=True, slots=True)
class ModelArgument:
    """Which model a command loads."""

    model: str | None = setting(
        None,
        "model folder or Hugging Face id",
        unset="the model that ships with the package",
        is_positional=True,
        is_path=True,
    )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of the HTTP server."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is every IPv4 interface")
    port: int = setting(8000, "port to listen on; 0 chooses a free one", minimum=0, maximum=65_535)
    uds: str | None = setting(
        None,
        "path of a unix socket to listen on, instead of --host and --port; its owner and group can"
        " connect",
        unset="none",
        is_path=True,
    )
    tls_cert: str | None = setting(
        None,
        "file of a certificate in PEM form, followed by those that lead to its authority; serves"
        " HTTPS",
        unset="none: plain HTTP",
        is_path=True,
    )
    tls_key: str | None = setting(
        None,
        "file of that certificate's private key in PEM form, not encrypted",
        unset="in the file of --tls-cert",
        is_path=True,
    )
    served_model_name: str | None = setting(
        None, "model name in requests and responses", unset="the model's own name"
    )
    ui: bool = setting(
        True,
        "serve a page at / that shows the model and its sessions in a browser, and one at /docs"
        " that shows the endpoints",
    )
    drain_seconds: float = setting(
        30.0, "time for running requests to finish after SIGTERM", minimum=0, unit="seconds"
    )
    sse_keep_alive_seconds: float = setting(
        15.0,
        "interval between keep-alive comments on an idle event stream",
        minimum=0.01,
        unit="seconds",
    )
    stream_buffer_bytes: int = setting(
        64 * 1024, "unread text at which a stream is paused", minimum=1, unit="bytes"
    )
    receive_seconds: float = setting(
        30.0,
        "timeout for a request's headers, and for each pause of its body",
        minimum=0.01,
        unit="seconds",
    )
    receive_rate: int = setting(
        32 * 1024,
        "bytes per second that a request's body must average after --receive-seconds",
        minimum=1,
        unit="bytes",
    )
    send_seconds: float = setting(
        SEND_SECONDS,
        "time in which a client that has stopped reading must read some of what waits for it",
        minimum=0.01,
        maximum=MAX_SEND_SECONDS,
        unit="seconds",
    )
    max_connections: int | None = setting(
        None,
        "maximum number of connections; beyond it those without a request are closed",
        unset="as many as the limit of open files leaves, up to 1024",
        minimum=1,
    )
    max_connections_per_address: int | None = setting(
        None,
        "maximum number of connections from one IP address, or IPv6 network of 64 bits",
        unset="half of --max-connections; with --uds all of them",
        minimum=1,
    )
    max_body_bytes: int = setting(
        4 * 1024**2,
        "maximum size of a request body; accepts 512K or 4M",
        minimum=1,
        unit="bytes",
    )
    max_received_bytes: int = setting(
        16 * 1024**2,
        "maximum size of the bodies of all requests under way; one API key gets at most half of it,"
        " or one body",
        minimum=1,
        unit="bytes",
    )
    max_queued_requests: int = setting(
        512,
        "maximum number of prompts waiting for their first token; beyond it requests get 429",
        minimum=1,
    )
    max_queued_tokens: int = setting(
        500_000,
        "maximum number of tokens in these prompts; beyond it requests get 429",
        minimum=1,
        unit="tokens",
    )
    max_response_items: int = setting(
        1_000_000,
        "maximum number of token ids, echoed tokens and log-probabilities in a response: tokens"
        " times choices times alternatives; beyond it a request gets 400",
        minimum=1,
    )
    max_request_seconds: float | None = setting(
        None, "maximum request duration", unset="unlimited", minimum=0.001, unit="seconds"
    )
    session_dir: str | None = setting(
        None, "folder to store sessions in", unset="a temporary one, removed at exit", is_path=True
    )
    session_store: str | None = setting(
        None,
        "PostgreSQL database for sessions that several servers share, as"
        " postgresql://user@host/database; needs the extra `cluster`",
        unset="the folder of --session-dir",
    )
    session_store_password_file: str | None = setting(
        None,
        "file with the password of that database",
        unset="PGPASSWORD, or the file that PGPASSFILE names",
        is_path=True,
    )
    replica_url: str | None = setting(
        None,
        "where the other servers of that database reach this one, as http://host:port",
        unset="the address that it listens on, with the machine's name for 0.0.0.0",
    )
    session_states: Literal["auto", "always"] = setting(
        "auto",
        "whether that database has the states of sessions: only where they do not follow from their"
        " ids on this device, or always",
    )
    max_stored_state: int = setting(
        64 * 1024**2,
        "maximum size of a state in that database; a model whose states are larger is refused",
        minimum=1,
        unit="bytes",
    )
    session_memory: int = setting(
        1024**3,
        "memory for idle sessions; beyond it they are kept on disk only",
        minimum=0,
        unit="bytes",
    )
    session_checkpoints: int = setting(
        4, "number of turns that a session can be rewound by", minimum=0, unit="turns"
    )
    session_event_log_bytes: int = setting(
        256 * 1024,
        "maximum size of the events kept for a client that reconnects to a session's turn",
        minimum=0,
        unit="bytes",
    )
    max_session_reads: int = setting(
        32,
        "maximum number of snapshots and event logs that are sent at once; one API key gets at most"
        " half of them",
        minimum=2,
    )
    session_ttl_seconds: float | None = setting(
        None,
        "lifetime of a session that is created without ttl_seconds",
        unset="unlimited",
        minimum=0.001,
        unit="seconds",
    )
    idempotency_seconds: float = setting(
        86_400.0,
        "how long the answer to a request with an Idempotency-Key is repeated",
        minimum=0.001,
        unit="seconds",
    )
    idempotency_bytes: int = setting(
        512 * 1024,
        "maximum size of such an answer; a longer one is sent once and not repeated",
        minimum=0,
        unit="bytes",
    )
    response_ttl_seconds: float | None = setting(
        86_400.0,
        "lifetime of a stored response of /v1/responses",
        unset="unlimited",
        minimum=0.001,
        unit="seconds",
    )
    max_responses_per_key: int = setting(
        10_000,
        "maximum number of stored responses of one API key; more are refused until some expire or"
        " are deleted",
        minimum=1,
    )
    max_snapshot_bytes: int = setting(
        256 * 1024**2, "maximum size of a session to import", minimum=1, unit="bytes"
    )
    default_max_tokens: int | None = setting(
        None,
        "max_tokens of a chat request that sets none",
        unset="max_new_tokens of the model's generation_config.json, else 1024",
        minimum=1,
        unit="tokens",
    )
    chat_template: str | None = setting(
        None,
        "template file, name of a template in the model folder, or plain",
        unset="the model's own",
        is_path=True,
    )
    allow_special_tokens_in_messages: bool = setting(
        False, "let the text of chat messages write special tokens, instead of their spelling"
    )
    api_key: tuple[str, ...] = setting(
        (), "API key to require; may be repeated", unset="none required", is_secret=True
    )
    api_key_file: str | None = setting(
        None, "file with an API key per line, or JSON with limits per key", is_path=True
    )
    key_max_requests: int | None = setting(
        None,
        "maximum number of concurrent requests per API key, each counted prompts times n",
        unset="unlimited",
        minimum=1,
    )
    key_max_tokens_per_minute: int | None = setting(
        None,
        "maximum number of tokens per minute and API key, prompts included",
        unset="unlimited",
        minimum=1,
        unit="tokens",
    )
    key_max_body_bytes: int | None = setting(
        None,
        "maximum size of a request body, with an API key",
        unset="as --max-body-bytes",
        minimum=1,
        unit="bytes",
    )
    key_max_tokens: int | None = setting(
        None,
        "maximum max_tokens of a request, with an API key",
        unset="as --max-tokens-limit",
        minimum=1,
        unit="tokens",
    )
    key_max_n: int | None = setting(
        None, "maximum n of a request, with an API key", unset="128", minimum=1
    )
    key_max_stop: int | None = setting(
        None, "maximum number of stop strings, with an API key", unset="16", minimum=1
    )
    key_max_sessions: int | None = setting(
        None, "maximum number of sessions per API key", unset="unlimited", minimum=1
    )
    key_max_session_bytes: int | None = setting(
        None,
        "maximum size of the sessions of an API key on the disk, each counted in full",
        unset="unlimited",
        minimum=1,
        unit="bytes",
    )
    allow_unauthenticated: bool = setting(
        False, "do not warn when other machines can connect without an API key"
    )
    metrics_key: str | None = setting(
        None, "API key to require for /metrics", unset="none required", is_secret=True
    )
    cors_origin: tuple[str, ...] = setting(
        (),
        "origin whose web pages may send requests; may be repeated or separated by commas, * is"
        " any",
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "host name with dots that requests may be addressed to where no API key is set; may be"
        " repeated or separated by commas, *.NAME is all names below NAME, * is any",
    )
    otlp_endpoint: str | None = setting(
        None,
        "OpenTelemetry collector to send traces to, as http://HOST:4318; needs the extra `otel`",
        unset="none: no traces",
    )
    log_level: LogLevel = setting("info", "minimum severity of messages to log")
    log_format: LogFormat = setting("text", "log lines as text, or as one JSON object each")
    log_prompt_characters: int = setting(
        0, "number of characters of each prompt to log", minimum=0, unit="characters"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.max_received_bytes < self.max_body_bytes:
            raise ConfigurationError(
                f"--max-received-bytes {self.max_received_bytes} must be at least --max-body-bytes,"
                f" {self.max_body_bytes}"
            )
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigurationError("--tls-key needs the certificate of --tls-cert")
        if self.session_store is not None:
            check_address(self.session_store)
            if self.session_dir is not None:
                raise ConfigurationError(
                    "--session-store and --session-dir cannot both be given: sessions are stored in"
                    " a database or in a folder"
                )


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """Settings of `cottention generate`, with the names and meanings of the HTTP API."""

    model: str | None = setting(
        None,
        "model folder or Hugging Face id",
        unset="the model that ships with the package",
        is_path=True,
    )
    max_tokens: int | None = setting(
        None,
        "maximum number of tokens to generate",
        unset="max_new_tokens of the model's generation_config.json, else 256",
        minimum=1,
        unit="tokens",
    )
    temperature: float | None = setting(
        None, "sampling temperature; 0 is greedy", unset=_UNSET.format(1), minimum=0
    )
    top_p: float | None = setting(
        None,
        "sample from the likeliest tokens up to this total probability",
        unset=_UNSET.format(1),
    )
    top_k: int | None = setting(
        None,
        "sample from this many of the likeliest tokens; 0 is all",
        unset=_UNSET.format(0),
    )
    min_p: float | None = setting(
        None,
        "minimum probability of a token, relative to that of the likeliest",
        unset=_UNSET.format(0),
    )
    seed: int | None = setting(
        None, "random seed", unset="a new one each time", minimum=-(2**63), maximum=2**63 - 1
    )
    stop: tuple[str, ...] = setting((), "stop string; may be repeated")

    def __post_init__(self) -> None:
        check_settings(self)
