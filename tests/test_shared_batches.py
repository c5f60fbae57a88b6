"""Batches from worker processes: the same numbers, in memory that is used again."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.data._utils.pin_memory import _pin_memory_loop

from data.loader import EpochLoader, _quiet_when_workers_end


class Pictures(Dataset):
    """Images that tell their number, and a random draw."""

    paired = False

    def __init__(self, count: int = 24, grows: bool = False):
        self.count, self.grows = count, grows

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        size = 8 + index if self.grows else 8
        return {
            "A": torch.rand(3, size, size) + index,
            "number": index,
            "flag": torch.tensor(index % 2 == 0),
            "paths": f"{index}.png",
        }


def loader(workers: int, batch_size: int = 3, **options) -> EpochLoader:
    return EpochLoader(Pictures(**options), batch_size, True, workers, seed=1)


def equal(one: dict, other: dict) -> bool:
    assert list(one) == list(other)
    tensors = [k for k, v in one.items() if torch.is_tensor(v)]
    assert tensors == ["A", "number", "flag"]
    assert one["paths"] == other["paths"]
    return all(torch.equal(one[k], other[k]) for k in tensors)


@pytest.mark.parametrize("grows", [False, True])
def test_batches_that_are_kept_stay_as_they_are(grows):
    """All of three epochs at once, which is more than there are slots."""
    size = 1 if grows else 3
    expected, given = loader(0, size, grows=grows), loader(2, size, grows=grows)
    wanted = [batch for _ in range(3) for batch in expected]
    found = [batch for _ in range(3) for batch in given]
    assert len(found) == len(wanted)
    assert all(map(equal, found, wanted))
    given.close()
    assert all(map(equal, found, wanted))  # also when the workers are gone


def test_memory_is_used_again():
    given = loader(1)
    places = [batch["A"].data_ptr() for _ in range(4) for batch in given]
    assert len(set(places)) <= 4 < len(places)
    given.close()


def test_epochs_that_are_cut_short_leave_slots_free():
    given, expected = loader(1), loader(0)
    for _ in range(6):
        assert equal(next(iter(given)), next(iter(expected)))
    gc.collect()
    places = set()
    for batch, wanted in zip(given, expected, strict=True):
        assert equal(batch, wanted)
        places.add(batch["A"].data_ptr())
    assert len(places) <= 4
    given.close()


def test_one_part_of_a_batch_keeps_all_of_it():
    given = loader(1)
    kept = [(batch["A"][1, :2], batch["A"][1, :2].clone()) for _ in range(3) for batch in given]
    assert all(torch.equal(*pair) for pair in kept)
    given.close()


def test_a_thread_that_pins_memory_ends_quietly(monkeypatch, capsys):
    """When a worker is killed: the main thread says what happened."""
    monkeypatch.setattr(threading, "excepthook", _quiet_when_workers_end)

    def fail() -> None:
        raise ConnectionResetError

    for name, quiet in ((f"Thread-2 ({_pin_memory_loop.__name__})", True), ("another", False)):
        thread = threading.Thread(target=fail, name=name)
        thread.start()
        thread.join()
        assert ("ConnectionResetError" not in capsys.readouterr().err) is quiet


def test_a_programs_own_hook_for_threads_stays(monkeypatch):
    for hook, then in ((print, print), (threading.__excepthook__, _quiet_when_workers_end)):
        monkeypatch.setattr(threading, "excepthook", hook)
        EpochLoader(Pictures(2), 2, False, 0, pin_memory=True).close()
        assert threading.excepthook is then
