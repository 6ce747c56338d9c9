"""`merge`: several checkpoints in, one student that knows all their classes out.

dfcompress.merge(["digits-0-4.pt", "digits-5-9.pt"], student="lenet5_bn")
dfcompress.merge(["t1.pt", "t2.pt"], student="resnet18", class_map="classes.json", eval_data=["test1", "test2"])
dfcompress.merge(["t1.pt", "t2.pt"], student="resnet18", method="shapira-sidi")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier
from dfcompress.settings import AUTO, one_or_more, with_defaults
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.synthesis.transfer_set import OF_TEACHER, TransferSetSource
from dfcompress.training.class_map import ClassMap, join_classes
from dfcompress.training.multi_teacher import MethodName, merging_method, method_name
from dfcompress.training.multi_teacher.method import MergingMethod
from dfcompress.training.settings import Training
from dfcompress.training.student import begin_student
from dfcompress.verbs._co_training import co_training
from dfcompress.verbs._compression import Compression, Train
from dfcompress.verbs._finish import Compressed
from dfcompress.verbs._merge_evaluation import merged_evaluator
from dfcompress.verbs._plan import Plan, planned
from dfcompress.verbs.distill import PROBE_IMAGES

GREY, COLOUR = 1, 3


def usual_images(
    method: MergingMethod, synthesis: Synthesis, second_recipe: str | None
) -> tuple[Synthesis, str | None]:
    """The synthesis for each teacher, and the second recipe; the method's defaults where no option says otherwise."""
    synthesis = synthesis.counted(method.images)
    if synthesis.recipe is None and synthesis.preset is None:
        synthesis = replace(synthesis, recipe=method.recipe, preset=method.preset)
    return synthesis, method.second_recipe if second_recipe == AUTO else second_recipe


