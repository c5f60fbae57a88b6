"""The scripts and styles that visdom's page needs, and how they get into the installed package.

visdom ships without them and fetches them from the net at the first start of its server, with no
time limit; without them its page is plain blue. `python -m util.display.visdom_assets` puts them
in place beforehand: out of npm packages where npm is installed, else through visdom's own download.
Only the standard library is used, so that it runs in any interpreter that has visdom.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

NPM_SECONDS = 300
DOWNLOAD_SECONDS = 120

_GLYPHS = "glyphicons-halflings-regular"
_MATHJAX = (
    "MathJax.js",
    "config/Safe.js",
    "config/TeX-AMS-MML_HTMLorMML.js",
    "extensions/Safe.js",
    "jax/output/SVG/jax.js",
    "jax/output/SVG/config.js",
    "jax/output/SVG/fonts/TeX/fontdata.js",
    "jax/output/SVG/fonts/TeX/Size1/Regular/Main.js",
)

# npm package: {path in the package: path or paths under visdom/static}
ASSETS: dict[str, dict[str, str | tuple[str, ...]]] = {
    "jquery@3.1.1": {"dist/jquery.min.js": "js/jquery.min.js"},
    "bootstrap@3.3.7": {
        "dist/js/bootstrap.min.js": "js/bootstrap.min.js",
        "dist/css/bootstrap.min.css": "css/bootstrap.min.css",
        **{
            f"dist/fonts/{_GLYPHS}.{kind}": f"fonts/{_GLYPHS}.{kind}"
            for kind in ("eot", "woff2", "woff", "ttf")
        },
        # visdom looks for the name with the fragment, the style sheet for the one without.
        f"dist/fonts/{_GLYPHS}.svg": (
            f"fonts/{_GLYPHS}.svg",
            f"fonts/{_GLYPHS}.svg#glyphicons_halflingsregular",
        ),
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

# visdom's own download leaves out this name, and the page works without it.
_OPTIONAL = {f"fonts/{_GLYPHS}.svg"}


class AssetError(Exception):
    """The assets could not be had; the text is one line for the user."""


def _targets(target: str | tuple[str, ...]) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else target


def static_dir() -> Path | None:
    """The folder `visdom/static` of this interpreter, None where visdom is not installed."""
    try:
        spec = importlib.util.find_spec("visdom")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "static"


def visdom_version(static: Path) -> str:
    """The version as visdom itself reads it and compares it with `version.built`."""
    try:
        return (static.parent / "VERSION").read_text().strip()
    except OSError:
        return "no_version_file"


def missing_assets(static: Path) -> list[str]:
    """The files under `static` that the page needs and that are absent or empty."""
    wanted = [t for files in ASSETS.values() for one in files.values() for t in _targets(one)]
    missing = []
    for name in wanted:
        if name in _OPTIONAL:
            continue
        path = static / name
        if not path.is_file() or path.stat().st_size == 0:
            missing.append(name)
    return missing


def up_to_date(static: Path) -> bool:
    """Whether every file is there and visdom will not try to download any at its start."""
    try:
        built = (static / "version.built").read_text().strip()
    except OSError:
        return False
    return built == visdom_version(static) and not missing_assets(static)


def _write(path: Path, content: bytes) -> None:
    """Write through a temporary name, so that an interrupted run leaves no torn file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fetch_with_npm(static: Path, npm: str) -> None:
    """Fetch the packages with `npm pack` (nothing of them is run) and copy out what is needed."""
    with tempfile.TemporaryDirectory(prefix="visdom-assets-") as folder:
        command = [npm, "pack", "--ignore-scripts", "--silent", *ASSETS]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=NPM_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise AssetError(f"npm took longer than {NPM_SECONDS} s") from None
        except OSError as e:
            raise AssetError(f"npm could not be run: {e}") from None
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise AssetError(f"npm pack failed: {lines[-1]}")
        for package, files in ASSETS.items():
            archive = Path(folder) / f"{package.replace('@', '-')}.tgz"
            _unpack(archive, files, static)


def _unpack(archive: Path, files: dict[str, str | tuple[str, ...]], static: Path) -> None:
    """Copy `files` out of a package's archive, read once from front to back."""
    left = {f"package/{source}": _targets(target) for source, target in files.items()}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                targets = left.pop(member.name, None)
                stream = tar.extractfile(member) if targets else None
                if targets and stream:
                    content = stream.read()
                    for target in targets:
                        _write(static / target, content)
                if not left:
                    break
    except (OSError, tarfile.TarError) as e:
        raise AssetError(f"{archive.name} can't be read: {e}") from None


def fetch_with_visdom(static: Path) -> None:
    """Let visdom download its files, in a process of its own because it has no time limit."""
    # It believes a `version.built` of its version and then fetches no torn or empty file again.
    (static / "version.built").unlink(missing_ok=True)
    for name in missing_assets(static):
        (static / name).unlink(missing_ok=True)
    code = "from visdom.server.build import download_scripts; download_scripts()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            cwd=static,
        )
    except subprocess.TimeoutExpired:
        raise AssetError(f"visdom's download took longer than {DOWNLOAD_SECONDS} s") from None
    finally:
        # It is written even where files failed, and would keep the next start from trying.
        if missing_assets(static):
            (static / "version.built").unlink(missing_ok=True)
    if done.returncode or missing_assets(static):
        # A file that fails is only logged, with an exit code of 0.
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise AssetError(f"visdom's download failed: {lines[-1]}")


def install() -> str:
    """Put the files in place unless they are; returns one line that says what was done.

    Raises:
        AssetError: visdom is missing, or the files could not be had.
    """
    static = static_dir()
    if static is None:
        raise AssetError(f"visdom is not installed for {sys.executable}")
    version = visdom_version(static)
    if up_to_date(static):
        return f"visdom {version}: the page's files are in place"

    tried = []
    npm = shutil.which("npm")
    if missing_assets(static) and npm:
        try:
            fetch_with_npm(static, npm)
        except (AssetError, OSError) as e:
            tried.append(str(e))
    if missing_assets(static):
        try:
            fetch_with_visdom(static)
        except (AssetError, OSError) as e:
            tried.append(str(e))
    missing = missing_assets(static)
    if missing:
        why = "; ".join(" ".join(t.split())[:200] for t in tried) or "no reason given"
        raise AssetError(
            f"visdom's page lacks {len(missing)} file(s), {missing[0]} for one: {why}. "
            "Training works without the live page; run scripts/setup_visdom.sh again with a net"
        )
    _write(static / "version.built", version.encode())
    return f"visdom {version}: the page's files have been put in place"


def main() -> int:
    """Entry point: one line on stdout or stderr, exit code 1 where the page would not work."""
    try:
        print(install())
    except AssetError as e:
        print(f"setup_visdom: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
