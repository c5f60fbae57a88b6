"""Tiles against the whole image computed at once."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.inference.scratch import ScratchSpace
from models.inference.streaming import Stream, scratch_needed
from models.inference.tiles import TensorRows, TiledNet, TileOptions, translate_in_tiles
from models.networks import ResnetGenerator, define_G
from tests.helpers import ROOT, pixels
from util.errors import UserError

CPU = torch.device("cpu")
LEVEL = 2 / 255  # one level of 8 bits, of values in [-1, 1]


def network(netG: str, norm: str = "instance", ngf: int = 4, **more) -> nn.Module:
    """A generator of random weights whose outputs fill their range."""
    torch.manual_seed(1)
    return define_G(3, 3, ngf, netG, norm, init_type="kaiming", **more)


def scene(height: int, width: int) -> torch.Tensor:
    """An image (3, H, W) that is dark and smooth on one side, bright and rough on the other."""
    smooth = torch.from_numpy(pixels(width, height)).permute(2, 0, 1) / 127.5 - 1
    generator = torch.Generator().manual_seed(2)
    rough = torch.rand(3, height, width, generator=generator) * 2 - 1
    share = torch.linspace(0, 1, width)
    return (smooth * (1 - share) + rough * share) * 0.6 + share * 0.4 - 0.2


def whole(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net(x[None])[0]


def tiled(net: nn.Module, x: torch.Tensor, options: TileOptions) -> torch.Tensor:
    bands = list(translate_in_tiles(net, TensorRows(x), options, CPU))
    assert len(bands) > 1
    return torch.cat(bands, 1)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# ------------------------------------------------------------------------------------------- exact
@pytest.mark.parametrize("size", [(150, 131), (128, 256)])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("netG", ["resnet_6blocks", "resnet_9blocks", "unet_128", "unet_256"])
def test_exact_tiles_equal_the_whole(netG, norm, size):
    net, x = network(netG, norm), scene(*size)
    wanted = whole(net, x)
    assert wanted.std() > 0.1
    assert apart(tiled(net, x, TileOptions(48, 8, "exact")), wanted) < 1e-4


@pytest.mark.parametrize("netG", ["resnet_6blocks", "unet_128"])
def test_exact_tiles_with_statistics_of_training(netG):
    net, x = network(netG, "batch"), scene(210, 170)
    for _ in range(30):
        whole(net, x)
    net.eval()
    wanted = whole(net, x)
    assert apart(tiled(net, x, TileOptions(64, 8, "exact")), wanted) < 1e-4


def test_exact_tiles_of_a_picture_smaller_than_the_network_needs():
    for size in [(5, 40), (3, 3)]:
        net, x = network("resnet_6blocks"), scene(*size)
        got = torch.cat(list(translate_in_tiles(net, TensorRows(x), TileOptions(16, 0), CPU)), 1)
        assert apart(got, whole(net, x)) < 1e-4


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("size", [(150, 131), (40, 30)])
@pytest.mark.parametrize("netG", ["resnet_6blocks", "unet_128"])
def test_exact_tiles_of_anti_aliased_generators(netG, size, up):
    net = network(netG, antialias=True, antialias_up=up)
    x = scene(*size)
    got = tiled(net, x, TileOptions(16, 8, "exact"))
    assert apart(got, whole(net, x)) < 1e-4


@pytest.mark.parametrize(
    ("options", "limit"),
    # the statistics of quick tiles are those of samples, which have borders of their own
    [(TileOptions(16, 0, "exact"), 1e-4), (TileOptions(96, 72, "quick"), 2e-3)],
)
def test_norms_of_another_epsilon(options, limit):
    torch.manual_seed(1)
    norm = functools.partial(nn.InstanceNorm2d, eps=0.1)
    net, x = ResnetGenerator(3, 3, 4, norm_layer=norm, n_blocks=1), scene(120, 112)
    assert apart(tiled(net, x, options), whole(net, x)) < limit


def test_files_take_what_memory_does_not(tmp_path):
    net, x = network("resnet_6blocks"), scene(120, 100)
    wanted = whole(net, x)
    space = ScratchSpace(20_000, tmp_path)
    with torch.no_grad():
        bands = list(Stream(net, TensorRows(x), CPU, space, 2000).run())
    assert space.files > 4
    assert apart(torch.cat(bands, 1), wanted) < 1e-4
    assert space.used == 0
    # full size and 4 channels, half the size and 8 channels: the first two and the last two maps
    assert space.peak == 4 * (4 * 120 * 100 + 8 * 60 * 50)
    assert scratch_needed(net, TensorRows(x)) == space.peak


def test_scratch_files_are_in_the_folder_and_leave_nothing_there(tmp_path, monkeypatch):
    opened = []
    ordinary = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **k: opened.append(k) or ordinary(**k))
    net, x = network("resnet_6blocks"), scene(120, 100)
    options = TileOptions(32, 0, "exact", memory=0, scratch=tmp_path)
    bands = translate_in_tiles(net, TensorRows(x), options, CPU)
    next(bands)
    assert opened
    assert all(Path(k["dir"]) == tmp_path for k in opened)
    bands.close()
    assert not list(tmp_path.iterdir())


def test_no_room(tmp_path, monkeypatch, capsys):
    net, x = network("resnet_6blocks"), scene(120, 100)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("models.inference.scratch.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"--tile_scratch FOLDER on a larger disk, or --tile_mode"):
        tiled(net, x, TileOptions(32, 8, "exact", memory=0))
    tiled(net, x, TileOptions(32, 8, None, memory=0))
    assert "quick tiles instead of exact ones" in capsys.readouterr().err


def test_the_disk_needs_room_only_for_what_memory_does_not_hold(monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("models.inference.scratch.shutil.disk_usage", lambda _: usage)
    ScratchSpace(2000).check(2900)
    with pytest.raises(UserError, match="--tile_scratch"):
        ScratchSpace(2000).check(2960)  # a twentieth stays free


def test_memory_for_tiles_is_in_gib(monkeypatch):
    """As the help of --tile_memory says; in a smaller unit all would go to the disk, slowly."""
    made = []
    plain = ScratchSpace
    monkeypatch.setattr(
        "models.inference.tiles.ScratchSpace", lambda *a: made.append(a) or plain(*a)
    )
    tiled(network("resnet_6blocks"), scene(64, 48), TileOptions(16, 0, "exact", memory=0.5))
    assert made == [(2**29, None)]


def test_dropout_is_drawn_once_for_a_pixel():
    net, x = network("unet_128", "batch", use_dropout=True), scene(128, 256)
    got = tiled(net, x, TileOptions(48, 8, "exact"))
    assert got.isfinite().all()
    assert apart(got, whole(net, x)) > 0.01  # other draws than those of the whole


def test_rows_that_are_read_twice_have_the_same_dropout():
    """Else there are seams at the bands."""
    net, x = network("resnet_6blocks"), scene(40, 40)
    stream = Stream(net, TensorRows(x), CPU, ScratchSpace(2**20), 400)
    rows = stream.layer(nn.Dropout(0.5), stream.picture)
    assert torch.equal(rows.rows(0, 30)[:, :, 10:], rows.rows(10, 30))


def test_mistakes():
    with pytest.raises(UserError, match="choose exact or quick"):
        TileOptions(mode="both")
    with pytest.raises(UserError, match="can't overlap by 64"):
        TileOptions(64, 64)
    with pytest.raises(UserError, match=r"Conv2d can't be run in exact tiles.* --tile_mode quick"):
        tiled(nn.Conv2d(3, 3, 1), scene(40, 40), TileOptions(16, 0, "exact"))
    with pytest.raises(UserError, match="no tiles: PixelShuffle gives images of other sizes"):
        tiled(nn.PixelShuffle(1 + 1), torch.zeros(4, 40, 40), TileOptions(16, 0))


# ------------------------------------------------------------------------------------------- quick
@pytest.mark.parametrize(
    ("netG", "size", "tile", "overlap"),
    [("resnet_6blocks", (300, 420), 256, 184), ("unet_128", (128, 1800), 1024, 832)],
)
def test_quick_tiles_that_see_far_enough_are_exact(netG, size, tile, overlap):
    net, x = network(netG, "batch"), scene(*size)
    for _ in range(30):
        whole(net, x)
    net.eval()
    wanted = whole(net, x)
    got = torch.cat(
        list(translate_in_tiles(net, TensorRows(x), TileOptions(tile, overlap, "quick"), CPU)), 1
    )
    assert apart(got, wanted) < 1e-4


@pytest.mark.parametrize("size", [(300, 420), (129, 640)])
def test_quick_tiles_have_common_statistics(size):
    net, x = network("resnet_6blocks", ngf=8), scene(*size)
    wanted = whole(net, x)
    common = tiled(net, x, TileOptions(128, 64, "quick"))
    assert all("forward" not in vars(m) for m in net.modules())
    own = torch.cat([whole(net, part) for part in x.split(128, 2)], 2)
    errors = [float((y - wanted).abs().mean()) for y in (common, own)]
    assert errors[0] < errors[1] / 3


def test_a_network_is_as_it_was_while_its_tiles_wait():
    """For another thread, or for a caller that does something else in between."""
    net, x = network("resnet_6blocks"), scene(150, 131)
    wanted = whole(net, x)
    quick = TileOptions(64, 16, "quick")
    rows = [translate_in_tiles(net, TensorRows(y), quick, CPU) for y in (x, x / 3)]
    together = [torch.cat(parts, 1) for parts in zip(*zip(*rows, strict=True), strict=True)]
    assert torch.equal(together[0], tiled(net, x, quick))
    assert torch.equal(together[1], tiled(net, x / 3, quick))
    next(translate_in_tiles(net, TensorRows(x / 3), quick, CPU))
    assert torch.equal(whole(net, x), wanted)


def test_quick_tiles_blend_to_what_is_there():
    class Same(nn.Module):
        def forward(self, x):
            return x

    from models.inference import tiles

    x = scene(200, 170)
    for options in (
        TileOptions(64, 0),
        TileOptions(64, 16),
        TileOptions(48, 40),
        TileOptions(64, 1),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "size_rule", lambda *_: (4, 8))
            got = torch.cat(list(tiles.quick_tiles(Same(), TensorRows(x), options, CPU)), 1)
        assert apart(got, x) < 1e-6


# ------------------------------------------------------------------------------------ as a network
def test_tiled_network_in_place_of_a_network():
    net, x = network("resnet_6blocks"), torch.stack([scene(80, 100), scene(80, 100).flip(2)])
    with torch.no_grad():
        wanted = net(x)
        assert apart(TiledNet(net, TileOptions(32, 8, "exact"))(x), wanted) < 1e-4
        assert torch.equal(TiledNet(net, TileOptions(256))(x[:1]), net(x[:1]))


@pytest.mark.slow
def test_exact_tiles_of_a_large_picture():
    net, x = network("resnet_9blocks", ngf=8), scene(1100, 1500)
    wanted = whole(net, x)
    got = tiled(net, x, TileOptions(512, 64, "exact"))
    assert apart(got, wanted) < LEVEL / 10
    quick = tiled(net, x, TileOptions(512, 64, "quick"))
    rows = [
        torch.cat([whole(net, part) for part in row.split(512, 2)], 2) for row in x.split(512, 1)
    ]
    own = torch.cat(rows, 1)  # each tile with its own statistics
    assert (quick - wanted).abs().mean() < (own - wanted).abs().mean() / 4


@pytest.mark.slow
def test_exact_tiles_of_a_large_picture_for_the_u_net():
    net, x = network("unet_256", "batch", ngf=8), scene(1100, 1500)
    for _ in range(8):
        whole(net, x)
    net.eval()
    assert apart(tiled(net, x, TileOptions(512, 64, "exact")), whole(net, x)) < LEVEL / 10


MEASURE = """
import resource, sys
import numpy as np, torch
from pathlib import Path
from data.pictures.reading import Picture
from models.networks import define_G
from models.inference.tiles import TileOptions
from models.inference.translator import Translator

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

