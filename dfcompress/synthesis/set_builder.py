"""A synthetic set being made: shared between processes, examined, written, and finished wherever it was left."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dfcompress import console
from dfcompress.data.synthetic_set import MANIFEST, SyntheticSet, as_stored
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.machine.device import Precision, as_mine, is_cuda, processor_name, resolve_device
from dfcompress.machine.execution import Compute, Execution, computing, resolve_execution, tried
from dfcompress.machine.memory import GROWTH, images_at_once, release_freed_memory
from dfcompress.machine.process import exact_fp32, threads_here
from dfcompress.models.classifier import Classifier, work_of
from dfcompress.randomness import generator
from dfcompress.run import METRICS, STATE, write_atomically
from dfcompress.synthesis.labels import Labels
from dfcompress.synthesis.losses import Want
from dfcompress.synthesis.quality import BatchQuality, QualityCheck
from dfcompress.synthesis.recipe import Recipe
from dfcompress.synthesis.spec import SynthesisSpec
from dfcompress.synthesis.synthesizer import Batch, Synthesizer, Watch, try_step

PREVIEW = "preview.png"
STUDENT_UPDATES = "student.json"
PREVIEW_IMAGES = 80
# Of a batch's images in fp32: noise, images, gradient, Adam's two moments, finished ones, and those of the batch before
# that are being written.
COPIES = 7
PREVIEW_SIDE = 112  # Twice that, 80 images are 2,262 × 1,810 pixels, and up to 12 MB as PNG; averaged, 3 MB.


def build_set(spec: SynthesisSpec, folder: Path, compute: Compute) -> SyntheticSet:
    """Make the set in `folder`, or finish the one that is there; every process of a job makes some of its shards.

    Images that compete with a student are not made so, but by a `LiveSource`, while it learns.
    Raises `BadInput` where the folder holds a set of another teacher, recipe, count or seed.
    """
    builder = SetBuilder(spec, folder, compute)
    builder.make(builder.synthetic.shards)
    return builder.finish()


def _open(spec: SynthesisSpec, folder: Path, compute: Compute, student: Classifier | None) -> None:
    """Begin a set, or check that the one in `folder` is of the same spec."""
    teacher, recipe, images, batch_size = spec.teacher, spec.recipe, spec.images, spec.batch_size
    described = {
        "recipe": asdict(spec.choice),
        "images": images,
        "labels": asdict(spec.labels),
        "seed": compute.seed,
        "teacher": teacher.identity()["sha256"],
        "record": spec.record.identity if spec.record else None,
        "card": teacher.card.to_json(),
    }
    if spec.choice.sha256:
        described["recipe_sha256"] = spec.choice.sha256
    if (folder / MANIFEST).exists():
        _check_same_spec(SyntheticSet(folder), described)
        return
    sizes = [min(batch_size, images - start) for start in range(0, images, batch_size)]
    updates = recipe.student_updates
    if updates and updates.keep and Want.STUDENT in recipe.wants and len(sizes) <= updates.every:
        console.notice(_no_update(images, len(sizes), updates.every))
    execution = execution_of(spec, compute, student).execution
    SyntheticSet.create(
        folder, {**described, "batch_size": batch_size, "shards": sizes, "execution": asdict(execution)}
    )


def _no_update(images: int, batches: int, every: int) -> str:
    """That the student is updated between rounds of batches, of which there is one, and what makes it two."""
    remedies = ["more --images"]
    if images > every:
        remedies.append(f"--batch-size {max(1, images // (every + 1))}")
    if batches > 1:
        remedies.append("--set round_batches=1")
    return (
        f"The student is never updated: the {images} images are one round, which competes with an untrained student. "
        f"Use {' or '.join(remedies)}."
    )


# Unmeasured: CUDA steps of fewer images than 128 of CIFAR's size are taken to be mostly launching. On a CPU it does not
# pay (docs/results/robustness.md).
PIXELS_A_STEP = 128 * 32 * 32


def _groups(spec: SynthesisSpec, execution: Execution) -> int:
    batch_size, batches = spec.batch_size, spec.batches
    if spec.recipe.lives_on or (execution.chunk and execution.chunk < batch_size):
        return 1
    if spec.synthesis.groups != "auto":
        return min(spec.synthesis.groups, batches)
    if not is_cuda(torch.device(execution.device)):
        return 1
    height, width = spec.teacher.card.input_size[1:]
    fit, for_everybody = PIXELS_A_STEP // (batch_size * height * width), batches // world().world_size
    return max(1, min(fit, for_everybody))


class Resolved(NamedTuple):
    """How a set is made, and an estimate of what that takes of the memory, in bytes."""

    execution: Execution
    memory_bytes: int


def execution_of(spec: SynthesisSpec, compute: Compute, student: Classifier | None = None) -> Resolved:
    """How a set is made, all automatic choices made; `student` is what its images compete with, if anything.

    The precision is tried in one step, in which the memory of an image is counted: so many images as fit are computed
    at once, the others of their batch before and after. Raises `BadInput` where the precision that was asked for does
    not work, or none does; where not one image fits, and where a batch that cannot be computed in chunks does not.
    """
    teacher, recipe = spec.teacher, spec.recipe
    batch_size, batches = spec.batch_size, spec.batches
    work = work_in(recipe, teacher, batches * batch_size)
    execution = resolve_execution(compute, work, steps=batches * recipe.steps, sizes=recipe.sizes)
    student = (student or teacher) if Want.STUDENT in recipe.wants else None
    sampler = spec.sampler

    counted: dict[Precision, float] = {}

    def step(execution: Execution) -> None:
        counted[execution.precision] = try_step(recipe, teacher, execution, student=student, sampler=sampler)

    execution = tried(execution, compute, step, what=f"{teacher.name}{' or its student' if student else ''}")
    each = counted.get(execution.precision, 0.0)
    beside = COPIES * 4.0 * batch_size * math.prod(teacher.card.input_size)
    size = None if recipe.needs_whole_batch else teacher.card.input_size
    chunk = images_at_once(batch_size, each, target=torch.device(execution.device), input_size=size, beside=beside)
    if chunk < batch_size and recipe.needs_whole_batch:
        raise BadInput(
            f"A batch of {batch_size} images does not fit into memory, and {spec.choice.name} computes it whole: "
            "a loss has a module of its own, or the images a generator.",
            f"Use --batch-size {chunk}.",
        )
    execution = replace(execution, chunk=chunk)
    execution = replace(execution, groups=_groups(spec, execution))
    return Resolved(execution, int(beside + GROWTH * each * chunk * execution.groups))


def work_in(recipe: Recipe, teacher: Classifier, images: int) -> float:
    """The work of a synthesis: forward and backward to the input, each step."""
    return 2.0 * work_of(teacher) * images * recipe.work


def seconds_of(synthetic: SyntheticSet) -> float:
    """Seconds that the shards of a set took, from its `metrics.jsonl`, and the student updates between them; those of
    all processes together.
    """
    shards: float = sum(line["seconds"] for line in _lines(synthetic.folder / METRICS) if "seconds" in line)
    path = synthetic.folder / STUDENT_UPDATES
    updates: float = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
    return round(shards + updates, 2)


def warnings_of(synthetic: SyntheticSet) -> list[str]:
    """What the examination of a set's batches found, each kind of warning once, with the number of batches."""
    found: dict[str, list[str]] = {}
    for line in _lines(synthetic.folder / METRICS):
        if "health" in line:
            for kind, warning in (
                BatchQuality(**line["health"]).warnings(synthetic.manifest["recipe"]["settings"]).items()
            ):
                found.setdefault(kind, []).append(warning)
    return [f"{len(same)} of {len(synthetic.shards)} batches: {same[0]}" for same in found.values()]


