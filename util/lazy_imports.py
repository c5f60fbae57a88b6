"""Modules that are loaded when something of them is used, not when they are imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence


class LazyFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of these names, with a loader that waits for the first use."""

    def __init__(self, *names: str):
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


# `import torchvision` imports all of these, and they PyTorch's compiler: half the time of a start
sys.meta_path.insert(0, LazyFinder("torchvision.models", "torchvision.ops", "torchvision.datasets"))
