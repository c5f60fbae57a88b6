"""Damaged, missing and foreign files, full disks, second trainings, signals, and NaN."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from models import create_model
from options.train_options import TrainOptions
from tests import forked, helpers
from util.errors import UserError, say, warn
from util.run import checkpoint, weight_files
from util.run.finite import MAX_CONSECUTIVE_SKIPS, FiniteGuard
from util.run.position import Position
from util.run.stopping import ExperimentLock, StopRequest
from util.scores.validation import Validation

NETS = ("G_A", "G_B", "D_A", "D_B")


# ----------------------------------------------------------------------------- a trained experiment
@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = helpers.unaligned(tmp_path_factory.mktemp("pictures"), count=4)
    return helpers.aligned(folder, count=4)


def words(pictures: Path, folder: Path, *more: str, model: str = "cycle_gan") -> list[str]:
    where = ["--dataroot", str(pictures), "--checkpoints_dir", str(folder), "--name", "x"]
    kind = ["--model", model, "--no_html", "--display_id", "0", "--pool_size", "3"]
    lengths = "--n_epochs 2 --n_epochs_decay 0 --save_epoch_freq 1 --print_freq 1".split()
    return [*where, *kind, *helpers.TINY, *lengths, *more]


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    """Two whole sets: "1", and "latest", which is one epoch ahead of it."""
    folder = tmp_path_factory.mktemp("trained")
    helpers.succeed("train.py", *words(pictures, folder, "--keep_states", "2"))
    for path in (folder / "x").glob("2_*"):
        path.unlink()
    assert len(list((folder / "x").glob("*.pth"))) == 10
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of that, to be damaged; the folder of the experiment itself."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy" / "x"


@pytest.fixture(scope="module")
def fresh(pictures, tmp_path_factory) -> Any:
    """A model of the same kind that has loaded nothing; `load` points it to a folder."""
    opt = TrainOptions(words(pictures, tmp_path_factory.mktemp("none"))).parse(save=False)
    model = create_model(opt)
    model.setup(opt)
    return model


def load(model: Any, folder: Path, epoch: str = "latest") -> None:
    model.save_dir, model.opt.epoch = folder, epoch
    model.load_saved(model.opt)


def copy_of_weights(model: Any) -> dict[str, torch.Tensor]:
    states = model.network_states()
    return {f"{n}.{k}": v.clone() for n, state in states.items() for k, v in state.items()}


def saved_weights(folder: Path, suffix: str) -> dict[str, torch.Tensor]:
    """Those of the training state, or of the exported files where there is none."""
    path = folder / f"{suffix}_train_state.pth"
    if path.exists():
        states = torch.load(path, weights_only=True)["weights"]
    else:
        paths = {n: folder / f"{suffix}_net_{n}.pth" for n in NETS}
        states = {n: torch.load(path, weights_only=True) for n, path in paths.items()}
    return {f"{n}.{k}": v for n, state in states.items() for k, v in state.items()}


def same(a: Any, b: Any) -> bool:
    """Whether nested values are equal, tensors bit for bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


def loads_whole_or_says_why(model: Any, folder: Path, original: Path) -> str:
    """Load; the model must be that of one of the original sets, or as it was. Returns which."""
    before = copy_of_weights(model)
    refusal = None
    try:
        load(model, folder)
    except UserError as e:
        refusal = str(e)
    if refusal is not None:
        assert one_line(refusal).isprintable()
        assert same(copy_of_weights(model), before), "half a model was loaded"
        return "refused"
    suffix = model.resumed.suffix
    assert same(copy_of_weights(model), saved_weights(original, suffix))
    if model.resumed.state is None:
        return "weights"
    wanted = torch.load(original / f"{suffix}_train_state.pth", weights_only=True)
    del wanted["weights"]  # in the networks, not kept a second time
    assert same(model.resumed.state, wanted)
    return suffix


# ------------------------------------------------------------------------------------------- damage
def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.choice([0, 1, rng.randrange(path.stat().st_size)]))


def garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.choice([1, 100, path.stat().st_size])))


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 8])):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    path.write_bytes(bytes(data))


def zeros(path: Path, rng: random.Random) -> None:
    """What is left of a file after some crashes of file systems: its size, and no content."""
    size, start = path.stat().st_size, rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:start] + bytes(size - start))


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def other_set(path: Path, rng: random.Random) -> None:
    """The same file of the other set: whole, but of another moment."""
    suffix, rest = path.name.split("_", 1)
    other = "1" if suffix == "latest" else "latest"
    shutil.copy(path.with_name(f"{other}_{rest}"), path)


FILES = [f"{s}_{n}.pth" for s in ("latest", "1") for n in ("train_state", "net_G_A", "net_D_B")]


@pytest.mark.parametrize(
    ("damage", "times"), [(truncate, 9), (garbage, 4), (flip, 12), (zeros, 3), (remove, 1)]
)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(name, damage, times, trained, fresh, copied, capsys):
    rng = random.Random(f"{name} {damage.__name__}")
    original = trained / "x"
    for _ in range(times):
        damage(copied / name, rng)
        result = loads_whole_or_says_why(fresh, copied, original)
        if "_net_" in name:
            # an export: the training state has the weights as well
            assert result == "latest"
            said = f"training goes on from {copied / 'latest_train_state.pth'}"
            error = capsys.readouterr().err
            if damage is not flip:
                assert (said in error) == name.startswith("latest")
        elif damage is flip:
            # a bit that carries nothing, such as padding or a date, may be any
            assert result in ("latest", "1")
        else:
            assert result == ("1" if name.startswith("latest") else "latest")
        if result == "1":
            assert any(one_line(s).startswith("latest: ") for s in fresh.resumed.skipped)
        shutil.copy(original / name, copied / name)


