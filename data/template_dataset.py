"""A dataset to start your own from.

Copy this file to `data/<name>_dataset.py`, name the class `<Name>Dataset`, and train with
`--dataset_mode <name>`. Nothing has to be registered: the name finds the file, the file the class.
"""

from __future__ import annotations

from typing import Any

from .base_dataset import BaseDataset, get_transform


class TemplateDataset(BaseDataset):
    """Gives each image below `<dataroot>` as both A and B: a generator can learn to copy it."""

    @staticmethod
    def modify_commandline_options(parser, is_train):
        """Add options that only this dataset has, or change the defaults of others.

        This runs before the final parse, so what is added shows in --help and in the saved options.
        """
        parser.add_argument("--new_dataset_option", type=float, default=1.0, help="an example")
        # other defaults for this dataset
        parser.set_defaults(max_dataset_size=10)
        return parser

    def __init__(self, opt):
        """List the files, and build the transforms that are the same for all of them."""
        super().__init__(opt)  # keeps opt, and the dataroot as self.root
        # sorted, limited by --max_dataset_size, and with a clear error if there is nothing
        self.image_paths = self.list_images(opt.dataroot)
        # what --preprocess, --load_size, --crop_size and --no_flip say
        self.picture_transform = get_transform(opt, channels=opt.input_nc)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return what the model's `set_input` reads. Draw random numbers as you like.

        Use `random` or `torch`: the loader seeds both for each item, so that a run can be
        repeated and resumed whatever the number of workers.
        """
        path = self.image_paths[index]
        picture = self.load(path, self.picture_transform)  # (C, H, W) in [-1, 1]
        return {"A": picture, "B": picture.clone(), "A_paths": path, "B_paths": path}

    def __len__(self) -> int:
        """The number of items in an epoch."""
        return len(self.image_paths)
