"""Settings of the commands that talk to a running server."""

from dataclasses import dataclass

from cottention.engine.settings.declaration import check_settings, setting


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
