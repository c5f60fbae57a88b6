"""The package `image_translation`: installed, and beside a host's packages of the same names."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import image_translation
from image_translation import UserError, evaluate, export, load_generator
from tests.helpers import (
    ROOT,
    SHORT,
    TINY,
    aligned,
    copy_of_code,
    run_process,
    succeed,
    undisturbed,
)

tomllib = pytest.importorskip("tomllib", reason="a part of Python from 3.11 on")
PROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    where = ["--dataroot", aligned(root / "data"), "--checkpoints_dir", root, "--name", "x"]
    succeed("train.py", *where, "--model", "pix2pix", *TINY, *SHORT)
    return root


HOST = {
    "util/__init__.py": "WHOSE = 'the host'\n",
    "util/errors.py": "class UserError(Exception): pass\n",
    "data.py": "WHOSE = 'the host'\n",
    "models/__init__.py": "WHOSE = 'the host'\nfrom util.errors import UserError\n",
}
BEFORE = "import util.errors, data, models\n"
AFTER = """
assert util.WHOSE == data.WHOSE == models.WHOSE == 'the host'
assert models.UserError is util.errors.UserError
"""
USE = """
import sys
import warnings
import numpy as np
import PIL.Image
import torchvision
filters, path, modules = list(warnings.filters), list(sys.path), set(sys.modules)
import image_translation
from image_translation import load_generator, Translator, UserError
G = load_generator(sys.argv[1], device='cpu')
assert isinstance(G, Translator)
assert G(np.zeros((20, 24, 3), np.uint8)).shape == (20, 24, 3)
assert sys.path == path
assert list(warnings.filters) == filters
new = set(sys.modules) - modules
assert not {'util', 'data', 'models', 'options'} & new, new
try:
    G(np.zeros(3))
except ValueError as e:
    assert isinstance(e, UserError)
    assert not isinstance(e, sys.modules['util.errors'].UserError if 'util' in modules else ())
"""


@pytest.mark.parametrize("program", [BEFORE + USE + AFTER, USE + BEFORE + AFTER])
def test_a_host_with_packages_of_the_same_names(trained, tmp_path, program):
    for name, text in HOST.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    # as pip install -e . does it: the name leads to the folder in the clone
    site = tmp_path / "site"
    site.mkdir()
    (site / "image_translation").symlink_to(ROOT / "image_translation")
    (tmp_path / "host.py").write_text(program)
    result = run_process("host.py", trained / "x", cwd=tmp_path, more={"PYTHONPATH": str(site)})
    assert (result.code, result.err) == (0, "")


@pytest.mark.slow
def test_installed_by_pip(trained, tmp_path):
    clone = copy_of_code(tmp_path / "clone")
    shutil.copytree(ROOT / "image_translation", clone / "image_translation")
    for name in ("pyproject.toml", "README.md", "requirements.txt"):
        shutil.copy(ROOT / name, clone)
    site = tmp_path / "site"
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([sys.executable, *words, "--target", site, clone], check=True, timeout=240)
    assert {p.name for p in site.iterdir() if "info" not in p.name} == {"image_translation"}
    shutil.rmtree(clone)
    (tmp_path / "host.py").write_text(USE)
    result = run_process("host.py", trained / "x", cwd=tmp_path, more={"PYTHONPATH": str(site)})
    assert (result.code, result.err) == (0, "")


def test_every_folder_is_packaged():
    project = tomllib.loads(PROJECT)
    rooms = [f for name in image_translation.PACKAGES for f in (ROOT / name).rglob("__init__.py")]
    folders = {".".join(file.relative_to(ROOT).parent.parts) for file in rooms}
    packages = set(project["tool"]["setuptools"]["packages"])
    assert packages == {"image_translation"} | {f"image_translation.{f}" for f in folders}


def test_dependencies_are_those_of_the_requirements():
    wanted = (ROOT / "requirements.txt").read_text()
    for line in tomllib.loads(PROJECT)["project"]["dependencies"]:
        assert re.search(rf"^{re.escape(line)}\b", wanted, re.MULTILINE), line


def test_names_of_one_import_statement():
    statement = "import data, util.errors, options, models as m, util.files as f, json"
    tree = image_translation._UnderThisName().visit(ast.parse(statement))
    names: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), "x", "exec"), names)
    found = {key: names[key].__name__ for key in ("data", "util", "options", "m", "f", "json")}
    own = {key: f"image_translation.{key}" for key in ("data", "util", "options")}
    more = {"m": "image_translation.models", "f": "image_translation.util.files", "json": "json"}
    assert found == own | more


def test_options_of_several_values(trained):
    with undisturbed():
        facts = [
            evaluate(
                dataroot=trained / "data",
                checkpoints_dir=trained,
                name="x",
                crop_size=32,
                scores="L1",
                seed=1,
                **more,
            )
            for more in ({"value_range": (0, 255)}, {"value_range": [0, 255]}, {})
        ]
    values = [f["scores"]["fake_B"]["L1"]["value"] for f in facts]
    # of images that are scaled before they are rounded to 8 bits, not after
    assert values[0] == values[1] == pytest.approx(values[2], rel=0.05)


def test_what_is_exported(trained, tmp_path, capfd):
    with undisturbed():
        facts = evaluate(
            dataroot=trained / "data",
            checkpoints_dir=trained,
            name="x",
            crop_size=32,
            scores="L1",
            netG="resnet_6blocks",
        )
    assert 0 < facts["scores"]["fake_B"]["L1"]["value"] < 1
    written = export(trained / "x", "torchscript", tmp_path / "a.pt")
    assert capfd.readouterr().out == ""
    assert written.path == tmp_path / "a.pt"
    assert max(written.differences.values()) < 1e-4
    G = load_generator(trained / "x", device="cpu")
    with pytest.raises(UserError, match="a Translator in place of an experiment's folder"):
        export(G, "torchscript")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no such folder; make it, or choose another --output"):
        export(trained / "x", "torchscript", tmp_path / "b" / "c" / "a.pt")
    assert not (tmp_path / "b").exists()
    with pytest.raises(UserError, match=r"unknown option '--metric=L1'"):
        evaluate(dataroot=trained / "data", name="x", metric="L1")
    with pytest.raises(UserError, match="--dataroot"):
        evaluate(name="x")
    with pytest.raises(UserError, match="--scores"):
        evaluate(dataroot=trained / "data", checkpoints_dir=trained, name="x", scores="L7")
    with pytest.raises(UserError, match="no folder"):
        load_generator(trained / "y")
    with pytest.raises(AttributeError):
        image_translation.nothing  # noqa: B018
