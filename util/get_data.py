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
import stat
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

if not __package__:  # started by its path: Python then looks in util/, and not in the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util.errors import OneLineParser

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
CHUNK = 1 << 20
OFFLINE = "; datasets/worldmaps_mini needs no download (bash scripts/quickstart.sh)"
# What the archive modules raise for a file that they can't make sense of.
DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error),
    *(EOFError, RuntimeError, NotImplementedError),
)


class DataError(ValueError):
    """Something the user has to know or mend, in one line."""


def run_tool(main: Callable[[], None]) -> None:
    """Run a command line tool: what goes wrong is one line on stderr and exit code 1.

    A terminated tool unwinds as an interrupted one does, so that its temporary folder goes too.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (DataError, OSError) as e:
        # a file name may hold a line break
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(1)


@contextlib.contextmanager
def staged(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder inside `parent` whose children move into `parent` once all went well.

    After an error nothing is left, not even a `parent` that was made here. A child never replaces
    a file or a folder with something in it: that raises DataError.
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
    """Raise DataError if `path` is a file or a folder that is not empty."""
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise DataError(f"'{path}' is already there: move it away, or choose another place")


class GetData:
    """Fetch the data sets of CycleGAN or pix2pix.

    Args:
        technique: 'cyclegan' or 'pix2pix', in any case.
        verbose: Whether to print what is going on.
        mirror: Another base address; default: the environment's IMAGE_TRANSLATION_MIRROR, or
            Berkeley's.

    Raises:
        DataError: The technique is unknown.
    """

    def __init__(
        self, technique: str = "cyclegan", verbose: bool = True, mirror: str | None = None
    ) -> None:
        self.technique = technique.lower()
        if self.technique not in DATASETS:
            raise DataError(f"unknown technique '{technique}': it is cyclegan or pix2pix")
        self.verbose = verbose
        self.base = (mirror or os.environ.get(MIRROR_VARIABLE) or BASE_URL).rstrip("/")

    @property
    def datasets(self) -> tuple[str, ...]:
        """The names of this technique's data sets."""
        return DATASETS[self.technique]

    def get(self, save_path: str | os.PathLike[str], dataset: str | None = None) -> str:
        """Download one data set and unpack it; one that is there already is left as it is.

        Args:
            save_path: The folder that gets a folder with the data set's name.
            dataset: Its name; None asks at the terminal.

        Returns:
            The absolute path of the data set's folder.

        Raises:
            DataError: The name is unknown, or the file can't be had whole and sound.
        """
        name = self._ask() if dataset is None else known(dataset, self.datasets, "data set")
        if name == "cityscapes":
            raise DataError(CITYSCAPES)
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
        """Download released weights to `<save_path>/<model>_pretrained/latest_net_G.pth`.

        Returns:
            The absolute path of the file.

        Raises:
            DataError: The name is unknown, or the file can't be had whole.
        """
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
                raise DataError(f"{url} does not hold weights but something else: try later")
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
    """Return `name`, or raise DataError with the list of names it is not in."""
    if name not in names:
        raise DataError(f"unknown {what} '{name}': choose one of {', '.join(names)}")
    return name


