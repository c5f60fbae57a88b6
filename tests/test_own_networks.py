"""Networks of one's own, in test.py, as a function, exported and on the page of the demo."""

from __future__ import annotations

import io
import json
import random
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
from data.pictures.writing import write_picture
from models import Translator, load_generator, networks
from models.inference.export import (
    export,
    export_generator,
    frozen,
    has_free_sizes,
    largest_difference,
    reader,
)
from models.inference.sizes import size_rule
from models.inference.tiles import TileOptions
from models.padding import apply_padded
from models.pix2pix_model import Pix2PixModel
from options.train_options import TrainOptions
from tests.helpers import SHORT, TINY, aligned, picture, pixels, run, succeed, truncated
from tests.plain_models import batch
from util.errors import UserError

CPU = torch.device("cpu")


class Octo(nn.Module):
    """Halves three times and doubles three times: sizes must be multiples of 8."""

    def __init__(self, input_nc, output_nc, ngf, norm_layer=None, use_dropout=False):
        super().__init__()
        widths = [input_nc, ngf, ngf, ngf]
        down = [nn.Conv2d(a, ngf, 3, 2, 1) for a in widths[:3]]
        up = [nn.ConvTranspose2d(ngf, b, 4, 2, 1) for b in (ngf, ngf, output_nc)]
        middle = [nn.ReflectionPad2d(1), nn.Conv2d(ngf, ngf, 3)]
        self.model = nn.Sequential(*down, *middle, *up, nn.Tanh())

    def forward(self, x):
        return self.model(x)


class Twice(nn.Module):
    """Enlarges images, so it keeps no size."""

    def forward(self, x):
        return nn.functional.interpolate(x, scale_factor=2)


@pytest.fixture(scope="module")
def octo(tmp_path_factory) -> Iterator[Path]:
    """A folder of experiments with x, whose generator was added as docs/own_models.md says."""
    folder = tmp_path_factory.mktemp("octo")
    where = ["--dataroot", aligned(folder / "data"), "--checkpoints_dir", folder / "c"]
    words = ["--name", "x", "--model", "pix2pix", *TINY, *SHORT, "--netG", "octo"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.GENERATORS, "octo", Octo)
        succeed("train.py", *where, *words)
        yield folder / "c"


@pytest.mark.parametrize(
    ("net", "rule"),
    [
        (Octo(3, 3, 4), (8, 16)),  # at half of 16 the padding can still reflect
        (nn.Conv2d(3, 3, 3, padding=1), (1, 1)),
        (nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, 3, 7)), (1, 4)),
        (nn.Sequential(nn.PixelUnshuffle(32), nn.PixelShuffle(32)), (32, 32)),
        (Twice(), "Twice gives images of other sizes than it takes"),
        (networks.define_G(3, 3, 4, "unet_128"), (128, 128)),  # knows it by itself
    ],
)
def test_sizes_are_found_by_trying(net, rule):
    net.train()
    before = torch.get_rng_state()
    assert size_rule(net, 3, CPU) == rule
    assert all(module.training for module in net.modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_are_given_back(octo, tmp_path):
    sizes = {"a": (41, 33), "b": (40, 2), "c": (7, 90), "d": (64, 64)}
    for name, size in sizes.items():
        picture(tmp_path / "in" / f"{name}.png", *size)
    truncated(tmp_path / "in" / "e.png")
    where = ["--checkpoints_dir", octo, "--name", "x", "--results_dir", tmp_path / "r"]
    words = ["--gpu_ids", -1, "--dataroot", tmp_path / "in", "--num_threads", 0]
    result = run("test.py", *where, *words, "--only_outputs")
    assert result.code == 1
    assert "1 of 5 images failed" in result.err
    folder = tmp_path / "r" / "x" / "test_latest"
    assert {p.stem: Image.open(p).size for p in folder.glob("*.png")} == sizes

    (tmp_path / "in" / "e.png").unlink()
    succeed("test.py", *where, *words, "--keep_size")
    shown = {name: Image.open(folder / "images" / f"{name}_fake.png").size for name in sizes}
    assert shown == sizes


def test_what_a_network_enlarges_comes_out_whole(octo, tmp_path, monkeypatch):
    class Large(Octo):
        def forward(self, x):
            return Twice()(super().forward(x))

    x = torch.rand(1, 3, 24, 16) * 2 - 1
    wanted = Twice()(load_generator(octo / "x", device="cpu")(x))
    monkeypatch.setitem(networks.GENERATORS, "octo", Large)
    torch.testing.assert_close(load_generator(octo / "x", device="cpu")(x), wanted)
    picture(tmp_path / "in" / "a.png", 24, 16)
    where = ["--checkpoints_dir", octo, "--name", "x", "--results_dir", tmp_path / "r"]
    words = ["--gpu_ids", -1, "--dataroot", tmp_path / "in", "--num_threads", 0]
    for more, name in ((["--only_outputs"], "a.png"), (["--keep_size"], "images/a_fake.png")):
        succeed("test.py", *where, *words, *more)
        assert Image.open(tmp_path / "r" / "x" / "test_latest" / name).size == (48, 32)


class TakesTwo(nn.Module):
    def forward(self, x, style):
        return x * style


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3 * 40 * 24, 3 * 40 * 24)

    def forward(self, x):
        return self.line(x.flatten(1)).view_as(x)


