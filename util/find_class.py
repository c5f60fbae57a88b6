"""How a name on the command line becomes a class in a file: the factories' common part."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

from .util import UserError


def find_class(package: str, kind: str, name: str, base: type) -> type:
    """The subclass of `base` in `<package>/<name>_<kind>.py` that is named `<name><kind>`.

    Underscores and case do not count: `cycle_gan` of kind `model` is `CycleGANModel`. Raises
    UserError with the names there are where the file or the class is missing.
    """
    module_name = f"{package}.{name}_{kind}"
    if not name.isidentifier() or importlib.util.find_spec(module_name) is None:
        raise UserError(f"unknown {kind} '{name}': choose from {', '.join(names(package, kind))}")
    module = importlib.import_module(module_name)
    wanted = f"{name}{kind}".replace("_", "").lower()
    for attribute, value in vars(module).items():
        if attribute.lower() == wanted and isinstance(value, type) and issubclass(value, base):
            return value
    raise UserError(
        f"{package}/{name}_{kind}.py has no subclass of {base.__name__} whose name is "
        f"'{wanted}' in any case: name the class so"
    )


def names(package: str, kind: str) -> list[str]:
    """Names for which a package has a file, such as `cycle_gan` for `cycle_gan_model.py`."""
    path = importlib.import_module(package).__path__
    ending = f"_{kind}"
    return sorted(
        m.name.removesuffix(ending)
        for m in pkgutil.iter_modules(path)
        if m.name.endswith(ending) and m.name != f"base{ending}"
    )
