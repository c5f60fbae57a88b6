"""Download datasets and released weights; they are checked, and appear whole or not at all.

Needs only the standard library, so that it works before anything is installed. From a shell:

    python util/get_data.py dataset cyclegan horse2zebra     # -> ./datasets/horse2zebra
    python util/get_data.py model pix2pix facades_label2photo

From Python: `GetData("cyclegan").get("./datasets", "horse2zebra")`.
"""

from __future__ import annotations

import errno
import gzip
import http.client
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

if not __package__:  # run as a script: Python then searches util/, not the folder above it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util.errors import OneLineParser, UserError, run_tool
from util.files import must_be_free, staged

BASE_URL = "http://efrosgans.eecs.berkeley.edu"
MIRROR_VARIABLE = "IMAGE_TRANSLATION_MIRROR"

DATASETS = {
    "cyclegan": (
        *("ae_photos", "apple2orange", "summer2winter_yosemite", "horse2zebra", "monet2photo"),
        *("cezanne2photo", "ukiyoe2photo", "vangogh2photo", "maps", "cityscapes", "facades"),
        *("iphone2dslr_flower", "mini", "mini_pix2pix", "mini_colorization"),
    ),
    "pix2pix": ("cityscapes", "night2day", "edges2handbags", "edges2shoes", "facades", "maps"),
}
MODELS = {
    "cyclegan": (
        *("apple2orange", "orange2apple", "summer2winter_yosemite", "winter2summer_yosemite"),
        *("horse2zebra", "zebra2horse", "monet2photo", "style_monet", "style_cezanne"),
        *("style_ukiyoe", "style_vangogh", "sat2map", "map2sat", "cityscapes_photo2label"),
        *("cityscapes_label2photo", "facades_photo2label", "facades_label2photo"),
        "iphone2dslr_flower",
    ),
    "pix2pix": ("edges2shoes", "sat2map", "map2sat", "facades_label2photo", "day2night"),
}
# where the files of each kind and technique lie below the base address
PATHS = {
    ("dataset", "cyclegan"): "cyclegan/datasets/{}.zip",
    ("dataset", "pix2pix"): "pix2pix/datasets/{}.tar.gz",
    ("model", "cyclegan"): "cyclegan/pretrained_models/{}.pth",
    ("model", "pix2pix"): "pix2pix/models-pytorch/{}.pth",
}
CITYSCAPES = (
    "the licence of Cityscapes does not allow handing it on: get gtFine_trainvaltest.zip and "
    "leftImg8bit_trainvaltest.zip from https://cityscapes-dataset.com and run "
    "datasets/prepare_cityscapes_dataset.py"
)
TIMEOUT = 60.0  # seconds without a byte until a download is given up
OFFLINE = "; datasets/worldmaps_mini needs no download (bash scripts/quickstart.sh)"
# what the archive modules raise for a file that they can't make sense of
DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error),
    *(EOFError, KeyError, RuntimeError, NotImplementedError),
)


class GetData:
    """Fetch the datasets and weights of CycleGAN or pix2pix (`technique`, in any case).

    The base address is `mirror`, else the environment's IMAGE_TRANSLATION_MIRROR, else Berkeley's.
    All methods raise UserError if a name is unknown or a file does not arrive whole.
    """

    def __init__(
        self, technique: str = "cyclegan", verbose: bool = True, mirror: str | None = None
    ):
        self.technique = technique.lower()
        if self.technique not in DATASETS:
            raise UserError(f"unknown technique '{technique}': it is cyclegan or pix2pix")
        self.datasets = DATASETS[self.technique]
        self.verbose = verbose
        self.base = (mirror or os.environ.get(MIRROR_VARIABLE) or BASE_URL).rstrip("/")

    def get(self, save_path: str | os.PathLike[str], dataset: str | None = None) -> str:
        """Download a dataset to `<save_path>/<dataset>` and return that folder's absolute path.

        An existing one is left unchanged. With None, asks for a name at the terminal.
        """
        name = _ask(self.datasets) if dataset is None else dataset
        url = self._address("dataset", name, self.datasets)
        if name == "cityscapes":
            raise UserError(CITYSCAPES)
        target = Path(save_path).absolute() / name
        if not self._there(target, target.is_dir() and any(target.iterdir())):
            must_be_free(target)
            with staged(target.parent) as folder, tempfile.TemporaryDirectory(dir=folder) as other:
                archive, unpacked = Path(other, Path(url).name), Path(other, "unpacked")
                download(url, archive, self.verbose)
                count = unpack(archive, unpacked)
                # the archives hold a folder named like the dataset; a mirror's may lack it
                inner = unpacked / name
                os.replace(inner if inner.is_dir() else unpacked, folder / name)
            self._say(f"{count} files in {target}")
        return str(target)

    def get_model(self, save_path: str | os.PathLike[str], model: str) -> str:
        """Download weights to `<save_path>/<model>_pretrained/latest_net_G.pth`; return that path.

        Existing ones are left unchanged.
        """
        url = self._address("model", model, MODELS[self.technique])
        target = Path(save_path).absolute() / f"{model}_pretrained" / "latest_net_G.pth"
        if not self._there(target, target.is_file()):
            with staged(target.parent) as folder:
                download(url, folder / target.name, self.verbose)
                # torch.save writes a zip file, or before 1.6 a pickle
                if not (folder / target.name).read_bytes().startswith((b"PK", b"\x80")):
                    raise UserError(f"{url} does not hold weights but something else: try later")
            self._say(f"weights in {target}")
        return str(target)

    def _address(self, what: str, name: str, names: tuple[str, ...]) -> str:
        if name not in names:
            raise UserError(f"unknown {what} '{name}': choose one of {', '.join(names)}")
        return f"{self.base}/{PATHS[what, self.technique].format(name)}"

    def _there(self, target: Path, there: bool) -> bool:
        if there:
            self._say(f"{target} is there already; remove it to download it again")
        return there

    def _say(self, line: str) -> None:
        if self.verbose:
            print(line, flush=True)