@pytest.mark.parametrize(
    ("net", "said"),
    [(TakesTwo(), "missing 1 required positional argument: 'style'"), (Fixed(), "mat1 and mat2")],
)
def test_a_network_that_takes_no_pictures_is_told_by_its_own_error(net, said, tmp_path, capsys):
    options = {"input_nc": 3, "output_nc": 3, "direction": "AtoB"}
    G = Translator(net, CPU, options, tmp_path)
    tried = rf"{type(net).__name__} takes no size that was tried, 256x768: .*{said}"
    assert re.search(tried, capsys.readouterr().err)
    with pytest.raises(UserError, match=rf"fails on images of 1x3x21x33: .*{said}"):
        G(pixels(33, 21))
    with pytest.raises(UserError, match=rf"no tiles: {tried}"):
        G(pixels(33, 21), tile=16)
    with pytest.raises(UserError, match=rf"no export: {tried}"):
        export(net, 3, "torchscript", tmp_path / "x.pt", {})
    if isinstance(net, Fixed):
        assert G(pixels(24, 40)).shape == (40, 24, 3)


def test_padding_is_cropped_from_what_is_enlarged():
    x = torch.arange(35.0).view(1, 1, 5, 7)
    torch.testing.assert_close(apply_padded(Twice(), x, 4, 8), Twice()(x))


@pytest.mark.parametrize("sampling", ["antialias", "antialias_up"])
def test_networks_that_are_not_anti_aliased(sampling, octo):
    with pytest.raises(UserError, match="--antialias: --netG octo does not take it"):
        networks.define_G(3, 3, 4, "octo", **{sampling: True})


def test_quick_tiles_equal_the_whole(octo):
    G = load_generator(octo / "x")
    x = np.random.default_rng(1).random((301, 420, 3), np.float32)
    # an output depends on fewer than 48 pixels on each side; the fade takes 64 more
    tiled = G(x, tile=TileOptions(256, 160, "quick"))
    assert np.abs(tiled - G(x)).max() < 1e-5


def test_tiles_give_sizes_back(octo, tmp_path):
    path = picture(tmp_path / "in" / "a.png", 141, 75)
    picture(tmp_path / "in" / "b.png", 100, 90)
    where = ["--checkpoints_dir", octo, "--name", "x", "--results_dir", tmp_path / "r"]
    words = ["--gpu_ids", -1, "--dataroot", tmp_path / "in", "--num_threads", 0, "--tile", 64]
    folder = tmp_path / "r" / "x" / "test_latest"
    for name, more in (("a", ["--only_outputs"]), ("images/a_fake", [])):
        done = succeed("test.py", *where, *words, "--model", "test", *more)
        # said once, not for each of the two images
        assert done.err.count("quick tiles instead of exact ones: Octo") == 1
        assert Image.open(folder / f"{name}.png").size == Image.open(path).size


