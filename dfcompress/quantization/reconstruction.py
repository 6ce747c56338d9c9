"""Reconstruction of a quantized network unit by unit: rounding and input steps are learnt so that each unit's output
stays what the float network has there.

Learnt rounding is AdaRound (Nagel et al. 2020), units are blocks (BRECQ, Li et al. 2021), activations are quantized at
random while learning (QDrop, Wei et al. 2022), as GENIE (Jeon et al. 2023) does with synthetic images.
The `Trainer` trains one student by its answers to whole images; here many small problems are solved one after the
other, on features, so this is a loop of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dfcompress import console
from dfcompress.arguments import require_fields
from dfcompress.data.synthetic_set import as_float
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.machine.memory import free_bytes
from dfcompress.machine.process import exact_fp32
from dfcompress.models.classifier import Classifier, count_runs, evaluating, images_a_pass
from dfcompress.models.fake_quantizers import (
    InputGrid,
    QuantizedLayer,
    WeightGrid,
    in_float,
    per_channel,
    quantized_layers,
)
from dfcompress.models.hooks import hooked_inputs, hooked_outputs
from dfcompress.randomness import generator, seed_of
from dfcompress.run import Clock, save_state
from dfcompress.schedules import cosine

IMAGES = 1024  # Features of so many are in memory,
FEATURES = 2**32  # or of fewer, so that they take no more bytes,
ROOM = 0.3  # and no more of the free memory; what a unit takes while it learns comes beside them.
LARGEST_UNIT = 4
PASSED = 256  # Images of a forward pass, at most.
Side = Literal["input", "output"]
GAMMA, ZETA = -0.1, 1.1  # γ and ζ: the rectified sigmoid is stretched, so that 0 and 1 are reached (AdaRound, eq. 23).
BETA = (20.0, 2.0)  # β of the rounding penalty, from first to last.


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Settings: `steps` a unit, in batches of `batch_size`; Adam at `lr` for the rounding, at `input_lr` for the steps
    of activations; `rounding` weighs the push to whole integers, which begins after the share `warmup` of the steps;
    `drop` is the share of activations left in float.
    """

    steps: int = 1000
    lr: float = 0.01
    batch_size: int = 32
    input_lr: float = 1e-4
    rounding: float = 0.01
    warmup: float = 0.2
    drop: float = 0.5

    def __post_init__(self) -> None:
        """Raise `BadInput` for settings that cannot be."""
        require_fields(self)
        if self.batch_size < 1 or not 0 < self.lr < math.inf or not 0 <= self.warmup < 1 or not 0 <= self.drop < 1:
            raise BadInput(
                f"{self} is no reconstruction.", "Use at least one image, a rate above 0 and shares below 1."
            )


@dataclass(frozen=True)
class Reconstructed:
    """What a finished reconstruction tells: units, steps in all, seconds over all invocations, and the mean squared
    error of each unit's output as a share of the output's variance.
    """

    units: int
    steps: int
    seconds: float
    losses: dict[str, float]


def reconstruct(
    student: Classifier, teacher: Classifier, images: Tensor, settings: Reconstruction, *, seed: int, state: Path | None
) -> Reconstructed:
    """Learn the rounding of the calibrated `student`'s weights, unit by unit, and freeze it.

    `teacher` is the same network in float, on the same device; `images` `(N, C, H, W)` as stored. Finished units are
    kept in the file `state`; where it is there, work goes on from it, to the same bits. Every process does all units,
    with features of as many images as have room in the memory that was free at the beginning.
    """
    images = images[torch.randperm(len(images), generator=generator("reconstruction", seed))[:IMAGES]]
    names = units_of(student)
    clock, losses = Clock(), {}
    room = world().broadcast(min(FEATURES, int(ROOM * free_bytes(teacher.mean.device))))
    if state and state.exists():
        saved = torch.load(state, weights_only=True, map_location="cpu")
        clock.go_on_from(saved["seconds"])
        losses, room = saved["losses"], saved.get("room", FEATURES)
        for name, values in saved["layers"].items():
            _restore(quantized_layers(student.network)[name], values)
    with console.progress("reconstruction", len(names)) as progress:
        for number, name in enumerate(names):
            if name in losses:
                continue
            losses[name] = _reconstruct_unit(
                student, teacher, name, images, settings, seed=seed_of("reconstruction", seed, number), room=room
            )
            progress.update(number + 1, error=losses[name])
            if state and world().is_main:
                layers = {
                    each: _state(layer) for each, layer in quantized_layers(student.network).items() if layer.is_frozen
                }
                save_state(state, {"seconds": clock.seconds, "losses": losses, "layers": layers, "room": room})
    return Reconstructed(len(names), settings.steps * len(names), clock.seconds, losses)


