"""Download data sets and released weights, checked and whole or not at all.

Needs only the standard library, so that it works before anything is installed. From a shell:

    python util/get_data.py dataset cyclegan horse2zebra     # -> ./datasets/horse2zebra
    python util/get_data.py model pix2pix facades_label2photo

From Python: `GetData("cyclegan").get("./datasets", "horse2zebra")`.

The tools in `datasets/` share `staged` and `run_tool` from here.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath

if not __package__:  # started by its path: Python then looks in util/, and not in the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util.errors import OneLineParser, UserError, one_line_errors

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
# Where each technique's files lie below the base address.
DATASET_PATHS = {"cyclegan": "cyclegan/datasets/{}.zip", "pix2pix": "pix2pix/datasets/{}.tar.gz"}
MODEL_PATHS = {
    "cyclegan": "cyclegan/pretrained_models/{}.pth",
    "pix2pix": "pix2pix/models-pytorch/{}.pth",
}
CITYSCAPES = (
    "the licence of Cityscapes does not allow handing it on: get gtFine_trainvaltest.zip and "
    "leftImg8bit_trainvaltest.zip from https://cityscapes-dataset.com and run "
    "datasets/prepare_cityscapes_dataset.py"
)
TIMEOUT = 60.0  # seconds without a byte before a download counts as dead
OFFLINE = "; datasets/worldmaps_mini needs no download (bash scripts/quickstart.sh)"
# what the archive modules raise for a file that they can't make sense of
DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error),
    *(EOFError, KeyError, RuntimeError, NotImplementedError),
)


def run_tool(main: Callable[[], None]) -> None:
    """Run a command line tool: what goes wrong is one line on stderr and exit code 1.

    A terminated tool unwinds as an interrupted one does, so that its temporary folder goes too.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with one_line_errors():
        try:
            main()
        except OSError as e:
            # a file name may hold a line break
            raise UserError(" ".join(str(e).split())) from e


