"""Find the class for a name on the command line; used by `models` and `data`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil

from .errors import UserError


def find_class(package: str, kind: str, name: str, base: type) -> type:
    """The subclass of `base` in `<package>/<name>_<kind>.py` that is named `<name><kind>`.

    Ignores underscores and case: `cycle_gan` of kind `model` is `CycleGANModel`. Raises UserError,
    which lists the known names, if the file or the class is missing.
    """
    module_name, folder = f"{package}.{name}_{kind}", package.rpartition(".")[2]
    known = available_names(package, kind)
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown {kind} '{name}': choose from {', '.join(known)}{meant}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        missing = (e.name or "").split(".")[0]
        if not missing or importlib.util.find_spec(missing) is not None:
            raise  # the package is there, one of its modules is not: a bug, shown as such
        raise UserError(
            f"{folder}/{name}_{kind}.py needs the package {missing}, which is not installed: "
            f"pip install {missing}"
        ) from e
    wanted = f"{name}{kind}".replace("_", "").lower()
    for attribute, value in vars(module).items():
        if attribute.lower() == wanted and isinstance(value, type) and issubclass(value, base):
            if "initialize" in vars(value) and "__init__" not in vars(value):
                raise UserError(
                    f"{folder}/{name}_{kind}.py is of the original code of 2017: rename its "
                    "initialize(self, opt) to __init__ and begin it with super().__init__(opt)"
                )
            return value
    called = "".join(part.capitalize() for part in (*name.split("_"), kind))
    values = vars(module).values()
    own = [c.__name__ for c in values if isinstance(c, type) and c.__module__ == module_name]
    raise UserError(
        f"{folder}/{name}_{kind}.py must hold `class {called}({base.__name__})` and has "
        f"{', '.join(own) or 'no class'}"
    )


def available_names(package: str, kind: str) -> list[str]:
    """Names for which a package has a file, such as `cycle_gan` for `cycle_gan_model.py`."""
    path = importlib.import_module(package).__path__
    ending = f"_{kind}"
    return sorted(
        m.name.removesuffix(ending)
        for m in pkgutil.iter_modules(path)
        if m.name.endswith(ending) and m.name != f"base{ending}"
    )
