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
    """Steps of Adam with one schedule: the learning rate rises linearly to `lr` over `warmup` steps, then stays
    (`constant`) or falls to 0 (`cosine`). The teacher sees the images after the `transforms`.

    The optimiser and the schedule start anew in each phase.
    """

    steps: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = "constant"
    warmup: int = 0
    transforms: Sequence[Transform] = ()

    def __post_init__(self) -> None:
        """Raise `BadInput` for an unknown schedule, betas outside [0, 1), and a learning rate that is not above 0."""
        if self.schedule not in SCHEDULES:
            raise BadInput(f"There is no schedule {self.schedule!r}.", f"Known: {', '.join(SCHEDULES)}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise BadInput(f"The betas {self.betas} are not in [0, 1).", "Adam's usual ones are 0.9 and 0.999.")
        if self.steps and not self.lr > 0:
            raise BadInput(f"The rate {self.lr} changes nothing.", "Use a number above 0.")

    @property
    def downscale(self) -> int:
        """The factor by which the images' height and width are divided before the network sees them."""
        return math.prod(transform.downscale for transform in self.transforms)

    def rate(self, step: int, *, peak: float | None = None) -> float:
        """Learning rate of `step`, counted from 0; `peak` replaces the phase's peak rate for some parameters."""
        peak = self.lr if peak is None else peak
        return schedules.rate(step, peak=peak, steps=self.steps, schedule=self.schedule, warmup=self.warmup)


# Settings that hold the number of steps of the first phases, on smaller images; values divide height and width.
COARSE = {"quarter_steps": 4, "half_steps": 2}
# Settings that the `fast-imagenet` presets of all recipes share. The jitter is DeepInversion's for ImageNet. All others
# are ours, chosen on EfficientNet-Lite0 by two signals that need no data: J_KL of 16 whole images, and the number of
# the 16 that a second network, Lite2, classifies as intended. An eager bf16 step of 16 images costs 1.0, 0.30 and 0.12
# s of one core at 224, 112 and 56 pixels. Results as (J_KL, number) with 80 steps at half and 20 at full size, J_KL
# weighted 100 and cross-entropy 10: pixels from white noise (0.35, 3), at a learning rate of 0.1; pixels from noise
# that falls with the frequency (0.25, 5); spectra (0.16, 10); spectra at a learning rate of 0.05 (0.12, 11). Worse were
# a learning rate of 0.03 (0.122, 9), betas of 0.9 and 0.99 (0.19, 8), and a spectrum divided by the frequency to the
# power 0.7 (0.18, 11). 60 steps each at quarter and half size and 40 at full size give (0.104, 12). Crops to 0.9
# instead of jitter showed no gain.
# A batch of 128 images shares its statistics, however few of them fit into memory at once.
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
    """Phases at a quarter and at half of the height and width, then `full`. A step of the smaller ones costs a
    sixteenth and a quarter of a full one. Phases without steps are left out.

    `transforms(factor)` are the transforms that follow the downscaling by `factor`, which is 4, 2 and 1.
    """
    smaller = [
        replace(full, steps=steps, transforms=[downscale(factor), *transforms(factor)])
        for factor, steps in ((4, quarter_steps), (2, half_steps))
    ]
    return [phase for phase in [*smaller, replace(full, transforms=transforms(1))] if phase.steps]


@dataclass(frozen=True, kw_only=True)
class StudentUpdates:
    """How a student is trained during synthesis: synthesis and training alternate.

    A round makes `every` batches of images; then the student takes `steps` steps of `batch_size` images. Its learning
    rate falls from `lr` along a cosine over all rounds. With `keep`, the images of all rounds are kept and the student
    learns from all so far; otherwise a generator renders new images for each of the student's steps, and `rounds`
    states the number of rounds. `temperature` and `objectives` (None: the default ones) are the distillation's, unless
    others are requested.
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
        """Raise `BadInput` for rounds without a batch or a step, and for a missing number of rounds without `keep`."""
        if self.every < 1 or self.steps < 1:
            raise BadInput(
                f"A round must have 1 batch and 1 step or more; it has {self.every} and {self.steps}.", "Use 1 or more."
            )
        if not self.keep and self.rounds < 1:
            raise BadInput("Images that are not kept are made in rounds.", "State how many.")


# Keys beside the losses' names in lines of a set's metrics.jsonl and in its progress; a loss cannot have such a name.
RESERVED = ("shard", "step", "process", "seconds", "attempts", "health", "round")


@dataclass(frozen=True)
class Recipe:
    """A method of synthesis: a parametrisation of images, weighted losses, and phases, each with its transforms.

    `batch_size` images share their statistics; `student_updates` is None if no student learns during synthesis. A
    recipe is a value: a run copies the images and the modules that losses own, and leaves the recipe unchanged.
    """

    images: Images
    batch_size: int
    losses: Sequence[Loss] = ()
    phases: Sequence[Phase] = ()
    student_updates: StudentUpdates | None = None

    def __post_init__(self) -> None:
        """Raise `BadInput` for an empty batch, for two losses of the same name (values and modules are saved by name),
        and for a reserved name; lists become tuples.
        """
        if self.batch_size < 1:
            raise BadInput(
                f"A batch must have 1 image or more; it has {self.batch_size}.", "Use --batch-size 1 or more."
            )
        names = [loss.name for loss in self.losses]
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadInput(f"Two losses of a recipe have the name {twice[0]!r}.", "Give one of them another name.")
        if taken := [name for name in names if name in RESERVED]:
            problem = f"A loss of a recipe has the name {taken[0]!r}, which metrics need for something else."
            raise BadInput(problem, f"Give it one that is not among {', '.join(RESERVED)}.")
        object.__setattr__(self, "losses", tuple(self.losses))
        object.__setattr__(self, "phases", tuple(self.phases))

    def sized_for(self, teacher: Classifier) -> Recipe:
        """The recipe with the losses' modules sized for this teacher."""
        losses = [loss.sized_for(teacher) for loss in self.losses]
        return self if all(map(operator.is_, losses, self.losses)) else replace(self, losses=losses)

    @property
    def wants(self) -> frozenset[Want | LayerOutput | ChannelMeans]:
        """Everything that any loss wants to be recorded."""
        return frozenset(want for loss in self.losses for want in loss.wants)

    @property
    def layers(self) -> list[str]:
        """The layers that any loss refers to by name, sorted."""
        return sorted({want.layer for want in self.wants if not isinstance(want, Want)})

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a batch cannot be computed in chunks: some losses and all modules that losses own need the whole
        batch, and persistent images are made as a whole.
        """
        whole = any(loss.whole_batch or isinstance(loss.value, torch.nn.Module) for loss in self.losses)
        return self.images.persistent or whole

    @property
    def lives_on(self) -> bool:
        """Whether a batch depends on the batches before: a persistent generator keeps its weights, and modules of
        losses persist where a student learns between batches.
        """
        modules = any(isinstance(loss.value, torch.nn.Module) for loss in self.losses)
        return self.images.persistent or (modules and self.student_updates is not None)

    @property
    def label_free(self) -> bool:
        """Whether no loss steers the images towards a class; their labels are then the teacher's predictions."""
        return Want.LABELS not in self.wants

    @property
    def steps(self) -> int:
        """Number of optimisation steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def work(self) -> float:
        """The work of all steps, as an equivalent number of steps at full size."""
        return sum(phase.steps / phase.downscale**2 for phase in self.phases)

    @property
    def sizes(self) -> int:
        """Number of image sizes that the network sees."""
        return len({phase.downscale for phase in self.phases if phase.steps}) or 1

    def phase_at(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and the step's number in that phase; raises `IndexError` after the last step."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise IndexError(step)


@dataclass(frozen=True)
class RecipeChoice:
    """A recipe's name, its preset and all settings resolved, as `dataset.json` stores them."""

    name: str
    preset: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, built once."""
        # Random initial values in losses' modules and generators are the same in every process.
        with forked_randomness(torch.device("cpu")):
            torch.default_generator.manual_seed(0)
            recipe = _built(find_recipe(self.name), self.settings)
        if not isinstance(recipe, Recipe):
            raise BadInput(f"Recipe {self.name} gave a {type(recipe).__name__}.", "Let the function return a Recipe.")
        return recipe

    @property
    def sha256(self) -> str | None:
        """sha256 of the file of a recipe that is not built in; None for a built-in one."""
        return find_recipe(self.name).sha256


def _built(source: RecipeSource, settings: Mapping[str, Any]) -> Any:
    """Call a recipe's function; raise `BadInput` for whatever a user's own function raises."""
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
    """Resolve a recipe: the function's defaults, overridden by the preset's settings, then by `overrides`.

    Text in `overrides` (from the command line) is converted to the type of the setting's default. Without `preset`, the
    recipe's own `default_preset(card, record)` selects one, or else `usual_preset`. A notice reports a preset that is
    meant for images of another size. If `steps` is overridden alone, the steps on smaller images change in proportion.
    The setting `pooled`, if the recipe has it, is taken from the record.
    Raises `BadInput` for unknown names (with a suggestion), for values of the wrong type, for a preset that is not
    meant for the record, and for a function that fails or returns no `Recipe`.
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
    if "steps" in (overrides or {}) and not COARSE.keys() & (overrides or {}).keys():
        share = settings["steps"] / max(1, {**defaults, **source.presets[preset]}["steps"])
        settings |= {name: round(share * settings[name]) for name in COARSE if name in settings}
    if record and "pooled" in settings:
        settings["pooled"] = record.pooled
    console.notice(f"Recipe {source.name}, preset {preset}.", level=console.VERBOSE)
    choice = RecipeChoice(source.name, preset, settings)
    _ = choice.recipe  # Built now, so that invalid settings are refused before any work.
    return choice


CIFAR, MNIST, IMAGENET = "cifar10", "mnist", "imagenet"


def data_like(card: ModelCard) -> str:
    """The data set whose settings suit a model's inputs, as presets' names end: `imagenet` above 64 pixels; below,
    `mnist` for grey images, which are mostly characters, and `cifar10` for all others.
    """
    if not card.small:
        return IMAGENET
    return MNIST if card.input_size[0] == 1 else CIFAR


def usual_preset(presets: Iterable[str], card: ModelCard | None) -> str:
    """The first preset for data like the model's; without such a preset or a model, the first of all."""
    names = list(presets)
    suitable = [name for name in names if card and name.endswith(f"-{data_like(card)}")]
    return (suitable or names)[0]


def _tell_of_other_size(preset: str, card: ModelCard) -> None:
    """Report a preset whose settings are for much smaller or larger images than the model takes."""
    data = preset.rpartition("-")[2]
    if data in (CIFAR, MNIST, IMAGENET) and (data == IMAGENET) != (data_like(card) == IMAGENET):
        height, width = card.input_size[1:]
        console.notice(
            f"Preset {preset} has settings for images of {'224 × 224' if data == IMAGENET else '32 × 32'} pixels; the "
            f"model takes {height} × {width}. Without --preset those that suit it are taken."
        )


def settings_of(name: str) -> dict[str, Any]:
    """The settings of a recipe with their defaults."""
    return find_recipe(name).settings


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """Which images to synthesize: the recipe, its preset, settings that override the preset's, and the number of
    `images` (None: the default of the verb).

    `recipe` is a name, `file.py:function`, or a function that returns a `Recipe`. None selects the recipe for the
    record's kind; without a record it selects `deepinversion`, or `psaq-vit` for a network with patches and no
    BatchNorm.
    `records` is the file of an activation record that the model's owner released; `beside` uses the record beside the
    checkpoint if there is one, None uses none.
    `labels` is `balanced`, `random` or a file with a class for every image; `classes` restricts the classes.
    `groups` is the number of batches that a step processes side by side; each batch keeps its own statistics.
    `preview_every` is the number of steps after which the preview picture is written again; 0 disables that.
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
        """Raise `BadInput` for a value of the wrong type, and for less than one batch side by side."""
        require_fields(self)
        if self.groups != "auto" and self.groups < 1:
            raise BadInput(f"groups must be 1 batch or more; it is {self.groups}.", "Use 1 or more, or auto.")

    def counted(self, usual: int) -> Synthesis:
        """This synthesis with a number of images: the requested number, else `usual`."""
        return self if self.images is not None else replace(self, images=usual)


def choose_recipe(synthesis: Synthesis, card: ModelCard, record: Description | None) -> RecipeChoice:
    """The recipe with all settings resolved for a model; raises `BadInput` for unknown names and values, for less than
    one image, and for labels or classes where the recipe steers images towards no class.
    """
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
