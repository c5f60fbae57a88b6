"""One folder of images: for applying a generator."""

from __future__ import annotations

from typing import Any

from .base_dataset import BaseDataset, get_transform


class SingleDataset(BaseDataset):
    """Takes A from the files in `<dataroot>` and the folders below it."""

    paired = False

    def __init__(self, opt):
        super().__init__(opt)
        self.A_paths = self.list_images(opt.dataroot)
        self.transform_A = get_transform(opt, channels=opt.input_nc)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`A`: a tensor (C, H, W) in [-1, 1]; `A_paths`."""
        path = self.A_paths[index]
        return {"A": self.load(path, self.transform_A), "A_paths": path}

    def __len__(self) -> int:
        return len(self.A_paths)
