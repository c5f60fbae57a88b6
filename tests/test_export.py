"""Exported files give what PyTorch gives, at every size, and run where there is no PyTorch."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.image_folder import make_dataset
from data.pictures.reading import Picture
from models import load_generator
from models.inference.export import (
    METADATA,
    export,
    export_generator,
    frozen,
    has_free_sizes,
    largest_difference,
    reader,
)
from models.networks import GENERATORS, NORMS, define_G
from tests.helpers import (
    ROOT,
    SHORT,
    TINY,
    files_below,
    picture,
    pixels,
    run,
    run_process,
    succeed,
    unaligned,
)
from util.result_names import output_names

# depth changes nothing about norms: all of these with one ResNet and one U-Net
ALL_NORMS = ("resnet_9blocks", "unet_128")
NETWORKS = [
    (netG, norm)
    for netG in GENERATORS
    for norm in NORMS
    if netG in ALL_NORMS or norm in ("instance", "batch")
]
QUICK = {("resnet_6blocks", "instance"), ("unet_128", "batch")}
needs_free_sizes = pytest.mark.skipif(not has_free_sizes(), reason="needs a newer PyTorch")


def networks_of(quick: set[tuple[str, str]]) -> list:
    return [
        pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow, id="-".join(pair))
        for pair in NETWORKS
    ]


def network(netG: str, norm: str) -> torch.nn.Module:
    """A network whose output is far from grey, and whose batch norms have seen something."""
    torch.manual_seed(0)
    net = define_G(3, 2, 4, netG, norm, use_dropout=True)
    source = torch.Generator().manual_seed(1)
    for name, value in net.state_dict().items():
        if value.dim() == 4:
            torch.nn.init.kaiming_normal_(value, generator=source)
        elif name.endswith("running_mean"):
            value.uniform_(-0.5, 0.5, generator=source)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=source)
    return net


def sizes(netG: str) -> list[tuple[int, int, int]]:
    """Batch, height, width: fitting, not fitting, too small to reflect, and a single row."""
    step = {"unet_128": 128, "unet_256": 256}.get(netG, 4)
    return [(1, 2 * step, step), (2, step + 3, step + 41), (3, 5, 3), (1, 17, 40), (1, 2, 300)]


def check(form: str, netG: str, norm: str, tmp_path: Path, eval: bool = False) -> None:
    net = network(netG, norm)
    path = tmp_path / f"net.{'pt2' if form == 'pt2' else form}"
    export(frozen(net, eval), 3, form, path, {"value_range": "-1 1"})
    exported = reader(form, path)
    # dropout off, batch norms as they were trained or as they train: one image at a time
    original = net.train(not eval)
    for module in original.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    one_by_one = lambda x: torch.cat([original(x[i : i + 1]) for i in range(len(x))])  # noqa: E731
    if norm == "syncbatch" and not eval:
        one_by_one = frozen(net)  # it trains on GPUs only
    differences = largest_difference(one_by_one, exported, 3, sizes(netG))  # type: ignore[arg-type]
    assert max(differences.values()) < 1e-3, differences


@needs_free_sizes
@pytest.mark.parametrize(("netG", "norm"), networks_of(QUICK))
def test_onnx(netG, norm, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    check("onnx", netG, norm, tmp_path)


@pytest.mark.parametrize(("netG", "norm"), networks_of(QUICK | {("unet_256", "instance")}))
def test_torchscript(netG, norm, tmp_path):
    check("torchscript", netG, norm, tmp_path)


@needs_free_sizes
@pytest.mark.parametrize(("netG", "norm"), networks_of(QUICK))
def test_pt2(netG, norm, tmp_path):
    check("pt2", netG, norm, tmp_path)


@pytest.mark.parametrize("form", ["torchscript", pytest.param("pt2", marks=needs_free_sizes)])
def test_stored_statistics(form, tmp_path):
    check(form, "unet_128", "batch", tmp_path, eval=True)


@pytest.mark.slow
@needs_free_sizes
def test_stored_statistics_in_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    check("onnx", "unet_128", "batch", tmp_path, eval=True)


def test_batch_norms_keep_their_epsilon():
    norm, x = torch.nn.BatchNorm2d(3, eps=0.1), torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(frozen(torch.nn.Sequential(norm))(x), norm(x))


# ----------------------------------------------------------------------------------- the programs
@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of checkpoints of a CycleGAN of one epoch."""
    root = tmp_path_factory.mktemp("trained")
    data = unaligned(root / "data")
    where = ["--dataroot", data, "--checkpoints_dir", root, "--name", "x"]
    succeed("train.py", *where, "--model", "cycle_gan", *TINY, *SHORT)
    return root


