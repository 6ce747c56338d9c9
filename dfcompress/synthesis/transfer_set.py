"""The transfer set: the images that a student learns from (Hinton et al. 2015), synthesized now or present already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.data.fitted import Fitted
from dfcompress.data.image_source import ImageSource
from dfcompress.data.real import open_images, require_decodable
from dfcompress.data.synthetic_set import FILLED, MANIFEST, SyntheticSet, as_float, as_stored, joined
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute
from dfcompress.models.classifier import Classifier
from dfcompress.models.statistics import why_no_statistics
from dfcompress.randomness import generator
from dfcompress.settings import AUTO
from dfcompress.synthesis.labels import BALANCED
from dfcompress.synthesis.live import LiveSource, Pool
from dfcompress.synthesis.losses import Want
from dfcompress.synthesis.recipe import Recipe, Synthesis, settings_of
from dfcompress.synthesis.set_builder import build_set, seconds_of, warnings_of
from dfcompress.synthesis.spec import SynthesisSpec, resolve

HELD_OUT_SHARE = 1 / 16
SYNTHETIC = "synthetic"
OF_TEACHER = "teacher-"
PROBE = "probe"  # The folder of the probe images, which nothing is trained on.
OTHER_RECIPES = ("bns", "deepinversion", "bns-inception")


class Competitor(Protocol):
    """A temporary student that is trained during synthesis and discarded afterwards."""

    @property
    def student(self) -> Classifier:
        """The network that is trained."""

    def build(self, spec: SynthesisSpec, folder: Path, compute: Compute) -> SyntheticSet:
        """Make the set in `folder`, or finish it, while the student is trained."""


class TransferSetSource:
    """Where a transfer set comes from. It is checked at once, and gathered when the run has a folder.

    `data` is a synthetic set, the folder of a run that made some, or real images. None means that sets are synthesized
    (or finished) in the run's folder: half of the images by the chosen recipe in `synthetic`, half by `second_recipe`
    (with the same steps and batch size, if these were set) in `synthetic-<second_recipe>`. Images of one recipe share
    its artefacts; a student trained on the images of two agrees with its teacher more. `auto` takes `bns` if the
    teacher's statistics are known, the chosen recipe is neither `bns` nor one with targets of a record, and labels and
    classes are the default; None leaves all images to the chosen recipe.
    `probe_images` is the number of images that are synthesized in `probe` with another seed and a third recipe, to
    compare student and teacher on; nothing is trained on them. There are none if the statistics are not known.
    Recipes with student updates need a student that is trained during synthesis: the verb's own `student`, if given,
    which then takes its images from `live_source`; otherwise the temporary student that `competitor` returns for the
    recipe.
    Raises `BadInput` if the data cannot be used, if nothing can be synthesized from this teacher, and if two recipes
    have to train the verb's own student.
    """

    def __init__(
        self,
        teacher: Classifier,
        data: str | Path | None,
        synthesis: Synthesis,
        compute: Compute,
        *,
        second_recipe: str | None = None,
        probe_images: int = 0,
        competitor: Callable[[Recipe], Competitor | None] = lambda recipe: None,
        student: Classifier | None = None,
    ) -> None:
        self.compute = compute
        places = parts_of(data)
        synthetic_sets = [SyntheticSet(place) for place in places if (place / MANIFEST).exists()]
        for synthetic in synthetic_sets:
            synthetic.require_complete()
        self.sources = [open_images(place, teacher.card, part="train") for place in places]
        for source in self.sources:
            require_decodable(source)
        _tell_missing(self.sources, teacher)
        self.specs = {} if self.sources else _specs(teacher, synthesis, second_recipe)
        if self.sources and (second_recipe not in (AUTO, None) or replace(synthesis, images=None) != Synthesis()):
            console.notice("The images are given: options of synthesis make no others to train on.")
        alternating = {name: spec.choice.name for name, spec in self.specs.items() if spec.recipe.student_updates}
        if student and len(alternating) > 1:
            first, second = alternating.values()
            raise BadInput(
                f"One student cannot learn between the rounds of {first} and of {second}.",
                "Name another --second-recipe.",
            )
        self.student = student if alternating else None
        # The folder of the set that is made while the verb's own student learns; None without such a set.
        self.live = next(iter(alternating), None) if student else None
        self.competitors = {} if student else {name: competitor(spec.recipe) for name, spec in self.specs.items()}
        informed = next((spec.teacher for spec in self.specs.values()), teacher)
        self.probe = None
        if probe_images and not why_no_statistics(informed.network):
            used = {spec.choice.name for spec in self.specs.values()}
            used |= {synthetic.manifest["recipe"]["name"] for synthetic in synthetic_sets}
            recipe = next((name for name in OTHER_RECIPES if name not in used), OTHER_RECIPES[-1])
            self.probe = resolve(informed, replace(_alike(synthesis, recipe, probe_images), records=None))

    @property
    def inputs(self) -> list[Path]:
        """The files that are read besides the teacher and `data`."""
        return [path for spec in self.specs.values() for path in spec.inputs]

    def origin(self) -> dict[str, Any] | None:
        """Everything besides the teacher that the synthesized images depend on; None if no image is synthesized."""
        return {name: spec.origin() for name, spec in self.specs.items()} or None

    @property
    def made(self) -> list[tuple[SynthesisSpec, Classifier | None]]:
        """The sets that `gather` synthesizes, the probe images last, each with the student that its images compete
        with, or None.
        """
        students = {name: competitor.student for name, competitor in self.competitors.items() if competitor}
        if self.live and self.student:
            students[self.live] = self.student
        sets = [(spec, students.get(name)) for name, spec in self.specs.items()]
        return sets + ([(self.probe, None)] if self.probe else [])

    def __len__(self) -> int:
        """Number of images to train on."""
        return sum(self._counts.values()) - _held_out(sum(self._counts.values()))

    @property
    def _counts(self) -> dict[str, int]:
        """The number of images of every part, in order."""
        read = {f"data-{number}": len(source) for number, source in enumerate(self.sources)}
        return read | {name: spec.images for name, spec in self.specs.items()}

    def _marked(self) -> dict[str, Tensor]:
        """A mask `(images,)` for each part, true for images that are held out."""
        counts = self._counts
        total = sum(counts.values())
        marks = torch.zeros(total, dtype=torch.bool)
        marks[torch.randperm(total, generator=generator("held-out", self.compute.seed))[: _held_out(total)]] = True
        return dict(zip(counts, marks.split(list(counts.values())), strict=True))

    def live_source(self, folder: Path, batch_size: int, pool: Pool, others: TransferSet) -> LiveSource:
        """The source of the images that are made in the run's `folder` while the verb's own student learns from batches
        of `batch_size`, mixed with the images of `others`; `pool` makes batches of kept images.
        """
        assert self.live, "the recipe's images compete with no student"
        assert self.student, "the student is the verb's own"
        return LiveSource(
            self.specs[self.live],
            folder / self.live,
            self.compute,
            self.student,
            batch_size=batch_size,
            pool=pool,
            stored=(others.train, others.train_labels) if len(others.train) else None,
            held_out=self._marked()[self.live],
        )

    def gather(self, folder: Path, *, learnt: bool = False) -> TransferSet:
        """All images as stored, with their labels; one image in sixteen is held out.

        Images that are made while the verb's own student learns are included only after its training (`learnt`).
        """
        present = {
            name: self._made(name, spec, folder / name)
            for name, spec in self.specs.items()
            if learnt or name != self.live
        }
        parts = [*self.sources, *present.values()]
        images, labels = _gathered(parts) if parts else self._nothing()
        marks = [marked for name, marked in self._marked().items() if name not in self.specs or name in present]
        seconds = sum(map(seconds_of, present.values()))
        probe = images[:0]
        if self.probe:
            probes = build_set(self.probe, folder / PROBE, replace(self.compute, seed=self.compute.seed + 1))
            probe, seconds = probes.images, seconds + seconds_of(probes)
        held_out = torch.cat([torch.zeros(0, dtype=torch.bool), *marks])
        return TransferSet(
            train=images[~held_out],
            train_labels=labels[~held_out],
            held_out=images[held_out],
            held_out_labels=labels[held_out],
            probe=probe,
            synthesis_seconds=seconds,
            warnings=[warning for each in present.values() for warning in warnings_of(each)],
        )

    def _nothing(self) -> tuple[Tensor, Tensor]:
        """No images and no labels."""
        (spec,) = self.specs.values()
        return torch.zeros(0, *spec.teacher.card.input_size, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)

    def _made(self, name: str, spec: SynthesisSpec, folder: Path) -> SyntheticSet:
        """The set of a spec, made if it does not exist yet."""
        if name == self.live:
            return SyntheticSet(folder)
        competitor = self.competitors.get(name)
        return competitor.build(spec, folder, self.compute) if competitor else build_set(spec, folder, self.compute)


def parts_of(data: str | Path | None) -> list[Path]:
    """The folders of the images of `data`: the sets in a run's folder, or in its folder of each teacher, or `data`."""
    if data is None:
        return []
    sets = f"{SYNTHETIC}*/{MANIFEST}"
    of_run = [path.parent for pattern in (sets, f"{OF_TEACHER}*/{sets}") for path in Path(data).glob(pattern)]
    return sorted(of_run) if of_run and not (Path(data) / MANIFEST).exists() else [Path(data)]


