"""Pages of images: static HTML beside a folder of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import dominate
from dominate.tags import (
    a,
    div,
    figcaption,
    figure,
    h1,
    h3,
    html_tag,
    img,
    meta,
    p,
    section,
    source,
    style,
)
from dominate.util import raw

from .files import TextPath, mark_as_results, write_whole


class picture(html_tag):  # dominate takes the name of the tag from the class
    """The tag for several versions of one image, which dominate lacks."""


GAP = 6  # pixels between two images of a row
MARGIN = 16  # pixels beside the page
PHONE = 640  # pixels; a narrower page counts as a phone's
LEAST_ON_PHONE = 110  # minimum width of an image there
LEAST_SHARE = 0.75  # elsewhere: minimum width of an image, as a fraction of the one asked for
LEAST_ASIDE = 200  # minimum width (or the one asked for, if smaller) where rows are side by side

# Without a known height, unloaded images would be empty, and all the lazy ones in view at once: so
# an image is square until it is loaded.
STYLE = f"""
:root {{ color-scheme: light dark; }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }}
body {{ font: 16px/1.4 system-ui, sans-serif; margin: {MARGIN}px; color: #222; background: #fff; }}
h1 {{ font-size: 1.4rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 .4rem; overflow-wrap: anywhere; }}
p {{ margin: 0 0 1rem; overflow-wrap: anywhere; }}
.row {{ display: grid; grid-template-columns: repeat(var(--columns), minmax(0, var(--width)));
  gap: {2 * GAP}px {GAP}px; }}
figure {{ margin: 0; }}
a, figure img {{ display: block; }}
.row img {{ width: 100%; height: auto; aspect-ratio: auto 1 / 1; background: #8883; }}
figcaption {{ text-align: center; color: #555; font-size: .875rem; overflow-wrap: anywhere; }}
.wide {{ margin: 0 0 1rem; }}
.wide img {{ width: 1200px; max-width: 100%; height: auto; display: block; }}
.items {{ display: grid; column-gap: {4 * GAP}px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--item)), 1fr)); }}
@media (prefers-color-scheme: dark) {{
  body {{ color: #ddd; background: #181818; }}
  figcaption {{ color: #aaa; }}
  .wide img {{ filter: invert(.906) hue-rotate(180deg); }}
}}
"""


def _quoted(path: str) -> str:
    # by its bytes on disk: names of files need not be UTF-8; Windows separates by backslashes
    return quote(os.fsencode(path.replace(os.sep, "/")))


class HTML:
    """A page `index.html` in `web_dir` that shows files of `web_dir/images`.

    It has rows of images under headings. Texts and file names are escaped; images load lazily,
    when they come into view. `refresh` is the seconds after which the page reloads, 0 for never.
    """

    def __init__(self, web_dir: str | os.PathLike, title: str, refresh: int = 0):
        self.title = title
        self.web_dir = TextPath(web_dir)
        self.img_dir = self.web_dir / "images"
        self.img_dir.mkdir(parents=True, exist_ok=True)
        mark_as_results(self.web_dir)
        self.shapes: set[tuple[int, int]] = set()  # images in a row, and their width
        self.doc = dominate.document(title=title)
        with self.doc.head:
            meta(charset="utf-8")
            meta(name="viewport", content="width=device-width, initial-scale=1")
            if refresh > 0:
                meta(http_equiv="refresh", content=str(refresh))
            self.style = style(raw(STYLE))
        self.items: div | None = None  # where the next row goes
        self.item: section | None = None  # the section that the last heading began
        with self.doc:
            h1(title)

    def get_image_dir(self) -> Path:
        """The folder in which images of this page belong."""
        return self.img_dir

    def add_header(self, text: str) -> None:
        """Add a heading; on a wide page several of them stand side by side."""
        items = self.items or self.doc.add(div(cls="items"))
        self.items, self.item = items, items.add(section(h3(text)))

    def add_text(self, text: str) -> None:
        """Add a paragraph."""
        self._end_items()
        self.doc.add(p(text))

    def _end_items(self) -> None:
        self.items = self.item = None

    def add_images(
        self, ims: Sequence[str], txts: Sequence[str], links: Sequence[str], width: int = 400
    ) -> None:
        """Add a row of images (paths below `images/`) with labels and what they link to.

        Each has a column of at most `width` pixels. On a page too narrow for all of them the row
        is split into halves, quarters and so on, in the same way for every row of that length.
        """
        self.shapes.add((len(ims), width))
        row = div(cls=f"row {_row_class(len(ims), width)}")
        for image, text, link in zip(ims, txts, links, strict=True):
            with row, figure():
                with a(href=f"images/{_quoted(link)}"):
                    img(src=f"images/{_quoted(image)}", loading="lazy", alt=text)
                figcaption(text)
        (self.doc if self.item is None else self.item).add(row)

    def add_wide_image(self, path: str, text: str, narrow: str = "") -> None:
        """Add an image as wide as the page (on a phone: `narrow`); paths are relative to it."""
        self._end_items()
        with self.doc, div(cls="wide"), a(href=_quoted(path)), picture():
            if narrow:
                source(srcset=_quoted(narrow), media=f"(max-width: {PHONE - 1}px)")
            img(src=_quoted(path), alt=text)

    def save(self) -> None:
        """Write the page atomically."""
        self.style.clear()
        # items stand side by side only where each has room for its longest row in one line
        shapes = sorted(self.shapes)
        item = max(
            (_line_width(n, max(min(LEAST_ASIDE, w), LEAST_SHARE * w)) for n, w in shapes),
            default=0,
        )
        rules = [f":root {{ --item: {item}px; }}", *(_columns(*shape) for shape in shapes)]
        self.style.add(raw(STYLE + "\n".join(rules)))
        write_whole(self.web_dir / "index.html", self.doc.render(), flush=False)


def _row_class(count: int, width: int) -> str:
    return f"of{count}w{width}"


def _line_width(count: int, width: float) -> float:
    return count * width + (count - 1) * GAP


def _columns(count: int, width: int) -> str:
    """CSS rules that give a row of `count` images more columns the wider the page is."""
    name = _row_class(count, width)
    rules = [f".{name} {{ --width: {width}px; --columns: 1; }}"]

    def rule(columns: int, least: float, from_width: int) -> None:
        needed = max(round(_line_width(columns, least) + 2 * MARGIN), from_width)
        rules.append(f"@media (min-width: {needed}px) {{ .{name} {{ --columns: {columns}; }} }}")

    steps = [count]  # all in one line, then halves, ...
    while steps[-1] > 1:
        steps.append(-(-steps[-1] // 2))
    for columns in reversed(steps):
        rule(columns, min(LEAST_ON_PHONE, width), 0)
    rules.append(f"@media (min-width: {PHONE}px) {{ .{name} {{ --columns: 1; }} }}")
    for columns in reversed(steps):
        rule(columns, LEAST_SHARE * width, PHONE)
    return "\n".join(rules)
