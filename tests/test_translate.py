"""Using a model: from Python, and on folders of images."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
from models import Translator, load_generator
from models.inference.export import export_generator
from models.inference.loading import unchanged_process
from models.networks import define_G
from models.speed.acceleration import precision_context
from models.weights import fit_state_dict
from tests.helpers import (
    ROOT,
    aligned,
    files_below,
    picture,
    pixels,
    run,
    succeed,
    truncated,
    unaligned,
)
from util import visualizer
from util.errors import UserError
from util.util import tensor2im


def save(path: Path, netG="resnet_6blocks", norm="instance", dropout=False, nc=(3, 3), seed=1):
    """Weights of a tiny generator whose outputs fill their range; returns the network."""
    torch.manual_seed(seed)
    net = define_G(*nc, 4, netG, norm, dropout, init_type="kaiming")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net


def options(folder: Path, **values) -> None:
    lines = [f"{k:>25}: {v!s:<30}" for k, v in values.items()]
    (folder / "train_opt.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def cycle(tmp_path) -> Path:
    """A CycleGAN's folder."""
    folder = tmp_path / "ck" / "cycle"
    save(folder / "latest_net_G_A.pth", seed=1)
    save(folder / "latest_net_G_B.pth", seed=2)
    options(folder, model="cycle_gan", netG="resnet_6blocks", ngf=4, norm="instance",
            no_dropout=True, direction="AtoB", input_nc=3, output_nc=3)  # fmt: skip
    return folder


@pytest.fixture
def pix(tmp_path) -> Path:
    """A pix2pix with batch norm and dropout."""
    folder = tmp_path / "ck" / "pix"
    save(folder / "latest_net_G.pth", "unet_128", "batch", dropout=True)
    options(folder, model="pix2pix", netG="unet_128", ngf=4, norm="batch",
            no_dropout=False, direction="BtoA", input_nc=3, output_nc=3)  # fmt: skip
    return folder


def reference(net: torch.nn.Module, array: np.ndarray) -> np.ndarray:
    """What a network makes of 8-bit pixels (H, W, 3), by the formulas of the original."""
    x = torch.from_numpy(array).permute(2, 0, 1)[None].float().div(255).sub(0.5).div(0.5)
    with torch.no_grad():
        return tensor2im(net(x))


# -------------------------------------------------------------------------------------- finding it
def test_a_cyclegan_goes_both_ways(cycle):
    array = pixels(36, 44)
    for direction, name in [("AtoB", "A"), ("BtoA", "B"), (None, "A")]:
        G = load_generator(cycle, direction, device="cpu")
        assert G.weights == cycle / f"latest_net_G_{name}.pth"
        assert G.options["direction"] == (direction or "AtoB")
        net = save(cycle.parent / "other" / "x.pth", seed=1 if name == "A" else 2)
        np.testing.assert_array_equal(G(array), reference(net, array))


def test_one_that_was_trained_the_other_way(cycle):
    text = (cycle / "train_opt.txt").read_text().replace("AtoB", "BtoA")
    (cycle / "train_opt.txt").write_text(text)
    assert load_generator(cycle, "BtoA", device="cpu").weights.name == "latest_net_G_A.pth"
    assert load_generator(cycle, "AtoB", device="cpu").weights.name == "latest_net_G_B.pth"


@pytest.mark.parametrize("netG", ["resnet_6blocks", "resnet_9blocks", "unet_128", "unet_256"])
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_without_options_the_weights_tell(tmp_path, netG, norm):
    net = save(tmp_path / "x" / "7_net_G.pth", netG, norm, nc=(3, 1))
    G = load_generator(tmp_path / "x", epoch=7, device="cpu", eval=True)
    assert (G.options["netG"], G.options["norm"], G.options["ngf"]) == (netG, norm, 4)
    assert (G.input_nc, G.output_nc, G.value_range) == (3, 1, None)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(G(x), net.eval()(x))


def test_without_options_one_u_net_has_dropout_and_one_of_two_has_not(tmp_path):
    save(tmp_path / "one" / "latest_net_G.pth", "unet_128")
    for side in "AB":
        save(tmp_path / "two" / f"latest_net_G_{side}.pth", "unet_128")
    x = torch.rand(1, 3, 64, 64)
    for name, varies in (("one", True), ("two", False)):
        G = load_generator(tmp_path / name, device="cpu")
        assert torch.equal(G(x), G(x)) is not varies


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module.module.", "_orig_mod.module."])
def test_wrapped_and_sorted_weights(tmp_path, prefix):
    net = save(tmp_path / "x" / "latest_net_G.pth", nc=(3, 1))
    state = {prefix + key: value for key, value in sorted(net.state_dict().items())}
    torch.save(state, tmp_path / "x" / "latest_net_G.pth")
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load_generator(tmp_path / "x", device="cpu")(x), net(x))


@pytest.mark.parametrize("keys", ["_orig_mod.a.weight", "module.a.weight", "module.module.weight"])
def test_prefixes_that_are_a_networks_own_stay(keys):
    net = torch.nn.Sequential()
    net.state_dict = lambda: {keys: torch.zeros(1)}  # type: ignore[method-assign]
    wrapped = {f"module.{keys}": torch.ones(1)}
    for state in ({keys: torch.ones(1)}, wrapped):
        assert list(fit_state_dict(state, net)) == [keys]


def test_a_program_that_computes_otherwise_changes_nothing(cycle):
    array = pixels(40, 40)
    wanted = load_generator(cycle, device="cpu", precision="fp32")(array)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        G = load_generator(cycle, device="cpu", precision="fp32")
        assert np.array_equal(G(array), wanted)
        assert np.abs(G(array, tile=32).astype(int) - wanted).max() <= 1
    finally:
        torch.set_default_dtype(before)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(G(array), wanted)
        assert torch.is_autocast_enabled("cpu")


def test_flags_of_backends_come_back():
    """Models set them; those of a program that loads a generator are its own."""
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    try:
        with unchanged_process(io.StringIO()):
            for place, flag in zip(places, before, strict=True):
                place.allow_tf32 = not flag
        assert [place.allow_tf32 for place in places] == before
    finally:
        for place, flag in zip(places, before, strict=True):
            place.allow_tf32 = flag


