"""Checkpoints: one file with the whole training state, and exports of its weights.

`<suffix>_train_state.pth` is the checkpoint: the weights and all else that training needs to go on
exactly. Only this file is read to resume. `<suffix>_net_<name>.pth` are exports of it for testing
and other programs, a plain state_dict each, written after it.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from util.errors import UserError, first_line, is_out_of_memory
from util.files import replacing

STATE = "train_state"
FORMAT = 2  # of the training state
UNFINISHED = ".unfinished_save"  # in a folder whose exports may be older than its checkpoints
KINDS = {  # entries of a training state that are relied upon
    "run": str,
    **dict.fromkeys(("format", "epoch", "epoch_iter", "total_iters", "seed"), int),
    **dict.fromkeys(("random", "model", "options", "weights"), dict),
    "suffixes": list,
}
# NumPy's numbers and arrays may be read too: a schedule that is written with it has some.
_NUMBERS = "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]
torch.serialization.add_safe_globals(
    [
        *{type(np.dtype(code)) for code in _NUMBERS},
        *(np.dtype, np.ndarray, np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]),
    ]
)


# ------------------------------------------------------------------------------------ single files
class DiskWriter:
    """A file for `torch.save` that keeps an error of the disk, or of a signal that arrives here.

    Raised inside `torch.save`, it would come out as another one, or end the process.
    """

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: Exception | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except Exception as e:  # torch raises from a signal when a loading process is killed
                self.error = e
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass


def write_file(value: Any, path: Path) -> None:
    """`torch.save` that raises OSError where the disk fails."""
    with open(path, "wb") as file:
        writer = DiskWriter(file)
        torch.save(value, writer)
        if writer.error is not None:
            raise writer.error


def save_file(value: Any, path: str | Path) -> None:
    """`torch.save` in one step: `path` is the old file or the whole new one, never a part."""
    with replacing(path) as temporary:
        write_file(value, temporary)


def load_file(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read a file of tensors and plain values, and verify its checksums.

    Raises UserError where that fails. Code in the file is never run (`weights_only`).
    """
    with _readable(path):
        if zipfile.is_zipfile(path):  # torch writes checksums, and does not read them
            _verify_checksums(path)
        return torch.load(path, map_location=device, weights_only=True)