@contextlib.contextmanager
def staged(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder inside `parent` whose children move into `parent` once all went well.

    After an error nothing is left, not even a `parent` that was made here. A child never replaces
    a file or a folder with something in it: that raises UserError.
    """
    parent = Path(parent)
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=parent))
    try:
        yield temporary
        children = sorted(temporary.iterdir())
        for child in children:
            must_be_free(parent / child.name)
        for child in children:
            os.replace(child, parent / child.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):  # it holds the result
                folder.rmdir()


def must_be_free(path: str | os.PathLike[str]) -> None:
    """Raise UserError if `path` is a file or a folder that is not empty."""
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise UserError(f"'{path}' is already there: move it away, or choose another place")


class GetData:
    """Fetch the data sets of CycleGAN or pix2pix (`technique`, in any case).

    `mirror` is another base address than the environment's IMAGE_TRANSLATION_MIRROR or Berkeley's.
    All methods raise UserError where a name is unknown or a file can't be had whole and sound.
    """

    def __init__(
        self, technique: str = "cyclegan", verbose: bool = True, mirror: str | None = None
    ):
        self.technique = technique.lower()
        if self.technique not in DATASETS:
            raise UserError(f"unknown technique '{technique}': it is cyclegan or pix2pix")
        self.verbose = verbose
        self.base = (mirror or os.environ.get(MIRROR_VARIABLE) or BASE_URL).rstrip("/")

    @property
    def datasets(self) -> tuple[str, ...]:
        """The names of this technique's data sets."""
        return DATASETS[self.technique]

    def get(self, save_path: str | os.PathLike[str], dataset: str | None = None) -> str:
        """Download a data set to `<save_path>/<dataset>` and return that folder's absolute path.

        One that is there already is left as it is. None asks for a name at the terminal.
        """
        name = self._ask() if dataset is None else known(dataset, self.datasets, "data set")
        if name == "cityscapes":
            raise UserError(CITYSCAPES)
        target = Path(save_path).absolute() / name
        if target.is_dir() and any(target.iterdir()):
            self._say(f"{target} is there already; remove it to download it again")
            return str(target)
        must_be_free(target)
        url = f"{self.base}/{DATASET_PATHS[self.technique].format(name)}"
        with staged(target.parent) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
            archive = Path(scratch) / url.rsplit("/", 1)[1]
            download(url, archive, self.verbose)
            unpacked = Path(scratch) / "unpacked"
            count = unpack(archive, unpacked)
            # the archives hold a folder of the data set's name; a mirror's may do without
            inner = unpacked / name
            os.replace(inner if inner.is_dir() else unpacked, folder / name)
        self._say(f"{count} files in {target}")
        return str(target)

    def get_model(self, save_path: str | os.PathLike[str], model: str) -> str:
        """Download weights to `<save_path>/<model>_pretrained/latest_net_G.pth`: its path."""
        name = known(model, MODELS[self.technique], "model")
        target = Path(save_path).absolute() / f"{name}_pretrained" / "latest_net_G.pth"
        if target.is_file():
            self._say(f"{target} is there already; remove it to download it again")
            return str(target)
        url = f"{self.base}/{MODEL_PATHS[self.technique].format(name)}"
        with staged(target.parent) as folder:
            file = folder / target.name
            download(url, file, self.verbose)
            with open(file, "rb") as f:
                start = f.read(2)
            # torch.save writes a zip file, or before 1.6 a pickle
            if start[:1] != b"\x80" and start != b"PK":
                raise UserError(f"{url} does not hold weights but something else: try later")
        self._say(f"weights in {target}")
        return str(target)

    def _ask(self) -> str:
        for i, name in enumerate(self.datasets):
            print(f"{i:3}: {name}")
        answer = input("number or name of the data set: ").strip()
        if answer.isdigit() and int(answer) < len(self.datasets):
            answer = self.datasets[int(answer)]
        return known(answer, self.datasets, "data set")

    def _say(self, line: str) -> None:
        if self.verbose:
            print(line, flush=True)


def known(name: str, names: tuple[str, ...], what: str) -> str:
    """Return `name`, or raise UserError with the list of names it is not in."""
    if name not in names:
        raise UserError(f"unknown {what} '{name}': choose one of {', '.join(names)}")
    return name


def download(url: str, path: Path, verbose: bool = False) -> None:
    """Write what is at `url` to `path`; raise UserError unless all of it came.

    The length is compared with what the server announced. The publisher gives no checksums.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"'{url}' is no address of a web server: give http:// or https://")
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
        if getattr(e, "filename", None) or e.errno in (28, 122):  # the disk, not the network
            raise
        reason = getattr(e, "reason", e)
        raise UserError(
            f"{url}: no connection ({reason}): check the network, try again{OFFLINE}"
        ) from e
    if received < max(1, expected):
        raise UserError(f"{url}: {received} of {expected} bytes came: try again")


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a zip or tar.gz file into a new folder and return the number of files.

    Raises UserError where the archive is damaged, or a member or a link would leave the folder.
    """
    folder.mkdir()
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                # `filename` is already tidied: judge what was written
                _stay_inside(archive, [member.orig_filename for member in file.infolist()])
                file.extractall(folder)
        else:
            if not hasattr(tarfile, "data_filter"):
                raise UserError("this Python unpacks without checks: use 3.10.12, 3.11.4 or newer")
            with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as file:
                for member in file:
                    _stay_inside(archive, [member.name])
                    file.extract(member, folder, filter="data")
                while stream.read(1 << 20):  # the checksum is compared at the very end
                    pass
    except tarfile.SpecialFileError as e:
        raise UserError(
            f"{archive.name}: '{e.tarinfo.name}' is neither a file, a folder nor a link"
        ) from e
    except tarfile.FilterError as e:
        raise _leads_out(archive, e.tarinfo.name) from e
    except DAMAGED as e:
        raise UserError(f"{archive.name} is damaged ({e}): download it again") from e
    shutil.rmtree(folder / "__MACOSX", ignore_errors=True)
    count = sum(path.is_file() for path in folder.rglob("*"))
    if not count:
        raise UserError(f"{archive.name} holds no files")
    return count


def _stay_inside(archive: Path, names: list[str]) -> None:
    for name in names:
        path = PureWindowsPath(name)  # knows both kinds of slashes, and drives
        if path.anchor or ".." in path.parts:
            raise _leads_out(archive, name)


def _leads_out(archive: Path, name: str) -> UserError:
    return UserError(f"{archive.name}: the member '{name}' leads out of the folder; refused")


def main() -> None:
    """Read the command line and fetch one data set or model."""
    parser = OneLineParser(description="Download a data set or released weights.")
    parser.add_argument("kind", choices=("dataset", "model"))
    parser.add_argument("technique", choices=tuple(DATASETS))
    parser.add_argument("name", nargs="?", help="of the data set or model; without: a list")
    parser.add_argument("--save_path", help="default: ./datasets or ./checkpoints")
    parser.add_argument("--mirror", help=f"another base address than {BASE_URL}")
    args = parser.parse_args()

    names = (DATASETS if args.kind == "dataset" else MODELS)[args.technique]
    what = "data set" if args.kind == "dataset" else "model"
    if args.name is None:
        parser.error(f"no {what} given: choose one of {', '.join(names)}")
    if args.name not in names:
        parser.error(f"unknown {what} '{args.name}': choose one of {', '.join(names)}")
    fetch = GetData(args.technique, mirror=args.mirror)
    if args.kind == "dataset":
        fetch.get(args.save_path or "./datasets", args.name)
    else:
        fetch.get_model(args.save_path or "./checkpoints", args.name)


if __name__ == "__main__":
    run_tool(main)