def test_nan_is_no_picture(cycle, tmp_path):
    path = cycle / "latest_net_G_A.pth"
    state = torch.load(path)
    next(iter(state.values())).view(-1)[0] = torch.nan
    torch.save(state, path)
    with pytest.raises(UserError, match="the network gives NaN"):
        load_generator(cycle, device="cpu")(pixels(40, 40))
    source = picture(tmp_path / "photos" / "a.png")
    where = ["--dataroot", source.parent, "--checkpoints_dir", cycle.parent, "--name", cycle.name]
    where += ["--gpu_ids", -1, "--results_dir", tmp_path / "results", "--crop_size", 32]
    result = run("test.py", *where, "--only_outputs")
    assert result.code == 1
    assert f"{source}: the network gives NaN" in result.err
    assert not list((tmp_path / "results").rglob("a.png"))
    assert "a_fake.png is black where the model gave NaN" in succeed("test.py", *where).err


def test_two_channels_are_not_grey_and_its_transparency(tmp_path):
    save(tmp_path / "x" / "latest_net_G.pth", nc=(1, 2))
    G = load_generator(tmp_path / "x", device="cpu")
    path = picture(tmp_path / "a.png")
    assert G(path).shape == (40, 40, 2)
    with pytest.raises(UserError, match="no images of two channels"):
        G(Image.open(path))


def test_what_can_not_be_loaded(cycle, pix, tmp_path):
    with pytest.raises(UserError, match=r"latest_net_G\.pth is a file: give the folder"):
        load_generator(pix / "latest_net_G.pth")
    with pytest.raises(UserError, match=r"no folder .*nothing: .*ck has cycle, pix"):
        load_generator(cycle.parent / "nothing")
    with pytest.raises(UserError, match=r"no weights .*9_net_G_A\.pth"):
        load_generator(cycle, epoch=9)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "generator.pth").touch()
    with pytest.raises(UserError, match=r"generator\.pth: rename the generator's to latest_net_G"):
        load_generator(tmp_path / "other")
    with pytest.raises(UserError, match="trained BtoA and has one generator: it can't go AtoB"):
        load_generator(pix, "AtoB")
    with pytest.raises(UserError, match="direction 'up': choose"):
        load_generator(pix, "up")
    with pytest.raises(UserError, match="precision 'half': choose"):
        load_generator(pix, precision="half")
    with pytest.raises(UserError, match="device 'toaster' can't be used"):
        load_generator(pix, device="toaster")
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "ck" / "pix" / "latest_net_G.pth")
    with pytest.raises(UserError, match="holds no network of this code"):
        load_generator(pix)


def test_generators_of_other_names_are_told(cycle):
    for name in "AB":
        (cycle / f"latest_net_G_{name}.pth").rename(cycle / f"latest_net_Gen{name}.pth")
    said = "has latest_net_GenA.pth, latest_net_GenB.pth; load_generator and --model test take G, "
    with pytest.raises(UserError, match=said):
        load_generator(cycle)
    picture(cycle / "in" / "a.png")
    assert said in run("test.py", *test_program(cycle, cycle / "in")).err


def test_no_argparse_and_no_dataset_is_needed(cycle):
    code = (
        "import sys; sys.argv = ['x', '--nonsense']\n"
        "from models import load_generator\n"
        f"G = load_generator({str(cycle)!r}, device='cpu')\n"
        "import numpy as np\n"
        "print(G(np.zeros((20, 21, 3), np.uint8)).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip().endswith("(20, 21, 3)"), done.stderr


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        models.nothing  # noqa: B018
    assert models.Translator is Translator


# -------------------------------------------------------------------------------------- calling it
def test_kinds_of_pictures(cycle, tmp_path):
    G = load_generator(cycle, device="cpu")
    path = picture(tmp_path / "a.png", 37, 30)
    image, array = Image.open(path), pixels(37, 30)
    out = G(array)
    assert out.shape == (30, 37, 3)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(np.asarray(G(image)), out)
    np.testing.assert_array_equal(np.asarray(G(path)), out)
    np.testing.assert_array_equal(np.asarray(G(str(path))), out)
    deep = G(array.astype(np.uint16) * 257)
    assert deep.dtype == np.uint16
    np.testing.assert_allclose(deep / 257, out, atol=0.51)
    floats = G((array / 255).astype(np.float32))
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats * 255, out, atol=0.51)
    rgba = G(np.dstack([array, array[..., :1]]))
    np.testing.assert_array_equal(rgba, np.dstack([out, array[..., :1]]))
    assert G(Image.fromarray(array).convert("RGBA")).mode == "RGBA"
    assert G(array[..., 0]).shape == (30, 37, 3)  # grey in, colour out
    x = torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(G(x), G(x[None])[0])
    np.testing.assert_array_equal(tensor2im(G(x[None])), out)


def test_lists_keep_their_order(cycle):
    G = load_generator(cycle, device="cpu")
    arrays = [pixels(32, 32 if k % 3 else 40, k) for k in range(7)]
    results = G(arrays, batch_size=4)
    for array, result in zip(arrays, results, strict=True):
        np.testing.assert_allclose(result, G(array), atol=1)
    assert G([]) == []


def test_each_picture_has_its_own_statistics(pix):
    # batch norm as in training: together, images would change each other
    G = load_generator(pix, device="cpu")
    for module in G.net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    arrays = [pixels(128, 128, k) for k in range(3)]
    for array, result in zip(arrays, G(arrays), strict=True):
        np.testing.assert_array_equal(result, G(array))


def test_eval_is_asked_for(pix):
    array = pixels(128, 128)
    plain, fixed = load_generator(pix, device="cpu"), load_generator(pix, device="cpu", eval=True)
    assert plain.net.training
    assert not fixed.net.training
    np.testing.assert_array_equal(fixed(array), fixed(array))
    assert (plain(array) != plain(array)).any()  # dropout draws


def test_numbers_of_any_kind(cycle):
    G = load_generator(cycle, device="cpu")
    array = pixels(40, 40)
    assert np.array_equal(G(array, np.int64(2), np.int64(32)), G(array, 2, 32))
    for bad in ({"tile": 32.0}, {"tile": "32"}, {"batch_size": "4"}):
        with pytest.raises(UserError, match="is not a whole number"):
            G(array, **bad)
    with pytest.raises(UserError, match="uint32 need a range"):
        G(array.astype(np.uint32))


def test_tiles_of_the_translator(cycle):
    G = load_generator(cycle, device="cpu")
    array = pixels(90, 70)
    np.testing.assert_allclose(G(array, tile=32), G(array), atol=1)


