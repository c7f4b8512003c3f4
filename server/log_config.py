"""How the log is written: lines for people, or a JSON object a line for machines.

Owns the two forms. Does not know what is logged.
"""

import json
import logging
from typing import Any, Literal

LogFormat = Literal["text", "json"]

FIELDS = "fields"
"""The attribute of a record that holds names and values beside its message."""


def set_up(level: str, form: LogFormat) -> None:
    """Write what is logged from now on to standard error, and what libraries warn of."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else Lines())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)


class Lines(logging.Formatter):
    """`2026-01-01 00:00:00,000 INFO message name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without what an exception adds."""
        told = (f" {name}={_shown(value)}" for name, value in _fields(record).items())
        return super().formatMessage(record) + "".join(told)


class JsonLines(logging.Formatter):
    """`{"time": ..., "level": ..., "message": ..., "name": value}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever is in it."""
        told = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told | _fields(record), default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, FIELDS, {})


def _shown(value: Any) -> str:
    """A value that cannot be taken for two, nor for a line of its own."""
    return value if isinstance(value, str) and value.isalnum() else json.dumps(value)