def test_weights_that_a_user_replaced_beside_a_state_are_not_used_but_named(
    trained, fresh, copied, capsys
):
    other_set(copied / "latest_net_G_B.pth", random.Random(0))
    assert loads_whole_or_says_why(fresh, copied, trained / "x") == "latest"
    path = copied / "latest_train_state.pth"
    assert one_line(capsys.readouterr().err) == (
        "warning: the files of G_B have other weights; training goes on from "
        f"{path}: delete it to start from weights alone"
    )
    path.unlink()
    (copied / "1_train_state.pth").unlink()
    load(fresh, copied)
    assert fresh.resumed.state is None
    assert same(copy_of_weights(fresh), saved_weights(copied, "latest"))


@pytest.mark.slow
def test_both_sets_damaged_in_random_ways(trained, fresh, tmp_path):
    rng = random.Random(1)
    results = []
    for case in range(20):
        folder = tmp_path / str(case)
        shutil.copytree(trained / "x", folder)
        for suffix in ("latest", "1"):
            name = rng.choice(["train_state", "train_state", *(f"net_{n}" for n in NETS)])
            damage = rng.choice([truncate, garbage, zeros, remove])
            damage(folder / f"{suffix}_{name}.pth", rng)
        whole = {s for s in ("latest", "1") if state_is_whole(folder, trained / "x", s)}
        results.append(loads_whole_or_says_why(fresh, folder, trained / "x"))
        if whole:
            assert results[-1] == max(whole)  # "latest" is the newer one
        shutil.rmtree(folder)
    # where both states are gone, weights alone may be whole
    assert set(results) <= {"latest", "1", "refused", "weights"}
    assert {"latest", "1", "refused"} <= set(results)


def state_is_whole(folder: Path, original: Path, suffix: str) -> bool:
    path, wanted = (f / f"{suffix}_train_state.pth" for f in (folder, original))
    return path.exists() and path.read_bytes() == wanted.read_bytes()


def test_another_model_is_no_reason_to_delete_checkpoints(pictures, copied):
    argv = words(pictures, copied.parent, "--continue_train", "--model", "cut")
    said = helpers.run("train.py", *argv).err.splitlines()[-1]  # after a warning of options
    assert "_train_state.pth was saved without G, F, D, by --model cycle_gan: give that" in said
    assert "delete" not in said


def test_the_programs_say_it_in_one_line(pictures, copied):
    for path in copied.glob("*_train_state.pth"):
        os.truncate(path, 1000)
    folder = copied.parent
    result = helpers.run("train.py", *words(pictures, folder, "--continue_train"))
    assert result.code == 1
    assert "no intact checkpoint" in one_line(result.err)
    (copied / "latest_net_G_A.pth").write_bytes(b"not a network")
    argv = ["--dataroot", str(pictures), "--checkpoints_dir", str(folder), "--name", "x"]
    argv += ["--model", "cycle_gan", "--num_threads", "0", "--gpu_ids", "-1"]
    result = helpers.run("test.py", *argv, "--results_dir", str(folder / "results"))
    assert result.code == 1
    assert "latest_net_G_A.pth" in one_line(result.err)


def test_resumes_from_the_older_set_with_a_warning(pictures, copied):
    os.truncate(copied / "latest_train_state.pth", 1000)
    result = helpers.succeed("train.py", *words(pictures, copied.parent, "--continue_train"))
    assert "warning: skipping a damaged checkpoint: latest: can't read " in result.err
    assert "resuming from '1': epoch 2, 0 images into it, 4 in all" in result.out


# ------------------------------------------------------------------------------------ foreign files
class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", ["latest_net_G_A.pth", "latest_train_state.pth"])
@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_code_in_a_file_is_not_run(name, form, fresh, copied, tmp_path):
    marker = tmp_path / "code was run"
    content = {"format": 1, "model.1.weight": torch.zeros(1), "x": Bomb(marker)}
    if form == "pickle":
        (copied / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, copied / name, _use_new_zipfile_serialization=form == "torch")
    for path in {*copied.glob("1_*"), *copied.glob("*_train_state.pth")}:
        if path.name != name:
            path.unlink()
    before = copy_of_weights(fresh)
    with pytest.raises(UserError, match=r"more than tensors|no file of this program|instead of"):
        load(fresh, copied)
    if name.startswith("latest_net"):
        fresh.save_dir = copied
        with pytest.raises(UserError, match="more than tensors and plain values"):
            fresh.load_networks("latest")
    assert not marker.exists()
    assert same(copy_of_weights(fresh), before)


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**7))
    with pytest.raises(UserError, match="compressed"):
        weight_files.load_file(path)


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        {"model.1.weight": 3},
        {1: torch.zeros(1)},
        {},
    ],
    ids=["list", "numbers", "numbered", "empty"],
)
def test_weights_of_a_wrong_kind_change_nothing(value, fresh, copied):
    torch.save(value, copied / "latest_net_D_B.pth")
    before = copy_of_weights(fresh)
    fresh.save_dir = copied
    with pytest.raises(UserError, match=r"latest_net_D_B\.pth"):
        fresh.load_networks("latest")
    assert same(copy_of_weights(fresh), before)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": 5},
        {"suffixes": ["../../x"]},
        {"weights": {name: {"model.1.weight": 3} for name in NETS}},
        {"run": 3},
        {"epoch": "1"},
        {"random": None},
        {"format": 99},
    ],
    ids=lambda change: next(iter(change)),
)
def test_states_that_are_not_ours(change, fresh, copied):
    path = copied / "latest_train_state.pth"
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    load(fresh, copied)
    assert fresh.resumed.suffix == "1"
    wanted = "a newer version" if "format" in change else "not a training state"
    assert wanted in fresh.resumed.skipped[0]


