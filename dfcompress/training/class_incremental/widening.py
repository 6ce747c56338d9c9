"""A classifier with more classes: the same network, its last layer with more outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.checkpoint import is_built_by_name
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.fake_quantizers import is_quantized
from dfcompress.models.layers import last_weighted_layer
from dfcompress.models.resizing import resized, widths_of
from dfcompress.randomness import generator

SAME = 1e-4  # Of the largest logit: sums of a wider layer may run in another order.


def widen(old: Classifier, class_names: Sequence[str], *, seed: int) -> Classifier:
    """A copy of the classifier with an output for each of `class_names`, of which the first are its own classes.

    Its answers for those are what they were. The new rows of the last layer begin as a layer of that kind is
    initialised, by `seed`. An architecture that cannot be built for another number of classes is rebuilt by the widths
    on the card.
    Raises `BadInput` where the outputs of the last layer are not the classes.
    """
    network, head, layer = _with_outputs(old, len(class_names), seed)
    with torch.no_grad():
        for name, values in old.network.get_submodule(head).named_parameters():
            layer.get_parameter(name)[: old.card.classes] = values
    card = replace(old.card, classes=len(class_names), class_names=tuple(class_names))
    # The last: a factory that gives auxiliary heads the new number of classes, too.
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
    """A copy of the classifier with a new last layer, for these classes alone."""
    network, head, layer = _with_outputs(old, len(class_names), seed)
    card = replace(old.card, classes=len(class_names), class_names=tuple(class_names), widths=_widths(old, head, layer))
    return Classifier(network, card, name=old.name)


def _with_outputs(old: Classifier, outputs: int, seed: int) -> tuple[nn.Module, str, nn.Module]:
    """A copy of the network whose last layer has so many outputs and is as it was initialised, its name and itself."""
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
    """Whether a layer is one whose weights are rows of so many outputs."""
    plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    return plain and layer.get_parameter("weight").shape[0] == classes


def _width(head: str, layer: nn.Module) -> dict[str, tuple[int, int]]:
    return {head: widths_of(layer)[""]}


def _widths(old: Classifier, head: str, layer: nn.Module) -> dict[str, tuple[int, int]] | None:
    """The widths on the old card, with those of the last layer as it is now where they are among them."""
    widths = dict(old.card.widths or {})
    return (widths | _width(head, layer) if head in widths else widths) or None


@torch.no_grad()
def _check_answers(student: Classifier, old: Classifier, head: str, layer: nn.Module) -> None:
    """Raise `BadInput` where the first outputs are not those of the old classifier."""
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
        except RuntimeError:  # Of a network that counts its classes itself.
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
