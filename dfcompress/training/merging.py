"""What several teachers teach one student together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.data.real import reshaped
from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier
from dfcompress.training.outputs import Outputs

Method = Literal["all-logits", "paper"]
METHODS = get_args(Method)
PARTS = ("logits", "block", "agreement")

BLOCK = 0.1
BALANCE = 4.0
REMEMBERED = 0.99


class Merging:
    """Each teacher's classes are a block of the student's outputs; blocks may share outputs.

    `paper` (Shapira and Sidi 2020): cross-entropy over all outputs with the best class of the teacher whose image it
    is, the mean of each teacher's images, summed. It is `block` here.

    `all-logits` (ours): every teacher sees every image, also those of the others, and the student imitates all their
    logits, each teacher's less their mean over its classes (which says nothing of its classes, and makes teachers
    comparable). `logits` is the mean squared difference on a teacher's own images and on the others', half and half;
    the difference within an output that several teachers know counts for each. So the student learns what each teacher
    answers to what it does not know, which on real images tells its classes from the others' better than the images
    do: those differ in how they were made. `block`, 0.1 · −log of the probability that the student gives to the classes
    of the teacher whose image it is, sharpens that. The weights of a teacher's terms grow as it is followed worse:
    w ∝ exp(−4·agreement), the agreement a mean over the last hundred steps or so.
    """

    def __init__(self, teachers: Sequence[Classifier], outputs: Outputs, *, method: Method = "all-logits") -> None:
        require_method(method)
        self.teachers, self.method, self.repeatable = teachers, method, True
        self.names: Sequence[str] = [f"{part}/{number}" for part in PARTS for number in range(1, len(teachers) + 1)]
        fixed = torch.tensor([0.0, 1.0, 0.0] if method == "paper" else [1.0 / len(teachers), BLOCK, 0.0])
        self.own: nn.Module = nn.Module()
        self.own.register_buffer("fixed", fixed.repeat_interleave(len(teachers)))
        self.own.register_buffer("followed", torch.zeros(len(teachers)))
        for number, of_it in enumerate(outputs.of):
            self.own.register_buffer(f"outputs{number}", of_it)

    @property
    def weights(self) -> Tensor:
        """Of every value: more for what belongs to teachers that are followed worse."""
        fixed, followed = self.own.get_buffer("fixed"), self.own.get_buffer("followed")
        if self.method == "paper":
            return fixed
        return fixed * (len(followed) * (-BALANCE * followed).softmax(0)).repeat(len(PARTS))

    @contextmanager
    def listening(self, student: Classifier) -> Iterator[None]:
        """Answers are all that is compared."""
        yield

    def teach(self, images: Tensor, sources: Tensor) -> tuple[Tensor, ...]:
        """Every teacher's logits for every image, each in the form that it knows, and `sources`."""
        shown = (reshaped(images, teacher.card.input_size) for teacher in self.teachers)
        return *(teacher(seen).float() for teacher, seen in zip(self.teachers, shown, strict=True)), sources

    def compare(self, student: nn.Module, images: Tensor, taught: tuple[Tensor, ...]) -> Tensor:
        """The three parts of every teacher, each part's teachers in order."""
        logits, (*given, sources) = student(images).float(), taught
        parts = [self._compare(number, logits, theirs, sources == number) for number, theirs in enumerate(given)]
        return torch.stack(parts).t().flatten()

    def _compare(self, number: int, logits: Tensor, given: Tensor, its_own: Tensor) -> Tensor:
        outputs = self.own.get_buffer(f"outputs{number}")
        in_block = logits[:, outputs]
        follows = _mean((in_block.argmax(1) == given.argmax(1)).float(), its_own)
        if self.method == "paper":
            missed = F.cross_entropy(logits, outputs[given.argmax(1)], reduction="none")
            return torch.stack([logits.new_zeros(()), _mean(missed, its_own), follows])
        distance = (in_block - (given - given.mean(1, keepdim=True))).square().mean(1)
        missed = logits.logsumexp(1) - in_block.logsumexp(1)
        both = (_mean(distance, its_own) + _mean(distance, ~its_own)) / 2
        return torch.stack([both, _mean(missed, its_own), follows])

    def observe(self, values: Tensor) -> None:
        """Remember how well each teacher is followed."""
        followed = self.own.get_buffer("followed")
        followed.lerp_(values[-len(followed) :], 1 - REMEMBERED)


def require_method(method: str) -> None:
    """Raise `BadInput` where there is no such method."""
    if method not in METHODS:
        raise BadInput(f"There is no method {method!r}.", f"Known: {', '.join(METHODS)}.")


def _mean(values: Tensor, which: Tensor) -> Tensor:
    return (values * which).sum() / which.sum().clamp_min(1)
