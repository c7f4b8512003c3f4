"""The files of a batch, in OpenAI's format: lines of requests, and lines of their answers.

Both are JSON lines. The whole input is checked before anything is asked. The output of a run that
was killed is gone on with: lines are written one after the other, and only the last may be torn.
"""

import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import IO, Any

from cottention.engine.errors import ConfigurationError, CottentionError

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
LINE_BEGINS = b'{"id": "batch_req_'
"""With which every line of an output begins."""

MAX_NAMED = 5
"""Faults that are named where there are more."""


class BatchError(CottentionError):
    """A file of a batch that cannot be read or written any more while the batch runs."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A line of the input. url: of `ENDPOINTS`."""

    custom_id: str
    url: str
    body: Mapping[str, Any]

    @classmethod
    def of(cls, raw: bytes) -> "BatchRequest":
        """Raises ValueError, which says what is wrong."""
        try:
            fields = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is no JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError("it must be a JSON object")
        custom_id, method, url, body = (
            fields.get(name) for name in ("custom_id", "method", "url", "body")
        )
        if not isinstance(custom_id, str) or not custom_id:
            raise ValueError("custom_id must be a text that is not empty")
        if method != "POST":
            raise ValueError('method must be "POST"')
        if url not in ENDPOINTS:
            raise ValueError(f"url must be one of {', '.join(ENDPOINTS)}")
        if not isinstance(body, dict):
            raise ValueError("body must be an object")
        if body.get("stream"):
            raise ValueError("body.stream is not possible in a batch, whose answers are whole")
        return cls(custom_id, url, body)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a line of the input is: its number from 1, and its bytes."""

    number: int
    begin: int
    num_bytes: int


class BatchInput:
    """The requests of a file, by their custom_id. They are read again when it is their turn."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigurationError where the file cannot be read or is wrong."""
        self._path = path
        self.places: dict[str, Place] = {}
        faults: list[str] = []
        with self._opened(ConfigurationError) as file:
            for place, raw in _lines(file):
                try:
                    request = BatchRequest.of(raw)
                except ValueError as error:
                    faults.append(f"line {place.number}: {error}")
                    continue
                first = self.places.setdefault(request.custom_id, place)
                if first is not place:
                    name = json.dumps(request.custom_id)
                    faults.append(f"lines {first.number} and {place.number}: both are {name}")
        if faults:
            more = len(faults) - MAX_NAMED
            also = f"; and {more} more" if more > 0 else ""
            raise ConfigurationError(f"{path}: {'; '.join(faults[:MAX_NAMED])}{also}")
        if not self.places:
            raise ConfigurationError(f"{path} has no requests")

    def requests(self, done: Mapping[str, Any]) -> Iterator[BatchRequest]:
        """Those that are not in `done`, in the order of the file. Raises BatchError."""
        with self._opened(BatchError) as file:
            for custom_id, place in self.places.items():
                if custom_id in done:
                    continue
                file.seek(place.begin)
                try:
                    request = BatchRequest.of(file.read(place.num_bytes))
                except ValueError:
                    request = None
                if request is None or request.custom_id != custom_id:
                    raise BatchError(f"{self._path} was changed while its requests were made")
                yield request

    @contextlib.contextmanager
    def _opened(self, fault: type[CottentionError]) -> Iterator[IO[bytes]]:
        """Raises `fault` where the file cannot be read."""
        try:
            with self._path.open("rb") as file:
                yield file
        except OSError as error:
            raise fault(
                f"{self._path} cannot be read: {error.strerror}; give --input-file a file that this"
                " process may read"
            ) from None


def _lines(file: IO[bytes]) -> Iterator[tuple[Place, bytes]]:
    """The lines that are not empty."""
    begin = 0
    for number, raw in enumerate(file, 1):
        if raw.strip():
            yield Place(number, begin, len(raw)), raw
        begin += len(raw)


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """An answer of the server. body: its JSON."""

    status: int
    request_id: str
    body: Any

    @property
    def has_failed(self) -> bool:
        """Whether it is an error."""
        return self.status >= 400


class BatchOutput:
    """The file of the answers, which one run writes at a time.

    done: by custom_id, whether the request has failed.
    """

    def __init__(self, path: Path, file: IO[bytes], done: dict[str, bool]) -> None:
        self._path = path
        self._file = file
        self.done = done

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path, custom_ids: Mapping[str, Any]) -> Iterator["BatchOutput"]:
        """Go on with a file, or begin it. A last line that was torn is taken away.

        custom_ids: those of the input. Raises ConfigurationError for a file that cannot be written,
        and for one that is no output of this input, which is left as it is.
        """
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("ab", buffering=0))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                done, size = _read_done(path, custom_ids)
                file.truncate(size)
            except BlockingIOError:
                raise ConfigurationError(f"another run writes {path}") from None
            except OSError as error:
                raise ConfigurationError(
                    f"{path} cannot be written: {error.strerror}; give --output-file a file, or a"
                    " new name, in a folder that this process may write to"
                ) from None
            yield cls(path, file, done)

    @property
    def num_failed(self) -> int:
        """Requests that have failed, of earlier runs as well."""
        return Counter(self.done.values())[True]

    def write(self, custom_id: str, answer: BatchAnswer) -> None:
        """Add an answer. Raises BatchError."""
        line = {
            "id": f"batch_req_{token_hex(12)}",
            "custom_id": custom_id,
            "response": {
                "status_code": answer.status,
                "request_id": answer.request_id,
                "body": answer.body,
            },
            "error": None,
        }
        raw = memoryview(json.dumps(line).encode() + b"\n")
        try:
            while raw:
                raw = raw[os.write(self._file.fileno(), raw) :]
        except OSError as error:
            raise BatchError(f"{self._path} cannot be written: {error.strerror}") from None
        self.done[custom_id] = answer.has_failed


def _read_done(path: Path, custom_ids: Mapping[str, Any]) -> tuple[dict[str, bool], int]:
    """What a file has of this batch, and the bytes of its whole lines."""
    done: dict[str, bool] = {}
    size = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                head = min(len(raw), len(LINE_BEGINS))
                if raw[:head] != LINE_BEGINS[:head]:
                    raise _foreign(path, number, "it is no line of a batch's output")
                break
            custom_id, has_failed = _answered(raw, path, number)
            if custom_id not in custom_ids:
                raise _foreign(path, number, f"the input has no custom_id {json.dumps(custom_id)}")
            if custom_id in done:
                raise _foreign(path, number, f"{json.dumps(custom_id)} is there twice")
            done[custom_id] = has_failed
            size += len(raw)
    return done, size


def _answered(raw: bytes, path: Path, number: int) -> tuple[str, bool]:
    """The custom_id of a line of the output, and whether it is an error."""
    try:
        line = json.loads(raw)
        custom_id, response = line["custom_id"], line["response"]
        return str(custom_id), response is None or int(response["status_code"]) >= 400
    except (ValueError, LookupError, TypeError):
        raise _foreign(path, number, "it is no line of a batch's output") from None


def _foreign(path: Path, number: int, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is no output of this input; line {number}: {why}. Give another file, or remove it"
    )


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths are one file."""
    return one.exists() and other.exists() and one.samefile(other)
