"""What all readers of labelled images share: the interface `ImageSource`, the list of the kinds of image data for
messages, and the rule for hidden files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

from torch import Tensor

Size = tuple[int, int, int]
Part = Literal["train", "test"]
KINDS = (
    "Give an ImageFolder, an .npz with `images` and `labels`, IDX files as MNIST has them, the batches of CIFAR, or a "
    "synthetic set."
)


class ImageSource(Protocol):
    """Labelled images in a fixed order, which can be read any number of times."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by label, None if the source does not know them."""

    @property
    def labels(self) -> Tensor:
        """Labels `(N,)` of all images, int64."""

    @property
    def size(self) -> Size:
        """Channels, height, width of the stored images; for a folder of pictures, of the images in the batches."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, *, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images `(B, C, H, W)` in [0, 1] and int64 labels `(B,)`: the batches `first`, `first + every`, ..."""


def is_hidden(name: str) -> bool:
    """Whether a name is hidden or one that macOS adds to archives: `__MACOSX`, and `._cat.png` for `cat.png`."""
    return name.startswith(".") or name == "__MACOSX"
