"""Events as a client by hand reads them: ids and data, from a text or from a socket."""

import json
import socket
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Told:
    """One event."""

    id: str
    data: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)


def read_told(text: str) -> list[Told]:
    """Every event, comments left out; each must be whole."""
    *blocks, last = text.split("\n\n")
    assert last == "", last
    return [told_of(block) for block in blocks if not block.startswith(":")]


def told_of(block: str) -> Told:
    fields = dict(line.split(": ", 1) for line in block.split("\n"))
    return Told(fields.get("id", ""), fields["data"])


def read_events(sock: socket.socket, num: int) -> list[Told]:
    """The first so many events of an answer in chunks, as they come, read byte by byte.

    What came with them and is not asked for is lost, as it is with a client that is gone.
    """
    told: list[Told] = []
    file = sock.makefile("rb")
    while file.readline() != b"\r\n":  # the head
        pass
    unread = b""
    while len(told) < num:
        size = int(file.readline(), 16)
        assert size, f"the stream ended after {told}"
        unread += file.read(size)
        assert file.readline() == b"\r\n"
        *blocks, unread = unread.split(b"\n\n")
        told += [told_of(block.decode()) for block in blocks if not block.startswith(b":")]
    file.close()
    return told[:num]


def text_of(told: list[Told]) -> str:
    """What the events of a completion say together."""
    return "".join(
        choice["text"]
        for each in told
        if each.data != "[DONE]"
        for choice in each.json.get("choices", [])
    )
