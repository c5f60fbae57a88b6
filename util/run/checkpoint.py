"""Saving and finding: weights, and the state from which training goes on exactly where it was.

A *set* is what one save writes: `<suffix>_net_<name>.pth` for each network, plain weights, and
`<suffix>_train_state.pth` with everything else. The state lists what identifies its weight files
(`fingerprint`), so a set is whole or it is not used. A save first writes all files under temporary
names in the same folder and flushes them to disk; then it renames the state, which makes the new
set the valid one, and then the weights. A crash before that rename leaves the old set as it was, a
crash after it leaves files that `finish_renaming` puts in place.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from util.errors import UserError, first_line, warn
from util.util import crossed

STATE = "train_state"
FORMAT = 1  # of the training state


# ------------------------------------------------------------------------------------ single files
class DiskWriter:
    """A file for `torch.save` to write to that keeps an error of the disk until `finish`.

    Raised in the middle of `torch.save` it would end the process, because the writer below it
    cannot stop half-way.
    """

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as e:
                self.error = e
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        """Flush to disk. Raises OSError if that or an earlier write failed."""
        if self.error is not None:
            raise self.error
        self.file.flush()
        os.fsync(self.file.fileno())


def write_temporary(value: Any, path: Path, token: str) -> dict[str, int]:
    """`torch.save` to a temporary file beside `path`, flushed; returns its `fingerprint`."""
    with open(temporary(path, token), "w+b") as file:
        writer = DiskWriter(file)
        torch.save(value, writer)
        writer.finish()
        return fingerprint(file)


def fingerprint(file: IO[bytes]) -> dict[str, int]:
    """What tells a file of `torch.save` from all others: its size, and the CRC-32 of its directory.

    The directory, at the end of the file, has the CRC-32 of each part, so this costs next to
    nothing; `check_parts` compares the parts with it. Raises BadZipFile, or nearly anything else,
    where the file is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        start = archive.start_dir
    file.seek(start)
    directory = file.read()
    return {"size": start + len(directory), "directory": zlib.crc32(directory)}


def check_parts(file: IO[bytes]) -> None:
    """Raise BadZipFile, or nearly anything else, where a part is not what the directory says.

    torch writes these checksums and does not look at them when it reads.
    """
    with zipfile.ZipFile(file) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            # torch never compresses; a small file of this kind can unpack to terabytes
            raise zipfile.BadZipFile("it is a compressed archive, which PyTorch does not write")
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


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
    with _readable(path):
        if zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                check_parts(file)
        return torch.load(path, map_location=device, weights_only=True)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever reading a file raises into a UserError that names it."""
    try:
        with warnings.catch_warnings():
            # damaged and very old files make torch warn; what counts is whether they can be read
            warnings.simplefilter("ignore")
            yield
    except pickle.UnpicklingError as e:
        reason = "it holds more than tensors and plain values, or is no PyTorch file"
        raise UserError(f"can't read {path}: {reason}") from e
    except OSError as e:
        raise UserError(f"can't read {path}: {e.strerror or first_line(e)}") from e
    except (EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"can't read {path}: {first_line(e)}") from e
    except Exception as e:  # damaged files make the unpickler raise nearly anything
        raise UserError(f"can't read {path}: {type(e).__name__}: {first_line(e)}") from e


def load_weights(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state dictionary in a file; raises UserError that says what is there if it is missing."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no weights {path}: {_what_is_there(path)}")
    state = load_file(path, device)
    if isinstance(state, Mapping) and _are_weights(state.get("state_dict")):
        state = state["state_dict"]  # as other programs pack them, beside an epoch and the like
    if not _are_weights(state):
        kind = f"a {type(state).__name__}"
        if isinstance(state, Mapping):
            kind = f"a dictionary of {_some([str(k) for k in state]) or 'nothing'}"
        raise UserError(
            f"{path} holds {kind}: wanted is a state_dict of the network alone, that is tensors by "
            "name"
        )
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{path} has no plain numbers for {key}")
    return dict(state)


def _are_weights(state: Any) -> bool:
    return isinstance(state, Mapping) and all(
        isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _what_is_there(path: Path) -> str:
    folder = path.parent
    saved = sorted(p.name for p in folder.glob("*_net_*.pth"))
    if saved:
        return f"{folder} has {_some(saved)}"
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

    def due(self, frequency: int, before: int, epoch_size: int) -> bool:
        """Whether to show something: a multiple of `frequency` was crossed since `before` images.

        An epoch in which that never happens shows it once, at its end.
        """
        over = self.epoch_iter >= epoch_size
        silent = not crossed(frequency, self.total_iters - self.epoch_iter, self.total_iters)
        return crossed(frequency, before, self.total_iters) or (over and silent)

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
    there: dict[str, str] = field(default_factory=dict)  # `tokens` at that moment

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
        full = {**state, "format": FORMAT, "token": token, "files": files}
        write_temporary(full, target, token)
        os.replace(temporary(target, token), target)
    except BaseException:
        for path in [*paths.values(), target]:
            with contextlib.suppress(OSError):
                temporary(path, token).unlink(missing_ok=True)
        raise
    # from here on the new set is the valid one: what can't be moved now is moved when it is read
    flush_folder(folder)
    try:
        finish_renaming(folder, suffix, full)
    except OSError as e:
        warn(f"the new weights '{suffix}' in {folder} wait under temporary names: {e}")
    flush_folder(folder)


def finish_renaming(folder: Path, suffix: str, state: Mapping[str, Any]) -> None:
    """Put weights in place that belong to `state` and are still under their temporary names."""
    for name in state["files"]:
        path = weights_path(folder, suffix, name)
        # another process may be reading this set, and have moved it in this moment
        with contextlib.suppress(FileNotFoundError):
            os.replace(temporary(path, state["token"]), path)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of saves that did not come to their end."""
    leftovers = set(folder.glob(".*.pth.*.tmp"))
    for suffix in saved_suffixes(folder) if leftovers else ():
        try:
            header = read_header(folder, suffix)
            finish_renaming(folder, suffix, header)
        except UserError:
            continue
        except OSError:
            # they can't be moved, but they are a part of a valid set
            leftovers -= {
                temporary(weights_path(folder, suffix, name), header["token"])
                for name in header["files"]
            }
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)


