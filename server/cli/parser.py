"""The command line `cottention COMMAND`: its parser, and how each command reads its settings.

Loads neither torch nor the HTTP stack, so that `--help` stays quick.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from cottention.engine.config import EngineConfig
from cottention.engine.errors import ConfigurationError
from cottention.engine.settings.command_line import OneLineParser
from cottention.engine.settings.declaration import expand_user
from cottention.engine.settings.sources import Resolved, unknown_variables
from cottention.engine.standard_streams import write_notice, write_output
from cottention.server.cli import commands
from cottention.server.cli.options import (
    ALL_SETTINGS,
    BATCH_SETTINGS,
    BENCH_SETTINGS,
    CHAT_SETTINGS,
    GENERATE_SETTINGS,
    INFO_SETTINGS,
    KNOWN_VARIABLES,
    SERVE_SETTINGS,
    add_settings,
    sources_of,
    warn_of_unknown_variables,
)
from cottention.server.client.settings import (
    BatchConfig,
    BenchConfig,
    ChatConfig,
    ClientConfig,
    TargetConfig,
)
from cottention.server.config import GenerateConfig, ModelArgument, ServerConfig
from cottention.server.log_config import configure_logging
from cottention.server.version import package_version

Asking = TypeVar("Asking", BenchConfig, GenerateConfig)

SHELLS = ("bash", "zsh", "fish")

PRECEDENCE = (
    "A flag takes precedence over its variable, named in [brackets], and a variable over the file"
    " that --config names."
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command line. Exits with status 2 and one line where they are wrong."""
    given, unknown = _parser().parse_known_args(arguments)
    if unknown:
        given.parser.error(f"unknown argument {unknown[0].partition('=')[0]}")
    return given


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="cottention",
        description="Serve language models with constant memory per session.",
        epilog=PRECEDENCE,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cottention {package_version()}")
    words = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for word, command in COMMANDS.items():
        page = words.add_parser(
            word,
            help=command.summary,
            description=command.summary,
            epilog=PRECEDENCE if command.settings else None,
            usage=f"cottention {word} {command.usage}",
            allow_abbrev=False,
        )
        page.set_defaults(parser=page)
        command.add_arguments(page)
        if command.settings:
            add_settings(page, command.settings)
    return parser


def _serve(given: argparse.Namespace) -> int:
    sources = sources_of(given, os.environ)
    config = sources.read(ServerConfig).value
    engine_config = sources.read(EngineConfig).value
    configure_logging(config.log_level, config.log_format)
    warn_of_unknown_variables(os.environ)
    return commands.serve(sources.read(ModelArgument).value.model, engine_config, config)


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        default="-",
        help="text to continue; - reads standard input (default: -)",
    )
    parser.add_argument(
        "-i",
        "--interactive",
        action="store_true",
        help="go on with lines of yours, where standard input is a terminal",
    )


def _generate(given: argparse.Namespace) -> int:
    sources = sources_of(given, os.environ)
    client, generation = sources.read(ClientConfig).value, sources.read(GenerateConfig)
    config = generation.value if client.url is None else _asking_for_flag(generation)
    engine_config = sources.read(EngineConfig).value
    if not given.interactive and client.url is None:
        return commands.generate(given.prompt, config, engine_config)
    from cottention.server.cli.chat import chat

    message, first = given.prompt, None
    if given.interactive:
        message, first = None, None if message == "-" else message
    return chat(message, client, ChatConfig(), config, engine_config, is_plain=True, first=first)


def _add_message(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "message",
        nargs="?",
        metavar="MESSAGE",
        help="message to answer, - reads it from standard input (default: a conversation, where"
        " standard input is a terminal, else -)",
    )


def _chat(given: argparse.Namespace) -> int:
    from cottention.server.cli.chat import chat

    sources = sources_of(given, os.environ)
    client, generation = sources.read(ClientConfig).value, sources.read(GenerateConfig)
    return chat(
        given.message,
        client,
        sources.read(ChatConfig).value,
        generation.value if client.url is None else _asking_for_flag(generation),
        sources.read(EngineConfig).value,
    )


