"""A conversation with a server: its turns, and its branches, each a session of the server."""

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cottention.engine.errors import CottentionError
from cottention.server.client.client import Client, RemoteError

SESSIONS = "/v1/sessions"
FIRST_BRANCH = "main"


class ConversationError(CottentionError):
    """A command that cannot be done."""


@dataclass(slots=True)
class Branch:
    """A session, how many tokens it holds, and the oldest that it still depends on."""

    session_id: str
    position: int = 0
    context_start: int = 0


class Conversation:
    """Turns in the current branch; `finish_reason` is that of the last answer."""

    def __init__(
        self,
        client: Client,
        *,
        is_chat: bool,
        parameters: Mapping[str, Any],
        system: str | None = None,
    ) -> None:
        """Opens a session.

        is_chat: what is said becomes a user's message; else it is text that the model continues.
        parameters: of every turn. system: the first message of a chat. Raises RemoteError.
        """
        self._client = client
        self._is_chat = is_chat
        self._parameters = dict(parameters)
        self._system = system
        self.finish_reason: str | None = None
        opened = client.post(SESSIONS, {"metadata": {"name": FIRST_BRANCH}})
        self.branches = {FIRST_BRANCH: _branch(opened)}
        self.name = FIRST_BRANCH

    @property
    def branch(self) -> Branch:
        """The current one."""
        return self.branches[self.name]

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the answer, as they come. Raises RemoteError."""
        branch, self.finish_reason = self.branch, None
        turn = {"session_id": branch.session_id, "on_conflict": "wait"}
        try:
            for chunk in self._client.events(*self._request(text, turn)):
                if "session" in chunk:
                    branch.position = chunk["session"]["position"]
                    branch.context_start = chunk["session"]["context_start"]
                for choice in choices_of(chunk):
                    self.finish_reason = choice.get("finish_reason") or self.finish_reason
                    yield text_of(choice)
        finally:
            if self.finish_reason is None:  # it broke off: what the session keeps is not known
                with suppress(RemoteError):
                    self._refresh(branch)

    def _request(self, text: str, more: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        system = None if self.branch.position else self._system
        return request_of(text, self._is_chat, system, self._parameters | dict(more))

    def stop(self) -> None:
        """End the running answer, from any thread: the stream ends with what there is."""
        client = Client(self._client.url, self._client.key)
        path = f"{SESSIONS}/{self.branch.session_id}/cancel"

        def cancel() -> None:
            with suppress(RemoteError):
                client.post(path)
            client.close()

        threading.Thread(target=cancel, daemon=True).start()

    def fork(self, name: str | None) -> str:
        """Go on in a copy of the current branch; returns its name."""
        name = self._new_name(name or f"branch-{len(self.branches)}")
        path = f"{SESSIONS}/{self.branch.session_id}/fork"
        [copy] = self._client.post(path, {"n": 1, "metadata": {"name": name}})["data"]
        self._add(name, copy)
        return name

    def switch(self, name: str) -> None:
        """Go on in another branch."""
        if name not in self.branches:
            known = ", ".join(self.branches)
            raise ConversationError(f"there is no branch {name}; there are {known}")
        self.name = name

    def rewind(self, turns: int) -> None:
        """Undo the last turns of the branch, as many as can be."""
        for _ in range(turns):
            found = self._client.post(f"{SESSIONS}/{self.branch.session_id}/rewind")
            self.branches[self.name] = _branch(found)

    def save(self, path: Path) -> int:
        """Write the branch to a file, whole or not at all; returns its size in bytes."""
        pieces = self._client.download(f"{SESSIONS}/{self.branch.session_id}/snapshot")
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                try:
                    for piece in pieces:
                        file.write(piece)
                    file.flush()
                    os.replace(file.name, path)
                    return file.tell()
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            raise ConversationError(f"{path} cannot be written: {error.strerror}") from None

    def load(self, path: Path) -> str:
        """Go on in a branch that a file holds; returns its name."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConversationError(f"{path} cannot be read: {error.strerror}") from None
        found = self._client.upload(f"{SESSIONS}/import", content)
        name, number = path.stem, 1
        while name in self.branches:
            number += 1
            name = f"{path.stem}-{number}"
        self._add(name, found)
        return name

    def close(self) -> None:
        """Delete the sessions, whose turns are cancelled."""
        for branch in self.branches.values():
            with suppress(RemoteError):
                self._client.delete(f"{SESSIONS}/{branch.session_id}?cancel=true")

    def _new_name(self, name: str) -> str:
        if name in self.branches:
            raise ConversationError(f"there is a branch {name} already; choose another name")
        return name

    def _add(self, name: str, session: Any) -> None:
        self.branches[name] = _branch(session)
        self.name = name

    def _refresh(self, branch: Branch) -> None:
        found = _branch(self._client.get(f"{SESSIONS}/{branch.session_id}"))
        branch.position, branch.context_start = found.position, found.context_start


def request_of(
    text: str, is_chat: bool, system: str | None, parameters: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Path and body of a streamed request that says `text`."""
    body = {**parameters, "stream": True}
    if not is_chat:
        return "/v1/completions", body | {"prompt": text}
    messages = [] if system is None else [{"role": "system", "content": system}]
    return "/v1/chat/completions", body | {"messages": [*messages, user_message(text)]}


def user_message(text: str) -> dict[str, str]:
    """What a user says."""
    return {"role": "user", "content": text}


def choices_of(chunk: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The choices of a chunk, of which that of the usage has none."""
    choices = chunk.get("choices")
    return [each for each in choices if isinstance(each, dict)] if isinstance(choices, list) else []


def text_of(choice: Mapping[str, Any]) -> str:
    """The text of a chunk's choice, of either endpoint."""
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def _branch(session: Mapping[str, Any]) -> Branch:
    return Branch(session["id"], session["position"], session["context_start"])
