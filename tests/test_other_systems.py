"""What differs on macOS and Windows, as far as it can be tried on Linux."""

import argparse
from unittest import mock

import pytest
import torch

from models import find_model_using_name
from models.inference import streaming
from models.inference.translator import Translator
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