def test_a_state_that_does_not_fit_is_one_line(pictures, copied):
    """Whole and of this program, but with optimizers of another network."""
    path = copied / "latest_train_state.pth"
    state = torch.load(path, weights_only=True)
    state["model"]["optimizers"][0]["param_groups"][0]["params"].pop()
    torch.save(state, path)
    result = helpers.run("train.py", *words(pictures, copied.parent, "--continue_train"))
    assert result.code == 1
    assert "does not fit this training" in one_line(result.err)


# ------------------------------------------------------------------------------------------- saving
def small_set(folder: Path, suffix: str, step: int, run: str = "1-a") -> None:
    """Save a set of two small networks."""
    numbers = {name: {"w": torch.full((100,), float(step))} for name in ("G", "D")}
    state = {"run": run, "epoch": 1, "epoch_iter": step, "total_iters": step, "seed": 0}
    state |= {"random": {}, "model": {}, "options": {}, "weights": numbers}

    def export(suffix: str) -> None:
        for name, weights in numbers.items():
            weight_files.save_file(weights, weight_files.weights_path(folder, suffix, name))

    checkpoint.save_checkpoint(folder, [suffix], state, export)


def step_found(folder: Path) -> int:
    found = checkpoint.find_checkpoint(folder, ["G", "D"])
    assert found is not None
    assert found.state is not None
    for weights in found.state["weights"].values():
        assert (weights["w"] == found.state["total_iters"]).all()
    return Position.from_state(found.state).total_iters


@pytest.fixture
def operations(monkeypatch) -> list[str]:
    """The names of files that are flushed and renamed, in the order in which that happens."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append("flush folder" if path.is_dir() else f"flush {path.name.split('.')[1]}")
        fsync(descriptor)

    def seen_replace(source: Any, target: Any) -> None:
        assert Path(source).stat().st_size > 1000, "renamed before it was written"
        seen.append(f"rename {Path(target).stem}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_save_flushes_before_it_renames_and_has_the_state_first(tmp_path, operations):
    small_set(tmp_path, "latest", 1)

    def steps(name: str) -> list[str]:
        return [f"flush {name}", f"rename {name}", "flush folder"]

    names = ("latest_train_state", "latest_net_G", "latest_net_D")
    assert operations == [step for name in names for step in steps(name)]


@pytest.mark.parametrize("failing", ["D", "train_state"])
def test_a_save_that_fails_anywhere_leaves_a_whole_one(failing, tmp_path, monkeypatch):
    small_set(tmp_path, "latest", 1)
    write_file = weight_files.write_file

    def full(value: Any, path: Path) -> None:
        write_file(value, path)
        if path.name.split(".")[1].endswith(failing):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        for module in (checkpoint, weight_files):
            patch.setattr(module, "write_file", full)
        with pytest.raises(OSError, match="No space"):
            small_set(tmp_path, "latest", 2)
    assert step_found(tmp_path) == (2 if failing == "D" else 1)
    assert [p.name for p in tmp_path.glob(".*")] == [checkpoint.UNFINISHED] * (failing == "D")
    small_set(tmp_path, "latest", 3)
    assert step_found(tmp_path) == 3
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "last", ["latest_train_state", "2_train_state", "latest_net_G", "latest_net_D", "2_net_G"]
)
def test_a_crash_between_any_two_files_is_mended_on_resuming(last, pictures, tmp_path, monkeypatch):
    """The last save of all: no later one would write what is missing."""
    argv = words(pictures, tmp_path, "--n_epochs", "1", model="pix2pix")
    helpers.succeed("train.py", *argv)
    argv += ["--n_epochs", "2", "--continue_train"]
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "x", whole / "x")
    helpers.succeed("train.py", *argv, "--checkpoints_dir", str(whole))
    replace = os.replace

    def crash(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).stem == last:
            raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        assert helpers.run("train.py", *argv).code == 9
    result = helpers.succeed("train.py", *argv)
    assert "the last checkpoint was interrupted: saving it again" in result.out
    assert "nothing to do: epoch 2 of 2 is done" in result.out
    assert "warning" not in result.err
    for suffix in ("latest", "2"):
        for name in ("net_G", "net_D", "train_state"):
            file = f"{suffix}_{name}.pth"
            ours, wanted = (
                torch.load(f / "x" / file, weights_only=True) for f in (tmp_path, whole)
            )
            for content in (ours, wanted):
                content.pop("options", None)  # names of folders
            assert same(ours, wanted), file
    assert not (tmp_path / "x" / checkpoint.UNFINISHED).exists()


def test_a_crash_in_the_first_save_leaves_nothing_or_all(pictures, tmp_path, monkeypatch):
    """No weights without their state, which would look like weights that a user put there."""
    argv = words(pictures, tmp_path, "--n_epochs", "1", "--continue_train", model="pix2pix")
    renamed = []

    def crash(source: Any, target: Any) -> None:
        renamed.append(Path(target).stem)
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        for module in (checkpoint, weight_files):
            patch.setattr(module, "replacing", patched_replacing(crash))
        assert helpers.run("train.py", *argv).code == 9
    assert renamed == ["latest_train_state"]
    assert "nothing is saved in" in helpers.succeed("train.py", *argv).out


def patched_replacing(crash: Any) -> Any:
    """`files.replacing` that leaves its temporary file behind, as a kill does."""

    @contextlib.contextmanager
    def replacing(path: Path) -> Any:
        temporary = path.with_name(f".{path.stem}.01234567.tmp{path.suffix}")
        yield temporary
        crash(temporary, path)

    return replacing


def test_files_of_a_killed_save_are_removed_by_the_next(tmp_path):
    (tmp_path / ".latest_train_state.0123abcd.tmp.pth").write_bytes(b"half")
    small_set(tmp_path, "latest", 1)
    assert not list(tmp_path.glob(".*"))


def test_what_a_model_saves_and_loads_besides_networks(pictures, tmp_path, monkeypatch):
    """A subclass of the user's that extends save_networks and load_networks."""
    from models.pix2pix_model import Pix2PixModel as Model

    save, load = Model.save_networks, Model.load_networks
    loaded = []

    def save_more(self: Any, epoch: Any) -> None:
        save(self, epoch)
        Path(self.save_dir, f"{epoch}_more.txt").write_text(f"more of {epoch}")

    def load_more(self: Any, epoch: Any) -> None:
        load(self, epoch)
        loaded.append(Path(self.save_dir, f"{epoch}_more.txt").read_text())

    monkeypatch.setattr(Model, "save_networks", save_more)
    monkeypatch.setattr(Model, "load_networks", load_more)
    helpers.succeed("train.py", *words(pictures, tmp_path, model="pix2pix"))
    assert sorted(p.name for p in (tmp_path / "x").glob("*_more.txt")) == [
        "1_more.txt",
        "2_more.txt",
        "latest_more.txt",
    ]
    argv = words(pictures, tmp_path, "--continue_train", "--n_epochs", "3", model="pix2pix")
    helpers.succeed("train.py", *argv)
    assert loaded == ["more of latest"]


