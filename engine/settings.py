"""A setting declared once: default, help, unit and lower bound. Knows no command line."""

from dataclasses import Field, field, fields
from typing import Any, get_args

from cottention.engine.errors import ConfigurationError


def option(
    default: Any, help: str, *, minimum: float | None = None, unit: str | None = None
) -> Any:
    """A setting's default, help text, unit and lower bound, in one place."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "unit": unit})


def check_options(config: Any) -> None:
    """Check every `option` of a configuration against its type's choices and its lower bound."""
    for item in fields(config):
        _check_option(item, getattr(config, item.name))


def _check_option(item: Field[Any], value: Any) -> None:
    flag = "--" + item.name.replace("_", "-")
    choices = get_args(item.type) if isinstance(item.default, str) else ()
    if choices and value not in choices:
        raise ConfigurationError(f"{flag} must be one of {', '.join(choices)}; it is {value!r}")
    minimum = item.metadata.get("minimum")
    if minimum is not None and value is not None and value < minimum:
        raise ConfigurationError(f"{flag} must be at least {minimum}; it is {value!r}")
