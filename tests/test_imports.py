"""Imports point one way: util < data < models < options < programs; old import paths still work."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT, run_process

ROOMS = ["util", "data", "models", "options", "programs"]

# what code that was written for the original imports, and what this project promises
PATHS = {
    "util.util": "tensor2im save_image diagnose_network print_numpy mkdir mkdirs",
    "util.html": "HTML",
    "util.image_pool": "ImagePool",
    "util.visualizer": "Visualizer save_images",
    "util.get_data": "GetData",
    "models": "create_model find_model_using_name get_option_setter load_generator Translator",
    "models.base_model": "BaseModel",
    "models.networks": "define_G define_D get_norm_layer get_scheduler init_net init_weights "
    "Identity GANLoss cal_gradient_penalty ResnetGenerator ResnetBlock UnetGenerator "
    "UnetSkipConnectionBlock NLayerDiscriminator PixelDiscriminator",
    "models.cycle_gan_model": "CycleGANModel",
    "models.pix2pix_model": "Pix2PixModel",
    "models.colorization_model": "ColorizationModel",
    "models.test_model": "TestModel",
    "models.template_model": "TemplateModel",
    "data": "create_dataset find_dataset_using_name get_option_setter CustomDatasetDataLoader",
    "data.base_dataset": "BaseDataset get_params get_transform",
    "data.image_folder": "IMG_EXTENSIONS is_image_file make_dataset default_loader ImageFolder",
    "data.aligned_dataset": "AlignedDataset",
    "data.unaligned_dataset": "UnalignedDataset",
    "data.single_dataset": "SingleDataset",
    "data.colorization_dataset": "ColorizationDataset",
    "data.template_dataset": "TemplateDataset",
    "options.base_options": "BaseOptions",
    "options.train_options": "TrainOptions",
    "options.test_options": "TestOptions",
    "util.plot_losses": "",
}


def room(name: str) -> int | None:
    """The place of a module in the order; None for one of somebody else's."""
    top = name.split(".")[0]
    if top in ROOMS:
        return ROOMS.index(top)
    programs = {path.stem for path in ROOT.glob("*.py")} | {"scripts", "datasets"}
    return ROOMS.index("programs") if top in programs else None


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each module that is imported by its full name, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # a relative import stays in its room
            assert node.level <= 2
            if node.level == 0 and node.module:
                yield node.lineno, node.module


def sources() -> list[Path]:
    """The Python files of the rooms below the programs."""
    return sorted(path for name in ROOMS[:-1] for path in (ROOT / name).rglob("*.py"))


def test_no_import_points_upward():
    upward = []
    for path in sources():
        relative = path.relative_to(ROOT)
        own = ROOMS.index(relative.parts[0])
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            other = room(name)
            if other is not None and other > own:
                upward.append(f"{relative}:{line} imports {name}")
    assert len(sources()) > 50
    assert upward == []


def test_relative_imports_stay_in_their_room():
    for path in sources():
        depth = len(path.relative_to(ROOT).parts) - 1  # 1 right in the room
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, f"{path}:{node.lineno}"


def test_errors_need_only_the_standard_library():
    tree = ast.parse((ROOT / "util" / "errors.py").read_text(encoding="utf-8"))
    names = {name.split(".")[0] for _, name in imported(tree)}
    assert names <= set(sys.stdlib_module_names)
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


@pytest.mark.parametrize("module", PATHS)
def test_paths_that_others_rely_on(module):
    found = importlib.import_module(module)
    missing = [name for name in PATHS[module].split() if not hasattr(found, name)]
    assert missing == []


def test_an_import_leaves_warning_filters_alone():
    code = (
        "import torch, torchvision, warnings; before = list(warnings.filters); "
        "import data, models; print(len(set(map(str, warnings.filters)) - set(map(str, before))))"
    )
    result = run_process("-c", code, cwd=ROOT)
    assert (result.code, result.out.strip()) == (0, "0"), result.err


def test_torchvision_is_whole_and_no_finder_stays():
    code = """
import sys, torch
before = list(sys.meta_path)
import data.base_dataset, data.aligned_dataset
assert sys.meta_path == before
assert not {"torchvision.models", "torchvision.ops", "torchvision.datasets"} & set(sys.modules)
import torchvision
assert not hasattr(torchvision, "nothing")
import torchvision.ops.misc
from torchvision import datasets
from torchvision.models import resnet
assert torchvision.ops.nms and torchvision.models.alexnet and datasets.CIFAR10
"""
    result = run_process("-c", code, cwd=ROOT)
    assert result.code == 0, result.err


def test_torchvision_of_the_host_stays_as_it_is():
    code = """
import sys, torchvision
before = dict(vars(torchvision)), sys.modules["torchvision.ops"]
import data.base_dataset
assert (dict(vars(torchvision)), sys.modules["torchvision.ops"]) == before
"""
    result = run_process("-c", code, cwd=ROOT)
    assert result.code == 0, result.err