def broken_part(folder: Path, suffix: str, state: Mapping[str, Any]) -> str | None:
    """The first weight file that is not the one that `state` was saved with, and why."""
    for name, expected in state["files"].items():
        path = weights_path(folder, suffix, name)
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                return f"{path.name} is {size} bytes instead of {expected['size']}"
            with open(path, "rb") as file:
                if fingerprint(file) != expected:
                    return f"{path.name} is not what was saved with it"
                check_parts(file)
        except OSError as e:
            return f"{path.name}: {e.strerror or e}"
        except Exception:  # a damaged archive makes zipfile raise nearly anything
            return f"{path.name} is damaged"
    return None


def saved_suffixes(folder: Path) -> list[str]:
    """The names of all saves in a folder that have a training state, whole or not."""
    return sorted(p.name.removesuffix(f"_{STATE}.pth") for p in folder.glob(f"*_{STATE}.pth"))


_TOKEN = re.compile(r"[0-9a-f]+-[0-9a-f]+")


def _check_state(state: Any, path: Path) -> dict[str, Any]:
    """A training state whose entries are what their names promise; raises UserError otherwise."""
    kinds = {"run": str, "token": str, "files": dict, "seed": int}
    kinds |= dict.fromkeys(("format", "epoch", "epoch_iter", "total_iters"), int)
    kinds |= dict.fromkeys(("random", "model", "options"), dict)
    if (
        isinstance(state, dict)
        and isinstance(state.get("format"), int)
        and state["format"] > FORMAT
    ):
        raise UserError(f"{path} was saved by a newer version of this program")
    fits = isinstance(state, dict) and all(
        isinstance(state.get(key), kind) for key, kind in kinds.items()
    )
    # these become parts of file names
    fits = fits and all(_TOKEN.fullmatch(state[key]) for key in ("run", "token"))
    fits = fits and all(
        isinstance(name, str) and Path(name).name == name for name in state["files"]
    )
    if not fits:
        raise UserError(f"{path} is not a training state of this program")
    return state


def read_header(folder: Path, suffix: str) -> dict[str, Any]:
    """The plain values of a training state, such as `run`, `epoch` and `files`; quick.

    Raises UserError where it can't be read. Its tensors are not looked at, and may be damaged.
    """
    path = state_path(folder, suffix)
    with _readable(path):
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is cut off, or no file of this program")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    plain = (str, int, float)
    header = {k: v for k, v in _check_state(state, path).items() if isinstance(v, plain)}
    return {**header, "files": state["files"]}


