"""Weight files: writing and reading them, and listing those in a folder.

`<suffix>_net_<name>.pth` is a plain state_dict, for testing and for other programs.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from util.errors import UserError, first_line, is_out_of_memory
from util.files import replacing

STATE = "train_state"  # in the names of checkpoints, which are not weight files
GENERATOR_NAMES = {"G", "G_A", "G_B"}  # as in the names of weight files
# allow NumPy's numbers and arrays too: the state of a schedule that uses NumPy holds some
_NUMBERS = "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]
torch.serialization.add_safe_globals(
    [
        *{type(np.dtype(code)) for code in _NUMBERS},
        *(np.dtype, np.ndarray, np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]),
    ]
)


class DiskWriter:
    """A file for `torch.save` that stores errors of the disk, or of a signal that arrives here.

    Raised inside `torch.save`, such an error would become a different one, or end the process.
    """

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: Exception | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except Exception as e:  # torch's signal handler raises if a DataLoader worker is killed
                self.error = e
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass


def write_file(value: Any, path: Path) -> None:
    """`torch.save` that raises OSError if the disk fails."""
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

    Raises UserError if that fails. Code in the file is never run (`weights_only`).
    """
    with wrap_read_errors(path):
        if zipfile.is_zipfile(path):  # torch writes checksums, but does not verify them
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
def wrap_read_errors(path: Path) -> Iterator[None]:
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
    """The state dictionary in a file; if it is missing, UserError says what the folder has."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no weights {path}: {_what_is_there(path)}")
    state = load_file(path, device)
    if isinstance(state, Mapping) and are_weights(state.get("state_dict")):
        state = state["state_dict"]  # as other programs save it, beside an epoch and the like
    if not are_weights(state):
        kind = f"a {type(state).__name__}"
        if isinstance(state, Mapping):
            kind = f"a dictionary of {abbreviated([str(k) for k in state]) or 'nothing'}"
        raise UserError(
            f"{path} holds {kind} in place of a state_dict of one network (tensors by name)"
        )
    if odd := [k for k, v in state.items() if v.layout is not torch.strided or v.is_meta]:
        raise UserError(f"{path}: {odd[0]} is sparse or has no values: save it as a dense tensor")
    return dict(state)


def are_weights(state: Any) -> bool:
    """Whether this is a state dictionary: tensors by name."""
    return isinstance(state, Mapping) and all(
        isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()
    )


def abbreviated(names: list[str]) -> str:
    """The names as text; of many, only the first and last ones."""
    return ", ".join(names if len(names) <= 12 else [*names[:6], "...", *names[-6:]])


def _what_is_there(path: Path) -> str:
    folder = path.parent
    saved = exported_files(folder)
    suffix = path.name.partition("_net_")[0]
    suffixes = {name.partition("_net_")[0] for name in saved}
    if suffix in suffixes:  # other networks of that save
        names = [s for s in saved if s.startswith(f"{suffix}_net_")]
        found = {Path(name).stem.removeprefix(f"{suffix}_net_") for name in names}
        elsewhere = "_net_G" in path.name and not found & GENERATOR_NAMES
        hint = "; load_generator and --model test take G, G_A or G_B" if elsewhere else ""
        return f"{folder} has {abbreviated(names)}{hint}"
    if saved:
        in_order = sorted(suffixes, key=lambda s: (not s.isdigit(), len(s), s))
        hint = "; best needs training with --val_freq" if suffix == "best" else ""
        return f"there are {abbreviated(in_order)}{hint}"
    others = sorted(p.name for p in folder.glob("[!.]*.pth") if STATE not in p.name)
    if others:
        hint = f": rename the generator's to {path.name}" if "_net_G" in path.name else ""
        return f"{folder} has {abbreviated(others)}{hint}"
    if any(folder.glob("[!.]*")):  # a training that was refused leaves its .lock
        return f"{folder} has no weights at all{earlier_hint(folder)}"
    if names := experiments(folder.parent):
        return f"there is no experiment --name {folder.name}; there are {', '.join(names)}"
    return f"there is no experiment --name {folder.name}, and none at all in {folder.parent}"


def earlier_hint(folder: Path) -> str:
    """Where the weights of an earlier training under this name are; empty if there are none."""
    found = sorted(p.parent.name for p in folder.glob("earlier.*/*.pth"))
    there = f"an earlier training's weights are in {folder / found[-1]}" if found else ""
    return f"; {there}: move them back to use them" if found else ""


def weights_path(folder: Path, suffix: str, name: str) -> Path:
    """The file with the exported weights of a network."""
    return folder / f"{suffix}_net_{name}.pth"


def experiments(folder: Path) -> list[str]:
    """The names of the experiments with weights in a `--checkpoints_dir`."""
    return sorted({p.parent.name for p in folder.glob("*/[!.]*_net_*.pth")})


def exported_files(folder: Path) -> list[str]:
    """The names of all files with weights in a folder."""
    return sorted(p.name for p in folder.glob("[!.]*_net_*.pth"))