def test_precision(cycle):
    array = pixels(40, 40)
    exact = load_generator(cycle, device="cpu")(array).astype(int)
    G = load_generator(cycle, device="cpu", precision="bf16")
    assert 0 < np.abs(G(array) - exact).mean() < 12
    assert np.abs(G(array, tile=16) - exact).mean() < 12


class Watched(torch.nn.Module):
    """A 1x1 convolution that notes what it is called with, and the flag for TF32."""

    def __init__(self, *layers: torch.nn.Module):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), *layers)
        self.shapes: list[tuple[int, ...]] = []
        self.flags: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        self.flags.append(torch.backends.cudnn.allow_tf32)
        return self.layers(x)

    def translator(self, precision: str = "tf32") -> Translator:
        made = {"input_nc": 3, "output_nc": 3, "direction": "AtoB"}
        G = Translator(self, torch.device("cpu"), made, Path("x"), None, precision)
        self.shapes, self.flags = [], []  # without the search for sizes
        return G


@pytest.mark.parametrize("tile", [None, 32])
def test_fp32_turns_tf32_off_in_tiles_too(tile, capfd):
    for precision, flag in (("tf32", True), ("fp32", False)):
        net = Watched()
        net.translator(precision)(pixels(50, 40), tile=tile)
        assert set(net.flags) == {flag}
        assert torch.backends.cudnn.allow_tf32


def test_other_threads_print_as_ever_while_a_model_is_made(capsys):
    printed = io.StringIO()
    with unchanged_process(printed):
        print("inside")
        thread = threading.Thread(target=print, args=("outside",))
        thread.start()
        thread.join()
    print("after")
    assert printed.getvalue() == "inside\n"
    assert capsys.readouterr().out == "outside\nafter\n"


def test_threads_that_need_fp32_take_turns():
    seen, came = [], threading.Event()

    def other() -> None:
        with precision_context("fp32", "cpu"):
            seen.append(torch.backends.cudnn.allow_tf32)
            came.set()

    with precision_context("fp32", "cpu"), precision_context("fp32", "cpu"):
        thread = threading.Thread(target=other)
        thread.start()
        assert not came.wait(0.3)
    thread.join(60)
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32


def test_tensors_are_split_into_batches_and_tiles(capfd):
    x = torch.rand(5, 3, 40, 50) * 2 - 1
    net = Watched()
    G = net.translator()
    assert torch.allclose(G(x, batch_size=2), net.layers(x), atol=1e-6)
    assert [n for n, *_ in net.shapes] == [2, 2, 1]
    net.shapes.clear()
    assert torch.allclose(G(x[:2], tile=32), net.layers(x[:2]), atol=1e-6)
    assert torch.allclose(G([x[0]], tile=32)[0], net.layers(x[:1])[0], atol=1e-6)
    assert (40, 50) not in {shape[2:] for shape in net.shapes}


def test_each_picture_of_a_tensor_has_its_own_statistics():
    x = torch.rand(2, 3, 40, 50) * torch.tensor([0.1, 1.0])[:, None, None, None]
    net = Watched(torch.nn.BatchNorm2d(3))
    got = net.translator()(x)
    alone = net.layers[0](x)
    centred = alone - alone.mean((2, 3), keepdim=True)
    wanted = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(got, wanted, atol=1e-5)


def test_a_range_of_values(cycle):
    G = load_generator(cycle, device="cpu", value_range=(0, 4095))
    levels = np.linspace(0, 4095, 40 * 40 * 3).reshape(40, 40, 3)
    for given in (levels, levels.round().astype(np.int64)):
        x = torch.from_numpy(given / 2047.5 - 1).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            wanted = (G.net(x)[0].permute(1, 2, 0).double().numpy() + 1) * 2047.5
        np.testing.assert_allclose(G(given), wanted, atol=0.51 if given.dtype == int else 0.01)
    with pytest.raises(UserError, match="the first must be the lower one"):
        load_generator(cycle, value_range=(1, 1))


