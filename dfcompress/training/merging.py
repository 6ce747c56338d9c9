"""What several teachers teach one student together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.data.real import fit
from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier
from dfcompress.training.outputs import Outputs

Method = Literal["blocks", "paper"]
METHODS = get_args(Method)
PARTS = ("own", "block", "foreign", "agreement")

REMEMBERED = 0.99
BALANCE = 8.0


class Merging:
    """Each teacher's classes are a block of the student's outputs (blocks may share outputs).

    `paper` (Shapira and Sidi 2020): cross-entropy over all outputs with the best class of the teacher whose image it
    is, the mean of each teacher's images, summed.

    `blocks` (ours) learns the same answer in two parts, p(class) = p(block)·p(class | block), and knows more of both.
    On a teacher's own images: `own`, τ²·KL of its softened answer to the student's within its block, and `block`,
    −log of the probability that the student gives to that block. On all other images: `foreign`, the same KL for what
    the teacher answers to what it does not know. Each teacher's first two terms are weighted so that all are followed
    equally well: w ∝ exp(−8·agreement), where the agreement is a mean over the last hundred steps or so.
    """

    def __init__(
        self,
        teachers: Sequence[Classifier],
        outputs: Outputs,
        *,
        method: Method = "blocks",
        temperature: float = 4.0,
        foreign: float = 0.5,
    ) -> None:
        if method not in METHODS:
            raise BadInput(f"There is no method {method!r}.", f"Known: {', '.join(METHODS)}.")
        self.teachers, self.outputs, self.method = teachers, outputs, method
        self.temperature, self.foreign = temperature, foreign
        self.names: Sequence[str] = [f"{part}/{number}" for part in PARTS for number in range(1, len(teachers) + 1)]
        self.own: nn.Module = nn.Module()
        self.own.register_buffer("followed", torch.zeros(len(teachers)))
        self.own.register_buffer("fixed", self._fixed_weights())
        for number, of_it in enumerate(outputs.of):
            self.own.register_buffer(f"outputs{number}", of_it, persistent=False)
        self.repeatable = True

    def _fixed_weights(self) -> Tensor:
        foreign = self.foreign / max(1, len(self.teachers) - 1) if self.method == "blocks" else 0.0
        return torch.tensor([1.0, float(self.method == "blocks"), foreign, 0.0]).repeat_interleave(len(self.teachers))

    @property
    def weights(self) -> Tensor:
        """Of every value: more for what belongs to teachers that are followed worse."""
        fixed = self.own.get_buffer("fixed")
        if self.method == "paper":
            return fixed
        count = len(self.teachers)
        urgency = count * (-BALANCE * self.own.get_buffer("followed")).softmax(0)
        return fixed * torch.cat([urgency, urgency, torch.ones(2 * count, device=fixed.device)])

    @contextmanager
    def listening(self, student: Classifier) -> Iterator[None]:
        """Answers are all that is compared."""
        yield

    def teach(self, images: Tensor, sources: Tensor) -> tuple[Tensor, ...]:
        """Every teacher's logits for every image, each in the form that it knows, and `sources`."""
        shown = (fit(images, teacher.card.input_size) for teacher in self.teachers)
        return *(teacher(seen).float() for teacher, seen in zip(self.teachers, shown, strict=True)), sources

    def compare(self, student: nn.Module, images: Tensor, taught: tuple[Tensor, ...]) -> Tensor:
        """The four parts of every teacher, each part's teachers in order."""
        logits, (*given, sources) = student(images).float(), taught
        parts = [self._compare(number, logits, theirs, sources == number) for number, theirs in enumerate(given)]
        return torch.stack(parts).t().flatten()

    def _compare(self, number: int, logits: Tensor, given: Tensor, its_own: Tensor) -> Tensor:
        outputs = self.own.get_buffer(f"outputs{number}")
        in_block, best = logits[:, outputs], outputs[given.argmax(1)]
        follows = (logits.argmax(1) == best).float()
        if self.method == "paper":
            own = F.cross_entropy(logits, best, reduction="none")
            return torch.stack([_mean(own, its_own), *logits.new_zeros(2), _mean(follows, its_own)])
        theirs, ours = ((each / self.temperature).log_softmax(1) for each in (given, in_block))
        divergence = self.temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
        missed = logits.logsumexp(1) - in_block.logsumexp(1)
        means = [_mean(divergence, its_own), _mean(missed, its_own), _mean(divergence, ~its_own)]
        return torch.stack([*means, _mean(follows, its_own)])

    def observe(self, values: Tensor) -> None:
        """Remember how well each teacher is followed."""
        self.own.get_buffer("followed").lerp_(values[-len(self.teachers) :], 1 - REMEMBERED)


def _mean(values: Tensor, which: Tensor) -> Tensor:
    return (values * which).sum() / which.sum().clamp_min(1)
