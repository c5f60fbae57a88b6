"""Modules that are executed on first use, not on import."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """A module that is executed when something is looked up that only its code defines.

    `importlib.util.LazyLoader` executes one for any attribute. `inspect` looks up `__file__` of all
    modules, and PyTorch calls it in the middle of its own imports, which became circular that way.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__loader__.exec_module(self)  # type: ignore[union-attr]
        return getattr(self, name)


class LazyLoader(importlib.abc.Loader):
    """Leaves a module to be executed by another loader later."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__class__ = LazyModule


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
            spec.loader = LazyLoader(spec.loader)
        return spec


# `import torchvision` imports these, and they import PyTorch's compiler: half of the start-up time
sys.meta_path.insert(0, LazyFinder("torchvision.models", "torchvision.ops", "torchvision.datasets"))
