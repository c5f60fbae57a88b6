"""Pairs of images: side by side in one file, or of the same name in two folders."""

from __future__ import annotations

import os
from typing import Any

from util.errors import UserError
from util.light_torchvision import transforms

from .base_dataset import BaseDataset, get_params, get_transform
from .cache import CachedImage
from .image_folder import parts_of_dataset
from .transforms import size_of, split_deterministic


class AlignedDataset(BaseDataset):
    """Takes A|B from the files in `<dataroot>/<phase>`.

    If that folder is missing, A and B come from files of the same name in `<dataroot>/<phase>A` and
    `<dataroot>/<phase>B`, provided that such folders exist for any phase.
    """

    paired = True

    def __init__(self, opt):
        super().__init__(opt)
        self.dir_AB = os.path.join(opt.dataroot, opt.phase)
        parts = parts_of_dataset(opt.dataroot)
        # folders of other phases count, so that errors are about this layout
        two_folders = bool(parts) and all(part.endswith(("A", "B")) for part in parts)
        two_folders = two_folders or os.path.isdir(self.dir_AB + "A")
        if two_folders and not os.path.isdir(self.dir_AB):
            self.AB_paths = self._pairs(self.dir_AB + "A", self.dir_AB + "B")
        else:
            self.AB_paths = [(path, path) for path in self.list_images(self.dir_AB, 2)]
        flipped = opt.direction == "BtoA"
        self.input_nc = opt.output_nc if flipped else opt.input_nc
        self.output_nc = opt.input_nc if flipped else opt.output_nc
        # the steps before the crop are deterministic, so they can be cached
        nothing = {"crop_pos": (0, 0), "flip": False}
        self.first = [split_deterministic(transform)[0] for transform in self._transforms(nothing)]

    def _pairs(self, dir_A: str, dir_B: str) -> list[tuple[str, str]]:
        """Files of two folders with the same relative path, apart from the extension."""
        sides = []
        for folder in (dir_A, dir_B):
            side: dict[str, str] = {}
            for path in self.list_images(folder):
                other = side.setdefault(os.path.splitext(os.path.relpath(path, folder))[0], path)
                if other != path:
                    raise UserError(
                        f"{other} and {path} differ in their endings only, so nothing says which "
                        "is the partner of an image on the other side: rename one of them"
                    )
            sides.append(side)
        unpaired = sorted(sides[0].keys() ^ sides[1].keys())
        if unpaired:
            raise UserError(
                f"{dir_A} and {dir_B} must hold files of the same names: {len(unpaired)} have no "
                f"partner, such as {', '.join(unpaired[:3])}; for images that are no pairs say "
                "--model cycle_gan"
            )
        return [(path, sides[1][name]) for name, path in sides[0].items()]

    def _open(self, A_path: str, B_path: str) -> tuple[Any, Any]:
        if A_path != B_path:
            A, B = self.open(A_path), self.open(B_path)
            sizes = [f"{width}x{height}" for width, height in map(size_of, (A, B))]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"a pair must be of one size: {A_path} is {sizes[0]} and {B_path} is {sizes[1]}"
                )
            return A, B
        AB = self.open(A_path)
        width, height = size_of(AB)
        if width % 2:
            raise UserError(
                f"{A_path} is {width}x{height}: a file with A and B side by side must be of even "
                "width"
            )
        half = width // 2
        crop = transforms.functional.crop
        return crop(AB, 0, 0, height, half), crop(AB, 0, half, height, half)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`A`, `B` (C, H, W) in [-1, 1] with the same crop and flip; `A_paths`, `B_paths`."""
        paths = A_path, B_path = self.AB_paths[index]
        first_A, first_B = self.first

        def make() -> list[CachedImage]:
            A, B = self._open(A_path, B_path)
            return [
                CachedImage(self.transform(A, first_A, A_path), size_of(A)),
                CachedImage(self.transform(B, first_B, B_path), size_of(B)),
            ]

        kept = self.keep([f"{A_path}\nA{first_A}", f"{B_path}\nB{first_B}"], make)
        params = get_params(self.opt, kept[0].original_size)
        A, B = (
            self.transform(side.image, split_deterministic(transform)[1], path)
            for side, transform, path in zip(kept, self._transforms(params), paths, strict=True)
        )
        return {"A": A, "B": B, "A_paths": A_path, "B_paths": B_path}

    def _transforms(self, params: dict[str, Any]) -> tuple[transforms.Compose, transforms.Compose]:
        return (
            get_transform(self.opt, params, channels=self.input_nc),
            get_transform(self.opt, params, channels=self.output_nc),
        )

    def __len__(self) -> int:
        return len(self.AB_paths)