def _ask(names: tuple[str, ...]) -> str:
    for i, name in enumerate(names):
        print(f"{i:3}: {name}")
    answer = input("number or name of the dataset: ").strip()
    return names[int(answer)] if answer.isdigit() and int(answer) < len(names) else answer


def download(url: str, path: Path, verbose: bool = False) -> None:
    """Download `url` to `path`; raise UserError unless all of it arrived.

    The length is compared with what the server announced. The publisher gives no checksums.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"'{url}' is not the address of a web server: give http:// or https://")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(path, "wb") as file:
            expected = int(response.headers.get("Content-Length") or 0)
            if verbose:
                size = f" ({expected / 1e6:.1f} MB)" if expected else ""
                print(f"downloading {url}{size}", flush=True)
            show = verbose and expected and sys.stdout.isatty()
            while block := response.read(1 << 20):
                file.write(block)
                if show:
                    end = "\n" if file.tell() == expected else ""
                    print(f"\r  {100 * file.tell() // expected:3d}%", end=end, flush=True)
            received = file.tell()
    except urllib.error.HTTPError as e:
        raise UserError(f"{url}: the server answers {e.code} {e.reason}{OFFLINE}") from e
    except http.client.HTTPException as e:
        raise UserError(f"{url}: the connection broke off ({e!r}): try again{OFFLINE}") from e
    except OSError as e:
        if e.filename or e.errno in (errno.ENOSPC, errno.EDQUOT):  # the disk, not the network
            raise
        reason = f"no connection ({getattr(e, 'reason', e)})"
        raise UserError(f"{url}: {reason}: check the network, try again{OFFLINE}") from e
    if received < max(1, expected):
        raise UserError(f"{url}: {received} of {expected} bytes came: try again")


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a zip or tar.gz file into a new folder and return the number of files.

    Nothing is written outside of the folder. Raises UserError where the archive is damaged.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError("unpacking safely needs Python 3.10.12, 3.11.4, or newer: update it")
    folder.mkdir()
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        else:
            with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as file:
                file.extractall(folder, filter="data")
                while stream.read(1 << 20):  # the checksum is compared at the very end
                    pass
    except DAMAGED as e:
        raise UserError(f"{archive.name} is damaged ({e}): download it again") from e
    shutil.rmtree(folder / "__MACOSX", ignore_errors=True)
    count = sum(path.is_file() for path in folder.rglob("*"))
    if not count:
        raise UserError(f"{archive.name} holds no files")
    return count


def main() -> None:
    """Read the command line and fetch one dataset or model."""
    parser = OneLineParser(description="Download a dataset or released weights.")
    parser.add_argument("kind", choices=("dataset", "model"))
    parser.add_argument("technique", choices=tuple(DATASETS))
    parser.add_argument("name", nargs="?", help="of the dataset or model; leave out for a list")
    parser.add_argument("--save_path", help="default: ./datasets or ./checkpoints")
    parser.add_argument("--mirror", help=f"another base address than {BASE_URL}")
    args = parser.parse_args()

    names = (DATASETS if args.kind == "dataset" else MODELS)[args.technique]
    if args.name not in names:
        given = f"unknown {args.kind} '{args.name}'" if args.name else f"no {args.kind} given"
        parser.error(f"{given}: choose one of {', '.join(names)}")
    fetch = GetData(args.technique, mirror=args.mirror)
    if args.kind == "dataset":
        fetch.get(args.save_path or "./datasets", args.name)
    else:
        fetch.get_model(args.save_path or "./checkpoints", args.name)


if __name__ == "__main__":
    run_tool(main)
