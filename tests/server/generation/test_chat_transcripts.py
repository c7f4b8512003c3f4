"""A chat in a session reads the same ids as one that is sent whole, however its answers end."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.server.config import ServerConfig
from cottention.server.generation.chat_template import ChatTemplate, find_template
from cottention.server.sessions.storage import open_sessions
from tests.server.live import Live, serving

SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")
ORDINARY = ("\n\n", "User:")

CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
BY_DEFAULT = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}\
{%- endif %}"""
LLAMA_2 = """\
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{- raise_exception('roles must alternate') }}{% elif m.role == 'user' %}\
{{- bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% else %}\
{{- ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
SYSTEM_FIRST = """\
{{- bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}\
{{- raise_exception('system must be first') }}{% endif %}{{ m.role + ': ' + m.content + '\n' }}\
{%- endfor %}"""


class Speech(NamedTuple):
    """A template, and the ids that every answer is made to have."""

    template: str
    drawn: tuple[str, ...]
    ends: str = "stop"


SPEECHES = {
    "plain, stop": Speech("plain", (" p", "\n\n", "User:")),
    "plain, length": Speech("plain", (" p", "a"), "length"),
    "ChatML, end": Speech(CHATML, ("p", "<|im_end|>")),
    "ChatML, length": Speech(CHATML, ("p", "<"), "length"),
    "system by default": Speech(BY_DEFAULT + CHATML, ("p", "<|im_end|>")),
    "Llama 2, end": Speech(LLAMA_2, (" p", " ", "</s>")),
    "Llama 2, length": Speech(LLAMA_2, (" p", "a"), "length"),
}


def model_folder(source: Path, folder: Path, template: str) -> str | None:
    """A model without a mind of its own, whose last ids are SPECIAL and ORDINARY.

    Gives the template to choose.
    """
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, more = tokenizer["model"]["vocab"], (*SPECIAL, *ORDINARY)
    first = 320 - len(more)
    tokenizer["model"]["vocab"] = {name: each for name, each in vocabulary.items() if each < first}
    del tokenizer["model"]["merges"][-len(more) :]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [
        {"id": each, "content": text, "special": text in SPECIAL, **flags}
        for each, text in enumerate(more, first)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    ends = [first + SPECIAL.index("<|im_end|>"), first + SPECIAL.index("</s>")]
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": ends}
    (folder / "config.json").write_text(json.dumps(config))
    weights = torch.load(folder / "pytorch_model.bin")
    for name in ("lm_head.weight", "lm_head.bias"):  # or it would not say what it is made to
        weights[name] *= 0
    torch.save(weights, folder / "pytorch_model.bin")
    own = {} if template == "plain" else {"chat_template": template}
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own | named))
    return None if own else template


class Chat:
    """A session, what was said in it, and the ids that it has."""

    def __init__(self, live: Live, template: ChatTemplate, drawn: Sequence[str]) -> None:
        self.live, self.template = live, template
        self.tokenizer = live.engine.tokenizer
        self.drawn = [self.tokenizer.encode(each) for each in drawn]
        self.session_id = live.opened()
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []

    def says(self, content: str, ends: str = "stop", role: str = "user", **more: Any) -> list[int]:
        """The ids that a turn reads. What is drawn is each of `drawn`, in this order."""
        new = {"role": role, "content": content}
        wishes = {str(each): 100 - 0.4 * place for place, (each,) in enumerate(self.drawn)}
        body = {"messages": [new], "session_id": self.session_id, "max_tokens": len(self.drawn)}
        body |= {"logit_bias": wishes, "presence_penalty": 2, "frequency_penalty": 2}
        body |= {"temperature": 0, "return_token_ids": True} | more
        read, drawn, text, reason = self._asked(body)
        assert reason == ends
        assert [[each] for each in drawn] == self.drawn
        self.messages += [new, {"role": "assistant", "content": text}]
        self.ids += read + drawn
        assert self.live.session(self.session_id)["position"] == len(self.ids)
        return read

    def _asked(self, body: dict[str, Any]) -> tuple[list[int], list[int], str, str]:
        answer = self.live.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        if not body.get("stream"):
            whole = answer.json()
            (choice,) = whole["choices"]
            ids = whole["prompt_token_ids"], choice["token_ids"]
            return *ids, choice["message"]["content"], choice["finish_reason"]
        blocks = [block.removeprefix("data: ") for block in answer.text.split("\n\n")]
        chunks = [json.loads(block) for block in blocks if block.startswith("{")]
        read = chunks[0]["prompt_token_ids"]
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        drawn = [each for choice in choices for each in choice.get("token_ids") or ()]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        return read, drawn, text, choices[-1]["finish_reason"]

    def whole(self, *more: str) -> list[int]:
        """The ids of all that was said, as the template writes it at once."""
        messages = [*self.messages, *({"role": "user", "content": each} for each in more)]
        text = self.template.render(messages, {"add_generation_prompt": True})
        ids: list[int] = self.tokenizer.encode(text)
        return ids


@contextlib.contextmanager
def chatting(source: Path, folder: Path, speech: Speech) -> Iterator[Chat]:
    choice = model_folder(source, folder, speech.template)
    engine = Engine(folder, EngineConfig(max_slots=2))
    template = find_template(choice, folder)
    assert template is not None
    settings = ServerConfig(session_dir=str(folder / "sessions"))
    with (
        open_sessions(engine, settings) as sessions,
        serving(engine, template, sessions) as live,
    ):
        yield Chat(live, template, speech.drawn)


@pytest.mark.parametrize("speech", SPEECHES.values(), ids=SPEECHES)
def test_turns_are_the_whole_chat(gptj_folder: Path, tmp_path: Path, speech: Speech) -> None:
    """Streamed turns and others; back at its beginning the session begins again."""
    with chatting(gptj_folder, tmp_path, speech) as chat:
        for said, is_streamed in (("hi", False), ("and?", True), ("so?", True), ("and so?", False)):
            past, expected = [*chat.ids], chat.whole(said)
            assert past + chat.says(said, speech.ends, stream=is_streamed) == expected
        for _ in range(4):
            chat.live.client.post(f"/v1/sessions/{chat.session_id}/rewind")
        chat.messages, chat.ids = [], []
        expected = chat.whole("anew")
        assert chat.says("anew", speech.ends) == expected


@pytest.mark.parametrize(
    ("speech", "reads"),
    [
        (Speech("plain", (" p", "\n", "User:")), " hi\n\nAssistant:"),
        (Speech(LLAMA_2, (" p", "</s>")), "<s>[INST] hi [/INST]"),
    ],
)
def test_an_end_token_sampled_after_less_space_is_not_repeated(
    gptj_folder: Path, tmp_path: Path, speech: Speech, reads: str
) -> None:
    with chatting(gptj_folder, tmp_path, speech) as chat:
        chat.says("hi")
        assert chat.says("hi") == chat.tokenizer.encode(reads)


def test_messages_that_come_first_alone_are_read_as_such(gptj_folder: Path, tmp_path: Path) -> None:
    with chatting(gptj_folder, tmp_path, Speech(SYSTEM_FIRST, ("p",), "length")) as chat:
        assert chat.says("hi", "length") == chat.tokenizer.encode("<s>user: hi\n")
        read = chat.says("be brief", "length", role="system")
        assert read == chat.tokenizer.encode("system: be brief\n")
        assert chat.says("and?", "length") == chat.tokenizer.encode("\nuser: and?\n")
