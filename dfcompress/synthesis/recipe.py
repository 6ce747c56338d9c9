"""A recipe: a method of synthesis as data, and how a name with settings becomes one.

    import dfcompress
    from dfcompress import Loss, Phase, Pixels, Recipe
    from dfcompress.synthesis.losses import LayerOutput, bn_distance, class_cross_entropy

    def quiet(*, weight: float = 0.1, steps: int = 5, lr: float = 0.1, batch_size: int = 8) -> Recipe:
        small = Loss("quiet", lambda trace: trace.outputs["conv2"].abs().mean(), wants=[LayerOutput("conv2")])
        return Recipe(
            images=Pixels(clip=True),
            losses=[class_cross_entropy(), 10.0 * bn_distance(), weight * small],
            phases=[Phase(steps, lr)],
            batch_size=batch_size,
        )

    made = dfcompress.invert(checkpoint, synthesis=dfcompress.Synthesis(recipe=quiet, images=8), output=folder)

On the command line the function is named by its file: `--recipe mine.py:quiet --set weight=0.2`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dfcompress import console, schedules
from dfcompress.arguments import require_fields
from dfcompress.errors import BadInput, unknown
from dfcompress.machine.device import forked_randomness
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.settings import parse
from dfcompress.synthesis.images import Images
from dfcompress.synthesis.labels import BALANCED
from dfcompress.synthesis.losses import ChannelMeans, LayerOutput, Loss, Want
from dfcompress.synthesis.recipe_source import RecipeSource, find_recipe
from dfcompress.synthesis.records import BN_EQUIVALENT
from dfcompress.synthesis.records.record_file import Description
from dfcompress.synthesis.transforms import Transform, downscale

WITH_ACTIVATIONS, WITHOUT, BY_PATCHES = "activation-records", "deepinversion", "psaq-vit"

Schedule = Literal["constant", "cosine"]
SCHEDULES = get_args(Schedule)


@dataclass(frozen=True)
class Phase:
    """Steps of Adam at one peak rate, reached linearly over `warmup` steps, on what the `transforms` show.

    The optimiser and the schedule start anew in each phase.
    """

    steps: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = "constant"
    warmup: int = 0
    transforms: Sequence[Transform] = ()

    def __post_init__(self) -> None:
        """Raise `BadInput` for settings that Adam or a schedule cannot have."""
        if self.schedule not in SCHEDULES:
            raise BadInput(f"There is no schedule {self.schedule!r}.", f"Known: {', '.join(SCHEDULES)}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise BadInput(f"The betas {self.betas} are not in [0, 1).", "Adam's usual ones are 0.9 and 0.999.")
        if self.steps and not self.lr > 0:
            raise BadInput(f"The rate {self.lr} changes nothing.", "Use a number above 0.")

    @property
    def downscale(self) -> int:
        """By what the height and the width of the images are divided before the network sees them."""
        return math.prod(transform.downscale for transform in self.transforms)

    def rate(self, step: int, *, peak: float | None = None) -> float:
        """Learning rate of `step`, counted from 0; that of parameters with another peak rate than the phase's."""
        peak = self.lr if peak is None else peak
        return schedules.rate(step, peak=peak, steps=self.steps, schedule=self.schedule, warmup=self.warmup)


# The settings of recipes for the steps of first phases on smaller images, by which they divide height and width.
COARSE = {"quarter_steps": 4, "half_steps": 2}
# What `fast-imagenet` of all recipes have in common. Jitter is DeepInversion's for ImageNet; the rest is ours, chosen
# on EfficientNet-Lite0 by signals that need no data: J_KL of 16 whole images, and how many of them a second network,
# Lite2, takes for what they were made as. An eager bf16 step of 16 images costs 1.0, 0.30 and 0.12 s of one core at
# 224, 112 and 56 pixels. With 80 steps at half and 20 at full size, J_KL weighted 100 and cross-entropy 10, pixels
# from white noise had 0.35 and 3 (at a rate of 0.1), pixels from noise that falls with the frequency 0.25 and 5,
# spectra 0.16 and 10, and at a rate of 0.05 0.12 and 11. Worse were a rate of 0.03 (0.122 and 9), betas of 0.9 and
# 0.99 (0.19 and 8), and a spectrum divided by the frequency to the 0.7 (0.18 and 11). 60 steps each at a quarter and
# half and 40 at full size have 0.104 and 12. Crops to 0.9 in place of jitter showed no gain.
# A batch of 128 shares its statistics, whatever part of it fits into memory at once.
FAST_IMAGENET = {
    "quarter_steps": 60,
    "half_steps": 60,
    "steps": 40,
    "lr": 0.05,
    "schedule": "cosine",
    "jitter": 30,
    "spectrum": True,
    "batch_size": 128,
}


