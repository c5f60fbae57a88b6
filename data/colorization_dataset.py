"""Colour images in Lab space: lightness in, colour out."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from skimage import color

from util.errors import UserError

from .base_dataset import BaseDataset, get_transform


class ColorizationDataset(BaseDataset):
    """Takes RGB images from `<dataroot>/<phase>` and splits them into L and ab (CIE Lab, D65)."""

    paired = True

    @staticmethod
    def modify_commandline_options(parser, is_train):
        """Set the defaults to one channel in (L), and two out (a and b)."""
        parser.set_defaults(input_nc=1, output_nc=2, direction="AtoB")
        return parser

    def __init__(self, opt):
        super().__init__(opt)
        if (opt.input_nc, opt.output_nc, opt.direction) != (1, 2, "AtoB"):
            raise UserError(
                "--dataset_mode colorization needs --input_nc 1 --output_nc 2 --direction AtoB, "
                f"got {opt.input_nc}, {opt.output_nc} and {opt.direction}"
            )
        if opt.value_range:
            raise UserError("--dataset_mode colorization reads 8-bit colour: no --value_range")
        self.dir = os.path.join(opt.dataroot, opt.phase)
        self.AB_paths = self.list_images(self.dir)
        self.rgb_transform = get_transform(opt, convert=False)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`A`: L (1, H, W), `B`: ab (2, H, W), both roughly in [-1, 1]; `A_paths`, `B_paths`."""
        path = self.AB_paths[index]
        lab = color.rgb2lab(np.array(self.load(path, self.rgb_transform))).astype(np.float32)
        channels = torch.from_numpy(lab.transpose(2, 0, 1).copy())
        return {
            "A": channels[:1] / 50.0 - 1.0,  # L is in [0, 100]
            "B": channels[1:] / 110.0,  # a and b are within 110 of 0 for all of sRGB
            "A_paths": path,
            "B_paths": path,
        }

    def __len__(self) -> int:
        return len(self.AB_paths)
