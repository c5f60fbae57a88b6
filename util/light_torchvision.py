"""torchvision's transforms, without what `import torchvision` loads beside them.

Its `datasets`, `models` and `ops` import PyTorch's compiler, which is half the time of a start.
They are imported at their first use instead. Python's import system stays as it is, and so does
torchvision where the program around this one has imported it already.
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
        return  # a version that needs them: the import below is the usual one
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
