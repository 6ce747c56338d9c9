"""`Record`: an activation record that the owner of a model released beside the model, as one file.

A `*.records.safetensors` file holds named tensors and, as JSON in its metadata, their description. It belongs to one
teacher and is refused for other weights, to which its activations do not apply.
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
    """A record's description of itself.

    `kind` is one of `KINDS`. `layers` are the recorded layers, in the order of the forward pass; `images` is the number
    of images it was made from, and `class_counts` their number in each class; `teacher` is the sha256 of the weights.
    Gaussian kinds state the divisor of the logits (`temperature`), whether all classes are pooled (`pooled`) and the
    form of the `covariance`; spectral kinds the share of coefficients they `keep` and the number of activations
    `per_class`.
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
    """A description, the tensors it describes, and the file they were read from (None for a new record)."""

    about: Description
    tensors: Mapping[str, Tensor] = field(repr=False)
    path: Path | None = None

    @property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the training images' pixels in [0, 1], each `(C, 1, 1)`."""
        return self.tensors[PIXEL_MEAN].view(-1, 1, 1), self.tensors[PIXEL_STD].view(-1, 1, 1)

    @cached_property
    def identity(self) -> str:
        """The file's sha256, which identifies the record that images depend on."""
        assert self.path is not None
        return sha256(self.path)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        about = {"schema": SCHEMA, **asdict(self.about)}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        with write_atomically(path) as temporary:
            temporary.write_bytes(save(tensors, metadata={"dfcompress": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path, teacher: Classifier) -> Record:
        """Read a file that was made for `teacher`.

        Raises `BadInput` if there is no file, if it is not a record, is damaged, has another schema, or was made from
        other weights.
        """
        if not Path(path).is_file():
            raise BadInput(f"{path} is not a file.", "Make one with `dfcompress record`.")
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
            raise BadInput(f"{path} is not an activation record: {error!r}.", remedy) from None
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
        """Raise `BadInput` if a tensor is missing or has another type or shape."""
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
    """Bytes that tensors of these types and shapes take."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in expected.values())


def require_memory(what: str, needed: float, remedy: str) -> None:
    """Raise `BadInput` if `what` needs more bytes than the share of free memory that this process may use."""
    free = SHARE * free_bytes(torch.device("cpu"))
    if needed > free:
        raise BadInput(
            f"{what} takes {needed / 2**30:,.1f} GiB, and there is room for {free / 2**30:,.1f}.",
            remedy,
        )


def beside(checkpoint: Path) -> Path:
    """The expected path of a checkpoint's record: `model.records.safetensors` beside `model.pt`, or inside a folder."""
    if checkpoint.is_dir():
        return checkpoint / f"model{SUFFIX}"
    return checkpoint.with_name(checkpoint.stem + SUFFIX)
