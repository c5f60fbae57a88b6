"""Two folders of images that do not belong together in pairs."""

from __future__ import annotations

import os
import random
from typing import Any

from .base_dataset import BaseDataset, get_transform


class UnalignedDataset(BaseDataset):
    """Takes A from `<dataroot>/<phase>A` and a B, drawn at random, from `<dataroot>/<phase>B`."""

    paired = False

    def __init__(self, opt):
        super().__init__(opt)
        self.dir_A = os.path.join(opt.dataroot, opt.phase + "A")
        self.dir_B = os.path.join(opt.dataroot, opt.phase + "B")
        self.A_paths = self.list_images(self.dir_A)
        self.B_paths = self.list_images(self.dir_B)
        self.A_size, self.B_size = len(self.A_paths), len(self.B_paths)
        flipped = opt.direction == "BtoA"
        channels_A, channels_B = opt.input_nc, opt.output_nc
        if flipped:
            channels_A, channels_B = channels_B, channels_A
        self.transform_A = get_transform(opt, channels=channels_A)
        self.transform_B = get_transform(opt, channels=channels_B)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`A` and `B`: tensors (C, H, W) in [-1, 1]; `A_paths` and `B_paths`."""
        A_path = self.A_paths[index % self.A_size]
        if self.opt.serial_batches:
            index_B = index % self.B_size
        else:
            # random, or the networks would learn fixed pairs
            index_B = random.randint(0, self.B_size - 1)
        B_path = self.B_paths[index_B]
        A = self.load(A_path, self.transform_A)
        B = self.load(B_path, self.transform_B)
        return {"A": A, "B": B, "A_paths": A_path, "B_paths": B_path}

    def __len__(self) -> int:
        """The size of the larger folder; images of the smaller one are used more than once."""
        return max(self.A_size, self.B_size)