@pytest.mark.parametrize("tile", [None, 16])
def test_8_bits_of_a_larger_range_get_results_on_their_own_scale(cycle, tile):
    """They can't hold the network's values, and would be white."""
    G = load_generator(cycle, device="cpu", value_range=(0, 4095))
    pixels = np.arange(32 * 24 * 3).reshape(32, 24, 3).astype(np.uint8)
    x = torch.from_numpy(pixels / 2047.5 - 1).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        wanted = tensor2im(G.net(x))
    assert len(np.unique(wanted)) > 50
    for given in (pixels, Image.fromarray(pixels)):
        assert np.abs(np.asarray(G(given, tile=tile)).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_grey_of_a_range_becomes_colour_of_8_bits(cycle, dtype, tile):
    G = load_generator(cycle, device="cpu", value_range=(-500, 4095))
    levels = np.linspace(0, 4095, 32 * 24).reshape(32, 24).round().astype(dtype)
    levels[0, 0] = -500 if dtype == np.int32 else 0  # mode I has numbers below 0
    x = torch.from_numpy((levels.astype(float) + 500) / 2297.5 - 1).float().expand(1, 3, 32, 24)
    with torch.no_grad():
        wanted = tensor2im(G.net(x))
    got = G(Image.fromarray(levels), tile=tile)
    assert got.mode == "RGB"
    assert np.abs(np.asarray(got).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("tile", [[], ["--tile", "16"]])
@pytest.mark.parametrize(
    ("dtype", "opaque"),
    [(np.uint16, 4095), (np.uint16, 65535), (np.int16, 4095), (np.float32, 4095), (np.float32, 1)],
)
def test_transparency_of_a_range(cycle, tmp_path, dtype, opaque, tile):
    tifffile = pytest.importorskip("tifffile")
    steps = np.linspace(0, 1, 24 * 32).reshape(24, 32)
    rgba = (np.dstack([steps] * 4) * [4095, 4095, 4095, opaque]).astype(dtype)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.tiff"
    tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["unassalpha"])
    arguments = test_program(cycle, tmp_path / "in", "--only_outputs", "--value_range", 0, 4095)
    succeed("test.py", *arguments, *tile)
    with Image.open(results(cycle) / "a.png") as image:
        alpha = np.asarray(image.getchannel("A")).astype(float)
    assert np.abs(alpha - steps * 255).max() <= 1
    # at the depth of the input it stays as it is
    G = load_generator(cycle, device="cpu", value_range=(0, 4095))
    np.testing.assert_array_equal(G(rgba)[..., 3], rgba[..., 3])


def test_what_can_not_be_translated(cycle):
    G = load_generator(cycle, device="cpu")
    for wrong, said in [
        (3, "can't translate a int"),
        (np.zeros((4, 4, 7), np.uint8), "has 7 channels, the network takes 3"),
        (np.zeros((4, 4, 3), complex), "of integers or floats"),
        (torch.zeros(1, 2, 8, 8), "the network takes 3 channels"),
        (torch.zeros(8, 8), r"must be \(N, C, H, W\)"),
        (torch.zeros(3, 0, 8), r"must be \(N, C, H, W\)"),
        (Image.new("RGB", (0, 5)), "0x5 pixels is empty"),
        (np.full((8, 8, 3), 1.0001), "floats from 1.0001 to 1.0001 need"),
        (np.full((8, 8, 3), 300.0), "need their range: --value_range"),
        (np.full((8, 8, 3), np.nan), "NaN or infinite"),
        ("no/such.png", "can't read the image no/such.png"),
        (ROOT, "is a folder: give a list of its images"),
    ]:
        with pytest.raises(UserError, match=said):
            G(wrong)
    with pytest.raises(UserError, match="batch_size 0 is too small"):
        G([np.zeros((8, 8, 3), np.uint8)], batch_size=0)
    floats = pixels(8, 8) / pixels(8, 8).max()
    np.testing.assert_allclose(G(floats * (1 + 1e-7)), G(floats), atol=1e-3)
    for wrong in (5, ("a", "b"), (1, 2, 3), "01"):
        with pytest.raises(UserError, match="give two numbers"):
            load_generator(cycle, device="cpu", value_range=wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="and both finite"):
        load_generator(cycle, device="cpu", value_range=(0, np.inf))
    with pytest.raises(UserError, match=r"device '3.5' can't be used"):
        load_generator(cycle, device=3.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="choose from onnx"):
        export_generator(cycle, ["onnx"])  # type: ignore[arg-type]
    infinite = np.full((8, 8, 3), 7.0)
    infinite[3, 3, 0] = np.inf
    with pytest.raises(UserError, match="NaN or infinite"):
        load_generator(cycle, device="cpu", value_range=(0, 9))(infinite)


# ----------------------------------------------------------------------------------- the test page
def test_program(cycle, folder, *more):
    return [
        *("--dataroot", folder, "--name", cycle.name, "--checkpoints_dir", cycle.parent),
        *("--results_dir", cycle.parent.parent / "results", "--model", "test", "--gpu_ids", "-1"),
        *("--num_threads", "0", *more),
    ]


test_program.__test__ = False  # type: ignore[attr-defined]


def results(folder: Path) -> Path:
    return folder.parent.parent / "results" / folder.name / "test_latest"


def test_page_keeps_sizes(cycle, tmp_path):
    picture(tmp_path / "in" / "a.png", 45, 38)
    G = load_generator(cycle, device="cpu")
    arguments = test_program(cycle, tmp_path / "in")
    for more in ("--keep_size", "--tile=24", "--tile=24 --tile_mode=quick"):
        out = succeed("test.py", *arguments, *more.split())
        assert "translating 1 of 1" in out.out
        fake = np.asarray(Image.open(results(cycle) / "images" / "a_fake.png"))
        assert fake.shape == (38, 45, 3)
        if "quick" not in more:
            np.testing.assert_allclose(fake, G(pixels(45, 38)), atol=1)
    # as it always was
    succeed("test.py", *arguments, "--preprocess", "none")
    fake = Image.open(results(cycle) / "images" / "a_fake.png")
    assert fake.size == (44, 40)


def test_page_of_a_single_file_in_tiles(cycle, tmp_path):
    path = picture(tmp_path / "a b.png", 45, 38)
    out = succeed("test.py", *test_program(cycle, path, "--tile", "24"))
    assert "translating 1 of 1" in out.out
    page = (results(cycle) / "index.html").read_text()
    assert "images/a%20b_fake.png" in page
    fake = np.asarray(Image.open(results(cycle) / "images" / "a b_fake.png"))
    wanted = load_generator(cycle, device="cpu")(pixels(45, 38))
    np.testing.assert_allclose(fake, wanted, atol=1)


def images_of(folder: Path) -> dict[str, bytes]:
    """The files of a page, without the minute in which it was made."""
    made = re.compile(rb"Made \d{4}-\d\d-\d\d \d\d:\d\d")
    return {name: made.sub(b"", (folder / name).read_bytes()) for name in files_below(folder)}


def assert_same_but_for_rounding(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    """Convolutions add up in another order for another batch size: a level, here and there."""
    assert list(one) == list(other)
    for name, data in one.items():
        if name.endswith(".html"):
            assert data == other[name]
            continue
        a, b = (np.asarray(Image.open(io.BytesIO(d))).astype(int) for d in (data, other[name]))
        assert np.abs(a - b).max() <= 1, name
        assert (a != b).mean() < 1e-3, name


def test_a_page_goes_on_without_a_picture_whose_results_have_no_name(cycle, tmp_path):
    """File systems allow 255 bytes, and the result has `_fake` and `.png` in it."""
    fitting, long = (picture(tmp_path / "in" / f"{'n' * n}.png", 40, 40) for n in (245, 247))
    picture(tmp_path / "in" / "z.png", 40, 40)
    result = succeed("test.py", *test_program(cycle, tmp_path / "in"))
    assert warnings_of(result) == [
        f"warning: {long} is left out: the names of its results would be too long"
    ]
    page = (results(cycle) / "index.html").read_text()
    assert f"{fitting.stem}_fake.png" in page
    assert "z_fake.png" in page
    assert " 2 of 3 images " in page


def test_batches_and_workers_make_the_same_page(cycle, tmp_path):
    for k in range(9):
        picture(tmp_path / "in" / f"{k}.png", 40 if k % 4 else 48, 40, k)
    shots = []
    for more in (["--batch_size", "1"], ["--batch_size", "4"], ["--num_threads", "2"]):
        succeed("test.py", *test_program(cycle, tmp_path / "in", *more, "--keep_size"))
        shots.append(images_of(results(cycle)))
        shutil.rmtree(results(cycle))
    assert len(shots[0]) == 19
    assert_same_but_for_rounding(shots[0], shots[1])
    assert shots[0] == shots[2]


def test_models_that_depend_on_the_batch_run_one_by_one(pix, tmp_path):
    aligned(tmp_path / "al", 3, 128)
    arguments = [
        *("--dataroot", tmp_path / "al", "--name", "pix", "--checkpoints_dir", pix.parent),
        *("--results_dir", tmp_path / "results", "--model", "pix2pix", "--gpu_ids", "-1"),
        *("--seed", 5, "--num_threads", 0, "--load_size", 128, "--crop_size", 128),
    ]
    shots = []
    for size in (1, 3):
        out = succeed("test.py", *arguments, "--batch_size", size).out
        shots.append(images_of(results(pix)))
    assert shots[0] == shots[1]  # dropout too: the draws come in the same order
    assert "batch size 1: the results of this model depend on the batch" in out


# ------------------------------------------------------------------------------------ only outputs
def test_only_outputs(cycle, tmp_path):
    root = tmp_path / "in"
    picture(root / "a.png", 45, 38, 1)
    picture(root / "deep" / "a.PNG", 40, 40, 2)
    picture(root / "deep" / "b.jpg", 40, 40, 3)
    picture(root / "deep" / "b.png", 40, 40, 4, mode="RGBA")
    # exact: by default test.py's results may differ from G's by a level, as NNPACK computes them
    G = load_generator(cycle, device="cpu", precision="fp32")
    exact = "--only_outputs", "--precision", "fp32"
    out = succeed("test.py", *test_program(cycle, root, *exact))
    assert "translating 4 of 4 images" in out.out
    found = files_below(results(cycle))
    # two of one name keep their endings
    assert found == ["a.png", "deep/a.png", "deep/b.jpg.png", "deep/b.png.png"]
    got = np.asarray(Image.open(results(cycle) / "a.png"))
    np.testing.assert_array_equal(got, G(pixels(45, 38, 1)))
    assert Image.open(results(cycle) / "deep" / "b.jpg.png").mode == "RGB"
    assert Image.open(results(cycle) / "deep" / "b.png.png").mode == "RGBA"


def test_inputs_are_not_replaced_by_their_results(cycle):
    file = picture(results(cycle) / "a.png")
    before = file.read_bytes()
    for given in (file.parent, file):
        result = run("test.py", *test_program(cycle, given, "--only_outputs"))
        assert result.code == 1
        assert "is where results are written" in result.err
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "names"),
    [("jpg", ["a.jpg", "b.jpg"]), ("webp", ["a.webp", "b.webp"]), ("tiff", ["a.tiff", "b.tiff"]),
     ("same", ["a.png", "b.bmp"])],
)  # fmt: skip
def test_formats(cycle, tmp_path, kind, names):
    for name in ("a.png", "b.bmp"):
        picture(tmp_path / "in" / name, 41, 33)
    arguments = test_program(cycle, tmp_path / "in", "--only_outputs", "--output_format", kind)
    succeed("test.py", *arguments)
    assert files_below(results(cycle)) == names
    assert {Image.open(results(cycle) / name).size for name in names} == {(41, 33)}


