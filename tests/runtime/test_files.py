import os
from contextlib import suppress
from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.files import atomic_path, check_folder, check_writable, sweep


def test_success_renames_and_leaves_nothing_else(tmp_path):
    with atomic_path(tmp_path / "a.txt") as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == tmp_path
        temporary.write_text("whole")
        assert not (tmp_path / "a.txt").exists()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "whole")]


def test_failure_keeps_the_old_content(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_check_writable_makes_the_folder_and_leaves_no_file(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "a.png", "--output")
    assert (tmp_path / "new" / "deep").is_dir() and not list((tmp_path / "new" / "deep").iterdir())


def test_a_writer_with_temporary_files_of_its_own_leaves_none(tmp_path):
    path = tmp_path / "a.txt"
    for fails in (False, True):
        with suppress(RuntimeError), atomic_path(path, alone=True) as temporary:
            assert temporary.parent.parent == tmp_path and temporary.suffix == ".txt"
            (temporary.parent / ".tmpAbCdEf").touch()
            temporary.write_text("half" if fails else "whole")
            if fails:
                raise RuntimeError
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "whole")]


def test_what_killed_processes_left_is_removed_before_the_next_work(tmp_path):
    def leave():
        (tmp_path / ".a.4999999.tmp.txt").mkdir()
        (tmp_path / ".a.4999999.tmp.txt" / ".tmpAbCdEf").touch()
        (tmp_path / ".a.4999998.tmp.txt").touch()

    for name in (".b.4999999.tmp.txt", f".a.{os.getppid()}.tmp.txt", ".a.x.tmp.txt"):
        (tmp_path / name).touch()
    leave()
    check_writable(tmp_path / "a.txt", "--output")
    assert len(list(tmp_path.iterdir())) == 3
    leave()
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {f".a.{os.getppid()}.tmp.txt", ".a.x.tmp.txt"}


def test_check_writable_names_flag_and_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .*file/a.png: cannot write there"):
        check_writable(tmp_path / "file" / "a.png", "--output")
    with pytest.raises(UserError, match="is a folder"):
        check_writable(Path(tmp_path), "--output")


def test_check_folder_makes_nothing(tmp_path):
    check_folder(tmp_path / "new" / "deep", "--results-dir")
    check_folder(Path("results"), "--results-dir")
    assert not list(tmp_path.iterdir())


def test_check_folder_names_flag_and_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--results-dir .*file/x: cannot write there .*file is a file"):
        check_folder(tmp_path / "file" / "x", "--results-dir")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="no permission in"):
        check_folder(tmp_path / "x", "--results-dir")
