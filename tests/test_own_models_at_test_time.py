"""test.py with what is not as ours: images that are arrays, file names that are not UTF-8."""

from __future__ import annotations

import os
import sys
from urllib.parse import unquote_to_bytes

import pytest
from PIL import Image

from models.networks import ResnetGenerator
from models.pix2pix_model import Pix2PixModel
from tests.helpers import SHORT, TINY, aligned, files_below, run, succeed
from util import util

FAST = "--model pix2pix --netG resnet_6blocks --gpu_ids -1 --ngf 4 --crop_size 32".split()


@pytest.fixture
def trained(tmp_path) -> list[object]:
    """The flags of a model that was trained for an epoch."""
    where = ["--dataroot", aligned(tmp_path / "data"), "--checkpoints_dir", tmp_path / "c"]
    succeed("train.py", *where, "--name", "x", "--model", "pix2pix", *TINY, *SHORT)
    return [*where, "--name", "x", *FAST, "--results_dir", tmp_path / "r", "--num_threads", "0"]


def test_pictures_that_are_arrays_keep_their_size(trained, tmp_path, monkeypatch):
    """As the original's colorization shows them: arrays (H, W, 3) with values in [0, 255]."""

    def compute_visuals(self):
        self.fake_B = util.tensor2im(self.fake_B)

    monkeypatch.setattr(Pix2PixModel, "compute_visuals", compute_visuals)
    succeed("test.py", *trained, "--eval")
    images = tmp_path / "r" / "x" / "test_latest" / "images"
    assert Image.open(images / "0_fake_B.png").size == (32, 32)
    refused = run("test.py", *trained, "--eval", "--batch_size", "2")
    assert refused.code == 1
    assert "this model shows one image of a batch; say --batch_size 1" in refused.err


def test_a_network_of_a_model_of_ones_own(trained, tmp_path):
    """Where the model is gone, the options alone tell the network."""
    words = [*trained, "--model", "test", "--dataset_mode", "aligned"]
    assert "the generator is --netG" not in succeed("test.py", *words).err
    options = tmp_path / "c" / "x" / "train_opt.txt"
    text = options.read_text()
    options.write_text(text.replace("model: pix2pix", "model: mine   "))
    assert options.read_text() != text
    err = succeed("test.py", *words).err
    assert "the generator is --netG resnet_6blocks as the options say, which may be another" in err
    assert "--model mine fails: unknown model 'mine'" in err


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda self, x, z: x, "missing 1 required positional argument: 'z'"),
        (lambda self, x: (x, x[:, :1]), "a ResnetGenerator returns a tuple"),
    ],
)
def test_a_network_of_more_than_a_picture_is_told_its_model(forward, said, trained, monkeypatch):
    """Such as that of BicycleGAN, which takes a latent code, or one that returns a mask."""
    forward.__qualname__ = "ResnetGenerator.forward"
    monkeypatch.setattr(ResnetGenerator, "forward", forward)
    result = run("test.py", *trained, "--model", "test", "--dataset_mode", "aligned")
    assert result.code == 1
    last = result.err.splitlines()[-1]
    assert said in last
    assert last.endswith("test with the model of the training, --model pix2pix")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_a_file_name_that_is_no_utf8(trained, tmp_path):
    folder = os.fsencode(tmp_path / "data" / "test")
    os.rename(os.path.join(folder, b"1.png"), os.path.join(folder, b"caf\xe9.png"))
    succeed("test.py", *trained)
    page = tmp_path / "r" / "x" / "test_latest" / "index.html"
    links = [part.split(b'"')[0] for part in page.read_bytes().split(b'href="')[1:]]
    files = [os.path.join(os.fsencode(page.parent), unquote_to_bytes(link)) for link in links]
    assert len(files) == len(files_below(page.parent / "images")) == 9
    assert all(map(os.path.exists, files))
    assert any(b"caf\xe9" in file for file in files)