def coarse_to_fine(
    full: Phase, transforms: Callable[[int], Sequence[Transform]], *, quarter_steps: int = 0, half_steps: int
) -> list[Phase]:
    """The phase `full`, after one that shows the images at a quarter of their height and width and one at half, where a
    step costs a sixteenth and a quarter; a phase without steps is left out.

    `transforms(factor)` are those behind a downscaling by 4, 2 and 1.
    """
    smaller = [
        replace(full, steps=steps, transforms=[downscale(factor), *transforms(factor)])
        for factor, steps in ((4, quarter_steps), (2, half_steps))
    ]
    return [phase for phase in [*smaller, replace(full, transforms=transforms(1))] if phase.steps]


@dataclass(frozen=True, kw_only=True)
class StudentUpdates:
    """How the student that images compete with learns while they are made: synthesis and training alternate.

    A round makes `every` batches of images; then the student takes `steps` steps of `batch_size` images, at a rate that
    falls from `lr` along a cosine over all rounds. With `keep` the images of all rounds so far are kept, and these are
    what it learns from; else a generator renders new ones for each of its steps, and there are so many `rounds` as are
    stated here. `temperature` and `objectives` (None: the usual ones) are the distillation's, where no others are asked
    for.
    """

    every: int = 1
    steps: int
    lr: float
    batch_size: int
    keep: bool = True
    rounds: int = 0
    temperature: float = 4.0
    objectives: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Raise `BadInput` for rounds without a batch or a step, and for a number of rounds that is not stated."""
        if self.every < 1 or self.steps < 1:
            raise BadInput(f"A round of {self.every} batches and {self.steps} steps is none.", "Use 1 or more.")
        if not self.keep and self.rounds < 1:
            raise BadInput("Images that are not kept are made in rounds.", "State how many.")


# What stands beside the losses, by their names, in lines of a set's metrics.jsonl and in its progress.
RESERVED = ("shard", "step", "process", "seconds", "attempts", "health", "round")


@dataclass(frozen=True)
class Recipe:
    """Images + weighted losses + phases, each with its transforms.

    A value: a run works on copies of the images and of the modules that losses own, and leaves the recipe as it was.
    """

    images: Images
    batch_size: int
    losses: Sequence[Loss] = ()
    phases: Sequence[Phase] = ()
    student_updates: StudentUpdates | None = None

    def __post_init__(self) -> None:
        """Raise `BadInput` for an empty batch, for two losses of one name, under which values and modules are saved,
        and for a reserved name; what was given as a list can be changed no more.
        """
        if self.batch_size < 1:
            raise BadInput(f"A batch of {self.batch_size} images is none.", "Use --batch-size 1 or more.")
        names = [loss.name for loss in self.losses]
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadInput(f"Two losses of a recipe have the name {twice[0]!r}.", "Give one of them another name.")
        if taken := [name for name in names if name in RESERVED]:
            problem = f"A loss of a recipe has the name {taken[0]!r}, which metrics need for something else."
            raise BadInput(problem, f"Give it one that is not among {', '.join(RESERVED)}.")
        object.__setattr__(self, "losses", tuple(self.losses))
        object.__setattr__(self, "phases", tuple(self.phases))

    def sized_for(self, teacher: Classifier) -> Recipe:
        """The recipe whose losses own modules that fit to this teacher."""
        losses = [loss.sized_for(teacher) for loss in self.losses]
        return self if all(map(operator.is_, losses, self.losses)) else replace(self, losses=losses)

    @property
    def wants(self) -> frozenset[Want | LayerOutput | ChannelMeans]:
        """What any of the losses wants to be recorded."""
        return frozenset(want for loss in self.losses for want in loss.wants)

    @property
    def layers(self) -> list[str]:
        """The layers that any of the losses looks at by name, sorted."""
        return sorted({want.layer for want in self.wants if not isinstance(want, Want)})

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a batch cannot be computed in chunks: some losses, and modules that a loss owns, see it whole, and a
        generator that lives on makes it whole.
        """
        whole = any(loss.whole_batch or isinstance(loss.value, torch.nn.Module) for loss in self.losses)
        return self.images.persistent or whole

    @property
    def lives_on(self) -> bool:
        """Whether a batch depends on those before: through a generator that goes on learning, or where a student learns
        in between through the modules of losses.
        """
        modules = any(isinstance(loss.value, torch.nn.Module) for loss in self.losses)
        return self.images.persistent or (modules and self.student_updates is not None)

    @property
    def label_free(self) -> bool:
        """Whether nothing steers the images towards a class; their label is then the teacher's answer."""
        return Want.LABELS not in self.wants

    @property
    def steps(self) -> int:
        """Optimisation steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def work(self) -> float:
        """The work of all steps, in steps at full size."""
        return sum(phase.steps / phase.downscale**2 for phase in self.phases)

    @property
    def sizes(self) -> int:
        """How many sizes of images the network sees."""
        return len({phase.downscale for phase in self.phases if phase.steps}) or 1

    def phase_at(self, step: int) -> tuple[Phase, int]:
        """The phase that a step belongs to, and the step's number in it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise IndexError(step)


