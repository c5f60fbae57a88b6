"""Checkpoints: one file with the whole training state, and exports of its weights.

`<suffix>_train_state.pth` is the checkpoint: the weights and all else that an exact resume needs.
Only this file is read to resume. The exports (`weight_files.py`) are written after it.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from util.errors import UserError
from util.files import replacing

from .weight_files import (
    STATE,
    abbreviated,
    are_weights,
    exported_files,
    load_file,
    save_file,
    weights_path,
    wrap_read_errors,
    write_file,
)

FORMAT = 2  # of the training state
EARLIER = ".earlier_saves"  # marks a folder whose checkpoints are those of an earlier training
UNFINISHED = ".unfinished_save"  # marks a folder whose exports may be older than its checkpoints
KINDS = {  # required entries of a training state, and their types
    "run": str,
    **dict.fromkeys(("format", "epoch", "epoch_iter", "total_iters", "seed"), int),
    **dict.fromkeys(("random", "model", "options", "weights"), dict),
    "suffixes": list,
}


@dataclass
class FoundCheckpoint:
    """The checkpoint to resume from; `state` is None if there are weights alone."""

    suffix: str
    state: dict[str, Any] | None = None
    skipped: list[str] = field(default_factory=list)  # newer ones that are damaged, and why
    unfinished: bool = False  # whether a crash came between the checkpoint and its exports


def state_path(folder: Path, suffix: str) -> Path:
    """The file of a checkpoint."""
    return folder / f"{suffix}_{STATE}.pth"


def _without_tensors(path: Path) -> Any:
    """The content of a file, read quickly: its tensors stay on the disk, and may be damaged."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _check_contents(path: Path) -> None:
    """Raise UserError if a state holds something that can't be loaded again."""
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

    Raises UserError for a state that can't be loaded again, and OSError if a write fails. Then
    either all files are as before, or the first state is new and the file `UNFINISHED` tells that
    the others may be old.
    """
    for leftover in folder.glob(".*.tmp.pth"):  # of a process that was killed during a save
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


def nothing_saved(folder: Path) -> bool:
    """Whether a folder has nothing to resume from.

    A validation may write best_net_* before the first save.
    """
    weights = [name for name in exported_files(folder) if not name.startswith("best_net_")]
    return not (weights or saved_suffixes(folder))


def _check_state(state: Any, path: Path) -> dict[str, Any]:
    """Return a training state whose entries have the right types; raises UserError otherwise."""
    state = state if isinstance(state, dict) else {}
    version = state.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise UserError(f"{path} was saved by a newer version of this program")
    if not (
        all(isinstance(state.get(key), kind) for key, kind in KINDS.items())
        and all(map(are_weights, state["weights"].values()))
        # these become parts of file names
        and all(Path(str(s)).name == s for s in state["suffixes"])
    ):
        raise UserError(f"{path} is not a training state of this program")
    return state


def _ranking(
    folder: Path, only: str | None = None
) -> tuple[dict[str, tuple[str, int, bool]], dict[str, str]]:
    """The age of each state by suffix, newest first; the errors of states that can't be read."""
    ages, errors = {}, {}
    for suffix in [s for s in saved_suffixes(folder) if only in (None, s)]:
        path = state_path(folder, suffix)
        try:
            with wrap_read_errors(path):
                if not zipfile.is_zipfile(path):
                    raise zipfile.BadZipFile("it is cut off, or no file of this program")
                state = _without_tensors(path)
            state = _check_state(state, path)
            # the newest run first, in it the most images; "latest" before an equally new epoch
            ages[suffix] = state["run"], state["total_iters"], suffix == "latest"
        except UserError as e:
            errors[suffix] = str(e)
    return {s: ages[s] for s in sorted(ages, key=ages.__getitem__, reverse=True)}, errors


def find_checkpoint(
    folder: Path, names: Iterable[str], suffix: str | None = None
) -> FoundCheckpoint | None:
    """The newest intact checkpoint, or the one of `suffix`; weights alone if there is no state.

    None if nothing was saved. Raises UserError if there are files, but none of them is intact, and
    if another model has saved it.
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
        except UserError as e:
            if isinstance(e.__cause__, PermissionError):  # intact, but this user can't read it
                raise
            skipped.append(f"{candidate}: {e}")
        else:
            if absent := ", ".join(n for n in names if n not in state["weights"]):
                raise UserError(
                    f"{path} was saved without {absent}, by --model "
                    f"{state['options'].get('model', 'another one')}: give that, or another --name"
                )
            unfinished = suffix is None and (folder / UNFINISHED).exists()
            return FoundCheckpoint(candidate, state, skipped, unfinished)
    if skipped:
        raise UserError(
            f"no intact checkpoint in {folder} ({'; '.join(skipped)}); restore the files, or "
            f"delete the *_{STATE}.pth to go on from weights alone"
        )
    wanted = suffix or "latest"
    missing = [n for n in names if not weights_path(folder, wanted, n).exists()]
    if names and not missing:
        return FoundCheckpoint(wanted)
    if suffix is None and not nothing_saved(folder):
        lacking = weights_path(folder, wanted, missing[0]).name if missing else "no network"
        there = abbreviated(exported_files(folder))
        raise UserError(
            f"--continue_train: {folder} lacks {lacking}; it has {there}: choose a "
            "save with --epoch, or another --name, or leave --continue_train out to start from "
            "scratch"
        )
    return None


def new_run(folder: Path) -> str:
    """A name for a run, made from the time; it sorts after all runs saved in the folder.

    This holds even if the clock went back, or an earlier machine's clock was ahead.
    """
    start = time.time_ns()
    for run, *_ in _ranking(folder)[0].values():
        with contextlib.suppress(ValueError):
            start = max(start, int(run.split("-")[0], 16) + 1)
    return f"{start:x}"


def newest_save(folder: Path) -> tuple[str, int] | None:
    """(run, images seen) of the newest checkpoint, comparable across machines; None without one."""
    for run, images, _ in _ranking(folder)[0].values():
        return run, images
    return None


def prune_states(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` states, besides `latest`; exported weights stay.

    The newest state always stays, even if `--save_by_iter` saves no `latest`. So do states that
    can't be read.
    """
    suffixes = list(_ranking(folder)[0])
    numbered = [suffix for suffix in suffixes if suffix != "latest"]
    for suffix in set(numbered[keep:]) - set(suffixes[:1]):
        state_path(folder, suffix).unlink(missing_ok=True)
