"""Looking at a folder for sessions before it is taken."""

from pathlib import Path

import pytest

from cottention.engine.errors import ConfigurationError
from cottention.engine.sessions.store.folder_lock import check_folder, lock_folder


def test_what_is_in_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "states").mkdir()
    check_folder(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"states", "lock"}


def test_a_new_folder_goes_again_and_its_parents_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    check_folder(tmp_path / "there" / "new" / "newer")
    assert [*tmp_path.rglob("*")] == [tmp_path / "there"]


def test_a_name_that_cannot_be_leaves_no_parents(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="too long"):
        check_folder(tmp_path / "new" / ("x" * 300))
    assert [*tmp_path.iterdir()] == []


def test_a_folder_in_use_is_told_and_left(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path / "new")
    with pytest.raises(ConfigurationError, match=r"another process .* give --session-dir another"):
        check_folder(tmp_path / "new")
    lock.release()
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["lock"]
