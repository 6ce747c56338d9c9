"""Widening: a copy of a classifier whose last layer has more outputs, for more classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.fake_quantizers import is_quantized
from dfcompress.models.fitting import is_built_by_name
from dfcompress.models.layers import last_weighted_layer
from dfcompress.models.resizing import resized, widths_of
from dfcompress.randomness import generator

SAME = 1e-4  # As a share of the largest logit: a wider layer may sum in another order.


def widen(old: Classifier, class_names: Sequence[str], *, seed: int) -> Classifier:
    """Make a copy of the classifier `old` with an output for each of `class_names`, the first of which are its own
    classes.

    The logits of the old classes do not change. The new rows of the last layer get the initial values of such a layer,
    by `seed`. If the architecture cannot be built for another number of classes, the card gets the widths by which it
    can be rebuilt.
    Raises `BadInput` for a quantized classifier, where the outputs of the last layer are not the classes or are
    log-probabilities, and where the architecture cannot be built with the new outputs.
    """
    network, head, layer = _with_outputs(old, len(class_names), seed)
    with torch.no_grad():
        for name, values in old.network.get_submodule(head).named_parameters():
            layer.get_parameter(name)[: old.card.classes] = values
    card = replace(old.card, classes=len(class_names), class_names=tuple(class_names))
    # The last candidate serves a factory that gives its auxiliary heads the new number of classes, too.
    every = [_widths(old, head, layer), {**(card.widths or {}), **_width(head, layer)}, widths_of(network)]
    students = [Classifier(network, replace(card, widths=widths), name=old.name) for widths in every]
    student = next(filter(is_built_by_name, students), students[0])
    _check_answers(student, old, head, layer)
    if is_built_by_name(old) and not is_built_by_name(student):
        raise BadInput(
            f"{old.name}: {card.architecture} cannot be built with {len(class_names)} outputs of {head} and all other "
            "layers as they are.",
            "Give a network of which only the last layer depends on the number of classes.",
        )
    return student


def make_expert(old: Classifier, class_names: Sequence[str], *, seed: int) -> Classifier:
    """Make a copy of the classifier `old` with a new last layer, for the classes of `class_names` alone.

    Raises `BadInput` for a quantized classifier, and where the outputs of the last layer are not the classes.
    """
    network, head, layer = _with_outputs(old, len(class_names), seed)
    card = replace(old.card, classes=len(class_names), class_names=tuple(class_names), widths=_widths(old, head, layer))
    return Classifier(network, card, name=old.name)


def _with_outputs(old: Classifier, outputs: int, seed: int) -> tuple[nn.Module, str, nn.Module]:
    """A copy of the network with a newly initialised last layer of `outputs` outputs; the name of this layer; and the
    layer.
    """
    if is_quantized(old.network):
        raise BadInput(
            f"{old.name} is quantized, and few bits have no room for new classes.",
            "Extend the model that it was made from, and quantize the result.",
        )
    head, network = last_weighted_layer(old), copy.deepcopy(old.network)
    layer = network.get_submodule(head)
    if not _gives(layer, old.card.classes):
        raise _unfit(old, head, layer)
    inputs, _ = widths_of(network)[head]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        resized(network, {head: (inputs, outputs)})
    return network, head, layer


def _gives(layer: nn.Module, classes: int) -> bool:
    """Whether a layer is linear or an ungrouped convolution, and has one weight row for each of `classes` outputs."""
    plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    return plain and layer.get_parameter("weight").shape[0] == classes


def _width(head: str, layer: nn.Module) -> dict[str, tuple[int, int]]:
    return {head: widths_of(layer)[""]}


def _widths(old: Classifier, head: str, layer: nn.Module) -> dict[str, tuple[int, int]] | None:
    """The widths on the old card, or None without any; if they name the last layer, its entry is updated to `layer`."""
    widths = dict(old.card.widths or {})
    return (widths | _width(head, layer) if head in widths else widths) or None


@torch.no_grad()
def _check_answers(student: Classifier, old: Classifier, head: str, layer: nn.Module) -> None:
    """Raise `BadInput` where the student's first outputs differ from the old classifier's, or are log-probabilities."""
    images = torch.rand(2, *old.card.input_size, generator=generator("widened")).to(old.mean.device)
    with evaluating(student), evaluating(old):
        before = old(images)
        if before.logsumexp(1).abs().max() < SAME:
            raise BadInput(
                f"{old.name} answers with log-probabilities, which change where classes are added.",
                "Let the --arch factory return a network that answers with the logits before its log_softmax.",
            )
        try:
            after = student(images)
        except RuntimeError:  # Raised by a network whose own code depends on the number of classes.
            raise _unfit(old, head, layer) from None
    if after.shape[1:] != (student.card.classes,):
        raise _unfit(old, head, layer)
    if not torch.allclose(after[:, : old.card.classes], before, rtol=0, atol=SAME * before.abs().max().item()):
        raise _unfit(old, head, layer)


def _unfit(old: Classifier, head: str, layer: nn.Module) -> BadInput:
    kind, architecture = type(layer).__name__, old.card.architecture
    return BadInput(
        f"{old.name}: the outputs of {head}, the last layer of {architecture} ({kind}), are not its classes.",
        "Give a network that ends in a linear layer or a convolution with one output a class.",
    )
