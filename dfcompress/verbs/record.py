"""`record`: compute statistics of a model's activations on its training data; the owner releases them with the weights.

dfcompress.record("hinton.pt", data="train", settings=RecordSettings(kind="all-layers"))
dfcompress.record("vgg16.pt", data="train", settings=RecordSettings(kind="bn-equivalent"), output="vgg16.safetensors")
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dfcompress import console
from dfcompress.data.image_source import ImageSource
from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.evaluation.metrics import finite_outputs
from dfcompress.machine.device import resolve_device
from dfcompress.machine.process import exact_fp32
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.recorder import LOGITS, HookRecorder, outputs_of_one_image
from dfcompress.models.safe_reading import weights_files
from dfcompress.randomness import generator
from dfcompress.run import check_output_file
from dfcompress.settings import replace_settings
from dfcompress.synthesis.records import BN_EQUIVALENT, FIXED_DROPOUT, SPECTRAL
from dfcompress.synthesis.records.accumulator import RecordAccumulator, RecordSettings
from dfcompress.synthesis.records.bn_equivalent import StatisticsAccumulator
from dfcompress.synthesis.records.gaussian import GaussianAccumulator, dropouts
from dfcompress.synthesis.records.moments import StreamingMoments, merge_states, states
from dfcompress.synthesis.records.record_file import PIXEL_MEAN, PIXEL_STD, Description, Record, beside
from dfcompress.synthesis.records.spectral import SpectralAccumulator
from dfcompress.verbs._verb import verb

BATCH_SIZE = 500
NUMBERS_A_BATCH = 2**26


@dataclass(frozen=True)
class Recorded:
    """An activation record that was written, or would be written with `dry_run`.

    `output`: its file. `kind`: kind of record. `units`: number of outputs of each recorded layer. `images`: number of
    images. `classes`: number of images of each class. `bytes`: size of the file. `data_bytes`: size of the images at 8
    bits. `memory_bytes`: memory of the sums. `details`: values of the kind (temperature and form of the covariance, or
    share of coefficients and number of activations of each class). `seconds`: time of recording, 0 with `dry_run`.
    """

    output: str
    kind: str
    units: dict[str, int]
    images: int
    classes: list[int]
    bytes: int
    data_bytes: int
    memory_bytes: int
    details: dict[str, Any]
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them."""
        return asdict(self)


@verb
def record(
    checkpoint: str | Path | Classifier,
    *,
    data: str | Path,
    settings: RecordSettings | Mapping[str, Any] = RecordSettings(),
    output: str | Path | None = None,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Recorded:
    """Record a model's activations on real images, in one pass (Lopes et al. 2017).

    Sums run in float64, and memory does not grow with the number of images. Several processes share the images; their
    record equals that of one process up to rounding.

    - `checkpoint`: the model. `data`: the labelled images that it was trained on.
    - `settings`: a `RecordSettings`, or changes of its default values by name.
    - `output`: file to write. Default: `<checkpoint>.records.safetensors` beside the checkpoint, where commands that
      synthesize images find it. `overwrite`: replace an existing file.
    - `device`: `auto`, `cpu`, `cuda` or `cuda:N`.
    - `seed`: chooses the images whose activations a spectral record stores.
    - `dry_run`: compute and write nothing; `bytes` of the result is then the size of the tensors.

    Raises `BadInput` where a class has too few images, the kind of record does not fit the network or the memory, or an
    argument cannot be used, and `DfcompressError` where the network's outputs are not finite or the file cannot be
    written.
    """
    started = time.perf_counter()
    if isinstance(settings, Mapping):
        settings = replace_settings(RecordSettings(), settings, "setting of a record called")
    teacher = as_classifier(checkpoint).frozen().to(resolve_device(device))
    path = _path(teacher, output, overwrite=overwrite)
    source = open_images(data, teacher.card, part="train")
    if isinstance(source, SyntheticSet):
        raise BadInput(f"{data} is a synthetic set.", "A record is made from the images the model was trained on.")
    counts = source.labels.bincount(minlength=teacher.card.classes).tolist()
    _require_enough_images(counts, settings)
    outputs = _layers(teacher, settings)
    data_bytes = len(source) * math.prod(source.size)
    accumulator = _accumulator(teacher, outputs, settings, source.labels, data_bytes, seed)
    recorded = Recorded(
        output=str(path),
        kind=settings.kind,
        units={layer: output[0].numel() for layer, output in outputs.items()},
        images=len(source),
        classes=counts,
        bytes=accumulator.bytes,
        data_bytes=data_bytes,
        memory_bytes=accumulator.memory_bytes,
        details=accumulator.details(),
    )
    for notice in (*_notices(recorded, settings), *accumulator.notices()):
        console.notice(notice)
    if dry_run:
        return recorded
    with world().session():
        pixels = _see(teacher, source, outputs, accumulator, path)
        if world().is_main:
            about = Description(
                kind=settings.kind,
                layers=tuple(outputs),
                images=len(source),
                class_counts=tuple(counts),
                teacher=teacher.identity()["sha256"],
                **accumulator.details(),
            )
            of_pixels = {PIXEL_MEAN: pixels.mean[0].float(), PIXEL_STD: pixels.variance[0].sqrt().float()}
            Record(about, of_pixels | accumulator.tensors()).save(path)
        world().barrier()
    return Recorded(
        **{**asdict(recorded), "bytes": path.stat().st_size, "seconds": round(time.perf_counter() - started, 2)}
    )


def _path(teacher: Classifier, output: str | Path | None, *, overwrite: bool) -> Path:
    """The file of the record; raises `BadInput`, before any work, where it cannot be written."""
    if output is None and teacher.path is None:
        raise BadInput("A model that came from no file has no place for its record.", "Name one with --output.")
    path = Path(output) if output else beside(teacher.path or Path())
    inputs = weights_files(teacher.path) if teacher.path else []
    check_output_file(path, example="model.records.safetensors", overwrite=overwrite, inputs=inputs)
    return path


def _require_enough_images(counts: Sequence[int], settings: RecordSettings) -> None:
    for label, count in enumerate(counts):
        if settings.keeps_classes_apart and count < settings.min_images:
            raise BadInput(
                f"Class {label} has {count} images, fewer than --min-images {settings.min_images}: a record would know"
                " too little of the class, or tell too much of them.",
                "Give more images, or keep classes together with --class-independent or --kind bn-equivalent.",
            )
    if sum(counts) < 2:
        raise BadInput("One image has no variance.", "Give more images.")


def _layers(teacher: Classifier, settings: RecordSettings) -> dict[str, Tensor]:
    """The layers to record, in the order of the forward pass, with their outputs for one image, `(1, ...)`.

    Raises `BadInput` for a pattern that matches no layer.
    """
    outputs = outputs_of_one_image(teacher)
    if settings.kind == "top-layer":
        return {LOGITS: outputs[LOGITS]}
    if settings.kind == BN_EQUIVALENT:
        del outputs[LOGITS]
    patterns = settings.layers or ["*"]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in outputs):
            raise BadInput(f"--layers {pattern!r} matches no layer.", f"Known: {', '.join(outputs)}.")
    return {name: output for name, output in outputs.items() if any(fnmatch(name, each) for each in patterns)}


