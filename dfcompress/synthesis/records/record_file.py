"""`Record`: what the owner of a model released beside it, as one file.

A `*.records.safetensors` holds named tensors and, as JSON in its metadata, what they are. It belongs to one teacher:
with other weights its activations mean nothing, so it is refused to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dfcompress.errors import BadInput
from dfcompress.machine.memory import SHARE, free_bytes
from dfcompress.models.classifier import Classifier
from dfcompress.models.safe_reading import sha256
from dfcompress.run import write_atomically
from dfcompress.synthesis.records import KINDS

Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]

SCHEMA = 1
SUFFIX = ".records.safetensors"
PIXEL_MEAN, PIXEL_STD = "pixels.mean", "pixels.std"


@dataclass(frozen=True)
class Description:
    """What a record says about itself.

    `layers` are those it knows, in the order of the forward pass; `images` how many it was made from, `class_counts`
    how many of each class; `teacher` is the weights' sha256. Gaussian kinds say what logits were divided by
    (`temperature`), whether classes were not kept apart (`pooled`) and the form of the `covariance`; spectral kinds
    the share of coefficients they `keep`, of how many activations `per_class`.
    """

    kind: str
    layers: tuple[str, ...]
    images: int
    class_counts: tuple[int, ...]
    teacher: str
    temperature: float = 1.0
    pooled: bool = False
    covariance: str = ""
    keep: float = 0.0
    per_class: int = 0


@dataclass(frozen=True)
class Record:
    """A description, the tensors it describes, and the file they came from."""

    about: Description
    tensors: Mapping[str, Tensor] = field(repr=False)
    path: Path | None = None

    @property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the training images' pixels in [0, 1], each `(C, 1, 1)`."""
        return self.tensors[PIXEL_MEAN].view(-1, 1, 1), self.tensors[PIXEL_STD].view(-1, 1, 1)

    @cached_property
    def identity(self) -> str:
        """What images made with it depend on: the file's sha256."""
        assert self.path is not None
        return sha256(self.path)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        about = {"schema": SCHEMA, **asdict(self.about)}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        with write_atomically(path) as temporary:
            temporary.write_bytes(save(tensors, metadata={"dfcompress": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path, teacher: Classifier) -> Record:
        """Read a file that was made for `teacher`.

        Raises `BadInput` where it is no record, damaged, of a later version or of other weights.
        """
        if not Path(path).is_file():
            raise BadInput(f"{path} is no file.", "Make one with `dfcompress record`.")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["dfcompress"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (schema := about.pop("schema")) != SCHEMA:
                raise BadInput(f"{path} has schema {schema!r}, this version reads {SCHEMA}.", "Record again.")
            description = _description(about)
            record = cls(description, tensors, Path(path))
            record._check(teacher)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            remedy = "Make one with `dfcompress record`."
            raise BadInput(f"{path} is no record of activations: {error!r}.", remedy) from None
        return record

    def _check(self, teacher: Classifier) -> None:
        about = self.about
        if about.teacher != teacher.identity()["sha256"]:
            raise BadInput(
                f"{self.path} was recorded from other weights ({about.teacher[:12]}…) than {teacher.name}.",
                "Use the record that was released with this model, or --no-records.",
            )
        classes, channels = teacher.card.classes, teacher.card.input_size[0]
        if len(about.class_counts) != classes or not 0 < about.temperature < math.inf:
            raise ValueError("it says something that cannot be")
        self.require(dict.fromkeys((PIXEL_MEAN, PIXEL_STD), (torch.float32, (channels,))))
        if not all(tensor.isfinite().all() for tensor in self.tensors.values() if tensor.is_floating_point()):
            raise ValueError("it holds NaN or infinity")

    def require(self, expected: Expected) -> None:
        """Raise `BadInput` where a tensor is not there, or of another type or shape."""
        for name, (dtype, shape) in expected.items():
            found = self.tensors.get(name)
            if found is None or found.dtype != dtype or tuple(found.shape) != shape:
                has = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise BadInput(f"{self.path} has {has} as {name}, not {dtype} {shape}.", "Record again.")


def _description(about: Mapping[str, Any]) -> Description:
    description = Description(
        **{**about, "layers": tuple(about["layers"]), "class_counts": tuple(map(int, about["class_counts"]))}
    )
    if description.kind not in KINDS:
        raise ValueError(f"its kind is {description.kind!r}")
    return description


def tensor_bytes(expected: Expected) -> int:
    """What tensors of these types and shapes take."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in expected.values())


def require_memory(what: str, needed: float, remedy: str) -> None:
    """Raise `BadInput` where something takes more than this process can still take of the memory, but for a spare."""
    free = SHARE * free_bytes(torch.device("cpu"))
    if needed > free:
        raise BadInput(
            f"{what} takes {needed / 2**30:,.1f} GiB, and there is room for {free / 2**30:,.1f}.",
            remedy,
        )


def beside(checkpoint: Path) -> Path:
    """Where the record of a checkpoint is looked for: `model.records.safetensors` for `model.pt`, and in a folder."""
    if checkpoint.is_dir():
        return checkpoint / f"model{SUFFIX}"
    return checkpoint.with_name(checkpoint.stem + SUFFIX)