def _present(stored: str) -> str:
    """The device that a set was begun on, as this process has it; raises `BadInput` where it has none."""
    mine = as_mine(stored)
    try:
        resolve_device(mine)
    except BadInput as error:
        raise BadInput(
            f"The set was begun on {stored}. {error.problem}",
            "Go on on a machine that has it, or begin anew with --overwrite.",
        ) from None
    return mine


class SetBuilder:
    """A set being made by this process: opened, or begun, in `folder`.

    `student` is what the images compete with, if anything.
    Raises `BadInput` where the folder holds a set of another teacher, recipe, count or seed.
    """

    def __init__(
        self, spec: SynthesisSpec, folder: Path, compute: Compute, *, student: Classifier | None = None
    ) -> None:
        if world().is_main:
            _open(spec, folder, compute, student)
        world().barrier()
        self.synthetic = synthetic = SyntheticSet(folder)
        self.spec, self.student, self.teacher, self.recipe = spec, student, spec.teacher, spec.recipe
        manifest = synthetic.manifest
        self.seed, self.batch_size = manifest["seed"], manifest["batch_size"]
        self.labels = Labels(**manifest["labels"])
        stored = Execution(**manifest["execution"])
        threads = min(stored.threads, threads_here())
        self.execution = replace(stored, device=_present(stored.device), threads=threads)
        self.preview_every = spec.synthesis.preview_every
        self.warned: set[str] = set()

    def make(self, shards: Sequence[int]) -> None:
        """Make those of the shards that are not there, together with the other processes."""
        groups = self.execution.groups
        units = [list(shards[i : i + groups]) for i in range(0, len(shards), groups)]
        absent = set(self.synthetic.missing_shards())
        if world().is_main:
            for shard in set(shards) - absent:  # Killed between writing a shard and deleting its state.
                self.synthetic.shard_path(shard).with_suffix(STATE).unlink(missing_ok=True)
        missing = world().broadcast([unit for unit in units if absent & set(unit)])
        if not missing:
            return
        with computing(self.execution), ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for unit in self._mine(missing):
                labels = {shard: self.labels_of(shard) for shard in unit}
                partial = self.synthetic.shard_path(unit[0]).with_suffix(STATE)
                batches = self.synthesizer.batches(labels, partial=partial, watch=self._watch())
                self._warn(qualities := [self._check.examine(batch) for batch in batches])
                if written:
                    written.result()  # A shard that could not be written ends the run before the next one is made.
                written = writer.submit(self._write, unit, batches, [asdict(quality) for quality in qualities], partial)
            if written:
                written.result()
        world().barrier()
        release_freed_memory()  # What follows has tensors of other sizes.

    def _mine(self, units: Sequence[list[int]]) -> Iterable[list[int]]:
        """What this process makes; what lives on from batch to batch is in one process."""
        if self.recipe.lives_on:
            return units if world().is_main else []
        return world().claim(units)

    def sample(self, history: list[dict[str, float]]) -> None:
        """Let a generator that lives on make the shards that are not there; `history` are its losses on the way."""
        if world().is_main:
            for shard in self.synthetic.missing_shards():
                batch = replace(self._sampled(shard, "sample"), history=[] if shard else history)
                self._warn([quality := self._check.examine(batch)])
                self._write([shard], [batch], [asdict(quality)], self.synthetic.shard_path(shard).with_suffix(STATE))
        world().barrier()

    def look(self, number: int) -> None:
        """Show what a generator that lives on makes now, and warn of what is wrong with it."""
        batch = self._sampled(number, "look")
        self._warn([self._check.examine(batch)])
        _write_preview(self.synthetic.folder, batch.images[:PREVIEW_IMAGES])

    def _sampled(self, number: int, purpose: str) -> Batch:
        started, labels = time.perf_counter(), self.labels_of(number)
        with torch.no_grad(), computing(self.execution), exact_fp32():
            images = self.synthesizer.sample(labels, generator(purpose, self.seed, number))
            if self.recipe.label_free:
                labels = self.teacher(images).argmax(1)
        return Batch(images.cpu(), labels.cpu(), {}, [], time.perf_counter() - started)

    @cached_property
    def _check(self) -> QualityCheck:
        return QualityCheck(self.recipe, self.teacher, chunk=self.execution.chunk)

    def finish(self) -> SyntheticSet:
        """The whole set, its losses in one file, and its picture."""
        if world().is_main:
            _merge_metrics(self.synthetic)
            _write_preview(self.synthetic.folder, _first_images(self.synthetic))
        world().barrier()
        return self.synthetic

    def labels_of(self, batch: int) -> Tensor:
        """The labels `(N,)` of a batch."""
        return self.labels.of_batch(batch, self.batch_size, seed=self.seed)

    @cached_property
    def synthesizer(self) -> Synthesizer:
        """The synthesizer, whose images compete with the student as it was when this was first asked for, or last
        updated.
        """
        record = self.spec.record
        synthesizer = Synthesizer(
            self.recipe,
            self.teacher,
            self.execution,
            seed=self.seed,
            student=self.student,
            sampler=self.spec.sampler,
            pixels=record.pixels if record else None,
        )
        processor = processor_name(synthesizer.device)
        if processor != self.execution.processor:
            console.notice(
                f"This set was begun on {self.execution.processor}; {processor} may round its images differently."
            )
        return synthesizer

    def _write(self, unit: list[int], batches: list[Batch], qualities: list[dict[str, Any]], partial: Path) -> None:
        sizes = self.synthetic.manifest["shards"]
        for shard, batch, quality in zip(unit, batches, qualities, strict=True):
            # A last, smaller shard is cut from a full batch: a smaller batch has other BatchNorm statistics.
            stored = as_stored(batch.images[: sizes[shard]], in_range=self.recipe.images.in_range)
            _write_metrics(self.synthetic.shard_path(shard).with_suffix(".jsonl"), shard, batch, quality)
            self.synthetic.write_shard(shard, stored, batch.labels[: sizes[shard]])
        partial.unlink(missing_ok=True)

    def _warn(self, qualities: Sequence[BatchQuality]) -> None:
        """Say each kind of warning once, not once a batch."""
        for quality in qualities:
            for kind, warning in quality.warnings(self.synthetic.manifest["recipe"]["settings"]).items():
                if kind not in self.warned:
                    self.warned.add(kind)
                    console.notice(warning)

    def _watch(self) -> Watch | None:
        every = self.preview_every
        if not every or not world().is_main:
            return None

        def watch(step: int, images: Callable[[], Tensor]) -> None:
            if step % every == 0:
                _write_preview(self.synthetic.folder, images()[:PREVIEW_IMAGES].cpu())

        return watch


