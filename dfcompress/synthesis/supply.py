"""Where synthetic images come from: a set on disk that is made, finished or just read.

`make_set` is what `invert` calls; `ImageSupply` is how the verbs that train get their images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from dfcompress import console
from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import MANIFEST, SyntheticSet, as_float, as_stored
from dfcompress.device import Compute, Execution, processor_name, resolve_execution
from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier, require_batchnorm_statistics
from dfcompress.run import write_atomically
from dfcompress.synthesis.recipe import Recipe, RecipeChoice, choose
from dfcompress.synthesis.synthesizer import Batch, Synthesizer, seconds_per_step

METRICS = "metrics.jsonl"
PREVIEW = "preview.png"


@dataclass(frozen=True)
class Synthesis:
    """Which images to make: the recipe, its preset, settings that override the preset's, and how many."""

    recipe: str = "deepinversion"
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    images: int = 1024

    def choose(self, card: ModelCard) -> RecipeChoice:
        """The recipe with every setting resolved for a model; raises `BadInput` for unknown names and values."""
        if self.images < 1:
            raise BadInput(f"--images {self.images} is not a number of images.", "Ask for at least 1.")
        return choose(self.recipe, self.preset, self.settings, card=card)


def make_set(teacher: Classifier, folder: Path, synthesis: Synthesis, compute: Compute) -> SyntheticSet:
    """Make the set in `folder`, or finish the one that is there.

    Raises `BadInput` where the folder holds a set of another teacher, recipe, count or seed.
    """
    choice = synthesis.choose(teacher.card)
    recipe = choice.build()
    batch_size = min(recipe.batch_size, synthesis.images)
    job = {
        "recipe": asdict(choice),
        "images": synthesis.images,
        "seed": compute.seed,
        "teacher": teacher.identity()["sha256"],
        "card": teacher.card.to_json(),
    }
    if (folder / MANIFEST).exists():
        synthetic = SyntheticSet(folder)
        _check_same_job(synthetic, job)
    else:
        sizes = [min(batch_size, synthesis.images - start) for start in range(0, synthesis.images, batch_size)]
        execution = resolve_execution(compute, eager_seconds(recipe, teacher, batch_size, len(sizes)))
        synthetic = SyntheticSet.create(folder, {**job, "shards": sizes, "execution": asdict(execution)})
    _make_missing_shards(synthetic, teacher, choice, batch_size)
    _write_preview(synthetic)
    return synthetic


def eager_seconds(recipe: Recipe, teacher: Classifier, batch_size: int, batches: int) -> Callable[[Execution], float]:
    """The seconds a synthesis would take eagerly, from timing one step."""
    steps = recipe.steps * batches
    return lambda eager: steps * seconds_per_step(recipe, teacher, eager, batch_size) if steps else 0.0


def seconds_of(synthetic: SyntheticSet) -> float:
    """Seconds of synthesis that the shards of a set took, from its `metrics.jsonl`."""
    return round(sum(line["seconds"] for line in _metrics(synthetic.folder / METRICS) if "seconds" in line), 2)


class ImageSupply:
    """Where a verb's training images come from: checked when made, gathered once the run has a folder.

    `data` is a synthetic set or real images; None means that a set is made in `<folder>/synthetic`, or finished there.
    Raises `BadInput` where the data cannot be used, or nothing can be made from this teacher.
    """

    def __init__(self, teacher: Classifier, data: str | Path | None, synthesis: Synthesis, compute: Compute) -> None:
        self.teacher, self.synthesis, self.compute = teacher, synthesis, compute
        self.source = open_images(data, teacher.card) if data is not None else None
        if self.source is None:
            require_batchnorm_statistics(teacher)
            synthesis.choose(teacher.card)
        elif isinstance(self.source, SyntheticSet):
            self.source.require_complete()

    def __len__(self) -> int:
        return self.synthesis.images if self.source is None else len(self.source)

    def gather(self, folder: Path) -> TrainingImages:
        """All images and labels as they are stored."""
        if self.source is None:
            made = make_set(self.teacher, folder / "synthetic", self.synthesis, self.compute)
            return TrainingImages(made.images, made.labels, seconds_of(made))
        if isinstance(self.source, SyntheticSet):
            return TrainingImages(self.source.images, self.source.labels, 0.0)
        batches = [(as_stored(images, in_range=True), labels) for images, labels in self.source.batches(256)]
        images, labels = zip(*batches, strict=True)
        return TrainingImages(torch.cat(images), torch.cat(labels), 0.0)


@dataclass(frozen=True)
class TrainingImages:
    """Images `(N, C, H, W)` as stored (uint8, or float16 in units of [0, 1]), and labels `(N,)`."""

    images: Tensor
    labels: Tensor
    synthesis_seconds: float

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images in units of [0, 1] and their labels, in order."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield as_float(images), labels


def _make_missing_shards(synthetic: SyntheticSet, teacher: Classifier, choice: RecipeChoice, batch_size: int) -> None:
    missing = synthetic.missing_shards()
    if not missing:
        return
    execution = Execution(**synthetic.manifest["execution"])
    synthesizer = Synthesizer(choice.build(), teacher, execution, seed=synthetic.manifest["seed"])
    processor = processor_name(synthesizer.device)
    if processor != execution.processor:
        console.notice(f"This set was begun on {execution.processor}; {processor} may round its images differently.")
    for shard in missing:
        partial = synthetic.shard_path(shard).with_suffix(".partial")
        first = shard * batch_size
        # A last, smaller shard is cut from a full batch: a smaller batch has other BatchNorm statistics.
        labels = torch.arange(first, first + batch_size) % teacher.card.classes
        batch = synthesizer.batch(shard, labels, partial=partial)
        size = synthetic.manifest["shards"][shard]
        stored = as_stored(batch.images[:size], in_range=synthesizer.recipe.images.in_range)
        _write_metrics(synthetic.folder / METRICS, shard, batch)
        synthetic.write_shard(shard, stored, batch.labels[:size])
        partial.unlink(missing_ok=True)


def _write_metrics(path: Path, shard: int, batch: Batch) -> None:
    others = [line for line in _metrics(path) if line["shard"] != shard]
    points = [{"shard": shard, **point} for point in batch.history]
    end = {"shard": shard, "seconds": round(batch.seconds, 3), **batch.losses}
    with write_atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [*others, *points, end]))


def _metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _check_same_job(synthetic: SyntheticSet, job: Mapping[str, Any]) -> None:
    for name, value in job.items():
        if synthetic.manifest[name] != json.loads(json.dumps(value)):
            raise BadInput(
                f"{synthetic.folder} holds a set with another {name}.", "Name another folder, or --overwrite."
            )


def _write_preview(synthetic: SyntheticSet) -> None:
    """The first 80 images; a column holds one class where there are ten."""
    images, _ = next(synthetic.batches(80))
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    scale = max(1, 64 // images.shape[-1])
    enlarged = images.clamp(0, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid: Tensor = make_grid(enlarged, nrow=10, padding=2, pad_value=1.0)
    pixels = (grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with write_atomically(synthetic.folder / PREVIEW) as path:
        Image.fromarray(pixels).save(path, format="png")
