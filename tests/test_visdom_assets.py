"""The files of visdom's page: put in place from packages, mended, and never half there."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from util.display import visdom_assets
from util.display.visdom_assets import ASSETS, install, missing_assets, up_to_date
from util.errors import UserError

# Stands for npm: writes an archive for each package asked for, with every file of the table.
FALSE_NPM = """#!{python}
import io, os, sys, tarfile
sys.path.insert(0, {root!r})
from util.display.visdom_assets import ASSETS
open({calls!r}, "a").write("call\\n")
if os.environ.get("FALSE_NPM") == "fails":
    sys.exit("npm ERR! network\\nnpm ERR! no route")
for package in (a for a in sys.argv[2:] if not a.startswith("-")):
    with tarfile.open(package.replace("@", "-") + ".tgz", "w:gz") as tar:
        for name in ["README.md", *ASSETS[package]]:
            info = tarfile.TarInfo("package/" + name)
            info.size = len(package)
            tar.addfile(info, io.BytesIO(package.encode()))
"""


@pytest.fixture
def static(tmp_path: Path, monkeypatch) -> Path:
    """An installed visdom without its files, and a false npm that counts its calls."""
    static = tmp_path / "visdom" / "static"
    static.mkdir(parents=True)
    (tmp_path / "visdom" / "VERSION").write_text("0.2.4\n")
    monkeypatch.setattr(visdom_assets, "static_dir", lambda: static)
    npm = tmp_path / "npm"
    root = str(Path(__file__).resolve().parents[1])
    calls = str(tmp_path / "calls")
    npm.write_text(FALSE_NPM.format(python=sys.executable, root=root, calls=calls))
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(visdom_assets.shutil, "which", lambda name: str(npm))

    def no_net(*args):
        raise UserError("no route to unpkg")

    monkeypatch.setattr(visdom_assets, "download_with_visdom", no_net)
    return static


def calls(static: Path) -> int:
    path = static.parent.parent / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_put_in_place_once_and_mended(static):
    assert len(missing_assets(static)) == 29
    assert "have been put in place" in install()
    assert up_to_date(static)
    assert (static / "js/plotly-plotly.min.js").read_text() == "plotly.js-dist-min@2.11.1"
    assert (static / "js/mathjax/2.7.5/jax/output/SVG/fonts/TeX/Size1/Regular/Main.js").exists()
    assert not list(static.rglob("*.tmp*"))
    assert "are in place" in install()
    assert calls(static) == 1

    (static / "js/sjcl.js").write_bytes(b"")
    (static / "fonts/classnames").unlink()
    assert missing_assets(static) == ["js/sjcl.js", "fonts/classnames"]
    install()
    assert up_to_date(static)
    assert calls(static) == 2

    (static / "version.built").write_text("0.2.3")  # visdom would fetch everything again
    assert not up_to_date(static)
    install()
    assert up_to_date(static)
    assert calls(static) == 2  # the files themselves are there


def test_without_npm_and_net(static, monkeypatch):
    monkeypatch.setenv("FALSE_NPM", "fails")
    with pytest.raises(UserError) as raised:
        install()
    said = str(raised.value)
    assert "\n" not in said
    assert "(visdom's download: no route to unpkg; npm: npm ERR! no route)" in said
    assert "scripts/setup_visdom.sh" in said
    assert not (static / "version.built").exists()


def test_visdoms_own_download_comes_first(static, monkeypatch):
    def download(folder):
        for name in missing_assets(folder):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("from unpkg")

    monkeypatch.setattr(visdom_assets, "download_with_visdom", download)
    install()
    assert up_to_date(static)
    assert calls(static) == 0


def test_commands_that_hang(static, monkeypatch):
    def hang(*args, timeout, **kwargs):
        assert timeout == visdom_assets.SECONDS
        raise subprocess.TimeoutExpired("npm", timeout)

    monkeypatch.setattr(visdom_assets.subprocess, "run", hang)
    with pytest.raises(UserError, match="npm: it took longer than 120 s"):
        install()


def test_no_visdom(monkeypatch):
    monkeypatch.setattr(visdom_assets, "static_dir", lambda: None)
    with pytest.raises(UserError, match="visdom is not installed"):
        install()


def test_packages_have_exact_versions():
    assert all(package.rpartition("@")[2].count(".") == 2 for package in ASSETS)
