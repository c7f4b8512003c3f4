"""`cottention`: which command, with which settings; every failure is one line and a status.

Owns the command line. Imports neither torch nor the HTTP stack, so that --help is quick; a command
imports what it needs when it runs.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from cottention.engine.config import EngineConfig
from cottention.engine.errors import ConfigurationError, CottentionError
from cottention.server.cli import commands
from cottention.server.cli.options import (
    OneLineParser,
    add_flags,
    read_flags,
    variable_of,
    warn_of_unknown,
)
from cottention.server.config import GenerateConfig, ServerConfig
from cottention.server.log_config import configure_logging
from cottention.server.version import package_version

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    given, unknown = _parser().parse_known_args(arguments)
    if unknown:
        given.parser.error(f"there is no {unknown[0]}")
    try:
        return COMMANDS[given.command].run(given)
    except CottentionError as error:
        print(f"cottention {given.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigurationError) else EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def run() -> NoReturn:
    """The process: what is to be kept has been by now, and taking torch apart only takes time."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="cottention",
        description="Serves language models whose memory of a session never grows.",
        epilog="Every flag is also a variable, named in [brackets]; a flag goes before it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cottention {package_version()}")
    words = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for word, command in COMMANDS.items():
        page = words.add_parser(
            word,
            help=command.summary,
            description=command.summary,
            usage=f"cottention {word} {command.usage}",
            allow_abbrev=False,
        )
        page.set_defaults(parser=page)
        command.add_arguments(page)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    text = f"folder or Hugging Face id (default: the one that ships) [{variable_of('model')}]"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=text)
    add_flags(parser, EngineConfig, "engine")


def _model(given: argparse.Namespace) -> str | None:
    return given.model or os.environ.get(variable_of("model")) or None


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ServerConfig, "server")
    _add_model(parser)


def _serve(given: argparse.Namespace) -> int:
    config = read_flags(ServerConfig, given, os.environ)
    engine_config = read_flags(EngineConfig, given, os.environ)
    configure_logging(config.log_level, config.log_format)
    warn_of_unknown(os.environ)
    return commands.serve(_model(given), engine_config, config)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", default="-", help="text; - reads standard input"
    )
    add_flags(parser, GenerateConfig, "generation")
    add_flags(parser, EngineConfig, "engine")


def _generate(given: argparse.Namespace) -> int:
    config = read_flags(GenerateConfig, given, os.environ)
    return commands.generate(given.prompt, config, read_flags(EngineConfig, given, os.environ))


def _info(given: argparse.Namespace) -> int:
    return commands.info(_model(given), read_flags(EngineConfig, given, os.environ))


def _add_nothing(_: argparse.ArgumentParser) -> None:
    """For a command without settings."""


def _build(_: argparse.Namespace) -> int:
    return commands.build()


class Command(NamedTuple):
    """One word after `cottention`."""

    summary: str
    usage: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "serve": Command("serve a model over HTTP", "[MODEL] [flags]", _add_serve, _serve),
    "generate": Command(
        "continue a prompt and print it as it comes", "[PROMPT] [flags]", _add_generate, _generate
    ),
    "info": Command(
        "show a model's size and what a session of it costs", "[MODEL] [flags]", _add_model, _info
    ),
    "build": Command("compile the ops now instead of at first use", "", _add_nothing, _build),
}