def test_existing_outputs_are_skipped(cycle, tmp_path):
    for k in range(3):
        picture(tmp_path / "in" / f"{k}.png", 40, 40, k)
    arguments = test_program(cycle, tmp_path / "in", "--only_outputs", "--skip_existing")
    succeed("test.py", *arguments)
    first = images_of(results(cycle))
    (results(cycle) / "1.png").unlink()
    (results(cycle) / "2.png").write_bytes(b"touched")
    out = succeed("test.py", *arguments)
    assert "translating 1 of 3 images (2 already exist)" in out.out
    second = images_of(results(cycle))
    assert second["1.png"] == first["1.png"]
    assert second["2.png"] == b"touched"


def test_a_result_whose_name_is_too_long_is_listed(cycle, tmp_path):
    for name in ("a", "x" * 251):
        picture(tmp_path / "in" / f"{name}.png", 40, 40)
    more = ["--only_outputs", "--output_format", "webp", "--skip_existing"]
    for count in (2, 1):
        result = run("test.py", *test_program(cycle, tmp_path / "in", *more))
        assert f"1 of {count} images failed" in result.err
        assert result.err.endswith(".webp: File name too long\n")


def test_results_of_other_runs_are_not_translated(cycle, tmp_path):
    picture(tmp_path / "a.png", 40, 40)
    for more in ([], ["--only_outputs"], ["--only_outputs"]):
        where = ["--results_dir", tmp_path / f"{len(list(tmp_path.iterdir()))}"]
        out = succeed("test.py", *test_program(cycle, tmp_path, *where, *more)).out
        assert "translating 1 of 1" in out
    assert f"skipped in {tmp_path}: 2 test_latest/ (results)" in out


def test_inputs_of_one_name_are_not_taken_for_each_other(cycle, tmp_path):
    arguments = test_program(cycle, tmp_path / "in", "--only_outputs", "--skip_existing")
    picture(tmp_path / "in" / "a.png", 40, 40, 1)
    succeed("test.py", *arguments)
    picture(tmp_path / "in" / "a.jpg", 32, 32, 2)
    picture(tmp_path / "in" / "a.jpg.bmp", 36, 36, 3)
    assert "translating 3 of 3 images" in succeed("test.py", *arguments).out
    sizes = {
        name: Image.open(results(cycle) / name).size[0] for name in files_below(results(cycle))
    }
    assert sizes == {"a.png": 40, "a.png.png": 40, "a.jpg.png": 32, "a.jpg.bmp.png": 36}
    assert "translating 0 of 3 images" in succeed("test.py", *arguments).out


def test_the_last_of_four_channels_of_an_array_is_alpha(cycle, tmp_path):
    """As for a generator in Python."""
    array = np.dstack([pixels(40, 44), np.arange(40, dtype=np.uint8)[None].repeat(44, 0)])
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", array)
    succeed("test.py", *test_program(cycle, tmp_path / "in", "--only_outputs"))
    got = np.asarray(Image.open(results(cycle) / "a.png"))
    wanted = load_generator(cycle, device="cpu")(array)
    assert np.array_equal(got[..., 3], array[..., 3])
    assert np.abs(got.astype(int) - wanted).max() <= 1  # computed in other threads


