"""One declaration → flags, variables, defaults, help; and the line a user gets for a mistake."""

from dataclasses import dataclass, fields
from typing import TypeVar

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.errors import ConfigurationError
from cottention.engine.settings import option
from cottention.server.cli.options import OneLineParser, add_flags, flag_of, read_flags, variable_of
from cottention.server.config import GenerateConfig, ServerConfig

Config = TypeVar("Config")


def read(config_type: type[Config], arguments: str = "", **variables: str) -> Config:
    parser = OneLineParser(prog="test", allow_abbrev=False)
    add_flags(parser, config_type, "settings")
    return read_flags(config_type, parser.parse_args(arguments.split()), variables)


def test_defaults_are_the_declaration_s() -> None:
    for config_type in (ServerConfig, EngineConfig, GenerateConfig):
        assert read(config_type) == config_type()


def test_flag_before_variable_before_default() -> None:
    assert read(ServerConfig, COTTENTION_PORT="81").port == 81
    assert read(ServerConfig, "--port 82", COTTENTION_PORT="81").port == 82
    assert read(ServerConfig, COTTENTION_PORT="").port == 8000


def test_types_are_those_of_the_fields() -> None:
    given = read(ServerConfig, "--drain-seconds 2.5 --served-model-name 7 --log-level debug")
    assert (given.drain_seconds, given.served_model_name, given.log_level) == (2.5, "7", "debug")
    assert read(GenerateConfig, "--stop a --stop b").stop == ("a", "b")
    assert read(GenerateConfig, COTTENTION_STOP="a b").stop == ("a b",)
    assert read(ServerConfig, COTTENTION_API_KEY="secret").api_key == ("secret",)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("512K", 512 << 10), ("3m", 3 << 20), ("2GiB", 2 << 30), ("1.5GB", 3 << 29)],
)
def test_sizes(text: str, size: int) -> None:
    assert read(EngineConfig, f"--state-memory {text}").state_memory == size


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        ("--port x", {}, "--port must be a whole number; it is 'x'"),
        ("--port 70000", {}, "--port must be at most 65535; it is 70000"),
        ("", {"COTTENTION_PORT": "x"}, "COTTENTION_PORT must be a whole number; it is 'x'"),
        ("", {"COTTENTION_PORT": "-1"}, "COTTENTION_PORT must be at least 0; it is -1"),
        ("--drain-seconds nan", {}, "--drain-seconds must be a number; it is 'nan'"),
        ("--max-body-bytes 4X", {}, "--max-body-bytes must be a number of bytes"),
        ("--max-body-bytes infG", {}, "--max-body-bytes must be a number of bytes"),
        ("--log-level loud", {}, "--log-level must be one of debug, info, warning, error"),
        ("", {"COTTENTION_LOG_LEVEL": "loud"}, "COTTENTION_LOG_LEVEL must be one of"),
    ],
)
def test_a_mistake_is_named_as_it_was_made(
    arguments: str, variables: dict[str, str], says: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(ServerConfig, arguments, **variables)
    assert str(caught.value).startswith(says)


def test_settings_that_exclude_each_other_are_named_as_they_were_given() -> None:
    with pytest.raises(ConfigurationError, match="COTTENTION_MAX_SLOTS or --state-memory"):
        read(EngineConfig, "--state-memory 1G", COTTENTION_MAX_SLOTS="3")
    with pytest.raises(ConfigurationError, match="--max-slots or COTTENTION_STATE_MEMORY, not"):
        read(EngineConfig, "--max-slots 3", COTTENTION_STATE_MEMORY="1G")


def test_help_has_every_flag_variable_default_and_unit() -> None:
    parser = OneLineParser(prog="test", allow_abbrev=False)
    add_flags(parser, ServerConfig, "server")
    text = " ".join(parser.format_help().split())
    for item in fields(ServerConfig):
        assert flag_of(item.name) in text
        assert f"[{variable_of(item.name)}]" in text
    assert "--drain-seconds SECONDS" in text
    assert "(default: 30 seconds)" in text
    assert "(default: 4M)" in text
    assert "--log-level {debug,info,warning,error}" in text


def test_a_percent_sign_in_help_is_itself() -> None:
    @dataclass
    class Config:
        share: float = option(0.5, "50% of it", unit="parts")

    parser = OneLineParser(prog="test")
    add_flags(parser, Config, "settings")
    assert "50% of it (default: 0.5 parts)" in " ".join(parser.format_help().split())


def test_a_wrong_flag_is_one_line_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(ServerConfig, "--prot=9")
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "did you mean --port?" in told
