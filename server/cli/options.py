"""The settings of each command, read from its flags, the `COTTENTION_*` variables and the file."""

import argparse
import logging
from collections.abc import Mapping

from cottention.engine.config import EngineConfig
from cottention.engine.settings.command_line import add_config_flag, add_flags
from cottention.engine.settings.declaration import settings_of
from cottention.engine.settings.sources import (
    CONFIG_NAME,
    Sources,
    unknown_variables,
    variable_of,
)
from cottention.engine.training.settings import TRAINING_VARIABLES
from cottention.server.client.settings import (
    BatchConfig,
    BenchConfig,
    ChatConfig,
    ClientConfig,
    TargetConfig,
)
from cottention.server.config import GenerateConfig, ModelArgument, ServerConfig

logger = logging.getLogger("cottention")

INFO_SETTINGS = {"model": ModelArgument, "engine": EngineConfig}
SERVE_SETTINGS = {"model": ModelArgument, "server": ServerConfig, "engine": EngineConfig}
GENERATE_SETTINGS = {
    "generation": GenerateConfig,
    "server to use": ClientConfig,
    "engine": EngineConfig,
}
CHAT_SETTINGS = {"conversation": ChatConfig, **GENERATE_SETTINGS}
BENCH_SETTINGS = {"server to test": TargetConfig, "load": BenchConfig}
BATCH_SETTINGS = {"batch": BatchConfig, "server to use": ClientConfig, "engine": EngineConfig}
"""What a command reads, by the titles in its help text."""

ALL_SETTINGS = tuple((SERVE_SETTINGS | CHAT_SETTINGS | BENCH_SETTINGS | BATCH_SETTINGS).values())

NAMES = frozenset(each.name for config_type in ALL_SETTINGS for each in settings_of(config_type))
"""Every key that a configuration file may have: one file serves all commands."""

OPS_VARIABLES = frozenset(
    variable_of(name) for name in ("cache", "cpu_isa", "cuda", "cxxflags", "delayed_updates", "ops")
)
KNOWN_VARIABLES = (
    frozenset(variable_of(name) for name in (CONFIG_NAME, *NAMES))
    | OPS_VARIABLES
    | frozenset(TRAINING_VARIABLES)
)


def add_settings(parser: argparse.ArgumentParser, settings: Mapping[str, type]) -> None:
    """Give a command's parser `--config` and a flag for each of its settings."""
    add_config_flag(parser)
    for title, config_type in settings.items():
        add_flags(parser, config_type, title)


def sources_of(given: argparse.Namespace, environ: Mapping[str, str]) -> Sources:
    """The sources of a command's settings. Raises ConfigurationError for a file that is wrong."""
    return Sources.of(given, environ, NAMES)


def warn_of_unknown_variables(environ: Mapping[str, str]) -> None:
    """Log a warning for each `COTTENTION_*` variable that nothing reads."""
    for message in unknown_variables(environ, KNOWN_VARIABLES):
        logger.warning("%s", message)
