"""A synthetic set on disk: a folder with shards of images and labels, and the description of their synthesis."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.run import write_atomically, write_json

MANIFEST = "dataset.json"
SCHEMA = 1
FILLED = 256  # Images that are in memory as floats while sets are joined: 154 MB at 224².


class SyntheticSet:
    """A finished or growing set of images; a shard is the unit of work.

    `manifest`, the content of `dataset.json`, holds all settings that the images depend on; `manifest["shards"]` lists
    the number of images of each shard. Raises `BadInput` if `folder` holds no set of this version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.exists():
            raise BadInput(
                f"{folder} is not a synthetic set: it has no {MANIFEST}.", "Make one with `dfcompress invert`."
            )
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text())
            schema, self._shard_sizes = self.manifest["schema"], [int(size) for size in self.manifest["shards"]]
            self._class_names = ModelCard.from_json(self.manifest["card"]).class_names
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{path} is not a dataset description of dfcompress.", "Make the set again.") from None
        if schema != SCHEMA:
            raise BadInput(f"{path} has schema {schema!r}, this version reads {SCHEMA}.", "Make the set again.")

    @classmethod
    def create(cls, folder: Path, manifest: Mapping[str, Any]) -> SyntheticSet:
        """Write the manifest of a new set, which has no shards yet, and return the set."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST, {"schema": SCHEMA, **manifest})
        return cls(folder)

    def __len__(self) -> int:
        return sum(self._shard_sizes)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes by label, None if the teacher's card has none."""
        return self._class_names

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images, in pixels."""
        channels, height, width = self.manifest["card"]["input_size"]
        return channels, height, width

    @property
    def shards(self) -> range:
        """The ids of all shards, written or not."""
        return range(len(self._shard_sizes))

    def shard_path(self, shard: int) -> Path:
        """The path of a finished shard."""
        return self.folder / f"shard-{shard:05d}.safetensors"

    def missing_shards(self) -> list[int]:
        """The ids of the shards that do not exist yet."""
        return [shard for shard in self.shards if not self.shard_path(shard).exists()]

    def require_complete(self) -> None:
        """Raise `BadInput`, naming the first missing shard, if the set is not complete."""
        for shard in self.missing_shards():
            raise BadInput(
                f"{self.folder} is not complete: {self.shard_path(shard).name} is missing.",
                "Finish it with `dfcompress invert --resume`.",
            )

    def write_shard(self, shard: int, images: Tensor, labels: Tensor) -> None:
        """Store images `(N, C, H, W)`, uint8 or float16 in units of [0, 1], and int64 labels `(N,)`."""
        tensors = {"images": images.contiguous(), "labels": labels.contiguous()}
        with write_atomically(self.shard_path(shard)) as path:
            # Not `save_file`, which reports a full disk only as an error of its own kind.
            path.write_bytes(save(tensors, metadata={"sha256": _digest(images, labels)}))

    def read_shard(self, shard: int) -> tuple[Tensor, Tensor]:
        """Images and labels of one shard as stored.

        Raises `BadInput`, naming the file, if it is missing, truncated or altered.
        """
        path = self.shard_path(shard)
        if not path.exists():
            self.require_complete()
        try:
            with safe_open(path, "pt") as file:
                images, labels = file.get_tensor("images"), file.get_tensor("labels")
                intact = (file.metadata() or {}).get("sha256") == _digest(images, labels)
        except SafetensorError:
            intact = False
        if not intact or len(images) != self._shard_sizes[shard]:
            raise BadInput(f"{path} was cut short or altered.", "Delete it and run `dfcompress invert --resume`.")
        return images, labels

    @property
    def in_range(self) -> bool:
        """Whether the images are in [0, 1], so that 8 bits hold them."""
        return self.read_shard(0)[0].dtype == torch.uint8

    @cached_property
    def _whole(self) -> tuple[Tensor, Tensor]:
        shards = [self.read_shard(shard) for shard in self.shards]
        return torch.cat([images for images, _ in shards]), torch.cat([labels for _, labels in shards])

    @property
    def images(self) -> Tensor:
        """All images `(N, C, H, W)` as stored: uint8, or float16 in units of [0, 1]."""
        return self._whole[0]

    @cached_property
    def labels(self) -> Tensor:
        """All labels `(N,)`, int64; the images are not kept in memory."""
        return torch.cat([self.read_shard(shard)[1] for shard in self.shards])

    def batches(self, batch_size: int, *, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images `(B, C, H, W)` in units of [0, 1] and their labels, in order; a batch never spans two shards."""
        for images, labels in islice(self._batches(batch_size), first, None, every):
            yield as_float(images), labels

    def _batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for shard in self.shards:
            images, labels = self.read_shard(shard)
            yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)


def as_float(images: Tensor) -> Tensor:
    """Stored images → float32 in units of [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def as_stored(images: Tensor, *, in_range: bool) -> Tensor:
    """Float images → uint8 if they are in [0, 1] (`in_range`), else float16."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8) if in_range else images.to(torch.float16)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the stored images `(N, C, H, W)` of several sets.

    The result is uint8 if all sets are uint8, else float16 in units of [0, 1]. Never more than `FILLED` images are
    converted to float32 at once.
    """
    if len({images.dtype for images in parts}) > 1:
        parts = [as_float(some).to(torch.float16) for images in parts for some in images.split(FILLED)]
    return torch.cat(list(parts))


def _digest(images: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(images.contiguous().numpy().tobytes())
    digest.update(labels.contiguous().numpy().tobytes())
    return digest.hexdigest()
