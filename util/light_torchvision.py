"""torchvision's transforms, without what else `import torchvision` loads.

Its `datasets`, `models` and `ops` import PyTorch's compiler, which takes half the start-up time.
Here they are imported lazily, at their first use. Python's import system is not changed, nor is
torchvision if the surrounding program has imported it already.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

HEAVY = ("datasets", "models", "ops")


def _import_torchvision() -> None:
    if "torchvision" in sys.modules:
        return
    empty = {f"torchvision.{name}": ModuleType(f"torchvision.{name}") for name in HEAVY}
    sys.modules.update(empty)
    try:
        import torchvision
    except (ImportError, AttributeError):
        return  # a version that needs them: fall back to the plain import below
    finally:
        for name in empty:
            sys.modules.pop(name, None)

    def load(name: str) -> ModuleType:
        if name in HEAVY:
            return importlib.import_module(f"torchvision.{name}")
        raise AttributeError(f"module 'torchvision' has no attribute {name!r}")

    for name in HEAVY:
        if hasattr(torchvision, name):
            delattr(torchvision, name)
    torchvision.__getattr__ = load  # type: ignore[attr-defined]  # PEP 562


_import_torchvision()

import torchvision.transforms as transforms

__all__ = ["transforms"]
