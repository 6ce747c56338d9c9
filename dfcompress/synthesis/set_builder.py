"""A synthetic set being made: shared between processes, examined, written, and finished wherever it was left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.data.synthetic_set import MANIFEST, SyntheticSet, as_stored
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.machine.device import as_mine, processor_name, resolve_device
from dfcompress.machine.execution import Compute, Execution, computing
from dfcompress.machine.memory import release_freed_memory
from dfcompress.machine.process import exact_fp32, threads_here
from dfcompress.models.classifier import Classifier
from dfcompress.randomness import generator
from dfcompress.run import METRICS, STATE, write_atomically
from dfcompress.synthesis.labels import Labels
from dfcompress.synthesis.losses import Want
from dfcompress.synthesis.preview import PREVIEW_IMAGES, first_images, write_preview
from dfcompress.synthesis.quality import BatchQuality, QualityCheck
from dfcompress.synthesis.set_execution import execution_of
from dfcompress.synthesis.spec import SynthesisSpec
from dfcompress.synthesis.synthesizer import Batch, Synthesizer, Watch

STUDENT_UPDATES = "student.json"


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
        write_preview(self.synthetic.folder, batch.images[:PREVIEW_IMAGES])

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
            write_preview(self.synthetic.folder, first_images(self.synthetic))
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
                write_preview(self.synthetic.folder, images()[:PREVIEW_IMAGES].cpu())

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
