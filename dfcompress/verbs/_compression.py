"""The part that all compressing verbs share: gather images, take the steps that change the student, save it, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfcompress.data.batches import BatchSource
from dfcompress.data.fitted import reshaped
from dfcompress.data.pool import ImagePool
from dfcompress.data.synthetic_set import as_float, as_stored
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute
from dfcompress.models.classifier import Classifier
from dfcompress.pruning.budget import Pruned
from dfcompress.quantization.calibration import Calibrated
from dfcompress.run import Run
from dfcompress.synthesis.transfer_set import TransferSet, TransferSetSource
from dfcompress.training.distiller import Distiller
from dfcompress.training.loop import Trained, Trainer, predicted_training, require_trainable
from dfcompress.training.settings import Training
from dfcompress.verbs import Target
from dfcompress.verbs._finish import Compressed, Measure, TeacherSet, load_finished, save_and_measure
from dfcompress.verbs._plan import Outcome, Plan, Step, Synthesize
from dfcompress.verbs.export import FILE, sampled, write_compared


@dataclass(frozen=True)
class Train:
    """Training of `student` by a distiller, with `settings`, computed as `compute` says.

    `distiller`: factory, called when training starts, because earlier steps may change the student.
    `repair`: the student is already trained; train in evaluation mode (see `training_mode`).
    `prepare`: called on the student's network before training.
    `live`: source that synthesizes images during training.
    `batches`: builds the batch source; default: equal numbers of images from each set.
    `place`: subfolder of the run folder for the training state; default: the run folder itself.
    """

    student: Classifier
    distiller: Callable[[], Distiller]
    settings: Training
    compute: Compute
    repair: bool = False
    prepare: Callable[[nn.Module], None] | None = None
    live: TransferSetSource | None = None
    batches: Callable[[Sequence[TransferSet]], BatchSource] | None = None
    place: str = ""

    def require_possible(self, sets: Sequence[int]) -> None:
        """Raise `BadInput` where the student cannot be trained; `sets` are the numbers of images in each set."""
        require_trainable(self.student, self.settings, self.compute, sets, repair=self.repair)
        if self.live and self.live.live:
            _require_steps_for_all_rounds(self.live, self.live.live, self.settings.steps)

    def predicted(self) -> float:
        """Estimate the seconds of training from a few steps on copies of the networks."""
        return predicted_training(self.student, self.distiller(), self.settings, self.compute, repair=self.repair)

    def take(self, run: Run, sets: Sequence[TransferSet]) -> Trained:
        """Train the student on all sets."""
        if self.prepare:
            self.prepare(self.student.network)
        folder = run.folder / self.place
        folder.mkdir(exist_ok=True)
        trainer = Trainer(
            self.student, self.distiller(), self.settings, compute=self.compute, folder=folder, repair=self.repair
        )
        if self.live:
            return self._take_live(trainer, run, *sets)
        if self.batches:
            return trainer.fit(self.batches(sets))
        images, labels = [each.train for each in sets], [each.train_labels for each in sets]
        return trainer.fit(self.settings.pool(*images, labels=labels, seed=self.compute.seed))

    def _take_live(self, trainer: Trainer, run: Run, others: TransferSet) -> Trained:
        """Train while the images are synthesized, then complete their set; `others` holds the images made before."""
        size, seed = self.student.card.input_size, self.compute.seed
        assert self.live, "no images are made meanwhile"

        def pool(images: Tensor, labels: Tensor) -> ImagePool:
            return self.settings.pool(_in_form(images, size), labels=[labels], seed=seed)

        source = self.live.live_source(run.folder, self.settings.batch_size, pool, others)
        trained = trainer.fit(source)
        seconds = trained.seconds - source.seconds
        source.finish()
        rate = round(trained.steps * source.batch_size / max(seconds, 1e-9), 1)
        return replace(trained, seconds=seconds, images_per_second=rate)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """All that one compressing verb has of its own, except the steps that change its student.

    `verb`: name of the verb. `student`: classifier that the steps change. `teachers`: classifiers that it learns from.
    `outputs`: for each teacher, the student's output index of each of the teacher's classes, `(classes,)`.
    `sources`: the image source of each teacher; the key is the subfolder of the run folder for its images.
    `measure`: evaluates the saved student on real images. `compute`: device, precision, compilation and seed.
    `complete`: called between the last step and saving, with the outcome of each step by name.
    `export`: runtime of an ONNX file that is written beside the model. The file is timed against the ONNX file of
    `beside`; default: the same network in float.
    """

    verb: str
    student: Classifier
    teachers: Sequence[Classifier]
    outputs: Sequence[Tensor]
    sources: Mapping[str, TransferSetSource]
    measure: Measure | None
    compute: Compute
    complete: Callable[[Run, Mapping[str, Outcome]], None] | None = None
    export: Target | None = None
    beside: Classifier | None = None

    def plan(
        self,
        steps: Mapping[str, Step | None],
        options: Mapping[str, Any],
        inputs: Sequence[str | Path | None],
        output: str | Path | None,
        *,
        resume: bool,
        overwrite: bool,
    ) -> Plan[Compressed]:
        """Make the plan; `options` and `inputs` hold only what the verb adds to the options and inputs of all verbs.

        Raises `BadInput` where the student cannot be trained on the number of images in the sets.
        """
        sources = self.sources.values()
        for step in steps.values():
            if isinstance(step, Train):
                step.require_possible([len(source) for source in sources])
        read = [*self.teachers, self.student]
        return Plan(
            verb=self.verb,
            folder=Path(output or f"{self.teachers[0].name}-{self.verb}"),
            options={**options, **asdict(self.compute)},
            inputs=[*(each.path for each in read), *inputs, *(path for source in sources for path in source.inputs)],
            synthesis=[Synthesize(spec, source.compute, other) for source in sources for spec, other in source.made],
            steps=steps,
            work=self.work,
            resume=resume,
            overwrite=overwrite,
        )

    def work(self, plan: Plan[Compressed], run: Run) -> Compressed:
        """Gather the images, take every step of the plan, save the student, and measure the saved model."""
        if result := load_finished(run, self.student, self.measure):
            return result
        images = [source.gather(run.folder / folder) for folder, source in self.sources.items()]
        size = self.student.card.input_size
        sets = [replace(each, train=_in_form(each.train, size)) for each in images]
        found: dict[str, Outcome] = {}
        for name, step in plan.steps.items():
            if step:
                found[name] = step.take(run, sets)
                part = name.partition(" ")[0]  # The names of earlier rounds end in a number.
                run.seconds[part] = run.seconds.get(part, 0.0) + found[name].seconds
        if any(source.live for source in self.sources.values()):  # The images that were made during training exist now.
            images = [source.gather(run.folder / folder, learnt=True) for folder, source in self.sources.items()]
            sets = [replace(each, train=_in_form(each.train, size)) for each in images]
        trained = found.get("training")
        assert not isinstance(trained, Calibrated | Pruned)
        if self.complete:
            self.complete(run, found)
        export = None
        if self.export:
            images_of_export = sampled(sets[0].train)
            export = partial(
                write_compared,
                path=run.folder / FILE,
                images=images_of_export,
                target=self.export,
                beside=self.beside,
            )
        return save_and_measure(
            run,
            self.student,
            [TeacherSet(*each) for each in zip(self.teachers, images, self.outputs, strict=True)],
            trained=trained,
            device=self.compute.device,
            measure=self.measure,
            export=export,
        )


def _require_steps_for_all_rounds(source: TransferSetSource, live: str, steps: int) -> None:
    """Raise `BadInput` where training has too few `steps` to reach the last round of the set `live`."""
    spec = source.specs[live]
    updates = spec.recipe.student_updates
    assert updates, "nothing is made meanwhile"
    rounds = -(-spec.batches // updates.every)
    needed, possible = (rounds - 1) * updates.steps + 1, -(-steps // updates.steps)
    if steps >= needed:
        return
    fewer = f"--set rounds={possible}"
    if updates.keep:
        share = spec.images / sum(each.images for each in source.specs.values())
        fewer = f"at most --images {int(possible * updates.every * spec.batch_size / share)}"
    raise BadInput(
        f"{steps} training steps are over before the last of {rounds} rounds of {spec.choice.name}, which take "
        f"{updates.steps} each.",
        f"Use --train-steps {rounds * updates.steps}, or {fewer}.",
    )


def _in_form(images: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Fit stored images to another `size`: channels, height, width."""
    if images.shape[1:] == torch.Size(size):
        return images
    parts = [reshaped(as_float(some), size) for some in images.split(256)]
    return torch.cat([as_stored(part, in_range=images.dtype == torch.uint8) for part in parts])