@planned
def merge(
    checkpoints: Sequence[str | Path | Classifier],
    *,
    student: str | None = None,
    student_init: str | Path | Classifier | None = AUTO,
    data: Sequence[str | Path] = (),
    output: str | Path | None = None,
    synthesis: Synthesis = Synthesis(),
    training: Training | Mapping[str, Any] | None = None,
    method: MethodName = "logit-matching",
    class_map: str | Path | None = None,
    second_recipe: str | None = AUTO,
    probe_images: int = PROBE_IMAGES,
    compute: Compute = Compute(),
    eval_data: str | Path | Sequence[str | Path] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> Plan[Compressed]:
    """Train one student for the classes of several teachers, on images synthesized from each teacher.

    Classes with the same name become one output of the student, which every teacher with this class teaches. Without
    class names, all classes count as different. The student's input has the largest size, and the most colour channels,
    of the teachers' inputs.

    - `checkpoints`: the teachers, two or more.
    - `student`: architecture of the student; `half`: the first teacher's architecture with half the channels.
    - `student_init`: checkpoint with the initial weights (and the architecture, where no `student` is named), or None
      for random weights. `auto`: the layers of the first teacher that has the student's form or a deeper one (see
      `init_from_teacher`), else random weights; always random weights for `shapira-sidi`.
    - `data`: synthetic sets, run folders or real images, one for each teacher. Without them, images of each teacher are
      synthesized as `synthesis` says, half of them by `second_recipe` (None: all by one recipe), in
      `<output>/teacher-1/synthetic` and so on. The default recipes are the method's.
    - `probe_images`: number of images for each teacher (other seed and recipe, never trained on) for a report of the
      agreement.
    - `method`: `logit-matching` (ours) or `shapira-sidi` (Shapira and Sidi 2020), a file each in
      `training/multi_teacher/`; `all-logits` and `paper` are their older names.
    - `training`: changes of single settings of the method's training, or complete settings.
    - `class_map`: JSON file with a list of class names for each teacher, in place of the names on the cards.
    - `eval_data`: real images on which accuracy is reported: one source with the student's classes, or one for each
      teacher. They influence nothing else.
    - `output`: folder (default: `<checkpoint>-merge`, by the first teacher) of the student (`model.safetensors`,
      `config.json`), the synthesized images, `metrics.jsonl` and `run.json`. `resume`: continue an interrupted run
      there. `overwrite`: replace the contents of the folder.
    - `compute`: device, precision, compilation and seed.

    Raises `BadInput` where the teachers cannot be merged (the same checkpoint twice, class names that differ only in
    spelling, inputs of incompatible channels) or an option cannot be used, and `DfcompressError` where the work fails.
    """
    merging = merging_method(method)
    if synthesis.records not in (None, "beside"):
        raise BadInput(f"--records {synthesis.records} is of one model.", "Put each record beside its model.")
    teachers = [as_classifier(checkpoint) for checkpoint in one_or_more(checkpoints)]
    data, eval_data = one_or_more(data), one_or_more(eval_data)
    _check_different(teachers)
    classes = join_classes(teachers, class_map)
    student_model, sentence, origin = begin_student(
        student,
        _common_card(teachers, classes),
        init=student_init,
        teachers=list(zip(teachers, classes.of, strict=True)) if merging.layer_init else [],
        seed=compute.seed,
    )
    console.notice(sentence)
    architecture = student_model.card.architecture
    synthesis, second_recipe = usual_images(merging, synthesis, second_recipe)
    sources = _sources(teachers, data, synthesis, compute, second_recipe, probe_images, student=architecture)
    usual = merging.training(min(map(len, sources)), len(teachers))
    training = with_defaults(usual.suiting(student_model.card.input_size), training)
    options = {
        "teachers": [teacher.identity() for teacher in teachers],
        "student": architecture,
        "student_init": origin,
        "method": method_name(method),
        "outputs": [outputs.tolist() for outputs in classes.of],
        "data": list(map(str, data)),
        "probe_images": probe_images,
        "synthesis": [source.origin() for source in sources],
    }
    distiller = merging.distiller(teachers, classes)
    train = Train(student_model, lambda: distiller, training, compute)
    inputs = [class_map, *data, *eval_data]
    return Compression(
        verb="merge",
        student=student_model,
        teachers=teachers,
        outputs=classes.of,
        sources={f"{OF_TEACHER}{number}": source for number, source in enumerate(sources, 1)},
        measure=merged_evaluator(eval_data, student_model, teachers, classes.of, compute.device),
        compute=compute,
    ).plan({"training": train}, options, inputs, output, resume=resume, overwrite=overwrite)


def _sources(
    teachers: Sequence[Classifier],
    data: Sequence[str | Path],
    synthesis: Synthesis,
    compute: Compute,
    second_recipe: str | None,
    probe_images: int,
    *,
    student: str,
) -> list[TransferSetSource]:
    """The image source of each teacher; the seed of teacher number i, from 0, is the run's seed plus i.

    `student`: architecture of the student that images of adaptive recipes compete with. Raises `BadInput` where `data`
    is not empty and does not have one entry for each teacher.
    """
    if len(data) not in (0, len(teachers)):
        raise BadInput(f"--data was given {len(data)} times for {len(teachers)} teachers.", "Give one for each.")
    return [
        TransferSetSource(
            teacher,
            of_teacher,
            synthesis,
            replace(compute, seed=compute.seed + number),
            second_recipe=second_recipe,
            probe_images=probe_images,
            competitor=partial(co_training, teacher, student=student, compute=compute),
        )
        for number, (teacher, of_teacher) in enumerate(zip_longest(teachers, data))
    ]


def _check_different(teachers: Sequence[Classifier]) -> None:
    if len(teachers) < 2:
        raise BadInput("Merging takes two checkpoints or more.", "Use distill for one.")
    seen: dict[str, str] = {}
    for teacher in teachers:
        digest = teacher.identity()["sha256"]
        if digest in seen:
            raise BadInput(f"{teacher.name} and {seen[digest]} are the same checkpoint.", "Name each teacher once.")
        seen[digest] = teacher.name


def _common_card(teachers: Sequence[Classifier], outputs: ClassMap) -> ModelCard:
    """The student's card: all classes, the largest input size, colour where a teacher has colour, and the mean of the
    teachers' normalisations. Raises `BadInput` where the teachers' channels have no common form.
    """
    sizes = [teacher.card.input_size for teacher in teachers]
    channels = {size[0] for size in sizes}
    if len(channels) > 1 and channels != {GREY, COLOUR}:
        counts = " and ".join(map(str, sorted(channels)))
        raise BadInput(f"Images of {counts} channels have no common form.", "Merge teachers of one kind of image.")
    size = (max(channels), max(size[1] for size in sizes), max(size[2] for size in sizes))
    if len(set(sizes)) > 1:
        console.notice(f"Teachers of several input sizes: the student takes {'x'.join(map(str, size))}.")

    def middle(name: str) -> tuple[float, ...]:
        each = [getattr(teacher.card, name) for teacher in teachers]
        wide = [values * size[0] if len(values) == GREY else values for values in each]
        return tuple(sum(values) / len(values) for values in zip(*wide, strict=True))

    return ModelCard(teachers[0].card.architecture, outputs.count, size, middle("mean"), middle("std"), outputs.names)
