"""Facts about files, and writing them whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .errors import UserError


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a text file so that `path` is the old one or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_writable(folder: str | os.PathLike, option: str) -> None:
    """Make a folder to write to; raises UserError, which names the option to change."""
    try:
        os.makedirs(folder, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "no permission"
    except OSError as e:
        reason = e.strerror
    if reason:
        raise UserError(f"can't write to {folder}: {reason}; choose another {option}")