def download(url: str, path: Path, verbose: bool = False) -> None:
    """Write what is at `url` to `path`; raise DataError unless all of it came.

    The length is compared with what the server announced. The publisher gives no checksums.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DataError(f"'{url}' is no address of a web server: give http:// or https://")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            expected = int(length) if length and length.isdigit() else None
            if verbose:
                size = "" if expected is None else f" ({expected / 1e6:.1f} MB)"
                print(f"downloading {url}{size}", flush=True)
            with open(path, "wb") as file:
                received = _copy_with_progress(response, file, expected, verbose)
    except urllib.error.HTTPError as e:
        raise DataError(f"{url}: the server answers {e.code} {e.reason}{OFFLINE}") from e
    except http.client.HTTPException as e:
        raise DataError(f"{url}: the connection broke off ({e!r}): try again{OFFLINE}") from e
    except OSError as e:
        if getattr(e, "filename", None) or e.errno in (28, 122):  # the disk, not the network
            raise
        reason = getattr(e, "reason", e)
        raise DataError(
            f"{url}: no connection ({reason}): check the network, try again{OFFLINE}"
        ) from e
    if expected is not None and received != expected:
        raise DataError(f"{url}: {received} of {expected} bytes came: try again")
    if not received:
        raise DataError(f"{url}: the file is empty: try again later")


def _copy_with_progress(
    source: IO[bytes], file: IO[bytes], expected: int | None, verbose: bool
) -> int:
    show = verbose and expected and sys.stdout.isatty()
    received = 0
    while chunk := source.read(CHUNK):
        file.write(chunk)
        received += len(chunk)
        if show and expected:
            print(f"\r  {100 * received // expected:3d}%", end="", flush=True)
    if show:
        print()
    return received


class _Member(NamedTuple):
    """One entry of an archive; `link` is what a link points to, `open` is None for a folder."""

    name: str
    link: str | None
    open: Callable[[], IO[bytes]] | None


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a zip or tar.gz file into a new folder and return the number of files.

    Links become copies of what they point to, so nothing that is written can lead elsewhere.

    Raises:
        DataError: The archive is damaged, or a member would leave the folder (an absolute path,
            `..`, a link that points out), or is neither a file, a folder nor a link to a file.
    """
    folder.mkdir()
    written: set[PurePosixPath] = set()
    links: list[tuple[PurePosixPath, PurePosixPath]] = []
    try:
        with _members(archive) as members:
            for member in members:
                path = _inside(member.name, archive, member.name)
                if path.parts[:1] == ("__MACOSX",):
                    continue
                target = folder / path
                if member.link is not None:
                    source = PurePosixPath(os.path.normpath(path.parent / member.link))
                    if PurePosixPath(member.link).is_absolute() or "\\" in member.link:
                        source = PurePosixPath(member.link)
                    links.append((path, _inside(str(source), archive, member.name)))
                elif member.open is None:
                    target.mkdir(parents=True, exist_ok=True)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with member.open() as source, open(target, "wb") as file:
                        shutil.copyfileobj(source, file, CHUNK)
                    written.add(path)
    except DAMAGED as e:
        raise DataError(f"{archive.name} is damaged ({e}): download it again") from e
    for path, source in links:
        if source not in written:
            raise DataError(f"{archive.name}: the link '{path}' points to no file of the archive")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / source, folder / path)
        written.add(path)
    if not written:
        raise DataError(f"{archive.name} holds no files")
    return len(written)


@contextlib.contextmanager
def _members(archive: Path) -> Iterator[Iterator[_Member]]:
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            yield _zip_members(file)
    else:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as file:
            yield _tar_members(file, archive)
            # only at its end does gzip compare the checksum
            while stream.read(CHUNK):
                pass


def _zip_members(file: zipfile.ZipFile) -> Iterator[_Member]:
    for info in file.infolist():
        name = info.orig_filename  # `filename` is already tidied: judge what was written
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind == stat.S_IFLNK:
            yield _Member(name, file.read(info).decode("utf-8", "replace"), None)
        elif info.is_dir():
            yield _Member(name, None, None)
        else:
            yield _Member(name, None, lambda info=info: file.open(info))


def _tar_members(file: tarfile.TarFile, archive: Path) -> Iterator[_Member]:
    for info in file:
        if info.issym():
            yield _Member(info.name, info.linkname, None)
        elif info.islnk():
            # a hard link names its target from the archive's root
            depth = len(PurePosixPath(info.name).parent.parts)
            rooted = PurePosixPath(info.linkname).is_absolute()
            yield _Member(
                info.name, info.linkname if rooted else "../" * depth + info.linkname, None
            )
        elif info.isdir():
            yield _Member(info.name, None, None)
        elif info.isfile():
            yield _Member(info.name, None, lambda info=info: _opened(file, info))
        else:
            raise DataError(f"{archive.name}: '{info.name}' is neither a file, a folder nor a link")


def _opened(file: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = file.extractfile(info)
    if stream is None:
        raise tarfile.ReadError(f"{info.name} can't be read")
    return stream


def _inside(name: str, archive: Path, member: str) -> PurePosixPath:
    """The path of a member below the folder, or DataError if it would leave the folder."""
    path = PurePosixPath(name)
    parts = path.parts
    drive = bool(parts) and len(parts[0]) > 1 and parts[0][1] == ":"
    if path.is_absolute() or ".." in parts or "\\" in name or "\0" in name or drive:
        raise DataError(f"{archive.name}: the member '{member}' leads out of the folder; refused")
    return path


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