def _gathered(sources: Sequence[ImageSource]) -> tuple[Tensor, Tensor]:
    """All images of the sources as stored (see `joined`), and their labels; synthetic sets are read shard by shard."""
    images, labels = zip(*(part for source in sources for part in _stored(source)), strict=True)
    return joined(images), torch.cat(labels)


def _stored(source: ImageSource) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(source, SyntheticSet):
        yield from map(source.read_shard, source.shards)
        return
    unclipped = isinstance(source, Fitted) and isinstance(source.source, SyntheticSet) and not source.source.in_range
    for images, labels in source.batches(FILLED):
        yield as_stored(images, in_range=not unclipped), labels


def _specs(teacher: Classifier, synthesis: Synthesis, second_recipe: str | None) -> dict[str, SynthesisSpec]:
    """The syntheses, by the name of their set's folder."""
    first = resolve(teacher, synthesis)
    if second_recipe == AUTO:
        informed = not why_no_statistics(first.teacher.network) and Want.TARGETS not in first.recipe.wants
        free = synthesis.labels == BALANCED and not synthesis.classes and first.images > 1
        wanted = informed and free and first.choice.name != OTHER_RECIPES[0]
        second_recipe = OTHER_RECIPES[0] if wanted else None
    if second_recipe is None:
        return {SYNTHETIC: first}
    if second_recipe == first.choice.name:
        raise BadInput(
            f"--second-recipe {second_recipe} is the first recipe, too.", "Name another one, or --second-recipe none."
        )
    if synthesis.classes or synthesis.labels != BALANCED:
        raise BadInput(
            "--second-recipe makes images of all classes.", "Use --second-recipe none with --classes and --labels."
        )
    half = first.images // 2
    return {
        SYNTHETIC: replace(first, synthesis=replace(synthesis, images=first.images - half)),
        f"{SYNTHETIC}-{second_recipe}": resolve(teacher, _alike(synthesis, second_recipe, half)),
    }


