"""Colorization: pix2pix in Lab space, from lightness to colour."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from skimage import color

from util.errors import UserError

from .pix2pix_model import Pix2PixModel


class ColorizationModel(Pix2PixModel):
    """Predicts ab (2 channels) from L (1 channel); the display shows both combined as RGB."""

    recordable = True  # each iteration does the same: see BaseModel
    shows_batches = False  # `lab2rgb` takes the first image of a batch

    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        """Set the defaults of pix2pix, but with the colorization dataset."""
        Pix2PixModel.modify_commandline_options(parser, is_train)
        parser.set_defaults(dataset_mode="colorization")
        return parser

    @staticmethod
    def check_options(opt):
        """Refuse numbers of channels other than those of L and ab."""
        if (opt.input_nc, opt.output_nc) != (1, 2):
            raise UserError(
                "--model colorization needs --input_nc 1 --output_nc 2 (L and ab), got "
                f"{opt.input_nc} and {opt.output_nc}: say --dataset_mode colorization"
            )
        Pix2PixModel.check_options(opt)

    def __init__(self, opt):
        super().__init__(opt)
        self.visual_names = ["real_A", "real_B_rgb", "fake_B_rgb"]

    def lab2rgb(self, L: torch.Tensor, AB: torch.Tensor) -> np.ndarray:
        """The first image of a batch, from L (N, 1, H, W) and ab (N, 2, H, W) in about [-1, 1].

        Returns RGB (H, W, 3) with values in [0, 255] as floats.
        """
        lab = torch.cat([(L[:1] + 1.0) * 50.0, AB[:1] * 110.0], dim=1)
        array = lab.detach()[0].float().cpu().numpy().transpose(1, 2, 0).astype(np.float64)
        with warnings.catch_warnings():
            # predicted colours outside of sRGB are clipped
            warnings.filterwarnings("ignore", message="Conversion from CIE-LAB")
            return color.lab2rgb(array) * 255

    def compute_visuals(self):
        """Combine L and ab into RGB for the display."""
        self.real_B_rgb = self.lab2rgb(self.real_A, self.real_B)
        self.fake_B_rgb = self.lab2rgb(self.real_A, self.fake_B)
