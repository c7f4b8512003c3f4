"""What a user may set about the server and the command, beside the engine's own settings.

Declares; `flags.py` makes flags, variables and help of it. Knows no HTTP.
"""

from dataclasses import dataclass
from typing import Literal

from cottention.engine.errors import ConfigurationError
from cottention.engine.settings import check_options, option
from cottention.server.log_config import LogFormat

LogLevel = Literal["debug", "info", "warning", "error"]
WithoutKey = Literal["warn", "allow"]

MAX_PORT = 65_535


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of the server. Each becomes a flag and a variable, as those of EngineConfig do."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every IPv4 interface")
    port: int = option(8000, "port to listen on; 0 takes a free one", minimum=0)
    served_model_name: str | None = option(
        None, "the model's id in requests and answers (default: the model's own name)"
    )
    drain_seconds: float = option(
        30.0, "how long running streams may go on after SIGTERM", minimum=0, unit="seconds"
    )
    keep_alive_seconds: float = option(
        15.0, "an idle stream gets a comment this often", minimum=0.01, unit="seconds"
    )
    stream_buffer_bytes: int = option(
        64 * 1024, "unread text of a stream at which it pauses", minimum=1, unit="bytes"
    )
    receive_seconds: float = option(
        30.0, "how long a request's head may take, or its body stall", minimum=0.01, unit="seconds"
    )
    max_body_bytes: int = option(
        4 * 1024**2, "longest request body; 512K and 4M are understood", minimum=1, unit="bytes"
    )
    max_queued_requests: int = option(
        512, "prompts that may be without their first token; more are refused", minimum=1
    )
    max_queued_tokens: int = option(
        500_000, "tokens of such prompts, likewise", minimum=1, unit="tokens"
    )
    max_request_seconds: float | None = option(
        None,
        "longest that a request may take (default: as long as it likes)",
        minimum=0.001,
        unit="seconds",
    )
    session_dir: str | None = option(
        None, "folder that keeps sessions (default: one that goes when the server ends)"
    )
    session_memory: int = option(
        1024**3, "memory for sessions that nobody runs", minimum=0, unit="bytes"
    )
    session_checkpoints: int = option(
        4, "how many turns a session can be rewound", minimum=0, unit="turns"
    )
    session_outbox: int = option(
        256 * 1024,
        "of a turn that goes on without its client, how much is kept for when it comes back",
        minimum=0,
        unit="bytes",
    )
    max_snapshot_bytes: int = option(
        256 * 1024**2, "largest session that may be imported", minimum=1, unit="bytes"
    )
    default_max_tokens: int = option(
        1024, "a chat ends after this unless it says", minimum=1, unit="tokens"
    )
    chat_template: str | None = option(
        None, "file, name of one in the model's folder, or plain (default: the model's own)"
    )
    api_key: tuple[str, ...] = option((), "key that clients must send; may be given several times")
    api_key_file: str | None = option(None, "file of such keys, a line each, or .json with limits")
    key_max_requests: int | None = option(
        None, "most requests of one key at a time (default: any)", minimum=1
    )
    key_max_tokens_per_minute: int | None = option(
        None, "most tokens of one key, prompts included (default: any)", minimum=1, unit="tokens"
    )
    key_max_body_bytes: int | None = option(
        None, "longest request body with a key (default: --max-body-bytes)", minimum=1, unit="bytes"
    )
    key_max_tokens: int | None = option(
        None, "most tokens of one text (default: --max-tokens-limit)", minimum=1, unit="tokens"
    )
    key_max_n: int | None = option(None, "most choices of one prompt (default: 128)", minimum=1)
    key_max_stop: int | None = option(None, "most stop strings (default: 16)", minimum=1)
    without_key: WithoutKey = option(
        "warn", "what becomes of a start that is open to others and has no key"
    )
    metrics_key: str | None = option(None, "key that /metrics asks for (default: it is open)")
    cors_origin: tuple[str, ...] = option(
        (), "web page that may call from a browser; may be given several times, * is any"
    )
    log_level: LogLevel = option("info", "least serious messages to log")
    log_format: LogFormat = option("text", "lines for people, or a JSON object a line")
    log_prompt_characters: int = option(
        0, "so much of each prompt is logged with its request", minimum=0, unit="characters"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.port > MAX_PORT:
            raise ConfigurationError(f"--port must be at most {MAX_PORT}; it is {self.port}")


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """How `cottention generate` chooses tokens; the names and meanings are those of the API."""

    model: str | None = option(None, "folder or Hugging Face id (default: the one that ships)")
    max_tokens: int = option(256, "most tokens to generate", minimum=1, unit="tokens")
    temperature: float = option(1.0, "0 always takes the likeliest token", minimum=0)
    top_p: float = option(1.0, "keep the likeliest tokens that make up this probability")
    top_k: int = option(0, "keep this many of the likeliest tokens; 0 keeps all")
    min_p: float = option(0.0, "drop tokens less likely than this times the likeliest")
    seed: int | None = option(None, "the same seed gives the same text (default: a fresh one)")
    stop: tuple[str, ...] = option((), "end before this text; may be given several times")

    def __post_init__(self) -> None:
        check_options(self)
