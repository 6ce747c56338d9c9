"""What is done to the images before the teacher sees them.

A view is linear in the images, so it is applied outside autograd:
it returns the images the teacher sees and the adjoint that carries their gradient back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Adjoint = Callable[[Tensor], Tensor]
View = Callable[[Tensor, torch.Generator], tuple[Tensor, Adjoint]]


def random_roll(pixels: int) -> View:
    """Roll the whole batch `(N, C, H, W)` by one offset in ±`pixels` along each axis (the published jitter)."""

    def view(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Adjoint]:
        down, right = torch.randint(-pixels, pixels + 1, (2,), generator=generator).tolist()
        return images.roll((down, right), (2, 3)), lambda gradient: gradient.roll((-down, -right), (2, 3))

    return view


def random_flip(probability: float = 0.5) -> View:
    """Flip the whole batch `(N, C, H, W)` left-right with `probability`."""

    def view(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Adjoint]:
        if torch.rand((), generator=generator).item() >= probability:
            return images, lambda gradient: gradient
        return images.flip(3), lambda gradient: gradient.flip(3)

    return view