def _bench(given: argparse.Namespace) -> int:
    from cottention.server.cli.bench import bench

    sources = sources_of(given, os.environ)
    target = sources.read(TargetConfig).value
    if target.url is None:
        raise ConfigurationError("URL is missing: give the server to test, as http://HOST:PORT")
    config = sources.read(BenchConfig)
    return bench(target, _asking_for_flag(config), as_json=given.json)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i",
        "--input-file",
        metavar="PATH",
        required=True,
        help="requests, one JSON object a line as in OpenAI's batches",
    )
    parser.add_argument(
        "-o",
        "--output-file",
        metavar="PATH",
        required=True,
        help="where the answers go, one line each; a file that has some is gone on with",
    )


def _run_batch(given: argparse.Namespace) -> int:
    from cottention.server.cli.run_batch import run_batch

    sources = sources_of(given, os.environ)
    client, batch = sources.read(ClientConfig).value, sources.read(BatchConfig)
    if client.url is not None and batch.origins["model"].kind == "flag":
        raise ConfigurationError("--model and --url cannot both be given: the server has its model")
    asked, answers = Path(expand_user(given.input_file)), Path(expand_user(given.output_file))
    return run_batch(asked, answers, client, batch.value, sources.read(EngineConfig).value)


def _asking_for_flag(resolved: Resolved[Asking]) -> Asking:
    """Settings without a model that no flag named: variable and file say what is loaded here."""
    if resolved.origins["model"].kind == "flag":
        return resolved.value
    return replace(resolved.value, model=None)


def _info(given: argparse.Namespace) -> int:
    sources = sources_of(given, os.environ)
    model = sources.read(ModelArgument).value.model
    return commands.info(model, sources.read(EngineConfig).value)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _config(given: argparse.Namespace) -> int:
    sources = sources_of(given, os.environ)
    resolved: list[Resolved[Any]] = [
        sources.read(config_type) for config_type in SERVE_SETTINGS.values()
    ]
    for message in unknown_variables(os.environ, KNOWN_VARIABLES):
        write_notice(f"warning: {message}\n", sys.stderr)
    return commands.config(resolved, as_json=given.json)


def _build(_: argparse.Namespace) -> int:
    return commands.build()


def _add_shell(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def _completion(given: argparse.Namespace) -> int:
    from cottention.server.cli.completion import completion_script

    write_output(completion_script(given.shell, _parser(), ALL_SETTINGS))
    return 0


def _add_nothing(_: argparse.ArgumentParser) -> None:
    """For a command whose arguments are its settings."""


class Command(NamedTuple):
    """A command of `cottention`; `settings` are those that it reads, by title."""

    summary: str
    usage: str
    run: Callable[[argparse.Namespace], int]
    settings: Mapping[str, type] = MappingProxyType({})
    add_arguments: Callable[[argparse.ArgumentParser], None] = _add_nothing


COMMANDS = {
    "serve": Command("serve a model over HTTP", "[MODEL] [flags]", _serve, SERVE_SETTINGS),
    "generate": Command(
        "generate text from a prompt",
        "[PROMPT] [-i] [flags]",
        _generate,
        GENERATE_SETTINGS,
        _add_prompt,
    ),
    "chat": Command(
        "hold a conversation, with a model loaded here or on a server",
        "[MESSAGE] [flags]",
        _chat,
        CHAT_SETTINGS,
        _add_message,
    ),
    "bench": Command(
        "test a running server under load, ours or another with OpenAI's interface",
        "URL [flags] [--json]",
        _bench,
        BENCH_SETTINGS,
        _add_json,
    ),
    "run-batch": Command(
        "answer the requests of a file, with a model loaded here or on a server",
        "-i PATH -o PATH [flags]",
        _run_batch,
        BATCH_SETTINGS,
        _add_files,
    ),
    "info": Command(
        "show a model's size and its memory per session", "[MODEL] [flags]", _info, INFO_SETTINGS
    ),
    "config": Command(
        "show the settings that serve would use, and where each comes from",
        "[MODEL] [flags] [--json]",
        _config,
        SERVE_SETTINGS,
        _add_json,
    ),
    "build": Command("compile the ops now instead of at first use", "", _build),
    "completion": Command(
        "print a script by which a shell completes commands, flags and files",
        "SHELL",
        _completion,
        add_arguments=_add_shell,
    ),
}
