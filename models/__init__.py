"""Models by name.

To add a model `dummy`, write `models/dummy_model.py` with a subclass of `BaseModel` called
`DummyModel`; then say `--model dummy`. See `template_model.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from util.errors import UserError
from util.files import TextPath
from util.find_class import find_class

from .base_model import BaseModel

if TYPE_CHECKING:
    from .inference.loading import load_generator
    from .inference.translator import Translator

__all__ = [
    "BaseModel",
    "Translator",
    "create_model",
    "find_model_using_name",
    "get_option_setter",
    "load_generator",
]


def __getattr__(name: str) -> Any:
    # not imported at the top: it takes a second, and training does not need it
    if name in ("Translator", "load_generator"):
        from .inference import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find_model_using_name(model_name: str) -> type[BaseModel]:
    """The class in `models/<name>_model.py` that is called `<name>model`, ignoring case.

    Raises UserError for an unknown name.
    """
    return find_class(__name__, "model", model_name, BaseModel)


def get_option_setter(model_name: str) -> Callable:
    """The `modify_commandline_options` of that model."""
    return find_model_using_name(model_name).modify_commandline_options


def create_model(opt: argparse.Namespace) -> BaseModel:
    """Create the model of `opt.model`; call its `setup` before use."""
    model = find_model_using_name(opt.model)(opt)
    model.save_dir = TextPath(model.save_dir)  # a model of the original code may set a string
    for name, value in vars(model).items():
        if callable(getattr(BaseModel, name, None)) and not callable(value):
            raise UserError(
                f"{type(model).__name__} sets self.{name}, which hides the method of BaseModel: "
                "give it another name"
            )
    print(f"model [{type(model).__name__}] was created")
    return model
