"""The process's limit of open files: raised at the start, and shared out among connections."""

import logging
import resource

from cottention.engine.errors import ConfigurationError
from cottention.server.config import ServerConfig
from cottention.server.http.connections import ConnectionTable

logger = logging.getLogger("cottention")

RESERVED_FILES = 96
"""Descriptors that neither connections nor reads of sessions get: of the store and its writers, the
model and logs, and of connections that are refused."""

DEFAULT_MAX_CONNECTIONS = 1024
MIN_CONNECTIONS = 16


def raise_open_files_limit() -> int:
    """Raise the soft limit of open files to the hard one; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logger.warning("the limit of open files stays at %d: %s", soft, error)
        return soft
    logger.info("raised the limit of open files from %d to %s", soft, _shown(hard))
    return hard


def connection_table(config: ServerConfig, max_files: int) -> ConnectionTable:
    """The table of connections of these settings. max_files: the limit of open files.

    Clients of a unix socket have no addresses: they count as one.

    ConfigurationError: the limit leaves too few files for connections.
    """
    reserved = RESERVED_FILES + config.max_session_reads
    allowed = DEFAULT_MAX_CONNECTIONS if max_files < 0 else max_files - reserved
    wanted = config.max_connections
    if allowed < (wanted or MIN_CONNECTIONS):
        flag = f"--max-connections {wanted}" if wanted else f"{MIN_CONNECTIONS} connections"
        raise ConfigurationError(
            f"{flag} and {reserved} files of the server itself are more than the limit of"
            f" open files, {max_files}: raise that with ulimit -n"
        )
    max_connections = wanted or min(DEFAULT_MAX_CONNECTIONS, allowed)
    share = max_connections if config.uds else max(1, max_connections // 2)
    max_per_address = config.max_connections_per_address or share
    return ConnectionTable(max_connections, max_per_address)


def _shown(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
