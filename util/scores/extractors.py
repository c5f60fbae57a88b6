"""Feature extractors of scores: Inception for FID and KID, AlexNet for LPIPS.

Their weights come from a file that the user names, else from PyTorch's cache, else from the
address where the package of the network has them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from util.errors import UserError, in_one_line, warn
from util.files import sha256
from util.run.weight_files import load_weights

DOWNLOAD_SECONDS = 30  # without an answer


class WeightsUnavailable(Exception):
    """A network can't be had; the text is one line that says why, and what to do."""


class Weights:
    """A file of weights: its path, its SHA-256, and whether it is the released one.

    The name of a released file ends in the first digits of its SHA-256.
    """

    def __init__(self, given: str | None, url: str, flag: str):
        name = url.rsplit("/", 1)[-1]
        match = re.search(r"-([0-9a-f]{8,})\.pth$", name)
        prefix = match.group(1) if match else ""
        if given:
            self.path = Path(given)
            if not self.path.is_file():
                raise UserError(f"{flag} {given}: there is no such file")
        else:
            self.path = Path(torch.hub.get_dir()) / "checkpoints" / name
            if not self.path.is_file():
                self._download(url, prefix, flag)
        self.state = load_weights(self.path)
        self.sha256 = sha256(self.path)
        self.released = bool(prefix) and self.sha256.startswith(prefix)
        if not self.released:
            warn(
                f"{self.path} is not the released {name}, whose SHA-256 begins with {prefix}: "
                "results made with it can be compared only with each other"
            )

    def _download(self, url: str, prefix: str, flag: str) -> None:
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_SECONDS)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(self.path), prefix or None, progress=False)
        except Exception as e:
            why = in_one_line(e, 120)
            raise WeightsUnavailable(
                f"its weights can't be downloaded ({why}); {flag} FILE takes them from a file"
            ) from None
        finally:
            socket.setdefaulttimeout(before)

    def report(self) -> dict[str, Any]:
        """What a report says about the file."""
        return {"file": self.path.name, "sha256": self.sha256, "released": self.released}


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        name = package.replace("_", "-")
        raise WeightsUnavailable(f"it needs the package {name}: pip install {name}")


@contextlib.contextmanager
def _are_weights_of(what: str, flag: str, path: Path) -> Iterator[None]:
    """Turn what loading raises in the block into a UserError that names the file."""
    try:
        yield
    except RuntimeError as e:
        why = in_one_line(e, 160)
        raise UserError(f"{flag} {path}: these are no weights of {what} ({why})") from e


class Inception:
    """The features of FID and KID: Inception v3 as in Heusel et al. 2017, 2048 for each image.

    The network of torch-fidelity, which resizes to 299x299 as TensorFlow 1 did. Raises
    WeightsUnavailable if the package or the weights can't be had, UserError for a file that holds
    something else.
    """

    flag = "--inception_weights"
    variant = "torch-fidelity inception-v3-compat, 2048 features, resized to 299x299 by itself"

    def __init__(self, given: str | None, device: torch.device | str = "cpu"):
        _need("torch_fidelity")
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity

        self.device = torch.device(device)
        self.weights = Weights(given, fidelity.URL_INCEPTION_V3, self.flag)
        # torch-fidelity's own error would have a hundred lines
        with _are_weights_of("torch-fidelity's Inception", self.flag, self.weights.path):
            net = fidelity.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=self.weights.path
            )
        self.net = net.to(self.device).eval()

    def __call__(self, pictures: torch.Tensor) -> np.ndarray:
        """Features (N, 2048) of images (N, 3, H, W) of uint8."""
        with torch.no_grad():
            # in this order, since MPS has no float64
            return self.net(pictures.to(self.device))[0].cpu().double().numpy()


class Lpips:
    """LPIPS 0.1 with AlexNet (Zhang et al. 2018): the distance between two images.

    The one of torchmetrics, which includes the linear layers; AlexNet itself is torchvision's.
    Raises WeightsUnavailable if the package or the weights can't be had, UserError for a file that
    holds something else.
    """

    flag = "--lpips_weights"
    variant = "torchmetrics LPIPS 0.1, AlexNet, at the size of the images"

    def __init__(self, given: str | None, device: torch.device | str = "cpu"):
        _need("torchmetrics")
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        from torchvision.models import AlexNet_Weights, alexnet

        self.device = torch.device(device)
        url = AlexNet_Weights.IMAGENET1K_V1.url
        self.weights = Weights(given, url, self.flag)
        with _are_weights_of("torchvision's AlexNet", self.flag, self.weights.path):
            alexnet(weights=None).load_state_dict(self.weights.state)
        with _hub_with(url.rsplit("/", 1)[-1], self.weights.state):
            self.net = LearnedPerceptualImagePatchSimilarity(net_type="alex").to(self.device)

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """The distance between two images (1, 3, H, W) of uint8."""
        first, second = (x.to(self.device).float() / 127.5 - 1 for x in (a, b))
        with torch.no_grad():
            return float(self.net(first, second))


@contextlib.contextmanager
def _hub_with(name: str, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """Context manager: PyTorch's download cache is a folder that holds only this file.

    Pretrained weights are read from that cache only, so this substitutes those of a given file.
    """
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        (Path(folder) / "checkpoints").mkdir()
        torch.save(state, Path(folder) / "checkpoints" / name)
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)
