"""Damaged, missing and foreign files, full disks, second trainings, signals, and NaN."""

from __future__ import annotations

import fcntl
import io
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

import pytest
import torch

from models import create_model
from options.train_options import TrainOptions
from tests import forked, helpers
from util.errors import UserError
from util.run import checkpoint, training_run
from util.run.finite import MOST_IN_A_ROW, FiniteGuard
from util.run.stopping import ExperimentLock, StopRequest

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
    states = {n: torch.load(folder / f"{suffix}_net_{n}.pth", weights_only=True) for n in NETS}
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
def test_a_damaged_file(name, damage, times, trained, fresh, copied):
    rng = random.Random(f"{name} {damage.__name__}")
    original = trained / "x"
    for _ in range(times):
        damage(copied / name, rng)
        result = loads_whole_or_says_why(fresh, copied, original)
        if damage is flip:
            # a bit that carries nothing, such as padding or a date, may be any
            assert result in ("latest", "1")
        else:
            assert result == ("1" if name.startswith("latest") else "latest")
        if result == "1":
            assert any(one_line(s).startswith("latest: ") for s in fresh.resumed.skipped)
        shutil.copy(original / name, copied / name)


def test_files_of_two_moments_are_not_mixed(trained, fresh, copied):
    other_set(copied / "latest_net_G_B.pth", random.Random(0))
    assert loads_whole_or_says_why(fresh, copied, trained / "x") == "1"
    assert "latest_net_G_B.pth" in fresh.resumed.skipped[0]


@pytest.mark.slow
def test_both_sets_damaged_in_random_ways(trained, fresh, tmp_path):
    rng = random.Random(1)
    results = []
    for case in range(20):
        folder = tmp_path / str(case)
        shutil.copytree(trained / "x", folder)
        for suffix in ("latest", "1"):
            name = rng.choice(["train_state", *(f"net_{n}" for n in NETS)])
            damage = rng.choice([truncate, garbage, zeros, remove])
            damage(folder / f"{suffix}_{name}.pth", rng)
        results.append(loads_whole_or_says_why(fresh, folder, trained / "x"))
        shutil.rmtree(folder)
    # where both states are gone, weights alone may be whole
    assert set(results) <= {"refused", "weights"}
    assert results.count("refused") > 10


def test_the_programs_say_it_in_one_line(pictures, copied):
    for path in copied.glob("*_train_state.pth"):
        os.truncate(path, 1000)
    folder = copied.parent
    result = helpers.run("train.py", *words(pictures, folder, "--continue_train"))
    assert result.code == 1
    assert "no whole save" in one_line(result.err)
    (copied / "latest_net_G_A.pth").write_bytes(b"not a network")
    argv = ["--dataroot", str(pictures), "--checkpoints_dir", str(folder), "--name", "x"]
    argv += ["--model", "cycle_gan", "--num_threads", "0", "--gpu_ids", "-1"]
    result = helpers.run("test.py", *argv, "--results_dir", str(folder / "results"))
    assert result.code == 1
    assert "latest_net_G_A.pth" in one_line(result.err)


def test_resumes_from_the_older_set_with_a_warning(pictures, copied):
    os.truncate(copied / "latest_net_D_A.pth", 1000)
    result = helpers.succeed("train.py", *words(pictures, copied.parent, "--continue_train"))
    assert (
        "warning: a save is not whole and is passed over: latest: latest_net_D_A.pth is 1000"
        in (result.err)
    )
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
    for path in copied.glob("1_*"):
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
        checkpoint.load_file(path)


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        {"model.1.weight": 3},
        {1: torch.zeros(1)},
        {"model.1.weight": torch.zeros(3, 3).to_sparse()},
        {"model.1.weight": torch.zeros(3, device="meta")},
        {},
    ],
    ids=["list", "numbers", "numbered", "sparse", "meta", "empty"],
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
        {"files": 5},
        {"files": {"../../G_A": {"size": 1, "directory": 1}}},
        {"token": "../../../x"},
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
    assert (
        "newer version" in fresh.resumed.skipped[0]
        or "not a training state" in (fresh.resumed.skipped[0])
    )


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
    checkpoint.save_set(
        folder, suffix, numbers, {**state, "random": {}, "model": {}, "options": {}}
    )


def step_found(folder: Path) -> int:
    found = checkpoint.find_set(folder, ["G", "D"])
    assert found is not None
    for name in ("G", "D"):
        weights = checkpoint.load_weights(folder / f"{found.suffix}_net_{name}.pth")
        assert (weights["w"] == found.position().total_iters).all()
    return found.position().total_iters