@pytest.mark.parametrize("threads", ["0", "3"])
@pytest.mark.parametrize("tile", [[], ["--tile", "32"]])
def test_failures_are_listed_and_the_rest_is_done(cycle, tmp_path, threads, tile):
    for k in range(4):
        picture(tmp_path / "in" / f"{k}.png", 40, 40, k)
    truncated(tmp_path / "in" / "1.png")
    np.save(tmp_path / "in" / "9.npy", np.zeros((9, 9, 7), np.uint8))
    arguments = test_program(cycle, tmp_path / "in", "--only_outputs", "--num_threads", threads)
    out = run("test.py", *arguments, *tile)
    assert out.code == 1
    last = out.err.strip().splitlines()[-3:]
    assert last[0] == "2 of 5 images failed:"
    assert "can't read the image" in last[1]
    assert "1.png" in last[1]
    assert "9.npy: the image has 7 channels" in last[2]
    assert files_below(results(cycle)) == ["0.png", "2.png", "3.png"]
    assert run("test.py", *arguments, *tile, "--skip_broken").code == 1  # the array can be read
    (tmp_path / "in" / "9.npy").unlink()
    assert run("test.py", *arguments, *tile).code == 1
    assert "1 of 4 images failed" in succeed("test.py", *arguments, *tile, "--skip_broken").err


def test_batches_and_threads_write_the_same_files(cycle, tmp_path):
    for k in range(11):
        picture(tmp_path / "in" / f"{k:02d}.png", 40 if k % 4 else 48, 40, k)
    shots = []
    for size, threads in [(1, 0), (4, 0), (1, 3)]:
        more = ("--only_outputs", "--batch_size", size, "--num_threads", threads)
        succeed("test.py", *test_program(cycle, tmp_path / "in", *more))
        shots.append(images_of(results(cycle)))
        shutil.rmtree(results(cycle))
    assert len(shots[0]) == 11
    assert_same_but_for_rounding(shots[0], shots[1])
    assert shots[0] == shots[2]


def test_scaled_only_outputs_equal_those_of_the_page(cycle, tmp_path):
    picture(tmp_path / "in" / "a.png", 90, 70)
    more = ["--preprocess", "resize_and_crop", "--crop_size", "48"]
    succeed("test.py", *test_program(cycle, tmp_path / "in", *more))
    succeed("test.py", *test_program(cycle, tmp_path / "in", *more, "--only_outputs"))
    page = np.asarray(Image.open(results(cycle) / "images" / "a_fake.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(results(cycle) / "a.png")), page)


def test_five_channels_and_a_range(tmp_path):
    folder = tmp_path / "ck" / "five"
    save(folder / "latest_net_G.pth", nc=(5, 2))
    options(folder, model="pix2pix", netG="resnet_6blocks", ngf=4, norm="instance",
            no_dropout=True, input_nc=5, output_nc=2, value_range=[0.0, 4095.0])  # fmt: skip
    array = np.random.default_rng(0).integers(0, 4096, (30, 35, 5)).astype(np.uint16)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", array)
    arguments = test_program(folder, tmp_path / "in", "--only_outputs")
    out = run("test.py", *arguments)
    assert "png can't hold 2 channels" in out.err
    succeed("test.py", *arguments, "--output_format", "same")
    got = np.load(results(folder) / "a.npy")
    assert got.dtype == np.uint16
    assert got.max() > 2048
    G = load_generator(folder, device="cpu")
    assert G.value_range == (0.0, 4095.0)
    np.testing.assert_allclose(got.astype(int), G(array).astype(int), atol=1)


def test_training_at_full_depth(tmp_path):
    rng = np.random.default_rng(0)
    for side in ("trainA", "trainB"):
        (tmp_path / "un" / side).mkdir(parents=True)
        for k in range(2):
            array = rng.integers(0, 4096, (40, 44, 5)).astype(np.uint16)
            np.save(tmp_path / "un" / side / f"{k}.npy", array)
    common = [
        *("--dataroot", tmp_path / "un", "--name", "x", "--checkpoints_dir", tmp_path / "ck"),
        *("--gpu_ids", "-1", "--num_threads", "0", "--input_nc", "5", "--output_nc", "5"),
        *("--value_range", "0", "4095"),
    ]
    small = "--netG resnet_6blocks --ngf 4 --ndf 4 --load_size 36 --crop_size 32".split()
    epochs = "--display_id 0 --n_epochs 1 --n_epochs_decay 0".split()
    succeed("train.py", *common, *small, *epochs)
    G = load_generator(tmp_path / "ck" / "x", device="cpu")
    assert (G.input_nc, G.value_range) == (5, (0.0, 4095.0))
    out = run("train.py", *common, *small, *epochs, "--input_nc", "3", "--output_nc", "3")
    assert "the image has 5 channels, the networks take 3" in out.err


# ---------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--keep_size", "--preprocess", "crop"], "contradict each other"),
        (["--tile", "64", "--preprocess", "crop"], "--tile and --preprocess crop contradict"),
        (["--tile", "64", "--tile_overlap", "64"], "--tile_overlap 64 is not below --tile 64"),
        (["--tile_overlap", "20"], "--tile_overlap needs --tile"),
        (["--tile_mode", "quick"], "--tile_mode needs --tile"),
        (["--tile", "64", "--tile_scratch", "/no/such"], "--tile_scratch /no/such is not a folder"),
        (["--only_outputs", "--model", "cycle_gan"], "--only_outputs needs --model test"),
        (["--skip_existing"], "--skip_existing needs --only_outputs"),
        (["--output_format", "jpg"], "--output_format needs --only_outputs"),
        (["--value_range", "3", "3"], "the lower one first"),
    ],
)
def test_options_that_do_not_go_together(cycle, tmp_path, more, said):
    out = run("test.py", *test_program(cycle, tmp_path, *more))
    assert out.code == 2
    assert said in out.err