def test_one_picture_that_the_network_refuses_is_its_own_matter(octo, tmp_path, monkeypatch):
    class Picky(Octo):
        def forward(self, x):
            if x.shape[-1] > 100:
                raise RuntimeError("too wide for me")
            return super().forward(x)

    monkeypatch.setitem(networks.GENERATORS, "octo", Picky)
    picture(tmp_path / "in" / "a.png", 120, 24)
    picture(tmp_path / "in" / "b.png", 24, 24)
    where = ["--checkpoints_dir", octo, "--name", "x", "--results_dir", tmp_path / "r"]
    words = ["--gpu_ids", -1, "--dataroot", tmp_path / "in", "--num_threads", 0]
    result = run("test.py", *where, *words, "--only_outputs")
    assert result.code == 1
    assert f"{tmp_path / 'in' / 'a.png'}: too wide for me" in result.err
    assert (tmp_path / "r" / "x" / "test_latest" / "b.png").exists()


def test_a_network_that_was_removed_is_named(octo, tmp_path, monkeypatch):
    monkeypatch.delitem(networks.GENERATORS, "octo")
    where = ["--checkpoints_dir", octo, "--name", "x", "--results_dir", tmp_path / "r"]
    picture(tmp_path / "in" / "a.png", 32, 32)
    result = run("test.py", *where, "--dataroot", tmp_path / "in", "--gpu_ids", -1)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "do not fit" in result.err
    assert ": it was trained with --netG octo" in result.err
    with pytest.raises(UserError, match="octo"):
        load_generator(octo / "x", device="cpu")


def test_as_a_function(octo):
    G = load_generator(octo / "x", device="cpu")
    assert isinstance(G.net, Octo)
    state = torch.load(octo / "x" / "latest_net_G.pth", weights_only=True)
    net = Octo(3, 3, 4)
    net.load_state_dict(state)
    x = torch.rand(2, 3, 40, 24) * 2 - 1
    torch.testing.assert_close(G(x), net(x))
    assert G(pixels(33, 21)).shape == (21, 33, 3)
    assert repr(G) == f"Translator({G.weights}: octo, AtoB, 3 to 3 channels on cpu)"


class OwnGenerator(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 1))

    def forward(self, x):
        return self.layers(x).tanh()


class Residual(networks.ResnetGenerator):
    """Weights of the same names and shapes as without the sum."""

    def forward(self, x):
        return x + 0.1 * super().forward(x)


def without_dropout(opt: Any) -> nn.Module:
    """Whatever the options say: no weight of a U-Net tells."""
    return networks.define_G(3, 3, opt.ngf, opt.netG, opt.norm, False)


def with_sigmoid(opt: Any) -> nn.Module:
    net = without_dropout(opt)
    assert isinstance(net, networks.ResnetGenerator)
    net.model[-1] = nn.Sigmoid()
    return net


def with_options(opt: Any) -> nn.Module:
    assert (opt.own_depth, opt.own_teacher, opt.own_layers) == (None, None, "1,5")
    return OwnGenerator(opt.own_width)


MAKERS: dict[str, Callable[[Any], nn.Module]] = {
    "residual": lambda opt: Residual(3, 3, opt.ngf, networks.get_norm_layer(opt.norm), False, 6),
    "sigmoid": with_sigmoid,
    "pix2pix": with_sigmoid,  # changed in its own file
    "undropped": without_dropout,
    "own": with_options,
}


class OwnModel(Pix2PixModel):
    """As people wrote them: its generator has nothing to do with --netG."""

    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        parser = Pix2PixModel.modify_commandline_options(parser, is_train)
        parser.add_argument("--own_width", type=int, required=True)
        parser.add_argument("--own_depth", type=int)
        parser.add_argument("--own_teacher")
        parser.add_argument("--own_layers", default="0,4")
        return parser

    def __init__(self, opt):
        super().__init__(opt)
        self.netG = MAKERS[opt.model](opt)
        if self.isTrain:
            self.optimizer_G = torch.optim.Adam(self.netG.parameters(), lr=opt.lr)
            self.optimizers[0] = self.optimizer_G


@pytest.fixture
def own_models(monkeypatch) -> None:
    """Make `--model` find those of `MAKERS`."""
    find = models.find_model_using_name
    monkeypatch.setattr(
        models, "find_model_using_name", lambda name: OwnModel if name in MAKERS else find(name)
    )


