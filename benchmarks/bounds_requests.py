"""Requests that take each field of the API to its documented maximum, made from /openapi.json.

A field without a maximum is as large as its place allows: a body of --max-body-bytes, or a target
of a few KiB. What is added to the description is in here without a change.
"""

import json
from collections.abc import Iterator, Mapping
from string import Formatter
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

Schema = dict[str, Any]

LARGE_NUMBER = 2**31 - 1
TARGET_BYTES = 8_000
"""Of a path or a query, whose head may have 64 KiB."""

UNKNOWN = "unknown"

JSON, OCTETS = "application/json", "application/octet-stream"
TEXT = "a word or two, "
"""What long strings are made of."""


class Asked(NamedTuple):
    """One request. label: its verb, path and field, for the table."""

    label: str
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


class Description:
    """An OpenAPI description, and what its fields are filled with."""

    def __init__(
        self, description: Schema, max_body_bytes: int, paths: Mapping[str, str], snapshot: bytes
    ) -> None:
        """paths: values of parameters in paths, the others name nothing that there is. snapshot: a
        valid body of an import.
        """
        self._description = description
        self._max_bytes = max_body_bytes - 1000
        self._paths = paths
        self._snapshot = snapshot

    def requests(self) -> Iterator[Asked]:
        """For each verb of each path: as its example is, with each field at its maximum, and with
        all numbers at theirs together.
        """
        for path, operations in self._description["paths"].items():
            for method, operation in operations.items():
                yield from self._of(path, method.upper(), operation)

    def _of(self, path: str, method: str, operation: Schema) -> Iterator[Asked]:
        label = f"{method} {path}"
        names = (each[1] for each in Formatter().parse(path) if each[1])
        paths = dict.fromkeys(names, UNKNOWN) | dict(self._paths)
        target, body, kind = path.format(**paths), b"", {}
        content = operation.get("requestBody", {}).get("content", {})
        if JSON in content:
            kind = {"content-type": JSON}
        elif OCTETS in content:
            kind, body = {"content-type": OCTETS}, self._snapshot
        for parameter in operation.get("parameters", []):
            name, place = parameter["name"], parameter["in"]
            for value in self._values(parameter["schema"], TARGET_BYTES):
                text = value if isinstance(value, str) else json.dumps(value)
                here = f"{label} {name}"
                if place == "query":
                    yield Asked(here, method, f"{target}?{urlencode({name: text})}", kind, body)
                elif place == "path":
                    long = path.format(**{**paths, name: quote(text, safe="")})
                    yield Asked(here, method, long, kind, body)
                else:
                    yield Asked(here, method, target, {**kind, name: text}, body)
        if JSON not in content:
            yield Asked(label, method, target, kind, body)
            if OCTETS in content:
                zeros = self._snapshot + bytes(self._max_bytes)
                yield Asked(f"{label} (longer)", method, target, kind, zeros)
            return
        for schema in self._alternatives(content[JSON]["schema"]):
            for field, fields in self._bodies(schema):
                raw = json.dumps(fields, ensure_ascii=False).encode()
                yield Asked(f"{label} {field}".strip(), method, target, kind, raw)

    def _bodies(self, schema: Schema) -> Iterator[tuple[str, dict[str, Any]]]:
        properties: Schema = schema.get("properties", {})
        base = {
            name: small
            for name in ("prompt", "messages", "tokens", *schema.get("required", []))
            if name in properties and (small := self._small(properties[name])) is not None
        }
        if "max_tokens" in properties:
            base["max_tokens"] = 16
        yield "", base
        numbers: dict[str, Any] = {}
        for name, field in properties.items():
            for value in self._values(field, self._max_bytes):
                yield name, base | {name: value}
                if _is_count(value) and name != "max_tokens":
                    numbers[name] = value
        if len(numbers) > 1:
            yield "(all numbers)", base | numbers
            several = ("n", "best_of", "logprobs", "top_logprobs", "prompt_logprobs")
            together = {name: numbers[name] for name in several if name in numbers}
            for name in ("prompt", "messages"):
                if name in properties and together:
                    longest = [*self._values(properties[name], self._max_bytes)][-1]
                    some = {"logprobs": True} if "top_logprobs" in together else {}
                    yield (
                        f"({name} and {', '.join(together)})",
                        (base | together | some | {name: longest}),
                    )

    def _alternatives(self, schema: Schema) -> Iterator[Schema]:
        """The schemas that a value may have, without null."""
        schema = self._resolved(schema)
        if "anyOf" in schema:
            for each in schema["anyOf"]:
                yield from self._alternatives(each)
        elif schema.get("type") != "null":
            yield schema

    def _resolved(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            found = self._description
            for part in schema["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            schema = found
        return schema

    def _small(self, schema: Schema) -> Any:
        """A value that is valid, and as small as there is."""
        first = next(self._alternatives(schema), None)
        if first is None:
            return None
        match first:
            case {"enum": [value, *_]} | {"const": value}:
                return value
            case {"type": "array", "items": dict(item)} if item:
                return [self._small(item)]
            case {"type": "array"}:
                return []
            case {"type": "object"}:
                properties = first.get("properties", {})
                return {name: self._small(properties[name]) for name in first.get("required", [])}
            case {"type": "string"}:
                return "def"
            case {"type": "integer" | "number"}:
                return max(1, first.get("minimum", 1))
        return True

    def _values(self, schema: Schema, max_bytes: int) -> Iterator[Any]:
        """The largest value of each kind that a field may have."""
        for each in self._alternatives(schema):
            yield from self._largest(each, max_bytes)

    def _largest(self, schema: Schema, max_bytes: int) -> Iterator[Any]:
        match schema:
            case {"enum": values}:
                yield values[-1]
            case {"const": value}:
                yield value
            case {"type": "boolean"}:
                yield True
            case {"type": "integer" | "number"}:
                yield schema.get("maximum", LARGE_NUMBER)
            case {"type": "string"}:
                num = min(schema.get("maxLength", max_bytes), max_bytes)
                yield (TEXT * (num // len(TEXT) + 1))[:num]
            case {"type": "array"}:
                yield from self._lists(schema, max_bytes)
            case {"type": "object"}:
                yield from self._objects(schema, max_bytes)
            case _ if "type" not in schema:  # anything may be here
                yield from self._largest({"type": "string"}, max_bytes)
                yield from self._lists({"items": {"type": "array", "items": {}}}, max_bytes)

    def _lists(self, schema: Schema, max_bytes: int) -> Iterator[Any]:
        """As many small elements as there may be: equal ones, and of numbers also distinct ones."""
        item = self._small(schema.get("items", {"type": "integer"}))
        num = min(schema.get("maxItems", max_bytes), max_bytes // (len(json.dumps(item)) + 2))
        yield [item] * num
        if type(item) is int:
            num = min(num, max_bytes // 12)
            yield [n % 256 for n in range(num)]

    def _objects(self, schema: Schema, max_bytes: int) -> Iterator[Any]:
        for name, field in schema.get("properties", {}).items():
            small = {
                each: self._small(schema["properties"][each]) for each in schema.get("required", [])
            }
            for value in self._values(field, max_bytes - 100):
                yield small | {name: value}
        inner = schema.get("additionalProperties", "properties" not in schema)
        if inner is True:
            inner = {"type": "string"}
        if inner:
            for value in self._values(inner, min(500, max_bytes)):
                size = len(json.dumps(value)) + 14
                num = min(schema.get("maxProperties", max_bytes), max_bytes // size)
                yield {str(n): value for n in range(num)}


def _is_count(value: Any) -> bool:
    return type(value) is int and value < LARGE_NUMBER