@dataclass(frozen=True)
class RecipeChoice:
    """A recipe's name, preset and every setting resolved, as `dataset.json` keeps it."""

    name: str
    preset: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, built once."""
        # What is random in modules of losses and generators is the same in every process.
        with forked_randomness(torch.device("cpu")):
            torch.default_generator.manual_seed(0)
            recipe = _built(find_recipe(self.name), self.settings)
        if not isinstance(recipe, Recipe):
            raise BadInput(f"Recipe {self.name} gave a {type(recipe).__name__}.", "Let the function return a Recipe.")
        return recipe

    @property
    def sha256(self) -> str | None:
        """Of the file that a recipe which is not ours is written in."""
        return find_recipe(self.name).sha256


def _built(source: RecipeSource, settings: Mapping[str, Any]) -> Any:
    """What the function of a recipe returns; raises `BadInput` for whatever the user's own function raises."""
    try:
        return source.function(**settings)
    except Exception as error:
        if source.sha256 is None or isinstance(error, BadInput):
            raise
        problem = f"Recipe {source.name} failed: {type(error).__name__}: {error}."
        raise BadInput(problem, "Correct the function, or its settings.") from error


def choose(
    name: str | Callable[..., Recipe],
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    card: ModelCard | None = None,
    record: Description | None = None,
) -> RecipeChoice:
    """Resolve a recipe: the function's defaults, under the preset's settings, under `overrides`.

    Text in `overrides` (from the command line) is converted to the type of the setting's default.
    Without `preset` the recipe's own `default_preset(card, record)` says which is taken, or else `usual_preset`. A
    preset for images of another size gets a notice.
    `pooled` is the record's, where a recipe has it.
    Raises `BadInput` for unknown names, with a suggestion, for values of the wrong type, and for a preset that is not
    meant for the record.
    """
    source = find_recipe(name)
    if preset is None:
        own = source.beside("default_preset")
        preset = own(card, record) if own and card else usual_preset(source.presets, card)
    if preset not in source.presets:
        raise unknown("preset", preset, list(source.presets))
    if card:
        _tell_of_other_size(preset, card)
    if record and (check := source.beside("check_preset")):
        check(preset, record)
    defaults = source.settings
    settings = {**defaults, **source.presets[preset]}
    for key, value in (overrides or {}).items():
        if key not in defaults:
            raise unknown(f"recipe setting of {source.name} called", key, list(defaults))
        settings[key] = parse(key, value, defaults[key])
    if record and "pooled" in settings:
        settings["pooled"] = record.pooled
    console.notice(f"Recipe {source.name}, preset {preset}.", level=console.VERBOSE)
    choice = RecipeChoice(source.name, preset, settings)
    _ = choice.recipe  # So that settings that do not fit are refused before any work.
    return choice