def trained_model(folder: Path, name: str, *more: str) -> Any:
    """A model after an iteration, saved as experiment x with its options."""
    where = ["--dataroot", str(folder), "--checkpoints_dir", str(folder), "--name", "x"]
    own = ["--own_width", "5", "--own_layers", "1,5"] if name in MAKERS else []
    options = TrainOptions([*where, "--model", name, *TINY, *SHORT, *own, *more])
    opt = options.parse(save=False)
    options.save(opt)
    model = models.create_model(opt)
    model.setup(opt)
    model.set_input(batch(0))
    model.optimize_parameters()
    model.save_networks("latest")
    return model


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own", ""),
        ("residual", "--norm instance"),
        ("sigmoid", "--norm instance"),
        ("pix2pix", "--norm instance"),
        ("undropped", "--netG unet_128"),
        ("template", "--netG unet_128 --norm batch"),  # has no dropout, whatever the options say
    ],
)
@pytest.mark.usefixtures("own_models")
def test_the_model_knows_its_generator(name, words, tmp_path, capsys):
    """Also where the stock generator has weights of the same names and shapes."""
    model = trained_model(tmp_path, name, *words.split())
    capsys.readouterr()
    G = load_generator(tmp_path / "x", device="cpu", precision="fp32")
    x = torch.rand(1, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(G(x), model.netG(x), rtol=0, atol=1e-6)
    assert capsys.readouterr() == ("", "")
    path = picture(tmp_path / "in" / "a.png", 128, 128)
    where = ["--checkpoints_dir", tmp_path, "--name", "x", "--results_dir", tmp_path / "r"]
    words = ["--dataroot", path.parent, "--model", "test", "--only_outputs", "--precision", "fp32"]
    result = succeed("test.py", *where, *words, "--gpu_ids", -1, "--num_threads", 0)
    assert result.err == ""
    wanted = np.asarray(G(Image.open(path)))
    found = np.asarray(Image.open(tmp_path / "r" / "x" / "test_latest" / "a.png"))
    assert np.abs(found.astype(int) - wanted).max() <= 1


@pytest.mark.usefixtures("own_models")
def test_a_guess_is_told(tmp_path, monkeypatch, capsys):
    """Where the model fails, builds another network, or is gone."""
    trained_model(tmp_path, "residual", "--norm", "instance")
    changes: dict[str, Callable[[Any], Any]] = {
        "'Namespace' object has no attribute 'x'": lambda opt: opt.x,
        "3": lambda opt: sys.exit(3),
        "netG has 4 weights, from which the file differs: 4 missing": lambda opt: OwnGenerator(5),
    }
    for reason, maker in changes.items():
        monkeypatch.setitem(MAKERS, "residual", maker)
        told(tmp_path / "x", reason, capsys)
    monkeypatch.delitem(MAKERS, "residual")
    told(tmp_path / "x", "unknown model 'residual'", capsys)


@pytest.mark.usefixtures("own_models")
def test_a_guess_goes_by_the_weights_where_a_model_left_the_options(tmp_path, monkeypatch, capsys):
    make = lambda opt: networks.define_G(3, 3, 4, "resnet_6blocks", "batch")  # noqa: E731
    monkeypatch.setitem(MAKERS, "residual", make)
    model = trained_model(tmp_path, "residual", "--norm", "instance")
    monkeypatch.delitem(MAKERS, "residual")
    told(tmp_path / "x", "unknown model 'residual'", capsys)
    G = load_generator(tmp_path / "x", device="cpu", precision="fp32")
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(G(x), model.netG(x), rtol=0, atol=1e-6)


def told(folder: Path, reason: str, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    G = load_generator(folder, device="cpu")
    assert type(G.net) is networks.ResnetGenerator
    said = capsys.readouterr().err
    guess = f"{folder / 'latest_net_G.pth'}: its network is a guess from options and weights"
    assert said.startswith(f"warning: {guess}, as --model residual fails: {reason}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "name", "channels"),
    [("pix2pix", "G", (3, 1)), ("cut", "G", (3, 1)), ("cycle_gan", "G_B", (1, 3))],
)
def test_options_of_the_original_code(kind, name, channels, tmp_path, capsys):
    """They lack what this code has added, and are enough."""
    said = "netG resnet_6blocks ngf 4 norm instance normG instance no_dropout True input_nc 3 "
    said += f"output_nc 1 model {kind} init_type normal init_gain 0.02 preprocess none"
    words = said.split()
    lines = (f"{option}: {value}\n" for option, value in zip(words[::2], words[1::2], strict=True))
    (tmp_path / "train_opt.txt").write_text("".join(lines))
    on = kind == "cut"
    net = networks.define_G(
        *channels, ngf=4, netG="resnet_6blocks", norm="instance", antialias=on, antialias_up=on
    )
    torch.save(net.state_dict(), tmp_path / f"latest_net_{name}.pth")
    G = load_generator(tmp_path, "BtoA" if name == "G_B" else None, device="cpu", precision="fp32")
    assert (G.input_nc, G.output_nc) == channels
    x = torch.rand(1, channels[0], 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(G(x), net(x), rtol=0, atol=1e-6)
    assert capsys.readouterr() == ("", "")


def test_exported(octo, tmp_path):
    form = "torchscript"
    net = frozen(load_generator(octo / "x", device="cpu").net)
    path = tmp_path / "net"
    export(net, 3, form, path, {"made": json.dumps("here")})
    fitting = [(1, 64, 64), (2, 16, 40)]
    assert max(largest_difference(net, reader(form, path), 3, fitting).values()) < 1e-5
    assert reader(form, path)(torch.zeros(1, 3, 75, 109)).shape == (1, 3, 75, 109)


def test_export_compares_at_sizes_that_do_not_fit(octo, tmp_path):
    found = export_generator(octo / "x", "torchscript", tmp_path / "net.pt")
    assert found.path.is_file()
    assert len(found.differences) == 3
    assert max(found.differences.values()) < 1e-5


class Norms(nn.Module):
    """Keeps sizes, with a norm of its own."""

    make_norm: Callable[[], nn.Module]

    def __init__(self, input_nc, output_nc, ngf, norm_layer=None, use_dropout=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(input_nc, 4, 3, padding=1), nn.Conv2d(4, output_nc, 1)
        self.norm = type(self).make_norm()

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


class Doubled(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda module, given, result: 2 * result)
    return norm


@pytest.fixture
def with_norm(tmp_path, monkeypatch) -> Callable[[Callable[[], nn.Module]], Path]:
    """Makes the folder of a generator with a norm whose stored statistics are not an image's."""

    def make(norm: Callable[[], nn.Module]) -> Path:
        monkeypatch.setitem(networks.GENERATORS, "norms", Norms)
        monkeypatch.setattr(Norms, "make_norm", staticmethod(norm), raising=False)
        torch.manual_seed(0)
        state = Norms(3, 3, 4).state_dict()
        if "norm.running_mean" in state:
            state["norm.running_mean"] += 0.5
        torch.save(state, tmp_path / "latest_net_G.pth")
        words = "netG: norms\nngf: 4\nnorm: batch\ninput_nc: 3\noutput_nc: 3\n"
        (tmp_path / "train_opt.txt").write_text(words)
        return tmp_path

    return make


def differs(folder: Path, eval: bool) -> float:
    """How far the exported file is from `load_generator`'s results, image by image."""
    path = export_generator(folder, "torchscript", eval=eval).path
    G = load_generator(folder, device="cpu", eval=eval)
    one_by_one = lambda x: torch.cat([G(picture) for picture in x.split(1)])  # noqa: E731
    return max(largest_difference(one_by_one, reader("torchscript", path), 3).values())


@pytest.mark.parametrize("norm", [lambda: Doubled(4), hooked])
def test_batch_norms_of_ones_own_are_never_replaced(with_norm, norm):
    folder = with_norm(norm)
    with pytest.raises(UserError, match=r"the batch norm norm has code of its own .* add --eval"):
        export_generator(folder, "torchscript")
    assert differs(folder, eval=True) < 1e-5


def test_export_compares_with_the_network_itself(with_norm, monkeypatch):
    folder = with_norm(lambda: Doubled(4))
    plain = lambda net, eval=False: nn.Conv2d(3, 3, 3, padding=1)  # noqa: E731
    monkeypatch.setattr("models.inference.export.frozen", plain)
    with pytest.raises(UserError, match="differs from PyTorch"):
        export_generator(folder, "torchscript")


@pytest.mark.parametrize("eval", [False, True])
def test_instance_norms_that_store_statistics(with_norm, eval):
    folder = with_norm(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    assert differs(folder, eval) < 1e-5


def test_batch_norms_without_stored_statistics(with_norm):
    folder = with_norm(lambda: nn.BatchNorm2d(4, track_running_stats=False))
    assert differs(folder, eval=True) < 1e-5
    G = load_generator(folder, device="cpu", eval=True)
    dark, light = np.zeros((8, 8, 3), np.uint8), pixels(8, 8)
    assert np.array_equal(G([dark, light])[1], G(light))


class Branching(Octo):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class OfOneSize(Octo):
    def forward(self, x):
        return super().forward(x + x.new_zeros(tuple(int(n) for n in x.shape)))


@pytest.mark.parametrize(
    ("form", "net"), [("pt2", Branching), ("onnx", Branching), ("torchscript", OfOneSize)]
)
def test_what_an_exporter_can_not_follow_is_one_line(octo, monkeypatch, form, net, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    if form != "torchscript" and not has_free_sizes():
        pytest.skip("needs a newer PyTorch")
    monkeypatch.setitem(networks.GENERATORS, "octo", net)
    words = ["--checkpoints_dir", octo, "--name", "x", "--format", form]
    path = tmp_path / f"a.{'pt' if form == 'torchscript' else form}"
    result = run("scripts/export.py", *words, "--output", path)
    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    assert f"error: {net.__name__} can't be exported as {form}: " in result.err
    assert ("; --format torchscript records" in result.err) == (form != "torchscript")
    assert list(tmp_path.iterdir()) == []


def settings() -> tuple:
    return (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
        random.getstate(),
        str(np.random.get_state()),
        torch.get_rng_state().tolist(),
        list(warnings.filters),
    )


@pytest.mark.parametrize("precision", ["tf32", "fp32", "bf16"])
def test_loading_and_calling_change_nothing_in_the_host(octo, precision):
    before = settings()
    G = load_generator(octo / "x", device="cpu", precision=precision)
    G(pixels(40, 40))
    assert settings() == before


def test_threads_at_once_get_what_one_gets(octo, tmp_path):
    G = load_generator(octo / "x", device="cpu", precision="fp32")
    path = picture(tmp_path / "a.png", 52, 36)
    with Image.open(path) as image:
        image.load()
        alone = np.asarray(G(image))
    shared = Image.open(path)  # which is decoded when somebody asks for its pixels
    results: list[np.ndarray] = []

    def work() -> None:
        for given in (shared, path, pixels(52, 36), shared):
            results.append(np.asarray(G(given)))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 24
    assert all(np.array_equal(result, alone) for result in results)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "give floats in [-1, 1]"),
        (torch.full((3, 8, 8), 200.0), "values up to 200 in magnitude: they must be in [-1, 1]"),
        (torch.full((3, 8, 8), torch.nan), "values up to nan"),
    ],
)
def test_tensors_of_another_range_are_refused(octo, given, said):
    G = load_generator(octo / "x", device="cpu")
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        G(given)


def test_a_torn_picture_is_a_user_error(octo, tmp_path):
    G = load_generator(octo / "x", device="cpu")
    with pytest.raises(UserError, match=r"can't read this image: .*truncated"):
        G(Image.open(truncated(tmp_path / "a.png")))


def test_colour_of_16_bits_from_memory(octo, tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (24, 24, 3)).astype(np.uint16)
    write_picture(tmp_path / "a.png", values)
    G = load_generator(octo / "x", device="cpu")
    wanted = G(tmp_path / "a.png")  # an array: Pillow has no such images
    memory = io.BytesIO((tmp_path / "a.png").read_bytes())
    got = np.asarray(G(Image.open(memory)))
    # Pillow gets 8 bits of it
    assert abs(got.astype(int) - np.round(wanted / 257).astype(int)).max() <= 1