def _write_metrics(path: Path, shard: int, batch: Batch, quality: Mapping[str, Any]) -> None:
    points = [{"shard": shard, **point} for point in batch.history]
    end = {
        "shard": shard,
        "process": world().rank,
        "seconds": round(batch.seconds, 3),
        "attempts": batch.attempts,
        "health": quality,
        **batch.losses,
    }
    with write_atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [*points, end]))


def _merge_metrics(synthetic: SyntheticSet) -> None:
    """Put the shards' own lines into one file."""
    parts = [path for shard in synthetic.shards if (path := synthetic.shard_path(shard).with_suffix(".jsonl")).exists()]
    if not parts:
        return
    merged = synthetic.folder / METRICS
    anew = {int(path.stem.rpartition("-")[2]) for path in parts}
    with write_atomically(merged) as temporary, temporary.open("w") as file:
        for line in _lines(merged):
            if line["shard"] not in anew:
                file.write(json.dumps(line) + "\n")
        for path in parts:
            file.write(path.read_text())
    for path in parts:
        path.unlink()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open() as file:
            yield from map(json.loads, file)


def _check_same_spec(synthetic: SyntheticSet, described: Mapping[str, Any]) -> None:
    for name, value in described.items():
        if name == "recipe_sha256" and synthetic.manifest.get(name) != value:
            raise BadInput(
                f"The file of recipe {described['recipe']['name']} has changed since {synthetic.folder} was begun.",
                "Put it back as it was, name another folder, or --overwrite.",
            )
        if synthetic.manifest.get(name) != json.loads(json.dumps(value)):
            raise BadInput(
                f"{synthetic.folder} holds a set with another {name}.", "Name another folder, or --overwrite."
            )


