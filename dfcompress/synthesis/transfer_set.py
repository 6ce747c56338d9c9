"""Where a verb's training images come from: a synthetic set made or finished first, or images that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.data.real import ImageSource, open_images
from dfcompress.data.synthetic_set import MANIFEST, SyntheticSet, as_float, as_stored
from dfcompress.device import Compute
from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier
from dfcompress.models.statistics import why_no_statistics
from dfcompress.randomness import generator
from dfcompress.settings import AUTO
from dfcompress.synthesis.labels import BALANCED
from dfcompress.synthesis.losses import Want
from dfcompress.synthesis.recipe import Recipe, Synthesis, settings_of
from dfcompress.synthesis.set_builder import UpdatedStudent, build_set, seconds_of
from dfcompress.synthesis.spec import SynthesisSpec, resolve

HELD_OUT_SHARE = 1 / 16
NONE = "none"
SYNTHETIC = "synthetic"
OF_TEACHER = "teacher-"
OTHER_RECIPES = ("bns", "deepinversion", "bns-inception")


class TransferSetSource:
    """Where a verb's training images come from: checked when made, gathered once the run has a folder.

    `data` is a synthetic set, the folder of a run that made some, or real images; None means that sets are made in the
    run's folder, or finished there: half of the images by the chosen recipe in `synthetic`, half by the recipe `mix`
    (as many steps, if some were asked for) in `synthetic-<mix>`. Images of one recipe share its artefacts, and a
    student trained on two follows its teacher further. `auto` takes `bns` where the teacher's statistics are known and
    no classes were asked for; `none` leaves all to the chosen recipe.
    `unseen` more images are made in `unseen`, by another seed and a third recipe, to ask about and never to train on;
    none where the statistics are not known.
    `learner` makes the student that a recipe's images compete with, None for recipes that need none.
    Raises `BadInput` where the data cannot be used, or nothing can be made from this teacher.
    """

    def __init__(
        self,
        teacher: Classifier,
        data: str | Path | None,
        synthesis: Synthesis,
        compute: Compute,
        *,
        mix: str = NONE,
        unseen: int = 0,
        learner: Callable[[Recipe], UpdatedStudent | None] = lambda recipe: None,
    ) -> None:
        self.compute = compute
        places = _parts(data)
        given = [SyntheticSet(place) for place in places if (place / MANIFEST).exists()]
        for synthetic in given:
            synthetic.require_complete()
        self.sources = [open_images(place, teacher.card, part="train") for place in places]
        self.jobs = {} if self.sources else _jobs(teacher, synthesis, mix)
        if self.sources and (mix not in (AUTO, NONE) or replace(synthesis, images=1) != Synthesis(images=1)):
            console.notice("The images are those of --data: options of synthesis make no others to train on.")
        self.learners = {name: learner(job.recipe) for name, job in self.jobs.items()}
        informed = next((job.teacher for job in self.jobs.values()), teacher)
        self.unseen = None
        if unseen and not why_no_statistics(informed.network):
            used = {job.choice.name for job in self.jobs.values()}
            used |= {synthetic.manifest["recipe"]["name"] for synthetic in given}
            recipe = next((name for name in OTHER_RECIPES if name not in used), OTHER_RECIPES[-1])
            self.unseen = resolve(informed, replace(_alike(synthesis, recipe, unseen), records=None))

    @property
    def inputs(self) -> list[Path]:
        """The files that are read besides the teacher and `data`."""
        return [path for job in self.jobs.values() for path in job.inputs]

    def origin(self) -> dict[str, Any] | None:
        """What images that are made depend on besides the teacher, None where they are there."""
        return {name: job.origin() for name, job in self.jobs.items()} or None

    @property
    def made(self) -> list[tuple[SynthesisSpec, Classifier | None]]:
        """The sets that `gather` makes, the one that no student learns from last, each with what its images compete
        with, if anything.
        """
        students = {name: learner.student for name, learner in self.learners.items() if learner}
        made = [(job, students.get(name)) for name, job in self.jobs.items()]
        return made + ([(self.unseen, None)] if self.unseen else [])

    @property
    def adaptive(self) -> bool:
        """Whether images are made that compete with a student."""
        return any(job.recipe.student_updates for job in self.jobs.values())

    def __len__(self) -> int:
        """How many images there are to train on."""
        images = sum(map(len, self.sources)) + sum(job.images for job in self.jobs.values())
        return images - _held_out(images)

    def gather(self, folder: Path) -> TransferSet:
        """All images as they are stored; one in sixteen is held out."""
        made = [
            build_set(job, folder / name, self.compute, student=self.learners[name]) for name, job in self.jobs.items()
        ]
        images = _together([_stored(source) for source in [*self.sources, *made]])
        seconds = sum(map(seconds_of, made))
        unseen = images[:0]
        if self.unseen:
            other = build_set(self.unseen, folder / "unseen", replace(self.compute, seed=self.compute.seed + 1))
            unseen, seconds = other.images, seconds + seconds_of(other)
        order = torch.randperm(len(images), generator=generator("held-out", self.compute.seed))
        train, held_out = order[_held_out(len(images)) :].sort().values, order[: _held_out(len(images))]
        return TransferSet(images[train], images[held_out], unseen, seconds)


def _parts(data: str | Path | None) -> list[Path]:
    """Where the images of `data` lie: the sets that a run made, in one folder or one for each teacher, or one place."""
    if data is None:
        return []
    sets = f"{SYNTHETIC}*/{MANIFEST}"
    made = [path.parent for pattern in (sets, f"{OF_TEACHER}*/{sets}") for path in Path(data).glob(pattern)]
    return sorted(made) if made and not (Path(data) / MANIFEST).exists() else [Path(data)]


def _stored(source: ImageSource) -> Tensor:
    """All images of a source as they are stored."""
    if isinstance(source, SyntheticSet):
        return source.images
    return torch.cat([as_stored(some, in_range=True) for some, _ in source.batches(256)])


def _jobs(teacher: Classifier, synthesis: Synthesis, mix: str) -> dict[str, SynthesisSpec]:
    """What to make, by the folder it is made in."""
    first = resolve(teacher, synthesis)
    if mix == AUTO:
        informed = not why_no_statistics(first.teacher.network) and Want.TARGETS not in first.recipe.wants
        free = synthesis.labels == BALANCED and not synthesis.classes and first.images > 1
        mix = OTHER_RECIPES[0] if informed and free and first.choice.name != OTHER_RECIPES[0] else NONE
    if mix == NONE:
        return {SYNTHETIC: first}
    if mix == first.choice.name:
        raise BadInput(f"--mix {mix} is the recipe that is mixed.", "Name another one, or --mix none.")
    if synthesis.classes or synthesis.labels != BALANCED:
        raise BadInput("--mix makes images of all classes.", "Use --mix none with --classes and --labels.")
    half = first.images // 2
    return {
        SYNTHETIC: replace(first, synthesis=replace(synthesis, images=first.images - half)),
        f"{SYNTHETIC}-{mix}": resolve(teacher, _alike(synthesis, mix, half)),
    }


def _alike(synthesis: Synthesis, recipe: str, images: int) -> Synthesis:
    """What was asked for, by another recipe: its settings are its own, but for steps and the size of batches."""
    own = settings_of(recipe)
    asked = {name: synthesis.settings[name] for name in ("steps", "batch_size") if name in synthesis.settings}
    asked = {name: value for name, value in asked.items() if name in own}
    return Synthesis(
        recipe=recipe, preset=None, settings=asked, images=images, groups=synthesis.groups, records=synthesis.records
    )


def _together(sets: Sequence[Tensor]) -> Tensor:
    """Stored images of several sets as one: uint8 where all are, else float16 in units of [0, 1]."""
    if len({images.dtype for images in sets}) == 1:
        return torch.cat(list(sets))
    return torch.cat([as_float(images).to(torch.float16) for images in sets])


def _held_out(images: int) -> int:
    return int(images * HELD_OUT_SHARE)


@dataclass(frozen=True)
class TransferSet:
    """Images `(N, C, H, W)` as stored (uint8, or float16 in units of [0, 1]): to train on, held out from the same set,
    and of another seed and recipe (none of those where there are no images); the seconds they took to make.
    """

    train: Tensor
    held_out: Tensor
    unseen: Tensor
    synthesis_seconds: float


def in_batches(images: Tensor, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Stored images as float batches `(B, C, H, W)` in units of [0, 1], each with labels that say nothing."""
    for some in images.split(batch_size):
        yield as_float(some), torch.zeros(len(some), dtype=torch.long)