def units_of(classifier: Classifier) -> list[str]:
    """The parts that are reconstructed one after the other, in execution order: of every branch of the network the
    largest module with at most four quantized layers that runs once and has one tensor in and one out, a row an image
    (a residual block, say); plain containers are taken apart. Layers that run several times, or see rows of windows or
    of a table, are in none.
    """
    names = [name for name, module in classifier.network.named_modules() if _quantized_in(module)]
    runs, by_image = count_runs(classifier, names), _by_image(classifier, names)
    units = set(_units_in("", classifier.network, {name for name in by_image if runs[name] == 1}))
    return [name for name in runs if name in units]


def _units_in(name: str, module: nn.Module, possible: Collection[str]) -> Iterator[str]:
    layers = _quantized_in(module)
    container = not name or type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    if name in possible and (isinstance(module, QuantizedLayer) or (not container and 0 < layers <= LARGEST_UNIT)):
        yield name
        return
    for child_name, child in module.named_children():
        yield from _units_in(f"{name}.{child_name}" if name else child_name, child, possible)


@torch.no_grad()
def _by_image(classifier: Classifier, names: Sequence[str]) -> set[str]:
    """The modules whose input and output have a row for every image, of three."""
    rows: dict[str, set[int]] = {name: set() for name in names}

    def note(name: str, features: Tensor) -> None:
        rows[name].add(len(features) if features.dim() > 1 else 0)

    images = torch.zeros(3, *classifier.card.input_size, device=classifier.mean.device)
    before, after = hooked_inputs(classifier.network, names, note), hooked_outputs(classifier.network, names, note)
    with evaluating(classifier), before, after:
        classifier(images)
    return {name for name, counts in rows.items() if counts == {len(images)}}


def _quantized_in(module: nn.Module) -> int:
    return sum(isinstance(each, QuantizedLayer) for each in module.modules())


