"""`export`: a checkpoint in, an ONNX file out that was run and compared.

dfcompress.export("resnet20-4w4a")                      # resnet20-4w4a/model.onnx
dfcompress.export("resnet20-8w8a", target="tensorrt", output="resnet20.onnx")
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfcompress import console
from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import MANIFEST, as_float
from dfcompress.device import exact_fp32
from dfcompress.errors import BadInput, DfcompressError
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.fake_quantizers import FLOAT_BITS, in_float, quantized_layers
from dfcompress.models.weights import file_bytes
from dfcompress.quantization.onnx import INPUT, write_onnx
from dfcompress.randomness import generator

Target = Literal["onnxruntime", "tensorrt"]

FILE = "model.onnx"
INT8 = 8
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CHECKED = 1024  # Images that both are asked about.
BATCH = 256
TIMED = 64
ROUNDS = 5


@dataclass(frozen=True)
class Exported:
    """An ONNX file and how it compares with the model it was made from.

    Of `images` images `equal` are answered alike in onnxruntime; `median_difference` and `largest_difference` are those
    of the logits. `equal_rewritten` counts the same with onnxruntime's own rewriting of quantized operations, which
    rounds differently (None where the file does not load then). `bytes` of the file, `bytes_ratio` against the
    checkpoint's, `milliseconds` of a batch of 64 in onnxruntime (with its rewriting where it loads), and
    `milliseconds_fp32` of the same network in float there.
    """

    path: str
    target: Target
    bytes: int
    bytes_ratio: float | None
    images: int
    equal: int
    equal_rewritten: int | None
    median_difference: float
    largest_difference: float
    milliseconds: float
    milliseconds_fp32: float

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


def export(
    checkpoint: str | Path | Classifier,
    *,
    output: str | Path | None = None,
    target: Target = "onnxruntime",
    data: str | Path | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a quantized or float model as ONNX: images `(N, C, H, W)` in [0, 1] → logits, any N; and check it.

    `output` is a file, by default `model.onnx` in the checkpoint's folder, or beside the file. Both models are asked
    about up to 1,024 images: those at `data`, or of the synthetic set that `quantize` left in the checkpoint's folder,
    or noise of the mean and standard deviation on the card.
    `tensorrt` takes 8-bit weights and signed 8-bit activations (`quantize --bits 8w8a --signed`) and float layers.
    Raises `BadInput` where a package is missing, the target cannot run the model, or `output` is there already.
    """
    classifier = as_classifier(checkpoint)
    exporting = Exporting(target)
    path = Path(output) if output else _beside(classifier)
    if path.exists() and not overwrite:
        raise BadInput(f"{path} is there already.", "Add --overwrite, or name another file with --output.")
    if path.is_dir() or not path.parent.is_dir():
        raise BadInput(f"--output {path} is no file in a folder that exists.", "Name a file, for instance model.onnx.")
    return exporting.write(classifier, path, _images(classifier, data))


class Exporting:
    """Writes and checks ONNX files for a target; raises `BadInput` where a package is missing."""

    def __init__(self, target: Target) -> None:
        if target not in get_args(Target):
            raise BadInput(f"There is no --target {target!r}.", f"Known: {', '.join(get_args(Target))}.")
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise BadInput(f"Export needs {', '.join(missing)}.", "Install them with: pip install 'dfcompress[onnx]'.")
        self.target = target

    def require(self, bits: Mapping[str, tuple[int | None, int]], signed: bool) -> None:
        """Raise `BadInput` where the target cannot run layers of such (weight, input) bits; activations in float are
        signed.
        """
        if self.target != "tensorrt":
            return
        for name, (weights, inputs) in bits.items():
            if weights != INT8 or inputs not in (INT8, FLOAT_BITS):
                found = f"weights of {weights or 'as yet unknown'} and inputs of {inputs} bits"
                raise BadInput(
                    f"Layer {name} has {found}, and TensorRT has kernels for 8 bits alone: 4 bits buy size.",
                    "Use --bits 8w8a, or --target onnxruntime.",
                )
        if not signed and any(inputs == INT8 for _, inputs in bits.values()):
            raise BadInput(
                "Activations have zero points, which TensorRT does not take.",
                "Quantize with --signed, or use --target onnxruntime.",
            )

    def rehearse(self, teacher: Classifier) -> None:
        """Raise `DfcompressError` where not even the float network can be exported."""
        with tempfile.TemporaryDirectory() as folder:
            write_onnx(teacher, Path(folder) / FILE)

    def write(self, classifier: Classifier, path: Path, images: Tensor) -> Exported:
        """Write `path` and compare it on `images` `(N, C, H, W)` in [0, 1]; raises `BadInput` as `require` does."""
        layers = quantized_layers(classifier.network)
        signed = all(layer.input_grid is None or layer.input_grid.signed for layer in layers.values())
        self.require({name: (layer.weight_bits, layer.input_bits) for name, layer in layers.items()}, signed)
        write_onnx(classifier, path)
        own = _answers(classifier, images)
        exact = _Session(path, rewriting=False)
        given = exact(images)
        different = (given - own).abs()
        usual = _rewriting(path)
        whole = file_bytes(classifier.path) if classifier.path else None
        return Exported(
            path=str(path),
            target=self.target,
            bytes=path.stat().st_size,
            bytes_ratio=round(path.stat().st_size / whole, 4) if whole else None,
            images=len(images),
            equal=_equal(given, own),
            equal_rewritten=_equal(usual(images), own) if usual else None,
            median_difference=different.median().item(),
            largest_difference=different.max().item(),
            milliseconds=(usual or exact).milliseconds(images),
            milliseconds_fp32=_milliseconds_fp32(classifier, images),
        )