@pytest.mark.parametrize(
    ("form", "ending"), [("torchscript", "pt"), pytest.param("pt2", "pt2", marks=needs_free_sizes)]
)
def test_metadata_in_the_file(trained, form, ending):
    words = ["--checkpoints_dir", trained, "--name", "x", "--format", form]
    said = succeed("scripts/export.py", *words, "--direction", "BtoA").out
    assert "largest difference from PyTorch" in said
    path = trained / "x" / f"latest_BtoA.{ending}"
    found = {METADATA: ""}
    if form == "torchscript":
        torch.jit.load(str(path), _extra_files=found)
    else:
        torch.export.load(path, extra_files=found)
    facts = json.loads(found[METADATA])
    assert facts["direction"] == "BtoA"
    assert facts["weights"] == "latest_net_G_B.pth"
    assert facts["value_range"] == "-1 1"
    assert (facts["netG"], facts["ngf"]) == ("resnet_6blocks", "4")


@needs_free_sizes
def test_onnx_without_torch(trained, tmp_path):
    """The folder program in a process in which torch can't be imported, from another folder."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    succeed("scripts/export.py", "--checkpoints_dir", trained, "--name", "x", "--epoch", 1)
    model = shutil.copy(trained / "x" / "1_AtoB.onnx", tmp_path)
    program = shutil.copy(ROOT / "scripts" / "run_onnx.py", tmp_path)
    folder = tmp_path / "in"
    picture(folder / "a.png", 40, 52)
    picture(folder / "sub" / "b.JPG", 37, 41, 1)
    picture(folder / "sub" / "b.png", 9, 5, 2)
    picture(folder / "grey.png", 33, 70, 3, mode="L")
    with Image.open(picture(folder / "turned.jpg", 30, 20)) as camera:
        exif = camera.getexif()
        exif[0x0112] = 6
        camera.save(folder / "turned.jpg", exif=exif)
    rgb = pixels(30, 22, 4)
    Image.fromarray(np.dstack([rgb, rgb[..., 1]])).save(folder / "clear.png")
    grey = rgb[..., :1].astype(np.float32) / 255
    Image.fromarray(grey[..., 0]).save(folder / "floats.tiff")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(rgb[..., 0].astype(np.float32)).save(folder / "wide.tiff")  # of no known range
    (folder / "bad.png").write_bytes(b"no image")
    block = (
        "import sys, runpy\n"
        "for name in ('torch', 'torchvision', 'models', 'util'): sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", block, str(program), str(model), "in", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr  # two images could not be read
    assert "translated 8 of 10" in done.stdout
    assert "direction: AtoB" in done.stdout
    assert done.stderr.count("failed: ") == 2
    assert "wide.tiff: floats must be in [0, 1]" in done.stderr
    assert "bad.png" in done.stderr
    G = load_generator(trained / "x", "AtoB", epoch=1, device="cpu")
    for source, name in (
        ("a.png", "a.png"),
        ("grey.png", "grey.png"),
        ("sub/b.JPG", "sub/b.JPG.png"),
        ("sub/b.png", "sub/b.png.png"),
    ):
        with Image.open(folder / source) as given, Image.open(tmp_path / "out" / name) as got:
            wanted = np.asarray(G(given.convert("RGB")), int)
            assert np.abs(np.asarray(got, int) - wanted).max() <= 1
    for name, given in (("clear", rgb), ("floats", grey), ("deep", rgb[..., 0])):
        with Image.open(tmp_path / "out" / f"{name}.png") as got:
            wanted = G(given)
            if given is grey:  # comes back as floats
                wanted = wanted * 255
            assert np.abs(np.asarray(got.convert("RGB"), int) - wanted).max() <= 1
            if name == "clear":
                assert np.array_equal(np.asarray(got.getchannel("A")), rgb[..., 1])
    with Image.open(tmp_path / "out" / "turned.png") as got:
        wanted = np.asarray(G(folder / "turned.jpg"), int)
        assert wanted.shape == (30, 20, 3)
        assert np.abs(np.asarray(got, int) - wanted).max() <= 1


@needs_free_sizes
def test_onnx_metadata(trained):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = trained / "elsewhere.onnx"
    words = ["--checkpoints_dir", trained, "--name", "x", "--output", path]
    succeed("scripts/export.py", *words)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[0].shape == ["batch", 3, "height", "width"]
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["weights_sha256"]
    assert {"name", "direction", "epoch", "value_range", "netG", "norm"} <= facts.keys()


def test_torchscript_is_written_without_a_word_on_stderr(trained):
    words = ["--checkpoints_dir", trained, "--name", "x", "--format", "torchscript"]
    done = run_process("scripts/export.py", *words)
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    ("model", "channels", "said"),
    [
        ("colorization", (1, 2), "CIE Lab: from L / 50 - 1 to a / 110 and b / 110"),
        ("pix2pix", (1, 3), "from grey to channels RGB"),
        ("pix2pix", (5, 5), "5 channels as trained"),
    ],
)
def test_metadata_names_the_channels(model, channels, said, tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    net = define_G(*channels, 2, "unet_128", "batch")
    torch.save(net.state_dict(), folder / "latest_net_G.pth")
    (folder / "train_opt.txt").write_text(f"model: {model}\nnorm: batch\n")
    words = ["--checkpoints_dir", tmp_path, "--name", "x", "--format", "torchscript"]
    succeed("scripts/export.py", *words)
    extra = {"metadata.json": ""}
    torch.jit.load(str(folder / "latest_AtoB.pt"), _extra_files=extra)
    assert json.loads(extra["metadata.json"])["layout"] == f"NCHW float32, {said}"


@pytest.mark.parametrize(
    ("eval", "said"), [(True, "stored statistics"), (False, "statistics of each image")]
)
def test_metadata_tell_what_batch_norms_use(eval, said, tmp_path):
    torch.save(network("resnet_6blocks", "batch").state_dict(), tmp_path / "latest_net_G.pth")
    path = export_generator(tmp_path, "torchscript", eval=eval).path
    found = {METADATA: ""}
    torch.jit.load(str(path), _extra_files=found)
    assert json.loads(found[METADATA])["batch_norm"] == said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name", "x", "--output", f"{__file__}/f.pt"], "can't write to"),
        (["--name", "y"], "y"),
        (["--name", "x", "--epoch", "77"], "77_net_G_A.pth"),
        (["--name", "x", "--output", "f.onnx"], "must end in .pt for torchscript"),
    ],
)
def test_mistakes_are_one_line(trained, words, said):
    words = ["--checkpoints_dir", trained, "--format", "torchscript", *words]
    result = run("scripts/export.py", *words)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert said in result.err


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_pytorch_that_is_too_old_is_named(trained, form, monkeypatch):
    monkeypatch.delattr(torch.export.Dim, "DYNAMIC", raising=False)
    words = ["--checkpoints_dir", trained, "--name", "x", "--format", form]
    result = run("scripts/export.py", *words)
    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    assert f"--format {form} needs a newer PyTorch than {torch.__version__}" in result.err


def test_a_file_that_differs_is_not_kept(trained, tmp_path, monkeypatch):
    import models.inference.export

    monkeypatch.setattr(models.inference.export, "largest_difference", lambda *_: {"1x8x8": 0.5})
    path = tmp_path / "f.pt"
    words = ["--checkpoints_dir", trained, "--name", "x", "--format", "torchscript"]
    result = run("scripts/export.py", *words, "--output", path)
    assert result.code == 1
    assert "differs from PyTorch by 0.5" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["torchscript", pytest.param("pt2", marks=needs_free_sizes)])
def test_a_full_disk_is_one_line(trained, form, tmp_path, monkeypatch):
    """PyTorch itself aborts the process where it can't write."""

    def write_bytes(self: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    words = ["--checkpoints_dir", trained, "--name", "x", "--format", form]
    ending = {"torchscript": "pt", "pt2": "pt2"}[form]
    path = tmp_path / f"f.{ending}"
    result = run("scripts/export.py", *words, "--output", path)
    said = f"error: can't write {path}: No space left on device\n"
    assert (result.code, result.err) == (1, said)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------ the program of a folder
@pytest.fixture(scope="module")
def negative(tmp_path_factory) -> Path:
    """A tiny ONNX file that takes images, written by hand."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    shape = ["batch", 3, "height", "width"]
    ends = [helper.make_tensor_value_info(name, kind, shape) for name in ("picture", "translated")]
    node = helper.make_node("Neg", ["picture"], ["translated"])
    graph = helper.make_graph([node], "negative", ends[:1], ends[1:])
    path = tmp_path_factory.mktemp("onnx") / "negative.onnx"
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))
    return path


def test_the_folder_to_read_is_never_written_to(negative, tmp_path):
    folder = tmp_path / "in"
    before = picture(folder / "a.png").read_bytes()
    for same in (folder, folder / ".." / "in"):
        result = run("scripts/run_onnx.py", negative, folder, same)
        assert result.code == 1
        assert (result.err.count("\n"), "is the folder to read" in result.err) == (1, True)
    assert (folder / "a.png").read_bytes() == before
    # a folder inside it is not read in its turn
    for _ in range(2):
        result = succeed("scripts/run_onnx.py", negative, folder, folder / "out")
        assert "translated 1 of 1 images" in result.out
    # nor is one of an earlier run
    (folder / "b.gif").touch()
    result = succeed("scripts/run_onnx.py", negative, folder, tmp_path / "other")
    assert "translated 1 of 1 images" in result.out
    assert "left out: 1 files" in result.out
    assert files_below(folder) == ["a.png", "b.gif", "out/a.png"]


def test_an_image_to_read_is_never_replaced(negative, tmp_path, monkeypatch):
    one = picture(tmp_path / "photos" / "x.png").read_bytes()
    picture(tmp_path / "photos" / "photos" / "x.png", 8, 8)
    monkeypatch.chdir(tmp_path)
    result = run("scripts/run_onnx.py", negative, "photos", ".")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "would replace the image photos/x.png" in result.err
    assert (tmp_path / "photos" / "x.png").read_bytes() == one
    assert files_below(tmp_path) == ["photos/photos/x.png", "photos/x.png"]


def test_names_of_any_length(negative, tmp_path):
    name = "x" * 251 + ".png"
    picture(tmp_path / "in" / name)
    succeed("scripts/run_onnx.py", negative, tmp_path / "in", tmp_path / "out")
    assert files_below(tmp_path / "out") == [name]


def test_one_picture(negative, tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.full((5, 7, 3), 200, np.uint8)).save(path)
    result = succeed("scripts/run_onnx.py", negative, path, tmp_path / "out")
    assert f"translated 1 of 1 images to {tmp_path / 'out'}" in result.out
    assert files_below(tmp_path) == ["a.jpg", "out/a.png"]
    with Image.open(tmp_path / "out" / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.full((5, 7, 3), 55, np.uint8))
    result = run("scripts/run_onnx.py", negative, path, tmp_path)
    assert (result.code, "is the folder to read" in result.err) == (1, True)
    result = run("scripts/run_onnx.py", negative, tmp_path / "no.png", tmp_path / "out")
    told = (
        f"error: no folder or image {tmp_path / 'no.png'}: give an image, or a folder of images\n"
    )
    assert (result.code, result.err) == (1, told)


@needs_free_sizes
def test_values_of_the_training_are_in_the_file(tmp_path):
    """The file and the network agree on 12-bit images after a training with their range."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "x"
    folder.mkdir()
    net = define_G(1, 1, 4, "resnet_6blocks", "instance")
    torch.save(net.state_dict(), folder / "latest_net_G.pth")
    said = "netG: resnet_6blocks\nngf: 4\nnorm: instance\ninput_nc: 1\noutput_nc: 1\n"
    (folder / "train_opt.txt").write_text(said + "direction: AtoB\nvalue_range: [0.0, 4095.0]\n")
    levels = np.random.default_rng(0).integers(0, 4096, (20, 24)).astype(np.uint16)
    (tmp_path / "in").mkdir()
    Image.fromarray(levels).save(tmp_path / "in" / "a.png")
    written = export_generator(folder, "onnx").path
    succeed("scripts/run_onnx.py", written, tmp_path / "in", tmp_path / "out")
    G = load_generator(folder, device="cpu")
    assert G.value_range == (0.0, 4095.0)
    wanted = G.run(G.normalize(Picture(levels[..., None]))[None])[0, 0].numpy()
    with Image.open(tmp_path / "out" / "a.png") as image:
        np.testing.assert_allclose(np.asarray(image), (wanted + 1) * 127.5, atol=0.6)


def test_pgm_of_16_bits_is_read_by_value(negative, tmp_path):
    levels = np.array([[0, 300, 16_384, 40_000, 65_535]], np.uint16)
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 5 1 65535\n" + levels.astype(">u2").tobytes())
    succeed("scripts/run_onnx.py", negative, path, tmp_path / "out")
    wanted = (255 - levels / 257).round()
    with Image.open(tmp_path / "out" / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.repeat(wanted[..., None], 3, 2))


@pytest.mark.parametrize("kind", ["signed", "white", "planes", "wide"])
def test_tiff_that_pillow_misreads_is_refused(negative, tmp_path, kind):
    tifffile = pytest.importorskip("tifffile")
    dtype = {"signed": np.int16, "wide": np.uint32}.get(kind, np.uint16)
    shape = (3, 8, 9) if kind == "planes" else (8, 9)
    how = {
        "white": {"photometric": "miniswhite"},
        "planes": {"photometric": "rgb", "planarconfig": "separate"},
    }.get(kind, {})
    tifffile.imwrite(tmp_path / "a.tif", np.full(shape, 900, dtype), **how)
    result = run("scripts/run_onnx.py", negative, tmp_path / "a.tif", tmp_path / "out")
    assert (result.code, "convert it to unsigned 16 bits" in result.err) == (1, True)


def test_a_file_name_in_place_of_the_folder_to_write(negative, tmp_path):
    path = picture(tmp_path / "a.png")
    result = run("scripts/run_onnx.py", negative, path, tmp_path / "b.png")
    said = f"error: {tmp_path}/b.png is named like an image: give the folder to write to\n"
    assert (result.code, result.err) == (1, said)
    assert not (tmp_path / "b.png").exists()


def test_outputs_are_named_and_found_as_by_test_py(negative, tmp_path):
    root = tmp_path / "in"
    for name in ("a.jpg", "a.png", "b.png", "elsewhere/c.png"):
        picture(root / name)
    moved = (root / "elsewhere").rename(tmp_path / "elsewhere")
    (root / "link").symlink_to(moved)
    (moved / "back").symlink_to(root)
    succeed("scripts/run_onnx.py", negative, root, tmp_path / "out")
    relative = [os.path.relpath(path, root) for path in make_dataset(root)]
    assert len(relative) == 4
    names = [f"{name}.png" for name in output_names(relative)]
    assert files_below(tmp_path / "out") == sorted(names)


def test_a_folder_that_cannot_be_read_is_named(negative, tmp_path, monkeypatch):
    picture(tmp_path / "in" / "closed" / "a.png")
    ordinary = os.scandir

    def denied(folder):  # not by permissions, which do not bind root
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return ordinary(folder)

    monkeypatch.setattr(os, "scandir", denied)
    result = run("scripts/run_onnx.py", negative, tmp_path / "in", tmp_path / "out")
    closed = tmp_path / "in" / "closed"
    assert (result.code, result.err) == (
        1,
        f"error: can't read the folder {closed}: Permission denied\n",
    )


def test_pictures_are_written_whole_or_not_at_all(negative, tmp_path, monkeypatch):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "folder.png").mkdir()  # is no image in spite of its name
    succeed("scripts/run_onnx.py", negative, tmp_path / "in", tmp_path / "out")
    whole = (tmp_path / "out" / "a.png").read_bytes()
    ordinary = Image.Image.save

    def full_disk(self, file, *args, **kwargs):
        ordinary(self, file, *args, **kwargs)
        Path(file).write_bytes(Path(file).read_bytes()[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    result = run("scripts/run_onnx.py", negative, tmp_path / "in", tmp_path / "out")
    assert (result.code, "No space left" in result.err) == (1, True)
    assert files_below(tmp_path / "out") == ["a.png"]
    assert (tmp_path / "out" / "a.png").read_bytes() == whole


@pytest.mark.parametrize(
    "program", ["scripts/export.py", "scripts/run_onnx.py", "scripts/demo.py", "util.plot_losses"]
)
def test_a_mistake_on_the_command_line_is_one_line(program):
    module = ["-m"] if program.startswith("util.") else []
    result = run_process(*module, program, "--bogus")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result.err
    assert "error: " in result.err