def _verify_checksums(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            # torch never compresses; a small file of this kind can unpack to terabytes
            raise zipfile.BadZipFile("it is a compressed archive, which PyTorch does not write")
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever reading a file raises into a UserError that names it."""
    try:
        with warnings.catch_warnings():
            # damaged and very old files make torch warn; what counts is whether they can be read
            warnings.simplefilter("ignore")
            yield
    except Exception as e:  # damaged files make the unpickler raise nearly anything
        if is_out_of_memory(e):
            raise
        reason = first_line(e)
        if isinstance(e, pickle.UnpicklingError):
            reason = "it holds more than tensors and plain values, or is no PyTorch file"
        elif isinstance(e, OSError):
            reason = e.strerror or reason
        elif not isinstance(e, (EOFError, RuntimeError, ValueError, zipfile.BadZipFile)):
            reason = f"it is damaged, or no PyTorch file ({type(e).__name__}: {reason})"
        raise UserError(f"can't read {path}: {reason}") from e


def load_weights(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
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
            f"{path} holds {kind} in place of a state_dict of one network (tensors by name)"
        )
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{path}: {key} is not a dense tensor (sparse, quantized or meta)")
    return dict(state)


def _are_weights(state: Any) -> bool:
    return isinstance(state, Mapping) and all(
        isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()
    )


def _some(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 12 else [*names[:6], "...", *names[-6:]])


def _what_is_there(path: Path) -> str:
    folder = path.parent
    saved = exported_files(folder)
    suffix = path.name.partition("_net_")[0]
    suffixes = {name.partition("_net_")[0] for name in saved}
    if suffix in suffixes:  # other networks of that save
        return f"{folder} has {_some([s for s in saved if s.startswith(f'{suffix}_net_')])}"
    if saved:
        in_order = sorted(suffixes, key=lambda s: (not s.isdigit(), len(s), s))
        hint = "; best needs training with --val_freq" if suffix == "best" else ""
        return f"there are {_some(in_order)}{hint}"
    others = sorted(p.name for p in folder.glob("[!.]*.pth") if STATE not in p.name)
    if others:
        hint = f": rename the generator's to {path.name}" if "_net_G" in path.name else ""
        return f"{folder} has {_some(others)}{hint}"
    if any(folder.glob("[!.]*")):  # a training that was refused leaves its .lock
        return f"{folder} has no weights at all"
    if names := experiments(folder.parent):
        return f"there is no experiment --name {folder.name}; there are {', '.join(names)}"
    return f"there is no experiment --name {folder.name}, and none at all in {folder.parent}"


# -------------------------------------------------------------------------------------- checkpoints
@dataclass
class FoundCheckpoint:
    """The checkpoint to go on from; `state` is None where there are weights alone."""

    suffix: str
    state: dict[str, Any] | None = None
    skipped: list[str] = field(default_factory=list)  # newer ones that are damaged, and why
    unfinished: bool = False  # whether a crash came between the checkpoint and its exports


def state_path(folder: Path, suffix: str) -> Path:
    """The file of a checkpoint."""
    return folder / f"{suffix}_{STATE}.pth"


def weights_path(folder: Path, suffix: str, name: str) -> Path:
    """The file with the exported weights of a network."""
    return folder / f"{suffix}_net_{name}.pth"


def experiments(folder: Path) -> list[str]:
    """The names of the experiments with weights in a `--checkpoints_dir`."""
    return sorted({p.parent.name for p in folder.glob("*/[!.]*_net_*.pth")})


def exported_files(folder: Path) -> list[str]:
    """The names of all files with weights in a folder."""
    return sorted(p.name for p in folder.glob("[!.]*_net_*.pth"))


def _without_tensors(path: Path) -> Any:
    """What a file holds; its tensors stay on the disk, and may be damaged. This is quick."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _check_contents(path: Path) -> None:
    """Raise UserError where a state holds what can't be read back."""
    try:
        _without_tensors(path)
    except pickle.UnpicklingError as e:
        found = re.search(r"GLOBAL (\S+)", str(e))
        raise UserError(
            f"nothing is saved: the model's state holds {found[1] if found else 'an object'}, and "
            "only tensors, numbers, text, lists and dictionaries can be loaded again; convert it "
            "in the state_dict() that it comes from"
        ) from e


def save_checkpoint(
    folder: Path, suffixes: Sequence[str], state: Mapping[str, Any], export: Callable[[str], None]
) -> None:
    """Save the state under each suffix, then the weights by `export(suffix)`.

    Raises UserError for a state that can't be read again, and OSError where a write fails. Then
    either all files are as before, or the first state is new and the file `UNFINISHED` tells that
    the others may be old.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp.pth"):  # of a process that was killed in a save
        leftover.unlink(missing_ok=True)
    first, *others = suffixes
    state = {**state, "format": FORMAT, "suffixes": list(suffixes)}
    with replacing(state_path(folder, first)) as temporary:
        write_file(state, temporary)
        _check_contents(temporary)
        (folder / UNFINISHED).touch()
    for suffix in others:
        save_file(state, state_path(folder, suffix))
    for suffix in suffixes:
        export(suffix)
    (folder / UNFINISHED).unlink()


def saved_suffixes(folder: Path) -> list[str]:
    """The names of all checkpoints in a folder, whole or not."""
    return sorted(p.name.removesuffix(f"_{STATE}.pth") for p in folder.glob(f"*_{STATE}.pth"))


def _check_state(state: Any, path: Path) -> dict[str, Any]:
    """A training state whose entries have the types they should; raises UserError otherwise."""
    state = state if isinstance(state, dict) else {}
    version = state.get("format")
    if isinstance(version, int) and version != FORMAT:
        age = "a newer" if version > FORMAT else "an older"
        raise UserError(f"{path} was saved by {age} version of this program")
    if not (
        all(isinstance(state.get(key), kind) for key, kind in KINDS.items())
        and all(map(_are_weights, state["weights"].values()))
        # these become parts of file names
        and all(Path(str(s)).name == s for s in state["suffixes"])
    ):
        raise UserError(f"{path} is not a training state of this program")
    return state


def _ranking(
    folder: Path, only: str | None = None
) -> tuple[dict[str, tuple[str, int, bool]], dict[str, str]]:
    """The age of each state by suffix, the newest first; the errors of those that can't be read."""
    ages, errors = {}, {}
    for suffix in [s for s in saved_suffixes(folder) if only in (None, s)]:
        path = state_path(folder, suffix)
        try:
            with _readable(path):
                if not zipfile.is_zipfile(path):
                    raise zipfile.BadZipFile("it is cut off, or no file of this program")
                state = _without_tensors(path)
            state = _check_state(state, path)
            # of the newest run the farthest; "latest" rather than the epoch of the same step
            ages[suffix] = state["run"], state["total_iters"], suffix == "latest"
        except UserError as e:
            errors[suffix] = str(e)
    return {s: ages[s] for s in sorted(ages, key=ages.__getitem__, reverse=True)}, errors


def find_checkpoint(
    folder: Path, names: Iterable[str], suffix: str | None = None
) -> FoundCheckpoint | None:
    """The newest whole checkpoint, or that of `suffix`; weights alone if there is no state.

    None where nothing was saved. Raises UserError where files are there, and none of them is whole.
    """
    names = list(names)
    ages, errors = _ranking(folder, suffix)
    latest_lost = not state_path(folder, "latest").exists() and any(folder.glob("latest_net_*.pth"))
    if suffix is None and ages and latest_lost:
        errors["latest"] = f"there is no latest_{STATE}.pth, only weights"
    skipped = [f"{s}: {error}" for s, error in errors.items()]
    for candidate in ages:
        try:
            path = state_path(folder, candidate)
            state = _check_state(load_file(path), path)
            if absent := ", ".join(n for n in names if n not in state["weights"]):
                raise UserError(f"it was saved without {absent}: by another --model?")
        except UserError as e:
            if isinstance(e.__cause__, PermissionError):  # whole, but not ours to read
                raise
            skipped.append(f"{candidate}: {e}")
        else:
            unfinished = suffix is None and (folder / UNFINISHED).exists()
            return FoundCheckpoint(candidate, state, skipped, unfinished)
    if skipped:
        raise UserError(
            f"no intact checkpoint in {folder} ({'; '.join(skipped)}); restore the files, or "
            f"delete the *_{STATE}.pth to go on from weights alone"
        )
    # the best so far of a validation comes before the first save, and is no save to go on from
    saved = [name for name in exported_files(folder) if not name.startswith("best_net_")]
    wanted = suffix or "latest"
    missing = [n for n in names if not weights_path(folder, wanted, n).exists()]
    if names and not missing:
        return FoundCheckpoint(wanted)
    if suffix is None and saved:
        lacking = weights_path(folder, wanted, missing[0]).name if missing else "no network"
        raise UserError(
            f"--continue_train: {folder} lacks {lacking}; it has {_some(saved)}: choose a save "
            "with --epoch, or another --name, or leave --continue_train out to start from scratch"
        )
    return None


def new_run(folder: Path) -> str:
    """A name for a run, made from the time; it sorts after all runs saved in the folder.

    It does so even if the clock went back, or an earlier machine's clock was ahead.
    """
    start = time.time_ns()
    for run, *_ in _ranking(folder)[0].values():
        with contextlib.suppress(ValueError):
            start = max(start, int(run.split("-")[0], 16) + 1)
    return f"{start:x}"


def newest_save(folder: Path) -> tuple[str, int] | None:
    """(run, images seen) of the newest checkpoint, comparable across machines; None without one."""
    return next(((run, images) for run, images, _ in _ranking(folder)[0].values()), None)


def prune_states(folder: Path, keep: int) -> None:
    """Delete old states, but not the exported weights: `keep` stay, besides latest.

    The newest one always stays, also where `--save_by_iter` saves no latest. So do states that
    can't be read.
    """
    suffixes = list(_ranking(folder)[0])
    numbered = [suffix for suffix in suffixes if suffix != "latest"]
    for suffix in set(numbered[keep:]) - set(suffixes[:1]):
        state_path(folder, suffix).unlink(missing_ok=True)
