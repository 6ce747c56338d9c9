"""Convert images to the size and the channels of a network's input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from dfcompress import console
from dfcompress.data.image_source import ImageSource, Size
from dfcompress.errors import BadInput

CROPPED_FROM_PIXELS = 128
CROP_SHARE = 224 / 256  # the ImageNet evaluation of torchvision and timm
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode L


class Fitted:
    """Another source's images, converted to `input_size` (channels, height, width) by `fit`."""

    def __init__(self, source: ImageSource, input_size: Size) -> None:
        self.source, self.input_size = source, input_size

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """As the source has them."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> Tensor:
        """As the source has them."""
        return self.source.labels

    @property
    def size(self) -> Size:
        """The size of the source's stored images."""
        return self.source.size

    def batches(self, batch_size: int, *, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images in [0, 1] and labels, in the source's order."""
        for images, labels in self.source.batches(batch_size, first=first, every=every):
            yield fit(images, self.input_size), labels


def fit(images: Tensor, input_size: Size) -> Tensor:
    """Float images `(N, C, H, W)` → `(N, *input_size)`, bilinear with antialiasing.

    Images of this size are not resized. For inputs of 128 px and more, images are resized to cover 8/7 of the input and
    the centre is cut out, as ImageNet models are evaluated; for smaller inputs the whole image is resized. Raises
    `BadInput` for channels that cannot be converted.
    """
    channels, height, width = input_size
    images = _recolour(images, channels)
    if images.shape[2:] == (height, width):
        return images
    if min(height, width) < CROPPED_FROM_PIXELS:
        return _resize(images, height, width)
    scale = max(height / images.shape[2], width / images.shape[3]) / CROP_SHARE
    larger = _resize(images, round(images.shape[2] * scale), round(images.shape[3] * scale))
    top, left = (larger.shape[2] - height) // 2, (larger.shape[3] - width) // 2
    return larger[:, :, top : top + height, left : left + width]


def reshaped(images: Tensor, input_size: Size) -> Tensor:
    """Float images `(N, C, H, W)` of one model → `(N, *input_size)` of another, bilinear with antialiasing.

    The whole image is resized, so nothing is cut off.
    """
    images = _recolour(images, input_size[0])
    return images if images.shape[2:] == input_size[1:] else _resize(images, *input_size[1:])


def require_colours(channels: int, wanted: int) -> None:
    """Raise `BadInput` if images of `channels` channels cannot be converted to the `wanted` number of channels.

    Images of 1 channel can be converted to any number, images of 3 channels also to 1.
    """
    if channels != wanted and channels != 1 and (channels, wanted) != (3, 1):
        raise BadInput(f"Images of {channels} channels cannot be shown to a model of {wanted}.", "Use others.")


def tell_fitting(path: Path, size: Size, input_size: Size) -> None:
    """Print that the images at `path` are fitted to `input_size`; raises `BadInput` as `require_colours`."""
    require_colours(size[0], input_size[0])
    before, after = ("x".join(map(str, shape)) for shape in (size, input_size))
    console.notice(f"{path}: images of {before} are fitted to the model's {after}.")


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def _recolour(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == channels:
        return images
    require_colours(images.shape[1], channels)
    if channels == 1:
        return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
    return images.expand(-1, channels, -1, -1)