CIFAR, MNIST, IMAGENET = "cifar10", "mnist", "imagenet"


def data_like(card: ModelCard) -> str:
    """The data whose settings suit a model's inputs, as the names of presets end: `imagenet` above 64 pixels, else
    `mnist` for grey images, which are mostly characters, and `cifar10` for all others.
    """
    if not card.small:
        return IMAGENET
    return MNIST if card.input_size[0] == 1 else CIFAR


def usual_preset(presets: Iterable[str], card: ModelCard | None) -> str:
    """The first preset for data like the model's; the first of all where there is none, or no model."""
    names = list(presets)
    suitable = [name for name in names if card and name.endswith(f"-{data_like(card)}")]
    return (suitable or names)[0]


def _tell_of_other_size(preset: str, card: ModelCard) -> None:
    """Say where the settings of a preset are for much smaller or larger images than the model takes."""
    data = preset.rpartition("-")[2]
    if data in (CIFAR, MNIST, IMAGENET) and (data == IMAGENET) != (data_like(card) == IMAGENET):
        height, width = card.input_size[1:]
        console.notice(
            f"Preset {preset} has settings for images of {'224 × 224' if data == IMAGENET else '32 × 32'} pixels; the "
            f"model takes {height} × {width}. Without --preset those that suit it are taken."
        )


def settings_of(name: str) -> dict[str, Any]:
    """The settings of a recipe and their defaults."""
    return find_recipe(name).settings


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """Which images to make: the recipe, its preset, settings that override the preset's, how many (None: as many as the
    verb makes by default), and of what.

    The `recipe` is a name, `file.py:function`, or a function that returns a `Recipe`. Without one it is that of the
    record's kind, and without a record `deepinversion`, or `psaq-vit` of a network with patches and no BatchNorm.
    `records` is the file that the model's owner released, `beside` the one beside the checkpoint if there is one, None
    none.
    `labels` is `balanced`, `random` or a file with a class for every image; `classes` are the only ones to use.
    `groups` is how many batches a step works on side by side; each batch keeps its own statistics.
    With `preview_every` the picture is renewed after so many steps.
    """

    recipe: str | Callable[..., Recipe] | None = None
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    images: int | None = None
    labels: str = BALANCED
    classes: Sequence[str] = ()
    groups: int | Literal["auto"] = "auto"
    preview_every: int = 0
    records: str | Path | None = "beside"

    def __post_init__(self) -> None:
        """Raise `BadInput` for a value of another type, and for a number of batches side by side that is none."""
        require_fields(self)
        if self.groups != "auto" and self.groups < 1:
            raise BadInput(f"groups = {self.groups} is no number of batches.", "Use 1 or more, or auto.")

    def counted(self, usual: int) -> Synthesis:
        """Itself with a number of images: the one asked for, else `usual`."""
        return self if self.images is not None else replace(self, images=usual)


def choose_recipe(synthesis: Synthesis, card: ModelCard, record: Description | None) -> RecipeChoice:
    """The recipe with every setting resolved for a model; raises `BadInput` for unknown names and values."""
    if synthesis.images is not None and synthesis.images < 1:
        raise BadInput(f"--images {synthesis.images} is not a number of images.", "Ask for at least 1.")
    usual = WITH_ACTIVATIONS if record and record.kind != BN_EQUIVALENT else WITHOUT
    choice = choose(synthesis.recipe or usual, synthesis.preset, synthesis.settings, card=card, record=record)
    if (synthesis.classes or synthesis.labels != BALANCED) and choice.recipe.label_free:
        raise BadInput(
            f"Recipe {choice.name} steers images towards no class.",
            "Leave out --classes and --labels, or name another.",
        )
    return choice
