"""What several teachers teach one student together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.data.real import reshaped
from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier
from dfcompress.training.class_map import ClassMap
from dfcompress.training.ood_score import BatchNormOodScore

Method = Literal["all-logits", "paper"]
METHODS = get_args(Method)
PARTS = ("logits", "block", "agreement")

BLOCK = 0.1
FAMILIARITY, LIMIT = 16.0, 4.0
BALANCE = 4.0
REMEMBERED = 0.99


class Merging:
    """Each teacher's classes are a block of the student's outputs; blocks may share outputs.

    `paper` (Shapira and Sidi 2020): cross-entropy over all outputs with the best class of the teacher whose image it
    is, the mean of each teacher's images, summed. It is `block` here. As in the released code each teacher's images go
    through the student in a pass of their own, so its BatchNorms see one teacher's images at a time.

    `all-logits` (ours): every teacher sees every image, also those of the others, and the student imitates all
    their logits. In place of a teacher's mean over its classes, which says nothing of them, stands how much more
    familiar the image is to it than to the others: −16 times the image's `BatchNormOodScore` less the mean of all
    teachers', at most ±4 (0 for all where a teacher's BatchNorms remember nothing). `logits` is the mean squared
    difference on a teacher's own images and on the others', half and half; the difference within an output that
    several teachers know counts for each. So the student learns what each teacher answers to what it does not know,
    and what it remembers of its own, which on real images tell its classes from the others' better than the images
    do: those differ in how they were made. `block`, 0.1 · −log of the probability that the student gives to the
    classes of the teacher whose image it is, sharpens that. The weights of a teacher's terms grow as it is followed
    worse: w ∝ exp(−4·agreement), the agreement a mean over the last hundred steps or so.
    """

    def __init__(self, teachers: Sequence[Classifier], outputs: ClassMap, *, method: Method = "all-logits") -> None:
        require_method(method)
        self.teachers, self.method, self.repeatable = teachers, method, True
        self.names: Sequence[str] = [f"{part}/{number}" for part in PARTS for number in range(1, len(teachers) + 1)]
        fixed = torch.tensor([0.0, 1.0, 0.0] if method == "paper" else [1.0 / len(teachers), BLOCK, 0.0])
        self.own: nn.Module = nn.Module()
        self.own.register_buffer("fixed", fixed.repeat_interleave(len(teachers)))
        self.own.register_buffer("followed", torch.zeros(len(teachers)))
        self._unfamiliar = [BatchNormOodScore(teacher) for teacher in teachers] if method != "paper" else []
        self._tells = bool(self._unfamiliar) and all(each.is_known for each in self._unfamiliar)
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
        """Hear how familiar images are to the teachers."""
        with ExitStack() as stack:
            for each in self._unfamiliar:
                stack.enter_context(each.listening())
            yield

    def teach(self, images: Tensor, sources: Tensor) -> tuple[Tensor, ...]:
        """What the student's outputs shall be for every teacher's classes, and `sources`.

        Each teacher sees every image in the form that it knows.
        """
        shown = (reshaped(images, teacher.card.input_size) for teacher in self.teachers)
        logits = [teacher(seen).float() for teacher, seen in zip(self.teachers, shown, strict=True)]
        if self.method == "paper":
            return *logits, sources
        means = self._familiarity() if self._tells else [0.0] * len(logits)
        return *(own - own.mean(1, keepdim=True) + mean for own, mean in zip(logits, means, strict=True)), sources

    def _familiarity(self) -> Tensor:
        """How much more familiar the images of the last pass are to each teacher than to all, `(teachers, N, 1)`."""
        unfamiliar = torch.stack([each.taken() for each in self._unfamiliar])
        return (FAMILIARITY * (unfamiliar.mean(0) - unfamiliar)).clamp(-LIMIT, LIMIT).unsqueeze(2)

    def compare(self, student: nn.Module, images: Tensor, taught: tuple[Tensor, ...]) -> Tensor:
        """The three parts of every teacher, each part's teachers in order.

        The paper's way takes equally many images of each teacher, one teacher's after the other's.
        """
        *given, sources = taught
        passes = images.chunk(len(self.teachers)) if self.method == "paper" else [images]
        logits = torch.cat([student(some).float() for some in passes])
        parts = [self._compare(number, logits, theirs, sources == number) for number, theirs in enumerate(given)]
        return torch.stack(parts).t().flatten()

    def _compare(self, number: int, logits: Tensor, given: Tensor, its_own: Tensor) -> Tensor:
        outputs = self.own.get_buffer(f"outputs{number}")
        in_block = logits[:, outputs]
        follows = _mean((in_block.argmax(1) == given.argmax(1)).float(), its_own)
        if self.method == "paper":
            missed = F.cross_entropy(logits, outputs[given.argmax(1)], reduction="none")
            return torch.stack([logits.new_zeros(()), _mean(missed, its_own), follows])
        distance = (in_block - given).square().mean(1)
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
