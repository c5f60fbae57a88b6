"""Pages of pictures: static HTML beside a folder of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import dominate
from dominate.tags import a, figcaption, figure, h1, h3, img, meta, section, style

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem; color: #222; background: #fff; }
h1 { font-size: 1.4rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
.row { display: flex; gap: .4rem; overflow-x: auto; padding-bottom: .3rem; }
figure { margin: 0; flex: 0 0 auto; }
figure img { display: block; max-width: 88vw; background: #eee; image-rendering: auto; }
figcaption { text-align: center; color: #555; font-size: .85rem; }
.wide img { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; } figcaption { color: #aaa; }
}
"""


class HTML:
    """A page `index.html` in `web_dir` that shows files of `web_dir/images`.

    Rows of pictures under headings; texts and file names are escaped, pictures load when they come
    into view. `refresh` reloads the page each so many seconds, 0 never.
    """

    def __init__(self, web_dir: str | os.PathLike, title: str, refresh: int = 0):
        self.title = title
        self.web_dir = Path(web_dir)
        self.img_dir = self.web_dir / "images"
        self.img_dir.mkdir(parents=True, exist_ok=True)
        self.doc = dominate.document(title=title)
        with self.doc.head:
            meta(charset="utf-8")
            meta(name="viewport", content="width=device-width, initial-scale=1")
            if refresh > 0:
                meta(http_equiv="refresh", content=str(refresh))
            style(STYLE)
        with self.doc:
            h1(title)

    def get_image_dir(self) -> Path:
        """The folder in which pictures of this page belong."""
        return self.img_dir

    def add_header(self, text: str) -> None:
        """Add a heading."""
        with self.doc:
            h3(text)

    def add_images(
        self, ims: Sequence[str], txts: Sequence[str], links: Sequence[str], width: int = 400
    ) -> None:
        """Add a row of pictures (paths below `images/`) with labels and what they link to."""
        with self.doc, section(cls="row"):
            for image, text, link in zip(ims, txts, links, strict=True):
                with figure():
                    with a(href=f"images/{quote(link)}"):
                        img(src=f"images/{quote(image)}", width=width, loading="lazy", alt=text)
                    figcaption(text)

    def add_wide_image(self, path: str, text: str) -> None:
        """Add one picture as wide as the page; its path is seen from the page."""
        with self.doc, section(cls="wide"):
            img(src=quote(path), alt=text)

    def save(self) -> None:
        """Write the page; a reader never sees a part of it."""
        path = self.web_dir / "index.html"
        unfinished = path.with_suffix(".html.tmp")
        unfinished.write_text(self.doc.render(), encoding="utf-8", errors="surrogateescape")
        os.replace(unfinished, path)
