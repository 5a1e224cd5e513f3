"""Locks on folders."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from runtime.locks import locked
with locked(Path(sys.argv[1]), "x"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_job_is_told_who_holds_the_lock_and_a_kill_releases_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    message = rf"--resume auto: in use by process {holder.pid} on .* \(started .*\); wait for it, or end it"
    with pytest.raises(UserError, match=message), locked(tmp_path, "--resume auto"):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path, "--resume auto"):
        pass


def test_one_process_holds_it_once_and_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path, "a"):
        with pytest.raises(UserError, match="a: in use by process"), locked(tmp_path, "a"):
            pass
        raise KeyError
    with locked(tmp_path, "a"):
        assert (tmp_path / ".lock").exists()


def test_a_lock_that_its_owner_removes_meanwhile_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, path = fcntl.flock, tmp_path / "lock"
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda file, how: (path.unlink(missing_ok=True), flock(file, how)))
        with pytest.raises(UserError, match="a: in use by another process"), locked(tmp_path, "a", "lock"):
            pass
    with locked(tmp_path, "a", "lock"):
        path.unlink()
    with locked(tmp_path, "a", "lock"):
        assert path.exists()


def test_damaged_owners_and_missing_folders_are_one_line(tmp_path: Path) -> None:
    with locked(tmp_path, "a"):
        (tmp_path / ".lock").write_text("{")
        with pytest.raises(UserError, match="in use by another process"), locked(tmp_path, "a"):
            pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a: cannot be locked"), locked(tmp_path / "file", "a"):
        pass