def test_numbers_of_numpy_come_back(tmp_path):
    """Schedules that are written with NumPy put them into the state."""
    values = [np.float64(0.1), np.float32(0.5), np.int64(-3), np.bool_(True), np.arange(4.0)]
    checkpoint.save_checkpoint(tmp_path, ["latest"], {"values": values}, lambda _: None)
    found = weight_files.load_file(checkpoint.state_path(tmp_path, "latest"))["values"]
    assert [type(value) for value in found] == [type(value) for value in values]
    assert all(np.array_equal(a, b) for a, b in zip(found, values, strict=True))


def test_what_could_not_be_read_again_is_refused_when_saving(tmp_path):
    path = checkpoint.state_path(tmp_path, "latest")
    checkpoint.save_checkpoint(tmp_path, ["latest"], {"values": [1]}, lambda _: None)
    whole = path.read_bytes()
    with pytest.raises(UserError, match=r"holds collections\.deque, and only tensors"):
        checkpoint.save_checkpoint(
            tmp_path, ["latest"], {"values": collections.deque([1])}, lambda _: None
        )
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_clock_may_go_back(tmp_path):
    """Runs are told apart by time; one that starts anew comes last all the same."""
    ahead = f"{time.time_ns() + 10**18:x}-abc"
    small_set(tmp_path, "7", 700, run=ahead)
    run = checkpoint.new_run(tmp_path)
    small_set(tmp_path, "latest", 1, run=run)
    assert step_found(tmp_path) == 1
    checkpoint.prune_states(tmp_path, 0)
    assert checkpoint.saved_suffixes(tmp_path) == ["latest"]


def test_pruning_goes_by_position_not_by_date(tmp_path):
    for step in (1, 2, 3):
        small_set(tmp_path, str(step), step)
        os.utime(tmp_path / f"{step}_train_state.pth", (10**9 - step, 10**9 - step))
    (tmp_path / "odd_train_state.pth").write_bytes(b"?")
    checkpoint.prune_states(tmp_path, 2)
    assert checkpoint.saved_suffixes(tmp_path) == ["2", "3", "odd"]
    checkpoint.prune_states(tmp_path, 0)
    assert checkpoint.saved_suffixes(tmp_path) == ["3", "odd"], "nothing to go on from"
    assert len(list(tmp_path.glob("*_net_*.pth"))) == 6


@pytest.mark.parametrize(("keep", "left"), [(0, ["latest"]), (1, ["2", "latest"])])
def test_keep_states(keep, left, pictures, tmp_path):
    argv = words(pictures, tmp_path, "--keep_states", str(keep))
    helpers.succeed("train.py", *argv)
    assert checkpoint.saved_suffixes(tmp_path / "x") == left
    assert {p.name[0] for p in (tmp_path / "x").glob("*_net_*")} == {"1", "2", "l"}


LIMIT = 20_000  # bytes a file: less than a network