net = define_G(3, 3, 8, "resnet_6blocks", "instance")
G = Translator(net, torch.device("cpu"), {"input_nc": 3, "output_nc": 3}, Path("none"))
picture = Picture(np.zeros((1800, 1800, 3), np.uint8))
G(picture.pixels[:64, :64])
before = peak()
for band in G.tiled(picture, TileOptions(256, 64, sys.argv[1], memory=0.01)):
    pass
print("MiB", peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no module resource")
@pytest.mark.parametrize("mode", ["exact", "quick"])
def test_memory_is_bounded(mode):
    # one layer at full resolution is 99 MiB, and the whole image needs several at a time
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, mode], cwd=ROOT, capture_output=True, text=True, check=True
    )
    used = float(done.stdout.split("MiB")[1])
    # quick tiles take their statistics from a million pixels at once
    assert used < (90 if mode == "exact" else 250), used


def test_sources_are_read_in_bands():
    asked = []

    class Watched(TensorRows):
        def rows(self, top, bottom):
            asked.append(bottom - top)
            return super().rows(top, bottom)

    net, x = network("resnet_6blocks"), scene(400, 64)
    list(translate_in_tiles(net, Watched(x), TileOptions(32, 8, "exact"), CPU))
    assert max(asked) <= 64
    assert np.sum(asked) > 400