def test_weights_that_cannot_be_moved_stay_valid(tmp_path, monkeypatch, capsys):
    """A file that another program holds open (Windows), or a quota: the set is used all the same"""
    small_set(tmp_path, "latest", 1)
    replace = os.replace

    def stubborn(source: Any, target: Any) -> None:
        if "_net_" in str(target):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", stubborn)
        small_set(tmp_path, "latest", 2)
        assert "wait under temporary names" in one_line(capsys.readouterr().err)
        # the next save fails before its state is there: the waiting files are not leftovers
        patch.setattr(checkpoint, "write_temporary", lambda *a: (_ for _ in ()).throw(OSError(28)))
        with pytest.raises(OSError, match="28"):
            small_set(tmp_path, "latest", 3)
    assert step_found(tmp_path) == 2
    assert not list(tmp_path.glob(".*.tmp"))


def test_somebody_reads_while_a_set_is_saved(tmp_path, monkeypatch, capsys):
    small_set(tmp_path, "latest", 1)
    replace, seen = os.replace, []

    def watched(source: Any, target: Any) -> None:
        replace(source, target)
        if str(target).endswith("_train_state.pth"):
            monkeypatch.setattr(checkpoint.os, "replace", replace)
            seen.append(step_found(tmp_path))

    monkeypatch.setattr(checkpoint.os, "replace", watched)
    small_set(tmp_path, "latest", 2)
    assert seen == [2]
    assert step_found(tmp_path) == 2
    assert capsys.readouterr().err == ""


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
    save_set, count = checkpoint.save_set, 0

    def save(folder: Path, suffix: str, *args: Any) -> None:
        nonlocal count
        count += 1
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if is_full(count):
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
        try:
            save_set(folder, suffix, *args)
        except OSError:
            found = checkpoint.find_set(folder, NETS)
            assert found is not None
            print(f"still there: {found.position()}")
            raise
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoint.save_set = save


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