def disk_full_in_the_second_save() -> None:
    """From the second save to the third no file can grow beyond LIMIT."""
    _full_disk(lambda count: count == 2)


def disk_full_from_the_second_save() -> None:
    _full_disk(lambda count: count >= 2)


def _full_disk(is_full: Any) -> None:
    save_checkpoint, count = checkpoint.save_checkpoint, 0

    def save(folder: Path, *args: Any) -> None:
        nonlocal count
        count += 1
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if is_full(count):
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
        try:
            save_checkpoint(folder, *args)
        except OSError:
            found = checkpoint.find_checkpoint(folder, NETS)
            assert found is not None
            print(f"still there: {Position.from_state(found.state)}")
            raise
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoint.save_checkpoint = save


@pytest.mark.slow
def test_disk_full_for_a_while(pictures, trained, tmp_path):
    log = tmp_path / "log"
    argv = words(pictures, tmp_path, "--save_latest_freq", "1", "--keep_states", "2")
    code = forked.run(argv, log, prepare=disk_full_in_the_second_save)
    text = log.read_text()
    assert code == 0, text
    assert re.search(r"warning: saving 'latest' .* failed: File too large; the older save", text)
    assert "still there: Position(epoch=1, epoch_iter=1, total_iters=1)" in text
    assert "Traceback" not in text
    assert not list((tmp_path / "x").glob(".*.tmp"))
    assert same(saved_weights(tmp_path / "x", "latest"), saved_weights(trained / "x", "latest"))


@pytest.mark.slow
def test_disk_full_to_the_end(pictures, trained, tmp_path):
    log = tmp_path / "log"
    argv = words(pictures, tmp_path, "--save_latest_freq", "3")
    assert forked.run(argv, log, prepare=disk_full_from_the_second_save) == 1
    text = log.read_text()
    assert one_line(text[text.index("error:") :]).startswith("error: the training is over, but")
    assert forked.run([*argv, "--continue_train"], log) == 0
    assert "resuming from 'latest': epoch 1, 3 images into it" in log.read_text()
    assert same(saved_weights(tmp_path / "x", "latest"), saved_weights(trained / "x", "latest"))


