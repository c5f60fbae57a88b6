"""Install the scripts and styles that visdom's page needs.

The package visdom does not contain them. Its server downloads them at its first start, without a
time limit; without them its page is plain blue. `python -m util.display.visdom_assets` installs
them beforehand: by visdom's own download or, if that fails and there is npm, from npm packages.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from util.errors import UserError, run_tool
from util.files import write_whole

SECONDS = 120  # for each of the two ways

_GLYPHS = "glyphicons-halflings-regular"
_MATHJAX = (
    *("MathJax.js", "config/Safe.js", "config/TeX-AMS-MML_HTMLorMML.js", "extensions/Safe.js"),
    *("jax/output/SVG/jax.js", "jax/output/SVG/config.js"),
    "jax/output/SVG/fonts/TeX/fontdata.js",
    "jax/output/SVG/fonts/TeX/Size1/Regular/Main.js",
)
# npm package: {path in the package: path under visdom/static}
ASSETS: dict[str, dict[str, str]] = {
    "jquery@3.1.1": {"dist/jquery.min.js": "js/jquery.min.js"},
    "bootstrap@3.3.7": {
        "dist/js/bootstrap.min.js": "js/bootstrap.min.js",
        "dist/css/bootstrap.min.css": "css/bootstrap.min.css",
        **{f"dist/fonts/{_GLYPHS}.{end}": f"fonts/{_GLYPHS}.{end}" for end in ("eot", "ttf")},
        **{f"dist/fonts/{_GLYPHS}.{end}": f"fonts/{_GLYPHS}.{end}" for end in ("woff2", "woff")},
        f"dist/fonts/{_GLYPHS}.svg": f"fonts/{_GLYPHS}.svg#glyphicons_halflingsregular",
    },
    "react@16.2.0": {"umd/react.production.min.js": "js/react-react.min.js"},
    "react-dom@16.2.0": {"umd/react-dom.production.min.js": "js/react-dom.min.js"},
    "react-modal@3.1.10": {"dist/react-modal.min.js": "js/react-modal.min.js"},
    "plotly.js-dist-min@2.11.1": {"plotly.min.js": "js/plotly-plotly.min.js"},
    "sjcl@1.0.7": {"sjcl.js": "js/sjcl.js"},
    "layout-bin-packer@1.4.0": {
        "dist/layout-bin-packer.js": "js/layout_bin_packer.js",
        "dist/layout-bin-packer.js.map": "js/layout-bin-packer.js.map",
    },
    "d3@3.5.17": {"d3.min.js": "js/d3.v3.min.js"},
    "d3-selection-multi@1.0.1": {"build/d3-selection-multi.js": "js/d3-selection-multi.v1.js"},
    "save-svg-as-png@1.4.17": {"lib/saveSvgAsPng.js": "js/saveSvgAsPng.js"},
    "react-resizable@1.4.6": {"css/styles.css": "css/react-resizable-styles.css"},
    "react-grid-layout@0.16.3": {"css/styles.css": "css/react-grid-layout-styles.css"},
    "classnames@2.2.5": {"index.js": "fonts/classnames"},
    "mathjax@2.7.5": {path: f"js/mathjax/2.7.5/{path}" for path in _MATHJAX},
}


def static_dir() -> Path | None:
    """The folder `visdom/static` of this interpreter, None if visdom is not installed."""
    spec = importlib.util.find_spec("visdom")
    return Path(spec.origin).parent / "static" if spec is not None and spec.origin else None


def missing_assets(static: Path) -> list[str]:
    """The files under `static` that the page needs and that are absent or empty."""
    paths = {name: static / name for files in ASSETS.values() for name in files.values()}
    return [name for name, p in paths.items() if not p.is_file() or p.stat().st_size == 0]


def _version(static: Path) -> str:
    return (static.parent / "VERSION").read_text().strip()


def up_to_date(static: Path) -> bool:
    """Whether every file is there and visdom will not download any at its start."""
    built = static / "version.built"
    there = built.is_file() and built.read_text().strip() == _version(static)
    return there and not missing_assets(static)


def download_with_visdom(static: Path) -> None:
    """Let visdom download its files, in a separate process because it has no time limit itself."""
    # With `version.built` it would not fetch an empty file again.
    (static / "version.built").unlink(missing_ok=True)
    code = "from visdom.server.build import download_scripts; download_scripts()"
    _run([sys.executable, "-c", code], static)


def download_with_npm(static: Path) -> None:
    """Fetch the packages with `npm pack` (none of their code is run) and copy what is needed."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm is not installed")
    with tempfile.TemporaryDirectory(prefix="visdom-assets-") as folder:
        _run([npm, "pack", "--ignore-scripts", "--silent", *ASSETS], folder)
        for package, files in ASSETS.items():
            shutil.unpack_archive(Path(folder, f"{package.replace('@', '-')}.tgz"), folder)
            for source, target in files.items():
                (static / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder, "package", source), static / target)
            shutil.rmtree(Path(folder, "package"))


def _run(command: list[str], folder: str | os.PathLike) -> None:
    """Run a command; raises UserError with its last line if it fails or takes too long."""
    try:
        subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"it took longer than {SECONDS} s") from None
    except subprocess.CalledProcessError as e:
        lines = (e.stderr or e.stdout).strip().splitlines() or ["no message"]
        raise UserError(lines[-1][:200]) from None


def install() -> str:
    """Install missing files; returns one line that says what was done.

    Raises UserError if visdom is not installed, or if files are still missing afterwards.
    """
    static = static_dir()
    if static is None:
        raise UserError(f"visdom is not installed for {sys.executable}")
    if up_to_date(static):
        return "visdom: the page's files are in place"
    tried = []
    for name, download in (("visdom's download", download_with_visdom), ("npm", download_with_npm)):
        if not missing_assets(static):
            break
        try:
            download(static)
        except (UserError, OSError) as e:
            tried.append(f"{name}: {e}")
    if missing := missing_assets(static):
        (static / "version.built").unlink(missing_ok=True)
        raise UserError(
            f"visdom's page lacks {len(missing)} file(s), such as {missing[0]} "
            f"({'; '.join(tried)}). Training works without the live page; run "
            "scripts/setup_visdom.sh again with a network"
        )
    write_whole(static / "version.built", _version(static))
    return "visdom: the page's files have been put in place"


if __name__ == "__main__":
    run_tool(lambda: print(install()))
