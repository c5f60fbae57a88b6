"""Saving and finding: weights, and the state from which training goes on exactly where it was.

A *set* is what one save writes: `<suffix>_net_<name>.pth` for each network, plain weights, and
`<suffix>_train_state.pth` with everything else. The state lists size and checksum of its weight
files, so a set is whole or it is not used. A save first writes all files under temporary names in
the same folder and flushes them to disk; then it renames the state, which makes the new set the
valid one, and then the weights. A crash before that rename leaves the old set as it was, a crash
after it leaves files that `finish_renaming` puts in place.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from .util import UserError

STATE = "train_state"


# ------------------------------------------------------------------------------------ single files
class ChecksumWriter:
    """A file to write to that counts and checks what goes through it.

    An error of the disk is kept and raised by `finish`: raised in the middle of `torch.save` it
    would end the process, because the writer below it cannot stop half-way.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.size, self.crc = file, 0, 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as e:
                self.error = e
        view = memoryview(data).cast("B")
        self.size += view.nbytes
        self.crc = zlib.crc32(view, self.crc)
        return view.nbytes

    def flush(self) -> None:
        pass

    def finish(self) -> dict[str, int]:
        """Flush to disk; size and CRC-32 of what was written. Raises OSError if it failed."""
        if self.error is not None:
            raise self.error
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"size": self.size, "crc32": self.crc}


def write_temporary(value: Any, path: Path, token: str) -> dict[str, int]:
    """`torch.save` to a temporary file beside `path`, flushed to disk; its size and checksum."""
    with open(temporary(path, token), "wb") as file:
        writer = ChecksumWriter(file)
        torch.save(value, writer)
        return writer.finish()


def temporary(path: Path, token: str) -> Path:
    """The name under which a file is written before it is moved to `path`."""
    return path.with_name(f".{path.name}.{token}.tmp")


def flush_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def save_file(value: Any, path: str | os.PathLike) -> None:
    """`torch.save` so that `path` is the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = new_token()
    try:
        write_temporary(value, path, token)
        os.replace(temporary(path, token), path)
    finally:
        temporary(path, token).unlink(missing_ok=True)
    flush_folder(path.parent)


def load_file(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read a file of tensors and plain values. Raises UserError where that fails.

    Code that a file may carry is never run (`weights_only`).
    """
    try:
        if zipfile.is_zipfile(path):
            # torch does not look at the checksums that it writes
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"can't read {path}: {_first_line(e)}") from e
    except pickle.UnpicklingError as e:
        reason = "it holds more than tensors and plain values, or is no PyTorch file"
        raise UserError(f"can't read {path}: {reason}") from e
    except Exception as e:  # damaged files make the unpickler raise nearly anything
        raise UserError(f"can't read {path}: {type(e).__name__}: {_first_line(e)}") from e


def _first_line(e: BaseException) -> str:
    text = str(e).strip()
    return text.splitlines()[0] if text else type(e).__name__


def load_weights(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state dictionary in a file; raises UserError that says what is there if it is missing."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no weights {path}: {_what_is_there(path)}")
    state = load_file(path, device)
    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path} is not a dictionary of weights, but a {type(state).__name__}")
    return dict(state)


def _what_is_there(path: Path) -> str:
    folder = path.parent
    saved = sorted(p.name for p in folder.glob("*_net_*.pth"))
    if saved:
        return f"{folder} has {', '.join(saved[:12])}{', ...' if len(saved) > 12 else ''}"
    if folder.is_dir():
        return f"{folder} has no weights at all"
    above = folder.parent
    experiments = sorted({p.parent.name for p in above.glob("*/*_net_*.pth")})
    if experiments:
        return f"there is no experiment --name {folder.name}; there are {', '.join(experiments)}"
    return f"there is no experiment --name {folder.name}, and none at all in {above}"


# --------------------------------------------------------------------------------------------- sets
@dataclass
class Position:
    """How far training has come: `epoch` is the one in progress, counted from 1."""

    epoch: int = 1
    epoch_iter: int = 0  # images seen in this epoch
    total_iters: int = 0  # images seen in all

    def advance(self, batch_size: int, epoch_size: int) -> None:
        """Count a batch; the last one of an epoch may be smaller."""
        images = min(batch_size, epoch_size - self.epoch_iter)
        self.epoch_iter += images
        self.total_iters += images

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch += 1
        self.epoch_iter = 0


@dataclass
class FoundSet:
    """A set on disk that is whole, or weights alone (`state` is None)."""

    suffix: str
    state: dict[str, Any] | None = None
    skipped: list[str] = field(default_factory=list)

    def position(self) -> Position:
        """Where the run was when this was saved."""
        assert self.state is not None
        return Position(**{k: self.state[k] for k in ("epoch", "epoch_iter", "total_iters")})


def new_token() -> str:
    """A name that no other save has."""
    return f"{time.time_ns():x}-{os.urandom(3).hex()}"


