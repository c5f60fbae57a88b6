"""Model files as people write them for the original: nothing of this code's own is in them."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import torch

from models import create_model
from models.attributes import orphan_tensors
from options.train_options import TrainOptions

FOLDER = Path(__file__).parent
NAMES = sorted(p.stem.removesuffix("_model") for p in FOLDER.glob("*_model.py"))
FLAGS = (
    "--gpu_ids -1 --name x --ngf 4 --ndf 4 --netG resnet_6blocks --norm instance --no_dropout "
    "--display_id 0 --seed 3 --pool_size 0 --batch_passes off --dataset_mode unaligned"
)


def put_in_place() -> None:
    """Make `--model NAME` find these files."""
    import models

    if str(FOLDER) not in models.__path__:
        models.__path__.append(str(FOLDER))


def build(name: str, folder: Any, flags: str = "") -> Any:
    """A model of these files, set up for training; always with the same weights."""
    put_in_place()
    argv = f"--dataroot {folder} --checkpoints_dir {folder} --model {name} {FLAGS} {flags}"
    opt = TrainOptions(argv).parse(save=False)
    torch.manual_seed(0)
    model = create_model(opt)
    model.setup(opt)
    model.watch_attributes()
    return model


@functools.cache
def picture(number: int, dtype: torch.dtype) -> torch.Tensor:
    """Two images (1, 3, 32, 32), the same for each number."""
    generator = torch.Generator().manual_seed(number)
    return (torch.rand(2, 1, 3, 32, 32, generator=generator) * 2 - 1).to(dtype)


def batch(*numbers: int) -> dict[str, Any]:
    """A batch of the images of these numbers."""
    A, B = torch.cat([picture(n, torch.get_default_dtype()) for n in numbers], 1)
    paths = [str(n) for n in numbers]
    return {"A": A, "B": B, "A_paths": paths, "B_paths": paths}


def train(model: Any, *batches: dict[str, Any]) -> Any:
    """Train an iteration with each batch, as train.py does."""
    for data in batches:
        model.set_input(data)
        model.optimize_parameters()
        model.get_current_losses()
    return model


def resume(saved: Any, fresh: Any) -> Any:
    """A new model goes on from the state of another, as with --continue_train."""
    saved.save_networks("latest")
    file = io.BytesIO()
    torch.save(saved.training_state(), file)
    file.seek(0)
    fresh.load_networks("latest")
    fresh.load_training_state(torch.load(file, weights_only=True), vars(saved.opt))
    return fresh


def weights(model: Any) -> dict[str, torch.Tensor]:
    """All that the model trains, in any attribute."""
    found = {
        f"{name}.{key}": value.detach().clone()
        for name, net in model.all_modules().items()
        for key, value in net.state_dict().items()
    }
    return found | {f"tensor {i}": t.clone() for i, t in orphan_tensors(model).items()}
