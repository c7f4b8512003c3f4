"""Chat templates: where they are found, what they may use, what stops them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.errors import ConfigurationError
from cottention.engine.text.tokenizer import Tokenizer
from cottention.server.cli import main as cli
from cottention.server.generation import chat_template as templates
from cottention.server.generation.chat_template import (
    ChatTemplate,
    ChatTemplateError,
    UnusableTemplate,
    find_template,
    render_after,
)
from cottention.server.generation.template_files import PLAIN

MESSAGES = [{"role": "user", "content": "hi <b>"}]


def folder(path: Path, **config: Any) -> Path:
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def usable(choice: str | None, path: Path) -> ChatTemplate:
    template = find_template(choice, path)
    assert isinstance(template, ChatTemplate)
    return template


def found(source: str, path: Path, **config: Any) -> ChatTemplate:
    return usable(None, folder(path, chat_template=source, **config))


def test_none_where_the_folder_has_none(tmp_path: Path) -> None:
    assert find_template(None, tmp_path) is None
    assert find_template(None, folder(tmp_path)) is None


def test_the_folder_s_own(tmp_path: Path) -> None:
    template = found("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", tmp_path)
    assert template.render(MESSAGES, {}) == "hi <b>"
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    template = found("{{ bos_token }}{{ eos_token }}", tmp_path, **config)
    assert template.render(MESSAGES, {}) == "<s></s>"


def test_a_file_of_its_own_goes_before_the_configuration(tmp_path: Path) -> None:
    folder(tmp_path, chat_template="config")
    (tmp_path / "chat_template.jinja").write_text("file")
    template = usable(None, tmp_path)
    assert template.render(MESSAGES, {}) == "file"


def test_named_ones_are_chosen_by_name(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]
    folder(tmp_path, chat_template=named)
    for choice, says in ((None, "d"), ("rag", "r")):
        template = usable(choice, tmp_path)
        assert template.render(MESSAGES, {}) == says


def test_the_plain_one(tmp_path: Path) -> None:
    template = usable("plain", tmp_path)
    past = [{"role": "system", "content": "Be brief.\n"}, *MESSAGES]
    assert template.render(past, {"add_generation_prompt": True}) == (
        "System: Be brief.\n\nUser: hi <b>\n\nAssistant:"
    )
    assert template.stop == ("\nUser:",)


def test_a_file_is_chosen_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("mine")
    template = usable(str(tmp_path / "mine.jinja"), tmp_path)
    assert template.render(MESSAGES, {}) == "mine"


ONCE = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
EACH = """\
{%- for m in messages %}
{{- (bos_token ~ '[' if m.role == 'user' else ' ') ~ m.content ~ (']' if m.role == 'user' else '')}}
{%- endfor %}"""
PICKY = "{{ bos_token }}{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}"


@pytest.mark.parametrize(
    ("source", "opening"), [(ONCE, "<s>"), (EACH, ""), (PICKY, "<s>"), ("<s>", "<s>")]
)
def test_what_begins_a_conversation_and_no_later_turn(
    source: str, opening: str, tmp_path: Path
) -> None:
    assert found(source, tmp_path, bos_token="<s>").opening == opening
    assert found(source, tmp_path).opening == ""


BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "follows"),
    [
        (PLAIN, ("\n\nUser: hi <b>\n\n", "\n\nUser: ")),
        (ONCE, ("][hi <b>]", "][")),
        (EACH, ("<s>[hi <b>]", "<s>[")),
        (BARE, ("hi <b>", "")),
        (BARE * 2, None),
        (PICKY, None),
        ("{{ messages[-1].content }}", None),
        ("{{ messages[1].content }}", None),
        ("<s>", None),
    ],
)
def test_what_follows_an_assistant_s_message(
    source: str, follows: tuple[str, str] | None, tmp_path: Path
) -> None:
    after = render_after(found(source, tmp_path, bos_token="<s>"), MESSAGES, {})
    assert (after and (after[0].text, after[1])) == follows


@pytest.mark.parametrize(("choice", "says"), [("nowhere", "nor one of: plain"), (".", "neither")])
def test_a_choice_that_is_nothing(choice: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=says):
        find_template(choice, tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("chat_template.jinja", b"{% for %}", "chat_template.jinja is not a valid template"),
        ("chat_template.jinja", b"{% unknown %}", "unknown tag 'unknown'"),
        ("chat_template.jinja", b"\xff\xfe{", "chat_template.jinja cannot be read"),
        ("chat_template.jinja", b"{% for a in b %}" * 50 + b"{% endfor %}" * 50, "nested"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template in .* is neither text"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}', "is neither text nor"),
        ("tokenizer_config.json", b'{"chat_template": "{{"}', "is not a valid template"),
    ],
)
def test_a_damaged_template_stops_chats_alone(
    file: str, content: bytes, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line names the file and the reason; another template can be chosen."""
    (tmp_path / file).write_bytes(content)
    template = find_template(None, tmp_path)
    assert isinstance(template, UnusableTemplate)
    assert str(tmp_path / file) in template.reason
    (record,) = caplog.records
    assert re.search(says, record.getMessage())
    assert template.reason in record.getMessage()
    assert "\n" not in record.getMessage()
    assert usable("plain", tmp_path).stop


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "content",
    [
        *(b'{"chat_template": ', b"[]", "{}".encode("utf-16"), b'{"a": "\xe9"}', b"[" * 100_000),
        *(b'{"a": 1, "a": 2}', b'{"eos_token": 5}', b'{"extra_special_tokens": [7]}'),
    ],
)
def test_a_damaged_file_that_two_sides_read_is_one_line(
    file: str,
    content: bytes,
    gptj_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The engine and the chat template read it; without this, users would see each fault twice."""
    model = tmp_path / "model"
    shutil.copytree(gptj_folder, model)
    (model / file).write_bytes(content)
    assert find_template(None, model) is None
    Tokenizer.from_folder(model)
    (message,) = caplog.messages
    assert str(model / file) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("é".encode("latin-1"), "it is not UTF-8 at byte 0"),
        ("x".encode("utf-16"), "it is UTF-16"),
        ("x".encode("utf-16-le"), "it has zero bytes"),
        (None, "is a link to a file that does not exist"),
    ],
)
def test_a_template_file_that_is_no_text_says_why(
    content: bytes | None, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "chat_template.jinja"
    if content is None:
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes(content)
    template = find_template(None, tmp_path)
    assert isinstance(template, UnusableTemplate)
    (message,) = caplog.messages
    assert str(path) in message
    assert says in message
    assert "\n" not in message
    if content is not None:
        with pytest.raises(ConfigurationError, match=f"--chat-template: {path} .*{says}"):
            find_template(str(path), tmp_path / "other")


def test_tokens_of_a_list_are_no_variables(tmp_path: Path) -> None:
    """A token that is spelt `tools` must not look like a tool to the template."""
    extra = {"additional_special_tokens": ["tools", "<x>"], "bos_token": "<s>"}
    template = found("{{ bos_token }}{{ tools is none }}", tmp_path, **extra)
    assert template.render(MESSAGES, {}) == "<s>True"


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_as_windows_writes_them(bom: bytes, end: str, tmp_path: Path) -> None:
    source = end.join(("{{ bos_token }}", "{% if true %}", "x{% endif %}"))
    config = json.dumps({"bos_token": "<s>", "chat_template": source}, indent=1)
    (tmp_path / "tokenizer_config.json").write_bytes(bom + config.replace("\n", end).encode())
    assert usable(None, tmp_path).render(MESSAGES, {}) == "<s>\nx"
    for file, choice in (
        ("chat_template.jinja", None),
        ("mine.jinja", str(tmp_path / "mine.jinja")),
    ):
        (tmp_path / file).write_bytes(bom + source.encode())
        assert usable(choice, tmp_path).render(MESSAGES, {}) == "<s>\nx"


def test_newer_folders_have_a_file_for_each_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder(tmp_path, chat_template="config")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    assert find_template(None, tmp_path) is None, "files go before the configuration"
    assert usable("tool_use", tmp_path).render(MESSAGES, {}) == "t"
    (tmp_path / "chat_template.jinja").write_text("d")
    assert usable(None, tmp_path).render(MESSAGES, {}) == "d"
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_bytes(b"\xff")
    assert usable(None, tmp_path).render(MESSAGES, {}) == "d"
    assert "rag.jinja cannot be read" in caplog.text


NAMES = "{{ bos_token }},{{ eos_token }},{{ pad_token }},{{ image_token }}"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, ",,,"),
        ({"tokenizer_config": {"bos_token": "<a>", "image_token": "<i>"}}, "<a>,,,<i>"),
        (
            {
                "tokenizer_config": {"bos_token": "<a>", "pad_token": "<p>"},
                "special_tokens_map": {"bos_token": {"content": "<b>"}, "pad_token": None},
            },
            "<b>,,,",
        ),
        (
            {
                "tokenizer_config": {"bos_token": "<a>", "added_tokens_decoder": {}},
                "special_tokens_map": {"bos_token": "<b>"},
            },
            "<a>,,,",
        ),
        ({"tokenizer_config": {"extra_special_tokens": {"image_token": "<i>"}}}, ",,,<i>"),
        ({"config": {"model_type": "gptj"}}, "<|endoftext|>,<|endoftext|>,,"),
        (
            {
                "config": {"model_type": "gptj"},
                "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
            },
            ",,,",
        ),
        (
            {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<e>"}},
            "<|endoftext|>,<e>,,",
        ),
    ],
)
def test_special_tokens_are_named_as_transformers_reads_them(
    files: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """As `special_tokens_map` of transformers 5.23's AutoTokenizer for such folders."""
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "chat_template.jinja").write_text(NAMES)
    assert usable(None, tmp_path).render(MESSAGES, {}) == says


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi <b>"}]'),
        ("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "01"),
        ("{% if strftime_now('%Y') | int > 2000 %}yes{% endif %}", "yes"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}!", "user!"),
        ("{%- generation -%} a {%- endgeneration -%} b", "ab"),
        ("{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}", "21"),
        (
            "{% for m in messages * 2 %}{% generation %}{{ loop.index }}{% endgeneration %}"
            "{% continue %}x{% endfor %}",
            "12",
        ),
        ("{{ 'é' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}", '"é""\\u00e9"'),
        ("{{ {'b': 1, 'a': [2]} | tojson(sort_keys=true) }}", '{"a": [2], "b": 1}'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':')) }}", '{"b":1,"a":2}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ [1] | tojson(false, 1) }}", "[\n 1\n]"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueFalse"),
        ("{% if tools is not none %}tools{% endif %}{{ tools or 'no tools' }}", "no tools"),
        ("{{ date_string is defined }}{{ enable_thinking is defined }}", "FalseFalse"),
        (
            "{% set n = namespace(a=1) %}{% for i in range(3) %}{% set n.a = i %}{% endfor %}"
            "{{ n.a }}{{ dict(a=1).a }}{{ strftime_now(format='%%') }}",
            "21%",
        ),
    ],
)
def test_what_published_templates_use(source: str, says: str, tmp_path: Path) -> None:
    assert found(source, tmp_path).render(MESSAGES, {}) == says


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[7].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ 1 + 'x' }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 99999999 }}",
        "{% for a in range(999999) %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_what_a_template_may_not_do(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.05)
    with pytest.raises(ChatTemplateError):
        found(source, tmp_path).render(MESSAGES, {})


def test_a_mistaken_choice_is_one_line_of_the_command(
    capsys: pytest.CaptureFixture[str], gptj_folder: Path
) -> None:
    status = cli.main(["serve", str(gptj_folder), "--port", "0", "--chat-template", "nowhere"])
    told = capsys.readouterr().err
    assert status == 2
    assert told.count("\n") == 1
    assert "--chat-template nowhere is neither a text file nor one of: plain" in told