def weights_path(folder: Path, suffix: str, name: str) -> Path:
    """Where a set keeps the weights of a network."""
    return folder / f"{suffix}_net_{name}.pth"


def state_path(folder: Path, suffix: str) -> Path:
    """Where a set keeps its training state."""
    return folder / f"{suffix}_{STATE}.pth"


def save_set(
    folder: Path, suffix: str, weights: Mapping[str, Any], state: Mapping[str, Any]
) -> None:
    """Write a whole set, or raise OSError and leave the older one untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    token = new_token()
    paths = {name: weights_path(folder, suffix, name) for name in weights}
    target = state_path(folder, suffix)
    try:
        files = {n: write_temporary(weights[n], path, token) for n, path in paths.items()}
        write_temporary({**state, "token": token, "files": files}, target, token)
        os.replace(temporary(target, token), target)
    except BaseException:
        for path in [*paths.values(), target]:
            temporary(path, token).unlink(missing_ok=True)
        raise
    flush_folder(folder)
    for path in paths.values():
        os.replace(temporary(path, token), path)
    flush_folder(folder)


def finish_renaming(folder: Path, suffix: str, state: Mapping[str, Any]) -> None:
    """Put weights in place that belong to `state` and were not renamed before a crash."""
    for name in state["files"]:
        path = weights_path(folder, suffix, name)
        waiting = temporary(path, state["token"])
        if waiting.exists():
            os.replace(waiting, path)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of saves that did not come to their end."""
    for state_file in folder.glob(f"*_{STATE}.pth"):
        suffix = state_file.name.removesuffix(f"_{STATE}.pth")
        if any(folder.glob(f".{suffix}_net_*.tmp")):
            try:
                finish_renaming(folder, suffix, load_file(state_file))
            except (UserError, KeyError, TypeError, OSError):
                continue
    for leftover in folder.glob(".*.pth.*.tmp"):
        leftover.unlink(missing_ok=True)


def broken_part(folder: Path, suffix: str, state: Mapping[str, Any]) -> str | None:
    """The first weight file that is not the one that `state` was saved with, and why."""
    for name, expected in state["files"].items():
        path = weights_path(folder, suffix, name)
        try:
            if path.stat().st_size != expected["size"]:
                return f"{path.name} is {path.stat().st_size} bytes instead of {expected['size']}"
            if checksum(path) != expected["crc32"]:
                return f"{path.name} is not what was saved with it"
        except OSError as e:
            return f"{path.name}: {e.strerror}"
    return None


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def read_set(folder: Path, suffix: str, names: Iterable[str]) -> dict[str, Any]:
    """The training state of a whole set; raises UserError that says what is not whole."""
    state = load_file(state_path(folder, suffix))
    needed = {"format", "run", "token", "files", "epoch", "epoch_iter", "total_iters"}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise UserError(f"{state_path(folder, suffix)} is not a training state of this program")
    finish_renaming(folder, suffix, state)
    problem = broken_part(folder, suffix, state)
    if problem:
        raise UserError(problem)
    absent = set(names) - set(state["files"])
    if absent:
        raise UserError(f"it was saved without {', '.join(sorted(absent))}: by another --model?")
    return state


def find_set(folder: Path, names: Iterable[str], suffix: str | None = None) -> FoundSet | None:
    """The newest whole set in a folder, or that of `suffix`; weights alone if there is no state.

    None where nothing was saved. Raises UserError where sets are there and none is whole.
    """
    names = list(names)
    suffixes = (
        [suffix]
        if suffix
        else [p.name.removesuffix(f"_{STATE}.pth") for p in folder.glob(f"*_{STATE}.pth")]
    )
    whole: list[FoundSet] = []
    skipped: list[str] = []
    for candidate in suffixes:
        if not state_path(folder, candidate).exists():
            continue
        try:
            whole.append(FoundSet(candidate, read_set(folder, candidate, names)))
        except UserError as e:
            skipped.append(f"{candidate}: {e}")
    if whole:
        # of the newest run the farthest; "latest" rather than the epoch of the same step
        best = max(
            whole, key=lambda s: (s.state["run"], s.state["total_iters"], s.suffix == "latest")
        )
        best.skipped = skipped
        return best
    if skipped:
        raise UserError(
            f"no whole save in {folder} ({'; '.join(skipped)}); restore the files, or delete the "
            f"*_{STATE}.pth to go on from weights alone"
        )
    wanted = suffix or "latest"
    if names and all(weights_path(folder, wanted, n).exists() for n in names):
        return FoundSet(wanted)
    return None


def prune_states(folder: Path, keep: int) -> None:
    """Delete the training states of all but the `keep` newest sets besides latest; not weights."""
    states = [p for p in folder.glob(f"*_{STATE}.pth") if not p.name.startswith("latest_")]
    states.sort(key=lambda p: p.stat().st_mtime_ns)
    for path in states[: max(0, len(states) - keep)]:
        path.unlink(missing_ok=True)


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
