"""Reading and writing images of each format and depth, and their way through a network."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision import transforms

from data.base_dataset import open_picture
from data.image_folder import list_pictures
from data.pictures.reading import Picture, from_pil, read_picture
from data.pictures.values import denormalize, fit_channels, normalize
from data.pictures.writing import write_bands, write_picture
from models.inference.folder import FolderTranslation, Job
from models.inference.tiles import TileOptions
from models.inference.translator import Translator
from tests.helpers import pixels
from util.errors import UserError
from util.picture_files import open_image
from util.util import tensor2im

RNG = np.random.default_rng(5)


def values(dtype: type, channels: int, height: int = 37, width: int = 29) -> np.ndarray:
    """Pixels with the least and the most of their type among them."""
    if np.dtype(dtype).kind == "f":
        array = RNG.random((height, width, channels)).astype(dtype)
        most = 1.0
    else:
        most = np.iinfo(dtype).max
        array = RNG.integers(0, most, (height, width, channels), dtype, endpoint=True)
    array[0, 0], array[-1, -1] = 0, most
    return array


# ---------------------------------------------------------- PNG, by the letter of its specification
def png(pixels: np.ndarray, filters: list[int]) -> bytes:
    """A PNG file whose rows have these filters in turn."""
    depth, (height, width, channels) = pixels.dtype.itemsize, pixels.shape
    step = depth * channels
    above, data = bytes(width * step), b""
    for y, row in enumerate(pixels):
        line = row.astype(f">u{depth}").tobytes()
        kind = filters[y % len(filters)]
        out = bytearray([kind])
        for i, value in enumerate(line):
            a = line[i - step] if i >= step else 0
            b, c = above[i], above[i - step] if i >= step else 0
            out.append((value - predicted(kind, a, b, c)) % 256)
        above, data = line, data + out

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 8 * depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def predicted(kind: int, a: int, b: int, c: int) -> int:
    """What each filter expects from left, above, and above left."""
    p = a + b - c
    paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
    return (0, a, b, (a + b) // 2, paeth)[kind]


def unpng(data: bytes) -> np.ndarray:
    """The pixels of a PNG file (not interlaced); checks the checksums."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed, head = 8, b"", ()
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        (crc,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert crc == zlib.crc32(name + body)
        at += 12 + length
        if name == b"IHDR":
            head = struct.unpack(">IIBBBBB", body)
        elif name == b"IDAT":
            packed += body
    width, height, bits, colour = head[:4]
    channels, depth = {0: 1, 4: 2, 2: 3, 6: 4}[colour], bits // 8
    step, raw = channels * depth, zlib.decompress(packed)
    row, lines = width * step, []
    above = bytes(row)
    for y in range(height):
        kind, line = raw[y * (row + 1)], bytearray(raw[y * (row + 1) + 1 : (y + 1) * (row + 1)])
        for i in range(row):
            a = line[i - step] if i >= step else 0
            c = above[i - step] if i >= step else 0
            line[i] = (line[i] + predicted(kind, a, above[i], c)) % 256
        above = bytes(line)
        lines.append(above)
    array = np.frombuffer(b"".join(lines), f">u{depth}").reshape(height, width, channels)
    return array.astype(f"u{depth}")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_read_in_full(tmp_path, channels):
    pixels = values(np.uint16, channels)
    (tmp_path / "a.png").write_bytes(png(pixels, [0, 1, 2, 3, 4]))
    picture = read_picture(tmp_path / "a.png")
    assert picture.pixels.dtype == np.uint16
    colours = channels - (channels in (2, 4))
    np.testing.assert_array_equal(picture.pixels, pixels[..., :colours])
    if channels in (2, 4):
        np.testing.assert_array_equal(picture.alpha, pixels[..., -1])
    else:
        assert picture.alpha is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
def test_written_png_is_what_others_read(tmp_path, dtype, channels, alpha):
    pixels = values(dtype, channels)
    extra = values(dtype, 1)[..., 0] if alpha else None
    wanted = pixels if extra is None else np.concatenate([pixels, extra[..., None]], 2)
    write_picture(tmp_path / "a.png", pixels, extra)
    np.testing.assert_array_equal(unpng((tmp_path / "a.png").read_bytes()), wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_pictures_in_bands(tmp_path, monkeypatch):
    # as if it were too large for Pillow, 8 bits too
    monkeypatch.setattr("data.pictures.writing._pillow_can", lambda *_: False)
    for dtype, ending in [(np.uint16, "png"), (np.uint8, "tiff"), (np.float32, "npy")]:
        pixels = values(dtype, 3, 90, 31)
        path = tmp_path / f"a.{ending}"
        bands = (pixels[i : i + 7] for i in range(0, 90, 7))
        write_bands(path, bands, pixels.shape, dtype)
        np.testing.assert_array_equal(read_picture(path).pixels, pixels)
    pixels = values(np.uint8, 3, 90, 31)
    bands = (pixels[i : i + 7] for i in range(0, 90, 7))
    write_bands(tmp_path / "b.bmp", bands, pixels.shape, np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b.bmp")), pixels)


# -------------------------------------------------------------------------- through an identity net
class Same(nn.Module):
    """Gives back what it takes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def identity(channels: int, value_range=None) -> Translator:
    options = {"input_nc": channels, "output_nc": channels}
    return Translator(Same(), torch.device("cpu"), options, Path("none"), value_range)


KINDS = [
    *[("png", d, c, a) for d in (np.uint8, np.uint16) for c in (1, 3) for a in (0, 1)],
    *[("tiff", d, c, a) for d in (np.uint8, np.uint16) for c in (1, 3) for a in (0, 1)],
    *[("tif", np.float32, c, 0) for c in (1, 3)],
    *[("npy", d, c, 0) for d in (np.uint8, np.uint16, np.float32, np.float64) for c in (1, 5)],
    *[("webp", np.uint8, 3, a) for a in (0, 1)],
    *[("bmp", np.uint8, c, 0) for c in (1, 3)],
    *[("jpg", np.uint8, c, 0) for c in (1, 3)],
]


@pytest.mark.parametrize(("ending", "dtype", "channels", "alpha"), KINDS)
def test_round_trip(tmp_path, ending, dtype, channels, alpha):
    path = tmp_path / "in" / f"a.{ending}"
    write_picture(path, values(dtype, channels), values(dtype, 1)[..., 0] if alpha else None)
    given = read_picture(path)
    assert (given.alpha is not None) == bool(alpha)
    work = FolderTranslation(identity(channels), "same", threads=0)
    assert work.run(work.jobs([str(path)], tmp_path / "in", tmp_path / "out")) == []
    got = read_picture(tmp_path / "out" / path.name)
    assert got.pixels.dtype == given.pixels.dtype == dtype
    assert got.pixels.shape == given.pixels.shape
    if ending in ("jpg", "webp"):  # these lose a little each time
        far = np.abs(got.pixels.astype(float) - given.pixels.astype(float)).mean()
        assert far < 20
    elif np.dtype(dtype).kind == "f":
        np.testing.assert_allclose(got.pixels, given.pixels, atol=1e-6)
    else:
        np.testing.assert_array_equal(got.pixels, given.pixels)
    if alpha:
        np.testing.assert_array_equal(got.alpha, given.alpha)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("dpi", [None, 1, 72])
def test_a_tiff_gets_the_resolution_that_it_had(tmp_path, dtype, dpi):
    path, unit = tmp_path / "a.tif", {"dpi": (dpi, dpi)} if dpi else {}
    Image.fromarray(values(dtype, 1)[..., 0]).save(path, **unit)
    picture = read_picture(path)
    write_picture(path, picture.pixels, None, picture.info)
    with Image.open(path) as image:  # tags: XResolution, ResolutionUnit (2: inch)
        inches = image.tag_v2.get(296, 1) == 2  # type: ignore[attr-defined]
        assert (image.tag_v2[282] if inches else None) == dpi  # type: ignore[attr-defined]


RARE_TIFF = {
    "signed integers": (np.int16, {}),
    "signed integers ": (np.int8, {}),
    "integers of 32 bits": (np.uint32, {}),
    "planes of 16 bits": (np.uint16, {"photometric": "rgb", "planarconfig": "separate"}),
    "16 bits in which 0 is white": (np.uint16, {"photometric": "miniswhite"}),
}


@pytest.mark.parametrize("kind", RARE_TIFF)
def test_what_pillow_misreads_is_read_by_value_or_refused(tmp_path, kind):
    tifffile = pytest.importorskip("tifffile")
    dtype, options = RARE_TIFF[kind]
    limits, planes = np.iinfo(dtype), "planarconfig" in options
    pixels = RNG.integers(limits.min, limits.max, (3, 20, 24) if planes else (20, 24), dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(UserError, match=rf"a\.tif: {kind.strip()} need their range"):
        open_image(tmp_path / "a.tif")
    wanted = pixels.transpose(1, 2, 0) if planes else pixels[..., None]
    wanted = limits.max - wanted if "white" in kind else wanted
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").pixels, wanted)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_each_frame_of_a_stack_is_its_own(tmp_path, dtype):
    tifffile = pytest.importorskip("tifffile")
    stack = RNG.integers(0, 30000, (3, 20, 24)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    G = identity(1, (0.0, 30000.0))
    with Image.open(tmp_path / "a.tif") as image:
        for i in (2, 0, 1):
            image.seek(i)
            np.testing.assert_allclose(np.asarray(G(image)), stack[i], atol=0.01)


def test_decoded_tiff_is_read_by_value_or_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    G = identity(1, (-1000.0, 3000.0))
    signed = RNG.integers(-1000, 3000, (20, 24)).astype(np.int16)
    tifffile.imwrite(tmp_path / "a.tif", signed)
    with Image.open(tmp_path / "a.tif") as image:
        np.testing.assert_array_equal(np.asarray(G(image)), signed)  # read at its full depth
        image.load()
        np.testing.assert_array_equal(np.asarray(G(image)), signed)  # as Pillow has decoded it
    np.testing.assert_array_equal(np.asarray(G(Image.fromarray(signed.astype(np.int32)))), signed)
    with pytest.raises(UserError, match="need a range"):
        identity(1)(Image.fromarray(signed.astype(np.int32)))
    for kind in ("16 bits in which 0 is white", "integers of 32 bits"):
        dtype, options = RARE_TIFF[kind]
        tifffile.imwrite(tmp_path / "b.tif", signed.astype(dtype), **options)
        with Image.open(tmp_path / "b.tif") as image:
            image.load()
            with pytest.raises(UserError, match=f"{kind} with wrong values: give the path"):
                G(image)


def write_other(path: Path) -> Path:
    write_picture(path, np.zeros((4, 4, 3), np.uint16))
    return path


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "16-bit TIFF"])
@pytest.mark.parametrize("gone", [True, False])
def test_an_opened_image_whose_file_is_gone(tmp_path, kind, gone):
    """Such as an upload; one from memory has no name either. It is read at its full depth."""
    pixels = values(np.uint8 if kind == "8 bits" else np.uint16, 3)
    path = tmp_path / ("a.tif" if "TIFF" in kind else "a.png")
    write_picture(path, pixels)
    if kind != "8 bits":  # a closed image is opened by its name
        with Image.open(path) as image:
            pass
        np.testing.assert_array_equal(from_pil(image).pixels, pixels)
    image = Image.open(path if gone else io.BytesIO(path.read_bytes()))
    path.unlink()
    if not gone:  # a name that somebody gave it is not opened
        image.filename = str(write_other(tmp_path / "b.png"))
    read = from_pil(image)
    np.testing.assert_array_equal(read.pixels, pixels)
    assert image.convert("RGB").size == (pixels.shape[1], pixels.shape[0])  # still usable


@pytest.mark.parametrize("kind", ["unspecified", "assocalpha", "unassalpha"])
def test_the_last_of_four_samples(tmp_path, kind):
    """Alpha where the file says so, else another channel for a network that takes four."""
    tifffile = pytest.importorskip("tifffile")
    pixels = RNG.integers(0, 65536, (20, 24, 4)).astype(np.uint16)
    pixels[:5, :, 3], pixels[5:10, :, 3] = 65535, 0
    stored = pixels.copy()
    if kind == "assocalpha":
        pixels[5:10, :, :3] = 0  # nothing is left of them
        pixels[10:, :, 3] = stored[10:, :, 3] = 32768
        share = pixels[..., 3:] / 65535
        stored[..., :3] = (pixels[..., :3] * share).round()
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=[kind])
    out = identity(3)(tmp_path / "a.tif")  # three channels and alpha
    np.testing.assert_allclose(out.astype(int), pixels, atol=2 if kind == "assocalpha" else 0)
    picture = read_picture(tmp_path / "a.tif")
    np.testing.assert_array_equal(picture.alpha, pixels[..., 3])
    if kind == "unspecified":
        np.testing.assert_array_equal(identity(4)(tmp_path / "a.tif"), pixels)
    else:
        with pytest.raises(UserError, match="3 channels, the network takes 4"):
            identity(4)(tmp_path / "a.tif")


def test_premultiplied_floats_of_any_range(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pixels = np.full((4, 5, 4), 500.0, np.float32)
    pixels[..., 3] = 0.5
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["assocalpha"])
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").pixels, 1000.0)


def test_premultiplied_colours_are_rounded_back(tmp_path):
    """30001 / 40000 * 65535 is 49152.9; of what is transparent nothing is known."""
    tifffile = pytest.importorskip("tifffile")
    stored = np.array([[[30_001, 1, 40_000, 40_000], [7, 7, 7, 0]]], np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["assocalpha"])
    wanted = [[[49_153, 2, 65_535], [0, 0, 0]]]
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").pixels, wanted)


def test_cmyk_of_16_bits_is_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pixels = RNG.integers(0, 65536, (4, 5, 4)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="separated")
    with pytest.raises(UserError, match=r"a\.tif: CMYK of more than 8 bits"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_fourth_sample_reaches_networks_that_take_four(dtype, tmp_path):
    """In training with a range, and in a folder; for three channels it counts as alpha.

    Of 8 bits, as in aerial images of four bands, it is dropped then, as Pillow does.
    """
    tifffile = pytest.importorskip("tifffile")
    white = int(np.iinfo(dtype).max)
    pixels = RNG.integers(0, white + 1, (20, 24, 4)).astype(dtype)
    (tmp_path / "in").mkdir()
    tifffile.imwrite(
        tmp_path / "in" / "a.tif", pixels, photometric="rgb", extrasamples=["unspecified"]
    )
    for channels in (3, 4):
        opt = SimpleNamespace(value_range=[0, white], input_nc=channels, output_nc=channels)
        x = open_picture(opt, str(tmp_path / "in" / "a.tif"))  # type: ignore[arg-type]
        np.testing.assert_allclose(
            (x.numpy().transpose(1, 2, 0) + 1) * white / 2, pixels[..., :channels], atol=0.01
        )
        work = FolderTranslation(identity(channels), "same", threads=0)
        (job,) = work.jobs([str(tmp_path / "in" / "a.tif")], tmp_path / "in", tmp_path / "out")
        assert work.run([job]) == []
        kept = 3 if channels == 3 and dtype is np.uint8 else 4
        np.testing.assert_array_equal(tifffile.imread(job.target), pixels[..., :kept])


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_round_trip_of_a_range(tmp_path, dtype):
    pixels = RNG.integers(100, 4000, (20, 24, 5)).astype(dtype)
    np.save(tmp_path / "a.npy", pixels)
    G = identity(5, (0.0, 4095.0))
    assert (
        np.abs(
            G.normalize(Picture(pixels)).numpy() - (pixels.transpose(2, 0, 1) / 2047.5 - 1)
        ).max()
        < 1e-6
    )
    out = G(tmp_path / "a.npy")
    assert out.dtype == dtype
    np.testing.assert_allclose(out, pixels, atol=0 if dtype != np.float32 else 1e-3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "F", "CMYK"])
def test_pictures_of_pillow(mode):
    grey = mode in ("1", "L", "LA", "I;16", "F")
    if mode == "I;16":
        image = Image.fromarray(values(np.uint16, 1)[..., 0])
    elif mode == "F":
        image = Image.fromarray(values(np.float32, 1)[..., 0])
    elif mode in ("LA", "RGBA"):
        image = Image.fromarray(values(np.uint8, 4)).convert(mode)
    else:
        image = Image.fromarray(values(np.uint8, 3)).convert(mode)
    out = identity(1 if grey else 3)(image)
    wanted = {"1": "L", "P": "RGB", "CMYK": "RGB"}.get(mode, mode)
    assert out.mode == wanted
    assert out.size == image.size
    expected = image if mode == wanted else image.convert(wanted)
    np.testing.assert_allclose(np.asarray(out), np.asarray(expected), atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".jpg", ".png", ".tiff", ".webp"])
def test_pictures_come_upright_where_that_is_asked_for(tmp_path, ending, orientation):
    image = Image.fromarray(pixels(20, 12))
    image.putalpha(Image.fromarray(pixels(20, 12, 3)[..., 0]))
    image = image.convert("RGB") if ending == ".jpg" else image
    exif = image.getexif()
    exif[0x0112] = orientation
    file = tmp_path / f"a{ending}"
    image.save(file, exif=exif, **({"lossless": True} if ending == ".webp" else {}))
    with Image.open(file) as stored:
        shown = np.asarray(ImageOps.exif_transpose(stored).convert("RGBA"))
    read = read_picture(file, upright=True)
    assert np.array_equal(read.pixels, shown[..., :3])
    assert read.alpha is None or np.array_equal(read.alpha, shown[..., 3])
    if ending != ".tiff":  # Pillow turns it in any case
        assert read_picture(file).size == (20, 12)


def test_a_tiff_that_pillow_does_not_know_comes_upright_with_its_profile(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    colours = values(np.float32, 3, 12, 20)
    tags = [(274, "H", 1, 6, True), (34675, "B", 3, b"icc", True)]
    tifffile.imwrite(tmp_path / "a.tif", colours, photometric="rgb", extratags=tags)
    picture = read_picture(tmp_path / "a.tif", upright=True)
    assert np.array_equal(picture.pixels, np.rot90(colours, -1))
    assert picture.info == {"icc_profile": b"icc"}
    assert np.array_equal(read_picture(tmp_path / "a.tif").pixels, colours)
    assert FolderTranslation(identity(3), upright=False)._read(
        Job(str(tmp_path / "a.tif"), tmp_path / "b.png")
    ).picture.size == (20, 12)


def test_colours_that_are_no_rgb_are_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", values(np.uint16, 3), photometric="cielab")
    with pytest.raises(UserError, match=r"a\.tif: colours of CIE Lab"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize(("mode", "key"), [("RGB", (0, 0, 0)), ("L", 0), ("1", 0)])
def test_a_colour_may_stand_for_transparency(tmp_path, mode, key):
    image = Image.fromarray(values(np.uint8, 3)).convert(mode)
    image.paste(key, (2, 3, 9, 8))
    image.save(tmp_path / "a.png", transparency=key)
    with Image.open(tmp_path / "a.png") as stored:
        wanted = np.asarray(stored.convert("RGBA"))
    assert (wanted[3:8, 2:9, 3] == 0).all()
    read = read_picture(tmp_path / "a.png")
    assert np.array_equal(read.alpha, wanted[..., 3])
    assert np.array_equal(read.pixels, wanted[..., : read.pixels.shape[2]])


def test_damaged_notes_are_no_damage(tmp_path):
    Image.fromarray(pixels(20, 12)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff")
    assert read_picture(tmp_path / "a.jpg", upright=True).size == (20, 12)


def test_grey_and_colour():
    grey, colour = values(np.uint8, 1), values(np.uint8, 3)
    assert identity(3)(Image.fromarray(grey[..., 0])).mode == "RGB"
    np.testing.assert_array_equal(
        fit_channels(colour, 1)[..., 0], np.asarray(Image.fromarray(colour).convert("L"))
    )
    deep = fit_channels(colour.astype(np.uint16) * 257, 1)
    np.testing.assert_allclose(deep / 257, fit_channels(colour, 1), atol=0.6)
    with pytest.raises(UserError, match="has 5 channels, the network takes 3"):
        identity(3)(values(np.uint8, 5))


def test_8_bits_are_the_bits_of_the_transforms():
    pixels = values(np.uint8, 3)
    half = (0.5, 0.5, 0.5)
    steps = [transforms.ToTensor(), transforms.Normalize(half, half)]
    wanted = transforms.Compose(steps)(Image.fromarray(pixels))
    unit = normalize(pixels)
    assert torch.equal(unit, wanted)
    np.testing.assert_array_equal(denormalize(unit * 0.9, np.uint8), tensor2im(unit[None] * 0.9))


def test_scaled_pictures_have_8_bits_whatever_the_range(tmp_path):
    def half(path):
        return torch.full((1, 4, 4), -0.5)

    work = FolderTranslation(identity(1, (0.0, 4095.0)), threads=0, load_resized=half)
    assert work.run(work.jobs([str(tmp_path / "a.npy")], tmp_path, tmp_path / "out")) == []
    (file,) = (tmp_path / "out").iterdir()
    assert (read_picture(file).pixels == 64).all()


def test_deep_grey_with_transparency_is_an_array(tmp_path):
    grey, alpha = values(np.uint16, 1), values(np.uint16, 1)[..., 0]
    write_picture(tmp_path / "a.png", grey, alpha)
    found = identity(1)(tmp_path / "a.png")
    assert np.array_equal(found, np.dstack([grey, alpha]))


def test_outputs_of_8_bits(tmp_path):
    path = tmp_path / "in" / "a.tiff"
    write_picture(path, np.array([[[0.0], [0.5], [1.0]]], np.float32))
    for kind, dtype in (("png", np.uint8), ("tiff", np.float32), ("same", np.float32)):
        work = FolderTranslation(identity(1), kind, threads=0)
        jobs = work.jobs([str(path)], tmp_path / "in", tmp_path / kind)
        assert work.run(jobs) == []
        got = read_picture(jobs[0].target).pixels
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got[0, :, 0], [0, 128, 255] if dtype == np.uint8 else [0, 0.5, 1]
        )


def test_tiled_results_are_written_in_bands(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "models.inference.translator.translate_in_tiles",
        lambda net, source, *_: (
            source.rows(i, min(i + 8, source.height)) for i in range(0, 37, 8)
        ),
    )
    pixels, alpha = values(np.uint16, 3), values(np.uint16, 1)[..., 0]
    for ending in ("png", "tiff"):
        write_picture(tmp_path / "in" / f"a.{ending}", pixels, alpha)
    work = FolderTranslation(identity(3), "same", tiles=TileOptions(16, 4))
    paths = list_pictures(tmp_path / "in")
    assert work.run(work.jobs(paths, tmp_path / "in", tmp_path / "out")) == []
    for ending in ("png", "tiff"):
        got = read_picture(tmp_path / "out" / f"a.{ending}")
        np.testing.assert_array_equal(got.pixels, pixels)
        np.testing.assert_array_equal(got.alpha, alpha)


# ---------------------------------------------------------------------------------------- mistakes
def test_mistakes(tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros(5))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.png").write_text("no image")
    for name in ("flat.npy", "objects.npy", "text.png", "missing.png"):
        with pytest.raises(UserError, match=f"can't read the image .*{name}"):
            read_picture(tmp_path / name)
    with pytest.raises(UserError, match=r"jpg can't hold 3 channels of uint16"):
        write_picture(tmp_path / "a.jpg", values(np.uint16, 3))
    with pytest.raises(UserError, match=r"png can't hold 5 channels"):
        write_picture(tmp_path / "a.png", values(np.uint8, 5))
    with pytest.raises(UserError, match=r"floats from 0 to 7 need their range: --value_range"):
        normalize(np.array([[[0.0, 7.0]]]))
    with pytest.raises(UserError, match="no images in"):
        list_pictures(tmp_path.joinpath("empty").mkdir() or tmp_path / "empty")


def test_tifffile_is_asked_for(tmp_path, monkeypatch):
    write_picture(tmp_path / "a.tiff", values(np.uint16, 3))
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(UserError, match="needs the package tifffile: pip install tifffile"):
        read_picture(tmp_path / "a.tiff")


def test_pictures_larger_than_pillow_allows(tmp_path, monkeypatch):
    write_picture(tmp_path / "a.png", values(np.uint8, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_picture(tmp_path / "a.png").size == (29, 37)
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(UserError, match=r"a\.png: it has more than 0 megapixels: scale it down"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("brightest", [255, 256])
def test_dark_pictures_of_16_bits_are_of_16_bits(tmp_path, brightest):
    """Whatever the format, and however bright the brightest pixel is."""
    levels = np.zeros((8, 8), np.uint16)
    levels[0] = brightest
    Image.fromarray(levels).save(tmp_path / "a.png")
    header = b"P5 8 8 65535\n"
    (tmp_path / "a.ppm").write_bytes(header + levels.astype(">u2").tobytes())
    for name in ("a.png", "a.ppm"):
        read = read_picture(tmp_path / name)
        assert read.pixels.dtype == np.uint16
        assert np.array_equal(read.pixels[..., 0], levels)
        assert np.asarray(open_image(tmp_path / name, "L")).max() == 1
