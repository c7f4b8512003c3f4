"""Chat templates: where they are found, what they may use, what stops them."""

import json
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.errors import ConfigurationError
from cottention.server.cli import main as cli
from cottention.server.generation import chat_template as templates
from cottention.server.generation.chat_template import (
    ChatTemplate,
    ChatTemplateError,
    find_template,
    render_after,
)

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
        (templates.PLAIN, ("\n\nUser: hi <b>\n\n", "\n\nUser: ")),
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


def test_what_is_no_jinja_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not valid Jinja"):
        found("{% for %}", tmp_path)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi <b>"}]'),
        ("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "01"),
        ("{% if strftime_now('%Y') | int > 2000 %}yes{% endif %}", "yes"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
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
