"""Replacing a file in one step: its order of write, flush and rename, and what a failure leaves."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest

from util import files
from util.files import replacing, write_whole
from util.run import weight_files


@pytest.fixture
def calls(monkeypatch):
    """Flushes and renames in the order in which they happen, with what they work on."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor):
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        content = None if target.is_dir() else target.read_bytes()
        seen.append(("fsync", "folder" if content is None else "file", content))
        fsync(descriptor)

    def seen_replace(source, target):
        seen.append(("rename", Path(target).name, Path(source).read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_written_then_flushed_then_renamed(tmp_path, calls):
    with replacing(tmp_path / "new" / "a.bin") as temporary:
        temporary.write_bytes(b"all of it")
        assert not calls
    assert calls == [
        ("fsync", "file", b"all of it"),
        ("rename", "a.bin", b"all of it"),
        ("fsync", "folder", None),
    ]


def test_without_flush_it_is_only_renamed(tmp_path, calls):
    with replacing(tmp_path / "a.bin", flush=False) as temporary:
        temporary.write_bytes(b"x")
    assert calls == [("rename", "a.bin", b"x")]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_flush_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush_to_disk", fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_is_hidden_beside_it_with_the_same_ending(tmp_path):
    with replacing(tmp_path / "picture.tar.gz") as temporary:
        temporary.write_text("")
        assert temporary.parent == tmp_path
        assert re.fullmatch(r"\.picture\.tar\.[0-9a-f]+\.tmp\.gz", temporary.name)


def test_text_may_name_files_that_are_no_utf_8(tmp_path):
    write_whole(tmp_path / "a.txt", f"dataroot: {os.fsdecode(b'caf' + bytes([0xE9]))}")
    assert (tmp_path / "a.txt").read_bytes() == b"dataroot: caf\xe9"


@pytest.mark.parametrize("letter", ["a", "山"])
def test_names_of_any_length(tmp_path, letter):
    name = letter * (240 // len(letter.encode())) + ".png"
    write_whole(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_permissions_are_those_of_an_ordinary_new_file(tmp_path):
    (tmp_path / "ordinary").write_text("")
    write_whole(tmp_path / "replaced", "")
    assert (tmp_path / "replaced").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [OSError(28, "disk full"), RuntimeError("a worker is killed")])
def test_an_error_within_a_save_does_not_reach_torch(error):
    """torch's writer would write once more when it goes, and an error there ends the process."""

    class Failing(io.BytesIO):
        def write(self, data):
            self.close()
            raise error

    writer = weight_files.DiskWriter(Failing())
    assert [writer.write(b"abc"), writer.write(b"de")] == [3, 2]
    assert writer.error is error