def test_a_mark_that_does_not_fit_on_the_disk_is_left_out(pictures, copied, monkeypatch):
    """It says that the saves are of an earlier training, which only a restart wants to know."""
    touch, tried = Path.touch, []

    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == checkpoint.EARLIER:
            tried.append(path)
            raise OSError(28, "No space left on device")
        touch(path, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", full)
    monkeypatch.setattr("util.distributed.launched", lambda: True)
    helpers.succeed("train.py", *words(pictures, copied.parent, "--n_epochs", "1"))
    assert len(tried) == 1


def test_a_stop_without_a_save_is_no_success(pictures, tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    result = helpers.run("train.py", *words(pictures, tmp_path, "--max_hours", "1e-9"))
    assert result.code == 1
    assert "No space left on device" in result.err.splitlines()[-1]


# --------------------------------------------------------------------------------------------- lock
def hold_lock(folder: str, ready: str) -> None:
    ExperimentLock(Path(folder)).acquire()
    Path(ready).touch()
    time.sleep(100)


def test_a_second_training_is_refused(pictures, tmp_path):
    ready = tmp_path / "ready"
    owner = forked.call(hold_lock, str(tmp_path / "x"), str(ready))
    try:
        while not ready.exists():
            assert owner.is_alive()
            time.sleep(0.01)
        result = helpers.run("train.py", *words(pictures, tmp_path))
        assert result.code == 1
        assert f"being trained by process {owner.pid} on " in one_line(result.err)
        assert not (tmp_path / "x" / "train_opt.txt").exists()
        # what the other one saves as it stops would be overwritten by weights loaded before
        assert "Networks initialized" not in result.out
    finally:
        owner.kill()
        owner.join()
    # a dead process holds nothing, though its file is still there
    assert (tmp_path / "x" / ".lock").exists()
    helpers.succeed("train.py", *words(pictures, tmp_path, "--max_hours", "0"))
    helpers.succeed("train.py", *words(pictures, tmp_path, "--max_hours", "0"))


def test_lock_does_not_follow_links_nor_need_space(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_text("text")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match="can't write"):
        ExperimentLock(tmp_path / "x").acquire()
    assert precious.read_text() == "text"

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    lock = ExperimentLock(tmp_path / "y")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        lock.acquire()
    lock.release()


# -------------------------------------------------------------------------------------------- stops
def slow_iterations() -> None:
    from models.cycle_gan_model import CycleGANModel

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    optimize = CycleGANModel.optimize_parameters

    def slow(self: Any) -> None:
        optimize(self)
        time.sleep(0.3)

    CycleGANModel.optimize_parameters = slow


def endless_third_iteration() -> None:
    from models.cycle_gan_model import CycleGANModel

    optimize, count = CycleGANModel.optimize_parameters, 0

    def endless(self: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            end = time.monotonic() + 100
            while time.monotonic() < end:
                time.sleep(0.1)
        optimize(self)

    CycleGANModel.optimize_parameters = endless


def wait_for(log: Path, text: str, process: Any, count: int = 1) -> None:
    end = time.monotonic() + 60
    while not (log.exists() and log.read_text().count(text) >= count):
        assert time.monotonic() < end
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_signals_save_and_tell(number, code, pictures, tmp_path):
    log = tmp_path / "log"
    process = forked.start(words(pictures, tmp_path), log, prepare=slow_iterations)
    wait_for(log, "(epoch: ", process, 2)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code, log.read_text()
    found = checkpoint.find_checkpoint(tmp_path / "x", NETS)
    assert found is not None
    assert Position.from_state(found.state).total_iters >= 2
    assert f"stopped: got {signal.Signals(number).name}; resume with" in log.read_text()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(pictures, tmp_path):
    log = tmp_path / "log"
    process = forked.start(words(pictures, tmp_path), log, prepare=endless_third_iteration)
    wait_for(log, "(epoch: ", process, 2)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    wait_for(log, "once more quits at once", process)
    time.sleep(0.3)
    assert process.is_alive()
    start = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130
    assert time.monotonic() - start < 5
    assert checkpoint.find_checkpoint(tmp_path / "x", NETS) is None
    assert "Traceback" not in log.read_text()
    assert log.read_text().endswith("\nquit without saving: the checkpoint before counts\n")


@pytest.mark.slow
def test_max_hours(pictures, trained, tmp_path):
    argv = words(pictures, tmp_path, "--max_hours", "1e-9", "--continue_train")
    result = helpers.succeed("train.py", *argv)
    assert "nothing is saved" in result.out
    assert "stopped: --max_hours 1e-09 reached; resume with --continue_train" in result.out
    for images in range(1, 8):
        found = checkpoint.find_checkpoint(tmp_path / "x", NETS)
        assert found is not None
        assert Position.from_state(found.state).total_iters == images
        helpers.succeed("train.py", *argv)
    helpers.succeed("train.py", *words(pictures, tmp_path, "--continue_train"))
    assert same(saved_weights(tmp_path / "x", "latest"), saved_weights(trained / "x", "latest"))


def test_hours_are_hours(monkeypatch):
    now = time.monotonic()
    stop = StopRequest(0.5)
    monkeypatch.setattr(time, "monotonic", lambda: now + 1799)
    assert not stop
    monkeypatch.setattr(time, "monotonic", lambda: now + 1802)
    assert stop


def test_a_first_signal_after_the_hours_are_up_does_not_end_the_save(monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = StopRequest(0.0)
    assert stop  # so the run saves now
    stop._handle(signal.SIGTERM, None)
    assert (stop.exit_code, ended) == (143, [])
    stop._handle(signal.SIGTERM, None)
    assert ended == [143]


def test_signals_are_given_back():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    stop = StopRequest()
    stop.install()
    assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    stop.uninstall()
    assert {n: signal.getsignal(n) for n in before} == before


def kill_a_worker() -> None:
    from models.cycle_gan_model import CycleGANModel

    optimize = CycleGANModel.optimize_parameters

    def killed(self: Any) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
        optimize(self)

    CycleGANModel.optimize_parameters = killed


def test_a_killed_loading_process_is_one_line(pictures, tmp_path):
    log = tmp_path / "log"
    argv = words(pictures, tmp_path, "--num_threads", "1")
    assert forked.run(argv, log, prepare=kill_a_worker) == 1
    assert "Traceback" not in log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: a process that loads images was killed")
    assert "--num_threads" in last


# ----------------------------------------------------------------------------------------- resuming
def test_past_the_last_epoch(pictures, copied):
    result = helpers.succeed("train.py", *words(pictures, copied.parent, "--continue_train"))
    assert "nothing to do: epoch 2 of 2 is done; raise --n_epochs" in result.out


def test_resumed_after_the_last_iteration_of_an_epoch_with_validation(pictures, tmp_path):
    """It scores images before this process has trained: no image of a loss is there yet."""
    validated = "--val_freq 1 --val_phase train --best_by cycle --batch_size 4".split()
    argv = words(pictures, tmp_path, *validated, "--continue_train")
    helpers.succeed("train.py", *argv, "--max_hours", "1e-9")
    result = helpers.succeed("train.py", *argv)
    assert "resuming from 'latest': epoch 1, 4 images into it" in result.out
    assert "End of epoch 2 / 2" in result.out


def test_from_weights_alone(pictures, copied):
    for path in copied.glob("*_train_state.pth"):
        path.unlink()
    argv = words(pictures, copied.parent, "--continue_train", "--epoch_count", "2")
    result = helpers.succeed("train.py", *argv)
    assert "resuming from the weights 'latest' alone: optimizers, image pools" in result.out
    assert "this is epoch 2 (--epoch_count)" in result.out
    assert "End of epoch 2 / 2" in result.out
    assert "End of epoch 1" not in result.out


def test_a_misspelt_name_is_told_with_the_one_that_is_there(pictures, copied):
    """It does not stop: it may be a new training."""
    copied.rename(copied.with_name("horse2zebra"))
    argv = words(pictures, copied.parent, "--continue_train", "--max_hours", "1e-9")
    result = helpers.succeed("train.py", *argv, "--name", "horse2zebar")
    assert "there is no training --name horse2zebar; did you mean horse2zebra?" in result.err
    result = helpers.succeed("train.py", *argv, "--name", "labels2photo")
    assert "did you mean" not in result.err


@pytest.mark.parametrize("there", ["latest_net_G_A.pth", "1_*"])
def test_a_part_of_the_weights_is_not_taken_for_nothing(there, pictures, copied):
    """Starting anew would overwrite them."""
    kept = set(copied.glob(there))
    for path in copied.glob("*.pth"):
        if path not in kept or "state" in path.name:
            path.unlink()
    result = helpers.run("train.py", *words(pictures, copied.parent, "--continue_train"))
    assert result.code == 1
    assert "lacks latest_net_G_" in one_line(result.err)


def test_another_number_of_pictures_is_said(pictures, copied, tmp_path):
    more = helpers.unaligned(tmp_path / "more", count=5)
    argv = words(more, copied.parent, "--continue_train", "--n_epochs", "3")
    result = helpers.succeed("train.py", *argv)
    assert "there are 5 images in an epoch now, 4 when this was saved" in result.err


# ---------------------------------------------------------------------------------------------- NaN
def spoil(monkeypatch: Any, model: str, bad: Any) -> None:
    """Make the input of some iterations (numbered from 1) NaN."""
    module = __import__(f"models.{model}_model", fromlist=["x"])
    cls = {"cycle_gan": "CycleGANModel", "pix2pix": "Pix2PixModel"}[model]
    set_input, count = getattr(module, cls).set_input, 0

    def spoiled(self: Any, data: Any) -> None:
        nonlocal count
        count += 1
        set_input(self, data)
        if bad(count):
            self.real_B = self.real_B * float("nan")

    monkeypatch.setattr(getattr(module, cls), "set_input", spoiled)


@pytest.mark.parametrize("model", ["cycle_gan", "pix2pix"])
def test_nan_stops_before_it_is_saved(model, pictures, tmp_path, monkeypatch):
    spoil(monkeypatch, model, lambda count: count == 3)
    argv = words(pictures, tmp_path, "--save_latest_freq", "2", model=model)
    result = helpers.run("train.py", *argv)
    assert result.code == 1
    message = one_line(result.err)
    assert "not finite at epoch 1, iters 3, on " in message
    assert "losses (" in message
    assert ("cycle_B" if model == "cycle_gan" else "G_L1") in message
    folders = ("trainA", "trainB") if model == "cycle_gan" else ("train",)
    for folder in folders:
        assert re.search(rf"{re.escape(str(pictures / folder))}/\d\.png", message)
    names = NETS if model == "cycle_gan" else ("G", "D")
    found = checkpoint.find_checkpoint(tmp_path / "x", names)
    assert found is not None
    assert Position.from_state(found.state).total_iters == 2
    for name in names:
        weights = weight_files.load_weights(tmp_path / "x" / f"latest_net_{name}.pth")
        assert all(v.isfinite().all() for v in weights.values())


@pytest.mark.parametrize("model", ["cycle_gan", "pix2pix"])
def test_nan_can_be_skipped(model, pictures, tmp_path, monkeypatch):
    spoil(monkeypatch, model, lambda count: count in (3, 6))
    argv = words(pictures, tmp_path, "--on_nan", "skip", "--lr_policy", "plateau", model=model)
    result = helpers.succeed("train.py", *argv)
    assert result.err.count("this step is skipped") == 2
    for path in (tmp_path / "x").glob("latest_net_*.pth"):
        assert all(v.isfinite().all() for v in weight_files.load_weights(path).values())


def test_ten_bad_steps_in_a_row_stop(pictures, tmp_path, monkeypatch):
    spoil(monkeypatch, "cycle_gan", lambda count: count not in (1, 2, 5))
    argv = words(pictures, tmp_path, "--on_nan", "skip", "--n_epochs", "9")
    result = helpers.run("train.py", *argv)
    assert result.code == 1
    assert result.err.count("this step is skipped") == 2 + MAX_CONSECUTIVE_SKIPS
    assert result.err.splitlines()[-1].startswith("error: losses (")
    assert f"{MAX_CONSECUTIVE_SKIPS} steps in a row were skipped" in result.err.splitlines()[-1]


def everything(model: Any) -> dict[str, Any]:
    """A copy of all that an iteration changes."""
    state = model.training_state()
    buffer = io.BytesIO()
    torch.save({"model": state, "weights": model.network_states()}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("where", ["input", "last loss"])
@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("model_name", ["cycle_gan", "pix2pix"])
def test_a_skipped_step_leaves_no_trace(model_name, good, where, pictures, tmp_path, monkeypatch):
    argv = words(pictures, tmp_path, "--norm", "batch", model=model_name)
    opt = TrainOptions(argv).parse(save=False)
    model = create_model(opt)
    model.setup(opt)
    guard = FiniteGuard(model, "skip")

    def iteration(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        a, b = torch.rand(2, 1, 3, 32, 32, generator=generator) * 2 - 1
        guard.start()
        model.set_input({"A": a, "B": b, "A_paths": ["a.png"], "B_paths": ["b.png"]})
        model.optimize_parameters()
        guard.finish(f"iteration {number}", {"A_paths": ["a.png"], "B_paths": ["b.png"]})
        guard.check()  # the loop looks more often than there are iterations

    for number in range(good):
        iteration(number)
    before = everything(model)
    with monkeypatch.context() as patch:
        if where == "input":
            forward = model.forward

            def spoiled() -> None:
                model.real_A = model.real_A * float("inf")
                forward()

            patch.setattr(model, "forward", spoiled)
        else:
            # the first optimizer has stepped when the second one turns out bad
            name = "backward_D_B" if model_name == "cycle_gan" else "backward_G"
            backward = getattr(model, name)
            net = model.netD_B if model_name == "cycle_gan" else model.netG

            def bad() -> None:
                backward()
                next(net.parameters()).grad[0] = float("nan")

            patch.setattr(model, name, bad)
        iteration(100)
        assert guard.skipped == ["iteration 100"]
        assert same(everything(model), before)
        for number in range(101, 100 + MAX_CONSECUTIVE_SKIPS - 1):
            iteration(number)
        with pytest.raises(UserError, match="10 steps in a row were skipped"):
            iteration(200)
    assert same(everything(model), before)
    iteration(300)
    assert guard.consecutive_skips == 0
    assert not same(everything(model)["weights"], before["weights"])
    guard.close()


def test_files_are_named_once():
    model: Any = SimpleNamespace(
        device=torch.device("cpu"),
        present_losses=lambda: ["G"],
        loss_values=lambda names: torch.tensor([float("inf")]),
        stepped_tensors=lambda: [torch.tensor([float("nan")])],
    )
    guard = FiniteGuard(model)
    with pytest.raises(UserError, match=r"the loss G is not finite at step 1, on a, b;"):
        guard.finish("step 1", {"A_paths": ["a"], "B_paths": ["a", "b"], "A": None})


def test_a_folder_that_cannot_be_written_to(pictures, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    result = helpers.run("train.py", *words(pictures, tmp_path / "file"))
    assert result.code == 1
    said = one_line(result.err)
    assert "can't write to" in said
    assert "choose another --checkpoints_dir" in said
    result = helpers.run("train.py", *words(pictures, tmp_path, "--name", "file"))
    assert "choose another --name" in one_line(result.err)


# ----------------------------------------------------------------- what is no damage, or no signal
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_a_lack_of_memory_does_not_count_as_damage(error, fresh, copied, monkeypatch):
    """It would go back to an older save, and then write over the newest."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        load(fresh, copied)


def test_a_save_that_may_not_be_read_does_not_count_as_damage(fresh, copied, monkeypatch):
    opened = weight_files.load_file

    def refuse(path, *device):
        with weight_files.wrap_read_errors(path):
            if path.name.startswith("latest_train"):
                raise PermissionError(13, "Permission denied")
            return opened(path, *device)

    monkeypatch.setattr(checkpoint, "load_file", refuse)
    with pytest.raises(UserError, match=r"latest_train_state\.pth: Permission denied"):
        load(fresh, copied)


@pytest.mark.parametrize("ignored", [True, False])
def test_a_closed_terminal_stops_a_run_unless_under_nohup(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    request = StopRequest()
    try:
        request.install()
        os.kill(os.getpid(), signal.SIGHUP)
        assert bool(request) is not ignored
        assert request.exit_code == (0 if ignored else 129)
    finally:
        request.uninstall()
        signal.signal(signal.SIGHUP, before)


def test_lines_for_a_terminal_that_is_gone_are_dropped(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.stdout", Gone())
    monkeypatch.setattr("sys.stderr", Gone())
    say("a line")
    warn("a line")


def test_the_best_weights_are_those_of_one_epoch(tmp_path, monkeypatch):
    """Also where the disk gets full between two networks."""
    validation: Any = Validation.__new__(Validation)
    validation.folder, validation.by, validation.best, validation.opt = tmp_path, "L1", None, None
    validation.validated_on = "val, 2 of its images"
    full = False

    def save_networks(suffix: str) -> None:
        (tmp_path / f"{suffix}_net_A.pth").write_text(str(full))
        if full:
            raise OSError(28, "No space left on device")
        (tmp_path / f"{suffix}_net_B.pth").write_text(str(full))

    validation.model = SimpleNamespace(save_networks=save_networks)
    monkeypatch.setattr("util.scores.validation.report", lambda *_: {})
    evaluation: Any = None
    validation._keep(Position(epoch=1), 2.0, evaluation)
    full = True
    validation._keep(Position(epoch=2), 1.0, evaluation)
    assert {p.name: p.read_text() for p in tmp_path.glob("*.pth")} == {
        "best_net_A.pth": "False",
        "best_net_B.pth": "False",
    }
    assert validation.best is not None
    assert validation.best["epoch"] == 1


@pytest.mark.parametrize(("images", "kept"), [(8, True), (9, False)])
def test_the_best_of_the_save_itself_counts_after_a_resume(images, kept, tmp_path):
    """That of a later epoch is given up with it."""
    validation: Any = Validation.__new__(Validation)
    validation.folder, validation.every, validation.by, validation.best = tmp_path, 1, "L1", None
    validation.validated_on, validation.extractor = "val, 2 of its images", ""
    (tmp_path / "best_net_G.pth").touch()
    best = {"by": "L1", "value": 0.5, "epoch": 1, "images": images}
    written = json.dumps({**best, "of": validation.validated_on})
    (tmp_path / "best_scores.json").write_text(written)
    validation.resume(Position(epoch=2, total_iters=8))
    assert validation.best == (best if kept else None)


def test_a_save_that_is_not_there_and_a_model_that_passes_over_missing_files(
    pictures, tmp_path, monkeypatch
):
    from models.pix2pix_model import Pix2PixModel

    monkeypatch.setattr(Pix2PixModel, "load_networks", lambda self, epoch: None)
    argv = words(pictures, tmp_path, "--continue_train", "--epoch", "5", model="pix2pix")
    result = helpers.run("train.py", *argv)
    assert result.code == 1
    assert "has no save '5': choose another --epoch or --load_iter" in result.err
