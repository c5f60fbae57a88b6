"""The packages of this project under one name, for use in other programs.

    from image_translation import load_generator

    G = load_generator("checkpoints/maps_cyclegan", "AtoB")
    out = G(Image.open("photo.jpg"))

`data`, `models`, `options` and `util` are `image_translation.data` and so on here. A host program
may have packages of those names too: neither sees the other's.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models import Translator, load_generator
    from models.inference.export import export_generator as export
    from util.errors import UserError

__all__ = ["Translator", "UserError", "evaluate", "export", "load_generator"]

PACKAGES = ("data", "models", "options", "util")
# installed, the packages are in this folder; in a clone of the repository, beside it
_HERE = Path(__file__).resolve().parent
_ROOT = _HERE if (_HERE / "models").is_dir() else _HERE.parent


class _UnderThisName(ast.NodeTransformer):
    """Makes `from util.errors import x` mean `from image_translation.util.errors import x`."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.level == 0 and (node.module or "").split(".")[0] in PACKAGES:
            node.module = f"{__name__}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> list[ast.AST]:
        more: list[ast.AST] = []
        for name in node.names:
            room = name.name.split(".")[0]
            if room not in PACKAGES:
                continue
            dotted = name.asname is None and room != name.name
            if dotted:  # `import util.errors` binds `util`
                alias = ast.alias(f"{__name__}.{room}", room)
                more.append(ast.copy_location(ast.Import([alias]), node))
            name.asname = name.asname or ("_" if dotted else room)
            name.name = f"{__name__}.{name.name}"
        return [node, *more]


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        # not from __pycache__, which has the code compiled under the plain names
        path = self.get_filename(fullname)
        tree = ast.fix_missing_locations(
            _UnderThisName().visit(ast.parse(self.get_data(path), path))
        )
        return compile(tree, path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: Any = None
    ) -> ModuleSpec | None:
        package, _, inner = fullname.partition(".")
        parts = inner.split(".")
        if package != __name__ or parts[0] not in PACKAGES:
            return None
        folder = _ROOT.joinpath(*parts)
        for file, inside in (
            (folder / "__init__.py", [str(folder)]),
            (folder.with_suffix(".py"), None),
        ):
            if file.exists():
                loader = _Loader(fullname, str(file))
                return spec_from_file_location(
                    fullname, file, loader=loader, submodule_search_locations=inside
                )
        return None


sys.meta_path.insert(0, _Finder())


def evaluate(**options: Any) -> dict[str, Any]:
    """The report of `scripts/evaluate.py`, given its options: `dataroot`, `name`, ...

    Flags are given as True, options with several values, and `scores`, as a tuple or a list:
    `value_range=(0, 4095)`. Raises UserError if something is missing, or an option is wrong.
    """
    from .data import create_dataset
    from .models.inference.loading import unchanged_process
    from .models.inference.testing import model_for_testing
    from .options.evaluate_options import EvaluateOptions
    from .util.errors import RaisingParser
    from .util.scores.evaluation import evaluate as score

    words: list[str] = []
    for name, value in options.items():
        if name == "scores" and isinstance(value, (tuple, list)):
            words.append(f"--scores={','.join(value)}")
        elif isinstance(value, (tuple, list)):
            words += [f"--{name}", *map(str, value)]
        elif value is not False and value is not None:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    # prints go to stderr: stdout belongs to the host program
    with unchanged_process(sys.stderr):
        options_of_call = EvaluateOptions(words)
        options_of_call.PARSER = RaisingParser
        opt = options_of_call.parse(save=False)
        dataset = create_dataset(opt)
        options_of_call.decide_compile(opt, int(min(opt.num_test, len(dataset))))
        return score(opt, model_for_testing(opt), dataset)


def __getattr__(name: str) -> Any:
    # imported lazily: what these need takes seconds to import
    if name in ("Translator", "load_generator"):
        from . import models

        return getattr(models, name)
    if name == "export":
        from .models.inference.export import export_generator

        return export_generator
    if name == "UserError":
        from .util.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
