"""The model card: what one must know to use the weights, and how each value is known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

Origin = Literal["given", "read", "recognised", "assumed"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)

SMALL_INPUT = 64  # Pixels a side: CIFAR and Tiny-ImageNet, whose networks and settings are not those of ImageNet.


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What one must know to use the weights.

    `input_size` is (channels, height, width) in pixels, `mean` and `std` are per channel of images in [0, 1].
    `widths` are the channels in and out of each layer that has others than its architecture (see `resizing`).
    `origin` says of each field whether the user gave it, the file stated it (*read*), the tensors imply it
    (*recognised*), or it is what is usual (*assumed*). `config` is what transformers builds a network from.
    """

    architecture: str
    classes: int
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None = None
    origin: Mapping[str, Origin] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    widths: Mapping[str, tuple[int, int]] | None = None

    @property
    def small(self) -> bool:
        """Whether images are as small as CIFAR's or Tiny-ImageNet's."""
        return max(self.input_size[1:]) <= SMALL_INPUT

    def to_json(self) -> dict[str, Any]:
        """The card as plain JSON values."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: value for name, value in values.items() if name not in ("config", "widths") or value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelCard:
        """The card that `to_json` wrote."""
        names, widths = values.get("class_names"), values.get("widths") or {}
        return cls(
            architecture=values["architecture"],
            classes=int(values["classes"]),
            input_size=tuple(values["input_size"]),
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            class_names=tuple(names) if names else None,
            origin=dict(values.get("origin", {})),
            config=values.get("config"),
            widths={name: (c_in, c_out) for name, (c_in, c_out) in widths.items()} or None,
        )