def test_a_stop_without_a_save_is_no_success(pictures, tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_set", full)
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
    finally:
        owner.kill()
        owner.join()
    # a dead process holds nothing, though its file is still there
    assert (tmp_path / "x" / ".lock").exists()
    helpers.succeed("train.py", *words(pictures, tmp_path, "--max_hours", "0"))
    assert not (tmp_path / "x" / ".lock").exists()


def test_lock_file_removed_by_its_owner_in_between(tmp_path, monkeypatch):
    lock, real, calls = ExperimentLock(tmp_path), fcntl.lockf, []

    def lockf(descriptor: int, flags: int) -> None:
        if not calls:
            lock.path.unlink()  # as `release` of the one before does
        calls.append(descriptor)
        real(descriptor, flags)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock.acquire()
    assert len(calls) == 2
    assert lock.path.stat().st_ino == os.fstat(lock.descriptor).st_ino
    lock.release()
    assert not lock.path.exists()


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


def test_what_another_training_saved_meanwhile_is_taken(pictures, copied):
    """The model was built while another process still trained, and saved as it stopped."""
    newer = copied.parent / "newer"
    newer.mkdir()
    for path in copied.glob("latest_*"):
        path.rename(newer / path.name)
    opt = TrainOptions(words(pictures, copied.parent, "--continue_train")).parse(save=False)
    model = create_model(opt)
    model.setup(opt)
    assert model.resumed.suffix == "1"
    for path in newer.iterdir():
        path.rename(copied / path.name)
    dataset: Any = SizedDataset()
    run = training_run.TrainingRun(opt, model, dataset)
    assert run.resume().epoch == 3
    assert same(copy_of_weights(model), saved_weights(copied, "latest"))


class SizedDataset:
    seed = 0

    def __len__(self) -> int:
        return 4


# -------------------------------------------------------------------------------------------- stops
def slow_iterations() -> None:
    from models.cycle_gan_model import CycleGANModel

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
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_signals_save_and_tell(number, code, pictures, tmp_path):
    log = tmp_path / "log"
    process = forked.start(words(pictures, tmp_path), log, prepare=slow_iterations)
    wait_for(log, "(epoch: ", process, 2)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code, log.read_text()
    found = checkpoint.find_set(tmp_path / "x", NETS)
    assert found is not None
    assert found.position().total_iters >= 2
    assert f"stopped: got {signal.Signals(number).name}; --continue_train" in log.read_text()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(pictures, tmp_path):
    log = tmp_path / "log"
    process = forked.start(words(pictures, tmp_path), log, prepare=endless_third_iteration)
    wait_for(log, "(epoch: ", process, 2)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    wait_for(log, "once more ends at once", process)
    time.sleep(0.3)
    assert process.is_alive()
    start = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130
    assert time.monotonic() - start < 5
    assert checkpoint.find_set(tmp_path / "x", NETS) is None
    assert "Traceback" not in log.read_text()
    assert log.read_text().endswith("\nended at once: the save before this one counts\n")


@pytest.mark.slow
def test_max_hours(pictures, trained, tmp_path):
    argv = words(pictures, tmp_path, "--max_hours", "1e-9", "--continue_train")
    result = helpers.succeed("train.py", *argv)
    assert "nothing is saved" in result.out
    assert "stopped: --max_hours 1e-09 have gone by; --continue_train goes on" in result.out
    for images in range(1, 8):
        found = checkpoint.find_set(tmp_path / "x", NETS)
        assert found is not None
        assert found.position().total_iters == images
        helpers.succeed("train.py", *argv)
    helpers.succeed("train.py", *words(pictures, tmp_path, "--continue_train"))
    assert same(saved_weights(tmp_path / "x", "latest"), saved_weights(trained / "x", "latest"))


def test_signals_are_given_back():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    stop = StopRequest()
    stop.install()
    assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    stop.uninstall()
    assert {n: signal.getsignal(n) for n in before} == before


# ----------------------------------------------------------------------------------------- resuming
def test_past_the_last_epoch(pictures, copied):
    result = helpers.succeed("train.py", *words(pictures, copied.parent, "--continue_train"))
    assert "nothing to do: epoch 2 of 2 is done; raise --n_epochs" in result.out


def test_from_weights_alone(pictures, copied):
    for path in copied.glob("*_train_state.pth"):
        path.unlink()
    argv = words(pictures, copied.parent, "--continue_train", "--epoch_count", "2")
    result = helpers.succeed("train.py", *argv)
    assert "resuming from the weights 'latest' alone: optimizers, image pools" in result.out
    assert "this is epoch 2 (--epoch_count)" in result.out
    assert "End of epoch 2 / 2" in result.out
    assert "End of epoch 1" not in result.out


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
    assert "there are 5 pictures in an epoch now, 4 when this was saved" in result.err


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
    found = checkpoint.find_set(tmp_path / "x", names)
    assert found is not None
    assert found.position().total_iters == 2
    for name in names:
        weights = checkpoint.load_weights(tmp_path / "x" / f"latest_net_{name}.pth")
        assert all(v.isfinite().all() for v in weights.values())


@pytest.mark.parametrize("model", ["cycle_gan", "pix2pix"])
def test_nan_can_be_skipped(model, pictures, tmp_path, monkeypatch):
    spoil(monkeypatch, model, lambda count: count in (3, 6))
    argv = words(pictures, tmp_path, "--on_nan", "skip", "--lr_policy", "plateau", model=model)
    result = helpers.succeed("train.py", *argv)
    assert result.err.count("this step is skipped") == 2
    for path in (tmp_path / "x").glob("latest_net_*.pth"):
        assert all(v.isfinite().all() for v in checkpoint.load_weights(path).values())


def test_ten_bad_steps_in_a_row_stop(pictures, tmp_path, monkeypatch):
    spoil(monkeypatch, "cycle_gan", lambda count: count not in (1, 2, 5))
    argv = words(pictures, tmp_path, "--on_nan", "skip", "--n_epochs", "9")
    result = helpers.run("train.py", *argv)
    assert result.code == 1
    assert result.err.count("this step is skipped") == 2 + MOST_IN_A_ROW
    assert result.err.splitlines()[-1].startswith("error: losses (")
    assert f"{MOST_IN_A_ROW} steps in a row were skipped" in result.err.splitlines()[-1]


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
        for number in range(101, 100 + MOST_IN_A_ROW - 1):
            iteration(number)
        with pytest.raises(UserError, match="10 steps in a row were skipped"):
            iteration(200)
    assert same(everything(model), before)
    iteration(300)
    assert guard.in_a_row == 0
    assert not same(everything(model)["weights"], before["weights"])
    guard.close()


def test_files_are_named_once():
    model: Any = SimpleNamespace(
        device=torch.device("cpu"),
        present_losses=lambda: ["G"],
        loss_values=lambda names: torch.tensor([float("inf")]),
        all_optimizers=lambda: [torch.optim.SGD([torch.tensor([float("nan")])])],
    )
    guard = FiniteGuard(model)
    with pytest.raises(UserError, match=r"the loss G is not finite at step 1, on a, b;"):
        guard.finish("step 1", {"A_paths": ["a"], "B_paths": ["a", "b"], "A": None})


def test_a_folder_that_cannot_be_written_to(pictures, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    result = helpers.run("train.py", *words(pictures, tmp_path / "file"))
    assert result.code == 1
    assert "can't write to" in one_line(result.err)
