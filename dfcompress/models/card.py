"""The model card: the values that are needed to use the weights, and the origin of each value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

Origin = Literal["given", "read", "recognised", "assumed"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)

SMALL_INPUT = 64  # Pixels per side: CIFAR and Tiny-ImageNet, whose networks and settings differ from ImageNet's.


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """The values that are needed to use a model's weights.

    `architecture` is a name for `--arch`, `classes` the number of classes, `class_names` their names by label.
    `input_size` is (channels, height, width) in pixels; `mean` and `std` are per channel, for images in [0, 1].
    `widths` are the input and output channels of each layer whose channels differ from the architecture's (see
    `resizing`). `origin` is how each field is known: the user gave it (*given*), the file stated it (*read*), the
    tensors imply it (*recognised*), or it is a default (*assumed*). `config` holds the values from which transformers
    builds a network.
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
        """Whether images have at most `SMALL_INPUT` pixels per side, as in CIFAR and Tiny-ImageNet."""
        return max(self.input_size[1:]) <= SMALL_INPUT

    def to_json(self) -> dict[str, Any]:
        """The card as plain JSON values."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: value for name, value in values.items() if name not in ("config", "widths") or value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelCard:
        """The card from the values of `to_json`."""
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
