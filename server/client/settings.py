"""Settings of the commands that talk to a running server."""

from dataclasses import dataclass

from cottention.engine.errors import ConfigurationError
from cottention.engine.settings.declaration import check_settings, setting

MAX_STREAMS = 1024


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Which server a command asks, if any."""

    url: str | None = setting(
        None,
        "server to use, as http://HOST:PORT, https://NAME or unix:PATH",
        unset="none: the model is loaded here",
    )
    api_key: tuple[str, ...] = setting(
        (), "API key to send to that server; the first of several", unset="none", is_secret=True
    )
    api_key_file: str | None = setting(
        None, "file whose first API key is sent to that server", unset="none", is_path=True
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class TargetConfig(ClientConfig):
    """The same, of a command that always needs a server."""

    url: str | None = setting(
        None,
        "server to test, as http://HOST:PORT, https://NAME or unix:PATH",
        unset="none",
        is_positional=True,
    )


@dataclass(frozen=True, slots=True)
class ChatConfig:
    """Settings of a conversation."""

    system: str | None = setting(None, "instructions that come before a chat", unset="none")
    chat_template: str | None = setting(
        None,
        "template file, name of a template in the model folder, or plain, where the model is loaded"
        " here",
        unset="the model's own",
        is_path=True,
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """Settings of a batch."""

    model: str | None = setting(
        None,
        "model folder or Hugging Face id, where the model is loaded here",
        unset="the model that ships with the package",
        is_path=True,
    )
    max_concurrency: int = setting(
        64, "maximum number of requests at a time", minimum=1, maximum=MAX_STREAMS
    )
    served_model_name: str | None = setting(
        None,
        "model name in requests, where the model is loaded here",
        unset="the name of the model",
    )
    chat_template: str | None = setting(
        None,
        "template file, name of a template in the model folder, or plain, where the model is loaded"
        " here",
        unset="the model's own",
        is_path=True,
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """Settings of a load test."""

    concurrency: tuple[str, ...] = setting(
        ("1", "4", "16"),
        "number of streams at a time; may be repeated or separated by commas",
    )
    requests: int | None = setting(
        None,
        "number of requests at each level",
        unset="four for each stream, at least 8",
        minimum=1,
    )
    prompt_words: int = setting(64, "words of each prompt", minimum=1, unit="words")
    max_tokens: int = setting(64, "tokens of each answer", minimum=2, unit="tokens")
    chat: bool = setting(False, "ask /v1/chat/completions instead of /v1/completions")
    model: str | None = setting(
        None, "name of the model to ask for", unset="the first that the server lists"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.levels:
            raise ConfigurationError("--concurrency needs a number of streams")

    @property
    def levels(self) -> list[int]:
        """The numbers of --concurrency, in order. Raises ConfigurationError."""
        words = [word.strip() for text in self.concurrency for word in text.split(",")]
        for word in words:
            if not (word.isdecimal() and 1 <= int(word) <= MAX_STREAMS):
                raise ConfigurationError(
                    f"--concurrency must be numbers from 1 to {MAX_STREAMS}; one is {word}"
                )
        return [int(word) for word in words]
