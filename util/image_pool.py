"""A buffer of generated images (Shrivastava et al. 2017, section 2.3)."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import torch


class ImagePool:
    """Keeps up to `pool_size` generated images, so that D also sees earlier outputs of G."""

    def __init__(self, pool_size: int):
        self.pool_size = pool_size
        self.images: list[torch.Tensor] = []

    # the original's counter, for a `query` in a subclass; it always fits the images
    num_imgs = property(lambda self: len(self.images), lambda self, _: None)

    def query(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W), in any range, for D to see in place of the newest ones.

        Returns the input while the pool fills, and with a size of 0. Later each image is, with
        probability 1/2, exchanged for a random one of the pool.
        """
        if self.pool_size == 0:
            return images
        chosen = []
        for image in images.detach().split(1):
            if len(self.images) < self.pool_size:
                self.images.append(image.clone())  # not a view that keeps the whole batch
                chosen.append(image)
            elif random.uniform(0, 1) > 0.5:
                index = random.randint(0, self.pool_size - 1)
                old = self.images[index].to(image.device)  # after a resume it is on the CPU
                self.images[index] = image.clone()
                # after a resume with another --crop_size, old ones do not fit into the batch
                fits = len(images) == 1 or old.shape == image.shape
                chosen.append(old if fits else image)
            else:
                chosen.append(image)
        return torch.cat(chosen, 0)

    def snapshot(self) -> Callable[[], None]:
        """A function that puts the current images back."""
        return functools.partial(setattr, self, "images", list(self.images))

    def state_dict(self) -> dict[str, list[torch.Tensor]]:
        """The images, in order."""
        return {"images": self.images}

    def load_state_dict(self, state: dict[str, list[torch.Tensor]]) -> None:
        """Load what `state_dict` returned, at most `pool_size` images."""
        self.images = list(state["images"])[: self.pool_size]