def _rewriting(path: Path) -> _Session | None:
    """The file as onnxruntime rewrites it by default; None where it cannot, as with 2 bits."""
    try:
        return _Session(path, rewriting=True)
    except DfcompressError as error:
        console.notice(f"Only with session.disable_quant_qdq=1: {error.problem}")
        return None


class _Session:
    """An ONNX file in onnxruntime on the CPU, with or without its own rewriting of quantized operations."""

    def __init__(self, path: Path, *, rewriting: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_quant_qdq", "0" if rewriting else "1")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # Onnxruntime's own exceptions have no common class but this.
            raise DfcompressError(f"onnxruntime cannot load {path}: {error}", "Use the model without ONNX.") from error

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of images."""
        return torch.cat([torch.from_numpy(self._run(some)) for some in images.split(BATCH)])

    def milliseconds(self, images: Tensor) -> float:
        """The least time of a batch of 64, of some rounds."""
        few = images[torch.arange(TIMED) % len(images)]
        self._run(few)
        seconds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            self._run(few)
            seconds.append(time.perf_counter() - started)
        return round(1000 * min(seconds), 2)

    def _run(self, images: Tensor) -> NDArray[np.float32]:
        return self._session.run(None, {INPUT: images.numpy()})[0]


def _milliseconds_fp32(classifier: Classifier, images: Tensor) -> float:
    """The time of the same network in float, in onnxruntime too."""
    with tempfile.TemporaryDirectory() as folder, in_float(classifier.network):
        write_onnx(classifier, Path(folder) / FILE)
        return _Session(Path(folder) / FILE, rewriting=True).milliseconds(images)


@torch.no_grad()
def _answers(classifier: Classifier, images: Tensor) -> Tensor:
    with exact_fp32(), evaluating(classifier):
        return torch.cat([classifier(some.to(classifier.mean.device)).cpu() for some in images.split(BATCH)])


def _equal(one: Tensor, other: Tensor) -> int:
    return int((one.argmax(1) == other.argmax(1)).sum())


def _beside(classifier: Classifier) -> Path:
    if classifier.path is None:
        raise BadInput(f"{classifier.name} is no file that an export could stand beside.", "Name an output.")
    return classifier.path / FILE if classifier.path.is_dir() else classifier.path.with_suffix(".onnx")


def _images(classifier: Classifier, data: str | Path | None) -> Tensor:
    """Images `(N, C, H, W)` in [0, 1] to compare on, `CHECKED` at most."""
    made = classifier.path / "synthetic" if classifier.path else None
    if data is None and made is not None and (made / MANIFEST).exists():
        data = made
    if data is None:
        shape = (CHECKED // 4, *classifier.card.input_size)
        noise = torch.randn(shape, generator=generator("export")).to(classifier.mean.device)
        return classifier.denormalise(noise).clamp(0, 1).cpu()
    source = open_images(data, classifier.card)
    batches = source.batches(BATCH, every=max(1, len(source) // CHECKED))
    return torch.cat([images for images, _ in islice(batches, max(1, CHECKED // BATCH))])


def sampled(images: Tensor) -> Tensor:
    """Some stored images `(N, C, H, W)`, evenly spread, in [0, 1]."""
    return as_float(images[:: -(-len(images) // CHECKED)])