def read_set(folder: Path, suffix: str, names: Iterable[str]) -> dict[str, Any]:
    """The training state of a whole set; raises UserError that says what is not whole."""
    path = state_path(folder, suffix)
    state = _check_state(load_file(path), path)
    try:
        finish_renaming(folder, suffix, state)
    except OSError as e:
        raise UserError(f"its weights can't be put in place: {e}") from e
    problem = broken_part(folder, suffix, state)
    if problem:
        raise UserError(problem)
    absent = set(names) - set(state["files"])
    if absent:
        raise UserError(f"it was saved without {', '.join(sorted(absent))}: by another --model?")
    return state


def find_set(folder: Path, names: Iterable[str], suffix: str | None = None) -> FoundSet | None:
    """The newest whole set in a folder, or that of `suffix`; weights alone if there is no state.

    None where nothing was saved. Raises UserError where something is there and nothing is whole.
    """
    names = list(names)
    candidates: list[tuple[Any, str]] = []
    skipped: list[str] = []
    there: dict[str, str] = {}
    for name in saved_suffixes(folder):
        try:
            header = read_header(folder, name)
        except UserError as e:
            if suffix in (None, name):
                skipped.append(f"{name}: {e}")
            continue
        there[name] = header["token"]
        if suffix in (None, name):
            # of the newest run the farthest; "latest" rather than the epoch of the same step
            candidates.append(((header["run"], header["total_iters"], name == "latest"), name))
    headless = not state_path(folder, "latest").exists() and any(folder.glob("latest_net_*.pth"))
    if headless and candidates and suffix is None:
        skipped.append(f"latest: there is no latest_{STATE}.pth, only weights")
    for _, name in sorted(candidates, reverse=True):
        try:
            return FoundSet(name, read_set(folder, name, names), skipped, there)
        except UserError as e:
            skipped.append(f"{name}: {e}")
    if skipped:
        raise UserError(
            f"no whole save in {folder} ({'; '.join(skipped)}); restore the files, or delete the "
            f"*_{STATE}.pth to go on from weights alone"
        )
    wanted = suffix or "latest"
    missing = [n for n in names if not weights_path(folder, wanted, n).exists()]
    if names and not missing:
        return FoundSet(wanted, there=there)
    saved = sorted(p.name for p in folder.glob("*_net_*.pth"))
    if suffix is None and saved:
        lacking = weights_path(folder, wanted, missing[0]).name if missing else "no network"
        raise UserError(
            f"--continue_train: {folder} lacks {lacking}; it has {_some(saved)}: choose a save "
            "with --epoch, or another --name, or leave --continue_train out to start anew"
        )
    return None


def tokens(folder: Path) -> dict[str, str]:
    """What tells the present save under each suffix from an earlier one."""
    present = {}
    for suffix in saved_suffixes(folder):
        with contextlib.suppress(UserError):
            present[suffix] = read_header(folder, suffix)["token"]
    return present


def new_run(folder: Path) -> str:
    """A name for a run that sorts behind those of all runs saved in the folder.

    Also where the clock went back, or an earlier run was on a machine whose clock was ahead.
    """
    token = new_token()
    for suffix in saved_suffixes(folder):
        with contextlib.suppress(UserError):
            run = read_header(folder, suffix)["run"]
            if run >= token:
                token = f"{int(run.split('-')[0], 16) + 1:x}-{os.urandom(3).hex()}"
    return token


def newest_save(folder: Path) -> tuple[str, int] | None:
    """Run and number of images of the newest save in a folder; None where there is none."""
    saves = []
    for suffix in saved_suffixes(folder):
        with contextlib.suppress(UserError):
            header = read_header(folder, suffix)
            saves.append((header["run"], header["total_iters"]))
    return max(saves, default=None)


def prune_states(folder: Path, keep: int) -> None:
    """Delete the training states of all but the `keep` newest sets besides latest; not weights.

    States that can't be read are left alone.
    """
    suffixes = [s for s in saved_suffixes(folder) if s != "latest"]
    if len(suffixes) <= keep:
        return
    newest_first = []
    for suffix in suffixes:
        with contextlib.suppress(UserError):
            header = read_header(folder, suffix)
            newest_first.append((header["run"], header["total_iters"], suffix))
    for _, _, suffix in sorted(newest_first, reverse=True)[keep:]:
        state_path(folder, suffix).unlink(missing_ok=True)