def _alike(synthesis: Synthesis, recipe: str, images: int) -> Synthesis:
    """The same synthesis by another recipe, with that recipe's own settings except for steps and batch size."""
    known = settings_of(recipe)
    settings = {name: synthesis.settings[name] for name in ("steps", "batch_size") if name in synthesis.settings}
    settings = {name: value for name, value in settings.items() if name in known}
    return Synthesis(
        recipe=recipe, preset=None, settings=settings, images=images, groups=synthesis.groups, records=synthesis.records
    )


def _tell_missing(sources: Sequence[ImageSource], teacher: Classifier) -> None:
    """Report the number of classes that no given image is labelled with, if there are at least as many images as
    classes. Images from the ancestor of an extended model lack the new classes, for instance.
    """
    if not sources:
        return
    labels = torch.cat([source.labels for source in sources])
    missing = teacher.card.classes - len(labels.unique())
    if missing and len(labels) >= teacher.card.classes:
        console.notice(
            f"No image stands for {missing} of the {teacher.card.classes} classes that {teacher.name} knows."
        )


def _held_out(images: int) -> int:
    return int(images * HELD_OUT_SHARE)


@dataclass(frozen=True, kw_only=True)
class TransferSet:
    """Images `(N, C, H, W)` as stored (uint8, or float16 in units of [0, 1]): `train`, `held_out` from the same sets,
    and `probe` of another seed and recipe (possibly empty); the seconds of their synthesis, and the warnings about
    their quality.

    Labels, int64 `(N,)`, are the classes that images were synthesized for, or the labels of real images.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    probe: Tensor
    synthesis_seconds: float
    warnings: Sequence[str] = ()


def in_batches(images: Tensor, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Stored images as float batches `(B, C, H, W)` in units of [0, 1], each with placeholder labels of 0."""
    for some in images.split(batch_size):
        yield as_float(some), torch.zeros(len(some), dtype=torch.long)
