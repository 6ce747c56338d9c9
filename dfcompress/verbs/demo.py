"""`demo`: the main workflow on files that the package ships, a LeNet-5 for MNIST and 10,000 real test images.

inspect → invert → distill to half the width → quantize → report. No training image is in the package.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dfcompress import console
from dfcompress.command_line import started_by
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute
from dfcompress.models.checkpoint import load
from dfcompress.models.safe_reading import file_bytes
from dfcompress.run import Run
from dfcompress.synthesis.preview import PREVIEW
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.verbs._verb import verb
from dfcompress.verbs.distill import distill
from dfcompress.verbs.evaluate import Score
from dfcompress.verbs.inspect import Inspection, inspect
from dfcompress.verbs.invert import Inversion, invert
from dfcompress.verbs.quantize import quantize
from dfcompress.verbs.report import FILE, missing_packages, report

FILES = Path(__file__).parents[1] / "demo_files"
SHOWN = Synthesis(images=512, settings={"steps": 200})
TAUGHT = Synthesis(images=1536, settings={"steps": 200})
STUDENT = "lenet5_bn_half"
BITS = "4w4a"


@dataclass(frozen=True)
class DemoRow:
    """One model of the demo: its name, its `score` on the real test images, the `bytes` of its file, and the `seconds`
    that it took to make.
    """

    model: str
    score: Score
    bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them; those of `score` stand beside the others."""
        return {**self.score.to_json(), "model": self.model, "bytes": self.bytes, "seconds": self.seconds}


@dataclass(frozen=True)
class Demo:
    """The result of the demo.

    `output`: folder of all results. `picture`: file that shows some synthetic images. `teacher`: inspection of the
    shipped model. `images`: result of `invert`. `rows`: the teacher and each compressed model. `seconds`: total time.
    `report`: HTML page about the runs, None where the packages for it are not installed.
    """

    output: str
    picture: str
    teacher: Inspection
    images: Inversion
    rows: list[DemoRow]
    seconds: float
    report: str | None

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them."""
        return {**asdict(self), "teacher": self.teacher.to_json(), "rows": [row.to_json() for row in self.rows]}


@verb
def demo(
    *,
    output: str | Path = "dfcompress-demo",
    compute: Compute = Compute(),
    resume: bool = False,
    overwrite: bool = False,
) -> Demo:
    """Invert, distill and quantize the shipped teacher, and evaluate the results on real test images.

    `output`: folder of all results. `compute`: device, precision, compilation and seed. `resume`: continue an
    interrupted run in `output`. `overwrite`: replace the contents of `output`.
    Raises `BadInput` where the folder cannot be used, or several processes run, and `DfcompressError` where the work
    fails.
    """
    if world().world_size > 1:
        raise BadInput("demo runs in one process.", "Start it without torchrun.")
    run = Run("demo", Path(output), asdict(compute), resume=resume, overwrite=overwrite)
    teacher = load(FILES)
    with run.timed("total"), started_by(None):  # No command line makes one part of the demo alone.
        console.notice("Making images from the teacher.")
        images = _step(run, "images", resume)
        made = invert(teacher, synthesis=SHOWN, compute=compute, **images)
        console.notice(f"Making more, by two recipes, and training a student of half the width on them ({STUDENT}).")
        student = distill(
            teacher,
            student=STUDENT,
            synthesis=TAUGHT,
            training={"steps": 1500},
            probe_images=0,
            compute=compute,
            eval_data=FILES,
            **_step(run, "student", resume),
        )
        console.notice(f"Quantizing the teacher to {BITS}.")
        packed = quantize(
            teacher,
            bits=BITS,
            data=made.output,
            finetune="lsq",
            training={"steps": 100},
            compute=compute,
            eval_data=FILES,
            **_step(run, "quantized", resume),
        )
    assert student.evaluation
    assert packed.evaluation
    of_teacher, of_student = student.evaluation.results
    _, of_packed = packed.evaluation.results
    packed_seconds = made.seconds + packed.seconds["total"]
    rows = [
        DemoRow("teacher", of_teacher, file_bytes(FILES), 0.0),
        DemoRow("half-width student", of_student, student.bytes, round(student.seconds["total"], 1)),
        DemoRow(f"teacher {BITS}", of_packed, packed.bytes, round(packed_seconds, 1)),
    ]
    result = Demo(
        output=str(run.folder),
        picture=str(Path(made.output) / PREVIEW),
        teacher=inspect(teacher),
        images=made,
        rows=rows,
        seconds=round(run.seconds["total"], 1),
        report=None,
    )
    run.finish(result.to_json())
    if missing_packages():
        return result
    page = report([run.folder], output=run.folder / FILE, data=FILES, overwrite=True)
    return replace(result, report=page.output)


def _step(run: Run, name: str, resume: bool) -> dict[str, Any]:
    folder = run.folder / name
    return {"output": folder, "resume": resume and folder.exists()}