def _reconstruct_unit(
    student: Classifier,
    teacher: Classifier,
    name: str,
    images: Tensor,
    settings: Reconstruction,
    *,
    seed: int,
    room: int,
) -> float:
    """Learn one unit's rounding and input steps and freeze them; the error that is left, as a share of the variance."""
    unit = student.network.get_submodule(name)
    images = images[: images_that_fit(teacher, name, room=room)]
    (student_inputs,) = _features(student, name, images, "input")
    teacher_inputs, teacher_outputs = _features(teacher, name, images, "input", "output")
    roundings = {path: SoftRounding(layer) for path, layer in unit.named_modules() if isinstance(layer, QuantizedLayer)}
    steps = [rounding.step for rounding in roundings.values() if rounding.step is not None]
    groups = [{"params": [each.V for each in roundings.values()], "lr": settings.lr}]
    groups += [{"params": steps, "lr": settings.input_lr}] if steps else []
    optimizer = torch.optim.Adam(groups)
    random = torch.Generator(device=student_inputs.device).manual_seed(seed)
    channels = teacher_outputs.shape[1] if teacher_outputs.dim() == 4 else teacher_outputs.shape[-1]

    def partly(whole: Tensor, other: Tensor) -> Tensor:
        """Some elements of one, the rest of the other."""
        return torch.where(
            torch.rand(whole.shape, generator=random, device=random.device) < settings.drop, whole, other
        )

    def quantize_partly(path: str, activations: Tensor) -> Tensor:
        return partly(activations, roundings[path].quantized_input(activations))

    with exact_fp32(), evaluating(unit), in_float(unit), hooked_inputs(unit, roundings, quantize_partly):
        for step in range(settings.steps):
            some = torch.randint(len(student_inputs), (settings.batch_size,), generator=random, device=random.device)
            weights = {f"{path}.weight".lstrip("."): rounding.weight() for path, rounding in roundings.items()}
            output = functional_call(unit, weights, (partly(teacher_inputs[some], student_inputs[some]),))
            # Summed over channels, the mean over images and pixels, as BRECQ has it.
            loss = (output - teacher_outputs[some]).square().mean() * channels
            if step >= settings.warmup * settings.steps:
                beta = _beta(step, settings)
                loss = loss + settings.rounding * sum(each.penalty(beta) for each in roundings.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for rounding in roundings.values():
        rounding.harden()
    del teacher_inputs
    error = 0.0
    with torch.no_grad(), exact_fp32(), evaluating(unit):
        for inputs, outputs in zip(student_inputs.split(PASSED), teacher_outputs.split(PASSED), strict=True):
            error += (unit(inputs) - outputs).square().sum().item()
    return error / teacher_outputs.numel() / max(teacher_outputs.var().item(), 1e-12)


def _beta(step: int, settings: Reconstruction) -> float:
    """β of a step: it falls along a cosine."""
    first, last = BETA
    progress = (step / settings.steps - settings.warmup) / (1 - settings.warmup)
    return cosine(progress, 1.0, first=first, last=last)


class SoftRounding:
    """The rounding of one layer while it is learnt: a weight is s·(⌊W / s⌋ + h(V)), of V `(weight's shape)` a parameter
    and h(V) in [0, 1] (AdaRound, eq. 22); with the step of the layer's input, a parameter too.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer, self.grid = layer, layer.grid_now()
        self.scale = per_channel(self.grid.scale, layer.weight)
        self.lowest, self.highest = self.grid.multiples(layer.weight)
        scaled = layer.weight.detach() / self.scale
        self.floor = scaled.floor()
        # h(V) begins at the fraction W / s − ⌊W / s⌋, so that the weight begins as it is.
        self.V = nn.Parameter(-torch.log((ZETA - GAMMA) / (scaled - self.floor - GAMMA) - 1))
        self.step = layer.input_grid.as_step(layer.weight.device) if layer.input_grid else None

    def quantized_input(self, activations: Tensor) -> Tensor:
        """The layer's input on the grid as it is now."""
        grid = self.layer.input_grid
        return activations if grid is None else grid.quantized(activations, step=self.step)

    def weight(self) -> Tensor:
        """The weight between two values of the grid."""
        return (self.floor + self.h()).clamp(self.lowest, self.highest) * self.scale

    def h(self) -> Tensor:
        """The rectified sigmoid h(V) = clip(σ(V)·(ζ − γ) + γ, 0, 1) (eq. 23)."""
        return (self.V.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def penalty(self, beta: float) -> Tensor:
        """The rounding penalty Σ (1 − |2·h(V) − 1|^β), 0 where every h(V) is 0 or 1 (eq. 24)."""
        return (1 - (2 * self.h() - 1).abs() ** beta).sum()

    @torch.no_grad()
    def harden(self) -> None:
        """Freeze the layer at the nearest integers, and its grid."""
        self.layer.set_integer_weight(self.grid.nearest(self.floor + (self.V > 0)), self.grid)
        if self.layer.input_grid and self.step is not None:
            self.layer.input_grid = self.layer.input_grid.with_step(self.step)


def images_that_fit(classifier: Classifier, name: str, *, room: int) -> int:
    """Of how many images the features around a unit have room, in bytes: its input in float and quantized, and its
    output.
    """
    image = torch.zeros(1, *classifier.card.input_size, dtype=torch.uint8)
    inputs, outputs = _features(classifier, name, image, "input", "output")
    return max(1, room // (2 * inputs.nbytes + outputs.nbytes))


class _EnoughError(Exception):
    """The rest of a forward pass is not needed."""


@torch.no_grad()
def _features(classifier: Classifier, name: str, images: Tensor, *sides: Side) -> list[Tensor]:
    """The inputs and outputs (`sides`) of a module for all `images`, as stored; none is in memory twice."""
    found: dict[Side, Tensor] = {}
    done = 0

    def keep(side: Side, some: Tensor) -> None:
        # Copied as soon as it is there: a block that begins with an in-place layer writes into its own input.
        if side in sides:
            if side not in found:
                found[side] = some.new_empty(len(images), *some.shape[1:])
            found[side][done : done + len(some)] = some
        if side == sides[-1]:
            raise _EnoughError

    network, parts = classifier.network, images.split(min(PASSED, images_a_pass(classifier)))
    before = hooked_inputs(network, [name], lambda _, some: keep("input", some))
    after = hooked_outputs(network, [name], lambda _, some: keep("output", some))
    with exact_fp32(), evaluating(classifier), before, after:
        for some in parts:
            with suppress(_EnoughError):
                classifier(as_float(some.to(classifier.mean.device)))
            done += len(some)
    return [found[side] for side in sides]


def _state(layer: QuantizedLayer) -> dict[str, Any]:
    integers, grid = layer.integer_weight()
    inputs = asdict(layer.input_grid) if layer.input_grid else None
    return {"integers": integers, "weight_grid": asdict(grid), "input_grid": inputs}


def _restore(layer: QuantizedLayer, values: dict[str, Any]) -> None:
    layer.set_integer_weight(values["integers"], WeightGrid(**values["weight_grid"]))
    layer.input_grid = InputGrid(**values["input_grid"]) if values["input_grid"] else None