def _accumulator(
    teacher: Classifier,
    outputs: dict[str, Tensor],
    settings: RecordSettings,
    labels: Tensor,
    data_bytes: int,
    seed: int,
) -> RecordAccumulator:
    if settings.kind == BN_EQUIVALENT:
        return StatisticsAccumulator(teacher.network, outputs)
    if settings.kind in SPECTRAL:
        random = generator("record", seed)
        return SpectralAccumulator(teacher, list(outputs), settings, labels, data_bytes=data_bytes, random=random)
    if settings.kind == FIXED_DROPOUT:
        dropouts(teacher)  # Refuses a network without dropout.
    return GaussianAccumulator(outputs, settings, teacher.card.classes)


def _notices(recorded: Recorded, settings: RecordSettings) -> list[str]:
    sizes = f"{recorded.bytes / 2**20:,.1f} MiB of record, {recorded.data_bytes / 2**20:,.1f} MiB of data"
    found = [f"Keeping {recorded.kind} of {len(recorded.units)} layers: {sizes}."]
    if settings.keeps_classes_apart and settings.kind not in SPECTRAL:
        found.append(f"It tells of every class on its own; behind the smallest are {min(recorded.classes)} images.")
    return found


@torch.no_grad()
def _see(
    teacher: Classifier, source: ImageSource, layers: dict[str, Tensor], accumulator: RecordAccumulator, path: Path
) -> StreamingMoments:
    """Pass this process's share of the images to its accumulator, and merge the shares of all processes in the main
    process; return the moments of the pixels.

    Raises `DfcompressError` where the network's outputs are not finite.
    """
    everyone = world()
    pixels = StreamingMoments(1, teacher.card.input_size[0], 1)
    # Large outputs of many images at once would fill the memory. All processes use the same size.
    size = max(1, min(BATCH_SIZE, NUMBERS_A_BATCH // sum(output[0].numel() for output in layers.values())))
    batches = source.batches(size, first=everyone.rank, every=everyone.world_size)
    total = -(-len(source) // size)
    recorder = HookRecorder(teacher.network, outputs=list(layers))
    with evaluating(teacher), exact_fp32(), console.progress("batch", total) as progress:
        for number, (images, labels) in enumerate(batches):
            recorded = recorder(teacher.normalise(images.to(teacher.mean.device))).outputs.values()
            outputs = [finite_outputs(output.flatten(1) if accumulator.flat else output) for output in recorded]
            first = (everyone.rank + number * everyone.world_size) * size
            accumulator.update([output.cpu() for output in outputs], labels, torch.arange(first, first + len(images)))
            pixels.update(images.movedim(1, -1).flatten(0, -2))
            progress.update(min(total, (number + 1) * everyone.world_size))
    _gather(accumulator, pixels, path)
    return pixels


def _gather(accumulator: RecordAccumulator, pixels: StreamingMoments, path: Path) -> None:
    """Merge the sums of all processes in the main process, through temporary files beside the record."""
    everyone = world()
    parts = [path.with_name(f".{path.name}.{rank}") for rank in range(everyone.world_size)]
    if not everyone.is_main:
        save_file(accumulator.state() | states({"pixels": pixels}), parts[everyone.rank])
    everyone.barrier()
    try:
        for part in parts[1:] if everyone.is_main else []:
            state = load_file(part)
            accumulator.merge(state)
            merge_states({"pixels": pixels}, state)
    finally:
        for part in parts if everyone.is_main else []:
            part.unlink(missing_ok=True)
