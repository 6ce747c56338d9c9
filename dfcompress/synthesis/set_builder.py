"""Builds a synthetic set: shares its shards between processes, checks and writes them, and resumes unfinished sets."""

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
from dfcompress.synthesis.synthesizer import SynthesizedBatch, Synthesizer, Watch

STUDENT_UPDATES = "student.json"


def build_set(spec: SynthesisSpec, folder: Path, compute: Compute) -> SyntheticSet:
    """Make the set in `folder`, or finish the set that is there; every process of a job makes some of its shards.

    If a student learns during synthesis, a `LiveSource` makes the set instead. Raises `BadInput` if the folder holds a
    set of another teacher, record, recipe, labels, number of images or seed.
    """
    builder = SetBuilder(spec, folder, compute)
    builder.make(builder.synthetic.shards)
    return builder.finish()


def _open(spec: SynthesisSpec, folder: Path, compute: Compute, student: Classifier | None) -> None:
    """Begin a set, or check that the set in `folder` has the same spec."""
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
    """Say that the student is never updated, because all batches are one round, and how to get a second round."""
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
    """Seconds that a set's shards (from `metrics.jsonl`) and the student updates took, summed over processes."""
    shards: float = sum(line["seconds"] for line in _lines(synthetic.folder / METRICS) if "seconds" in line)
    path = synthetic.folder / STUDENT_UPDATES
    updates: float = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
    return round(shards + updates, 2)


def warnings_of(synthetic: SyntheticSet) -> list[str]:
    """The warnings about a set's batches: one sentence for each kind, with the number of batches."""
    found: dict[str, list[str]] = {}
    for line in _lines(synthetic.folder / METRICS):
        if "health" in line:
            for kind, warning in (
                BatchQuality(**line["health"]).warnings(synthetic.manifest["recipe"]["settings"]).items()
            ):
                found.setdefault(kind, []).append(warning)
    return [f"{len(same)} of {len(synthetic.shards)} batches: {same[0]}" for same in found.values()]


def _present(stored: str) -> str:
    """This process's name of the device that a set was begun on; raises `BadInput` if there is no such device."""
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
    """A set that this process makes: opened, or begun, in `folder`.

    `student` is the student that the images compete with, if any. Raises `BadInput` if the folder holds a set of
    another teacher, record, recipe, labels, number of images or seed.
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
        """Make the missing ones of these shards, together with the other processes."""
        groups = self.execution.groups
        units = [list(shards[i : i + groups]) for i in range(0, len(shards), groups)]
        absent = set(self.synthetic.missing_shards())
        if world().is_main:
            for shard in set(shards) - absent:  # The run was killed between writing a shard and deleting its state.
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
        release_freed_memory()  # Later work has tensors of other sizes.

    def _mine(self, units: Sequence[list[int]]) -> Iterable[list[int]]:
        """The units that this process makes; if state persists across batches, the main process makes all of them."""
        if self.recipe.lives_on:
            return units if world().is_main else []
        return world().claim(units)

    def sample(self, history: list[dict[str, float]]) -> None:
        """Render the missing shards with a persistent generator; `history` holds the losses of its training."""
        if world().is_main:
            for shard in self.synthetic.missing_shards():
                batch = replace(self._sampled(shard, "sample"), history=[] if shard else history)
                self._warn([quality := self._check.examine(batch)])
                self._write([shard], [batch], [asdict(quality)], self.synthetic.shard_path(shard).with_suffix(STATE))
        world().barrier()

    def look(self, number: int) -> None:
        """Write a preview of a persistent generator's present images, and warn if they are not fit for use."""
        batch = self._sampled(number, "look")
        self._warn([self._check.examine(batch)])
        write_preview(self.synthetic.folder, batch.images[:PREVIEW_IMAGES])

    def _sampled(self, number: int, purpose: str) -> SynthesizedBatch:
        started, labels = time.perf_counter(), self.labels_of(number)
        with torch.no_grad(), computing(self.execution), exact_fp32():
            images = self.synthesizer.sample(labels, generator(purpose, self.seed, number))
            if self.recipe.label_free:
                labels = self.teacher(images).argmax(1)
        return SynthesizedBatch(images.cpu(), labels.cpu(), {}, [], time.perf_counter() - started)

    @cached_property
    def _check(self) -> QualityCheck:
        return QualityCheck(self.recipe, self.teacher, chunk=self.execution.chunk)

    def finish(self) -> SyntheticSet:
        """Merge the shards' metrics into one file, write the preview, and return the whole set."""
        if world().is_main:
            _merge_metrics(self.synthetic)
            write_preview(self.synthetic.folder, first_images(self.synthetic))
        world().barrier()
        return self.synthetic

    def labels_of(self, batch: int) -> Tensor:
        """The labels `(N,)` of a batch, int64."""
        return self.labels.of_batch(batch, self.batch_size, seed=self.seed)

    @cached_property
    def synthesizer(self) -> Synthesizer:
        """The synthesizer; its images compete with the student as of the first access, or of the last update."""
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

    def _write(
        self, unit: list[int], batches: list[SynthesizedBatch], qualities: list[dict[str, Any]], partial: Path
    ) -> None:
        sizes = self.synthetic.manifest["shards"]
        for shard, batch, quality in zip(unit, batches, qualities, strict=True):
            # A last, smaller shard is cut from a full batch: a smaller batch would have other BatchNorm statistics.
            stored = as_stored(batch.images[: sizes[shard]], in_range=self.recipe.images.in_range)
            _write_metrics(self.synthetic.shard_path(shard).with_suffix(".jsonl"), shard, batch, quality)
            self.synthetic.write_shard(shard, stored, batch.labels[: sizes[shard]])
        partial.unlink(missing_ok=True)

    def _warn(self, qualities: Sequence[BatchQuality]) -> None:
        """Print each kind of warning once, not once per batch."""
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


def _write_metrics(path: Path, shard: int, batch: SynthesizedBatch, quality: Mapping[str, Any]) -> None:
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
    """Merge the shards' own metrics into one file."""
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
