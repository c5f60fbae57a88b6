"""What differs on macOS and Windows, as far as it can be tried on Linux."""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import PureWindowsPath
from unittest import mock

import pytest
import torch

from models import find_model_using_name
from models.inference import folder, streaming
from models.inference.translator import Translator
from tests.helpers import ROOT, undisturbed
from util import argument_types, html, randomness
from util.display import visdom_server
from util.errors import one_line_errors
from util.scores.extractors import Inception


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_only_cuda_copies_batches_while_work_goes_on(kind):
    batch = {name: mock.Mock(shape=(1, 3, 8, 8)) for name in "AB"} | {"A_paths": [], "B_paths": []}
    for name in ("cycle_gan", "pix2pix", "cut", "dcl", "test"):
        model = object.__new__(find_model_using_name(name))
        model.opt, model.device = argparse.Namespace(direction="AtoB"), torch.device(kind)
        model.set_input(batch)
    translator = object.__new__(Translator)
    translator.device, translator.input_nc = torch.device(kind), 3
    translator._precision, translator._any_size = "tf32", mock.Mock()
    translator.run(batch["A"])
    calls = [*batch["A"].to.mock_calls, *batch["B"].to.mock_calls]
    assert calls == [mock.call(torch.device(kind), non_blocking=kind == "cuda")] * 10


def test_float64_comes_after_the_cpu_where_the_device_has_none():
    x = mock.Mock(device=torch.device("mps"), **{"cpu.return_value": torch.ones(2)})
    x.double.side_effect = TypeError("MPS has no float64")
    assert streaming._double(x).dtype == torch.float64
    inception = object.__new__(Inception)
    inception.device, inception.net = torch.device("cpu"), lambda pictures: [x]
    assert inception(torch.zeros(1)).dtype == "float64"


def test_mps_that_is_out_of_memory_is_told_in_one_line(capsys):
    error = RuntimeError(
        "MPS backend out of memory (MPS allocated: 5.56 GB, other allocations: 1.10 GB, max "
        "allowed: 6.80 GB). Tried to allocate 768.00 MB on private pool."
    )
    assert folder._reason(error) == "out of memory: try --tile 1024"
    with undisturbed(), pytest.raises(SystemExit), one_line_errors():
        raise error
    assert capsys.readouterr().err.startswith("error: out of memory: choose a smaller --batch_size")


def test_random_state_of_mps_is_saved_and_restored(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.arange(3))
    restored = mock.Mock()
    monkeypatch.setattr(torch.mps, "set_rng_state", restored)
    state = randomness.get_state()
    randomness.set_state(state)
    assert restored.call_args.args[0].tolist() == [0, 1, 2]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert randomness.get_state()["mps"] == []


def test_links_of_a_page_have_slashes_on_windows(monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    assert html._quoted("sub\\a b_fake.png") == "sub/a%20b_fake.png"


def test_a_port_that_windows_refuses_after_two_seconds_is_free(monkeypatch):
    def connect(address, timeout):
        raise ConnectionRefusedError if timeout > 2.1 else TimeoutError

    monkeypatch.setattr(socket, "create_connection", connect)
    assert not visdom_server._listening("localhost", 8097)


def test_names_can_not_leave_their_folder_on_windows(monkeypatch):
    monkeypatch.setattr(argument_types, "Path", PureWindowsPath)
    for name in ("../x", "..\\x", "maps/../../x"):
        with pytest.raises(argparse.ArgumentTypeError):
            argument_types.experiment_name(name)
    assert argument_types.experiment_name("maps/first") == "maps/first"


PROGRAM = """
from util.errors import end_quietly_on_interrupt

end_quietly_on_interrupt()
import multiprocessing
import signal

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ignored = pool.apply(signal.getsignal, [signal.SIGINT]) == signal.SIG_IGN
    print(ignored, signal.getsignal(signal.SIGINT).__name__)
"""


def test_ctrl_c_does_not_end_a_loading_process_that_is_being_spawned(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command, path = [sys.executable, program], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True _end\n", done.stderr
