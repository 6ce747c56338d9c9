"""Patch features: outputs of the blocks of a network that mix positions, as one vector for each image patch.

    blocks = patch_blocks(classifier)              # a vision transformer's attention modules, by what they do
    blocks[0].features(output)                     # (N, patches, channels)

A block has inputs and outputs of the same shape: tokens `(N, tokens, channels)`, or maps `(N, height, width, channels)`
or `(N, channels, height, width)`. It mixes positions: its output at one position depends on its input at others.
Of nested blocks only the innermost counts: in timm's ViT and DeiT the attention; in Swin (whose attention takes windows
as if they were images) and ConvNeXt (which has no attention) the whole block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.hooks import Call, hooked_calls
from dfcompress.randomness import generator

# The greatest number of patches per side: 14 as in ViT and DeiT at 224 pixels. Swin and ConvNeXt begin with 56 per
# side, whose 3,136² similarities per image are 39 MB per block.
SIDE = 14
FEWEST = 4  # Least number of patches: 3 patches have only 3 similarities, which is no distribution.


@dataclass(frozen=True)
class PatchBlock:
    """A block's `name` and the layout of its output.

    After `prefix` tokens (class tokens, registers) the output is a map of `height` × `width` patches; `channels` is the
    axis of the channels.
    """

    name: str
    height: int
    width: int
    channels: int
    prefix: int = 0

    def features(self, output: Tensor) -> Tensor:
        """Patch features `(N, patches, channels)` of the block's output.

        With more than 14 patches on a side, squares of patches are averaged so that at most 14 are left on each side;
        incomplete squares at the border are cut off.
        """
        positions = output[:, self.prefix :].unflatten(1, (self.height, self.width)) if output.dim() == 3 else output
        maps = positions.movedim(self.channels, 1)
        pooled = F.avg_pool2d(maps, -(-max(self.height, self.width) // SIDE))
        return pooled.flatten(2).transpose(1, 2)


def patch_blocks(classifier: Classifier) -> list[PatchBlock]:
    """The blocks of a network that mix positions, in the order of one forward pass.

    Blocks that run several times or have less than 4 patches do not count. Empty if the network has no such blocks.
    """
    modules = {name: module for name, module in classifier.network.named_modules() if name and [*module.children()]}
    size = classifier.card.input_size[1:]
    found: dict[str, PatchBlock | None] = {}

    def judge(name: str, call: Call, features: Any, output: Any) -> None:
        fits = isinstance(features, Tensor) and isinstance(output, Tensor) and features.shape == output.shape
        block = _block(name, output.shape, size) if fits and name not in found else None
        found[name] = block if block and _mixes(block, call, features) else None

    with hooked_calls(classifier.network, modules, judge):
        pass_once(classifier)
    blocks = {name: block for name, block in found.items() if block}
    return [block for name, block in blocks.items() if not any(other.startswith(f"{name}.") for other in blocks)]


def knows_patches_alone(classifier: Classifier) -> bool:
    """Whether a network has blocks that mix positions, and no layer that could keep running statistics."""
    network = classifier.network
    layers = any(isinstance(module, _NormBase) for module in network.modules())
    kept = any(name.rpartition(".")[2] == "running_var" for name, _ in network.named_buffers())
    return not layers and not kept and len(patch_blocks(classifier)) > 0


def require_patches(classifier: Classifier) -> None:
    """Raise `BadInput` if a network has no blocks that mix positions."""
    if not patch_blocks(classifier):
        raise BadInput(
            f"{classifier.name} has no blocks that mix patches, such as attention.",
            "Name another --recipe, or give real images to the other verbs with --data.",
        )


def _block(name: str, shape: torch.Size, size: tuple[int, int]) -> PatchBlock | None:
    """The layout of one image's features of this `shape`; None if they are no tokens or map of 4 patches or more."""
    if len(shape) == 3 and shape[0] == 1:
        height, width = _grid(shape[1], size)
        block = PatchBlock(name, height, width, channels=-1, prefix=shape[1] - height * width)
    elif len(shape) == 4 and shape[0] == 1:
        # The two neighbouring axes with the image's proportions are the spatial ones; in a tie, channels come first.
        first, last = (_elongation(shape[axis : axis + 2], size) for axis in (2, 1))
        height, width = shape[1:3] if last < first else shape[2:]
        block = PatchBlock(name, height, width, channels=-1 if last < first else 1)
    else:
        return None
    return block if height * width >= FEWEST else None


def _grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest map of at most `tokens` tokens with the proportions of images of `size`."""
    height = 1
    while (height + 1) * _width(height + 1, size) <= tokens:
        height += 1
    return height, min(_width(height, size), tokens)


def _width(height: int, size: tuple[int, int]) -> int:
    return max(1, round(height * size[1] / size[0]))


def _elongation(sides: Sequence[int], size: tuple[int, int]) -> float:
    """The factor, 1 or more, between the aspect ratio of a map and that of images of `size`."""
    ratio = sides[0] * size[1] / (sides[1] * size[0])
    return max(ratio, 1 / ratio)


@torch.enable_grad()
def _mixes(block: PatchBlock, call: Call, features: Tensor) -> bool:
    """Whether a block's output at the middle position depends on its input at other positions."""
    taken = torch.randn(features.shape, generator=generator("patches")).to(features).requires_grad_(True)
    given = call(taken.clone())  # A copy, because a block may work in place.
    if not given.requires_grad:
        return False
    if given.dim() == 3:
        middle: tuple[Any, ...] = (slice(None), block.prefix + block.height * block.width // 2)
    else:
        middle = (slice(None), *[slice(None)] * (block.channels == 1), block.height // 2, block.width // 2)
    # Each channel has its own random weight, because the plain sum of a LayerNorm's outputs is constant.
    value = (given[middle] * torch.randn(given[middle].shape, generator=generator("patches")).to(given)).sum()
    (gradient,) = torch.autograd.grad(value, taken, allow_unused=True)
    if gradient is None:
        return False
    gradient = gradient.clone()
    gradient[middle] = 0
    return bool(gradient.any())
