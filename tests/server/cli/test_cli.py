"""The command: its pages, its mistakes in one line, and each word against a real small model."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import pytest

from cottention.engine.models.registry import read_config
from cottention.engine.ops import build
from cottention.server.cli import main as cli
from cottention.server.cli.parser import COMMANDS
from cottention.server.cli.serve import bind_socket
from tests.engine.encoders import encoder_folder
from tests.engine.making import FAMILIES, attention_folder, family_folder, rwkv7_file

ROOT = Path(__file__).parents[3]


def run(*arguments: object, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    """`cottention ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-m", "cottention.server", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=250, check=False
    )


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Status and message of a command that fails, in this process; the message is one line."""
    try:
        status = cli.main([str(each) for each in arguments])
    except SystemExit as error:
        status = int(error.code or 0)
    told = capsys.readouterr()
    assert told.err.count("\n") == 1, told.err
    assert told.out == ""
    return status, told.err


def test_help_and_config_are_quick_and_load_no_torch() -> None:
    heavy = {"torch", "fastapi", "pydantic", "starlette", "uvicorn", "httpx2", "rich"}
    code = "import sys, cottention.server.cli.main as c\nc.main(['config'])\n"
    for arguments in (["--help"], *([word, "--help"] for word in COMMANDS)):
        code += f"try: c.main({arguments})\nexcept SystemExit: pass\n"
    code += f"print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.endswith("[]\n")
    assert "--max-slots" in found.stdout
    assert "--drain-seconds" in found.stdout


def test_asking_a_server_loads_no_torch(tmp_path: Path) -> None:
    """`--url` is there at once, also where torch is not installed."""
    asked, answers = (str(tmp_path / name) for name in ("in.jsonl", "out.jsonl"))
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}
    Path(asked).write_text(json.dumps(line))
    code = "import sys, cottention.server.cli.main as c\n"
    for arguments in (
        ["chat", "hi", "--url", "http://127.0.0.1:1"],
        ["bench", "http://127.0.0.1:1"],
        ["run-batch", "-i", asked, "-o", answers, "--url", "http://127.0.0.1:1"],
    ):
        code += f"assert c.main({arguments}) == 1\n"
    code += "print(sorted({'torch', 'fastapi', 'pydantic'} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"


def test_the_installed_command_is_this_one() -> None:
    """pyproject.toml names it in words that nothing else checks."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["cottention"].partition(":")
    assert getattr(importlib.import_module(module), name) is cli.run


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("cottention ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "required: COMMAND"),
        (("sever",), "choose from"),
        (("version",), "did you mean --version? see cottention"),
        (
            ("serve", "--prot", "9"),
            "unknown argument --prot; did you mean --port? see cottention serve",
        ),
        (("serve", "--port", "many"), "--port must be a whole number"),
        (("serve", "--max-slots", "1", "--state-memory", "1G"), "not both"),
        (("generate", "x", "--top-p", "2"), "top_p must be"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    status, told = fails(capsys, *arguments)
    assert status == 2 or "top_p" in told
    assert says in told


def test_a_folder_that_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, told = fails(capsys, "info", tmp_path)
    assert status == 1
    assert str(tmp_path) in told


@pytest.mark.slow
def test_a_folder_that_is_not_there_is_one_line_from_the_process_too(tmp_path: Path) -> None:
    done = run("serve", tmp_path / "nowhere", "--port", 0)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_port_in_use_is_told_before_the_model_is_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with bind_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        status, told = fails(capsys, "serve", tmp_path / "nowhere", "--port", port)
    assert status == 2
    assert (
        f"127.0.0.1:{port}: Address already in use; choose another with --host and --port" in told
    )


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--session-dir", "sessions: a part of its path is a file; give --session-dir a folder"),
        ("--api-key-file", "sessions cannot be read: Not a directory; give it a file"),
        ("--tls-cert", "sessions cannot be read: Not a directory; give it a file"),
    ],
)
def test_a_path_that_cannot_be_is_told_before_the_model_is_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str, says: str
) -> None:
    (tmp_path / "file").write_text("mine")
    wrong = tmp_path / "file" / "sessions"
    status, told = fails(capsys, "serve", tmp_path / "nowhere", "--port", 0, flag, wrong)
    assert status == 2
    assert says in told


@pytest.mark.parametrize("inside", ["new", "some/new"])
def test_a_start_that_fails_leaves_no_new_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, inside: str
) -> None:
    (tmp_path / "some").mkdir()
    flags = ("--port", 0, "--session-dir", tmp_path / inside / "deeper")
    status, told = fails(capsys, "serve", tmp_path / "nowhere", *flags)
    assert status == 1
    assert "nowhere" in told
    assert [*tmp_path.rglob("*")] == [tmp_path / "some"]


def test_info_itemises_a_session(capsys: pytest.CaptureFixture[str], gptj_folder: Path) -> None:
    assert cli.main(["info", str(gptj_folder), "--max-slots", "2"]) == 0
    facts = dict(line.rsplit("  ", 1) for line in capsys.readouterr().out.splitlines())
    told = {name.strip(): value.strip() for name, value in facts.items()}
    assert told["model"] == "cottention-gptj"
    assert told["parameters"] == "124,104"
    size = "16,384 in a slot (the state and its spare, 8,192 each), whatever its length"
    assert told["bytes per session"] == size
    assert told["pool when served"] == "2 slots of 16,384 bytes, 0.0 MiB"
    assert told["sessions per GB"] == f"{10**9 // 16384:,}"
    assert told["state"] == told["spare"] == "8,192 bytes"
    assert {"denominator", "context policy", "trained length", "runs on"} <= told.keys()
    assert told["attention"] == "cottention"
    assert told["logits"].startswith("0 bytes, computed again")
    assert told["turn_copy"].startswith("8,192 bytes of memory")
    assert {"counts", "ids", "event_log", "checkpoints", "parked", "stored"} <= told.keys()


def test_info_of_a_cosformer_names_its_fixed_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(attention_folder("cosformer")), "--max-slots", "2"]) == 0
    told = capsys.readouterr().out
    assert "cosformer, M = 20,000" in told
    assert re.search(r"denominator +1,024 bytes", told)


def test_info_of_an_encoder_has_the_memory_of_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(encoder_folder()), "--pooling", "cls"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"attention +cottention, bidirectional\n", told)
    assert re.search(r"serves +embeddings, fill-mask\n", told)
    assert re.search(r"bytes per text +4,096, and 256 for each of its tokens\n", told)
    assert re.search(r"longest text +64 tokens\n", told)
    assert "session" not in told


@pytest.mark.parametrize("family", FAMILIES)
def test_info_itemises_every_family(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor that is left out, as a tail, would make a pool larger than people were told."""
    folder = family_folder(family)
    assert cli.main(["info", str(folder)]) == 0
    lines = dict(re.findall(r"^ *(\w[\w ]*?)  +(.*)$", capsys.readouterr().out, re.MULTILINE))
    spec = read_config(folder).state_spec()
    assert lines["family"] == family
    assert lines["bytes per session"].startswith(f"{spec.bytes_per_slot:,}")
    assert lines["sessions per GB"] == f"{10**9 // spec.bytes_per_slot:,}"
    for name, nbytes in spec.itemised_bytes().items():
        assert lines[name] == f"{nbytes:,} bytes"


def test_info_of_a_single_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every tensor of its state, and the vocabulary that it is given."""
    file = rwkv7_file(tmp_path)
    vocabulary = tmp_path / "rwkv_vocab_small.txt"
    vocabulary.rename(tmp_path / "mine.txt")
    status, told = fails(capsys, "info", file)
    assert status == 1
    assert told.count("\n") == 1
    assert f"{file} has no tokenizer: " in told
    assert cli.main(["info", str(file), "--tokenizer", str(tmp_path / "mine.txt")]) == 0
    lines = dict(re.findall(r"^ *(\w[\w ]*?)  +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert lines["model"] == "small"
    assert lines["family"] == "rwkv7"
    state, shift = 3 * 2 * 32 * 32 * 4, 3 * 64 * 4
    assert lines["bytes per session"].startswith(f"{state + 2 * shift:,}")
    assert lines["state"] == f"{state:,} bytes"
    assert lines["att_shift"] == lines["ffn_shift"] == f"{shift:,} bytes"
    assert lines["spare"] == "0 bytes"
    assert lines["sessions per GB"] == f"{10**9 // (state + 2 * shift):,}"
    assert lines["trained length"] == "not known"
    assert lines["context policy"] == "exact: nothing is forgotten on purpose"


def test_a_file_keeps_no_sessions(
    capsys: pytest.CaptureFixture[str], gptj_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    flags = ("--port", 0, "--session-dir", tmp_path / "file")
    status, told = fails(capsys, "serve", gptj_folder, *flags)
    assert status == 2
    assert told == (
        f"cottention serve: {tmp_path / 'file'} cannot hold sessions: it is a file; give"
        " --session-dir a folder that this process may write to, or the name of a new one\n"
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", [("serve", "--port", 0), ("info",)], ids=lambda c: c[0])
def test_a_softmax_model_is_not_served(
    capsys: pytest.CaptureFixture[str],
    gptj_folder: Path,
    tmp_path: Path,
    command: tuple[str | int, ...],
) -> None:
    folder = tmp_path / "softmax"
    shutil.copytree(gptj_folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["attention_type"] = "softmax"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    status, told = fails(capsys, *command, folder)
    assert status == 1
    assert "for training and benchmarks only" in told


def test_build_says_what_it_built_or_what_it_lacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "build", lambda **_: Path("/somewhere/ops.so"))
    monkeypatch.setattr(build, "build_cuda", lambda: Path("/somewhere/cuda.so"))
    for wanted, printed in (
        ("0", "/somewhere/ops.so\n"),
        ("1", "/somewhere/ops.so\n/somewhere/cuda.so\n"),
    ):
        monkeypatch.setenv("COTTENTION_CUDA", wanted)
        assert cli.main(["build"]) == 0
        assert capsys.readouterr().out == printed

    def without_compiler(**_: object) -> Path:
        raise build.BuildError("there is no C++ compiler:\ninstall g++")

    monkeypatch.setattr(build, "build", without_compiler)
    assert fails(capsys, "build") == (
        1,
        "cottention build: there is no C++ compiler: install g++\n",
    )


def test_generate_reads_standard_input_and_repeats_itself(
    capsys: pytest.CaptureFixture[str], gptj_folder: Path
) -> None:
    flags = ["--model", str(gptj_folder), "--max-tokens", "12", "--seed", "5", "--max-slots", "1"]
    first = run("generate", "-", *flags, stdin="def f(")
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("\n")
    assert len(first.stdout) > 5
    assert cli.main(["generate", "def f(", *flags]) == 0
    assert capsys.readouterr().out == first.stdout


def test_generate_refuses_input_that_is_no_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "raw").write_bytes(b"\xff")
    with (tmp_path / "raw").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, told = fails(capsys, "generate")
    assert status == 2
    assert "not UTF-8" in told


@pytest.mark.slow
def test_an_interrupt_ends_generate_quietly() -> None:
    """Greedy text of the shipped model repeats itself: it does not end before it is interrupted."""
    command = [sys.executable, "-m", "cottention.server", "generate", "def __init__(self, "]
    with subprocess.Popen(
        [*command, "--max-tokens", "900000", "--temperature", "0", "--generation-config", "vllm"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as popen:
        assert popen.stdout
        assert popen.stderr
        assert popen.stdout.read(1)
        popen.send_signal(signal.SIGINT)
        popen.stdout.read()
        assert popen.stderr.read() == b""
        assert popen.wait(60) == 130


def test_serve_answers_and_stops(gptj_folder: Path, tmp_path: Path) -> None:
    """The whole way: variables, a model folder's name, the printed URL, a stream, SIGTERM."""
    folder = shutil.copytree(gptj_folder, tmp_path / "tiny")
    variables = os.environ | {"COTTENTION_PORT": "0", "COTTENTION_MODEL": str(folder)}
    variables["COTTENTION_MAX_SLOT"] = "5"
    variables["TMPDIR"] = str(tmp_path)  # else it may log that it removes what others left behind
    with subprocess.Popen(
        [sys.executable, "-m", "cottention.server", "serve", "--max-slots", "4"],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        try:
            assert popen.stdout
            assert popen.stderr
            lines = [popen.stdout.readline() for _ in range(6)]
            model, memory, kept, access, page, ready = lines
            assert "tiny, float32 on cpu" in model
            assert "4 slots of 16,384 bytes" in memory
            assert "until the server ends" in kept
            assert "localhost only; no API key required" in access
            assert ready.startswith("ready    http://127.0.0.1:")
            url = ready.split()[-1]
            assert page == f"page     {url}/\n"
            body = {"prompt": "def f(", "max_tokens": 5, "model": "tiny", "seed": 1}
            whole = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
            assert whole["usage"]["completion_tokens"] <= 5
            streamed = httpx.post(f"{url}/v1/completions", json=body | {"stream": True}, timeout=60)
            assert streamed.text.endswith("data: [DONE]\n\n")
            time.sleep(0.05)
            popen.send_signal(signal.SIGTERM)
            assert popen.wait(60) == 0
            unknown, *requests, stop = popen.stderr.read().splitlines()
            assert unknown.endswith("COTTENTION_MAX_SLOTS?")
            assert [" INFO request id=" in line for line in requests] == [True, True]
            assert stop.endswith("shutting down: running requests have 30 s to finish")
        finally:
            popen.kill()
