"""Transforms of PIL pictures. Classes, not lambdas: workers that are spawned must pickle them."""

from __future__ import annotations

from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from util.errors import UserError

_PIL_FILTERS = {
    InterpolationMode.NEAREST: Image.Resampling.NEAREST,
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
    InterpolationMode.LANCZOS: Image.Resampling.LANCZOS,
    InterpolationMode.BOX: Image.Resampling.BOX,
    InterpolationMode.HAMMING: Image.Resampling.HAMMING,
}


def pil_filter(method: InterpolationMode | int) -> Image.Resampling:
    """The filter of Pillow for one of torchvision's names (or for Pillow's own number)."""
    if isinstance(method, InterpolationMode):
        return _PIL_FILTERS[method]
    return Image.Resampling(method)


def same_part(transform: transforms.Compose) -> tuple[transforms.Compose, transforms.Compose]:
    """Split a transform: first the steps that are the same each time, then all from a draw on."""
    steps = transform.transforms
    same = (transforms.Grayscale, transforms.Resize, ScaleWidth, MakeMultiple)
    drawn = [i for i, step in enumerate(steps) if not isinstance(step, same)]
    first = drawn[0] if drawn else len(steps)
    return transforms.Compose(steps[:first]), transforms.Compose(steps[first:])


class ScaleWidth:
    """Scale to a width and keep the shape; the height does not fall below `crop_size`."""

    def __init__(self, width: int, crop_size: int, method=InterpolationMode.BICUBIC):
        self.width, self.crop_size, self.filter = width, crop_size, pil_filter(method)

    def __repr__(self) -> str:
        return f"ScaleWidth({self.width}, {self.crop_size}, {self.filter})"

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if width == self.width and height >= self.crop_size:
            return image
        new_height = int(max(self.width * height / width, self.crop_size))
        return image.resize((self.width, new_height), self.filter)


class MakeMultiple:
    """Scale so that width and height are the nearest multiples of `base`, at least one of it."""

    def __init__(self, base: int, method=InterpolationMode.BICUBIC):
        self.base, self.filter = base, pil_filter(method)

    def __repr__(self) -> str:
        return f"MakeMultiple({self.base}, {self.filter})"

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = (max(self.base, round(n / self.base) * self.base) for n in image.size)
        if (width, height) == image.size:
            return image
        return image.resize((width, height), self.filter)


class CropAt:
    """Cut a square of `size` at a fixed position (left, top)."""

    def __init__(self, position: tuple[int, int], size: int):
        self.position, self.size = position, size

    def __call__(self, image: Image.Image) -> Image.Image:
        check_crop(image, self.size)
        left, top = self.position
        if image.size == (self.size, self.size):
            return image
        return image.crop((left, top, left + self.size, top + self.size))


class CenterCrop:
    """Cut a square of `size` from the middle: what testing does where training draws."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        position = ((width - self.size) // 2, (height - self.size) // 2)
        return CropAt(position, self.size)(image)


class RandomCrop(transforms.RandomCrop):
    """Cut a square from a random place, drawn as torchvision does."""

    def forward(self, img: Image.Image) -> Image.Image:
        check_crop(img, self.size[0])
        return super().forward(img)


class Mirror:
    """Flip left and right."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def check_crop(image: Image.Image, size: int) -> None:
    """Raise UserError where a picture is smaller than the square to be cut from it."""
    check_crop_size(image.width, image.height, size)


def check_crop_size(width: int, height: int, size: int) -> None:
    """Like `check_crop`, for a picture that need not be opened."""
    if min(width, height) < size:
        raise UserError(
            f"a picture of {width}x{height} is too small for --crop_size {size}: use a "
            "smaller --crop_size, or a --preprocess that scales, such as resize_and_crop"
        )
