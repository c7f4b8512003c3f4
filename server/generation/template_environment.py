"""What chat templates may use: the tags, filters and functions that transformers gives them.

Those of `transformers.utils.chat_template_utils`, in Jinja's sandbox for immutable values.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationTag(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what a template marks as the model's own.

    Trainers learn from these parts alone. A call block as in transformers, so that variables have
    the same scope.
    """

    tags = {"generation"}  # noqa: RUF012  Jinja's own type

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def compile_template(source: str) -> Template:
    """Compile a template. Raises whatever Jinja and Python's compiler do, mostly TemplateError."""
    return _environment().from_string(source)


def literals_of(source: str) -> str:
    """The texts that are written in a template, with null characters between them."""
    tree = _environment().parse(source)
    texts = [each.data for each in tree.find_all(nodes.TemplateData)]
    texts += [each.value for each in tree.find_all(nodes.Const) if isinstance(each.value, str)]
    return "\0".join(texts)


def variables_of(source: str) -> set[str]:
    """The names that a template takes from outside."""
    return meta.find_undeclared_variables(_environment().parse(source))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape for HTML."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
