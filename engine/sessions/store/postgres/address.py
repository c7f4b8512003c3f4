"""The address of a database, and the password that must not be in it. Needs no psycopg."""

from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from cottention.engine.errors import ConfigurationError


def check_address(url: str) -> None:
    """ConfigurationError for what is no address of a PostgreSQL, or has a password in it.

    Other users of the machine see a process's arguments, and logs and `cottention config` the
    configuration. The message repeats nothing of the address.
    """
    try:
        parts = urlsplit(url)
        query = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
        has_password = parts.password is not None or any("password" in name for name in query)
    except ValueError:
        parts, has_password = urlsplit(""), False
    if parts.scheme not in ("postgresql", "postgres"):
        raise ConfigurationError(
            "--session-store must be an address like postgresql://user@host:5432/database"
        )
    if has_password:
        raise ConfigurationError(
            "--session-store must not have a password in it, where others can see it: use"
            " --session-store-password-file, or the variables PGPASSWORD or PGPASSFILE"
        )


def read_password(path: str) -> str:
    """The first line of a file. ConfigurationError: it cannot be read, or is empty."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigurationError(
            f"--session-store-password-file {path} cannot be read: {reason}"
        ) from error
    if not lines or not lines[0]:
        raise ConfigurationError(f"--session-store-password-file {path} has no password in it")
    return lines[0]
