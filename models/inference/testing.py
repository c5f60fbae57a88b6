"""A trained model as test.py and scripts/evaluate.py use it."""

from __future__ import annotations

import argparse

from models import create_model
from models.base_model import BaseModel

from .image_threads import compute_in_threads
from .recorded import record_passes
from .sizes import keep_sizes
from .tiles import TileOptions, tile_generators


def model_for_testing(opt: argparse.Namespace, in_threads: bool = False) -> BaseModel:
    """Load the model that the options describe, and apply --eval, --keep_size and --tile to it.

    With `--only_outputs` the last two are left to a `Translator`. `in_threads` computes batches on
    a CPU as `ImageThreads` does, which rounds differently.
    """
    model = create_model(opt)
    model.setup(opt)
    if opt.eval:
        model.eval()
    tiles = TileOptions.from_options(opt)
    if not (opt.compile or tiles):
        record_passes(model.networks().values())
        if in_threads:
            compute_in_threads(model.networks().values(), opt)
    if opt.keep_size and not opt.only_outputs:
        keep_sizes(model)
    if tiles and not opt.only_outputs:
        tile_generators(model, tiles, opt.precision)
    return model