# ------------------------------------------------------------------- what may not have been meant
def warnings_of(result) -> list[str]:
    return [line for line in result.err.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("more", [[], ["--only_outputs"]])
@pytest.mark.parametrize(("direction", "named"), [("AtoB", "testA"), ("BtoA", "testB")])
def test_a_whole_data_set_is_not_taken_silently(cycle, tmp_path, direction, named, more):
    root = unaligned(tmp_path / "data", 1)
    words = ["--direction", direction, *more]
    (said,) = warnings_of(succeed("test.py", *translate_words(cycle, root, tmp_path), *words))
    assert "testA, testB, trainA, trainB" in said
    assert said.endswith(f"--dataroot {root / named}")
    folder = translate_words(cycle, root / "testA", tmp_path / "other")
    assert warnings_of(succeed("test.py", *folder, *words)) == []


def test_a_page_of_another_model_is_not_replaced_silently(cycle, tmp_path):
    root = unaligned(tmp_path / "data", 1)
    one = translate_words(cycle, root / "testA", tmp_path)
    both = [*translate_words(cycle, root, tmp_path), "--model", "cycle_gan"]
    assert warnings_of(succeed("test.py", *one)) == []
    assert warnings_of(succeed("test.py", *one)) == []
    folder = tmp_path / "results" / "cycle" / "test_latest"
    (said,) = warnings_of(succeed("test.py", *both))
    assert said.startswith(f"warning: {folder} has results of --model test --dataroot {root}/testA")
    assert "--results_dir" in said
    assert warnings_of(succeed("test.py", *both)) == []


def test_a_page_is_not_ascribed_to_a_run_that_wrote_none_or_elsewhere(cycle, tmp_path):
    root = unaligned(tmp_path / "data", 1)
    page = [*translate_words(cycle, root, tmp_path), "--model", "cycle_gan"]
    succeed("test.py", *page)
    succeed("test.py", *translate_words(cycle, root / "testA", tmp_path), "--only_outputs")
    assert warnings_of(succeed("test.py", *page)) == []
    other = ["--results_dir", tmp_path / "other"]
    succeed("test.py", *translate_words(cycle, root / "testA", tmp_path), *other)
    assert warnings_of(succeed("test.py", *page)) == []


def test_outputs_of_the_other_direction_are_not_mixed_silently(cycle, tmp_path):
    root = unaligned(tmp_path / "data", 1)
    page = translate_words(cycle, root / "testA", tmp_path)
    words = [*page, "--only_outputs"]
    succeed("test.py", *page)
    # no page is written, so none is replaced
    assert warnings_of(succeed("test.py", *words, "--direction", "BtoA")) == []
    assert warnings_of(succeed("test.py", *words, "--direction", "BtoA")) == []
    (said,) = warnings_of(succeed("test.py", *words, "--skip_existing"))
    assert "results of --direction BtoA: those of the same names are left as they are" in said
    (said,) = warnings_of(succeed("test.py", *words, "--direction", "BtoA"))
    assert "results of --direction AtoB: those of the same names are replaced" in said
    other = ["--results_dir", tmp_path / "other"]
    assert warnings_of(succeed("test.py", *words, *other)) == []


def test_inputs_are_never_replaced(cycle, tmp_path):
    folder = tmp_path / "results" / "cycle" / "test_latest"
    before = picture(folder / "a.png").read_bytes()
    words = [*translate_words(cycle, folder, tmp_path), "--only_outputs"]
    for more in ([], ["--output_format", "same"]):
        result = run("test.py", *words, *more)
        assert (result.code, result.err.count("\n")) == (1, 1)
        assert "choose another --results_dir" in result.err
    assert [p.name for p in folder.iterdir()] == ["a.png"]
    assert (folder / "a.png").read_bytes() == before


def test_what_is_of_no_use_is_said(cycle, pix, tmp_path):
    picture(tmp_path / "in" / "0.png")
    words = translate_words(cycle, tmp_path / "in", tmp_path)
    (said,) = warnings_of(succeed("test.py", *words, "--only_outputs", "--use_wandb"))
    assert "--use_wandb has no effect" in said
    words = translate_words(pix, tmp_path / "in", tmp_path)
    assert warnings_of(succeed("test.py", *words)) == []
    said = warnings_of(succeed("test.py", *words, "--direction", "AtoB"))[0]
    assert "pix was trained BtoA and has one generator" in said


def translate_words(folder: Path, dataroot: Path, out: Path) -> list[object]:
    where = ["--checkpoints_dir", folder.parent, "--name", folder.name, "--dataroot", dataroot]
    more = "--gpu_ids -1 --num_threads 0 --crop_size 32 --num_test 2".split()
    return [*where, "--results_dir", out / "results", *more]


# ------------------------------------------------------------------------------------------ Ctrl-C
@pytest.mark.parametrize(
    "program", ["train.py", "test.py", "scripts/evaluate.py", "scripts/check_dataset.py"]
)
def test_an_interrupt_while_packages_are_imported(program, tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('there', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, ROOT / program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "more",
    [[], ["--num_threads", "2"], ["--only_outputs"], ["--only_outputs", "--num_threads", "2"]],
)
def test_an_interrupt_leaves_whole_pictures(cycle, tmp_path, more):
    for i in range(300):
        picture(tmp_path / "in" / f"{i:03}.png", k=i)
    words = [*translate_words(cycle, tmp_path / "in", tmp_path), "--num_test", "all", *more]
    process = subprocess.Popen(
        [sys.executable, ROOT / "test.py", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    results, end = tmp_path / "results", time.monotonic() + 60
    # whole ones: one that is being written has a temporary name, and goes at the interrupt
    while sum(".tmp." not in f for f in files_below(results)) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.endswith("\ninterrupted\n")
    names = files_below(results)
    assert 4 <= len(names) < 300
    if "--only_outputs" not in more:  # the page has what is done
        (page,) = results.glob("**/index.html")
        shown = re.findall(r'src="images/([^"]+)"', page.read_text())
        assert len(shown) >= 2
        assert all((page.parent / "images" / name).is_file() for name in shown)
        assert f"{len(shown) // 2} of 300 images" in page.read_text()
    if "--only_outputs" in more:
        for name in names:
            with Image.open(results / name) as image:
                image.load()


def test_an_interrupt_keeps_a_page_that_is_there(cycle, tmp_path, monkeypatch):
    for i in range(3):
        picture(tmp_path / "in" / f"{i}.png", k=i)
    words = [*translate_words(cycle, tmp_path / "in", tmp_path), "--num_test", "all"]
    real, done = visualizer.write_visuals, []

    def write(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(args)
        return real(*args)

    def interrupted() -> str:
        done.clear()
        with monkeypatch.context() as patch:
            patch.setattr(visualizer, "write_visuals", write)
            assert run("test.py", *words).code == 130
        return next((tmp_path / "results").glob("**/index.html")).read_text()

    assert "2 of 3 images" in interrupted()
    succeed("test.py", *words)
    assert "3 of 3 images" in interrupted()


@pytest.mark.parametrize("threads", [False, True])
def test_sigterm_leaves_no_part_of_a_picture(threads, cycle, tmp_path):
    """As when a cluster takes the machine back; a thread finishes what it writes."""
    code = """
    import runpy, sys, time
    import data.pictures.writing

    def write(path, *_):
        path.write_bytes(b"a part")
        print("there", file=sys.stderr, flush=True)
        time.sleep(SECONDS)

    data.pictures.writing._write_pillow = write
    runpy.run_path("test.py", run_name="__main__")
    """
    picture(tmp_path / "in" / "0.png")
    words = [*translate_words(cycle, tmp_path / "in", tmp_path), "--only_outputs"]
    words += [] if threads else ["--tile", "64"]
    code = textwrap.dedent(code).replace("SECONDS", "3" if threads else "60")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "there\n" in iter(process.stderr.readline, "")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "")
    assert files_below(tmp_path / "results") == (["cycle/test_latest/0.png"] if threads else [])


def test_a_file_that_a_dataset_lacks_is_not_the_fault_of_the_results(cycle, monkeypatch):
    picture(cycle / "in" / "0.png")

    def get(dataset, index):
        return open("/no/mask.png")

    monkeypatch.setattr("data.single_dataset.SingleDataset.__getitem__", get)
    result = run("test.py", *test_program(cycle, cycle / "in"))
    assert result.err.splitlines()[-1] == (
        "error: can't read /no/mask.png: No such file or directory"
    )


# ------------------------------------------------------------------------------------ a full disk
def test_a_page_on_a_full_disk_is_one_line(cycle, tmp_path):
    result = on_a_full_disk(cycle, tmp_path)
    (line,) = [text for text in result.stderr.splitlines() if not text.startswith("warning: ")]
    assert line == f"error: can't write to {tmp_path}/results/cycle/test_latest: File too large"
    assert result.returncode == 1
    assert not [name for name in files_below(tmp_path / "results") if name.endswith(".png")]


@pytest.mark.parametrize("more", [[], ["--tile", "64"]])
@pytest.mark.parametrize("form", ["png", "tiff"])
def test_outputs_on_a_full_disk_are_listed(cycle, tmp_path, form, more):
    result = on_a_full_disk(cycle, tmp_path, "--only_outputs", "--output_format", form, *more)
    assert result.returncode == 1
    assert "2 of 2 images failed" in result.stderr
    for name in ("0", "1"):
        path = tmp_path / "results" / "cycle" / "test_latest" / f"{name}.{form}"
        assert f"can't write {path}: File too large" in result.stderr
    assert "TIFF" not in result.stderr  # as libtiff says it
    assert files_below(tmp_path / "results") == []


def test_a_full_scratch_folder_is_named(cycle, tmp_path):
    exact = f"--only_outputs --tile 64 --tile_mode exact --tile_memory 0 --tile_scratch {tmp_path}"
    result = on_a_full_disk(cycle, tmp_path, *exact.split())
    reason = f"{tmp_path}/in/0.png: can't write to --tile_scratch {tmp_path}: File too large"
    assert f"  {reason}\n" in result.stderr


def on_a_full_disk(cycle, tmp_path, *more) -> subprocess.CompletedProcess[str]:
    for i in range(2):
        picture(tmp_path / "in" / f"{i}.png", 200, 200, k=i)
    words = [*translate_words(cycle, tmp_path / "in", tmp_path), "--crop_size", "200", *more]
    command = [sys.executable, ROOT / "test.py", *words]
    limited = "ulimit -f 6; exec " + shlex.join(map(str, command))  # no file above 6 KiB
    return subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=120)


def test_a_copied_generator_does_not_hide_the_other_way(cycle, tmp_path):
    """`cp latest_net_G_A.pth latest_net_G.pth` in the same folder, as for --model test."""
    shutil.copy(cycle / "latest_net_G_A.pth", cycle / "latest_net_G.pth")
    path = picture(tmp_path / "in" / "a.png", 32, 32)
    seen = np.array(Image.open(path).convert("RGB"))
    for direction, seed in ((None, 1), ("AtoB", 1), ("BtoA", 2)):
        wanted = reference(save(tmp_path / "other" / "x.pth", seed=seed), seen)
        found = np.asarray(load_generator(cycle, direction, device="cpu", precision="fp32")(path))
        assert np.abs(found.astype(int) - wanted).max() <= 1
        out = tmp_path / str(direction)
        words = [*translate_words(cycle, tmp_path / "in", out), "--precision", "fp32"]
        given = ["--direction", direction] if direction else []
        assert warnings_of(succeed("test.py", *words, "--only_outputs", *given)) == []
        written = np.asarray(Image.open(out / "results" / "cycle" / "test_latest" / "a.png"))
        assert np.abs(written.astype(int) - wanted).max() <= 1


def test_options_of_the_network_that_are_given_count(cycle, tmp_path):
    """Also where the training's own model builds it; `--norm` is that of G in CUT, too."""
    picture(tmp_path / "in" / "a.png", 32, 32)
    words = translate_words(cycle, tmp_path / "in", tmp_path)
    for given in ("--norm batch", "--input_nc 1", "--output_nc 1", "--ngf 8"):
        result = run("test.py", *words, *given.split())
        assert (result.code, result.err.count("\n")) == (1, 1)
        assert f"the options say {given}" in result.err
    options(cycle, model="cut", normG="instance", netG="resnet_6blocks", ngf=4, no_dropout=True,
            no_antialias=True, no_antialias_up=True, input_nc=3, output_nc=3)  # fmt: skip
    (cycle / "latest_net_G_A.pth").rename(cycle / "latest_net_G.pth")
    assert succeed("test.py", *words).err == ""
    result = run("test.py", *words, "--norm", "batch")
    assert "was saved with --norm instance, the options say --norm batch" in result.err


def test_a_copied_generator_of_other_channels(tmp_path):
    """G_B of a CycleGAN from grey to colour, alone in its folder as G."""
    folder = tmp_path / "ck" / "grey"
    save(folder / "latest_net_G.pth", nc=(3, 1))
    options(folder, model="cycle_gan", netG="resnet_6blocks", ngf=4, norm="instance",
            no_dropout=True, direction="AtoB", input_nc=1, output_nc=3)  # fmt: skip
    picture(tmp_path / "in" / "a.png", 32, 32)
    words = translate_words(folder, tmp_path / "in", tmp_path)
    succeed("test.py", *words, "--only_outputs", "--direction", "BtoA")
    assert Image.open(tmp_path / "results" / "grey" / "test_latest" / "a.png").mode == "L"
