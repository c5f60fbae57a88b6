"""Checksums of files, and atomic writes: files and folders appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

NO_INPUT = ".no_input"  # a file of this name marks a folder of results
STARTED = time.strftime("%Y%m%d-%H%M%S")  # one time in the names of all that a run sets aside


_Path: Any = type(Path())


class TextPath(_Path):
    """A path to which a string can be added, for attributes that the original has as strings."""

    def __add__(self, text: str) -> str:
        return str(self) + text


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, flush: bool = True) -> Iterator[Path]:
    """Replace a file in one step: `path` is the old file or the whole new one, never a part.

    Yields the path of a temporary file to write, in the same folder and with the same suffix. At
    the end of the block that file takes the place of `path`; after an exception it is deleted.

    Args:
        path: file to write; missing folders are made.
        flush: wait until the file is on the disk. Without it, a power cut soon afterwards can leave
            an empty file, which is acceptable for what is cheap to make again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name may have 255 bytes at most, and that of an image can be as long already
    temporary = path.with_name(f".{path.stem[:48]}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        if flush:
            flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if flush:
        flush_folder(path.parent)


@contextlib.contextmanager
def wrap_write_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError in the block, from writing a file or making its folder, into a UserError."""
    try:
        yield
    except OSError as e:
        raise UserError(f"can't write {path}: {e.strerror or e}") from e


@contextlib.contextmanager
def staged(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder inside `parent` whose children move into `parent` once all went well.

    After an error nothing is left, not even a `parent` that was made here. A child never replaces
    a file or a folder with something in it: that raises UserError.
    """
    parent = Path(parent)
    if parent.exists() and not parent.is_dir():
        raise UserError(f"'{parent}' is a file, and a folder is to be written: choose another name")
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(
            prefix=".unfinished-", dir=parent, ignore_cleanup_errors=True
        ) as temporary:
            yield Path(temporary)
            children = sorted(Path(temporary).iterdir())
            for child in children:
                must_be_free(parent / child.name)
            for child in children:
                os.replace(child, parent / child.name)
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty: it holds the result
                folder.rmdir()


def must_be_free(path: str | os.PathLike[str]) -> None:
    """Raise UserError if `path` is a file or a folder that is not empty."""
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise UserError(f"'{path}' is already there: move it away, or choose another place")


def flush_to_disk(path: Path) -> None:
    """Wait until the content of a file is on the disk. Raises OSError if that fails."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk; does nothing if the system can't do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def backup_path(path: str | os.PathLike) -> Path:
    """A free name to set aside a file or folder of an earlier run: `losses.20261126-051800.jsonl`.

    The time is when this program started; if that name is taken, `-2`, `-3`, ... follows it.
    """
    path = Path(path)
    backup, n = path.with_name(f"{path.stem}.{STARTED}{path.suffix}"), 1
    while backup.exists():
        n += 1
        backup = path.with_name(f"{path.stem}.{STARTED}-{n}{path.suffix}")
    return backup


def write_whole(path: str | os.PathLike, text: str, *, flush: bool = True) -> None:
    """Write a text file in UTF-8 in one step; see `replacing`."""
    with replacing(path, flush=flush) as temporary:
        # it may hold file names, which need not be UTF-8
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def make_writable(folder: str | os.PathLike, option: str) -> None:
    """Make a folder to write to; raises UserError, which names the option to change."""
    try:
        os.makedirs(folder, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "no permission"
    except OSError as e:
        reason = e.strerror
    if reason:
        raise UserError(f"can't write to {folder}: {reason}; choose another {option}")


def mark_as_results(folder: str | os.PathLike) -> None:
    """Mark a folder as results: listing the images of a parent folder then leaves it out."""
    with wrap_write_errors(f"to {folder}"):
        Path(folder, NO_INPUT).touch()
