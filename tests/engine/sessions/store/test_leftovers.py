"""What is removed of folders whose processes were killed, and what never is."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from cottention.engine.sessions.store import SqliteStore
from cottention.engine.sessions.store.folder_lock import remove_leftovers

PREFIX = "sessions-"


def left_behind(place: Path, name: str = "dead", *, durable: bool = False) -> Path:
    """A folder whose lock was taken, and nobody holds any more."""
    folder = place / (PREFIX + name)
    SqliteStore(folder, durable=durable).close()
    return folder


def test_the_dead_go_and_the_living_stay(tmp_path: Path) -> None:
    dead, alive = left_behind(tmp_path), tmp_path / f"{PREFIX}alive"
    other = left_behind(tmp_path / "elsewhere")
    store = SqliteStore(alive, durable=False)
    for expected in ([dead], []):
        assert remove_leftovers(tmp_path, PREFIX) == expected
        assert not dead.exists()
        assert other.exists()
        assert (alive / "index.sqlite").exists()
    store.close()
    assert remove_leftovers(tmp_path, PREFIX) == [alive]


def test_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from cottention.engine.sessions.store import SqliteStore;"
        "store = SqliteStore(Path(sys.argv[1]), durable=False); print('held', flush=True);"
        "sys.stdin.read()"
    )
    folder = tmp_path / f"{PREFIX}x"
    command = [sys.executable, "-c", code, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as popen:
        assert popen.stdout
        assert popen.stdout.readline() == "held\n"
        assert remove_leftovers(tmp_path, PREFIX) == []
        popen.kill()
        popen.wait(60)
        assert remove_leftovers(tmp_path, PREFIX) == [folder]
    assert not folder.exists()


def test_what_is_kept_by_somebody_stays(tmp_path: Path) -> None:
    """A folder that a user named so, and one that was left behind and that a user took over."""
    left_behind(tmp_path, "mine", durable=True)
    left_behind(tmp_path, "saved")
    left_behind(tmp_path, "saved", durable=True)
    assert remove_leftovers(tmp_path, PREFIX) == []
    assert len([*tmp_path.glob("*/index.sqlite")]) == 2


def test_what_may_just_be_made_or_is_something_else_stays(tmp_path: Path) -> None:
    target = left_behind(tmp_path / "elsewhere")
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}file").write_text("pid 1, temporary\n")
    (tmp_path / f"{PREFIX}new").mkdir()
    for name, content in (("made", ""), ("other", "pid 1\n"), ("half", "pid 1, temp")):
        (tmp_path / (PREFIX + name)).mkdir()
        (tmp_path / (PREFIX + name) / "lock").write_text(content)
    os.mkfifo(tmp_path / f"{PREFIX}new" / "lock")
    assert remove_leftovers(tmp_path, PREFIX) == []
    assert len([*tmp_path.glob(f"{PREFIX}*")]) == 6
    assert (target / "index.sqlite").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to another user needs root")
def test_what_is_another_user_s_stays(tmp_path: Path) -> None:
    folder = left_behind(tmp_path)
    os.chown(folder, 12345, 12345)
    assert remove_leftovers(tmp_path, PREFIX) == []
    assert (folder / "index.sqlite").exists()


def test_nobody_who_starts_or_ends_is_disturbed(tmp_path: Path) -> None:
    """Many at once, all of whom look for leftovers first."""
    for n in range(20):
        left_behind(tmp_path, f"dead-{n}")

    def live(_: int) -> None:
        remove_leftovers(tmp_path, PREFIX)
        with TemporaryDirectory(prefix=PREFIX, dir=tmp_path, ignore_cleanup_errors=True) as name:
            store = SqliteStore(Path(name), durable=False)
            remove_leftovers(tmp_path, PREFIX)
            assert store.counts().num_sessions == 0
            assert (Path(name) / "index.sqlite").exists()
            store.close()

    with ThreadPoolExecutor(8) as pool:
        [*pool.map(live, range(60))]
    assert [*tmp_path.iterdir()] == []
