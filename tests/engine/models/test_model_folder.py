"""From what a user calls a model to a folder, without a network."""

from pathlib import Path
from typing import Any

import pytest

from cottention.engine import Engine
from cottention.engine.errors import ModelFolderError
from cottention.engine.models.model_folder import DEFAULT_MODEL, HUB_FILES, resolve_model


def test_none_is_the_model_that_ships() -> None:
    assert resolve_model(None) == (DEFAULT_MODEL.name, DEFAULT_MODEL)


def test_a_folder_is_called_by_its_name(gptj_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(gptj_folder) == (gptj_folder.name, gptj_folder)
    assert resolve_model(str(gptj_folder)).folder == gptj_folder
    monkeypatch.chdir(gptj_folder)
    assert resolve_model(".").name == gptj_folder.resolve().name


def test_a_link_is_called_by_its_own_name(
    gptj_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a hub's cache, whose snapshots are named by commits."""
    snapshot = tmp_path / "snapshots" / "0f1e2d3c"
    snapshot.parent.mkdir()
    snapshot.symlink_to(gptj_folder.resolve(), target_is_directory=True)
    link = tmp_path / "my-model"
    link.symlink_to(snapshot, target_is_directory=True)
    for given in (link, f"{link}/", f"{link}/.", tmp_path / "snapshots" / ".." / "my-model"):
        assert resolve_model(given).name == "my-model"
    assert resolve_model(snapshot).name == "0f1e2d3c"
    monkeypatch.chdir(tmp_path)
    for given in ("my-model", "./my-model", "my-model/"):
        assert resolve_model(given).name == "my-model"
    monkeypatch.chdir(link)
    monkeypatch.setenv("PWD", str(link))  # as a shell has it after `cd`
    assert resolve_model(".").name == "my-model"
    monkeypatch.setenv("PWD", str(tmp_path))
    assert resolve_model(".").name == gptj_folder.resolve().name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/my-model").name == "my-model"
    (tmp_path / "in" / "side").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "side")
    assert resolve_model("..").name == "in"
    assert resolve_model("/").name == "/"


def test_home_is_understood(
    gptj_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").symlink_to(gptj_folder.resolve(), target_is_directory=True)
    assert resolve_model("~/mine").folder == tmp_path / "mine"


def test_a_file_is_no_folder(gptj_folder: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"is a file: give the model's folder"):
        resolve_model(gptj_folder / "config.json")


def test_a_pth_file_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "x070-0.4b.pth").touch()
    assert resolve_model(tmp_path / "x070-0.4b.pth") == ("x070-0.4b", tmp_path / "x070-0.4b.pth")


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "./a/b",
        "/a/b",
        "a/b/c",
        "~/nowhere",
        "../x",
        "owner/",
        "x" * 5000,
        "~no-such-user",
    ],
)
def test_what_is_neither_folder_nor_id(name: str) -> None:
    with pytest.raises(ModelFolderError, match="does not exist: give a model folder or a Hugging"):
        resolve_model(name)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client reads its variables when it is imported: set what it made of them."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("offline")
def test_offline_says_what_to_download_where() -> None:
    with pytest.raises(ModelFolderError) as caught:
        Engine("gmongaras/Cosine_Attention_GPT_300M")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("gmongaras/Cosine_Attention_GPT_300M is no folder here")
    assert "could not be fetched from Hugging Face" in message
    assert "Download config.json, tokenizer files and weights" in message
    assert "into a folder" in message


@pytest.mark.usefixtures("offline")
def test_an_id_that_the_hub_does_not_allow() -> None:
    with pytest.raises(ModelFolderError, match="is not a folder and not a Hugging Face id"):
        resolve_model("owner/na me?")


def test_an_id_is_fetched_without_pickles_of_configurations(
    gptj_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def fetch(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(gptj_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_model("owner/name") == ("owner/name", gptj_folder)
    assert asked == [("owner/name", HUB_FILES)]
    unwanted = ("tokenizer.pt", "config.pt", "training_args.bin")
    assert not any(Path(name).match(pattern) for name in unwanted for pattern in HUB_FILES)


@pytest.mark.parametrize("error", [ConnectionError("no route"), OSError(28, "No space left")])
def test_whatever_the_network_does_is_told(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelFolderError, match=type(error).__name__):
        resolve_model("owner/name")
