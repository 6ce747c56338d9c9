"""`LiveSource`: images that are made while a student learns from them, and that compete with its present weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress.data.batches import UNLABELLED, Batch, BatchSource
from dfcompress.data.synthetic_set import SyntheticSet, joined
from dfcompress.distributed import world
from dfcompress.machine.execution import Compute
from dfcompress.models.classifier import Classifier
from dfcompress.randomness import generator
from dfcompress.run import write_json
from dfcompress.synthesis.set_builder import STUDENT_UPDATES, SetBuilder
from dfcompress.synthesis.spec import SynthesisSpec
from dfcompress.synthesis.synthesizer import HISTORY_POINTS

Pool = Callable[[Tensor, Tensor], BatchSource]
ROUNDS_BETWEEN_LOOKS = 200


class LiveSource:
    """A `BatchSource` of one synthesis. A round of images is made, the student takes the number of steps that the
    recipe states, and the next round competes with the updated student.

    If the recipe keeps its images, they are the shards of the set in `folder`. `pool` makes the student's batches from
    them together with the `stored` images, which were there before (images as stored, and their labels). `held_out`
    `(spec.images,)` marks images of the set that the student never sees. If images are not kept, every step has newly
    rendered ones, mixed half and half with stored images if there are any; `finish` renders the set at the end.
    `batch_size` is the number of images of a student's step.
    Raises `BadInput` as `SetBuilder` does.
    """

    def __init__(
        self,
        spec: SynthesisSpec,
        folder: Path,
        compute: Compute,
        student: Classifier,
        *,
        batch_size: int,
        pool: Pool,
        stored: tuple[Tensor, Tensor] | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        assert spec.recipe.student_updates is not None, "images that compete with no student are made at once"
        self.updates, self.spec, self.student = spec.recipe.student_updates, spec, student
        self._builder = SetBuilder(spec, folder, compute, student=student)
        self._pool_of, self._held_out = pool, held_out
        self._pool: BatchSource | None = None
        self._device = torch.device("cpu")
        self._made, self._values = 0, dict[str, float]()
        self._kept_parts = [stored] if stored else []
        self._history: list[dict[str, float]] = []
        self.seconds = 0.0  # The time of synthesis.
        shards = list(self._builder.synthetic.shards)
        every = self.updates.every
        self._rounds = [shards[first : first + every] for first in range(0, len(shards), every)]
        self.batch_size = batch_size

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self._rounds) if self.updates.keep else self.updates.rounds

    def to(self, device: torch.device) -> None:
        """Deliver batches on `device`; the synthesis keeps its own device."""
        self._device = device
        _ = self._builder.synthesizer  # It copies the student before training puts hooks on it.
        if self._pool:
            self._pool.to(device)

    def batch(self, step: int) -> Batch:
        """The batch of `step`; if the step begins a round, the round's images are made first."""
        number = step // self.updates.steps
        while self._made <= min(number, self.rounds - 1):
            self._make_round()
        batch = self._kept(step) if self.updates.keep else self._new(step)
        self._builder.synthesizer.update_modules(batch.images, batch.labels)
        return batch

    def measured(self) -> dict[str, float]:
        """The number of rounds made so far, and the last losses of the images."""
        return {"round": self._made, **self._values}

    def finish(self, *, student_seconds: float = 0.0) -> SyntheticSet:
        """Make the remaining rounds, or render the generator's final images, and return the whole set.
        `student_seconds` is the training time of a temporary student, which counts as the set's.
        """
        while self._made < self.rounds:
            self._make_round()
        if not self.updates.keep:
            self._builder.sample(self._history)
            student_seconds += self.seconds
        if student_seconds and world().is_main:
            write_json(self._builder.synthetic.folder / STUDENT_UPDATES, {"seconds": round(student_seconds, 2)})
        return self._builder.finish()

    def state_dict(self) -> dict[str, Any]:
        """The number of rounds made, and the state that persists in the synthesis; kept images are on disk."""
        return {
            "rounds": self._made,
            "synthesis": self._builder.synthesizer.state_dict(),
            "seconds": self.seconds,
            "history": self._history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume after the round in which the state was taken."""
        if not state:
            return
        self._builder.synthesizer.load_state_dict(state["synthesis"])
        self.seconds, self._history = state["seconds"], list(state["history"])
        if self.spec.recipe.lives_on and self.updates.keep and world().is_main:
            for shard in self._shards(state["rounds"], len(self._rounds)):
                # The state that this shard was made from is lost; the shard is made again, with the same bytes.
                self._builder.synthetic.shard_path(shard).unlink(missing_ok=True)
        world().barrier()
        self._take(state["rounds"])

    def _make_round(self) -> None:
        started = time.perf_counter()
        self._builder.synthesizer.update_student(self.student)
        if self.updates.keep:
            self._builder.make(self._shards(self._made, self._made + 1))
        else:
            first = self._made * self.updates.every
            for number in range(first, first + self.updates.every):
                self._values = dict(self._builder.synthesizer.advance(number, self._builder.labels_of(number)))
            self._note()
        self._take(self._made + 1)
        self.seconds += time.perf_counter() - started

    def _note(self) -> None:
        """Keep some of the losses, and write a preview of the generator's images now and then."""
        if self._made % -(-self.rounds // HISTORY_POINTS) == 0:
            self._history.append({"step": self._made, **self._values})
        if self._made % ROUNDS_BETWEEN_LOOKS == 0 and world().is_main:
            self._builder.look(self._made)

    def _take(self, rounds: int) -> None:
        """Give the pool all images of the first `rounds` rounds that the student may see."""
        if self.updates.keep:
            self._kept_parts += [self._seen(shard) for shard in self._shards(self._made, rounds)]
            self._pool = None
        self._made = rounds
        if self._kept_parts and self._pool is None:
            images, labels = zip(*self._kept_parts, strict=True)
            self._pool = self._pool_of(joined(images), torch.cat(labels))
            self._pool.to(self._device)

    def _shards(self, first: int, last: int) -> list[int]:
        """The shards of the rounds from `first` up to but not including `last`."""
        return [shard for shards in self._rounds[first:last] for shard in shards]

    def _seen(self, shard: int) -> tuple[Tensor, Tensor]:
        images, labels = self._builder.synthetic.read_shard(shard)
        if self._held_out is None:
            return images, labels
        first = shard * self._builder.batch_size
        seen = ~self._held_out[first : first + len(images)]
        return images[seen], labels[seen]

    def _kept(self, step: int) -> Batch:
        assert self._pool is not None, "a round was made"
        return self._pool.batch(step)

    def _drawn(self, number: int) -> tuple[Tensor, Tensor]:
        """The generator's images for the batch `number`, and their labels."""
        labels = self._builder.labels_of(number)
        return self._builder.synthesizer.sample(labels, generator("latent", self._builder.seed, number)), labels

    def _new(self, step: int) -> Batch:
        started = time.perf_counter()
        # Images are rendered in batches of the size that the generator is trained with.
        times = -(-self.batch_size // self._builder.batch_size)
        first = self.rounds * self.updates.every + step * times
        drawn = [self._drawn(number) for number in range(first, first + times)]
        images, labels = (torch.cat(parts)[: self.batch_size] for parts in zip(*drawn, strict=True))
        self.seconds += time.perf_counter() - started
        if self.spec.recipe.label_free:
            labels = torch.full_like(labels, UNLABELLED)
        labels = labels.to(self._device, non_blocking=True)
        new = Batch(images.to(self._device), labels, torch.zeros_like(labels))
        if self._pool is None:
            return new
        half = slice(0, -(-len(labels) // 2))
        stored = self._pool.batch(step).part(slice(0, len(labels) // 2))
        return Batch(*(torch.cat(parts) for parts in zip(new.part(half), stored, strict=True)))
