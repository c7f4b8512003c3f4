"""What the text of a choice has to be: a JSON value, a pattern's match, one of some texts, calls.

Specifications are values: two that are equal are compiled once.
"""

from dataclasses import dataclass, field
from typing import Literal

StructureKind = Literal["json_schema", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class TextStructure:
    """A text that a schema, a pattern or a grammar describes as a whole.

    kind: json_schema, `text` is a JSON schema; regex, a regular expression that the whole text
    matches; choice, a JSON list of texts; grammar, a grammar in Lark's or llama.cpp's syntax.
    whitespace: a regular expression for the white space between the parts of a JSON value; None
    is one space after a comma and a colon, as Python's json writes it.
    param: the request's field that errors name.
    """

    kind: StructureKind
    text: str
    whitespace: str | None = None
    param: str = field(default="structured_outputs", compare=False)

    @property
    def size(self) -> int:
        """Characters of its description."""
        return len(self.text) + len(self.whitespace or "")


@dataclass(frozen=True, slots=True)
class Call:
    """One kind of call: `begin`, a JSON value of `schema`, `end`."""

    begin: str
    schema: str
    end: str


@dataclass(frozen=True, slots=True)
class CallStructure:
    """Calls of functions, which a text has to have or may have.

    The calls are `opening`, a call or several with `separator` between them, `closing`. Spellings
    of special tokens in these texts stand for the tokens.
    trigger: in a text that may do without calls, the text with which they begin; empty where the
    calls are required. follows_text: whether the calls may come after other text; else a text that
    begins with the trigger has calls.
    """

    calls: tuple[Call, ...]
    opening: str = ""
    separator: str = ""
    closing: str = ""
    trigger: str = ""
    follows_text: bool = False
    is_parallel: bool = True
    param: str = field(default="tools", compare=False)

    @property
    def size(self) -> int:
        """Characters of its description."""
        return sum(len(call.begin) + len(call.schema) + len(call.end) for call in self.calls)


StructuredOutput = TextStructure | CallStructure
