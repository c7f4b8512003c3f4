"""Settings: declared once, read from four sources, and what a mistake in each of them says."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.errors import ConfigurationError
from cottention.engine.settings.command_line import (
    OneLineParser,
    add_config_flag,
    add_flags,
    to_arguments,
)
from cottention.engine.settings.declaration import check_settings, setting, settings_of
from cottention.engine.settings.sources import Origin, Resolved, Sources, unknown_variables


@dataclass(frozen=True, slots=True)
class Example:
    """A setting of each type."""

    model: str | None = setting(None, "a model", is_positional=True, is_path=True)
    count: int = setting(3, "a count", minimum=1, maximum=99, unit="turns")
    share: float | None = setting(None, "50% of it", unset="all")
    memory: int = setting(4 << 20, "a size", minimum=1, unit="bytes")
    level: Literal["low", "high"] = setting("low", "a choice")
    is_on: bool = setting(False, "a switch")
    folder: Path | None = setting(None, "a path")
    key_file: str | None = setting(None, "a file", is_path=True)
    word: tuple[str, ...] = setting((), "words")
    api_key: tuple[str, ...] = setting((), "keys", is_secret=True)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.count == 13 and self.share == 13:
            raise ConfigurationError("give --count or --share, not both")


NAMES = [each.name for each in settings_of(Example)]


def parser_of(config_type: type) -> OneLineParser:
    parser = OneLineParser(prog="test", allow_abbrev=False)
    add_config_flag(parser)
    add_flags(parser, config_type, "settings")
    return parser


def read(arguments: str = "", environ: dict[str, str] | None = None) -> Resolved[Example]:
    given = parser_of(Example).parse_args(arguments.split())
    return Sources.of(given, environ or {}, NAMES).read(Example)


def refused(arguments: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(arguments, environ)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


def test_without_any_source_the_defaults_are_in_force() -> None:
    resolved = read()
    assert resolved.value == Example()
    assert set(resolved.origins.values()) == {Origin("default")}


@pytest.mark.parametrize(
    ("name", "in_file", "variable", "flag", "values"),
    [
        ("count", "5", "6", "--count 7", (5, 6, 7)),
        ("share", "0.5", "0.75", "--share 1", (0.5, 0.75, 1.0)),
        ("share", "2", "0.75", "--share 1", (2.0, 0.75, 1.0)),
        ("memory", '"2K"', "3M", "--memory 1.5G", (2048, 3 << 20, 3 << 29)),
        ("memory", "4096", "3MB", "--memory 2GiB", (4096, 3 << 20, 2 << 30)),
        ("level", '"high"', "low", "--level high", ("high", "low", "high")),
        ("is_on", "true", "false", "--is-on", (True, False, True)),
        ("is_on", "false", "1", "--no-is-on", (False, True, False)),
        ("folder", '"a"', "b", "--folder c", (Path("a"), Path("b"), Path("c"))),
        ("word", '["a", "b"]', "c d", "--word e --word f", (("a", "b"), ("c d",), ("e", "f"))),
        ("word", '"a"', "b", "--word c", (("a",), ("b",), ("c",))),
        ("model", '"a"', "b", "c", ("a", "b", "c")),
    ],
)
def test_a_flag_goes_before_a_variable_before_the_file(
    file: Path, name: str, in_file: str, variable: str, flag: str, values: tuple[Any, Any, Any]
) -> None:
    """Each source is added to the ones that it goes before."""
    file.write_text(f"{name.replace('_', '-')} = {in_file}\n", encoding="utf-8")
    variables = {"COTTENTION_" + name.upper(): variable}
    found = [
        read(f"--config {file}"),
        read(f"--config {file}", variables),
        read(f"--config {file} {flag}", variables),
    ]
    assert tuple(getattr(each.value, name) for each in found) == values
    argument = Origin("argument", "MODEL")
    assert [each.origins[name] for each in found] == [
        Origin("file", str(file)),
        Origin("variable", f"COTTENTION_{name.upper()}"),
        argument if name == "model" else Origin("flag", "--" + name.replace("_", "-")),
    ]


def test_the_file_may_be_named_by_a_variable_and_an_empty_variable_is_none(file: Path) -> None:
    file.write_text("\ufeffcount = 5\r\n", encoding="utf-8")
    named = {"COTTENTION_CONFIG": str(file), "COTTENTION_COUNT": ""}
    assert read("", named).value.count == 5
    assert read("", {"COTTENTION_CONFIG": ""}).value == Example()
    other = file.with_name("other.toml")
    other.write_text("count = 6")
    assert read(f"--config {other}", named).value.count == 6


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ("count = '5'", "count in {file} must be a whole number; it is '5'"),
        ("count = 5.0", "count in {file} must be a whole number; it is 5.0"),
        ("count = true", "count in {file} must be a whole number; it is True"),
        ("count = 0", "count in {file} must be at least 1; it is 0"),
        ("count = 100", "count in {file} must be at most 99; it is 100"),
        ("share = inf", "share in {file} must be a number; it is inf"),
        (f"share = 1{'0' * 400}", "share in {file} must be a number; it is 1000"),
        (f"count = 0x{'f' * 9999}", "count in {file} must be at most 99; it is too large"),
        ("share = 2020-01-01", "share in {file} must be a number; it is datetime.date(2020, 1, 1)"),
        ("memory = '4X'", "memory in {file} must be a number of bytes, such as 4096, 512M or 2G"),
        ("memory = 1.5", "memory in {file} must be a number of bytes"),
        ("level = 'loud'", "level in {file} must be one of low, high; it is 'loud'"),
        ("level = 1", "level in {file} must be text; it is 1"),
        ("is_on = 'true'", "is_on in {file} must be true or false; it is 'true'"),
        ("word = [1]", "word in {file} must be text, or a list of texts; it is [1]"),
        ("model.name = 'x'", "model in {file} must be text; it is {{'name': 'x'}}"),
        ("counts = 1", "{file}: unknown key counts; did you mean count?"),
        ("weather = 1", "{file}: unknown key weather; keys are the names of flags, see --help"),
        ("config = 'x'", "{file}: unknown key config; keys are the names of flags"),
        ("[serve]\ncount = 1", "{file}: serve is a section, and there are none; write key = value"),
        ("is_on = true\nis-on = true", "{file}: is_on is set twice, with _ and with -"),
        ("count 5", "{file} is not TOML: Expected '=' after a key"),
        ("count = 1\ncount = 2", "{file} is not TOML: Cannot overwrite a value"),
        ("count = " + "[" * 10_000, "{file} is not TOML: "),
        ("word = 'é'".encode("latin-1"), "{file} is not UTF-8 (byte 8); save it as UTF-8"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_key(
    file: Path, given: str | bytes, allowed: str
) -> None:
    file.write_bytes(given.encode() if isinstance(given, str) else given)
    assert refused(f"--config {file}").startswith(allowed.format(file=file))


@pytest.mark.parametrize("place", ["nowhere.toml", "."])
def test_a_file_that_cannot_be_read_is_named_with_what_named_it(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    assert refused(f"--config {path}").startswith(f"--config {path} cannot be read: ")
    said = refused("", {"COTTENTION_CONFIG": str(path)})
    assert said.startswith(f"COTTENTION_CONFIG {path} cannot be read: ")
    assert said.endswith("; it must name a TOML file")


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        ("--count x", {}, "--count must be a whole number; it is 'x'"),
        ("--count 100", {}, "--count must be at most 99; it is 100"),
        ("", {"COTTENTION_COUNT": "x"}, "COTTENTION_COUNT must be a whole number; it is 'x'"),
        ("", {"COTTENTION_COUNT": "-1"}, "COTTENTION_COUNT must be at least 1; it is -1"),
        ("--share nan", {}, "--share must be a number; it is 'nan'"),
        ("--memory 4X", {}, "--memory must be a number of bytes"),
        ("--memory infG", {}, "--memory must be a number of bytes"),
        ("--memory 999999999T", {}, "--memory must be at most 1000000000000000000"),
        ("--level loud", {}, "--level must be one of low, high"),
        ("", {"COTTENTION_LEVEL": "loud"}, "COTTENTION_LEVEL must be one of"),
        ("", {"COTTENTION_IS_ON": "maybe"}, "COTTENTION_IS_ON must be true or false"),
    ],
)
def test_a_mistake_is_named_as_it_was_made(
    arguments: str, variables: dict[str, str], says: str
) -> None:
    assert refused(arguments, variables).startswith(says)


def test_settings_that_exclude_each_other_are_named_as_they_were_given(file: Path) -> None:
    file.write_text("count = 13")
    both = {"COTTENTION_SHARE": "13"}
    assert refused("--count 13", both) == "give --count or COTTENTION_SHARE, not both"
    assert refused(f"--config {file}", both) == (
        f"give count in {file} or COTTENTION_SHARE, not both"
    )


def test_a_secret_is_not_in_a_message(file: Path) -> None:
    file.write_text("api_key = 271828")
    assert "271828" not in refused(f"--config {file}")


def test_help_has_every_flag_variable_default_and_unit() -> None:
    text = " ".join(parser_of(Example).format_help().split())
    for item in fields(Example):
        assert f"[COTTENTION_{item.name.upper()}]" in text
    for expected in (
        "--config FILE",
        "MODEL a model (default: none)",
        "--count TURNS a count (default: 3 turns)",
        "--share N 50% of it (default: all)",
        "--memory BYTES a size (default: 4M)",
        "--level {low,high} a choice (default: low)",
        "--is-on, --no-is-on a switch (default: false)",
        "--folder PATH",
        "--key-file PATH",
        "--word TEXT",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--cuont=9", "unrecognized arguments: --cuont=9; did you mean --count? see test --help"),
        ("--weather", "unrecognized arguments: --weather; see test --help"),
        ("--count", "argument --count: expected one argument; see test --help"),
    ],
)
def test_a_wrong_flag_is_one_line_with_the_closest_one(
    capsys: pytest.CaptureFixture[str], argument: str, says: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        read(argument)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"test: {says}\n"


def test_flags_can_be_written_for_what_is_in_force(file: Path) -> None:
    """What a training run records: it does not depend on the variables and the file."""
    file.write_text("share = 0.5\nis_on = true\nword = ['a', 'b']")
    resolved = read(f"--config {file} --no-is-on", {"COTTENTION_COUNT": "7"})
    arguments = to_arguments(resolved)
    assert " ".join(arguments) == "--count 7 --share 0.5 --no-is-on --word a --word b"
    assert read(" ".join(arguments)).value == resolved.value


def test_a_variable_that_nothing_reads_is_named_without_its_value() -> None:
    known = ["X_COUNT", "X_WORD"]
    environ = {"X_CONT": "secret", "X_WEATHER": "fine", "X_WRD": "", "X_WORD": "a", "Y_WRD": "a"}
    assert list(unknown_variables(environ, known, "X_")) == [
        "unknown variable X_CONT is ignored; did you mean X_COUNT?",
        "unknown variable X_WEATHER is ignored",
    ]


def test_no_flag_is_none_for_argparse() -> None:
    """A default there would hide variables and the file."""
    assert set(vars(parser_of(Example).parse_args([])).values()) == {None}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "tpu"}, "--device must be one of auto, cpu, cuda; it is 'tpu'"),
        ({"dtype": "float16"}, "--dtype must be one of auto, float32, bfloat16"),
        ({"max_slots": 0}, "--max-slots must be at least 1; it is 0"),
        ({"state_memory": -1}, "--state-memory must be at least 1"),
        ({"max_batch_tokens": 1}, "--max-batch-tokens must be at least 2"),
        ({"max_tokens_limit": 0}, "--max-tokens-limit must be at least 1"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"threads": 100_000}, "--threads must be at most 1024"),
        ({"max_batch_tokens": 10**30}, "--max-batch-tokens must be at most 1000000000000000000"),
        ({"grammar_seconds": 1e30}, "--grammar-seconds must be at most 1000000000"),
        ({"max_slots": 1, "state_memory": 1}, "--max-slots or --state-memory, not both"),
    ],
)
def test_what_the_engine_does_not_allow_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        EngineConfig(**settings)
    assert words in str(caught.value)


def test_bounds_themselves_are_allowed() -> None:
    EngineConfig(max_slots=1, max_batch_tokens=2, max_tokens_limit=1, threads=1)
    EngineConfig(state_memory=1)


HOMES = {"~": "/home/me", "~/a": "/home/me/a", "~root/a": os.path.expanduser("~root") + "/a"}


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("name", ["model", "folder", "key_file"])
@pytest.mark.parametrize("given", HOMES)
def test_a_tilde_is_a_home_directory_in_each_source(file: Path, name: str, given: str) -> None:
    file.write_text(f'{name} = "{given}"')
    flag = given if name == "model" else f"--{name.replace('_', '-')}={given}"
    found = [
        read(flag),
        read("", {f"COTTENTION_{name.upper()}": given}),
        read(f"--config {file}"),
    ]
    expected = HOMES[given]
    assert [str(getattr(each.value, name)) for each in found] == [expected] * 3
    assert isinstance(found[0].value.folder, Path | None)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("given", ["./~/a", "a/~/b", "/~", "a~", "plain"])
def test_a_tilde_elsewhere_is_a_letter(given: str) -> None:
    assert read(f"--key-file {given}").value.key_file == given


def test_what_is_no_path_keeps_its_tilde() -> None:
    value = read("--word ~ --api-key ~/secret").value
    assert (value.word, value.api_key) == (("~",), ("~/secret",))


@pytest.mark.parametrize(
    ("arguments", "variables", "label"),
    [
        ("~no-such-user/m", {}, "MODEL ~no-such-user/m"),
        ("--folder ~no-such-user", {}, "--folder ~no-such-user"),
        ("", {"COTTENTION_KEY_FILE": "~no-such-user/k"}, "COTTENTION_KEY_FILE ~no-such-user/k"),
        ("--config ~no-such-user/f", {}, "--config ~no-such-user/f"),
        ("", {"COTTENTION_CONFIG": "~no-such-user/f"}, "COTTENTION_CONFIG ~no-such-user/f"),
    ],
)
def test_a_home_that_is_not_known_is_named(
    arguments: str, variables: dict[str, str], label: str
) -> None:
    said = refused(arguments, variables)
    assert said.startswith(f"{label}: no home directory is known for ~no-such-user; give")


def test_the_file_itself_may_be_in_the_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "settings.toml").write_text("count = 5")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("--config ~/settings.toml").value.count == 5
    assert read("", {"COTTENTION_CONFIG": "~/settings.toml"}).value.count == 5