def _first_images(synthetic: SyntheticSet) -> Tensor:
    found: list[Tensor] = []
    for images, _ in synthetic.batches(PREVIEW_IMAGES):
        found.append(images)
        if sum(map(len, found)) >= PREVIEW_IMAGES:
            break
    return torch.cat(found)[:PREVIEW_IMAGES]


def _write_preview(folder: Path, images: Tensor) -> None:
    """Up to 80 images, large ones at a whole fraction of their size; a column holds one class where there are ten."""
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    images = F.avg_pool2d(images, max(1, min(images.shape[2:]) // PREVIEW_SIDE))
    images = images.expand(-1, 3, -1, -1)
    scale = max(1, 64 // images.shape[-1])
    enlarged = images.clamp(0, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    pixels = (grid(enlarged, columns=10, border=2) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with write_atomically(folder / PREVIEW) as path:
        Image.fromarray(pixels).save(path, format="png")


def grid(images: Tensor, *, columns: int, border: int) -> Tensor:
    """Images `(N, C, H, W)` row by row as one `(C, rows, columns)`, with white borders of `border` pixels.

    (torchvision's `make_grid` does the same, and importing torchvision takes 0.3 to 1.4 s of CPU time.)
    """
    columns = min(columns, len(images))
    images = F.pad(images, (0, border, 0, border, 0, 0, 0, -len(images) % columns), value=1.0)
    rows = images.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return F.pad(rows, (border, 0, border, 0), value=1.0)
