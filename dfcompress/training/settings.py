"""`Training`: the settings of the student loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from dfcompress import schedules
from dfcompress.arguments import require_fields
from dfcompress.data.pool import Augmentation, ImagePool
from dfcompress.errors import BadInput
from dfcompress.training import OptimizerBackend, OptimizerName


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of the training loop: `steps` steps on batches of `batch_size` images, with peak learning rate `lr`.

    `optimizer` is sgd (with `momentum`, by default `nesterov`), adam, adamw or lamb, computed by `backend`.
    `weight_decay` applies to weights alone; with `decay_all` it also applies to biases and BatchNorm. The learning rate
    warms up linearly over `warmup` (a share of the steps). Then `schedule` lets it fall along a `cosine` to 0, multiply
    by `gamma` at each of the `milestones` (shares of the steps; `multistep`), or stay `constant`. The gradient's norm
    is clipped at `clip`; 0 disables clipping. With `freeze_batchnorm` BatchNorms keep their running statistics.
    `dropout` is the share of the last layer's input that is dropped in training, in addition to the architecture's own
    dropout; the trained student has no such layer. `augmentation` changes the images.
    """

    steps: int
    lr: float
    batch_size: int
    optimizer: OptimizerName = "sgd"
    backend: OptimizerBackend = "auto"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_all: bool = False
    schedule: schedules.Schedule = "cosine"
    warmup: float = 0.05
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    clip: float = 5.0
    freeze_batchnorm: bool = False
    dropout: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)

    REMOVED: ClassVar[Mapping[str, str]] = {
        "ema": "Leave it out: the cosine schedule serves the same end.",
        "novograd": "Use lamb, or sgd.",
    }

    def __post_init__(self) -> None:
        """Raise `BadInput` for invalid settings."""
        if self.optimizer in self.REMOVED:
            raise BadInput(f"The optimizer {self.optimizer!r} was removed.", self.REMOVED[self.optimizer])
        require_fields(self)
        if self.steps < 0 or self.batch_size < 1:
            raise BadInput(
                f"A training of {self.steps} steps with {self.batch_size} images each is not possible.",
                "Use 0 steps or more, and at least one image.",
            )
        if not 0 < self.lr < math.inf:
            raise BadInput(f"--train-lr {self.lr} is not a rate.", "Use a number above 0.")
        for what in ("momentum", "warmup", "dropout"):
            if not 0 <= (share := getattr(self, what)) < 1:
                raise BadInput(f"{what} must be a share from 0 to below 1; it is {share}.", "Use 0 to leave it out.")
        if self.clip < 0 or self.weight_decay < 0:
            raise BadInput("clip or weight_decay is negative.", "Use 0 to leave it out.")

    def pool(self, *sets: Tensor, labels: Sequence[Tensor] | None = None, seed: int) -> ImagePool:
        """Batch stored images `(N, C, H, W)`, one set for each teacher, with the batch size and augmentation of this
        training; `labels` holds the labels of each set.
        """
        return ImagePool(*sets, labels=labels, augmentation=self.augmentation, batch_size=self.batch_size, seed=seed)

    def suiting(self, input_size: tuple[int, int, int]) -> Training:
        """The settings adapted to images of this size `(C, H, W)`: images of one channel are not flipped, because most
        of them show characters, and a flipped character is another one.
        """
        flip = self.augmentation.flip and input_size[0] > 1
        return replace(self, augmentation=replace(self.augmentation, flip=flip))

    def rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        return schedules.rate(
            step,
            peak=self.lr,
            steps=self.steps,
            schedule=self.schedule,
            warmup=max(1, round(self.warmup * self.steps)) if self.warmup else 0,
            milestones=self.milestones,
            gamma=self.gamma,
        )
