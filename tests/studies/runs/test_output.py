import os
from pathlib import Path

import pytest

from lowland.studies.runs.output import OutputError, check_writable, publish

FILES = {"a.csv": b"1", "b.csv": b"2", "index.html": b"3"}


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_files_are_written_into_a_new_folder(tmp_path):
    publish(FILES, tmp_path / "deep" / "er")
    assert tree(tmp_path / "deep" / "er") == FILES
    assert tree(tmp_path).keys() == {"deep", "deep/er", *(f"deep/er/{name}" for name in FILES)}


def test_older_files_of_these_names_go_and_others_stay(tmp_path):
    (tmp_path / "a.csv").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    publish(FILES, tmp_path)
    assert tree(tmp_path) == {**FILES, "notes.txt": b"mine"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("move", range(5))
@pytest.mark.parametrize("new", [True, False], ids=["new folder", "old folder"])
def test_an_interruption_at_any_move_leaves_everything_as_it_was(
    tmp_path, monkeypatch, error, move, new
):
    folder = tmp_path / "new" / "folder"
    if not new:
        folder.mkdir(parents=True)
        for name in ("a.csv", "index.html", "notes.txt"):
            (folder / name).write_text("old")
    before = tree(tmp_path)
    moves, replace = [], Path.replace

    def failing(self, target):
        moves.append(target)
        if len(moves) == min(move, 2 if new else 4) + 1:
            raise error
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        publish(FILES, folder)
    assert tree(tmp_path) == before


def test_a_failure_while_writing_leaves_no_trace(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"cannot write to the folder .*: No space left"):
        publish(FILES, tmp_path / "results")
    assert tree(tmp_path) == {}


def test_a_folder_in_the_place_of_a_file_is_not_thrown_away(tmp_path):
    (tmp_path / "index.html").mkdir()
    (tmp_path / "index.html" / "mine").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"'index\.html' in it is a folder; remove it"):
        publish(FILES, tmp_path)
    assert tree(tmp_path) == before


def test_the_check_leaves_no_trace(tmp_path):
    check_writable(tmp_path / "deep" / "er")
    assert tree(tmp_path) == {}


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper", tmp_path / "dangling"):
        with pytest.raises(OutputError, match="is not a folder; name another one"):
            check_writable(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable to the superuser")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            check_writable(tmp_path / "results")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_file_system_that_refuses_is_reported():
    with pytest.raises(OutputError, match="cannot write to the folder '/proc/results': "):
        check_writable(Path("/proc/results"))
