"""How log records are written to standard error: as text lines or as JSON objects, one per line."""

import json
import logging
from typing import Any, Literal

LogFormat = Literal["text", "json"]

FIELDS = "fields"
"""The attribute of a log record with names and values beside its message."""


def configure_logging(level: str, log_format: LogFormat) -> None:
    """Write log records and the warnings of libraries to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each request that is relayed
    logging.getLogger("uvicorn.error").addFilter(_is_not_cut)


def _is_not_cut(record: logging.LogRecord) -> bool:
    """Streams of turns that go on at another server are cut on purpose."""
    return record.msg != "ASGI callable returned without completing response."


class TextFormatter(logging.Formatter):
    """`2026-01-01 00:00:00,000 INFO message name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, before a traceback is added."""
        fields = (f" {name}={_quoted(value)}" for name, value in _fields(record).items())
        return super().formatMessage(record) + "".join(fields)


class JsonFormatter(logging.Formatter):
    """`{"time": ..., "level": ..., "message": ..., "name": value}`, with time in Unix seconds."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, a traceback included."""
        content = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content | _fields(record), default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, FIELDS, {})


def _quoted(value: Any) -> str:
    """A value without unquoted spaces, equals signs or line breaks."""
    return value if isinstance(value, str) and value.isalnum() else json.dumps(value)
